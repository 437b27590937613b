//! What a reader wants to know first, in sentences.

use super::number::{clean, half_width, megabytes};
use super::table::{Group, Level, Row};
use crate::eval::record::{Record, Status};

/// What the columns mean beyond the definition of the figures.
pub(super) const LEGEND: &str = "Δ is the difference to the baseline (of graphs measured side by side: to the first); \
[low, high] and ± are 95 % intervals, of differences paired by document. Worse (▲ by less than 1 % of ppl, ▲▲ by less \
than 10 %, ▲▲▲ by more) and better (▼) mean that the interval of Δxent does not hold zero; ≈ that it does, so that this text shows no \
difference; ? that there are too few documents. KL is KL(baseline || stage) in nats a token, agreement the share of positions where \
both have the same most probable token, Δp the change of the probability of the text's own token. Size is the graph's file with its \
external data; bits/weight is of the replaced layers, scales included; tok/s counts scored tokens and leaves out rewriting and \
loading.";

/// What holds of the whole report.
pub(super) fn remarks(records: &[Record]) -> Vec<String> {
    let mut out = Vec::new();
    let partial: Vec<_> =
        records.iter().filter(|r| r.status == Status::Partial).map(|r| clean(&r.stage)).collect();
    if !partial.is_empty() {
        out.push(format!(
            "Partial results: {} interrupted; the figures are of the documents done until then.",
            were(&partial)
        ));
    }
    let failed: Vec<_> =
        records.iter().filter(|r| r.status == Status::Failed).map(|r| clean(&r.stage)).collect();
    if !failed.is_empty() {
        out.push(format!("{} failed; the reason is below the table.", failed.join(", ")));
    }
    let mut definitions: Vec<_> = records.iter().filter_map(|r| r.definition.as_deref()).collect();
    definitions.sort_unstable();
    definitions.dedup();
    if definitions.len() > 1 {
        out.push(format!(
            "Stages are defined differently and cannot be compared: {}.",
            clean(&definitions.join("; "))
        ));
    }
    out
}

fn were(names: &[String]) -> String {
    format!("{} {}", names.join(", "), if names.len() == 1 { "was" } else { "were" })
}

/// The verdicts on the stages of a model.
pub(super) fn summary(group: &Group<'_>) -> Vec<String> {
    let mut out = Vec::new();
    // The model that stages ran beside need not be a stage of its own.
    let beside = || group.rows.iter().find_map(Row::versus).map(|versus| versus.stage.as_str());
    let named = group.baseline.map(|baseline| baseline.stage.as_str()).or_else(beside);
    let Some(name) = named.map(clean) else {
        return vec!["No stage has figures.".into()];
    };
    let of = |wanted: fn(Level) -> bool| -> Vec<&Row<'_>> {
        group.rows.iter().filter(|row| row.delta.is_some() && wanted(row.level())).collect()
    };
    let stages = |rows: &[&Row<'_>]| {
        rows.iter().map(|row| clean(&row.record.stage)).collect::<Vec<_>>().join(", ")
    };
    let same = of(|level| level == Level::Same);
    if !same.is_empty() {
        out.push(format!("No significant difference from {name}: {}.", stages(&same)));
    }
    for (word, rows) in
        [("Worse", of(Level::is_worse)), ("Better", of(|level| level == Level::Better))]
    {
        if !rows.is_empty() {
            let by: Vec<_> = rows.iter().map(|row| difference(row)).collect();
            out.push(format!("{word} than {name}, Δxent in nats a token: {}.", by.join("; ")));
        }
    }
    let few = of(|level| level == Level::TooFew);
    if !few.is_empty() {
        out.push(format!("Too few documents for a verdict: {}.", stages(&few)));
    }
    let unknown = of(|level| level == Level::Unknown);
    if !unknown.is_empty() {
        out.push(format!("Without an interval, so without a verdict: {}.", stages(&unknown)));
    }
    out.extend(smallest(&same, &name));
    out.extend(method(group));
    out
}

fn difference(row: &Row<'_>) -> String {
    let stage = clean(&row.record.stage);
    let Some(delta) = &row.delta else { return stage };
    let value = delta.xent.value.map_or_else(|| "?".into(), |value| format!("{value:+.5}"));
    let half = half_width(&delta.xent).map(|half| format!(" ± {half:.5}")).unwrap_or_default();
    let ppl = delta.ppl_percent.value.map(|ppl| format!(" (ppl {ppl:+.2} %)")).unwrap_or_default();
    format!("{stage} {value}{half}{ppl}")
}

/// What to ship when nothing may be lost.
fn smallest(same: &[&Row<'_>], name: &str) -> Option<String> {
    let row = same
        .iter()
        .filter(|row| row.size_ratio().is_some_and(|ratio| ratio < 1.0))
        .min_by_key(|row| row.record.model_bytes)?;
    let (size, ratio) = (megabytes(row.record.model_bytes)?, row.size_ratio()?);
    Some(format!(
        "Smallest without a significant difference: {}, {size:.2} MB, {ratio:.2} of {name}.",
        clean(&row.record.stage)
    ))
}

fn method(group: &Group<'_>) -> Option<String> {
    let s = group.statistics()?;
    Some(format!(
        "95 % intervals by bootstrap over {}s: {} resamples, seed {}.",
        clean(&s.unit),
        s.resamples,
        s.seed
    ))
}
