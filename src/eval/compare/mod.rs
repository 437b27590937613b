//! Runs side by side: the stages of several output folders, matched by name.
//!
//! A difference is printed only where both sides measured the same thing; what does not is said in
//! [`Remark`]s. Differences are to the first folder.

mod paired;
mod remarks;
mod show;

pub use paired::documents;
pub use remarks::{Kind, Remark};

use super::error::{Error, Result};
use super::figures::{Estimate, Verdict};
use super::record::{Record, Status};
use serde::Serialize;
use serde_json::{Map, Value};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// What a run left behind.
#[derive(Clone, Debug)]
pub struct Folder {
    /// The folder.
    pub path: PathBuf,
    /// results.jsonl.
    pub records: Vec<Record>,
    /// run.json.
    pub run: Map<String, Value>,
}

/// Runs side by side.
#[derive(Clone, Debug, Serialize)]
pub struct Compared {
    /// The folders, in the order given.
    pub folders: Vec<String>,
    /// What keeps figures from being compared, the gravest first.
    pub remarks: Vec<Remark>,
    /// The stages, in the order in which they appear.
    pub rows: Vec<Row>,
}

/// A stage.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Its name, with the model's before it where a folder holds several.
    pub stage: String,
    /// One a folder; null where it does not have the stage.
    pub sides: Vec<Option<Side>>,
}

/// A stage in one folder.
#[derive(Clone, Debug, Serialize)]
pub struct Side {
    /// The record as it is.
    pub record: Record,
    /// Against the first folder; null there, and where nothing can be compared.
    pub delta: Option<Delta>,
}

/// Differences to the first folder. What cannot be compared is null.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Delta {
    /// Of xent, nats a token; with an interval where both kept their documents.
    pub xent: Option<Estimate>,
    /// (ppl / the first's - 1) x 100.
    pub ppl_percent: Option<f64>,
    /// Of bits per byte.
    pub bits_per_byte: Option<f64>,
    /// What the interval of `xent` says; null without one.
    pub verdict: Option<Verdict>,
    /// Tokens a second over the first's.
    pub speed_ratio: Option<f64>,
}

impl Folder {
    /// Reads results.jsonl and run.json.
    ///
    /// # Errors
    /// The folder has no results.jsonl, or either file is something else.
    pub fn read(path: &Path) -> Result<Self> {
        let results = path.join("results.jsonl");
        let text = std::fs::read_to_string(&results).map_err(|source| {
            Error::Output(format!(
                "{}: {source}; give the folder that `mxeval --out` wrote",
                results.display()
            ))
        })?;
        // A last line without its newline is still being written, or was cut off.
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        let record = |(index, line): (usize, &str)| {
            serde_json::from_str(line).map_err(|error| {
                let line = index + 1;
                let file = results.display();
                Error::Output(format!("{file}, line {line}: not a record of mxeval ({error})"))
            })
        };
        let records = whole.lines().enumerate().map(record).collect::<Result<Vec<Record>>>()?;
        if records.is_empty() {
            return Err(Error::Output(format!("{}: holds no record", results.display())));
        }
        let facts = path.join("run.json");
        let run = match std::fs::read(&facts) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Map::new(),
            Err(error) => return Err(Error::io(facts)(error)),
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|error| {
                Error::Output(format!("{}: not mxeval's run.json ({error})", facts.display()))
            })?,
        };
        Ok(Self { path: path.into(), records, run })
    }

    /// Whether every stage is there once.
    fn is_single(&self) -> bool {
        let stages: BTreeSet<_> = self.records.iter().map(|record| &record.stage).collect();
        stages.len() == self.records.len()
    }

    /// What run.json says about a record's model.
    fn model_facts(&self, record: &Record) -> Option<&Value> {
        let models = self.run.get("models")?.as_array()?;
        models
            .iter()
            .find(|model| model.get("model").and_then(Value::as_str) == Some(&record.model))
    }
}

/// Lays `folders` side by side.
///
/// # Errors
/// Fewer than two folders; kept documents that are unreadable.
pub fn compare(folders: &[Folder]) -> Result<Compared> {
    let [first, others @ ..] = folders else {
        return Err(Error::Usage("compare needs two folders or more".into()));
    };
    if others.is_empty() {
        return Err(Error::Usage("compare needs two folders or more".into()));
    }
    // A folder with several models has its stages several times; then models have to match, too.
    let by_model = !folders.iter().all(Folder::is_single);
    let name = |record: &Record| match by_model {
        true => format!("{} {}", record.model, record.stage),
        false => record.stage.clone(),
    };
    let mut names: Vec<String> = Vec::new();
    for record in folders.iter().flat_map(|folder| &folder.records) {
        if !names.contains(&name(record)) {
            names.push(name(record));
        }
    }
    let mut remarks = Vec::new();
    let run_wide: Vec<Kind> =
        others.iter().map(|o| remarks::runs(first, o, &mut remarks)).collect();
    let mut rows = Vec::new();
    for stage in names {
        let find = |folder: &Folder| folder.records.iter().find(|r| name(r) == stage).cloned();
        let base = find(first);
        let mut sides = vec![base.clone().map(|record| Side { record, delta: None })];
        for (other, &kind) in others.iter().zip(&run_wide) {
            let Some(record) = find(other) else {
                sides.push(None);
                continue;
            };
            let delta = match &base {
                Some(base) => delta((first, base), (other, &record), kind, &mut remarks)?,
                None => None,
            };
            sides.push(Some(Side { record, delta }));
        }
        rows.push(Row { stage, sides });
    }
    remarks.sort_by_key(|remark| remark.kind);
    remarks.dedup();
    let folders = folders.iter().map(|folder| folder.path.display().to_string()).collect();
    Ok(Compared { folders, remarks, rows })
}

/// Differences of one stage in two folders.
fn delta(
    (first, base): (&Folder, &Record),
    (other, record): (&Folder, &Record),
    run_wide: Kind,
    remarks: &mut Vec<Remark>,
) -> Result<Option<Delta>> {
    let (Some(theirs), Some(ours)) = (base.xent, record.xent) else { return Ok(None) };
    let kind = run_wide.min(remarks::stages((first, base), (other, record), remarks));
    if kind == Kind::NotComparable {
        return Ok(None);
    }
    let pair = |field: fn(&Record) -> Option<f64>| field(record).zip(field(base));
    let bits_per_byte = pair(|r| r.bits_per_byte).map(|(ours, theirs)| ours - theirs);
    let same_tokens = kind == Kind::Note;
    let xent = match same_tokens {
        true => {
            let documents = (documents(first, base)?, documents(other, record)?);
            let paired = paired::interval(&documents.0, &documents.1);
            Some(paired.unwrap_or_else(|| Estimate::exact(ours - theirs)))
        }
        false => None,
    };
    let percent = pair(|r| r.ppl).map(|(ours, theirs)| (ours / theirs - 1.0) * 100.0);
    let speed = pair(|r| r.tokens_per_second).map(|(ours, theirs)| ours / theirs);
    let finite = |value: Option<f64>| value.filter(|value| value.is_finite());
    Ok(Some(Delta {
        xent,
        ppl_percent: finite(percent).filter(|_| same_tokens),
        bits_per_byte,
        verdict: xent.and_then(verdict),
        speed_ratio: finite(speed),
    }))
}

fn verdict(xent: Estimate) -> Option<Verdict> {
    let (low, high) = xent.low.zip(xent.high)?;
    Some(match (low > 0.0, high < 0.0) {
        (true, _) => Verdict::Worse,
        (_, true) => Verdict::Better,
        _ => Verdict::NoSignificantDifference,
    })
}

/// Whether the figures of a record are those of all its documents.
fn is_whole(record: &Record) -> bool {
    record.status == Status::Ok
}

#[cfg(test)]
mod tests;
