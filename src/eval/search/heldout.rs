//! Whole models on documents that the search has not seen.

use crate::eval::error::{Error, Result};
use crate::eval::observer::Observer;
use crate::eval::schedule::{Batch, Padded};
use crate::eval::sensitivity::ratio;
use crate::eval::sensitivity::setup::{Bench, Setup};
use crate::eval::sensitivity::whole::{Against, Whole};
use crate::eval::windows::Window;
use crate::rewrite::{Recipe, RewriteOptions, RewriteReport, rewrite_file};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Losses by document.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DocumentLosses {
    /// Sum of -ln p of the text's own tokens.
    pub nll: Vec<f64>,
    /// Scored tokens.
    pub tokens: Vec<u64>,
}

/// A model on the documents, against the baseline.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// What it is called.
    pub name: String,
    /// Mean bits of a weight of the layers that the search is about, scales included.
    pub bits_per_weight: f64,
    /// Bytes of these layers' weights.
    pub bytes: u64,
    /// Cross-entropy, nats a token.
    pub xent: f64,
    /// Its difference from the baseline's.
    pub delta_xent: f64,
    /// Standard error of the difference, paired by document.
    pub delta_xent_stderr: Option<f64>,
    /// (ppl / baseline's ppl - 1) x 100.
    pub delta_ppl_percent: f64,
    /// By document, in the order of the text.
    pub documents: DocumentLosses,
}

/// Measures models on a set of documents.
pub(crate) struct Bar<'a> {
    pub setup: &'a Setup,
    pub bench: &'a Bench,
    pub windows: &'a [Window],
    pub batches: Vec<(Batch, Padded)>,
    /// Where rewritten models lie.
    pub work: PathBuf,
    pub observer: &'a dyn Observer,
    /// The baseline's, once it is measured.
    pub baseline: DocumentLosses,
}

impl<'a> Bar<'a> {
    /// Measures the baseline.
    ///
    /// # Errors
    /// It cannot be run.
    pub(crate) fn new(
        (setup, bench): (&'a Setup, &'a Bench),
        windows: &'a [Window],
        work: &Path,
        observer: &'a dyn Observer,
    ) -> Result<Self> {
        let batches = setup.batches(windows, bench.batch_size)?;
        let baseline = DocumentLosses::default();
        let work = work.to_owned();
        let mut bar = Self { setup, bench, windows, batches, work, observer, baseline };
        bar.baseline = bar.losses(&bench.model, "the baseline")?;
        Ok(bar)
    }

    /// Cross-entropy of the baseline.
    pub(crate) fn baseline_xent(&self) -> f64 {
        ratio(self.baseline.nll.iter().copied().zip(self.baseline.tokens.iter().copied())).0
    }

    /// Rewrites the model by a recipe and measures it. `size` gives bytes and bits of the layers.
    ///
    /// # Errors
    /// It cannot be rewritten or run.
    pub(crate) fn recipe(
        &self,
        recipe: &Recipe,
        size: &dyn Fn(&RewriteReport) -> (u64, f64),
    ) -> Result<Measured> {
        let path = self.work.join("model.onnx");
        let options = RewriteOptions {
            recipe: Some(recipe.clone()),
            overwrite: true,
            allow_empty: true,
            threads: self.bench.threads,
            ..RewriteOptions::default()
        };
        let report = rewrite_file(&self.bench.model, &path, &options)
            .map_err(|e| Error::Rewrite(e.to_string()))?;
        let documents = self.losses(&path, &recipe.name)?;
        let (bytes, bits_per_weight) = size(&report);
        Ok(self.measured(&recipe.name, (bytes, bits_per_weight), documents))
    }

    fn measured(&self, name: &str, (bytes, bits): (u64, f64), own: DocumentLosses) -> Measured {
        let deltas = own.nll.iter().zip(&self.baseline.nll).map(|(own, base)| own - base);
        let (delta_xent, stderr) = ratio(deltas.zip(own.tokens.iter().copied()));
        let (xent, _) = ratio(own.nll.iter().copied().zip(own.tokens.iter().copied()));
        let measured = Measured {
            name: name.into(),
            bits_per_weight: bits,
            bytes,
            xent,
            delta_xent,
            delta_xent_stderr: stderr,
            delta_ppl_percent: delta_xent.exp_m1() * 100.0,
            documents: own,
        };
        self.observer.note(&format!(
            "{name}: {bits:.3} bits a weight, dxent {delta_xent:+.5}, dppl {:+.2} %",
            measured.delta_ppl_percent
        ));
        measured
    }

    /// Losses of a model, by document.
    fn losses(&self, path: &Path, name: &str) -> Result<DocumentLosses> {
        let options = self.setup.session(self.bench);
        let mut model = Whole::open(&self.setup.runtime, path, name, &options, Against::Nothing)?;
        let count = self.windows.len();
        let mut losses = DocumentLosses { nll: vec![0.0; count], tokens: vec![0; count] };
        for (batch, padded) in &self.batches {
            let (rows, _) = model.run(padded, |_| true, None, false)?;
            for (&window, row) in batch.windows.iter().zip(rows) {
                losses.nll[window] = row.nll;
                losses.tokens[window] = row.tokens;
            }
            if self.observer.interrupted() {
                return Err(Error::Interrupted);
            }
        }
        if losses.nll.iter().all(|nll| nll.is_finite()) {
            return Ok(losses);
        }
        let reason = "the loss is not finite: the model returns NaN or Inf".to_owned();
        Err(Error::Model { model: name.into(), reason })
    }
}
