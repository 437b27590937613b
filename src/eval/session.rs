//! A model in ONNX Runtime, set up to return scores instead of logits.

use super::devices::Device;
use super::error::{Error, Result};
use super::instrument::{self, Inspection};
use super::metrics::DocumentScore;
use super::runtime::Runtime;
use super::schedule::{Batch, MASKED, Padded};
use super::windows::Window;
use crate::onnx::Model;
use ort::session::builder::{GraphOptimizationLevel, SessionBuilder};
use std::path::Path;

/// A session that scores batches of windows.
#[derive(Debug)]
pub struct Scorer {
    session: ort::session::Session,
    inspection: Inspection,
    shown: String,
}

/// How a session is set up.
#[derive(Clone, Copy, Debug)]
pub struct SessionOptions {
    /// Where it runs.
    pub device: Device,
    /// Threads of one operator; `None` = one a physical core.
    pub threads: Option<usize>,
    /// Let ONNX Runtime log what it does.
    pub debug: bool,
}

impl Scorer {
    /// Opens the model at `path` with the scoring node appended. `shown` is its name in messages.
    ///
    /// # Errors
    /// The file is no model, no causal language model, or ONNX Runtime refuses it.
    pub fn open(
        runtime: &Runtime,
        path: &Path,
        shown: &str,
        options: &SessionOptions,
    ) -> Result<Self> {
        let mut model = open_model(path, shown)?;
        let inspection = instrument::inspect(&model, shown)?;
        instrument::append_scores(&mut model, &inspection);
        let bytes = model
            .to_bytes()
            .map_err(|e| Error::Model { model: shown.into(), reason: e.to_string() })?;
        drop(model);
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let session = builder(runtime, folder, options)
            .and_then(|mut builder| builder.commit_from_memory(&bytes))
            .map_err(Error::ort(format!("loading {shown}")))?;
        Ok(Self { session, inspection, shown: shown.to_owned() })
    }

    /// What the graph looks like.
    pub fn inspection(&self) -> &Inspection {
        &self.inspection
    }

    /// Scores the windows of one batch; the results are in the order of `batch.windows`.
    ///
    /// A graph with a fixed number of rows is run several times, with rows that score nothing in
    /// the last run.
    ///
    /// # Errors
    /// ONNX Runtime fails, or the windows are longer than the graph's fixed sequence.
    pub fn score(&mut self, windows: &[Window], batch: &Batch) -> Result<Vec<DocumentScore>> {
        let feeds = &self.inspection.feeds;
        if let Some(columns) = feeds.columns.filter(|&columns| columns < batch.length) {
            return Err(Error::Model {
                model: self.shown.clone(),
                reason: format!(
                    "its sequence length is fixed at {columns}: pass --seq-len {columns} or less, \
                     or export it with a dynamic sequence"
                ),
            });
        }
        let (rows, columns) = (feeds.rows.unwrap_or(0), feeds.columns.unwrap_or(0));
        let per_run = feeds.rows_per_run(batch.windows.len());
        let mut scores = Vec::with_capacity(batch.windows.len());
        for chunk in batch.windows.chunks(per_run) {
            let part = Batch { windows: chunk.to_vec(), length: batch.length };
            let padded = Padded::new(windows, &part, rows, columns);
            scores.extend(self.run(windows, &part, &padded)?);
        }
        Ok(scores)
    }

    fn run(
        &mut self,
        windows: &[Window],
        batch: &Batch,
        padded: &Padded,
    ) -> Result<Vec<DocumentScore>> {
        let doing = || format!("running {} on {} x {}", self.shown, padded.rows, padded.length);
        let tensors = self.inspection.feeds.tensors(padded).map_err(Error::ort(doing()))?;
        let doing = doing();
        let outputs = self.session.run(tensors).map_err(Error::ort(&doing))?;
        let [(nll, _), (entropy, _), (top1, _)] = instrument::OUTPUTS;
        let (_, nll) = outputs[nll].try_extract_tensor::<f32>().map_err(Error::ort(&doing))?;
        let (_, entropy) =
            outputs[entropy].try_extract_tensor::<f32>().map_err(Error::ort(&doing))?;
        let (_, top1) = outputs[top1].try_extract_tensor::<i64>().map_err(Error::ort(&doing))?;
        let expected = padded.labels.len();
        if [nll.len(), entropy.len(), top1.len()] != [expected; 3] {
            return Err(Error::Model {
                model: self.shown.clone(),
                reason: format!("returned {} scores for {expected} positions", nll.len()),
            });
        }
        Ok(batch
            .windows
            .iter()
            .enumerate()
            .map(|(row, &index)| {
                let row = row * padded.length..(row + 1) * padded.length;
                let bytes = windows[index].bytes;
                sum(
                    &padded.labels[row.clone()],
                    &nll[row.clone()],
                    &entropy[row.clone()],
                    &top1[row],
                    bytes,
                )
            })
            .collect())
    }
}

/// Opens a model file; errors name it as the user did.
///
/// # Errors
/// The file cannot be read or is no ONNX model.
pub fn open_model(path: &Path, shown: &str) -> Result<Model> {
    Model::open(path).map_err(|e| Error::Model { model: shown.into(), reason: e.to_string() })
}

/// Sums one row over its labelled positions.
fn sum(labels: &[i64], nll: &[f32], entropy: &[f32], top1: &[i64], bytes: u64) -> DocumentScore {
    let mut score = DocumentScore { bytes, ..DocumentScore::default() };
    for (position, &label) in labels.iter().enumerate().filter(|(_, label)| **label != MASKED) {
        score.nll += f64::from(nll[position]);
        score.entropy += f64::from(entropy[position]);
        score.correct += u64::from(top1[position] == label);
        score.tokens += 1;
    }
    score
}

fn builder(
    runtime: &Runtime,
    folder: &Path,
    options: &SessionOptions,
) -> ort::Result<SessionBuilder> {
    let Device::Cpu = options.device;
    let folder = std::path::absolute(folder).unwrap_or_else(|_| folder.into());
    // Errors come back as errors; printed as well they would be there twice.
    let log =
        if options.debug { ort::logging::LogLevel::Info } else { ort::logging::LogLevel::Fatal };
    let mut builder = ort::session::Session::builder(&runtime.environment)?
        .with_operators(mx_custom_ops::operator_domain()?)?
        .with_optimization_level(GraphOptimizationLevel::All)?
        // Batches differ in length: a plan per shape would only be kept, never used again.
        .with_memory_pattern(false)?
        .with_log_level(log)?
        .with_config_entry(
            "session.model_external_initializers_file_folder_path",
            folder.to_string_lossy(),
        )?
        // The default fuses int8 weights into an operator that quantises activations as well.
        .with_config_entry("session.qdq_matmulnbits_accuracy_level", "1")?;
    if let Some(threads) = options.threads {
        builder = builder.with_intra_threads(threads)?;
    }
    Ok(builder)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_labelled_positions_count() {
        let score = sum(
            &[7, MASKED, 9, MASKED],
            &[0.5, 100.0, 1.5, 100.0],
            &[1.0, 100.0, 2.0, 100.0],
            &[7, 0, 8, 0],
            11,
        );
        let expected = DocumentScore { nll: 2.0, entropy: 3.0, correct: 1, tokens: 2, bytes: 11 };
        assert_eq!(score, expected);
    }
}
