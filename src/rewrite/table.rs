//! The plan as a table for people.

use super::{CheckpointUse, RewritePlan, plan::PlannedSite};

const HEADER: [&str; COLUMNS] = [
    "module path",
    "source (confidence)",
    "op",
    "n",
    "k",
    "weight",
    "activation",
    "bytes",
    "after",
    "SQNR dB",
];
const COLUMNS: usize = 10;

/// One line a layer, then what is left alone and why. The last column is there when the plan was
/// measured ([`measure_plan`](super::measure_plan)).
pub fn plan_table(plan: &RewritePlan) -> String {
    let measured = plan.sites.iter().any(|planned| planned.expected_sqnr.is_some());
    let mut rows = vec![HEADER.map(str::to_owned)];
    rows.extend(plan.sites.iter().map(row));
    let columns = if measured { COLUMNS } else { COLUMNS - 1 };
    let rows: Vec<&[String]> = rows.iter().map(|row| &row[..columns]).collect();
    // Numbers to the right.
    let mut text = align(&rows, |column| matches!(column, 3 | 4 | 7 | 8 | 9));
    let (before, after) = plan.bytes();
    for planned in &plan.products {
        let product = &planned.product;
        let path = product.module_path.as_deref().unwrap_or("(none)");
        let (name, op, format) =
            (&product.node_name, &product.op, planned.format.activation_name());
        text.push_str(&format!("attention product  {path}  {name} ({op})  {format} x {format}\n"));
    }
    text.push_str(&format!("{} layers, {before} -> {after} bytes\n", plan.sites.len()));
    if !plan.products.is_empty() {
        text.push_str(&format!("{} attention products\n", plan.products.len()));
    }
    for (index, rule) in plan.recipe.rules.iter().enumerate() {
        // Most often an expression or a range that is not what was meant.
        let takes = plan.sites.iter().any(|planned| planned.site.rule == index)
            || plan.products.iter().any(|planned| planned.product.rule == index);
        if rule.format.is_some() && !takes {
            text.push_str(&format!("rule {} of {} takes no layer\n", index + 1, plan.recipe.name));
        }
    }
    if let Some(checkpoint) = &plan.checkpoint {
        text.push_str(&summary(plan, checkpoint));
    }
    if !plan.skipped.is_empty() {
        text.push_str(&format!("\nleft alone: {} candidates\n", plan.skipped.len()));
    }
    for skipped in &plan.skipped {
        text.push_str(&format!("  {} ({}): {}\n", skipped.node, skipped.op, skipped.reason));
    }
    text
}

/// How much of the graph is in the checkpoint: one line.
pub fn checkpoint_line(plan: &RewritePlan, checkpoint: &CheckpointUse) -> String {
    let CheckpointUse { path, layers, matched, ambiguous, .. } = checkpoint;
    let imported = plan.sites.iter().filter(|planned| planned.imported().is_some()).count();
    format!(
        "checkpoint {}: {matched} of {layers} weights found, {ambiguous} of them several times; \
         {imported} imported as they are\n",
        path.display()
    )
}

/// The same, and what is to know of single layers.
fn summary(plan: &RewritePlan, checkpoint: &CheckpointUse) -> String {
    let mut text = checkpoint_line(plan, checkpoint);
    for planned in &plan.sites {
        if let Some(note) = &planned.note {
            let site = &planned.site;
            let name = site.module_path.as_deref().unwrap_or(&site.node_name);
            text.push_str(&format!("  {name}: {note}\n"));
        }
    }
    text
}

fn row(planned: &PlannedSite) -> [String; COLUMNS] {
    let site = &planned.site;
    [
        site.module_path.clone().unwrap_or_else(|| format!("(none) {}", site.node_name)),
        match site.module_path {
            Some(_) => format!("{} ({})", site.path_source, site.path_source.confidence()),
            None => site.path_source.to_string(),
        },
        match &site.experts {
            Some(experts) => format!("{}, {} experts", site.op, experts.count),
            None => site.op.clone(),
        },
        site.n.to_string(),
        site.k.to_string(),
        match planned.imported() {
            Some(_) => format!("{} (imported)", planned.format.weight_name()),
            None => planned.format.weight_name().to_owned(),
        },
        planned.format.activation_name().to_owned(),
        planned.bytes_before.to_string(),
        planned.bytes_after.to_string(),
        match planned.expected_sqnr {
            Some(f64::INFINITY) => "exact".to_owned(),
            Some(sqnr) => format!("{sqnr:.2}"),
            None => String::new(),
        },
    ]
}

/// Rows of cells as lines, columns padded to their longest cell; those that `right` names to the right.
pub(crate) fn align<R: AsRef<[String]>>(rows: &[R], right: impl Fn(usize) -> bool) -> String {
    let columns = rows.iter().map(|row| row.as_ref().len()).max().unwrap_or(0);
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.as_ref().get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let cells = row.as_ref().iter().zip(&widths).enumerate();
        let cells = cells.map(|(column, (cell, &width))| match right(column) {
            true => format!("{cell:>width$}"),
            false => format!("{cell:<width$}"),
        });
        text.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
        text.push('\n');
    }
    text
}
