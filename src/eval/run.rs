//! A run: every job's stages, each independent of the others.

use super::corpus::{self, Dataset, Text, TextDigest};
use super::devices::{self, Chosen, Device, Request};
use super::error::{Error, Result};
use super::gpus::Local;
use super::identity::{Hashing, Identity, Subject};
use super::instrument;
use super::job::Job;
use super::measure::{Bench, Item, blank};
use super::observer::Observer;
use super::record::{Record, Status};
use super::report;
use super::runtime::{self, Runtime};
use super::schedule;
use super::session::open_model;
use super::store::{Entry, Store};
use super::windows::{Corpus, Tokenizer};
use super::workers;
use crate::rewrite::{BaseDtype, RewriteOptions};
use serde_json::Map;
use std::cell::{OnceCell, RefCell};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

/// Where the evaluation text comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Data {
    /// Files, globs over files, and addresses of files, in this order.
    Files(Vec<PathBuf>),
    /// A data set of the Hugging Face hub.
    Dataset(Dataset),
}

/// Options of a run.
#[derive(Clone, Debug)]
pub struct Options {
    /// The text.
    pub data: Data,
    /// Seed of a random sample of the text; `None` takes documents from its beginning.
    pub shuffle: Option<u64>,
    /// Documents to read.
    pub max_samples: usize,
    /// Tokens of a document's window.
    pub seq_len: usize,
    /// Where to run.
    pub device: Request,
    /// Share of a GPU's memory that has to be free for `auto` to take it.
    pub min_free_ratio: f64,
    /// Stages that are measured on one GPU at a time.
    pub workers_per_device: usize,
    /// Spread the batches of one stage over all devices instead of the stages.
    pub shard_documents: bool,
    /// Threads of one operator; `None` leaves it to ONNX Runtime.
    pub threads: Option<usize>,
    /// Threads that tokenise.
    pub loader_workers: usize,
    /// libonnxruntime, when it is not to be looked for.
    pub ort_lib: Option<PathBuf>,
    /// Output folder.
    pub out: PathBuf,
    /// Reuse stages that an earlier run finished.
    pub resume: bool,
    /// Keep the loss of every document.
    pub documents: bool,
    /// ONNX Runtime's log on stderr.
    pub debug: bool,
    /// How sweeps rewrite; lowering and format are the stage's.
    pub rewrite: RewriteOptions,
    /// The command line, for run.json.
    pub command: Vec<String>,
}

/// What a run left behind.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// One record a stage, in the order of jobs and stages.
    pub entries: Vec<Entry>,
}

impl Outcome {
    /// Whether any stage failed.
    pub fn failed(&self) -> bool {
        self.entries.iter().any(|entry| entry.record.status == Status::Failed)
    }

    /// The records alone.
    pub fn records(&self) -> Vec<Record> {
        records_of(&self.entries)
    }
}

/// Runs `jobs`.
///
/// # Errors
/// What concerns the run as a whole: no ONNX Runtime, no data, a locked folder, a model that is not
/// there, or not a single model that can be fed. What concerns one stage becomes its record.
pub fn run(jobs: &[Job], options: &Options, observer: &dyn Observer) -> Result<Outcome> {
    let started = Instant::now();
    let runtime = runtime::load(options.ort_lib.as_deref())?;
    let chosen = devices::choose(&options.device, options.min_free_ratio, &Local(&runtime))?;
    if let Some(note) = &chosen.note {
        observer.note(note);
    }
    if options.workers_per_device > 1 && !chosen.on_gpu() {
        observer.note("--workers-per-device is for GPUs: the CPU has one worker");
    }
    let data = fetch(options, observer)?;
    let mut store = Store::open(&options.out, options.resume)?;
    observer.opened(&store.work_root());
    check_base(options, &chosen)?;
    let run = Run::new(jobs, options, &chosen, &runtime, (data, started), observer);
    // A mistyped tokenizer or data file must not cost the results of an earlier run, so nothing is
    // written before it is known that something can be measured.
    let mut prepared: Vec<_> = jobs.iter().map(|job| run.prepare(job)).collect();
    if observer.interrupted() {
        return Err(Error::Interrupted);
    }
    if prepared.iter().all(Result::is_err)
        && let Some(Err(error)) = prepared.drain(..).next()
    {
        return Err(error);
    }
    // Without --resume nothing is kept, and no key has to be known yet.
    store.keep(&if options.resume { run.wanted(jobs) } else { Vec::new() })?;
    if options.resume || !chosen.on_gpu() {
        // On the CPU reading gigabytes would slow down the measuring.
        run.identity();
    }
    let mut items = Vec::new();
    for (index, (job, corpus)) in jobs.iter().zip(prepared).enumerate() {
        match corpus {
            Ok(corpus) => items.extend(run.items(index, job, corpus, &store)),
            Err(error) => run.refuse(index, job, &error, &mut store)?,
        }
    }
    run.measure(items, &mut store)?;
    Ok(Outcome { entries: ordered(jobs, &store) })
}

/// Refuses a base type that the devices do not compute in.
fn check_base(options: &Options, chosen: &Chosen) -> Result<()> {
    if options.rewrite.base_dtype == Some(BaseDtype::Bf16) && !chosen.on_gpu() {
        let text = "--base-dtype bf16 needs a GPU: ONNX Runtime's CPU provider lacks most bfloat16 \
                    kernels; the stage bf16 emulates it";
        return Err(Error::Usage(text.into()));
    }
    Ok(())
}

/// The evaluation text.
fn fetch(options: &Options, observer: &dyn Observer) -> Result<Text> {
    let sources = match &options.data {
        Data::Files(names) => corpus::resolve(names)?,
        Data::Dataset(dataset) => {
            observer.note(&format!("looking for {dataset} on the Hugging Face hub"));
            let fetched = dataset.fetch()?;
            if let Some(warning) = &fetched.warning {
                observer.warn(warning);
            }
            fetched.sources
        }
    };
    Ok(Text::new(sources, options.shuffle))
}

/// Records in the order of jobs and tasks, which resuming may have disturbed in the file.
fn ordered(jobs: &[Job], store: &Store) -> Vec<Entry> {
    jobs.iter()
        .flat_map(|job| job.tasks.iter().map(move |task| (job, task.name())))
        .filter_map(|(job, stage)| store.get(&job.model, &stage).cloned())
        .collect()
}

fn records_of(entries: &[Entry]) -> Vec<Record> {
    entries.iter().map(|entry| entry.record.clone()).collect()
}

struct Run<'a> {
    jobs: &'a [Job],
    options: &'a Options,
    chosen: &'a Chosen,
    runtime: &'a Runtime,
    data: Text,
    started: Instant,
    observer: &'a dyn Observer,
    /// Digest of the documents read, once they are.
    documents: OnceCell<String>,
    hashing: RefCell<Option<Hashing>>,
    identity: OnceCell<Identity>,
    /// The text as the last tokenizer saw it: graphs given side by side share one.
    tokenised: RefCell<Option<Tokenised>>,
}

#[derive(Clone)]
struct Tokenised {
    tokenizer: PathBuf,
    /// Tokens that the tokenizer knows.
    size: usize,
    corpus: Arc<Corpus>,
}

impl<'a> Run<'a> {
    fn new(
        jobs: &'a [Job],
        options: &'a Options,
        chosen: &'a Chosen,
        runtime: &'a Runtime,
        (data, started): (Text, Instant),
        observer: &'a dyn Observer,
    ) -> Self {
        let hashing = RefCell::new(Some(Hashing::start(jobs, data.sources())));
        let (identity, tokenised) = (OnceCell::new(), RefCell::new(None));
        let documents = OnceCell::new();
        Self {
            jobs,
            options,
            chosen,
            runtime,
            data,
            started,
            observer,
            documents,
            hashing,
            identity,
            tokenised,
        }
    }

    /// Keys and facts; waits for the models to be read.
    fn identity(&self) -> &Identity {
        self.identity.get_or_init(|| {
            let digests = self.hashing.borrow_mut().take().map(|hashing| {
                if !hashing.is_finished() {
                    self.observer.note("waiting for the digests of the models");
                }
                hashing.wait()
            });
            let mut digests = digests.unwrap_or_default();
            digests.documents = self.documents.get().cloned().unwrap_or_default();
            self.subject().identity(&digests)
        })
    }

    /// What is measured, with what.
    fn subject(&self) -> Subject<'_> {
        let Self { jobs, options, chosen, runtime, data, .. } = self;
        Subject { jobs, options, chosen, runtime, data }
    }

    fn wanted(&self, jobs: &[Job]) -> Vec<(String, String, String)> {
        let of = |(job, keys): (&Job, &Vec<String>)| {
            let tasks = job.tasks.iter().zip(keys);
            tasks.map(|(t, key)| (job.model.clone(), t.name(), key.clone())).collect::<Vec<_>>()
        };
        jobs.iter().zip(&self.identity().keys).flat_map(of).collect()
    }

    /// Tokenises the text for a job and checks that its model can be fed with it.
    fn prepare(&self, job: &Job) -> Result<Arc<Corpus>> {
        let model = open_model(&job.path, &job.model)?;
        let inspection = instrument::inspect(&model, &job.model)?;
        let tokenised = self.tokenise(&job.tokenizer)?;
        let largest = tokenised.corpus.largest_id();
        inspection.check_ids(&job.model, largest, tokenised.size)?;
        Ok(tokenised.corpus)
    }

    fn tokenise(&self, path: &Path) -> Result<Tokenised> {
        if let Some(tokenised) = self.tokenised.borrow().as_ref().filter(|t| t.tokenizer == path) {
            return Ok(tokenised.clone());
        }
        let tokenizer = Tokenizer::open(path)?;
        self.observer.note(&format!("tokenising {}", self.data.describe()));
        let options = self.options;
        let mut digest = TextDigest::default();
        let documents = self.data.documents(options.max_samples, self.observer)?;
        let documents = documents.inspect(|document| {
            if let Ok(document) = document {
                digest.update(document);
            }
        });
        let workers = rayon::ThreadPoolBuilder::new()
            .num_threads(options.loader_workers)
            .build()
            .map_err(|e| Error::Usage(format!("--loader-workers: {e}")))?;
        let corpus = workers
            .install(|| tokenizer.tokenize(documents, options.seq_len, options.max_samples))?;
        self.observer.note(&format!(
            "{} documents read, {} with {} scored tokens",
            corpus.read,
            corpus.windows.len(),
            corpus.tokens()
        ));
        let digest = digest.finish();
        if *self.documents.get_or_init(|| digest.clone()) != digest {
            let text = "the evaluation text has changed since the first model was prepared";
            return Err(Error::NothingToScore(text.into()));
        }
        let seconds = self.started.elapsed().as_secs_f64();
        self.observer.note(&format!("first batch ready after {seconds:.2} s"));
        let tokenised =
            Tokenised { tokenizer: path.into(), size: tokenizer.len(), corpus: Arc::new(corpus) };
        *self.tokenised.borrow_mut() = Some(tokenised.clone());
        Ok(tokenised)
    }

    /// The stages of a job that no earlier run has measured.
    fn items<'b>(
        &'b self,
        index: usize,
        job: &'b Job,
        corpus: Arc<Corpus>,
        store: &Store,
    ) -> Vec<Item<'b>> {
        let batches = Arc::new(schedule::plan(&corpus.windows, job.batch_size));
        let mut items = Vec::new();
        for (place, task) in job.tasks.iter().enumerate() {
            if store.get(&job.model, &task.name()).is_some() {
                self.observer.note(&format!("{}: kept from an earlier run", task.name()));
                continue;
            }
            let (corpus, batches) = (Arc::clone(&corpus), Arc::clone(&batches));
            items.push(Item { job, task, place: (index, place), corpus, batches });
        }
        items
    }

    /// Measures `items`, writing each record as its stage ends.
    fn measure(&self, items: Vec<Item<'_>>, store: &mut Store) -> Result<()> {
        let bench = Bench {
            runtime: self.runtime,
            chosen: self.chosen,
            options: self.options,
            work_root: store.work_root(),
            observer: self.observer,
            items,
            stop: AtomicBool::new(false),
        };
        let teams = teams(
            &self.chosen.devices,
            self.options.workers_per_device,
            self.options.shard_documents,
        );
        // On the CPU rewriting one stage would slow down the measuring of another.
        let ahead = self.chosen.on_gpu();
        let count = bench.items.len();
        let outcome = workers::run(&bench, count, &teams, ahead, |done| {
            let (job, task) = bench.items[done.number].place;
            store.set_run(self.identity().facts.clone())?;
            store.append(done.record, &self.identity().keys[job][task], done.details)?;
            self.write_reports(store)
        });
        store.clear_work()?;
        outcome?;
        if self.observer.interrupted() {
            return Err(Error::Interrupted);
        }
        // Also where everything was kept from an earlier run.
        store.set_run(self.identity().facts.clone())?;
        self.write_reports(store)
    }

    /// Records a job that cannot be run at all.
    fn refuse(&self, index: usize, job: &Job, error: &Error, store: &mut Store) -> Result<()> {
        store.set_run(self.identity().facts.clone())?;
        for (task, key) in job.tasks.iter().zip(&self.identity().keys[index]) {
            let mut record = blank(job, task, self.chosen, self.options);
            record.reason = Some(error.to_string());
            self.observer.stage_finished(usize::MAX, &record);
            store.append(record, key, Map::new())?;
        }
        self.write_reports(store)
    }

    fn write_reports(&self, store: &Store) -> Result<()> {
        let records = records_of(&ordered(self.jobs, store));
        let facts = &self.identity().facts;
        store.write("report.md", report::markdown(&records, facts).as_bytes())?;
        store.write("report.html", report::html(&records, facts).as_bytes())
    }
}

/// Who measures together: a device alone, each as often as there are workers, or all of them.
fn teams(devices: &[Device], workers: usize, shard: bool) -> Vec<Vec<Device>> {
    // The CPU has no second worker: it is one device whose cores one session uses.
    let workers = if devices == [Device::Cpu] { 1 } else { workers.max(1) };
    let slots = (0..workers).flat_map(|_| devices.iter().copied());
    if shard { vec![slots.collect()] } else { slots.map(|device| vec![device]).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn teams_of_devices() {
        let (a, b) = (Device::Cuda(0), Device::Cuda(1));
        assert_eq!(teams(&[Device::Cpu], 3, false), [[Device::Cpu]]);
        assert_eq!(teams(&[Device::Cpu], 1, true), [[Device::Cpu]]);
        assert_eq!(teams(&[a, b], 1, false), [[a], [b]]);
        // Stages alternate between devices before one gets its second.
        assert_eq!(teams(&[a, b], 2, false), [[a], [b], [a], [b]]);
        assert_eq!(teams(&[a, b], 2, true), [[a, b, a, b]]);
    }
}
