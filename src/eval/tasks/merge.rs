//! The tasks of a plan put together to what one run would have left.

use super::super::error::{Error, Result};
use super::super::job::{Job, Task};
use super::super::metrics::DocumentScore;
use super::super::observer::Observer;
use super::super::process::now;
use super::super::record::{Record, Status};
use super::super::run::{Options, Outcome, ordered, write_reports};
use super::super::score::Scored;
use super::super::scores::{self, Header, Scores, Writer};
use super::super::stage::Stage;
use super::super::store::Store;
use super::super::summary::{Summary, conclude};
use super::{Part, Plan, PlannedTask, task_file};
use serde_json::{Map, Value, json};
use std::collections::HashMap;
use std::path::Path;

/// Puts the tasks of a plan together: results.jsonl, run.json, scores and reports as one run writes
/// them. Nothing is written before everything is known to be there and to fit.
///
/// # Errors
/// Tasks that are not done yet, which are listed; parts that do not belong together.
pub fn merge(
    plan: &Plan,
    jobs: &[Job],
    options: &Options,
    observer: &dyn Observer,
) -> Result<Outcome> {
    let merging = Merging { plan, jobs, options };
    let facts = merging.check()?;
    let mut store = Store::open(&options.out, false)?;
    store.keep(&[])?;
    store.set_run(facts.clone())?;
    let mut references = HashMap::new();
    for (index, job) in jobs.iter().enumerate() {
        for task in &job.tasks {
            let stage = task.name();
            let shards = merging.shards(job, &stage).map_err(not_done)?;
            let mut whole = Whole::of(shards)?;
            let reference = match task {
                Task::Sweep(Stage::Baseline) => None,
                Task::Sweep(_) => references.get(&index),
                Task::Graph(_) => references.get(&0),
            };
            let documents = whole.conclude(reference, options);
            let first = matches!(task, Task::Sweep(Stage::Baseline))
                || matches!(task, Task::Graph(_)) && index == 0;
            if let Some(documents) = documents.filter(|_| first) {
                references.insert(index, Reference::new(&stage, &whole.header, documents));
            }
            let Whole { record, header, mut details, scores, .. } = whole;
            if record.status == Status::Ok {
                let name = scores::file_name(&job.model, &stage);
                write(&store.folder().join(&name), &header, scores, &record, &details)?;
                details.insert("scores".into(), json!(name));
            }
            observer.stage_finished(usize::MAX, &record);
            store.append(record, &header.key, details)?;
        }
    }
    write_reports(jobs, &facts, options, &store)?;
    Ok(Outcome { entries: ordered(jobs, &store), interrupted: false })
}

struct Merging<'a> {
    plan: &'a Plan,
    jobs: &'a [Job],
    options: &'a Options,
}

/// A task that came to its end.
struct Shard {
    id: String,
    header: Header,
    scores: Scores,
    part: Part,
}

impl Merging<'_> {
    /// Sees that every task is there and that the shards of every stage fit. Returns what run.json says
    /// about the run. Scores are not kept: those of one stage at a time are enough to hold.
    fn check(&self) -> Result<Map<String, Value>> {
        // A model of a list that this machine does not see must not vanish from the results.
        let known = |planned: &PlannedTask| {
            let mut jobs = self.jobs.iter().filter(|job| job.model == planned.model);
            jobs.any(|job| job.tasks.iter().any(|task| task.name() == planned.stage))
        };
        if let Some(lost) = self.plan.tasks.iter().find(|planned| !known(planned)) {
            return Err(Error::Usage(format!(
                "task {}: {} with stage {} is not among what the plan's arguments name here",
                lost.id, lost.model, lost.stage
            )));
        }
        let (mut missing, mut misfit) = (Vec::new(), None);
        let mut facts: Option<Map<String, Value>> = None;
        let mut models: Vec<Value> = Vec::new();
        for job in self.jobs {
            for task in &job.tasks {
                match self.shards(job, &task.name()) {
                    Err(more) => missing.extend(more),
                    Ok(shards) => {
                        for Shard { part, .. } in &shards {
                            facts.get_or_insert_with(|| part.facts.clone());
                            let own = part.facts.get("models").and_then(Value::as_array);
                            let new = own.into_iter().flatten().filter(|m| !models.contains(m));
                            let new: Vec<_> = new.cloned().collect();
                            models.extend(new);
                        }
                        misfit = misfit.or(Whole::of(shards).err());
                    }
                }
            }
        }
        if !missing.is_empty() {
            return Err(Error::Output(format!(
                "{} of {} tasks are not done: {}",
                missing.len(),
                self.plan.tasks.len(),
                missing.join(", ")
            )));
        }
        if let Some(error) = misfit {
            return Err(error);
        }
        let order = |model: &Value| self.jobs.iter().position(|job| model["model"] == job.model);
        models.sort_by_key(order);
        let mut facts = facts.unwrap_or_default();
        for (name, value) in [
            ("date", json!(now())),
            ("command", json!(self.options.command)),
            ("models", json!(models)),
            ("merged_tasks", json!(self.plan.tasks.len())),
            ("shards", json!(self.plan.shards)),
        ] {
            facts.insert(name.into(), value);
        }
        Ok(facts)
    }

    /// The tasks of a stage, or the ids of those that are not done.
    fn shards(&self, job: &Job, stage: &str) -> std::result::Result<Vec<Shard>, Vec<String>> {
        let of = |planned: &&PlannedTask| planned.model == job.model && planned.stage == stage;
        let (mut shards, mut missing) = (Vec::new(), Vec::new());
        for planned in self.plan.tasks.iter().filter(of) {
            match self.shard(&planned.id) {
                Ok(Some(shard)) => shards.push(shard),
                Ok(None) => missing.push(planned.id.clone()),
                Err(error) => missing.push(format!("{} ({error}; do it again)", planned.id)),
            }
        }
        if missing.is_empty() { Ok(shards) } else { Err(missing) }
    }

    fn shard(&self, id: &str) -> Result<Option<Shard>> {
        let path = task_file(&self.options.out, id);
        if !path.is_file() {
            return Ok(None);
        }
        let (header, mut scores) = scores::read(&path)?;
        let part = scores.end.take().and_then(|end| Part::of(&end, self.plan));
        Ok(part.map(|part| Shard { id: id.into(), header, scores, part }))
    }
}

fn not_done(missing: Vec<String>) -> Error {
    Error::Output(format!("tasks are not done any more: {}", missing.join(", ")))
}

/// The first model's documents, for stages that ran without it beside them.
struct Reference {
    stage: String,
    definition: String,
    subset_of: Vec<Option<usize>>,
    documents: Vec<DocumentScore>,
}

impl Reference {
    fn new(stage: &str, header: &Header, documents: Vec<DocumentScore>) -> Self {
        let (definition, subset_of) = (header.definition.clone(), header.subset_of.clone());
        Self { stage: stage.into(), definition, subset_of, documents }
    }

    fn fits(&self, header: &Header) -> bool {
        self.definition == header.definition && self.subset_of == header.subset_of
    }
}

/// One stage out of its shards.
struct Whole {
    header: Header,
    record: Record,
    details: Map<String, Value>,
    scores: Scores,
    /// What the shards took together.
    scored: Scored,
    /// The shard's record that decides where not all batches were scored.
    ended: Option<Record>,
    remarks: Vec<String>,
}

impl Whole {
    /// # Errors
    /// The shards were not measured alike, or are not all of the stage.
    fn of(shards: Vec<Shard>) -> Result<Self> {
        let Some(first) = shards.first() else {
            return Err(Error::Usage("the plan lacks a stage of its own arguments".into()));
        };
        let (first_id, alike) = (first.id.clone(), first.header.clone());
        let mut whole = Self {
            header: alike.clone(),
            record: first.part.record.clone(),
            details: first.part.details.clone(),
            scores: Scores::default(),
            scored: Scored::default(),
            ended: None,
            remarks: Vec::new(),
        };
        let ids: Vec<_> = shards.iter().map(|shard| shard.id.clone()).collect();
        let mut devices: Vec<String> = Vec::new();
        for shard in shards {
            check_alike(&first_id, &alike, &shard.id, &shard.header)?;
            if !devices.contains(&shard.part.record.device) {
                devices.push(shard.part.record.device.clone());
            }
            whole.take(shard)?;
        }
        whole.record.device = devices.join(",");
        whole.details.insert("tasks".into(), json!(ids));
        whole.forget_single();
        if whole.ended.is_none() && !whole.complete() {
            let (stage, found) = (&whole.header.stage, whole.scores.done.len());
            let text = format!("stage {stage}: {found} of {} batches are there", alike.batches);
            return Err(Error::Output(text));
        }
        Ok(whole)
    }

    fn complete(&self) -> bool {
        self.scores.done.len() == self.header.batches
    }

    fn take(&mut self, shard: Shard) -> Result<()> {
        let Shard { id, header, scores, part } = shard;
        if header.baseline.is_none() {
            // A shard that ran without it leaves nothing to compare the whole with.
            self.header.baseline = None;
        }
        let status = part.record.status;
        let decides = status == Status::Failed || self.ended.is_none();
        if status != Status::Ok && decides {
            self.ended = Some(part.record.clone());
        }
        for (window, place) in scores.windows {
            if self.scores.windows.insert(window, place).is_some() {
                return Err(Error::Output(format!("task {id}: window {window} is there twice")));
            }
        }
        self.scores.done.extend(&scores.done);
        self.scores.batches.extend(scores.batches);
        self.scores.seconds += scores.seconds;
        add(&mut self.scored, &part);
        largest(&mut self.record, &part.record);
        let remarks = part.details.get("remarks").and_then(Value::as_array);
        for remark in remarks.into_iter().flatten().filter_map(Value::as_str) {
            if !self.remarks.iter().any(|known| known == remark) {
                self.remarks.push(remark.into());
            }
        }
        Ok(())
    }

    /// Takes out of record and details what is the first shard's alone.
    fn forget_single(&mut self) {
        for name in ["documents", "scores", "outside_run_share", "remarks"] {
            self.details.remove(name);
        }
        let Record { model, stage, device, status, .. } = &self.record;
        let blank = Record::new(model, stage, device, *status);
        let own = std::mem::replace(&mut self.record, blank);
        self.record = Record {
            docs: None,
            tokens: None,
            bytes: None,
            xent: None,
            ppl: None,
            entropy: None,
            bits_per_byte: None,
            seconds: None,
            tokens_per_second: None,
            speed_ratio: None,
            statistics: None,
            reason: None,
            ..own
        };
    }

    /// Fills in the record. Returns the documents' sums where every batch was scored.
    fn conclude(
        &mut self,
        reference: Option<&Reference>,
        options: &Options,
    ) -> Option<Vec<DocumentScore>> {
        if !self.complete() {
            if let Some(ended) = self.ended.take() {
                let device = std::mem::take(&mut self.record.device);
                self.record = Record { device, ..ended };
            }
            return None;
        }
        if self.header.baseline.is_none() {
            for (_, window) in self.scores.windows.values_mut() {
                window.score.against = None;
                window.kl.clear();
            }
        }
        let Self { header, record, details, scores, scored, remarks, .. } = self;
        let (documents, divergence) = scores.documents(header.subset_of.len());
        let (status, further) = conclude(&documents, scored, record);
        let remarks: Vec<String> = further.into_iter().chain(remarks.drain(..)).collect();
        record.status = status;
        record.reason = (!remarks.is_empty()).then(|| remarks.join("; "));
        let ratio = scored.sides.map(|[own, reference]| reference / own);
        record.speed_ratio = ratio.filter(|ratio| ratio.is_finite());
        for (name, value) in [
            ("load_seconds", json!(scored.load_seconds)),
            ("outside_run_seconds", json!(scored.outside_run_seconds)),
            ("sides", json!(scored.sides)),
        ] {
            details.insert(name.into(), value);
        }
        if let Some(rows) = scored.halved_to {
            details.insert("batch_halved_to".into(), json!(rows));
        }
        if options.documents {
            let nll: Vec<f64> = documents.iter().map(|document| document.nll).collect();
            let tokens: Vec<u64> = documents.iter().map(|document| document.tokens).collect();
            details.insert("documents".into(), json!({"nll": nll, "tokens": tokens}));
        }
        if status != Status::Ok {
            return Some(documents);
        }
        let apart = reference.filter(|other| header.baseline.is_none() && other.fits(header));
        let others = apart.map(|other| (other.stage.clone(), other.documents.clone()));
        let summary = Summary { header, documents, divergence, others };
        record.statistics = summary.statistics(options.bootstrap, options.definition.unit());
        Some(summary.documents)
    }
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
        "ONNX Runtime, or the kind of CPU or GPU, differs"
    };
    Err(Error::Output(format!(
        "tasks {first_id} and {id} do not belong together: {reason}; delete the file of the one that \
         is wrong and do it again on a machine like the others"
    )))
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

/// Writes merged scores, batch by batch, as a whole or not at all.
fn write(
    path: &Path,
    header: &Header,
    scores: Scores,
    record: &Record,
    details: &Map<String, Value>,
) -> Result<()> {
    let unfinished = path.with_extension("merging");
    let (mut writer, mut written) = Writer::open(&unfinished, header, false)?;
    let mut rest = scores.windows;
    for (batch, (windows, seconds)) in scores.batches {
        let (mut places, mut found) = (Vec::new(), Vec::new());
        for window in windows {
            if let Some((document, scored)) = rest.remove(&window) {
                places.push((window, document));
                found.push(scored);
            }
        }
        writer.batch(batch, &places, &found, seconds, &mut written)?;
    }
    drop(writer);
    scores::end(&unfinished, json!({"record": record, "details": details}))?;
    std::fs::rename(&unfinished, path).map_err(Error::io(path))
}
