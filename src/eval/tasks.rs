//! A run cut into tasks that any number of machines do: plan, do one, merge.
//!
//! A task is one stage on a share of the batches. Batches are planned over the whole corpus first, so
//! the shares change nothing about which windows run together; a task leaves the sums of its windows
//! in a score file, never averages, and merging adds them in the order of the text. The figures of a
//! merged run are those of a single one, to the last bit, where the machines compute alike.

use super::error::{Error, Result};
use super::job::Job;
use super::measure::Item;
use super::observer::Observer;
use super::record::{Record, Status};
use super::run::{Machine, Options, Outcome, Run, ordered, write_reports};
use super::schedule;
use super::score::Scored;
use super::scores::{self, Header, Scores, Writer};
use super::store::Store;
use super::summary::{Summary, conclude};
use super::texts::Texts;
use super::workers::Engine as _;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Version of the plan's format.
const VERSION: u32 = 1;

/// A run as a list of tasks, as `mxeval plan` writes it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// Version of the format, 1.
    pub mxeval_plan: u32,
    /// The version of mxeval that made it.
    pub mxeval: String,
    /// The run's arguments, which `run-task` and `merge` read again.
    pub arguments: Vec<String>,
    /// The folder in which relative paths among them are to be read.
    pub folder: PathBuf,
    /// Shares that every stage is cut into.
    pub shards: usize,
    /// The tasks.
    pub tasks: Vec<PlannedTask>,
}

/// One stage on one share of the batches.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedTask {
    /// Its name, also that of its file.
    pub id: String,
    /// The model.
    pub model: String,
    /// The stage.
    pub stage: String,
    /// Its share: the batches whose number leaves this remainder when divided by the shards.
    pub shard: usize,
    /// How many batches that is.
    pub batches: usize,
    /// Tokens that it scores.
    pub tokens: u64,
    /// Digest of the whole tokenised corpus: another text, tokenizer or definition is noticed.
    pub corpus_sha256: String,
}

impl Plan {
    /// Reads a plan.
    ///
    /// # Errors
    /// The file cannot be read or is no plan of this version.
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(Error::io(path))?;
        let bad = |reason: String| Error::Usage(format!("{}: {reason}", path.display()));
        let plan: Self = serde_json::from_slice(&bytes)
            .map_err(|e| bad(format!("not a plan of mxeval plan ({e})")))?;
        if plan.mxeval_plan != VERSION {
            let text = format!("version {} of plans; this is {VERSION}", plan.mxeval_plan);
            return Err(bad(text));
        }
        Ok(plan)
    }

    /// Cuts the stages of `jobs` into `shards` tasks each. Needs the models, the tokenizers and the
    /// text, but neither ONNX Runtime nor a device.
    ///
    /// # Errors
    /// The text or a tokenizer cannot be read, or a model cannot be fed.
    pub fn new(
        jobs: &[Job],
        options: &Options,
        shards: usize,
        arguments: Vec<String>,
        observer: &dyn Observer,
    ) -> Result<Self> {
        let texts = Texts::new(options, observer, Instant::now())?;
        let mut tasks = Vec::new();
        for job in jobs {
            let corpus = texts.prepare(job)?;
            let digest = corpus.sha256();
            let batches = schedule::plan(&corpus.windows, job.batch_size);
            for task in &job.tasks {
                for shard in 0..shards.clamp(1, batches.len()) {
                    let mine = share(batches.len(), shard, shards);
                    let scored = |&batch: &usize| {
                        let windows = batches[batch].windows.iter();
                        windows.map(|&w| corpus.windows[w].scored() as u64).sum::<u64>()
                    };
                    let stage = task.name();
                    tasks.push(PlannedTask {
                        id: id(tasks.len(), &stage, shard),
                        model: job.model.clone(),
                        stage,
                        shard,
                        batches: mine.len(),
                        tokens: mine.iter().map(scored).sum(),
                        corpus_sha256: digest.clone(),
                    });
                }
            }
        }
        Ok(Self {
            mxeval_plan: VERSION,
            mxeval: env!("CARGO_PKG_VERSION").into(),
            arguments,
            folder: std::env::current_dir().map_err(Error::io("."))?,
            shards,
            tasks,
        })
    }

    /// Writes the plan as a whole or not at all.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
        let folder = folder.unwrap_or(Path::new("."));
        std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
        let text = serde_json::to_string_pretty(self)
            .map_err(|e| Error::Output(format!("{}: {e}", path.display())))?;
        super::store::write_whole(path, format!("{text}\n").as_bytes())
    }

    fn task(&self, id: &str) -> Result<&PlannedTask> {
        self.tasks.iter().find(|task| task.id == id).ok_or_else(|| {
            let known: Vec<_> = self.tasks.iter().map(|task| task.id.as_str()).collect();
            Error::Usage(format!("no task {id:?} in the plan; it has {}", known.join(", ")))
        })
    }
}

/// The batches of a share: long and short ones alike, since batches are sorted by length.
fn share(batches: usize, shard: usize, shards: usize) -> Vec<usize> {
    (shard..batches).step_by(shards.max(1)).collect()
}

fn id(number: usize, stage: &str, shard: usize) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '_' };
    let stage: String = stage.chars().map(plain).take(40).collect();
    format!("{number:04}-{stage}-{shard}")
}

/// The score file of a task.
pub fn task_file(out: &Path, id: &str) -> PathBuf {
    out.join("tasks").join(format!("{id}.jsonl"))
}

/// Does one task and returns its record. One that was done already is left as it is; one that was
/// cut off goes on where it stopped.
///
/// # Errors
/// No such task; the text is not the plan's; another process holds the task; an interruption. A stage
/// that fails or does not apply is a record that says so.
pub fn run_task(
    plan: &Plan,
    id: &str,
    jobs: &[Job],
    options: &Options,
    observer: &dyn Observer,
) -> Result<Record> {
    let planned = plan.task(id)?;
    let machine = Machine::load(options, observer)?;
    let options = Options { resume: true, ..options.clone() };
    let texts = Texts::new(&options, observer, Instant::now())?;
    let run = Run::new(jobs, &options, &machine, &texts, observer);
    let place = place(jobs, planned)?;
    let job = &jobs[place.0];
    let folder = options.out.join("tasks");
    std::fs::create_dir_all(&folder).map_err(Error::io(&folder))?;
    let _held = hold(&folder.join(format!("{id}.lock")), id)?;
    let corpus = texts.prepare(job)?;
    if corpus.sha256() != planned.corpus_sha256 {
        return Err(Error::Usage(format!(
            "task {id}: the tokenised text is not the plan's: the data, the tokenizer or an option \
             changed; make a new plan"
        )));
    }
    let path = task_file(&options.out, id);
    let key = &run.identity().keys[place.0][place.1];
    if let Some(record) = finished(&path, key)? {
        observer.note(&format!("{id}: done already"));
        return Ok(record);
    }
    let batches = schedule::plan(&corpus.windows, job.batch_size);
    let todo = share(batches.len(), planned.shard, plan.shards);
    let names = [planned.model.as_str(), &planned.stage, key, &options.definition.short()];
    let header = Header::new(&corpus, batches.len(), names, None);
    let task = &job.tasks[place.1];
    let scores = path.clone();
    let batches = batches.into();
    let item = Item { job, task, place, corpus, batches, todo, key, scores };
    let work = folder.join(format!(".work-{id}"));
    observer.opened(&work);
    let bench = run.bench(vec![item], work.clone(), true);
    let ready = bench.prepare(0);
    let done = bench.measure(0, ready, &machine.chosen.devices);
    drop(bench);
    let _ = std::fs::remove_dir_all(&work);
    let done = done.filter(|done| done.record.status != Status::Partial);
    let done = done.ok_or(Error::Interrupted)?;
    if done.record.status != Status::Ok && !path.is_file() {
        Writer::open(&path, &header, false)?;
    }
    let facts = run.identity().facts.clone();
    let end = json!({"record": done.record, "details": done.details, "facts": facts});
    scores::end(&path, end)?;
    Ok(done.record)
}

/// Job and stage of a task.
fn place(jobs: &[Job], planned: &PlannedTask) -> Result<(usize, usize)> {
    let of = |(index, job): (usize, &Job)| {
        let stage = job.tasks.iter().position(|task| task.name() == planned.stage)?;
        (job.model == planned.model).then_some((index, stage))
    };
    jobs.iter().enumerate().find_map(of).ok_or_else(|| {
        let text = format!("{}: the plan's arguments have no such stage", planned.id);
        Error::Usage(text)
    })
}

/// Holds a task against a second process that would do the same.
fn hold(path: &Path, id: &str) -> Result<File> {
    let file = File::options().create(true).truncate(false).write(true).open(path);
    let file = file.map_err(Error::io(path))?;
    file.try_lock().map_err(|e| match e {
        std::fs::TryLockError::WouldBlock => {
            Error::Output(format!("task {id}: another process is doing it"))
        }
        std::fs::TryLockError::Error(source) => Error::Io { path: path.into(), source },
    })?;
    Ok(file)
}

/// The record of a task that came to its end under this key. A failure is tried again.
fn finished(path: &Path, key: &str) -> Result<Option<Record>> {
    if !path.is_file() {
        return Ok(None);
    }
    let Ok((header, scores)) = scores::read(path) else { return Ok(None) };
    let end = scores.end.filter(|_| header.key == key);
    let Some(part) = end.as_ref().and_then(Part::of) else { return Ok(None) };
    Ok((part.record.status != Status::Failed).then_some(part.record))
}

/// What a task's trailer says.
struct Part {
    record: Record,
    details: Map<String, Value>,
    facts: Map<String, Value>,
}

impl Part {
    fn of(end: &Value) -> Option<Self> {
        let map = |name: &str| end.get(name)?.as_object().cloned();
        // The trailer that measuring itself writes has no facts: the task was cut off after it.
        let (details, facts) = (map("details")?, map("facts")?);
        Some(Self {
            record: serde_json::from_value(end.get("record")?.clone()).ok()?,
            details,
            facts,
        })
    }
}

/// Puts the tasks of a plan together: results.jsonl, run.json and reports as one run writes them.
///
/// # Errors
/// Tasks that are not done yet, which are listed; parts that do not belong together.
pub fn merge(
    plan: &Plan,
    jobs: &[Job],
    options: &Options,
    observer: &dyn Observer,
) -> Result<Outcome> {
    let mut missing = Vec::new();
    let mut parts = Vec::new();
    for planned in &plan.tasks {
        let path = task_file(&options.out, &planned.id);
        let read = if path.is_file() { Some(scores::read(&path)?) } else { None };
        let part = read.and_then(|(header, mut scores)| {
            let part = Part::of(&scores.end.take()?)?;
            Some((header, scores, part))
        });
        match part {
            Some(part) => parts.push((planned, part)),
            None => missing.push(planned.id.as_str()),
        }
    }
    if !missing.is_empty() {
        return Err(Error::Output(format!(
            "{} of {} tasks are not done: {}",
            missing.len(),
            plan.tasks.len(),
            missing.join(", ")
        )));
    }
    let mut store = Store::open(&options.out, false)?;
    store.keep(&[])?;
    let facts = parts.first().map(|(_, (_, _, part))| part.facts.clone()).unwrap_or_default();
    let facts = merged_facts(facts, plan);
    store.set_run(facts.clone())?;
    for job in jobs {
        for task in &job.tasks {
            let stage = task.name();
            let own: Vec<_> = parts
                .iter()
                .filter(|(planned, _)| planned.model == job.model && planned.stage == stage)
                .map(|(planned, part)| (planned.id.as_str(), part))
                .collect();
            let merged = stage_of(&own, options)?;
            let Merged { record, key, mut details, scores, header } = merged;
            if record.status == Status::Ok {
                let name = scores::file_name(&job.model, &stage);
                let path = store.folder().join(&name);
                write(&path, &header, scores)?;
                scores::end(&path, json!({"record": record, "details": details}))?;
                details.insert("scores".into(), json!(name));
            }
            observer.stage_finished(usize::MAX, &record);
            store.append(record, &key, details)?;
        }
    }
    write_reports(jobs, &facts, options, &store)?;
    Ok(Outcome { entries: ordered(jobs, &store), interrupted: false })
}

fn merged_facts(mut facts: Map<String, Value>, plan: &Plan) -> Map<String, Value> {
    facts.insert("merged_tasks".into(), json!(plan.tasks.len()));
    facts.insert("shards".into(), json!(plan.shards));
    facts
}

struct Merged {
    record: Record,
    key: String,
    details: Map<String, Value>,
    scores: Scores,
    header: Header,
}

type Shard = (Header, Scores, Part);

/// One stage out of its shards.
fn stage_of(shards: &[(&str, &Shard)], options: &Options) -> Result<Merged> {
    let Some((first_id, (first, _, part))) = shards.first() else {
        return Err(Error::Usage("the plan lacks a stage of its own arguments".into()));
    };
    let (mut header, mut record) = (first.clone(), part.record.clone());
    let mut scores = Scores::default();
    let (mut scored, mut failed) = (Scored::default(), None);
    for (id, (other, found, part)) in shards {
        check_alike(first_id, first, id, other)?;
        if other.baseline.is_none() {
            // A shard that ran without it leaves nothing to compare the whole with.
            header.baseline = None;
        }
        if part.record.status == Status::Failed
            || failed.is_none() && part.record.status != Status::Ok
        {
            failed = Some(&part.record);
        }
        for (&window, place) in &found.windows {
            if scores.windows.insert(window, place.clone()).is_some() {
                return Err(Error::Output(format!("task {id}: window {window} is there twice")));
            }
        }
        scores.done.extend(&found.done);
        scores.seconds += found.seconds;
        add(&mut scored, part);
        largest(&mut record, &part.record);
    }
    let key = header.key.clone();
    let mut details = part.details.clone();
    details.remove("documents");
    details.insert("tasks".into(), json!(shards.iter().map(|(id, _)| *id).collect::<Vec<_>>()));
    if let Some(other) = failed {
        return Ok(Merged { record: other.clone(), key, details, scores, header });
    }
    if scores.done.len() != header.batches {
        let text = format!(
            "stage {}: {} of {} batches are there",
            header.stage,
            scores.done.len(),
            header.batches
        );
        return Err(Error::Output(text));
    }
    let (documents, divergence) = scores.documents(header.subset_of.len());
    (record.status, record.reason) = conclude(&documents, &scored, &mut record);
    record.speed_ratio = scored.sides.map(|[own, reference]| reference / own);
    record.speed_ratio = record.speed_ratio.filter(|ratio| ratio.is_finite());
    let summary = Summary { header: &header, documents, divergence, others: None };
    record.statistics = summary.statistics(options.bootstrap, options.definition.unit());
    details.insert("sides".into(), json!(scored.sides));
    Ok(Merged { record, key, details, scores, header })
}

/// Refuses shards that were not measured alike.
fn check_alike(first_id: &str, first: &Header, id: &str, other: &Header) -> Result<()> {
    let mut alike = other.clone();
    alike.baseline.clone_from(&first.baseline);
    if alike == *first {
        return Ok(());
    }
    let reason = if alike.key == first.key {
        "their corpora differ"
    } else {
        "the model, an option, ONNX Runtime, or the kind of CPU or GPU differs"
    };
    Err(Error::Output(format!("tasks {first_id} and {id} do not belong together: {reason}")))
}

/// Adds what a shard took.
fn add(scored: &mut Scored, part: &Part) {
    let number = |name: &str| part.details.get(name).and_then(Value::as_f64);
    scored.seconds += part.record.seconds.unwrap_or(0.0);
    scored.load_seconds = scored.load_seconds.max(part.record.load_seconds.unwrap_or(0.0));
    scored.outside_run_seconds += number("outside_run_seconds").unwrap_or(0.0);
    let sides = part
        .details
        .get("sides")
        .and_then(|sides| Some([sides.get(0)?.as_f64()?, sides.get(1)?.as_f64()?]));
    if let Some([own, reference]) = sides {
        let sum = scored.sides.get_or_insert_default();
        *sum = [sum[0] + own, sum[1] + reference];
    }
    let halved = part.details.get("batch_halved_to").and_then(Value::as_u64);
    let halved = halved.and_then(|rows| usize::try_from(rows).ok());
    scored.halved_to = scored.halved_to.into_iter().chain(halved).min();
}

/// Keeps the most memory and the longest loading of two shards.
fn largest(record: &mut Record, other: &Record) {
    record.peak_memory_bytes = record.peak_memory_bytes.max(other.peak_memory_bytes);
    record.peak_resident_bytes = record.peak_resident_bytes.max(other.peak_resident_bytes);
    record.peak_device_bytes = record.peak_device_bytes.max(other.peak_device_bytes);
    let seconds = [record.load_seconds, other.load_seconds].into_iter().flatten();
    record.load_seconds = seconds.reduce(f64::max);
}

/// Writes merged scores as one batch after the other.
fn write(path: &Path, header: &Header, scores: Scores) -> Result<()> {
    let (mut writer, mut written) = Writer::open(path, header, false)?;
    let mut rest = scores.windows;
    // One line a window would do; one a batch keeps the file like any other.
    let per_batch = header.windows.div_ceil(header.batches.max(1)).max(1);
    for batch in 0..header.batches {
        let mut places = Vec::with_capacity(per_batch);
        let mut found = Vec::with_capacity(per_batch);
        let last = batch + 1 == header.batches;
        while last || places.len() < per_batch {
            let Some((window, (document, scored))) = rest.pop_first() else { break };
            places.push((window, document));
            found.push(scored);
        }
        let seconds = if batch == 0 { scores.seconds } else { 0.0 };
        writer.batch(batch, &places, &found, seconds, &mut written)?;
    }
    Ok(())
}
