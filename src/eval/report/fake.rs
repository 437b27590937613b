//! Records as a large run leaves them, made up but plausible.

use super::inputs::{FormatSensitivity, ParetoPoint, Sensitivity, SiteSensitivity};
use crate::eval::figures::{
    Comparison, Divergence, Estimate, Figures, Statistics, SubsetFigures, Verdict,
};
use crate::eval::record::{Record, Status};

/// The Pile's.
pub(crate) const SUBSETS: [&str; 22] = [
    "ArXiv",
    "BookCorpus2",
    "Books3",
    "DM Mathematics",
    "Enron Emails",
    "EuroParl",
    "FreeLaw",
    "Github",
    "Gutenberg (PG-19)",
    "HackerNews",
    "NIH ExPorter",
    "OpenSubtitles",
    "OpenWebText2",
    "PhilPapers",
    "Pile-CC",
    "PubMed Abstracts",
    "PubMed Central",
    "StackExchange",
    "USPTO Backgrounds",
    "Ubuntu IRC",
    "Wikipedia (en)",
    "YoutubeSubtitles",
];

/// Stage, Δxent, half its interval, bits a weight, megabytes, tokens a second.
const STAGES: [(&str, f64, f64, f64, f64, f64); 12] = [
    ("baseline", 0.0, 0.0, 32.0, 538.1, 1450.0),
    ("bf16", 0.00046, 0.0006, 16.0, 269.3, 1100.0),
    ("bfp16", 0.00018, 0.0004, 16.0, 325.0, 1290.0),
    ("nvfp8-emu-e4m3", 0.0308, 0.0021, 8.0, 219.4, 1210.0),
    ("nvfp8-emu-e5m2", 0.0815, 0.0034, 8.0, 219.4, 1215.0),
    ("mx-fp8_e4m3", 0.0287, 0.0019, 8.25, 222.8, 2210.0),
    ("mx-fp8_e5m2", 0.0914, 0.0036, 8.25, 222.8, 2190.0),
    ("mx-fp6_e3m2", 0.0918, 0.0036, 6.25, 196.2, 1905.0),
    ("mx-fp6_e2m3", 0.0280, 0.0019, 6.25, 196.2, 1893.0),
    ("mx-fp4_e2m1", 0.6209, 0.0142, 4.25, 169.6, 2480.0),
    ("int8", -0.0017, 0.0009, 8.03, 219.9, 1660.0),
    ("nvfp8", 0.0, 0.0, 8.0, 0.0, 0.0),
];

fn estimate(value: f64, half: f64) -> Estimate {
    Estimate { value: Some(value), low: Some(value - half), high: Some(value + half) }
}

fn figures(stage: usize, scale: f64, half: f64, docs: u64) -> Figures {
    let (_, delta, own, ..) = STAGES[stage];
    let (xent, delta, own) = (2.9 * scale, delta * scale, own * half);
    let mut versus = (stage > 0).then(|| comparison(delta, own, xent));
    if docs < 8
        && let Some(versus) = &mut versus
    {
        versus.verdict = Verdict::TooFewDocuments;
        (versus.delta_xent.low, versus.delta_xent.high) = (None, None);
    }
    let total = xent + delta;
    Figures {
        docs,
        tokens: docs * 480,
        bytes: docs * 2000,
        xent: estimate(total, 0.06 * half),
        ppl: estimate(total.exp(), 0.06 * half * total.exp()),
        entropy: estimate(2.7, 0.05 * half),
        bits_per_byte: estimate(total / 3.0, 0.02 * half),
        accuracy: estimate(0.41, 0.008),
        versus,
    }
}

fn comparison(delta: f64, half: f64, xent: f64) -> Comparison {
    let verdict = match delta {
        d if d - half > 0.0 => Verdict::Worse,
        d if d + half < 0.0 => Verdict::Better,
        _ => Verdict::NoSignificantDifference,
    };
    let kl = delta.abs() * 0.9 + 1e-5;
    let middle = ((kl.log10() + 9.0) * 4.0) as i64 - 3;
    let histogram = (0..45i64)
        .map(|bin| (1e5 * (-((bin - middle) as f64 / 4.0).powi(2) / 2.0).exp()) as u64)
        .collect();
    let percent = |x: f64| (x.exp() - 1.0) * 100.0;
    Comparison {
        stage: "baseline".into(),
        verdict,
        delta_xent: estimate(delta, half),
        delta_bits_per_byte: estimate(delta / 3.0, half / 3.0),
        delta_ppl_percent: Estimate {
            value: Some(percent(delta)),
            low: Some(percent(delta - half)),
            high: Some(percent(delta + half)),
        },
        kl: Some(Divergence {
            mean: estimate(kl, kl / 20.0),
            median: Some(kl / 4.0),
            p90: Some(kl * 2.5),
            p99: Some(kl * 9.0),
            p999: Some(kl * 30.0),
            max: Some(kl * 200.0),
            histogram,
        }),
        agreement: Some(estimate(1.0 - (delta.abs() / xent).sqrt() / 3.0, 0.002)),
        delta_p_mean: Some(estimate(-delta.abs() / 10.0, half / 10.0)),
        delta_p_rms: Some(estimate(delta.abs().sqrt() / 5.0, half / 5.0)),
    }
}

fn statistics(stage: usize, subsets: &[&str]) -> Statistics {
    let of = |(index, name): (usize, &&str)| {
        let scale = 0.6 + 0.05 * ((index * 7) % 17) as f64;
        let docs = if index % 9 == 4 { 3 } else { 40 + 11 * index as u64 };
        let sign = if index == 3 { -1.0 } else { 1.0 };
        let mut figures = figures(stage, scale, 3.0, docs);
        if let Some(versus) = figures.versus.as_mut().filter(|_| sign < 0.0) {
            *versus = comparison(-0.004, 0.002, 2.9);
        }
        SubsetFigures { subset: (*name).into(), too_few: docs < 8, figures }
    };
    Statistics {
        seed: 0,
        resamples: 10_000,
        unit: "document".into(),
        all: figures(stage, 1.0, 1.0, 2000),
        macro_average: Some(figures(stage, 1.04, 1.3, 2000)),
        subsets: subsets.iter().enumerate().map(of).collect(),
    }
}

/// A sweep of twelve stages on 22 subsets: one interrupted, one failed, one skipped.
pub(crate) fn records() -> Vec<Record> {
    let mut records: Vec<Record> = (0..STAGES.len()).map(|stage| record(stage, &SUBSETS)).collect();
    records[9].status = Status::Partial;
    records[9].reason = Some("interrupted after 1,412 of 2,000 documents".into());
    records[6].status = Status::Failed;
    records[6].reason = Some("onnx runtime, running: Non-zero status code returned".into());
    let (reason, status) = (records[6].reason.take(), records[6].status);
    records[6] =
        Record { reason, ..Record::new("smollm2/model.onnx", "mx-fp8_e5m2", "cpu", status) };
    records[11] = Record::new("smollm2/model.onnx", "nvfp8", "cpu", Status::Skipped);
    records[11].reason = Some("needs CUDA".into());
    records
}

fn record(stage: usize, subsets: &[&str]) -> Record {
    let (name, delta, _, bits, megabytes, speed) = STAGES[stage];
    let mut record = Record::new("smollm2/model.onnx", name, "cpu", Status::Ok);
    let xent = 2.9 + delta;
    (record.xent, record.ppl, record.entropy) = (Some(xent), Some(xent.exp()), Some(2.71));
    record.bits_per_byte = Some(xent / 3.0);
    (record.docs, record.tokens, record.bytes) = (Some(2000), Some(960_000), Some(4_000_000));
    (record.seconds, record.tokens_per_second) = (Some(960_000.0 / speed), Some(speed));
    record.model_bytes = Some((megabytes * 1e6) as u64);
    record.peak_resident_bytes = Some((megabytes * 2.1e6) as u64);
    record.bits_per_weight = Some(bits);
    record.speed_ratio = (stage > 0).then(|| speed / 1450.0 * 1.01);
    record.load_seconds = Some(megabytes / 400.0);
    record.sites_replaced = Some(if stage == 0 { 0 } else { 210 });
    record.definition = Some("per-document, 512 tokens".into());
    record.statistics = Some(statistics(stage, subsets));
    record
}

/// Names that try to be something else.
pub(crate) fn hostile() -> Vec<Record> {
    let evil = "<script>alert(1)</script>\"'&|`=\n\u{1b}[31m";
    let mut records: Vec<Record> =
        (0..3).map(|stage| record(stage, &[evil, "=HYPERLINK(\"x\")", "a|b"])).collect();
    let long = "a-very-long-stage-name-that-someone-made-of-every-option-".repeat(4);
    records[1].stage = format!("={evil}");
    records[2].stage = long;
    records[2].reason = Some(format!("-1+cmd|' /C calc'!A0 {evil}"));
    for record in &mut records {
        record.model = format!("dir/{evil}.onnx");
    }
    records
}

/// Thirty layers of seven sites in two formats.
pub(crate) fn sensitivity() -> Sensitivity {
    const ROLES: [&str; 7] =
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
    let figures = |size: f64, bits: f64| FormatSensitivity {
        delta_xent: Some(size * 0.8 - 1e-4),
        kl: Some(size),
        bits: Some(bits),
    };
    let mut sites = Vec::new();
    for layer in 0..30u64 {
        for (index, role) in ROLES.iter().enumerate() {
            let wave = 1.0 + (layer as f64 * 1.7 + index as f64).sin();
            let ends = if layer == 0 || layer == 29 { 8.0 } else { 1.0 };
            let size = 1e-4 * (1.0 + wave * (index + 1) as f64) * ends;
            let formats = [("fp4_e2m1", size * 20.0, 4.25), ("fp6_e2m3", size, 6.25)];
            sites.push(SiteSensitivity {
                site: format!("model.layers.{layer}.{role}"),
                layer: Some(layer),
                role: (*role).into(),
                formats: formats
                    .map(|(name, size, bits)| (name.into(), figures(size, bits)))
                    .into(),
            });
        }
    }
    let head = [("fp4_e2m1".to_owned(), figures(0.09, 4.25))].into();
    sites.push(SiteSensitivity {
        site: "lm_head".into(),
        layer: None,
        role: "head".into(),
        formats: head,
    });
    Sensitivity { sites, ..Sensitivity::default() }
}

/// What a search may find.
pub(crate) fn front() -> Vec<ParetoPoint> {
    (0..9)
        .map(|step| {
            let bits = 4.25 + 0.25 * f64::from(step);
            ParetoPoint {
                bits_per_weight: Some(bits),
                bytes: Some((169.6e6 + (bits - 4.25) * 13.3e6) as u64),
                delta_xent: Some(0.62 * (-1.5 * (bits - 4.25)).exp()),
                label: format!("recipe {bits:.2} bits"),
            }
        })
        .collect()
}
