//! The figures of a stage as results.jsonl has them: values with their intervals, by subset, and
//! against the baseline.

use serde::{Deserialize, Serialize};

/// A figure with its 95 % interval by bootstrap over documents.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// The figure of the documents measured.
    pub value: Option<f64>,
    /// Lower end of the interval; null where there are too few documents for one.
    pub low: Option<f64>,
    /// Upper end.
    pub high: Option<f64>,
}

/// What a paired comparison says about the cross-entropy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// The interval of the difference holds zero.
    NoSignificantDifference,
    /// The whole interval is above zero.
    Worse,
    /// The whole interval is below zero.
    Better,
    /// Too few documents for an interval.
    TooFewDocuments,
    /// A loss is NaN or infinite, so there is no difference.
    NotFinite,
}

/// Divergence from the baseline over the scored tokens, nats.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Divergence {
    /// Mean of KL(baseline || variant).
    pub mean: Estimate,
    /// Its median over tokens.
    pub median: Option<f64>,
    /// 90th percentile.
    pub p90: Option<f64>,
    /// 99th percentile.
    pub p99: Option<f64>,
    /// 99.9th percentile.
    pub p999: Option<f64>,
    /// The largest.
    pub max: Option<f64>,
    /// Tokens by KL: `histogram[i]` counts those in [10^(i/4 - 9), 10^((i+1)/4 - 9)), the first bin all
    /// below, the last all above. Empty for a subset.
    pub histogram: Vec<u64>,
}

/// A variant against the baseline, on the same documents.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// The stage it is compared with.
    pub stage: String,
    /// What the interval of `delta_xent` says.
    pub verdict: Verdict,
    /// Difference of xent, nats a token.
    pub delta_xent: Estimate,
    /// Difference of bits per byte.
    pub delta_bits_per_byte: Estimate,
    /// (ppl / baseline's ppl - 1) x 100.
    pub delta_ppl_percent: Estimate,
    /// Divergence; null where the two did not run side by side.
    pub kl: Option<Divergence>,
    /// Share of positions where both have the same most probable token.
    pub agreement: Option<Estimate>,
    /// Mean change of the text's own token's probability.
    pub delta_p_mean: Option<Estimate>,
    /// Root mean square of that change.
    pub delta_p_rms: Option<Estimate>,
}

/// The figures of a set of documents.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// Documents that scored anything.
    pub docs: u64,
    /// Scored tokens.
    pub tokens: u64,
    /// UTF-8 bytes that the scored tokens cover.
    pub bytes: u64,
    /// Mean -ln p, nats a token.
    pub xent: Estimate,
    /// exp(xent).
    pub ppl: Estimate,
    /// Mean entropy of the predicted distribution, nats.
    pub entropy: Estimate,
    /// Bits a byte of text.
    pub bits_per_byte: Estimate,
    /// Share of positions where the most probable token is the text's.
    pub accuracy: Estimate,
    /// Against the baseline, where there is one and this is not it.
    pub versus: Option<Comparison>,
}

/// The figures of one subset of the text (`meta.pile_set_name`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SubsetFigures {
    /// Its name.
    pub subset: String,
    /// Whether there are too few documents for intervals.
    pub too_few: bool,
    /// Its figures.
    pub figures: Figures,
}

/// Everything about a stage that a bootstrap or a subset adds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Statistics {
    /// Seed of the bootstrap.
    pub seed: u64,
    /// Its resamples.
    pub resamples: u64,
    /// What is resampled: `document`, or `window` where documents are joined to one stream.
    pub unit: String,
    /// All documents: micro averages, ratios of sums.
    pub all: Figures,
    /// Macro average: the mean of the subsets' figures, each subset with equal weight. Null without
    /// subsets.
    pub macro_average: Option<Figures>,
    /// By subset, by name. Documents without a subset are in `all` alone.
    pub subsets: Vec<SubsetFigures>,
}

impl Estimate {
    /// A figure without an interval; null where it is not finite.
    pub fn exact(value: f64) -> Self {
        Self { value: value.is_finite().then_some(value), low: None, high: None }
    }
}
