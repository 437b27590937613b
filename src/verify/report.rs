//! A comparison as text.

use std::{collections::BTreeMap, fmt::Write as _};

use super::{Difference, LayerReport, MxNode, OutputReport, VerifyReport};
use crate::rewrite::align;

/// Rows of a table, set in; all columns but the first are numbers or short, and to the right.
fn table(rows: &[Vec<String>]) -> String {
    let lines = align(rows, |column| column > 0);
    lines.lines().map(|line| format!("  {line}\n")).collect()
}

fn number(value: f64) -> String {
    match value {
        0.0 => "0".to_owned(),
        value if value.is_infinite() => "inf".to_owned(),
        value => format!("{value:.3e}"),
    }
}

fn decibels(difference: &Difference) -> String {
    match difference.max_abs {
        0.0 => "exact".to_owned(),
        _ => format!("{:.2}", difference.sqnr()),
    }
}

fn odd(difference: &Difference) -> String {
    let d = difference;
    match d.nan_a + d.nan_b + d.inf_a + d.inf_b {
        0 => "-".to_owned(),
        _ => format!("{}/{} {}/{}", d.nan_a, d.nan_b, d.inf_a, d.inf_b),
    }
}

fn owned<const N: usize>(cells: [&str; N]) -> Vec<String> {
    cells.map(str::to_owned).to_vec()
}

/// The whole report, or with `brief` nothing node by node.
pub(super) fn text(report: &VerifyReport, brief: bool) -> String {
    let mut text = match brief {
        true => String::new(),
        false => format!("A {}\nB {}\n", report.a.display(), report.b.display()),
    };
    let _ = writeln!(
        text,
        "ONNX Runtime {}, {}: {}; {} runs",
        report.onnxruntime, report.device, report.inputs, report.runs
    );
    text.push_str(&outputs(report));
    if !report.layers.is_empty() {
        text.push_str(&layers(&report.layers));
    }
    text.push_str(&if brief { kernels(report) } else { placement(report) });
    for note in &report.notes {
        let _ = writeln!(text, "note: {note}");
    }
    for failure in &report.failures {
        let _ = writeln!(text, "FAILED: {failure}");
    }
    if report.failures.is_empty() {
        text.push_str("ok\n");
    }
    text
}

fn outputs(report: &VerifyReport) -> String {
    let head =
        ["output", "type", "shape", "max error", "mean error", "of range", "SQNR dB", "top-1"];
    let mut head = owned(head);
    head.push("NaN a/b inf a/b".to_owned());
    let mut rows = vec![head];
    let (caches, others): (Vec<_>, Vec<_>) =
        report.outputs.both.iter().partition(|output| output.is_cache());
    rows.extend(others.iter().map(|output| output_row(output)));
    // A row a layer would be long: the worst of them says enough.
    let sqnr = |output: &&&OutputReport| output.difference.sqnr();
    if let Some(worst) = caches.iter().min_by(|a, b| sqnr(a).total_cmp(&sqnr(b))) {
        let mut row = output_row(worst);
        row[0] = format!("{} (worst of {} caches)", worst.name, caches.len());
        rows.push(row);
    }
    format!("\n{}", table(&rows))
}

fn output_row(output: &OutputReport) -> Vec<String> {
    let d = &output.difference;
    let types = match output.dtype_a == output.dtype_b {
        true => output.dtype_a.clone(),
        false => format!("{}/{}", output.dtype_a, output.dtype_b),
    };
    vec![
        output.name.clone(),
        types,
        format!("{:?}", output.shape),
        number(d.max_abs),
        number(d.mean_abs()),
        d.relative().map_or_else(|| "-".to_owned(), |share| format!("{:.3} %", share * 100.0)),
        decibels(d),
        output
            .top1_agreement
            .map_or_else(|| "-".to_owned(), |share| format!("{:.2} %", share * 100.0)),
        odd(d),
    ]
}

fn layers(layers: &[LayerReport]) -> String {
    let head =
        ["layer", "weight", "activation", "SQNR dB alone", "in the model", "max error alone"];
    let mut rows = vec![owned(head)];
    let missing = || "-".to_owned();
    for layer in layers {
        let (local, whole) = (layer.local.as_ref(), layer.accumulated.as_ref());
        let mut row = vec![
            layer_name(layer, layers),
            layer.weight_format.clone(),
            layer.activation_format.clone(),
            local.map_or_else(missing, decibels),
            whole.map_or_else(missing, decibels),
            local.map_or_else(missing, |d| number(d.max_abs)),
        ];
        row.extend(layer.note.clone());
        rows.push(row);
    }
    format!("\n{}", table(&rows))
}

/// The layer's path; with its node and body where others have the same path.
fn layer_name(layer: &LayerReport, layers: &[LayerReport]) -> String {
    let shown = layer.shown();
    if layers.iter().filter(|other| other.shown() == shown).count() == 1 {
        return shown.to_owned();
    }
    match &layer.body {
        Some(body) => format!("{shown} ({body})"),
        None => format!("{shown} ({})", layer.node),
    }
}

fn placement(report: &VerifyReport) -> String {
    let placement = &report.placement;
    let mut rows = vec![owned(["provider", "operator", "nodes", "runs"])];
    for op in &placement.ops {
        rows.push(vec![
            op.provider.clone(),
            op.op.clone(),
            op.nodes.to_string(),
            op.runs.to_string(),
        ]);
    }
    let mut text = format!("\n{}", table(&rows));
    if placement.mx_nodes.is_empty() {
        return text + "\nB has no MX node\n\n";
    }
    let mut rows = vec![owned(["MX node", "module path", "format", "provider", "kernel", "runs"])];
    rows.extend(placement.mx_nodes.iter().map(|node| mx_row(node).to_vec()));
    let ran = placement.mx_nodes.iter().filter(|node| node.provider.is_some()).count();
    text.push_str(&format!("\n{}", table(&rows)));
    let _ = writeln!(text, "\n{ran} of {} MX nodes ran\n", placement.mx_nodes.len());
    text
}

/// MX nodes by what they are and what ran them.
fn kernels(report: &VerifyReport) -> String {
    let nodes = &report.placement.mx_nodes;
    if nodes.is_empty() {
        return "\nthe result has no MX node\n\n".to_owned();
    }
    let mut counts: BTreeMap<Vec<String>, usize> = BTreeMap::new();
    for node in nodes {
        let [_, _, format, provider, kernel, _] = mx_row(node);
        *counts.entry(vec![node.op.clone(), format, provider, kernel]).or_default() += 1;
    }
    let mut rows = vec![owned(["MX operator", "format", "provider", "kernel", "nodes"])];
    rows.extend(counts.into_iter().map(|(mut row, count)| {
        row.push(count.to_string());
        row
    }));
    format!("\n{}\n", table(&rows))
}

fn mx_row(node: &MxNode) -> [String; 6] {
    let dash = || "-".to_owned();
    let format = |name: &Option<String>| name.clone().unwrap_or_else(dash);
    let kernels = match (&node.provider, node.kernels.is_empty()) {
        (None, _) => "not run".to_owned(),
        (Some(_), true) => "no rows".to_owned(),
        (Some(_), false) => node.kernels.join(", "),
    };
    [
        node.node.clone(),
        node.module_path.clone().unwrap_or_else(dash),
        format!("{} x {}", format(&node.weight_format), format(&node.activation_format)),
        node.provider.clone().unwrap_or_else(dash),
        kernels,
        node.runs.to_string(),
    ]
}
