//! Tables for people: on the terminal, in report.md and in report.html.

use super::record::{Record, Status};
use serde_json::{Map, Value};
use std::fmt::Write as _;

/// The columns of the table; the first and the last are text, the others numbers.
const COLUMNS: [&str; 11] = [
    "stage",
    "ppl",
    "Δppl %",
    "xent",
    "Δxent",
    "entropy",
    "bits/byte",
    "size MB",
    "sites",
    "tok/s",
    "status",
];

/// One model's table: a row a stage. Differences are to the stage `baseline`, else to the first
/// stage that has figures.
struct Table {
    model: String,
    rows: Vec<[String; COLUMNS.len()]>,
    /// Stage and reason of what was skipped or failed, or is ok with a remark.
    notes: Vec<(String, Status, String)>,
}

fn tables(records: &[Record]) -> Vec<Table> {
    let mut models: Vec<&str> = Vec::new();
    for record in records {
        if !models.contains(&record.model.as_str()) {
            models.push(&record.model);
        }
    }
    // Graphs given one by one are each a model of their own, but belong side by side.
    let single = |model: &&str| records.iter().filter(|r| r.model == **model).count() == 1;
    if models.len() > 1 && models.iter().all(single) {
        return vec![table("graphs", &records.iter().collect::<Vec<_>>())];
    }
    models
        .into_iter()
        .map(|model| table(model, &records.iter().filter(|r| r.model == model).collect::<Vec<_>>()))
        .collect()
}

fn table(model: &str, records: &[&Record]) -> Table {
    let measured = |record: &&&Record| record.xent.is_some();
    let baseline = records
        .iter()
        .filter(measured)
        .find(|r| r.stage == "baseline")
        .or_else(|| records.iter().find(measured))
        .copied();
    let rows = records.iter().map(|record| row(record, baseline)).collect();
    let notes = records
        .iter()
        .filter(|record| record.status != Status::Ok || record.reason.is_some())
        .map(|r| (r.stage.clone(), r.status, r.reason.clone().unwrap_or_default()))
        .collect();
    Table { model: model.into(), rows, notes }
}

fn row(record: &Record, baseline: Option<&Record>) -> [String; COLUMNS.len()] {
    let text = |value: Option<f64>, digits: usize| {
        value.map_or_else(|| "-".into(), |value| format!("{value:.digits$}"))
    };
    let signed = |value: Option<f64>, digits: usize| {
        value.map_or_else(|| "-".into(), |value| format!("{value:+.digits$}"))
    };
    let other = baseline.filter(|baseline| baseline.stage != record.stage);
    let against = |field: fn(&Record) -> Option<f64>| field(record).zip(other.and_then(field));
    let ppl = against(|r| r.ppl).map(|(ours, theirs)| (ours / theirs - 1.0) * 100.0);
    let xent = against(|r| r.xent).map(|(ours, theirs)| ours - theirs);
    [
        record.stage.clone(),
        text(record.ppl, 3),
        signed(ppl, 2),
        text(record.xent, 5),
        signed(xent, 5),
        text(record.entropy, 4),
        text(record.bits_per_byte, 4),
        text(record.model_bytes.map(|bytes| bytes as f64 / 1e6), 2),
        record.sites_replaced.map_or_else(|| "-".into(), |sites| sites.to_string()),
        text(record.tokens_per_second, 0),
        record.status.name().into(),
    ]
}

/// The tables for a terminal, with the reasons of what did not run and the definition of the
/// figures.
pub fn terminal(records: &[Record], definition: &str) -> String {
    let mut out = String::new();
    for table in tables(records) {
        let width = |column: usize| {
            let cells = table.rows.iter().map(|row| row[column].chars().count());
            cells.chain([COLUMNS[column].chars().count()]).max().unwrap_or(0)
        };
        let widths: Vec<_> = (0..COLUMNS.len()).map(width).collect();
        let mut line = |cells: &[String]| {
            let cells: Vec<_> = cells
                .iter()
                .enumerate()
                .map(|(column, cell)| {
                    let width = widths[column];
                    if is_text(column) {
                        format!("{cell:<width$}")
                    } else {
                        format!("{cell:>width$}")
                    }
                })
                .collect();
            let _ = writeln!(out, "{}", cells.join("  ").trim_end());
        };
        line(std::slice::from_ref(&table.model));
        line(&COLUMNS.map(str::to_owned));
        table.rows.iter().for_each(|row| line(row));
        for (stage, status, reason) in &table.notes {
            let _ = writeln!(out, "{stage} {}: {reason}", status.name());
        }
        out.push('\n');
    }
    let _ = writeln!(out, "{definition}");
    out
}

fn is_text(column: usize) -> bool {
    column == 0 || column == COLUMNS.len() - 1
}

/// report.md: the tables, the definition and what the run was.
pub fn markdown(records: &[Record], run: &Map<String, Value>) -> String {
    let mut out = String::from("# mxeval\n");
    for table in tables(records) {
        let _ = writeln!(out, "\n## {}\n\n| {} |", table.model, COLUMNS.join(" | "));
        let rule: Vec<_> =
            (0..COLUMNS.len()).map(|c| if is_text(c) { "---" } else { "---:" }).collect();
        let _ = writeln!(out, "| {} |", rule.join(" | "));
        for row in &table.rows {
            let cells: Vec<_> = row.iter().map(|cell| cell.replace('|', "\\|")).collect();
            let _ = writeln!(out, "| {} |", cells.join(" | "));
        }
        if !table.notes.is_empty() {
            out.push('\n');
        }
        for (stage, status, reason) in &table.notes {
            let _ = writeln!(out, "- `{stage}` {}: {}", status.name(), reason.replace('\n', " "));
        }
    }
    let _ = writeln!(out, "\n## How the figures are defined\n\n{}", definition(run));
    out.push_str(
        "\nΔ is the difference to the baseline (of graphs measured side by side: to the first). Size is the graph's file with its external data; \
         tok/s counts scored tokens and leaves out rewriting and loading.\n",
    );
    let _ = writeln!(out, "\n## The run\n");
    for (name, value) in facts(run) {
        let _ = writeln!(out, "- {name}: {}", value.replace('\n', " "));
    }
    out
}

/// The definition of the figures, as run.json has it.
fn definition(run: &Map<String, Value>) -> &str {
    run.get("definition").and_then(Value::as_str).unwrap_or_default()
}

/// What run.json says, flattened to one line a fact.
fn facts(run: &Map<String, Value>) -> Vec<(String, String)> {
    fn flatten(prefix: &str, value: &Value, out: &mut Vec<(String, String)>) {
        let below = |name: &str| match prefix {
            "" => name.to_owned(),
            _ => format!("{prefix}.{name}"),
        };
        match value {
            Value::Object(map) => map.iter().for_each(|(name, v)| flatten(&below(name), v, out)),
            Value::Array(list) if list.iter().any(Value::is_object) => list
                .iter()
                .enumerate()
                .for_each(|(index, v)| flatten(&below(&index.to_string()), v, out)),
            Value::Array(list) => {
                let words: Vec<_> = list.iter().map(scalar).collect();
                out.push((prefix.into(), words.join(" ")));
            }
            Value::Null => {}
            other => out.push((prefix.into(), scalar(other))),
        }
    }
    fn scalar(value: &Value) -> String {
        value.as_str().map_or_else(|| value.to_string(), str::to_owned)
    }
    let mut out = Vec::new();
    for (name, value) in
        run.iter().filter(|(name, _)| !["keys", "stages", "definition"].contains(&name.as_str()))
    {
        flatten(name, value, &mut out);
    }
    out
}

/// report.html: the same in one file without references to others.
pub fn html(records: &[Record], run: &Map<String, Value>) -> String {
    let mut out = String::from(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>mxeval</title>\n\
         <style>body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:72rem;padding:0 \
         1rem}table{border-collapse:collapse}th,td{padding:.25rem .7rem;text-align:right;\
         border-bottom:1px solid #ccc}th:first-child,td:first-child,th:last-child,td:last-child\
         {text-align:left}tr.failed td{color:#b00020}tr.skipped td{color:#777}code{font-size:.95em}\
         @media(prefers-color-scheme:dark){body{background:#111;color:#ddd}th,td{border-color:#444}}\
         </style></head><body>\n<h1>mxeval</h1>\n",
    );
    for table in tables(records) {
        let _ = write!(out, "<h2>{}</h2>\n<table><tr>", escape(&table.model));
        COLUMNS.iter().for_each(|column| {
            let _ = write!(out, "<th>{column}</th>");
        });
        out.push_str("</tr>\n");
        for row in &table.rows {
            let _ = write!(out, "<tr class=\"{}\">", escape(&row[COLUMNS.len() - 1]));
            row.iter().for_each(|cell| {
                let _ = write!(out, "<td>{}</td>", escape(cell));
            });
            out.push_str("</tr>\n");
        }
        out.push_str("</table>\n<ul>");
        for (stage, status, reason) in &table.notes {
            let (stage, reason) = (escape(stage), escape(reason));
            let _ = write!(out, "<li><code>{stage}</code> {}: {reason}</li>", status.name());
        }
        out.push_str("</ul>\n");
    }
    let _ =
        write!(out, "<h2>How the figures are defined</h2>\n<p>{}</p>\n", escape(definition(run)));
    out.push_str("<h2>The run</h2>\n<ul>");
    for (name, value) in facts(run) {
        let _ = write!(out, "<li>{}: <code>{}</code></li>", escape(&name), escape(&value));
    }
    out.push_str("</ul>\n</body></html>\n");
    out
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn records() -> Vec<Record> {
        let mut baseline = Record::new("a<b>.onnx", "baseline", "cpu", Status::Ok);
        (baseline.xent, baseline.ppl) = (Some(2.0), Some(2f64.exp()));
        let mut fp4 = Record::new("a<b>.onnx", "mx-fp4_e2m1", "cpu", Status::Ok);
        (fp4.xent, fp4.ppl, fp4.sites_replaced) = (Some(2.5), Some(2.5f64.exp()), Some(14));
        fp4.model_bytes = Some(1_234_567);
        let mut nvfp8 = Record::new("a<b>.onnx", "nvfp8", "cpu", Status::Skipped);
        nvfp8.reason = Some("needs CUDA".into());
        vec![fp4, baseline, nvfp8]
    }

    #[test]
    fn differences_are_to_the_baseline_wherever_it_stands() {
        let table = &tables(&records())[0];
        // e^0.5 - 1 = 64.87 %.
        assert_eq!(table.rows[0][..5], ["mx-fp4_e2m1", "12.182", "+64.87", "2.50000", "+0.50000"]);
        assert_eq!(table.rows[0][7..], ["1.23", "14", "-", "ok"]);
        assert_eq!(table.rows[1][..5], ["baseline", "7.389", "-", "2.00000", "-"]);
        assert_eq!(table.rows[2][..3], ["nvfp8", "-", "-"]);
    }

    #[test]
    fn every_output_has_the_reasons_and_the_definition() {
        let run = serde_json::json!({"mxeval": "0.1.0", "keys": {"x": "secret"},
            "data": {"path": "d.parquet", "sha256": "abc"}, "command": ["mxeval", "--sweep"],
            "definition": "per-document: each"});
        let run = run.as_object().unwrap();
        let (terminal, markdown, html) = (
            terminal(&records(), "per-document: each"),
            markdown(&records(), run),
            html(&records(), run),
        );
        for text in [&terminal, &markdown, &html] {
            assert!(text.contains("needs CUDA") && text.contains("per-document"), "{text}");
            assert!(!text.contains("secret"));
        }
        assert!(terminal.lines().nth(1).unwrap().starts_with("stage "));
        assert!(markdown.contains("- data.sha256: abc") && markdown.contains("mxeval --sweep"));
        assert!(html.contains("a&lt;b&gt;.onnx") && !html.contains("a<b>"));
    }

    #[test]
    fn single_graphs_share_a_table() {
        let mut first = Record::new("x/a.onnx", "a", "cpu", Status::Ok);
        first.xent = Some(1.0);
        let mut second = Record::new("x/b.onnx", "b", "cpu", Status::Ok);
        second.xent = Some(1.25);
        let tables = tables(&[first, second]);
        assert_eq!(tables.len(), 1);
        assert_eq!(tables[0].rows[1][4], "+0.25000");
    }
}
