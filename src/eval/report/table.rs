//! Records by model, each against its baseline.

use super::number::{NOTHING, clean, megabytes};
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
    // A sweep of one stage over several models is not such a list: its stages have one name.
    let mut stages: Vec<&str> = records.iter().map(|r| r.stage.as_str()).collect();
    stages.sort_unstable();
    let distinct = stages.windows(2).all(|pair| pair[0] != pair[1]);
    if models.len() > 1 && models.iter().all(single) && distinct {
        return vec![Group::new("graphs", records.iter().collect())];
    }
    let of = |model: &str| records.iter().filter(|r| r.model == model).collect::<Vec<_>>();
    models.into_iter().map(|model| Group::new(model, of(model))).collect()
}

impl<'a> Group<'a> {
    fn new(name: &'a str, records: Vec<&'a Record>) -> Self {
        let measured = |record: &&&Record| record.xent.is_some();
        // What stages ran beside, where they did: the sweep's model need not be a stage of its own.
        let named = records.iter().find_map(|record| {
            let versus = record.statistics.as_ref()?.all.versus.as_ref()?;
            Some(versus.stage.as_str())
        });
        let baseline = records
            .iter()
            .filter(measured)
            .find(|r| r.stage == named.unwrap_or("baseline"))
            .or_else(|| records.iter().find(measured).filter(|_| named.is_none()))
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
        let baseline = baseline?;
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
