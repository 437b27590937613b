//! What the tables say: records by model, each against its baseline.

use super::number::{self, NOTHING, clean, megabytes, plain, plus_minus, signed, small};
use crate::eval::figures::{Comparison, Divergence, Estimate, Figures, Statistics, Verdict};
use crate::eval::record::{Record, Status};

/// The stages of one model, or graphs measured side by side.
pub(super) struct Group<'a> {
    /// The model.
    pub name: &'a str,
    /// What differences are to: the stage `baseline`, else the first that has figures.
    pub baseline: Option<&'a Record>,
    /// One row a record, in their order.
    pub rows: Vec<Row<'a>>,
}

/// A stage.
pub(super) struct Row<'a> {
    pub record: &'a Record,
    pub is_baseline: bool,
    /// The baseline's record, for ratios; `None` for the baseline itself.
    pub baseline: Option<&'a Record>,
    /// `None` for the baseline and for what has no figures.
    pub delta: Option<Delta<'a>>,
}

/// A stage against the baseline.
pub(super) struct Delta<'a> {
    /// `None` in records without statistics.
    pub verdict: Option<Verdict>,
    pub xent: Estimate,
    pub bits_per_byte: Estimate,
    pub ppl_percent: Estimate,
    pub versus: Option<&'a Comparison>,
}

/// Significance and size of a difference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Level {
    Better,
    Same,
    /// Worse by less than 1 % of ppl.
    Small,
    /// By less than 10 %.
    Medium,
    Large,
    TooFew,
    Unknown,
}

impl Level {
    pub(super) fn new(verdict: Option<Verdict>, ppl_percent: Option<f64>) -> Self {
        match (verdict, ppl_percent) {
            (None | Some(Verdict::NotFinite), _) => Self::Unknown,
            (Some(Verdict::NoSignificantDifference), _) => Self::Same,
            (Some(Verdict::TooFewDocuments), _) => Self::TooFew,
            (Some(Verdict::Better), _) => Self::Better,
            (Some(Verdict::Worse), Some(percent)) if percent < 1.0 => Self::Small,
            (Some(Verdict::Worse), Some(percent)) if percent < 10.0 => Self::Medium,
            (Some(Verdict::Worse), _) => Self::Large,
        }
    }

    /// Of a comparison.
    pub(super) fn of(versus: &Comparison) -> Self {
        Self::new(Some(versus.verdict), versus.delta_ppl_percent.value)
    }

    /// A sign that does not need colour: where the loss goes, and how far.
    pub(super) fn sign(self) -> &'static str {
        match self {
            Self::Better => "▼",
            Self::Same => "≈",
            Self::Small => "▲",
            Self::Medium => "▲▲",
            Self::Large => "▲▲▲",
            Self::TooFew => "?",
            Self::Unknown => "",
        }
    }

    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Better => "better",
            Self::Same => "no difference",
            Self::Small | Self::Medium | Self::Large => "worse",
            Self::TooFew => "too few documents",
            Self::Unknown => NOTHING,
        }
    }

    /// The class of the style sheet.
    pub(super) fn class(self) -> &'static str {
        match self {
            Self::Better => "better",
            Self::Same => "same",
            Self::Small => "worse1",
            Self::Medium => "worse2",
            Self::Large => "worse3",
            Self::TooFew => "few",
            Self::Unknown => "unknown",
        }
    }

    pub(super) fn is_worse(self) -> bool {
        matches!(self, Self::Small | Self::Medium | Self::Large)
    }
}

pub(super) fn groups(records: &[Record]) -> Vec<Group<'_>> {
    let mut models: Vec<&str> = Vec::new();
    for record in records {
        if !models.contains(&record.model.as_str()) {
            models.push(&record.model);
        }
    }
    // Graphs given one by one are each a model of their own, but belong side by side.
    let single = |model: &&str| records.iter().filter(|r| r.model == **model).count() == 1;
    if models.len() > 1 && models.iter().all(single) {
        return vec![Group::new("graphs", records.iter().collect())];
    }
    let of = |model: &str| records.iter().filter(|r| r.model == model).collect::<Vec<_>>();
    models.into_iter().map(|model| Group::new(model, of(model))).collect()
}

impl<'a> Group<'a> {
    fn new(name: &'a str, records: Vec<&'a Record>) -> Self {
        let measured = |record: &&&Record| record.xent.is_some();
        let baseline = records
            .iter()
            .filter(measured)
            .find(|r| r.stage == "baseline")
            .or_else(|| records.iter().find(measured))
            .copied();
        let rows = records.into_iter().map(|record| Row::new(record, baseline)).collect();
        Self { name, baseline, rows }
    }

    /// Stage, status and reason of what did not run, or ran with a remark.
    pub(super) fn notes(&self) -> impl Iterator<Item = (&'a str, Status, String)> {
        self.rows
            .iter()
            .map(|row| row.record)
            .filter(|record| record.status != Status::Ok || record.reason.is_some())
            .map(|r| (r.stage.as_str(), r.status, clean(r.reason.as_deref().unwrap_or_default())))
    }

    /// Names of the subsets, in the order of the first stage that has any.
    pub(super) fn subsets(&self) -> Vec<&'a str> {
        let mut names: Vec<&str> = Vec::new();
        for subset in self.rows.iter().filter_map(Row::statistics).flat_map(|s| &s.subsets) {
            if !names.contains(&subset.subset.as_str()) {
                names.push(&subset.subset);
            }
        }
        names
    }

    /// How intervals were made, if there are any.
    pub(super) fn statistics(&self) -> Option<&'a Statistics> {
        self.rows.iter().find_map(Row::statistics)
    }
}

impl<'a> Row<'a> {
    fn new(record: &'a Record, baseline: Option<&'a Record>) -> Self {
        let is_baseline = baseline.is_some_and(|baseline| std::ptr::eq(baseline, record));
        let baseline = baseline.filter(|_| !is_baseline);
        Self { record, is_baseline, baseline, delta: Delta::new(record, baseline) }
    }

    pub(super) fn statistics(&self) -> Option<&'a Statistics> {
        self.record.statistics.as_ref()
    }

    pub(super) fn level(&self) -> Level {
        let delta = self.delta.as_ref();
        delta.map_or(Level::Unknown, |d| Level::new(d.verdict, d.ppl_percent.value))
    }

    /// Divergence from the baseline.
    pub(super) fn kl(&self) -> Option<&'a Divergence> {
        self.delta.as_ref().and_then(|d| d.versus)?.kl.as_ref()
    }

    pub(super) fn versus(&self) -> Option<&'a Comparison> {
        self.delta.as_ref().and_then(|delta| delta.versus)
    }

    /// The figures of a subset, and whether it has too few documents for intervals.
    pub(super) fn subset(&self, name: &str) -> Option<(&'a Figures, bool)> {
        let subset = self.statistics()?.subsets.iter().find(|s| s.subset == name)?;
        Some((&subset.figures, subset.too_few))
    }

    /// Tokens a second over the baseline's: as measured in turns, else of the two stages.
    pub(super) fn speed_ratio(&self) -> Option<f64> {
        self.record
            .speed_ratio
            .filter(|_| !self.is_baseline)
            .or_else(|| ratio(self.record.tokens_per_second, self.baseline?.tokens_per_second))
    }

    pub(super) fn size_ratio(&self) -> Option<f64> {
        ratio(megabytes(self.record.model_bytes), megabytes(self.baseline?.model_bytes))
    }

    pub(super) fn memory(&self) -> Option<u64> {
        let record = self.record;
        record.peak_device_bytes.or(record.peak_resident_bytes).or(record.peak_memory_bytes)
    }
}

fn ratio(ours: Option<f64>, theirs: Option<f64>) -> Option<f64> {
    ours.zip(theirs).map(|(ours, theirs)| ours / theirs).filter(|ratio| ratio.is_finite())
}

impl<'a> Delta<'a> {
    fn new(record: &'a Record, baseline: Option<&'a Record>) -> Option<Self> {
        let baseline = baseline?;
        record.xent?;
        if let Some(versus) = record.statistics.as_ref().and_then(|s| s.all.versus.as_ref()) {
            return Some(Self {
                verdict: Some(versus.verdict),
                xent: versus.delta_xent,
                bits_per_byte: versus.delta_bits_per_byte,
                ppl_percent: versus.delta_ppl_percent,
                versus: Some(versus),
            });
        }
        // A stage that was interrupted has seen other text than the baseline.
        if record.tokens != baseline.tokens {
            return None;
        }
        let difference = |field: fn(&Record) -> Option<f64>| {
            let value = field(record).zip(field(baseline)).map(|(ours, theirs)| ours - theirs);
            Estimate { value, low: None, high: None }
        };
        let ppl = ratio(record.ppl, baseline.ppl).map(|ratio| (ratio - 1.0) * 100.0);
        Some(Self {
            verdict: None,
            xent: difference(|r| r.xent),
            bits_per_byte: difference(|r| r.bits_per_byte),
            ppl_percent: Estimate { value: ppl, low: None, high: None },
            versus: None,
        })
    }
}

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
