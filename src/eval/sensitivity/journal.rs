//! What a run has finished, kept so that an interrupted one goes on.
//!
//! One line of JSON a batch and segment, appended and synced; the first line says what the others are
//! of. Sums are written as the bits of their float64, since text may change their last digit.

use super::chooser::RowScore;
use crate::eval::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};

/// Scores of one site in one format on one batch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Scored {
    /// Number of the site in the plan.
    pub site: usize,
    pub format: usize,
    /// By row: tokens, and the bits of loss, baseline's loss and divergence.
    rows: Vec<[u64; 4]>,
}

impl Scored {
    pub(super) fn new(site: usize, format: usize, rows: &[RowScore]) -> Self {
        let row = |row: &RowScore| {
            [row.tokens, row.nll.to_bits(), row.baseline_nll.to_bits(), row.kl.to_bits()]
        };
        Self { site, format, rows: rows.iter().map(row).collect() }
    }

    pub(super) fn rows(&self) -> impl Iterator<Item = RowScore> {
        self.rows.iter().map(|&[tokens, nll, baseline_nll, kl]| RowScore {
            tokens,
            nll: f64::from_bits(nll),
            baseline_nll: f64::from_bits(baseline_nll),
            kl: f64::from_bits(kl),
        })
    }
}

/// One unit of work that is done.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Unit {
    pub batch: usize,
    /// Number of the segment; those beyond the last are single layers measured by full passes.
    pub segment: usize,
    pub scores: Vec<Scored>,
    /// Passes that it took, the baseline's left out.
    pub runs: u64,
    pub seconds: f64,
}

#[derive(Serialize, Deserialize)]
struct Head {
    key: String,
}

/// The file.
pub(super) struct Journal {
    path: PathBuf,
    file: File,
    /// Done by an earlier run.
    pub done: Vec<Unit>,
}

impl Journal {
    /// Opens the journal of the work that `key` stands for. Without `resume`, or when it is of other
    /// work, it begins anew.
    ///
    /// # Errors
    /// The file cannot be read or written.
    pub(super) fn open(path: &Path, key: &str, resume: bool) -> Result<Self> {
        let text = match std::fs::read_to_string(path) {
            Ok(text) if resume => text,
            Ok(_) => String::new(),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(e) => return Err(Error::io(path)(e)),
        };
        let (done, valid) = read(&text, key);
        if valid == 0 && !text.is_empty() {
            // Of other options, another model or text: hours of work that the user may still want.
            let aside = path.with_extension("old.jsonl");
            std::fs::rename(path, &aside).map_err(Error::io(path))?;
        }
        let file = OpenOptions::new().create(true).append(true).open(path);
        let mut journal = Self { path: path.into(), file: file.map_err(Error::io(path))?, done };
        // Nothing is appended to half a line.
        journal.file.set_len(valid as u64).map_err(Error::io(path))?;
        if valid == 0 {
            journal.line(&Head { key: key.to_owned() })?;
        }
        Ok(journal)
    }

    /// Whether a unit is done.
    pub(super) fn has(&self, batch: usize, segment: usize) -> bool {
        self.done.iter().any(|unit| (unit.batch, unit.segment) == (batch, segment))
    }

    /// Notes a unit that is done.
    ///
    /// # Errors
    /// The file cannot be written.
    pub(super) fn add(&mut self, unit: Unit) -> Result<()> {
        self.line(&unit)?;
        self.file.sync_data().map_err(Error::io(&self.path))?;
        self.done.push(unit);
        Ok(())
    }

    fn line(&mut self, value: &impl Serialize) -> Result<()> {
        let json = serde_json::to_string(value)
            .map_err(|e| Error::Output(format!("{}: {e}", self.path.display())))?;
        self.file.write_all(format!("{json}\n").as_bytes()).map_err(Error::io(&self.path))
    }
}

/// The units of a journal of this key, and the bytes up to the end of the last whole one. A line
/// without its end was cut off by a crash.
fn read(text: &str, key: &str) -> (Vec<Unit>, usize) {
    let mut lines = text.split_inclusive('\n').filter(|line| line.ends_with('\n'));
    let first = lines.next();
    let head = first.and_then(|line| serde_json::from_str::<Head>(line).ok());
    if head.is_none_or(|head| head.key != key) {
        return (Vec::new(), 0);
    }
    let mut valid = first.map_or(0, str::len);
    let mut done = Vec::new();
    for line in lines {
        let Ok(unit) = serde_json::from_str(line) else { break };
        done.push(unit);
        valid += line.len();
    }
    (done, valid)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unit(batch: usize) -> Unit {
        let row = RowScore { tokens: 3, nll: 0.1 + 0.2, baseline_nll: -1e-300, kl: 1.0 / 3.0 };
        let scores = vec![Scored::new(2, 1, &[row, RowScore::default()])];
        Unit { batch, segment: 4, scores, runs: 1, seconds: 0.5 }
    }

    #[test]
    fn what_is_done_survives_to_the_last_bit_and_half_a_line_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let mut journal = Journal::open(&path, "a", false).unwrap();
        journal.add(unit(0)).unwrap();
        journal.add(unit(1)).unwrap();
        drop(journal);
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, &text[..text.len() - 5]).unwrap();
        let journal = Journal::open(&path, "a", true).unwrap();
        assert_eq!(journal.done, [unit(0)]);
        assert!(journal.has(0, 4) && !journal.has(1, 4));
        assert_eq!(journal.done[0].scores[0].rows().next().unwrap().nll, 0.1 + 0.2);
        drop(journal);
        assert_eq!(Journal::open(&path, "b", true).unwrap().done, []);
        assert_eq!(Journal::open(&path, "a", true).unwrap().done, []);
    }
}
