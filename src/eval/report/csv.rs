//! report.csv and subsets.csv: one flat row a stage, or a stage and subset.

use super::table;
use crate::eval::error::{Error, Result};
use crate::eval::figures::{Comparison, Estimate, Figures, Verdict};
use crate::eval::record::Record;

/// Figures with an interval, three columns each.
const ESTIMATES: [&str; 5] = ["xent", "ppl", "entropy", "bits_per_byte", "accuracy"];
/// Differences with an interval, three columns each.
const DIFFERENCES: [&str; 7] = [
    "delta_xent",
    "delta_bits_per_byte",
    "delta_ppl_percent",
    "kl",
    "agreement",
    "delta_p_mean",
    "delta_p_rms",
];
const DIVERGENCE: [&str; 5] = ["kl_median", "kl_p90", "kl_p99", "kl_p999", "kl_max"];

/// Text and numbers of one row.
type Fields = Vec<(String, String)>;

/// report.csv: every field of the records, then intervals and differences.
///
/// # Errors
/// None in practice: it is written to memory.
pub fn stages(records: &[Record]) -> Result<String> {
    let groups = table::groups(records);
    let rows = groups.iter().flat_map(|group| &group.rows);
    write(rows.map(|row| {
        let mut fields = record(row.record);
        let all = row.statistics().map(|s| &s.all);
        figures(all, &mut fields);
        if all.and_then(|f| f.versus.as_ref()).is_none() {
            // Without statistics there are differences all the same.
            let delta = row.delta.as_ref();
            set(&mut fields, "delta_xent", delta.and_then(|d| d.xent.value));
            set(&mut fields, "delta_bits_per_byte", delta.and_then(|d| d.bits_per_byte.value));
            set(&mut fields, "delta_ppl_percent", delta.and_then(|d| d.ppl_percent.value));
        }
        fields
    }))
}

/// subsets.csv: a row a stage and subset; `None` without any subset.
///
/// # Errors
/// None in practice: it is written to memory.
pub fn subsets(records: &[Record]) -> Result<Option<String>> {
    let mut rows = Vec::new();
    for record in records {
        let Some(statistics) = &record.statistics else { continue };
        for subset in &statistics.subsets {
            let mut fields = vec![
                ("model".to_owned(), text(&record.model)),
                ("stage".into(), text(&record.stage)),
                ("subset".into(), text(&subset.subset)),
                ("too_few".into(), subset.too_few.to_string()),
                ("docs".into(), subset.figures.docs.to_string()),
                ("tokens".into(), subset.figures.tokens.to_string()),
                ("bytes".into(), subset.figures.bytes.to_string()),
            ];
            figures(Some(&subset.figures), &mut fields);
            rows.push(fields);
        }
    }
    if rows.is_empty() { Ok(None) } else { write(rows.into_iter()).map(Some) }
}

fn write(rows: impl Iterator<Item = Fields>) -> Result<String> {
    let failed = |error: &dyn std::fmt::Display| Error::Output(format!("CSV: {error}"));
    let mut writer = csv::Writer::from_writer(Vec::new());
    for (index, row) in rows.enumerate() {
        if index == 0 {
            writer.write_record(row.iter().map(|(name, _)| name)).map_err(|e| failed(&e))?;
        }
        writer.write_record(row.iter().map(|(_, value)| value)).map_err(|e| failed(&e))?;
    }
    let bytes = writer.into_inner().map_err(|e| failed(&e.error()))?;
    String::from_utf8(bytes).map_err(|e| failed(&e))
}

/// Text that no spreadsheet takes for a formula (OWASP, CSV injection).
fn text(value: &str) -> String {
    let formula = value.starts_with(['=', '+', '-', '@', '\t', '\r', '\n', '＝', '＋', '－', '＠']);
    if formula { format!("'{value}") } else { value.to_owned() }
}

fn number(value: Option<f64>) -> String {
    value.map(|value| value.to_string()).unwrap_or_default()
}

fn whole(value: Option<u64>) -> String {
    value.map(|value| value.to_string()).unwrap_or_default()
}

fn record(r: &Record) -> Fields {
    let optional = |value: &Option<String>| value.as_deref().map(text).unwrap_or_default();
    [
        ("model", text(&r.model)),
        ("stage", text(&r.stage)),
        ("tier", optional(&r.tier)),
        ("weight_format", optional(&r.weight_format)),
        ("activation_format", optional(&r.activation_format)),
        ("status", r.status.name().into()),
        ("reason", optional(&r.reason)),
        ("sites_replaced", whole(r.sites_replaced)),
        ("docs", whole(r.docs)),
        ("tokens", whole(r.tokens)),
        ("bytes", whole(r.bytes)),
        ("seconds", number(r.seconds)),
        ("tokens_per_second", number(r.tokens_per_second)),
        ("speed_ratio", number(r.speed_ratio)),
        ("load_seconds", number(r.load_seconds)),
        ("model_bytes", whole(r.model_bytes)),
        ("bits_per_weight", number(r.bits_per_weight)),
        ("peak_memory_bytes", whole(r.peak_memory_bytes)),
        ("peak_resident_bytes", whole(r.peak_resident_bytes)),
        ("peak_device_bytes", whole(r.peak_device_bytes)),
        ("device", text(&r.device)),
        ("definition", optional(&r.definition)),
        ("xent", number(r.xent)),
        ("ppl", number(r.ppl)),
        ("entropy", number(r.entropy)),
        ("bits_per_byte", number(r.bits_per_byte)),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .to_vec()
}

/// Sets a column, or adds it.
fn set(fields: &mut Fields, name: &str, value: Option<f64>) {
    match fields.iter_mut().find(|(field, _)| field == name) {
        // A record's own figure is not emptied by statistics that lack it.
        Some((_, old)) if value.is_some() => *old = number(value),
        Some(_) => {}
        None => fields.push((name.to_owned(), number(value))),
    }
}

fn estimate(fields: &mut Fields, name: &str, estimate: Option<Estimate>) {
    set(fields, name, estimate.and_then(|e| e.value));
    set(fields, &format!("{name}_low"), estimate.and_then(|e| e.low));
    set(fields, &format!("{name}_high"), estimate.and_then(|e| e.high));
}

fn figures(figures: Option<&Figures>, fields: &mut Fields) {
    for name in ESTIMATES {
        estimate(fields, name, figures.map(|f| figure(f, name)));
    }
    let versus = figures.and_then(|f| f.versus.as_ref());
    let words = versus.map_or((String::new(), ""), |v| (text(&v.stage), verdict(v.verdict)));
    fields.push(("against".into(), words.0));
    fields.push(("verdict".into(), words.1.into()));
    for name in DIFFERENCES {
        estimate(fields, name, versus.and_then(|v| difference(v, name)));
    }
    let kl = versus.and_then(|v| v.kl.as_ref());
    let parts = kl.map_or([None; 5], |kl| [kl.median, kl.p90, kl.p99, kl.p999, kl.max]);
    for (name, value) in DIVERGENCE.iter().zip(parts) {
        set(fields, name, value);
    }
}

fn figure(f: &Figures, name: &str) -> Estimate {
    match name {
        "xent" => f.xent,
        "ppl" => f.ppl,
        "entropy" => f.entropy,
        "bits_per_byte" => f.bits_per_byte,
        _ => f.accuracy,
    }
}

fn difference(v: &Comparison, name: &str) -> Option<Estimate> {
    match name {
        "delta_xent" => Some(v.delta_xent),
        "delta_bits_per_byte" => Some(v.delta_bits_per_byte),
        "delta_ppl_percent" => Some(v.delta_ppl_percent),
        "kl" => v.kl.as_ref().map(|kl| kl.mean),
        "agreement" => v.agreement,
        "delta_p_mean" => v.delta_p_mean,
        _ => v.delta_p_rms,
    }
}

/// As in results.jsonl.
fn verdict(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::NoSignificantDifference => "no_significant_difference",
        Verdict::Worse => "worse",
        Verdict::Better => "better",
        Verdict::TooFewDocuments => "too_few_documents",
        Verdict::NotFinite => "not_finite",
    }
}
