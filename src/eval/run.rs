//! A run: every job's stages, one after the other, each independent of the others.

use super::corpus::{self, Dataset};
use super::devices::{self, Device, Request};
use super::error::{Error, Result};
use super::instrument;
use super::job::{Job, KeyParts, Task};
use super::measure::{Measure, Measured, Observer};
use super::process::{now, sha256_files, sha256_text};
use super::record::{Record, Status};
use super::report;
use super::runtime::{self, Runtime};
use super::schedule;
use super::session::open_model;
use super::stage::Stage;
use super::store::{Entry, Store};
use super::windows::{Corpus, DEFINITION, Tokenizer};
use crate::rewrite::{Activation, RewriteOptions};
use serde_json::{Map, Value, json};
use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::rc::Rc;

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
    let device = devices::choose(&options.device)?;
    let runtime = runtime::load(options.ort_lib.as_deref())?;
    let data = fetch(&options.data, observer)?;
    let mut store = Store::open(&options.out, options.resume)?;
    observer.opened(&store.work_root());
    let run = Run::new(jobs, options, device, &runtime, data, observer)?;
    // A mistyped tokenizer or data file must not cost the results of an earlier run, so nothing is
    // written before it is known that something can be measured.
    let mut prepared: Vec<_> = jobs.iter().map(|job| run.prepare(job)).collect();
    if prepared.iter().all(Result::is_err)
        && let Some(Err(error)) = prepared.drain(..).next()
    {
        return Err(error);
    }
    store.keep(&run.wanted(jobs))?;
    store.set_run(run.facts.clone())?;
    for (index, (job, corpus)) in jobs.iter().zip(prepared).enumerate() {
        match corpus {
            Ok(corpus) => run.job(index, job, &corpus, &mut store)?,
            Err(error) => run.refuse(index, job, &error, &mut store)?,
        }
    }
    Ok(Outcome { entries: ordered(jobs, &store) })
}

/// The file of the evaluation text.
fn fetch(data: &Data, observer: &dyn Observer) -> Result<PathBuf> {
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
    device: Device,
    runtime: &'a Runtime,
    data: PathBuf,
    observer: &'a dyn Observer,
    /// Key of every stage, by job and task.
    keys: Vec<Vec<String>>,
    facts: Map<String, Value>,
    /// The text as the last tokenizer saw it: graphs given side by side share one.
    tokenised: RefCell<Option<Tokenised>>,
}

#[derive(Clone)]
struct Tokenised {
    tokenizer: PathBuf,
    /// Tokens that the tokenizer knows.
    size: usize,
    corpus: Rc<Corpus>,
}

impl<'a> Run<'a> {
    fn new(
        jobs: &'a [Job],
        options: &'a Options,
        device: Device,
        runtime: &'a Runtime,
        data: PathBuf,
        observer: &'a dyn Observer,
    ) -> Result<Self> {
        let data_sha = sha256_files([data.as_path()])?;
        let cpu = mx_kernels::cpu::variant();
        let platform = format!("{} {cpu} {device} {:?}", runtime.version, options.threads);
        let mut models = Vec::new();
        let mut keys = Vec::new();
        for job in jobs {
            // A file that cannot be read becomes the failure of its stages, not of the run.
            let (model, tokenizer) =
                (job.sha256(observer).ok(), sha256_files([job.tokenizer.as_path()]).ok());
            let figures = format!(
                "{} {} {} {:?}",
                options.max_samples, options.seq_len, job.batch_size, options.rewrite
            );
            let key = |task: &Task| {
                let (stage, options) = (task.name(), &figures);
                let (model, data) = (model.as_deref().unwrap_or("unreadable"), &data_sha);
                let tokenizer = tokenizer.as_deref().unwrap_or("unreadable");
                KeyParts { model, data, tokenizer, stage: &stage, options, platform: &platform }
                    .key()
            };
            keys.push(job.tasks.iter().map(key).collect());
            models.push(json!({
                "model": job.model, "path": job.path, "sha256": model, "batch_size": job.batch_size,
                "tokenizer": {"path": job.tokenizer, "sha256": tokenizer},
            }));
        }
        let facts = json!({
            "mxeval": env!("CARGO_PKG_VERSION"),
            "date": now(),
            "command": options.command,
            "device": device.to_string(),
            "cpu_variant": cpu,
            "threads": options.threads.map_or_else(
                || json!(format!("default ({} available)", available_threads())), |t| json!(t)),
            "onnxruntime": {"version": runtime.version, "library": runtime.library},
            "models": models,
            "data": {"path": data, "sha256": data_sha},
            "options": {
                "max_samples": options.max_samples, "seq_len": options.seq_len,
                "tier": options.rewrite.tier.name(), "block_size": options.rewrite.block_size,
                "rounding": options.rewrite.rounding.name(),
                "scale_rule": options.rewrite.scale_rule.name(),
                "include": options.rewrite.include, "exclude": options.rewrite.exclude,
            },
            "definition": DEFINITION,
        });
        let facts = facts.as_object().cloned().unwrap_or_default();
        let tokenised = RefCell::new(None);
        Ok(Self { jobs, options, device, runtime, data, observer, keys, facts, tokenised })
    }

    fn wanted(&self, jobs: &[Job]) -> Vec<(String, String, String)> {
        let of = |(job, keys): (&Job, &Vec<String>)| {
            let tasks = job.tasks.iter().zip(keys);
            tasks.map(|(t, key)| (job.model.clone(), t.name(), key.clone())).collect::<Vec<_>>()
        };
        jobs.iter().zip(&self.keys).flat_map(of).collect()
    }

    /// Tokenises the text for a job and checks that its model can be fed with it.
    fn prepare(&self, job: &Job) -> Result<Rc<Corpus>> {
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
            Tokenised { tokenizer: path.into(), size: tokenizer.len(), corpus: Rc::new(corpus) };
        *self.tokenised.borrow_mut() = Some(tokenised.clone());
        Ok(tokenised)
    }

    /// Runs the stages of one job.
    fn job(&self, index: usize, job: &Job, corpus: &Corpus, store: &mut Store) -> Result<()> {
        let batches = schedule::plan(&corpus.windows, job.batch_size);
        let total = corpus.tokens();
        for (task, key) in job.tasks.iter().zip(&self.keys[index]) {
            let stage = task.name();
            if store.get(&job.model, &stage).is_some() {
                self.observer.note(&format!("{stage}: kept from an earlier run"));
                continue;
            }
            self.observer.stage_started(&job.model, &stage, total);
            let mut record = self.blank(job, task);
            let work = store.work(&sha256_text(&stage)[..16])?;
            let measure = Measure {
                runtime: self.runtime,
                device: self.device,
                options: self.options,
                corpus,
                batches: &batches,
                work: &work,
                observer: self.observer,
            };
            let measured = catch_unwind(AssertUnwindSafe(|| measure.task(job, task, &mut record)));
            let measured = measured.unwrap_or_else(|panic| {
                Ok(Measured::Failed(format!("panicked: {}", panic_text(&*panic))))
            });
            store.clear_work()?;
            if self.observer.interrupted() {
                return Err(Error::Interrupted);
            }
            let (status, reason) = match measured {
                Ok(Measured::Done) => (Status::Ok, None),
                Ok(Measured::Skipped(reason)) => (Status::Skipped, Some(reason)),
                Ok(Measured::Failed(reason)) => (Status::Failed, Some(reason)),
                Err(error) => (Status::Failed, Some(error.to_string())),
            };
            (record.status, record.reason) = (status, reason);
            self.observer.stage_finished(&record);
            store.append(record, key)?;
            self.write_reports(store)?;
        }
        self.write_reports(store)
    }

    /// Records a job that cannot be run at all.
    fn refuse(&self, index: usize, job: &Job, error: &Error, store: &mut Store) -> Result<()> {
        for (task, key) in job.tasks.iter().zip(&self.keys[index]) {
            let mut record = self.blank(job, task);
            record.status = Status::Failed;
            record.reason = Some(error.to_string());
            self.observer.stage_finished(&record);
            store.append(record, key)?;
        }
        self.write_reports(store)
    }

    fn blank(&self, job: &Job, task: &Task) -> Record {
        let device = self.device.to_string();
        let mut record = Record::new(&job.model, &task.name(), &device, Status::Failed);
        if let Task::Sweep(stage) = task {
            let rewrite = &self.options.rewrite;
            record.tier = stage.follows_tier().then(|| rewrite.tier.name().to_owned());
            if let Some((weight, activation)) = stage.formats() {
                let mx = matches!(stage, Stage::Mx(_) | Stage::MxTierC | Stage::MxTierD);
                let activation = match rewrite.activation {
                    Activation::None if mx => "none",
                    Activation::Format(format) if mx => format.name(),
                    _ => activation,
                };
                record.weight_format = Some(weight.into());
                record.activation_format = Some(activation.into());
            }
        }
        record
    }

    fn write_reports(&self, store: &Store) -> Result<()> {
        let records = records_of(&ordered(self.jobs, store));
        store.write("report.md", report::markdown(&records, &self.facts).as_bytes())?;
        store.write("report.html", report::html(&records, &self.facts).as_bytes())
    }
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}

fn available_threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}
