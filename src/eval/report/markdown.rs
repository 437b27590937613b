//! report.md.

use super::number::{NOTHING, clean, plain, plus_minus};
use super::table::{self, COST, Column, DIVERGENCE, Group, Level, QUALITY};
use super::{Report, facts, summary};
use crate::eval::figures::Figures;
use std::fmt::Write as _;

/// report.md: the tables, the definition and what the run was.
pub fn markdown(report: &Report<'_>) -> String {
    let mut out = String::from("# mxeval\n");
    for remark in summary::remarks(report.records) {
        let _ = writeln!(out, "\n> **{}**", escape(&remark));
    }
    for group in table::groups(report.records) {
        let _ = writeln!(out, "\n## {}\n", escape(group.name));
        let lines = summary::summary(&group);
        lines.iter().for_each(|line| {
            let _ = writeln!(out, "- {}", escape(line));
        });
        table(&mut out, &group, QUALITY);
        for (stage, status, reason) in group.notes() {
            let _ = writeln!(out, "- `{}` {}: {}", code(stage), status.name(), escape(&reason));
        }
        let _ = write!(out, "\n### Size and speed\n");
        table(&mut out, &group, COST);
        if group.rows.iter().any(|row| row.kl().is_some()) {
            let _ = writeln!(out, "\n### KL(baseline || stage) of a token, nats");
            table(&mut out, &group, DIVERGENCE);
        }
        subsets(&mut out, &group);
    }
    let _ = writeln!(out, "\n## How the figures are defined\n\n{}", escape(report.definition));
    let _ = writeln!(out, "\n{}", summary::LEGEND);
    if let Some(command) = facts::command(report.facts) {
        // A fence longer than any run of backticks in the command.
        let fence = "`".repeat(longest_run(&command).max(2) + 1);
        let _ = writeln!(out, "\n## To repeat it\n\n{fence}sh\n{command}\n{fence}");
    }
    let _ = writeln!(out, "\n## The run\n");
    for (name, value) in facts::facts(report.facts) {
        let _ = writeln!(out, "- {}: {}", escape(&name), escape(&value));
    }
    out
}

fn table(out: &mut String, group: &Group<'_>, columns: &[Column]) {
    let columns = table::present(columns, &group.rows);
    let titles: Vec<_> = columns.iter().map(|column| column.title.to_owned()).collect();
    let left: Vec<_> = columns.iter().map(|column| column.text).collect();
    let rows = group.rows.iter().filter(|row| {
        // The stages that say nothing in a table of their own are in the first.
        columns.iter().skip(1).any(|column| (column.cell)(row).main != NOTHING)
    });
    let rows = rows.map(|row| columns.iter().map(|column| (column.cell)(row).line()).collect());
    grid(out, &titles, &left, rows);
}

/// A table; cells are escaped here.
fn grid(
    out: &mut String,
    titles: &[String],
    left: &[bool],
    rows: impl Iterator<Item = Vec<String>>,
) {
    let line = |cells: &[String]| {
        format!("| {} |", cells.iter().map(|c| escape(c)).collect::<Vec<_>>().join(" | "))
    };
    let rule: Vec<_> = left.iter().map(|&left| if left { "---" } else { "---:" }).collect();
    let _ = writeln!(out, "\n{}\n| {} |", line(titles), rule.join(" | "));
    for row in rows {
        let _ = writeln!(out, "{}", line(&row));
    }
    out.push('\n');
}

/// Subset by stage: the baseline's bits per byte, and what every stage adds to the loss.
fn subsets(out: &mut String, group: &Group<'_>) {
    let names = group.subsets();
    if names.is_empty() {
        return;
    }
    let others: Vec<_> = group.rows.iter().filter(|row| row.versus().is_some()).collect();
    let base = group.rows.iter().find(|row| row.is_baseline);
    let mut titles = vec!["subset".to_owned(), "docs".into(), "xent".into(), "bits/byte".into()];
    titles.extend(others.iter().map(|row| format!("Δxent {}", row.record.stage)));
    let left: Vec<_> = (0..titles.len()).map(|column| column == 0).collect();
    let first = base.or(group.rows.first());
    let mut rows = Vec::new();
    let mut push = |name: &str, of: &dyn Fn(&table::Row<'_>) -> Option<Figures>| {
        let figures = first.and_then(of);
        let docs = figures.as_ref().map_or_else(|| NOTHING.into(), |f| f.docs.to_string());
        let mut row = vec![name.to_owned(), docs];
        row.push(plain(figures.as_ref().and_then(|f| f.xent.value), 4));
        row.push(plain(figures.as_ref().and_then(|f| f.bits_per_byte.value), 4));
        row.extend(others.iter().map(|row| of(row).map_or_else(|| NOTHING.into(), |f| cell(&f))));
        rows.push(row);
    };
    push("all documents (micro)", &|row| row.statistics().map(|s| s.all.clone()));
    push("mean of subsets (macro)", &|row| row.statistics()?.macro_average.clone());
    for name in &names {
        push(name, &|row| row.subset(name).map(|(figures, _)| figures.clone()));
    }
    out.push_str("\n### Subsets\n");
    grid(out, &titles, &left, rows.into_iter());
}

fn cell(figures: &Figures) -> String {
    let Some(versus) = &figures.versus else { return NOTHING.into() };
    let level = Level::of(versus);
    format!("{} {}", plus_minus(&versus.delta_xent, 4), level.sign()).trim_end().to_owned()
}

fn longest_run(text: &str) -> usize {
    text.split(|c| c != '`').map(str::len).max().unwrap_or(0)
}

/// Inside a code span in a line: backticks end it, whatever stands before them.
fn code(text: &str) -> String {
    clean(text).replace('`', "'")
}

/// Text that no Markdown takes for markup, in a line or a cell of a table.
fn escape(text: &str) -> String {
    let chars: Vec<char> = clean(text).chars().collect();
    let mut out = String::with_capacity(chars.len());
    for (index, &c) in chars.iter().enumerate() {
        let word = |at: Option<usize>| {
            at.and_then(|at| chars.get(at)).is_some_and(|c| c.is_alphanumeric())
        };
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            // Inside a word an underscore means nothing; names of formats stay legible.
            '_' if word(index.checked_sub(1)) && word(Some(index + 1)) => out.push('_'),
            // Brackets are a link only before a target; intervals stay legible.
            ']' if !matches!(chars.get(index + 1), Some('(' | '[' | ':')) => out.push(']'),
            '\\' | '`' | '*' | '_' | ']' | '|' | '#' | '~' | '>' => {
                out.push('\\');
                out.push(c);
            }
            _ => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_in_a_name_is_markup() {
        assert_eq!(escape("mx-fp8_e4m3"), "mx-fp8_e4m3");
        assert_eq!(escape("a|b\n<img src=x>"), "a\\|b &lt;img src=x\\>");
        assert_eq!(escape("![x](y) `z` *b* _c_"), "![x\\](y) \\`z\\` \\*b\\* \\_c\\_");
        assert_eq!(escape("[+0.1, +0.2]"), "[+0.1, +0.2]");
        assert_eq!(code("a`b"), "a'b");
        assert_eq!(longest_run("a``b```c"), 3);
    }
}
