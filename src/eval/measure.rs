//! One stage: make its graph, load it, score the corpus.

use super::devices::{self, Device};
use super::error::{Error, Result};
use super::instrument;
use super::job::{Job, Task};
use super::metrics::{DocumentScore, Metrics};
use super::process::PeakMemory;
use super::record::Record;
use super::run::Options;
use super::runtime::Runtime;
use super::schedule::Batch;
use super::session::{Scorer, SessionOptions, open_model};
use super::stage::Stage;
use super::windows::Corpus;
use crate::onnx::{Graph, Model};
use crate::rewrite::{RewriteOptions, rewrite_file};
use mx_custom_ops::contract;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Who watches a run; the library prints nothing itself.
pub trait Observer {
    /// The output folder is ours; rewritten models lie under `work` while they are measured.
    fn opened(&self, work: &Path) {
        let _ = work;
    }
    /// Something worth a line.
    fn note(&self, text: &str) {
        let _ = text;
    }
    /// Something the user should know.
    fn warn(&self, text: &str) {
        let _ = text;
    }
    /// A stage begins; `total` tokens are to be scored.
    fn stage_started(&self, model: &str, stage: &str, total: u64) {
        let _ = (model, stage, total);
    }
    /// `tokens` more have been scored.
    fn progress(&self, tokens: u64) {
        let _ = tokens;
    }
    /// Whether to stop; asked after every batch.
    fn interrupted(&self) -> bool {
        false
    }
    /// A stage is over.
    fn stage_finished(&self, record: &Record) {
        let _ = record;
    }
}

/// Watches nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Observer for Silent {}

/// How a stage ended, errors apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Measured {
    Done,
    Skipped(String),
    Failed(String),
}

/// What a stage is measured with.
pub(super) struct Measure<'a> {
    pub runtime: &'a Runtime,
    pub device: Device,
    pub options: &'a Options,
    pub corpus: &'a Corpus,
    pub batches: &'a [Batch],
    /// Folder for the rewritten model.
    pub work: &'a Path,
    pub observer: &'a dyn Observer,
}

impl Measure<'_> {
    /// Fills in `record`.
    pub(super) fn task(&self, job: &Job, task: &Task, record: &mut Record) -> Result<Measured> {
        let peak = PeakMemory::start();
        let path = match task {
            Task::Sweep(Stage::NvFp8) => {
                return Ok(Measured::Skipped(devices::nvfp8_unavailable(self.device)));
            }
            Task::Sweep(stage) => self.rewritten(job, *stage, record)?,
            Task::Graph(_) => {
                describe(&open_model(&job.path, &job.model)?, record)?;
                job.path.clone()
            }
        };
        let model = open_model(&path, &job.model)?;
        let files = instrument::files(&path, &model)?;
        record.model_bytes = Some(files.iter().map(|(_, bytes)| bytes).sum());
        drop(model);
        let measured = self.score(&path, &task.name(), record)?;
        record.peak_memory_bytes = peak.bytes();
        Ok(measured)
    }

    /// The stage's graph.
    fn rewritten(&self, job: &Job, stage: Stage, record: &mut Record) -> Result<PathBuf> {
        let Some(lowering) = stage.lowering() else {
            record.sites_replaced = Some(0);
            return Ok(job.path.clone());
        };
        let format = match stage {
            Stage::Mx(format) => Some(format),
            _ => None,
        };
        let options = RewriteOptions { lowering, format, overwrite: true, ..self.base(stage) };
        let path = self.work.join("model.onnx");
        let report =
            rewrite_file(&job.path, &path, &options).map_err(|e| Error::Rewrite(e.to_string()))?;
        record.sites_replaced = Some(report.sites as u64);
        Ok(path)
    }

    fn base(&self, stage: Stage) -> RewriteOptions {
        let rewrite = self.options.rewrite.clone();
        match stage {
            Stage::Mx(_) | Stage::MxTierC | Stage::MxTierD => rewrite,
            // The other lowerings have one format, no blocks and no shared exponent.
            _ => RewriteOptions {
                tier: rewrite.tier,
                include: rewrite.include,
                exclude: rewrite.exclude,
                threads: rewrite.threads,
                ..RewriteOptions::default()
            },
        }
    }

    fn score(&self, path: &Path, stage: &str, record: &mut Record) -> Result<Measured> {
        let options = SessionOptions {
            device: self.device,
            threads: self.options.threads,
            debug: self.options.debug,
        };
        let mut scorer = Scorer::open(self.runtime, path, stage, &options)?;
        let mut documents = vec![DocumentScore::default(); self.corpus.windows.len()];
        let start = Instant::now();
        for batch in self.batches {
            let scores = scorer.score(&self.corpus.windows, batch)?;
            let mut tokens = 0;
            for (&index, score) in batch.windows.iter().zip(scores) {
                tokens += score.tokens;
                documents[index] = score;
            }
            self.observer.progress(tokens);
            if self.observer.interrupted() {
                return Err(Error::Interrupted);
            }
        }
        let seconds = start.elapsed().as_secs_f64();
        let bad = documents.iter().filter(|d| !(d.nll.is_finite() && d.entropy.is_finite()));
        match (bad.count(), Metrics::new(&documents)) {
            (0, Some(metrics)) => {
                record.set_metrics(&metrics, seconds);
                Ok(Measured::Done)
            }
            (0, None) => Ok(Measured::Failed("no token was scored".into())),
            (bad, _) => Ok(Measured::Failed(format!(
                "the loss is not finite in {bad} of {} documents: the model returns NaN or Inf",
                documents.len()
            ))),
        }
    }
}

/// Says in `record` what MX nodes a finished graph holds.
fn describe(model: &Model, record: &mut Record) -> Result<()> {
    let mut found = Found::default();
    found
        .collect(model.graph())
        .map_err(|reason| Error::Model { model: record.model.clone(), reason })?;
    record.sites_replaced = Some(found.nodes);
    if found.nodes > 0 {
        record.weight_format = Some(Vec::from_iter(found.weights).join("+"));
        record.activation_format = Some(Vec::from_iter(found.activations).join("+"));
    }
    Ok(())
}

/// The MX nodes of a graph and its sub-graphs.
#[derive(Default)]
struct Found {
    nodes: u64,
    weights: BTreeSet<String>,
    activations: BTreeSet<String>,
}

impl Found {
    fn collect(&mut self, graph: &Graph) -> std::result::Result<(), String> {
        for (id, node) in graph.nodes() {
            if node.domain.as_deref() == Some(contract::DOMAIN)
                && node.op_type.as_deref() == Some(contract::op::MX_MATMUL)
            {
                self.nodes += 1;
                for (attribute, names) in [
                    (contract::attr::WEIGHT_FORMAT, &mut self.weights),
                    (contract::attr::ACTIVATION_FORMAT, &mut self.activations),
                ] {
                    let value =
                        node.attribute.iter().find(|a| a.name.as_deref() == Some(attribute));
                    let text = value.and_then(|a| a.s.as_ref());
                    names.extend(text.map(|s| String::from_utf8_lossy(s).into_owned()));
                }
            }
            for (_, sub) in graph.subgraphs(id).map_err(|e| e.to_string())? {
                self.collect(&sub)?;
            }
        }
        Ok(())
    }
}
