//! Documents' sums laid out for resampling.

use super::{Reference, Sample};
use crate::eval::metrics::{DocumentScore, Metrics};
use std::f64::consts::LN_2;

/// The means that are estimated, each a ratio of two sums over documents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mean {
    Xent,
    Entropy,
    BitsPerByte,
    Accuracy,
    DeltaXent,
    DeltaBitsPerByte,
    Kl,
    Agreement,
    DeltaP,
    DeltaPSquared,
}

/// How many there are.
pub(super) const MEANS: usize = 10;

/// A value for each of them.
pub(super) type Values = [f64; MEANS];

impl Mean {
    pub const ALL: [Self; MEANS] = [
        Self::Xent,
        Self::Entropy,
        Self::BitsPerByte,
        Self::Accuracy,
        Self::DeltaXent,
        Self::DeltaBitsPerByte,
        Self::Kl,
        Self::Agreement,
        Self::DeltaP,
        Self::DeltaPSquared,
    ];

    pub fn by_byte(self) -> bool {
        matches!(self, Self::BitsPerByte | Self::DeltaBitsPerByte)
    }

    /// Where the mean can lie at all.
    pub fn range(self) -> (f64, f64) {
        match self {
            Self::Xent | Self::Entropy | Self::BitsPerByte | Self::Kl => (0.0, f64::INFINITY),
            Self::Accuracy | Self::Agreement | Self::DeltaPSquared => (0.0, 1.0),
            Self::DeltaP => (-1.0, 1.0),
            Self::DeltaXent | Self::DeltaBitsPerByte => (f64::NEG_INFINITY, f64::INFINITY),
        }
    }
}

/// What the documents are compared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pairing {
    /// Nothing.
    None,
    /// The other stage's losses.
    Losses,
    /// The baseline that ran side by side.
    SideBySide,
}

impl Pairing {
    /// The first of [`Mean::ALL`] that it gives.
    pub fn means(self) -> usize {
        match self {
            Self::None => 4,
            Self::Losses => 6,
            Self::SideBySide => MEANS,
        }
    }
}

/// A scored document with its pair.
#[derive(Clone, Copy, Debug)]
pub(super) struct Document<'a> {
    pub score: &'a DocumentScore,
    pub baseline_nll: f64,
    pub subset: Option<usize>,
    pub kl: &'a [f32],
}

impl Document<'_> {
    fn numerators(&self) -> Values {
        let score = self.score;
        let against = score.against.unwrap_or_default();
        let delta = score.nll - self.baseline_nll;
        [
            score.nll,
            score.entropy,
            score.nll / LN_2,
            score.correct as f64,
            delta,
            delta / LN_2,
            against.kl,
            against.agree as f64,
            against.delta_p,
            against.delta_p_squared,
        ]
    }
}

/// The documents that scored anything, in order, and what they can be compared with.
pub(super) fn documents<'a>(
    sample: &Sample<'a>,
    reference: Option<&Reference<'a>>,
) -> (Pairing, Vec<Document<'a>>) {
    let scored = || sample.documents.iter().enumerate().filter(|(_, score)| score.tokens > 0);
    let others = reference.map_or(&[][..], |reference| reference.documents);
    let same = |(index, score): (usize, &DocumentScore)| {
        others
            .get(index)
            .is_some_and(|other| (other.tokens, other.bytes) == (score.tokens, score.bytes))
    };
    let pairing = if scored().all(|(_, score)| score.against.is_some()) {
        Pairing::SideBySide
    } else if scored().all(same) {
        Pairing::Losses
    } else {
        Pairing::None
    };
    let documents = scored()
        .map(|(index, score)| Document {
            score,
            baseline_nll: match pairing {
                Pairing::SideBySide => score.against.map_or(0.0, |against| against.nll),
                Pairing::Losses => others.get(index).map_or(0.0, |other| other.nll),
                Pairing::None => 0.0,
            },
            subset: sample.subset.get(index).copied().flatten(),
            kl: sample.kl.get(index).map_or(&[], Vec::as_slice),
        })
        .collect();
    (pairing, documents)
}

/// A set of documents ready to be resampled, or the average of such sets.
#[derive(Clone, Debug)]
pub(super) struct Table {
    pub pairing: Pairing,
    pub documents: usize,
    pub tokens: u64,
    pub bytes: u64,
    /// The means; NaN or infinite where a document's sum is, or where there is no byte.
    pub values: Values,
    /// Their standard errors; 0 where documents do not differ.
    pub spread: Values,
    /// Squares of the standard errors that the average over subsets takes.
    variance: Values,
    /// By document [`FIXED`] columns and three for each mean.
    pub rows: Vec<f64>,
}

/// Columns of tokens, bytes and their squares.
pub(super) const FIXED: usize = 4;

impl Table {
    /// `None` without documents.
    pub fn new(documents: &[Document<'_>], pairing: Pairing) -> Option<Self> {
        let metrics = Metrics::new(documents.iter().map(|document| document.score))?;
        let mut table = Self {
            pairing,
            documents: documents.len(),
            tokens: metrics.tokens,
            bytes: metrics.bytes,
            values: values(documents, pairing, &metrics),
            spread: [0.0; MEANS],
            variance: [0.0; MEANS],
            rows: Vec::new(),
        };
        table.rows = vec![0.0; documents.len() * table.stride()];
        table.lay_out(documents);
        Some(table)
    }

    pub fn means(&self) -> usize {
        self.pairing.means()
    }

    /// Columns of a row.
    pub fn stride(&self) -> usize {
        FIXED + 3 * self.means()
    }

    /// Fills in rows and standard errors.
    ///
    /// A row holds residuals e = y - R x rather than sums y, so that neither the difference of a
    /// resample's ratio from R nor its variance loses digits.
    fn lay_out(&mut self, documents: &[Document<'_>]) {
        let (stride, means) = (self.stride(), self.means());
        let totals = [self.tokens as f64, self.bytes as f64];
        let mut sums = [[0.0; 3]; MEANS];
        for (document, row) in documents.iter().zip(self.rows.chunks_exact_mut(stride)) {
            let by = [document.score.tokens as f64, document.score.bytes as f64];
            row[..FIXED].copy_from_slice(&[by[0], by[1], by[0] * by[0], by[1] * by[1]]);
            let numerators = document.numerators();
            for (index, mean) in Mean::ALL.into_iter().enumerate().take(means) {
                if !self.values[index].is_finite() {
                    continue;
                }
                let unit = usize::from(mean.by_byte());
                let (x, y) = (by[unit], numerators[index]);
                let e = y - self.values[index] * x;
                row[FIXED + 3 * index..][..3].copy_from_slice(&[e, e * e, e * x]);
                // A lone document has leverage 1, and no spread.
                let rest = 1.0 - x / totals[unit];
                let [hc2, hc3, squares] = &mut sums[index];
                if rest > 0.0 {
                    *hc2 += e * e / rest;
                    *hc3 += e * e / (rest * rest);
                }
                *squares += y * y;
            }
        }
        for (index, mean) in Mean::ALL.into_iter().enumerate().take(means) {
            let [hc2, hc3, squares] = sums[index];
            let total = totals[usize::from(mean.by_byte())];
            // Less than this is rounding.
            if hc3 > 1e-24 * squares {
                self.variance[index] = hc2 / (total * total);
                self.spread[index] = hc3.sqrt() / total;
            }
        }
    }

    /// The average of tables, each with equal weight; without rows.
    pub fn mean_of<'a>(tables: impl Iterator<Item = &'a Self> + Clone) -> Option<Self> {
        let count = tables.clone().count() as f64;
        let mut sum = Self { rows: Vec::new(), ..Self::empty(tables.clone().next()?.pairing) };
        for table in tables {
            sum.documents += table.documents;
            sum.tokens += table.tokens;
            sum.bytes += table.bytes;
            for index in 0..MEANS {
                sum.values[index] += table.values[index];
                sum.variance[index] += table.variance[index];
            }
        }
        for index in 0..MEANS {
            sum.values[index] /= count;
            sum.spread[index] = sum.variance[index].sqrt() / count;
        }
        Some(sum)
    }

    fn empty(pairing: Pairing) -> Self {
        Self {
            pairing,
            documents: 0,
            tokens: 0,
            bytes: 0,
            values: [0.0; MEANS],
            spread: [0.0; MEANS],
            variance: [0.0; MEANS],
            rows: Vec::new(),
        }
    }
}

/// The means, with the sums and divisions of [`Metrics`].
fn values(documents: &[Document<'_>], pairing: Pairing, metrics: &Metrics) -> Values {
    let tokens = metrics.tokens as f64;
    let sum = |index: usize| documents.iter().map(|d| d.numerators()[index]).sum::<f64>();
    let mut values = [0.0; MEANS];
    values[..4].copy_from_slice(&[
        metrics.xent,
        metrics.entropy,
        metrics.bits_per_byte,
        sum(3) / tokens,
    ]);
    if pairing != Pairing::None {
        let nll: f64 = documents.iter().map(|document| document.baseline_nll).sum();
        // The differences of the figures that reports show, to the last bit.
        values[4] = metrics.xent - nll / tokens;
        values[5] = metrics.bits_per_byte - nll / LN_2 / metrics.bytes as f64;
    }
    if pairing == Pairing::SideBySide {
        for (index, value) in values.iter_mut().enumerate().skip(6) {
            *value = sum(index) / tokens;
        }
    }
    values
}
