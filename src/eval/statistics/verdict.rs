//! What an interval says, in a word and in a sentence.

use super::MIN_DOCUMENTS;
use crate::eval::figures::{Comparison, Estimate, Statistics, Verdict};

impl Verdict {
    /// What the interval of a difference of losses says.
    pub fn of(delta: &Estimate) -> Self {
        match (delta.value, delta.low, delta.high) {
            (None, ..) => Self::NotFinite,
            (_, Some(low), _) if low > 0.0 => Self::Worse,
            (_, _, Some(high)) if high < 0.0 => Self::Better,
            (_, Some(_), Some(_)) => Self::NoSignificantDifference,
            _ => Self::TooFewDocuments,
        }
    }
}

impl Comparison {
    /// The verdict as a sentence without a full stop: `worse by 0.0311 ± 0.0042 nats a token (95 %,
    /// paired, 200 documents)`. `documents` and `unit` are those of the figures it belongs to.
    pub fn sentence(&self, documents: u64, unit: &str) -> String {
        let plural = if documents == 1 { "" } else { "s" };
        let count = format!("{documents} {unit}{plural}");
        let by = || amount(&self.delta_xent);
        match self.verdict {
            Verdict::Worse => format!("worse by {} nats a token (95 %, paired, {count})", by()),
            Verdict::Better => format!("better by {} nats a token (95 %, paired, {count})", by()),
            Verdict::NoSignificantDifference => {
                format!("no significant difference ({} nats a token, 95 %, paired, {count})", by())
            }
            Verdict::TooFewDocuments => {
                format!("too few {unit}s ({documents}; at least {MIN_DOCUMENTS} are needed)")
            }
            Verdict::NotFinite => format!("no verdict: a loss is not finite ({count})"),
        }
    }
}

impl Statistics {
    /// The verdict over all documents as a sentence; `None` without a comparison.
    pub fn sentence(&self) -> Option<String> {
        let versus = self.all.versus.as_ref()?;
        Some(versus.sentence(self.all.docs, &self.unit))
    }
}

/// `0.0311 ± 0.0042`; both distances where they differ by more than a tenth. Without a sign where
/// the whole interval is on one side of zero: the verdict's word says which.
fn amount(delta: &Estimate) -> String {
    let (Some(value), Some(low), Some(high)) = (delta.value, delta.low, delta.high) else {
        return delta
            .value
            .map_or_else(|| "an unknown amount".into(), |value| format!("{value:.4}"));
    };
    let (value, low, high, sign) = match (low > 0.0, high < 0.0) {
        (true, _) => (value, low, high, ""),
        (_, true) => (-value, -high, -low, ""),
        _ => (value, low, high, if value < 0.0 { "-" } else { "+" }),
    };
    let (up, down) = (high - value, value - low);
    // Two digits of the uncertainty, at least four decimals.
    let most = up.max(down);
    let decimals = if most > 0.0 { (1.0 - most.log10().floor()).clamp(4.0, 12.0) } else { 4.0 };
    let decimals = decimals as usize;
    let magnitude = if sign.is_empty() { value } else { value.abs() };
    let spread = if (up - down).abs() <= 0.1 * most {
        format!("± {most:.decimals$}")
    } else {
        format!("(+{up:.decimals$} -{down:.decimals$})")
    };
    format!("{sign}{magnitude:.decimals$} {spread}")
}
