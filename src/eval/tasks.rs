//! A run cut into tasks that any number of machines do: plan, do one, merge.
//!
//! A task is one stage on a share of the batches. Batches are planned over the whole corpus first, so
//! the shares change nothing about which windows run together; a task leaves the sums of its windows
//! in a score file, never averages, and merging adds them in the order of the text. The figures of a
//! merged run are those of a single one, to the last bit, where the machines compute alike.

mod merge;
mod plan;

pub use merge::merge;
pub use plan::{Plan, PlannedModel, PlannedTask};

use super::error::{Error, Result};
use super::job::{Job, Task};
use super::measure::Item;
use super::observer::Observer;
use super::record::{Record, Status};
use super::run::{Machine, Options, Run};
use super::schedule;
use super::scores::{self, Header, Writer};
use super::texts::Texts;
use super::windows::Corpus;
use super::workers::Engine as _;
use serde_json::{Map, Value, json};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// The score file of a task.
pub fn task_file(out: &Path, id: &str) -> PathBuf {
    out.join("tasks").join(format!("{id}.jsonl"))
}

/// Does one task and returns its record. One that was done already is left as it is; one that was
/// cut off goes on where it stopped, and one that failed is tried again.
///
/// # Errors
/// No such task; model, tokenizer or text are not the plan's; another process holds the task; an
/// interruption. A stage that fails or does not apply is a record that says so.
pub fn run_task(
    plan: &Plan,
    id: &str,
    jobs: &[Job],
    options: &Options,
    observer: &dyn Observer,
) -> Result<Record> {
    let planned = plan.task(id)?;
    let folder = options.out.join("tasks");
    std::fs::create_dir_all(&folder).map_err(Error::io(&folder))?;
    let _held = hold(&folder.join(format!("{id}.lock")), id)?;
    let path = task_file(&options.out, id);
    if let Some(record) = finished(&path, plan, observer) {
        observer.note(&format!("{id}: done already"));
        return Ok(record);
    }
    let machine = Machine::load(options, observer)?;
    let options = Options { resume: true, ..options.clone() };
    let texts = Texts::new(&options, observer, Instant::now())?;
    let (jobs, place) = own_jobs(jobs, planned)?;
    let run = Run::new(&jobs, &options, &machine, &texts, observer);
    let job = &jobs[place.0];
    let corpus = texts.prepare(job)?;
    let facts = &run.identity().facts;
    check(plan, planned, facts, &corpus)?;
    let key = &run.identity().scores[place.0][place.1];
    let batches = schedule::plan(&corpus.windows, job.batch_size);
    let todo = plan::share(batches.len(), planned.shard, plan.shards);
    let names = [planned.model.as_str(), &planned.stage, key, &options.definition.short()];
    let header = Header::new(&corpus, batches.len(), names, None);
    let task = &job.tasks[place.1];
    let (scores, batches) = (path.clone(), batches.into());
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
    // A stage that came to no scores leaves a file, too, and none of another plan.
    let own = |path: &Path| scores::read(path).is_ok_and(|(found, _)| found.key == *key);
    if done.record.status != Status::Ok && !own(&path) {
        Writer::open(&path, &header, false)?;
    }
    let end = json!({
        "plan": plan.id, "record": done.record, "details": done.details, "facts": facts,
    });
    scores::end(&path, end)?;
    Ok(done.record)
}

/// The task's job, and before it the one that it is compared with; job and stage of the task in them.
fn own_jobs(jobs: &[Job], planned: &PlannedTask) -> Result<(Vec<Job>, (usize, usize))> {
    let of = |(index, job): (usize, &Job)| {
        let stage = job.tasks.iter().position(|task| task.name() == planned.stage)?;
        (job.model == planned.model).then_some((index, stage))
    };
    let (index, stage) = jobs.iter().enumerate().find_map(of).ok_or_else(|| {
        let text = format!("{}: the plan's arguments have no such stage", planned.id);
        Error::Usage(text)
    })?;
    let beside = matches!(jobs[index].tasks[stage], Task::Graph(_)) && index > 0;
    let own: Vec<Job> =
        beside.then(|| &jobs[0]).into_iter().chain([&jobs[index]]).cloned().collect();
    let last = own.len() - 1;
    Ok((own, (last, stage)))
}

/// Refuses models, tokenizers and text that are not the plan's.
fn check(
    plan: &Plan,
    planned: &PlannedTask,
    facts: &Map<String, Value>,
    corpus: &Corpus,
) -> Result<()> {
    let refuse = |reason: String| {
        let id = &planned.id;
        Err(Error::Usage(format!("task {id}: {reason} since the plan was made; make a new plan")))
    };
    for found in facts.get("models").and_then(Value::as_array).into_iter().flatten() {
        let model = found["model"].as_str().unwrap_or_default();
        let Some(known) = plan.models.iter().find(|known| known.model == model) else {
            return refuse(format!("the models have changed ({model})"));
        };
        if found["sha256"].as_str() != Some(&known.sha256) {
            return refuse(format!("model {model} has changed, or can no longer be read,"));
        }
        if found["tokenizer"]["sha256"].as_str() != Some(&known.tokenizer_sha256) {
            return refuse(format!("the tokenizer of {model} has changed"));
        }
        if model == planned.model && corpus.sha256() != known.corpus_sha256 {
            return refuse("the evaluation text has changed".into());
        }
    }
    Ok(())
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

/// The record of a task of this plan that came to its end. A failure is tried again.
fn finished(path: &Path, plan: &Plan, observer: &dyn Observer) -> Option<Record> {
    if !path.is_file() {
        return None;
    }
    match scores::read(path) {
        Ok((_, scores)) => {
            let part = Part::of(&scores.end?, plan)?;
            (part.record.status != Status::Failed).then_some(part.record)
        }
        Err(error) => {
            observer.warn(&format!("{error}; the task begins anew"));
            None
        }
    }
}

/// What a task's trailer says.
struct Part {
    record: Record,
    details: Map<String, Value>,
    facts: Map<String, Value>,
}

impl Part {
    /// `None` where the task is not of this plan or has not come to its end: measuring itself writes a
    /// trailer that names no plan, after which the task may have been cut off.
    fn of(end: &Value, plan: &Plan) -> Option<Self> {
        let map = |name: &str| end.get(name)?.as_object().cloned();
        if end.get("plan")?.as_str()? != plan.id {
            return None;
        }
        Some(Self {
            record: serde_json::from_value(end.get("record")?.clone()).ok()?,
            details: map("details")?,
            facts: map("facts")?,
        })
    }
}
