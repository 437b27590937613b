//! The columns of the tables.

use super::number::{self, NOTHING, clean, megabytes, plain, plus_minus, signed, small};
use super::table::{Delta, Level, Row};
use crate::eval::figures::{Estimate, Figures};
use crate::eval::record::Status;

/// A cell: its figure, and what belongs to it in small print.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Cell {
    pub main: String,
    pub aside: Option<String>,
}

impl Cell {
    /// In one line.
    pub(super) fn line(&self) -> String {
        match &self.aside {
            Some(aside) => format!("{} {aside}", self.main),
            None => self.main.clone(),
        }
    }
}

/// A column of a table.
pub(super) struct Column {
    pub title: &'static str,
    /// Text, which stands on the left.
    pub text: bool,
    pub cell: fn(&Row<'_>) -> Cell,
}

const fn number(title: &'static str, cell: fn(&Row<'_>) -> Cell) -> Column {
    Column { title, text: false, cell }
}

const fn text(title: &'static str, cell: fn(&Row<'_>) -> Cell) -> Column {
    Column { title, text: true, cell }
}

/// The columns of which any row has something.
pub(super) fn present<'c>(columns: &'c [Column], rows: &[Row<'_>]) -> Vec<&'c Column> {
    let empty = |cell: Cell| cell.main.is_empty() || cell.main == NOTHING;
    columns.iter().filter(|column| rows.iter().any(|row| !empty((column.cell)(row)))).collect()
}

fn cell(main: String) -> Cell {
    Cell { main, aside: None }
}

fn stage(row: &Row<'_>) -> Cell {
    cell(clean(&row.record.stage))
}

fn status(row: &Row<'_>) -> Cell {
    cell(row.record.status.name().into())
}

fn verdict(row: &Row<'_>) -> Cell {
    let level = row.level();
    match level {
        Level::Unknown => cell(NOTHING.into()),
        _ => cell(format!("{} {}", level.sign(), level.word())),
    }
}

/// A figure of the record, with its interval from the statistics.
fn absolute(
    value: Option<f64>,
    digits: usize,
    row: &Row<'_>,
    of: fn(&Figures) -> Estimate,
) -> Cell {
    let aside = row.statistics().and_then(|s| number::interval(&of(&s.all), digits));
    Cell { main: plain(value, digits), aside }
}

/// A difference, with its interval.
fn relative(row: &Row<'_>, digits: usize, of: fn(&Delta<'_>) -> Estimate) -> Cell {
    let Some(delta) = &row.delta else { return cell(NOTHING.into()) };
    let estimate = of(delta);
    Cell { main: signed(estimate.value, digits), aside: number::signed_interval(&estimate, digits) }
}

fn accuracy(row: &Row<'_>) -> Cell {
    let value = row.statistics().map(|s| percent(&s.all.accuracy));
    let value = value.unwrap_or(Estimate { value: None, low: None, high: None });
    Cell { main: plain(value.value, 2), aside: number::interval(&value, 2) }
}

fn agreement(row: &Row<'_>) -> Cell {
    let Some(share) = row.versus().and_then(|v| v.agreement) else { return cell(NOTHING.into()) };
    let share = percent(&share);
    Cell { main: plain(share.value, 2), aside: number::interval(&share, 2) }
}

fn percent(share: &Estimate) -> Estimate {
    let times = |value: Option<f64>| value.map(|value| value * 100.0);
    Estimate { value: times(share.value), low: times(share.low), high: times(share.high) }
}

/// A figure that spans decades, with its interval.
fn decades(estimate: Option<Estimate>) -> Cell {
    let Some(estimate) = estimate else { return cell(NOTHING.into()) };
    let ends = estimate.low.zip(estimate.high);
    let aside = ends.map(|(low, high)| format!("[{}, {}]", small(Some(low)), small(Some(high))));
    Cell { main: small(estimate.value), aside }
}

fn size(row: &Row<'_>) -> Cell {
    cell(plain(megabytes(row.record.model_bytes), 2))
}

fn count(value: Option<u64>) -> Cell {
    cell(value.map_or_else(|| NOTHING.into(), |value| value.to_string()))
}

/// How good a stage is.
pub(super) const QUALITY: &[Column] = &[
    text("stage", stage),
    text("verdict", verdict),
    number("ppl", |row| absolute(row.record.ppl, 3, row, |f| f.ppl)),
    number("Δppl %", |row| relative(row, 2, |d| d.ppl_percent)),
    number("xent", |row| absolute(row.record.xent, 5, row, |f| f.xent)),
    number("Δxent", |row| relative(row, 5, |d| d.xent)),
    number("KL", |row| decades(row.kl().map(|kl| kl.mean))),
    number("agreement %", agreement),
    number("bits/byte", |row| absolute(row.record.bits_per_byte, 4, row, |f| f.bits_per_byte)),
    number("Δbits/byte", |row| relative(row, 4, |d| d.bits_per_byte)),
    number("entropy", |row| absolute(row.record.entropy, 4, row, |f| f.entropy)),
    number("accuracy %", accuracy),
    number("RMS Δp", |row| decades(row.versus().and_then(|v| v.delta_p_rms))),
    text("status", status),
];

/// What it costs.
pub(super) const COST: &[Column] = &[
    text("stage", stage),
    number("bits/weight", |row| cell(plain(row.record.bits_per_weight, 2))),
    number("size MB", size),
    number("size ×", |row| cell(plain(row.size_ratio(), 3))),
    number("sites", |row| count(row.record.sites_replaced)),
    number("tok/s", |row| cell(plain(row.record.tokens_per_second, 0))),
    number("speed ×", |row| cell(plain(row.speed_ratio(), 2))),
    number("load s", |row| cell(plain(row.record.load_seconds, 2))),
    number("seconds", |row| cell(plain(row.record.seconds, 1))),
    number("resident MB", |row| cell(plain(megabytes(row.record.peak_resident_bytes), 0))),
    number("device MB", |row| cell(plain(megabytes(row.record.peak_device_bytes), 0))),
    number("peak MB", |row| cell(plain(megabytes(row.record.peak_memory_bytes), 0))),
    number("docs", |row| count(row.record.docs)),
    number("tokens", |row| count(row.record.tokens)),
];

/// How its predictions differ from the baseline's.
pub(super) const DIVERGENCE: &[Column] = &[
    text("stage", stage),
    number("mean", |row| decades(row.kl().map(|kl| kl.mean))),
    number("median", |row| cell(small(row.kl().and_then(|kl| kl.median)))),
    number("90 %", |row| cell(small(row.kl().and_then(|kl| kl.p90)))),
    number("99 %", |row| cell(small(row.kl().and_then(|kl| kl.p99)))),
    number("99.9 %", |row| cell(small(row.kl().and_then(|kl| kl.p999)))),
    number("largest", |row| cell(small(row.kl().and_then(|kl| kl.max)))),
    number("agreement %", agreement),
    number("mean Δp", |row| decades(row.versus().and_then(|v| v.delta_p_mean))),
    number("RMS Δp", |row| decades(row.versus().and_then(|v| v.delta_p_rms))),
];

/// What a terminal shows; report.md has the rest.
pub(super) const TERMINAL: &[Column] = &[
    text("stage", stage),
    number("ppl", |row| cell(plain(row.record.ppl, 3))),
    number("Δppl %", |row| cell(signed(row.delta.as_ref().and_then(|d| d.ppl_percent.value), 2))),
    number("xent", |row| cell(plain(row.record.xent, 5))),
    number("Δxent", |row| {
        cell(row.delta.as_ref().map_or_else(|| NOTHING.into(), |d| plus_minus(&d.xent, 5)))
    }),
    number("KL", |row| cell(small(row.kl().and_then(|kl| kl.mean.value)))),
    number("agree %", |row| Cell { aside: None, ..agreement(row) }),
    number("entropy", |row| cell(plain(row.record.entropy, 4))),
    number("bits/byte", |row| cell(plain(row.record.bits_per_byte, 4))),
    number("size MB", size),
    number("sites", |row| count(row.record.sites_replaced)),
    number("tok/s", |row| cell(plain(row.record.tokens_per_second, 0))),
    text("status", |row| match (row.record.status, row.level()) {
        (Status::Ok, Level::Same) => cell("same".into()),
        (Status::Ok, Level::TooFew) => cell("few docs".into()),
        (Status::Ok, level @ (Level::Better | Level::Small | Level::Medium | Level::Large)) => {
            cell(level.word().into())
        }
        (other, _) => cell(other.name().into()),
    }),
];
