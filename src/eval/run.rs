//! A run: every job's stages, each independent of the others.

use super::corpus::{self, Dataset};
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

/// Where the evaluation text comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Data {
    /// A file.
    File(PathBuf),
    /// A data set of the Hugging Face hub.
    Dataset(Dataset),
}

/// Options of a run.
#[derive(Clone, Debug)]
pub struct Options {
    /// The text.
    pub data: Data,
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
    let runtime = runtime::load(options.ort_lib.as_deref())?;
    let chosen = devices::choose(&options.device, options.min_free_ratio, &Local(&runtime))?;
    if let Some(note) = &chosen.note {
        observer.note(note);
    }
    if options.workers_per_device > 1 && !chosen.on_gpu() {
        observer.note("--workers-per-device is for GPUs: the CPU has one worker");
    }
    let data = fetch(&options.data, observer)?;
    let mut store = Store::open(&options.out, options.resume)?;
    observer.opened(&store.work_root());
    check_base(options, &chosen)?;
    let run = Run::new(jobs, options, &chosen, &runtime, data, observer)?;
    // A mistyped tokenizer or data file must not cost the results of an earlier run, so nothing is
    // written before it is known that something can be measured.
    let mut prepared: Vec<_> = jobs.iter().map(|job| run.prepare(job)).collect();
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

/// The file of the evaluation text.
pub(super) fn fetch(data: &Data, observer: &dyn Observer) -> Result<PathBuf> {
    match data {
        Data::File(path) => Ok(path.clone()),
        Data::Dataset(dataset) => {
            observer.note(&format!("fetching {dataset} from the Hugging Face hub"));
            let fetched = dataset.fetch()?;
            if let Some(warning) = &fetched.warning {
                observer.warn(warning);
            }
            Ok(fetched.path)
        }
    }
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
    data: PathBuf,
    observer: &'a dyn Observer,
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
        data: PathBuf,
        observer: &'a dyn Observer,
    ) -> Result<Self> {
        let hashing = RefCell::new(Some(Hashing::start(jobs, &data)?));
        let (identity, tokenised) = (OnceCell::new(), RefCell::new(None));
        Ok(Self { jobs, options, chosen, runtime, data, observer, hashing, identity, tokenised })
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
            self.subject().identity(&digests.unwrap_or_default())
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
        self.observer.note(&format!("tokenising {}", self.data.display()));
        let documents = corpus::open(&self.data)?;
        let options = self.options;
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
