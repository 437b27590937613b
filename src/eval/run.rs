//! A run: every job's stages, each independent of the others.

use super::corpus::Dataset;
use super::devices::{self, Chosen, Device, Request};
use super::error::{Error, Result};
use super::gpus::Local;
use super::identity::{Hashing, Identity, Subject};
use super::job::Job;
use super::measure::{Bench, Item, blank};
use super::observer::Observer;
use super::record::{Record, Status};
use super::report::{self, Report, Sensitivity};
use super::runtime::{self, Runtime};
use super::schedule;
use super::scores;
use super::statistics::Bootstrap;
use super::store::{Entry, Store};
use super::texts::Texts;
use super::windows::{Corpus, Definition};
use super::workers;
use crate::rewrite::{BaseDtype, RewriteOptions};
use serde_json::{Map, Value};
use std::cell::{OnceCell, RefCell};
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};
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
    /// What is scored, and from which context.
    pub definition: Definition,
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
    /// Run the baseline beside every other stage, for what only a comparison token by token shows.
    pub kl: bool,
    /// ONNX Runtime's log on stderr.
    pub debug: bool,
    /// How sweeps rewrite; lowering and format are the stage's.
    pub rewrite: RewriteOptions,
    /// How documents are resampled for intervals.
    pub bootstrap: Bootstrap,
    /// The command line, for run.json.
    pub command: Vec<String>,
}

/// What a run left behind.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// One record a stage, in the order of jobs and stages.
    pub entries: Vec<Entry>,
    /// Whether it was stopped before all stages had ended.
    pub interrupted: bool,
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
    let machine = Machine::load(options, observer)?;
    if options.workers_per_device > 1 && !machine.chosen.on_gpu() {
        observer.note("--workers-per-device is for GPUs: the CPU has one worker");
    }
    let texts = Texts::new(options, observer, started)?;
    let mut store = Store::open(&options.out, options.resume)?;
    observer.opened(&store.work_root());
    let run = Run::new(jobs, options, &machine, &texts, observer);
    // A mistyped tokenizer or data file must not cost the results of an earlier run, so nothing is
    // written before it is known that something can be measured.
    let mut prepared: Vec<_> = jobs.iter().map(|job| texts.prepare(job)).collect();
    if observer.interrupted() {
        return Err(Error::Interrupted);
    }
    if prepared.iter().all(Result::is_err)
        && let Some(Err(error)) = prepared.drain(..).next()
    {
        return Err(error);
    }
    // Without --resume nothing is kept.
    store.keep(&if options.resume { run.wanted(jobs) } else { Vec::new() })?;
    let mut items = Vec::new();
    for (index, (job, corpus)) in jobs.iter().zip(prepared).enumerate() {
        match corpus {
            Ok(corpus) => items.extend(run.items(index, job, corpus, &store)),
            Err(error) => run.refuse(index, job, &error, &mut store)?,
        }
    }
    let interrupted = run.measure(items, &mut store)?;
    Ok(Outcome { entries: ordered(jobs, &store), interrupted })
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

/// Records in the order of jobs and tasks, which resuming may have disturbed in the file.
pub(super) fn ordered(jobs: &[Job], store: &Store) -> Vec<Entry> {
    jobs.iter()
        .flat_map(|job| job.tasks.iter().map(move |task| (job, task.name())))
        .filter_map(|(job, stage)| store.get(&job.model, &stage).cloned())
        .collect()
}

fn records_of(entries: &[Entry]) -> Vec<Record> {
    entries.iter().map(|entry| entry.record.clone()).collect()
}

/// ONNX Runtime and the devices that were chosen.
pub(super) struct Machine {
    pub runtime: Runtime,
    pub chosen: Chosen,
}

impl Machine {
    /// Loads ONNX Runtime and chooses.
    ///
    /// # Errors
    /// No ONNX Runtime, no such device, or a base type that it does not compute in.
    pub fn load(options: &Options, observer: &dyn Observer) -> Result<Self> {
        let runtime = runtime::load(options.ort_lib.as_deref())?;
        let chosen = devices::choose(&options.device, options.min_free_ratio, &Local(&runtime))?;
        if let Some(note) = &chosen.note {
            observer.note(note);
        }
        check_base(options, &chosen)?;
        Ok(Self { runtime, chosen })
    }
}

/// Jobs on a machine.
pub(super) struct Run<'a> {
    jobs: &'a [Job],
    options: &'a Options,
    machine: &'a Machine,
    observer: &'a dyn Observer,
    texts: &'a Texts<'a>,
    hashing: RefCell<Option<Hashing>>,
    identity: OnceCell<Identity>,
}

impl<'a> Run<'a> {
    /// Begins to read the models for their digests.
    pub fn new(
        jobs: &'a [Job],
        options: &'a Options,
        machine: &'a Machine,
        texts: &'a Texts<'a>,
        observer: &'a dyn Observer,
    ) -> Self {
        let hashing = Hashing::start(jobs, texts.data().sources(), &options.definition);
        let (hashing, identity) = (RefCell::new(Some(hashing)), OnceCell::new());
        Self { jobs, options, machine, observer, texts, hashing, identity }
    }

    /// Keys and facts; waits for the models to be read.
    pub fn identity(&self) -> &Identity {
        self.identity.get_or_init(|| {
            let digests = self.hashing.borrow_mut().take().map(|hashing| {
                if !hashing.is_finished() {
                    self.observer.note("waiting for the digests of the models");
                }
                hashing.wait()
            });
            let mut digests = digests.unwrap_or_default();
            digests.documents = self.texts.digest();
            self.subject().identity(&digests)
        })
    }

    /// What is measured, with what.
    fn subject(&self) -> Subject<'_> {
        let Self { jobs, options, machine: Machine { runtime, chosen }, texts, .. } = self;
        Subject { jobs, options, chosen, runtime, data: texts.data() }
    }

    fn wanted(&self, jobs: &[Job]) -> Vec<(String, String, String)> {
        let of = |(job, keys): (&Job, &Vec<String>)| {
            let tasks = job.tasks.iter().zip(keys);
            tasks.map(|(t, key)| (job.model.clone(), t.name(), key.clone())).collect::<Vec<_>>()
        };
        jobs.iter().zip(&self.identity().keys).flat_map(of).collect()
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
            let todo = Vec::from_iter(0..batches.len());
            let key = &self.identity().scores[index][place];
            let scores = store.folder().join(scores::file_name(&job.model, &task.name()));
            items.push(Item {
                job,
                task,
                place: (index, place),
                corpus,
                batches,
                todo,
                key,
                scores,
            });
        }
        items
    }

    /// What `items` are measured with.
    pub fn bench<'b>(
        &'b self,
        items: Vec<Item<'b>>,
        work_root: PathBuf,
        one_by_one: bool,
    ) -> Bench<'b> {
        Bench {
            runtime: &self.machine.runtime,
            chosen: &self.machine.chosen,
            options: self.options,
            work_root,
            observer: self.observer,
            jobs: self.jobs,
            keys: &self.identity().scores,
            items,
            references: self.jobs.iter().map(|_| OnceLock::new()).collect(),
            one_by_one,
            stop: AtomicBool::new(false),
        }
    }

    /// Measures `items`, writing each record as its stage ends; whether it was interrupted.
    fn measure(&self, items: Vec<Item<'_>>, store: &mut Store) -> Result<bool> {
        let teams = teams(
            &self.machine.chosen.devices,
            self.options.workers_per_device,
            self.options.shard_documents,
        );
        let bench = self.bench(items, store.work_root(), teams.len() == 1);
        // On the CPU rewriting one stage would slow down the measuring of another.
        let ahead = self.machine.chosen.on_gpu();
        let count = bench.items.len();
        let outcome = workers::run(&bench, count, &teams, ahead, |done| {
            let (job, task) = bench.items[done.number].place;
            store.set_run(self.identity().facts.clone())?;
            store.append(done.record, &self.identity().keys[job][task], done.details)?;
            self.write_reports(store)
        });
        drop(bench);
        store.clear_work()?;
        outcome?;
        let interrupted = self.observer.interrupted();
        let mut facts = self.identity().facts.clone();
        if interrupted {
            let text = "the run was stopped before all of its stages had ended";
            facts.insert("interrupted".into(), text.into());
        }
        // Also where everything was kept from an earlier run.
        store.set_run(facts)?;
        self.write_reports(store)?;
        Ok(interrupted)
    }

    /// Records a job that cannot be run at all.
    fn refuse(&self, index: usize, job: &Job, error: &Error, store: &mut Store) -> Result<()> {
        store.set_run(self.identity().facts.clone())?;
        for (task, key) in job.tasks.iter().zip(&self.identity().keys[index]) {
            let mut record = blank(job, task, &self.machine.chosen, self.options);
            record.reason = Some(error.to_string());
            self.observer.stage_finished(usize::MAX, &record);
            store.append(record, key, Map::new())?;
        }
        self.write_reports(store)
    }

    fn write_reports(&self, store: &Store) -> Result<()> {
        write_reports(self.jobs, &self.identity().facts, self.options, store)
    }
}

/// The reports of what the store has.
pub(super) fn write_reports(
    jobs: &[Job],
    facts: &Map<String, Value>,
    options: &Options,
    store: &Store,
) -> Result<()> {
    let records = records_of(&ordered(jobs, store));
    let definition = options.definition.text();
    // What `mxeval sensitivity` left in the same folder is shown with it, if it is of this model alone. A
    // search has a page of its own: its sizes are of layers, its figures of other documents.
    let sensitivity = Sensitivity::read(&store.folder().join("sensitivity.json")).ok().flatten();
    let model = facts.get("models").and_then(|models| models.get(0)?.get("sha256")?.as_str());
    let sensitivity = sensitivity
        .filter(|found| jobs.len() == 1 && model.is_some_and(|model| found.model.sha256 == model));
    let report = Report {
        records: &records,
        facts,
        definition: &definition,
        sensitivity: sensitivity.as_ref(),
        front: &[],
    };
    store.write("report.md", report::markdown(&report).as_bytes())?;
    store.write("report.csv", report::csv(&records)?.as_bytes())?;
    match report::subsets_csv(&records)? {
        Some(subsets) => store.write("subsets.csv", subsets.as_bytes())?,
        // Those of an earlier run would stand beside other figures.
        None => store.remove("subsets.csv")?,
    }
    store.write("report.html", report::html(&report).as_bytes())
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
