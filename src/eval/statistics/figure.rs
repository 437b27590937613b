//! Means and their intervals as figures.

use super::bootstrap::Ends;
use super::divergence::Distribution;
use super::table::{Mean, Pairing, Table};
use crate::eval::figures::{Comparison, Divergence, Estimate, Figures, SubsetFigures, Verdict};

/// A set of documents, measured.
pub(super) struct Part<'a> {
    pub table: &'a Table,
    /// `None` with too few documents.
    pub ends: Option<Ends>,
    pub divergence: Option<Distribution>,
}

impl Part<'_> {
    pub fn figures(self, stage: &str) -> Figures {
        let same = |x: f64| x;
        Figures {
            docs: self.table.documents as u64,
            tokens: self.table.tokens,
            bytes: self.table.bytes,
            xent: self.estimate(Mean::Xent, same),
            // Monotonic functions of a mean take its ends with them.
            ppl: self.estimate(Mean::Xent, f64::exp),
            entropy: self.estimate(Mean::Entropy, same),
            bits_per_byte: self.estimate(Mean::BitsPerByte, same),
            accuracy: self.estimate(Mean::Accuracy, same),
            versus: self.versus(stage),
        }
    }

    fn versus(self, stage: &str) -> Option<Comparison> {
        if self.table.pairing == Pairing::None {
            return None;
        }
        let side_by_side = self.table.pairing == Pairing::SideBySide;
        let same = |x: f64| x;
        let of = |mean| side_by_side.then(|| self.estimate(mean, same));
        let delta_xent = self.estimate(Mean::DeltaXent, same);
        let distribution = self.divergence.clone().unwrap_or_default();
        Some(Comparison {
            stage: stage.into(),
            verdict: Verdict::of(&delta_xent),
            delta_xent,
            delta_bits_per_byte: self.estimate(Mean::DeltaBitsPerByte, same),
            delta_ppl_percent: self.estimate(Mean::DeltaXent, |delta| 100.0 * delta.exp_m1()),
            kl: of(Mean::Kl).map(|mean| Divergence {
                mean,
                median: distribution.median,
                p90: distribution.p90,
                p99: distribution.p99,
                p999: distribution.p999,
                max: distribution.max,
                histogram: distribution.histogram,
            }),
            agreement: of(Mean::Agreement),
            delta_p_mean: of(Mean::DeltaP),
            delta_p_rms: side_by_side
                .then(|| self.estimate(Mean::DeltaPSquared, |square| square.max(0.0).sqrt())),
        })
    }

    /// `function` of a mean, which rises with it.
    fn estimate(&self, mean: Mean, function: impl Fn(f64) -> f64) -> Estimate {
        let index = mean as usize;
        let ends = self.ends.and_then(|ends| ends[index]);
        let end = |value: f64| Some(function(value)).filter(|end| end.is_finite());
        Estimate {
            low: ends.and_then(|(low, _)| end(low)),
            high: ends.and_then(|(_, high)| end(high)),
            ..Estimate::exact(function(self.table.values[index]))
        }
    }
}

/// A subset of which nothing has been scored.
pub(super) fn empty(name: &str) -> SubsetFigures {
    let none = Estimate { value: None, low: None, high: None };
    SubsetFigures {
        subset: name.into(),
        too_few: true,
        figures: Figures {
            docs: 0,
            tokens: 0,
            bytes: 0,
            xent: none,
            ppl: none,
            entropy: none,
            bits_per_byte: none,
            accuracy: none,
            versus: None,
        },
    }
}
