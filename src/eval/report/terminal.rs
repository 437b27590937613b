//! Tables in columns of equal width.

use super::number::NOTHING;
use super::table::{self, Column, Group, TERMINAL};
use crate::eval::record::Record;
use std::fmt::Write as _;

/// On which side of its column a cell stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Alignment {
    Left,
    Right,
}

/// The tables for a terminal, with the reasons of what did not run and the definition of the
/// figures.
pub fn terminal(records: &[Record], definition: &str) -> String {
    let mut out = String::new();
    for group in table::groups(records) {
        let _ = writeln!(out, "{}", super::number::clean(group.name));
        let columns = columns(&group);
        let alignments: Vec<_> = columns
            .iter()
            .map(|column| if column.text { Alignment::Left } else { Alignment::Right })
            .collect();
        let head = columns.iter().map(|column| column.title.to_owned()).collect();
        let rows =
            group.rows.iter().map(|row| columns.iter().map(|c| (c.cell)(row).main).collect());
        out.push_str(&align(&alignments, &std::iter::once(head).chain(rows).collect::<Vec<_>>()));
        for (stage, status, reason) in group.notes() {
            let _ = writeln!(out, "{} {}: {reason}", super::number::clean(stage), status.name());
        }
        out.push('\n');
    }
    let _ = writeln!(out, "{definition}");
    out
}

/// Columns without any figure are left out; with divergences, what the line has no room for.
fn columns(group: &Group<'_>) -> Vec<&'static Column> {
    let mut columns = table::present(TERMINAL, &group.rows);
    if columns.iter().any(|column| column.title == "KL") {
        columns.retain(|column| !["entropy", "sites"].contains(&column.title));
    }
    columns
}

/// Lines of `rows`, every column as wide as its widest cell.
pub(crate) fn align(alignments: &[Alignment], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(NOTHING.len())
    };
    let widths: Vec<_> = (0..alignments.len()).map(width).collect();
    let mut out = String::new();
    for row in rows {
        let cells = row.iter().zip(alignments).zip(&widths).map(|((cell, alignment), &width)| {
            match alignment {
                Alignment::Left => format!("{cell:<width$}"),
                Alignment::Right => format!("{cell:>width$}"),
            }
        });
        let _ = writeln!(out, "{}", cells.collect::<Vec<_>>().join("  ").trim_end());
    }
    out
}
