//! Differences of documents, paired.

use super::Folder;
use crate::eval::error::{Error, Result};
use crate::eval::figures::Estimate;
use crate::eval::metrics::DocumentScore;
use crate::eval::record::Record;
use serde::Deserialize;
use serde_json::Value;

/// 97.5th percentile of the normal distribution.
const Z: f64 = 1.959_963_984_540_054;
/// Documents below which an interval says nothing.
const FEWEST: usize = 10;

/// As `mxeval --documents` keeps them in run.json.
#[derive(Deserialize)]
struct Kept {
    nll: Vec<f64>,
    tokens: Vec<u64>,
}

/// The sums of a stage's documents by number, if the run kept them; else empty. This is the one place
/// that knows where they are.
///
/// # Errors
/// They are there, but not readable.
pub fn documents(folder: &Folder, record: &Record) -> Result<Vec<(u64, DocumentScore)>> {
    let stage = format!("{} {}", record.model, record.stage);
    let details = folder.run.get("stages").and_then(|stages| stages.get(&stage));
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

/// The difference of xent of `b` to `a` with its 95 % interval: a ratio estimator over documents,
/// normal approximation (Cochran, Sampling Techniques, 6.3). `None` unless both scored the same tokens
/// of the same documents.
pub(super) fn interval(a: &[(u64, DocumentScore)], b: &[(u64, DocumentScore)]) -> Option<Estimate> {
    let same =
        a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.0 == b.0 && a.1.tokens == b.1.tokens);
    let pairs: Vec<(f64, f64)> = a
        .iter()
        .zip(b)
        .filter(|(a, _)| a.1.tokens > 0)
        .map(|(a, b)| (b.1.nll - a.1.nll, a.1.tokens as f64))
        .collect();
    if !same || pairs.len() < FEWEST {
        return None;
    }
    let tokens: f64 = pairs.iter().map(|pair| pair.1).sum();
    let value = pairs.iter().map(|pair| pair.0).sum::<f64>() / tokens;
    let squares: f64 = pairs.iter().map(|(nll, tokens)| (nll - value * tokens).powi(2)).sum();
    let n = pairs.len() as f64;
    let half = Z * (squares * n / (n - 1.0)).sqrt() / tokens;
    let finite = value.is_finite() && half.is_finite();
    finite.then_some(Estimate {
        value: Some(value),
        low: Some(value - half),
        high: Some(value + half),
    })
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
        assert!((half - 1.96 * 10.0 / 5300.0).abs() < 1e-4, "{half}");
        assert_eq!(interval(&a, &b[..99]), None);
        assert_eq!(interval(&a[..9], &b[..9]), None);
        let mut other = b.clone();
        other[3].1.tokens += 1;
        assert_eq!(interval(&a, &other), None);
    }
}
