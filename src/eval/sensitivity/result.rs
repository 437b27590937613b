//! sensitivity.json: what each layer costs in each format, by itself.

use super::setup::FileId;
use crate::eval::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

/// The whole file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sensitivity {
    /// Version of mxeval.
    pub mxeval: String,
    /// When it was made.
    pub date: String,
    /// The command line.
    pub command: Vec<String>,
    /// The model.
    pub model: FileId,
    /// Its tokenizer.
    pub tokenizer: FileId,
    /// The text.
    pub data: FileId,
    /// What the figures mean.
    pub definition: String,
    /// Where it ran.
    pub device: String,
    /// ONNX Runtime's version.
    pub onnxruntime: String,
    /// Formats measured.
    pub formats: Vec<String>,
    /// Format of the activations: `same` as the weight's, one by name, or `none`.
    pub activation_format: String,
    /// Elements that share an exponent.
    pub block_size: usize,
    /// Rounding of elements.
    pub rounding: String,
    /// How a block's largest magnitude becomes its exponent.
    pub scale_rule: String,
    /// Tokens of a document that are used.
    pub seq_len: usize,
    /// Of how many positions one is scored.
    pub every: usize,
    /// The documents, numbered among those of the text that have two tokens.
    pub documents: Vec<usize>,
    /// The first tokens of each, by which a search knows them in any text.
    pub beginnings: Vec<Vec<u32>>,
    /// Scored tokens.
    pub tokens: u64,
    /// The baseline's cross-entropy on them, nats a token.
    pub baseline_xent: f64,
    /// What there is to say of how it was measured.
    pub notes: Vec<String>,
    /// What it took.
    pub cost: Cost,
    /// The layers, in node order.
    pub sites: Vec<SiteSensitivity>,
}

/// What the measuring took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Cost {
    /// Layers x formats.
    pub choices: u64,
    /// Passes, most of them from the middle of the model.
    pub runs: u64,
    /// The same in whole evaluations of the documents, counted in multiplications by weights.
    pub evaluations: f64,
    /// `evaluations` over `choices`: 1 without any shortcut.
    pub evaluations_per_choice: f64,
    /// Whole evaluations of 200 documents that it comes to.
    pub evaluations_of_200_documents: f64,
    /// Seconds of the passes.
    pub seconds: f64,
    /// Seconds of one evaluation of the documents, every position scored.
    pub evaluation_seconds: f64,
    /// Seconds to rewrite the model to every format and write the graph.
    pub prepare_seconds: f64,
    /// Seconds to load it.
    pub load_seconds: f64,
}

/// A layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SiteSensitivity {
    /// Its module path; its node where it has none.
    pub site: String,
    /// Its node.
    pub node: String,
    /// Its weight's name.
    pub initializer: String,
    /// Its module path.
    pub module_path: Option<String>,
    /// Number of the layer in the path.
    pub layer: Option<usize>,
    /// What it is for.
    pub role: String,
    /// Output features.
    pub n: usize,
    /// Input features.
    pub k: usize,
    /// Numbers in its weight, all experts together.
    pub weights: u64,
    /// Name of the value that it reads: layers with one in common are fused by some runtimes.
    pub input: String,
    /// Bits of a weight as it is.
    pub bits_as_is: f64,
    /// Bytes of the weight as it is.
    pub bytes_as_is: u64,
    /// By format.
    pub formats: BTreeMap<String, FormatSensitivity>,
}

/// A layer in a format, all others as they are.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FormatSensitivity {
    /// Activation format.
    pub activation_format: String,
    /// Bits of a weight, scales included.
    pub bits_per_weight: f64,
    /// Bytes of codes and scales.
    pub bytes: u64,
    /// Mean KL(baseline || this), nats a token.
    pub kl: f64,
    /// Its standard error over documents.
    pub kl_stderr: Option<f64>,
    /// Difference of cross-entropy, nats a token.
    pub delta_xent: f64,
    /// Its standard error over documents.
    pub delta_xent_stderr: Option<f64>,
}

impl SiteSensitivity {
    /// What tables call it.
    pub fn shown(&self) -> &str {
        &self.site
    }
}

impl Sensitivity {
    /// Reads a file.
    ///
    /// # Errors
    /// It cannot be read, or is something else.
    pub fn open(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
        serde_json::from_str(&text).map_err(|e| {
            Error::Usage(format!("{}: no result of mxeval sensitivity: {e}", path.display()))
        })
    }

    /// The layers as a table, the one that suffers most first.
    pub fn table(&self) -> String {
        let worst = |site: &SiteSensitivity| {
            site.formats.values().map(|one| one.kl).fold(f64::NEG_INFINITY, f64::max)
        };
        let mut sites: Vec<&SiteSensitivity> = self.sites.iter().collect();
        sites.sort_by(|a, b| worst(b).total_cmp(&worst(a)));
        let width = sites.iter().map(|site| site.shown().chars().count()).max().unwrap_or(0).max(5);
        let mut text = format!("{:width$} {:>12}", "layer", "weights");
        for format in &self.formats {
            let _ = write!(text, " {:>21}", format!("KL {format}"));
        }
        for format in &self.formats {
            let _ = write!(text, " {:>21}", format!("dxent {format}"));
        }
        text.push('\n');
        for site in sites {
            let _ = write!(text, "{:width$} {:>12}", site.shown(), site.weights);
            for one in self.formats.iter().filter_map(|format| site.formats.get(format)) {
                let cell = figure(one.kl, one.kl_stderr, false);
                let _ = write!(text, " {cell:>21}");
            }
            for one in self.formats.iter().filter_map(|format| site.formats.get(format)) {
                let cell = figure(one.delta_xent, one.delta_xent_stderr, true);
                let _ = write!(text, " {cell:>21}");
            }
            text.push('\n');
        }
        let Cost { choices, evaluations, evaluations_of_200_documents: of_200, .. } = self.cost;
        let _ = writeln!(
            text,
            "\n{} documents, {} scored tokens (one of {} positions), baseline xent {:.5}; {choices} \
             layers x formats for {evaluations:.1} evaluations of the documents, or {of_200:.1} of \
             200 documents",
            self.documents.len(),
            self.tokens,
            self.every,
            self.baseline_xent,
        );
        for note in &self.notes {
            let _ = writeln!(text, "note: {note}");
        }
        text
    }

    /// How two measurements rank the same layers and formats.
    ///
    /// # Errors
    /// They have no two layers and formats in common.
    pub fn compare(&self, other: &Self) -> Result<RankCorrelation> {
        let mut pairs: Vec<Pair<'_>> = Vec::new();
        for site in &self.sites {
            let same = |one: &&SiteSensitivity| {
                (&one.node, &one.initializer) == (&site.node, &site.initializer)
            };
            let Some(theirs) = other.sites.iter().find(same) else { continue };
            for (format, own) in &site.formats {
                if let Some(one) = theirs.formats.get(format) {
                    let delta_xent = [own.delta_xent, one.delta_xent];
                    pairs.push(Pair { format, kl: [own.kl, one.kl], delta_xent });
                }
            }
        }
        let over = |format: Option<&str>| {
            let chosen: Vec<&Pair<'_>> =
                pairs.iter().filter(|pair| format.is_none_or(|f| f == pair.format)).collect();
            let kl: Vec<[f64; 2]> = chosen.iter().map(|pair| pair.kl).collect();
            let delta_xent: Vec<[f64; 2]> = chosen.iter().map(|pair| pair.delta_xent).collect();
            let format = format.unwrap_or("all").to_owned();
            FormatCorrelation { format, kl: spearman(&kl), delta_xent: spearman(&delta_xent) }
        };
        if pairs.len() < 2 {
            let text = "--compare: the two have no two layers and formats in common";
            return Err(Error::Usage(text.into()));
        }
        let mut by_format = vec![over(None)];
        by_format.extend(self.formats.iter().map(|format| over(Some(format))));
        let documents = [self.documents.len(), other.documents.len()];
        Ok(RankCorrelation { documents, pairs: pairs.len(), by_format })
    }
}

/// One layer in one format, in two measurements.
struct Pair<'a> {
    format: &'a str,
    kl: [f64; 2],
    delta_xent: [f64; 2],
}

/// How far two measurements agree on the ranks.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RankCorrelation {
    /// Documents of either.
    pub documents: [usize; 2],
    /// Layers x formats that both have.
    pub pairs: usize,
    /// Over all formats, then in each.
    pub by_format: Vec<FormatCorrelation>,
}

/// Spearman's rank correlation in one format.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct FormatCorrelation {
    /// The format, or `all`.
    pub format: String,
    /// Of the divergence; null where nothing varies.
    pub kl: Option<f64>,
    /// Of the difference of cross-entropy.
    pub delta_xent: Option<f64>,
}

impl RankCorrelation {
    /// A few lines.
    pub fn text(&self) -> String {
        let [own, other] = self.documents;
        let mut text = format!(
            "Spearman's rank correlation of {own} and {other} documents, {} layers x formats\n",
            self.pairs
        );
        let shown =
            |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.4}"));
        for one in &self.by_format {
            let _ = writeln!(
                text,
                "{:10} KL {:>8}  dxent {:>8}",
                one.format,
                shown(one.kl),
                shown(one.delta_xent)
            );
        }
        text
    }
}

/// Spearman's rank correlation; equal values share the mean of their ranks. `None` where one side does
/// not vary.
pub fn spearman(pairs: &[[f64; 2]]) -> Option<f64> {
    let column = |side: usize| ranks(&pairs.iter().map(|pair| pair[side]).collect::<Vec<_>>());
    let (a, b) = (column(0), column(1));
    let mean = (pairs.len() as f64 + 1.0) / 2.0;
    let sum = |x: &[f64], y: &[f64]| -> f64 {
        x.iter().zip(y).map(|(x, y)| (x - mean) * (y - mean)).sum()
    };
    let spread = (sum(&a, &a) * sum(&b, &b)).sqrt();
    (spread > 0.0).then(|| sum(&a, &b) / spread)
}

fn ranks(values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[a].total_cmp(&values[b]));
    let mut ranks = vec![0.0; values.len()];
    for tied in order.chunk_by(|&a, &b| values[a].total_cmp(&values[b]) == Ordering::Equal) {
        let below = tied.first().and_then(|first| order.iter().position(|o| o == first));
        let mean = below.unwrap_or(0) as f64 + (tied.len() as f64 + 1.0) / 2.0;
        tied.iter().for_each(|&index| ranks[index] = mean);
    }
    ranks
}

fn figure(value: f64, stderr: Option<f64>, signed: bool) -> String {
    let sign = if signed && value >= 0.0 { "+" } else { "" };
    match stderr {
        Some(stderr) => format!("{sign}{value:.3e} ({stderr:.0e})"),
        None => format!("{sign}{value:.3e}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_correlate_as_spearman_has_it() {
        let of = |pairs: &[[f64; 2]]| spearman(pairs).unwrap();
        assert_eq!(of(&[[1.0, 10.0], [2.0, 11.0], [3.0, 500.0]]), 1.0);
        assert_eq!(of(&[[1.0, 3.0], [2.0, 2.0], [3.0, 1.0]]), -1.0);
        // NumPy: corrcoef([1, 2.5, 2.5, 4, 5], [2, 1, 3, 5, 4])
        let ties = [[1.0, 2.0], [2.0, 1.0], [2.0, 3.0], [4.0, 5.0], [5.0, 4.0]];
        assert!((of(&ties) - 0.718_184_846_459_607_9).abs() < 1e-12, "{}", of(&ties));
        assert_eq!(spearman(&[[1.0, 1.0], [1.0, 2.0]]), None);
    }
}
