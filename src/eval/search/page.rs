//! search.html: the recipe found beside the formats alone, with the intervals and verdicts of any
//! report, the front, and the map of layers.

use super::DocumentLosses;
use super::result::Search;
use crate::eval::error::Result;
use crate::eval::figures::Statistics;
use crate::eval::metrics::DocumentScore;
use crate::eval::record::{Record, Status};
use crate::eval::report::{self, Report};
use crate::eval::sensitivity::result::Sensitivity;
use crate::eval::statistics::{Bootstrap, Reference, Sample, statistics};
use crate::eval::windows::Definition;
use serde_json::{Map, Value, json};

/// Name of the baseline's row.
const BASELINE: &str = "baseline";

/// The page.
///
/// # Errors
/// The sensitivity cannot be read as reports read it.
pub(super) fn html(search: &Search, sensitivity: &Sensitivity) -> Result<String> {
    let reference = documents(&search.baseline);
    let mut records = vec![record(search, BASELINE, &reference, None)];
    for one in &search.measured {
        let own = documents(&one.documents);
        let mut made = record(search, &one.name, &own, Some(&reference));
        made.bits_per_weight = Some(one.bits_per_weight);
        made.model_bytes = Some(one.bytes);
        records.push(made);
    }
    let layers = serde_json::to_value(sensitivity).ok();
    let layers = layers.and_then(|value| serde_json::from_value(value).ok());
    let definition = format!(
        "{} Measured on {} documents that the search has not seen. Size is that of the layers the search is about.",
        Definition::per_document(search.seq_len).text(),
        search.heldout_documents.len()
    );
    let facts = facts(search);
    Ok(report::html(&Report {
        records: &records,
        facts: &facts,
        definition: &definition,
        sensitivity: layers.as_ref(),
        // The rows are the points.
        front: &[],
    }))
}

/// Sums by document. What a search does not measure is no number, so that it is shown as missing.
fn documents(losses: &DocumentLosses) -> Vec<DocumentScore> {
    let sums = losses.nll.iter().zip(&losses.tokens);
    let score = |(&nll, &tokens)| DocumentScore {
        nll,
        tokens,
        entropy: f64::NAN,
        ..DocumentScore::default()
    };
    sums.map(score).collect()
}

fn record(
    search: &Search,
    stage: &str,
    own: &[DocumentScore],
    reference: Option<&[DocumentScore]>,
) -> Record {
    let mut record =
        Record::new(&search.model.path.display().to_string(), stage, &search.device, Status::Ok);
    record.statistics = paired(own, reference);
    let all = record.statistics.as_ref().map(|statistics| &statistics.all);
    record.docs = all.map(|all| all.docs);
    record.tokens = all.map(|all| all.tokens);
    record.xent = all.and_then(|all| all.xent.value);
    record.ppl = all.and_then(|all| all.ppl.value);
    record
}

/// Intervals by the bootstrap of any stage.
pub(super) fn paired(
    own: &[DocumentScore],
    reference: Option<&[DocumentScore]>,
) -> Option<Statistics> {
    let sample = Sample {
        documents: own,
        subset: &vec![None; own.len()],
        names: &[],
        kl: &vec![Vec::new(); own.len()],
    };
    let reference = reference.map(|documents| Reference { stage: BASELINE, documents });
    let mut found = statistics(&sample, reference.as_ref(), Bootstrap::default(), "document")?;
    // Not measured here, and 0 would look like a figure.
    let accuracy = &mut found.all.accuracy;
    (accuracy.value, accuracy.low, accuracy.high) = (None, None, None);
    Some(found)
}

fn facts(search: &Search) -> Map<String, Value> {
    let facts = json!({
        "mxeval": search.mxeval,
        "date": search.date,
        "command": search.command,
        "device": search.device,
        "model": search.model,
        "tokenizer": search.tokenizer,
        "data": search.data,
        "target": search.target,
        "objective": search.objective,
        "found": search.found,
        "bound": search.bound,
    });
    facts.as_object().cloned().unwrap_or_default()
}
