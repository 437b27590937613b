//! Sums per document, and the figures made of them.

use serde::{Deserialize, Serialize};

/// A document's sums against the baseline, which scored the same tokens side by side.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Against {
    /// Sum of the baseline's -ln p of the text's own tokens.
    pub nll: f64,
    /// Positions where the baseline's most probable token is the text's.
    pub correct: u64,
    /// Sum of KL(baseline || variant), in nats.
    pub kl: f64,
    /// Positions where both have the same most probable token.
    pub agree: u64,
    /// Sum of p(variant) - p(baseline) of the text's own tokens.
    pub delta_p: f64,
    /// Sum of the squares of those.
    pub delta_p_squared: f64,
}

/// What one document contributes; sums in float64 over its scored tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DocumentScore {
    /// Sum of -ln p of the text's own tokens.
    pub nll: f64,
    /// Sum of the entropies of the predicted distributions, in nats.
    pub entropy: f64,
    /// Positions where the most probable token is the text's.
    pub correct: u64,
    /// Scored tokens.
    pub tokens: u64,
    /// UTF-8 bytes that the scored tokens cover.
    pub bytes: u64,
    /// Against the baseline, where both ran side by side.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub against: Option<Against>,
}

/// What one window contributes, and the divergence of each of its scored tokens, in order; none
/// where no reference ran beside it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct WindowScore {
    /// Its sums.
    pub score: DocumentScore,
    /// KL(baseline || variant), in nats.
    pub kl: Vec<f32>,
}

impl DocumentScore {
    /// Adds what a further window of the document contributes.
    pub fn add(&mut self, other: &Self) {
        self.nll += other.nll;
        self.entropy += other.entropy;
        self.correct += other.correct;
        self.tokens += other.tokens;
        self.bytes += other.bytes;
        if let Some(more) = &other.against {
            let against = self.against.get_or_insert_default();
            against.nll += more.nll;
            against.correct += more.correct;
            against.kl += more.kl;
            against.agree += more.agree;
            against.delta_p += more.delta_p;
            against.delta_p_squared += more.delta_p_squared;
        }
    }
}

/// Figures of a corpus.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Metrics {
    /// Documents that scored anything.
    pub docs: u64,
    /// Scored tokens.
    pub tokens: u64,
    /// UTF-8 bytes that the scored tokens cover.
    pub bytes: u64,
    /// Mean -ln p, nats a token.
    pub xent: f64,
    /// exp(xent).
    pub ppl: f64,
    /// Mean entropy of the predicted distribution, nats.
    pub entropy: f64,
    /// Bits a byte of text.
    pub bits_per_byte: f64,
}

impl Metrics {
    /// The figures of `documents`, added in the order given: that order is the corpus's, whatever
    /// order the batches ran in, so that no division of labour can change a result.
    ///
    /// `None` when nothing was scored.
    pub fn new<'a>(documents: impl IntoIterator<Item = &'a DocumentScore>) -> Option<Self> {
        let mut sum = DocumentScore::default();
        let mut docs = 0;
        for document in documents.into_iter().filter(|document| document.tokens > 0) {
            docs += 1;
            sum.nll += document.nll;
            sum.entropy += document.entropy;
            sum.tokens += document.tokens;
            sum.bytes += document.bytes;
        }
        if sum.tokens == 0 {
            return None;
        }
        let tokens = sum.tokens as f64;
        let xent = sum.nll / tokens;
        Some(Self {
            docs,
            tokens: sum.tokens,
            bytes: sum.bytes,
            xent,
            ppl: xent.exp(),
            entropy: sum.entropy / tokens,
            bits_per_byte: sum.nll / std::f64::consts::LN_2 / sum.bytes as f64,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_corpus_ratios_not_means_of_documents() {
        let docs = [
            DocumentScore {
                nll: 2.0,
                entropy: 1.0,
                correct: 1,
                tokens: 1,
                bytes: 4,
                against: None,
            },
            DocumentScore {
                nll: 3.0,
                entropy: 5.0,
                correct: 0,
                tokens: 4,
                bytes: 6,
                against: None,
            },
            DocumentScore::default(),
        ];
        let m = Metrics::new(&docs).unwrap();
        assert_eq!((m.docs, m.tokens, m.bytes), (2, 5, 10));
        assert_eq!(m.xent, 1.0);
        assert_eq!(m.ppl, std::f64::consts::E);
        assert_eq!(m.entropy, 1.2);
        // 5 nats over 10 bytes.
        assert!((m.bits_per_byte - 0.5 / std::f64::consts::LN_2).abs() < 1e-15);
        assert_eq!(Metrics::new(&[]), None);
        assert_eq!(Metrics::new(&[DocumentScore::default()]), None);
    }

    #[test]
    fn a_document_at_a_time_agrees_with_one_long_sum() {
        let nll = |i: u64| ((i * 2_654_435_761) % 10_007) as f64 / 997.0;
        let docs: Vec<_> = (0..500u64)
            .map(|d| DocumentScore {
                nll: (0..40).map(|t| nll(d * 40 + t)).sum(),
                tokens: 40,
                bytes: 160,
                ..DocumentScore::default()
            })
            .collect();
        let naive = (0..20_000).map(nll).sum::<f64>() / 20_000.0;
        let m = Metrics::new(&docs).unwrap();
        assert!((m.xent - naive).abs() < 1e-12 * naive);
        assert_eq!(m.tokens, 20_000);
    }

    #[test]
    fn sums_are_the_same_bits_after_a_journey_through_json() {
        let mut state = 1u64;
        let mut sum = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            3_000.0 * (state >> 11) as f64 / (1u64 << 53) as f64
        };
        for _ in 0..1_000 {
            let against = Against { nll: sum(), kl: sum(), ..Against::default() };
            let score = DocumentScore {
                nll: sum(),
                entropy: sum(),
                against: Some(against),
                ..DocumentScore::default()
            };
            let text = serde_json::to_string(&score).unwrap();
            assert_eq!(serde_json::from_str::<DocumentScore>(&text).unwrap(), score);
        }
    }
}
