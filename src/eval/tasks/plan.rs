//! A run as a list of tasks, in a file.

use super::super::error::{Error, Result};
use super::super::job::Job;
use super::super::observer::Observer;
use super::super::process::{sha256_files, sha256_text};
use super::super::run::Options;
use super::super::schedule;
use super::super::store::write_whole;
use super::super::texts::Texts;
use super::super::windows::Tokenizer;
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Version of the plan's format.
const VERSION: u32 = 1;

/// A run as a list of tasks, as `mxeval plan` writes it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// Version of the format, 1.
    pub mxeval_plan: u32,
    /// The version of mxeval that made it, and that does its tasks.
    pub mxeval: String,
    /// Digest of arguments, models and tasks. Every task file carries that of its plan.
    pub id: String,
    /// The run's arguments, which `run-task` and `merge` read again.
    pub arguments: Vec<String>,
    /// The folder in which relative paths among them are to be read.
    pub folder: PathBuf,
    /// The output folder; task files lie in `tasks` below it.
    pub out: PathBuf,
    /// Shares that every stage is cut into.
    pub shards: usize,
    /// What the tasks read.
    pub models: Vec<PlannedModel>,
    /// The tasks.
    pub tasks: Vec<PlannedTask>,
}

/// Digests by which a machine that has something else notices.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedModel {
    /// The model, as in records.
    pub model: String,
    /// Of the graph's file and its external data.
    pub sha256: String,
    /// Of the tokenizer's files.
    pub tokenizer_sha256: String,
    /// Of the whole tokenised text.
    pub corpus_sha256: String,
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
}

impl Plan {
    /// Reads a plan.
    ///
    /// # Errors
    /// The file cannot be read, is no plan of this version, or was changed.
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(Error::io(path))?;
        let bad = |reason: String| Error::Usage(format!("{}: {reason}", path.display()));
        let plan: Self = serde_json::from_slice(&bytes)
            .map_err(|e| bad(format!("not a plan of mxeval plan ({e})")))?;
        if plan.mxeval_plan != VERSION {
            let text = format!("version {} of plans; this is {VERSION}", plan.mxeval_plan);
            return Err(bad(text));
        }
        let own = env!("CARGO_PKG_VERSION");
        if plan.mxeval != own {
            let text = format!("a plan of mxeval {}; this is {own}: make a new plan", plan.mxeval);
            return Err(bad(text));
        }
        if plan.id != plan.digest()? {
            let text = "it was changed after mxeval plan had written it; make a new plan";
            return Err(bad(text.into()));
        }
        let mut ids = HashSet::new();
        let fits = |task: &PlannedTask| task.id == plain(&task.id) && task.shard < plan.shards;
        if !plan.tasks.iter().all(|task| fits(task) && ids.insert(&task.id)) {
            return Err(bad("ids or shards of its tasks make no sense; make a new plan".into()));
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
        let (mut models, mut tasks) = (Vec::new(), Vec::new());
        for job in jobs {
            let corpus = texts.prepare(job)?;
            let tokenizer = Tokenizer::files(&job.tokenizer, &options.definition);
            observer.note(&format!("reading {} for its digest", job.model));
            models.push(PlannedModel {
                model: job.model.clone(),
                sha256: job.sha256()?,
                tokenizer_sha256: sha256_files(tokenizer.iter().map(PathBuf::as_path))?,
                corpus_sha256: corpus.sha256(),
            });
            let batches = schedule::plan(&corpus.windows, job.batch_size);
            let scored = |&batch: &usize| {
                let windows = batches[batch].windows.iter();
                windows.map(|&w| corpus.windows[w].scored() as u64).sum::<u64>()
            };
            for task in &job.tasks {
                let stage = task.name();
                // No more shares than batches.
                for shard in 0..shards.min(batches.len()) {
                    let mine = share(batches.len(), shard, shards);
                    tasks.push(PlannedTask {
                        id: id(tasks.len(), &stage, shard, shards),
                        model: job.model.clone(),
                        stage: stage.clone(),
                        shard,
                        batches: mine.len(),
                        tokens: mine.iter().map(scored).sum(),
                    });
                }
            }
        }
        let mut plan = Self {
            mxeval_plan: VERSION,
            mxeval: env!("CARGO_PKG_VERSION").into(),
            id: String::new(),
            arguments,
            folder: std::env::current_dir().map_err(Error::io("."))?,
            out: options.out.clone(),
            shards,
            models,
            tasks,
        };
        plan.id = plan.digest()?;
        Ok(plan)
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
        write_whole(path, format!("{text}\n").as_bytes())
    }

    /// The id of a task by its place in the list, from 0: what a scheduler's array index gives.
    ///
    /// # Errors
    /// There are fewer tasks.
    pub fn at(&self, index: usize) -> Result<&str> {
        self.tasks.get(index).map(|task| task.id.as_str()).ok_or_else(|| {
            let (count, last) = (self.tasks.len(), self.tasks.len().saturating_sub(1));
            Error::Usage(format!("index {index}: the plan has {count} tasks, 0 to {last}"))
        })
    }

    pub(super) fn task(&self, id: &str) -> Result<&PlannedTask> {
        self.tasks.iter().find(|task| task.id == id).ok_or_else(|| {
            let known: Vec<_> = self.tasks.iter().map(|task| task.id.as_str()).collect();
            let (some, rest) = known.split_at(known.len().min(12));
            let more = if rest.is_empty() { "" } else { ", ..." };
            Error::Usage(format!("no task {id:?} in the plan; it has {}{more}", some.join(", ")))
        })
    }

    fn digest(&self) -> Result<String> {
        let Self { mxeval, arguments, shards, models, tasks, .. } = self;
        let text = serde_json::to_string(&(mxeval, arguments, shards, models, tasks))
            .map_err(|e| Error::Output(format!("plan: {e}")))?;
        Ok(sha256_text(&text)[..16].to_owned())
    }
}

/// The batches of a share: long and short ones alike, since batches are sorted by length.
pub(super) fn share(batches: usize, shard: usize, shards: usize) -> Vec<usize> {
    (shard..batches).step_by(shards.max(1)).collect()
}

/// Number of shards included: a plan of others does not take one share's file for another's.
fn id(number: usize, stage: &str, shard: usize, shards: usize) -> String {
    let stage: String = plain(stage).chars().take(40).collect();
    format!("{number:04}-{stage}-{}of{shards}", shard + 1)
}

/// Without what a file name may not have.
fn plain(text: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '_' };
    text.chars().map(plain).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan() -> Plan {
        let task = |shard| PlannedTask {
            id: id(shard, "x/mx", shard, 2),
            model: "m".into(),
            stage: "x/mx".into(),
            shard,
            batches: 1,
            tokens: 3,
        };
        let mut plan = Plan {
            mxeval_plan: VERSION,
            mxeval: env!("CARGO_PKG_VERSION").into(),
            id: String::new(),
            arguments: vec!["--sweep".into(), "m".into()],
            folder: "/".into(),
            out: "out".into(),
            shards: 2,
            models: Vec::new(),
            tasks: vec![task(0), task(1)],
        };
        plan.id = plan.digest().unwrap();
        plan
    }

    #[test]
    fn shares_hold_every_batch_once() {
        for (batches, shards) in [(7, 3), (2, 5), (0, 2), (4, 1)] {
            let mut all: Vec<_> =
                (0..shards).flat_map(|shard| share(batches, shard, shards)).collect();
            all.sort_unstable();
            assert_eq!(all, Vec::from_iter(0..batches));
        }
    }

    #[test]
    fn a_plan_that_is_not_what_was_written_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new/plan.json");
        let good = plan();
        good.write(&path).unwrap();
        assert_eq!(Plan::read(&path).unwrap(), good);
        assert_eq!(good.at(1).unwrap(), "0001-x_mx-2of2");
        assert!(good.at(2).unwrap_err().to_string().contains("0 to 1"));
        assert!(good.task("x").unwrap_err().to_string().contains("0000-x_mx-1of2"));
        let refused = |edit: &dyn Fn(&mut Plan)| {
            let mut plan = plan();
            edit(&mut plan);
            plan.write(&path).unwrap();
            Plan::read(&path).unwrap_err().to_string()
        };
        assert!(refused(&|plan| plan.tasks[0].shard = 1).contains("was changed"));
        assert!(refused(&|plan| plan.mxeval_plan = 9).contains("version 9"));
        assert!(refused(&|plan| plan.mxeval = "0.0.9".into()).contains("mxeval 0.0.9"));
        let elsewhere = refused(&|plan| {
            plan.tasks[0].id = "../x".into();
            plan.id = plan.digest().unwrap();
        });
        assert!(elsewhere.contains("make no sense"), "{elsewhere}");
        std::fs::write(&path, "{\"mxeval_plan\": 1").unwrap();
        assert!(Plan::read(&path).unwrap_err().to_string().contains("not a plan"));
    }
}
