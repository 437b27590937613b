//! search.json, and the tables of a search.

use super::heldout::{DocumentLosses, Measured};
use crate::eval::sensitivity::FileId;
use serde::{Deserialize, Serialize};
use std::fmt::Write as _;

/// A choice of formats.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// Mean bits of a weight, scales included, over the layers that were measured.
    pub bits_per_weight: f64,
    /// Their bytes.
    pub bytes: u64,
    /// Sum of the layers' divergences, each alone, nats a token.
    pub predicted_kl: f64,
    /// Sum of their differences of cross-entropy.
    pub predicted_delta_xent: f64,
    /// Layers in each format.
    pub layers: Vec<(String, usize)>,
    /// Whether it is the one found.
    pub chosen: bool,
}

/// How far from the optimum of its objective the choice may be.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Bound {
    /// The objective of the choice.
    pub objective: f64,
    /// That of the linear relaxation, below which no choice within the budget is.
    pub linear_programme: f64,
    /// The difference in percent of the latter; null where that is zero.
    pub gap_percent: Option<f64>,
}

/// The whole file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Search {
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
    /// Where it ran.
    pub device: String,
    /// What was kept small.
    pub objective: String,
    /// When to stop adding bits.
    pub target: String,
    /// Whether layers that read one value have one format.
    pub together: bool,
    /// The choice.
    pub found: Point,
    /// How good it is for its objective.
    pub bound: Bound,
    /// Format of each layer.
    pub assignment: Vec<(String, String)>,
    /// Tokens of a document that are used.
    pub seq_len: usize,
    /// Documents that layers were measured on.
    pub search_documents: Vec<usize>,
    /// Documents that recipes were tried on.
    pub validation_documents: Vec<usize>,
    /// Documents of the figures below, none of which begins as one of those.
    pub heldout_documents: Vec<usize>,
    /// The baseline's cross-entropy on them.
    pub baseline_xent: f64,
    /// Its losses by document.
    pub baseline: DocumentLosses,
    /// Points of the front tried on the validation documents.
    pub tried: Vec<Measured>,
    /// Whether the search came to its end; else rows of `measured` are missing.
    #[serde(default)]
    pub complete: bool,
    /// The recipe found, the formats alone, other recipes.
    pub measured: Vec<Measured>,
}

impl Search {
    /// What was found and what it measures.
    pub fn table(&self) -> String {
        let Point { bits_per_weight, bytes, predicted_kl, predicted_delta_xent, layers, .. } =
            &self.found;
        let counts: Vec<String> =
            layers.iter().map(|(format, count)| format!("{count} {format}")).collect();
        let mut text = format!(
            "{}: {bits_per_weight:.4} bits a weight, {bytes} bytes, layers: {}\n\
             predicted from single layers: KL {predicted_kl:.5}, dxent {predicted_delta_xent:+.5}\n",
            self.target,
            counts.join(", ")
        );
        if let Some(gap) = self.bound.gap_percent {
            let _ = writeln!(
                text,
                "the sum of {} is within {gap:.3} % of the linear programme's bound",
                self.objective
            );
        }
        let name = |one: &Measured| one.name.chars().count();
        let width = self.measured.iter().map(name).max().unwrap_or(0).max(8);
        let _ = writeln!(
            text,
            "\n{} held-out documents, paired 95 % intervals from the standard error over documents\n\
             {:width$} {:>8} {:>10} {:>9} {:>20} {:>8}",
            self.heldout_documents.len(),
            "recipe",
            "bits/w",
            "MB",
            "xent",
            "dxent",
            "dppl %"
        );
        let _ = writeln!(
            text,
            "{:width$} {:>8} {:>10} {:>9.5}",
            "baseline", "", "", self.baseline_xent
        );
        for one in &self.measured {
            let interval = one
                .delta_xent_stderr
                .map_or(String::new(), |stderr| format!(" +-{:.5}", 1.96 * stderr));
            let _ = writeln!(
                text,
                "{:width$} {:>8.4} {:>10.2} {:>9.5} {:>20} {:>+8.2}",
                one.name,
                one.bits_per_weight,
                one.bytes as f64 / 1e6,
                one.xent,
                format!("{:+.5}{interval}", one.delta_xent),
                one.delta_ppl_percent
            );
        }
        text
    }
}
