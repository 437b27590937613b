//! What sensitivity and search begin with: a runtime, a device, the text.

use crate::eval::devices::{self, Chosen, Device, Request};
use crate::eval::error::{Error, Result};
use crate::eval::gpus::Local;
use crate::eval::instrument::{self, Inspection};
use crate::eval::job::Job;
use crate::eval::observer::Observer;
use crate::eval::process::sha256_files;
use crate::eval::run::Data;
use crate::eval::runtime::{self, Runtime};
use crate::eval::schedule::{self, Batch, Padded};
use crate::eval::session::{SessionOptions, open_model};
use crate::eval::texts;
use crate::eval::windows::{Corpus, Definition, Window};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// What both commands are told.
#[derive(Clone, Debug)]
pub struct Bench {
    /// The model.
    pub model: PathBuf,
    /// Its tokenizer.json.
    pub tokenizer: PathBuf,
    /// The text.
    pub data: Data,
    /// Seed of a random sample of the text, in place of its first documents.
    pub shuffle: Option<u64>,
    /// Documents to read at most.
    pub max_samples: usize,
    /// Tokens of a document that are used.
    pub seq_len: usize,
    /// Documents that run together.
    pub batch_size: usize,
    /// Where to run; the first device is used.
    pub device: Request,
    /// Share of a GPU's memory that has to be free for `auto` to take it.
    pub min_free_ratio: f64,
    /// Threads of one operator; `None` leaves it to ONNX Runtime.
    pub threads: Option<usize>,
    /// Threads that tokenise.
    pub loader_workers: usize,
    /// libonnxruntime, when it is not to be looked for.
    pub ort_lib: Option<PathBuf>,
    /// Output folder.
    pub out: PathBuf,
    /// Go on where an earlier run was interrupted.
    pub resume: bool,
    /// ONNX Runtime's log on stderr.
    pub debug: bool,
    /// The command line, for the result.
    pub command: Vec<String>,
}

/// A file, by what is in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileId {
    /// Its path.
    pub path: PathBuf,
    /// SHA-256 of it and its external data; of a text, of the documents that were read.
    pub sha256: String,
}

/// Everything is there and can be measured with.
pub(crate) struct Setup {
    pub runtime: Runtime,
    pub chosen: Chosen,
    pub corpus: Corpus,
    pub inspection: Inspection,
    pub model: FileId,
    pub tokenizer: FileId,
    pub data: FileId,
}

impl Setup {
    /// Loads ONNX Runtime, chooses the device, tokenises the text and looks at the model.
    ///
    /// # Errors
    /// Any of them is missing, or they do not belong together.
    pub(crate) fn new(bench: &Bench, observer: &dyn Observer) -> Result<Self> {
        let runtime = runtime::load(bench.ort_lib.as_deref())?;
        let chosen = devices::choose(&bench.device, bench.min_free_ratio, &Local(&runtime))?;
        if let Some(note) = &chosen.note {
            observer.note(note);
        }
        if chosen.devices.len() > 1 {
            observer.note(&format!("one device is used: {}", chosen.devices[0]));
        }
        let shown = bench.model.display().to_string();
        let inspection = instrument::inspect(&open_model(&bench.model, &shown)?, &shown)?;
        let (corpus, size, data) = tokenise(bench, observer)?;
        inspection.check_ids(&shown, corpus.largest_id(), size)?;
        let job = Job::graphs(std::slice::from_ref(&bench.model), &bench.tokenizer, 1);
        let digest = job.first().map(Job::sha256).transpose()?.unwrap_or_default();
        let id = |path: &Path| -> Result<FileId> {
            Ok(FileId { path: path.into(), sha256: sha256_files([path])? })
        };
        Ok(Self {
            model: FileId { path: bench.model.clone(), sha256: digest },
            tokenizer: id(&bench.tokenizer)?,
            data,
            runtime,
            chosen,
            corpus,
            inspection,
        })
    }

    /// The device.
    pub(crate) fn device(&self) -> Device {
        self.chosen.devices.first().copied().unwrap_or(Device::Cpu)
    }

    /// How sessions are set up.
    pub(crate) fn session(&self, bench: &Bench) -> SessionOptions {
        SessionOptions { device: self.device(), threads: bench.threads, debug: bench.debug }
    }

    /// The windows in batches, in rows and columns that the graph takes.
    ///
    /// # Errors
    /// A window is longer than the graph's fixed sequence.
    pub(crate) fn batches(&self, windows: &[Window], rows: usize) -> Result<Vec<(Batch, Padded)>> {
        let feeds = &self.inspection.feeds;
        let batches = schedule::plan(windows, feeds.rows_per_run(rows));
        if let Some((columns, batch)) = feeds.columns.zip(batches.first())
            && columns < batch.length
        {
            return Err(Error::Usage(format!(
                "the model's sequence length is fixed at {columns}: pass --seq-len {columns} or less"
            )));
        }
        let (rows, columns) = (feeds.rows.unwrap_or(0), feeds.columns.unwrap_or(0));
        let padded = |batch: &Batch| Padded::new(windows, batch, rows, columns);
        Ok(batches.into_iter().map(|batch| (batch.clone(), padded(&batch))).collect())
    }
}

/// The tokens of the text, how many the tokenizer knows, and what the text is.
fn tokenise(bench: &Bench, observer: &dyn Observer) -> Result<(Corpus, usize, FileId)> {
    let text = texts::fetch(&bench.data, bench.shuffle, observer)?;
    let (corpus, size, sha256) = texts::tokenised(
        &text,
        &bench.tokenizer,
        &Definition::per_document(bench.seq_len),
        (bench.max_samples, bench.loader_workers),
        observer,
    )?;
    Ok((corpus, size, FileId { path: text.describe().into(), sha256 }))
}
