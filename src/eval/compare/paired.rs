//! Differences of documents, paired.

use super::Folder;
use crate::eval::error::{Error, Result};
use crate::eval::figures::Estimate;
use crate::eval::metrics::DocumentScore;
use crate::eval::record::Record;
use crate::eval::scores;
use crate::eval::statistics::{Bootstrap, Reference, Sample, statistics};
use serde::Deserialize;
use serde_json::Value;
use std::path::{Component, Path};

/// As `mxeval --documents` keeps them in run.json.
#[derive(Deserialize)]
struct Kept {
    nll: Vec<f64>,
    tokens: Vec<u64>,
}

/// The sums of a stage's documents by number, if the run kept them; else empty: in its score file, or, as
/// older versions did on request, in run.json.
///
/// # Errors
/// They are there, but not readable.
pub fn documents(folder: &Folder, record: &Record) -> Result<Vec<(u64, DocumentScore)>> {
    let stage = format!("{} {}", record.model, record.stage);
    let details = folder.run.get("stages").and_then(|stages| stages.get(&stage));
    let named = details.and_then(|details| details.get("scores")).and_then(Value::as_str);
    if let Some(name) = named {
        let found = scored(folder, name)?;
        if !found.is_empty() {
            return Ok(found);
        }
    }
    let Some(kept) = details.and_then(|details| details.get("documents")) else {
        return Ok(Vec::new());
    };
    let unreadable = |reason: String| {
        let file = folder.path.join("run.json");
        Error::Output(format!("{}: documents of {stage}: {reason}", file.display()))
    };
    let kept: Kept =
        Deserialize::deserialize::<&Value>(kept).map_err(|e| unreadable(e.to_string()))?;
    if kept.nll.len() != kept.tokens.len() {
        return Err(unreadable("`nll` and `tokens` differ in length".into()));
    }
    let score = |(nll, tokens)| DocumentScore { nll, tokens, ..DocumentScore::default() };
    Ok((0..).zip(kept.nll.into_iter().zip(kept.tokens).map(score)).collect())
}

/// The documents of a score file of the folder. Its name comes from a file: it may not lead elsewhere.
fn scored(folder: &Folder, name: &str) -> Result<Vec<(u64, DocumentScore)>> {
    let name = Path::new(name);
    if !name.components().all(|part| matches!(part, Component::Normal(_))) {
        let file = folder.path.join("run.json");
        let text = format!("{}: the scores {name:?} lie outside the folder", file.display());
        return Err(Error::Output(text));
    }
    let path = folder.path.join(name);
    if !path.is_file() {
        return Ok(Vec::new());
    }
    let (header, scores) = scores::read(&path)?;
    if scores.windows.len() != header.windows {
        // Of a stage that was interrupted; which documents are whole, the file does not say.
        return Ok(Vec::new());
    }
    let (documents, _) = scores.documents(header.subset_of.len());
    // What is compared here is the other run's, not the baseline that ran beside.
    let alone = |document: DocumentScore| DocumentScore { against: None, ..document };
    Ok((0..).zip(documents.into_iter().map(alone)).collect())
}

/// The difference of xent of `b` to `a` with its 95 % interval, by the same bootstrap as a run's own
/// (`docs/statistics.md`). `None` unless both scored the same tokens of the same documents, enough of
/// them.
pub(super) fn interval(a: &[(u64, DocumentScore)], b: &[(u64, DocumentScore)]) -> Option<Estimate> {
    let same = a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.0 == b.0);
    let sums = |side: &[(u64, DocumentScore)]| side.iter().map(|(_, sum)| *sum).collect::<Vec<_>>();
    let (theirs, ours) = (sums(a), sums(b));
    let sample = Sample {
        documents: &ours,
        subset: &vec![None; ours.len()],
        names: &[],
        kl: &vec![Vec::new(); ours.len()],
    };
    let reference = Reference { stage: "the first", documents: &theirs };
    let found = statistics(&sample, Some(&reference), Bootstrap::default(), "document")?;
    let delta = found.all.versus?.delta_xent;
    (same && delta.low.is_some()).then_some(delta)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scores(nll: impl Fn(u64) -> f64, count: u64) -> Vec<(u64, DocumentScore)> {
        let score =
            |d: u64| DocumentScore { nll: nll(d), tokens: 50 + d % 7, ..Default::default() };
        (0..count).map(|d| (d, score(d))).collect()
    }

    #[test]
    fn an_interval_needs_the_same_documents() {
        let a = scores(|d| d as f64, 100);
        // A constant 0.1 a token, and noise of standard deviation 1 a document.
        let noise = |d: u64| if d.is_multiple_of(2) { 1.0 } else { -1.0 };
        let b = scores(|d| d as f64 + 0.1 * (50 + d % 7) as f64 + noise(d), 100);
        let found = interval(&a, &b).unwrap();
        assert!((found.value.unwrap() - 0.1).abs() < 1e-3, "{found:?}");
        let half = (found.high.unwrap() - found.low.unwrap()) / 2.0;
        // 1.96 x 1 x sqrt(100) / 5,300 tokens.
        assert!((half - 1.96 * 10.0 / 5300.0).abs() < 3e-4, "{half}");
        assert_eq!(interval(&a, &b[..99]), None);
        assert_eq!(interval(&a[..9], &b[..9]), None);
        let mut other = b.clone();
        other[3].1.tokens += 1;
        assert_eq!(interval(&a, &other), None);
    }
}
