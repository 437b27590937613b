//! Values against plain sums, intervals of cases made by hand, and the same bytes every time.

use super::coverage::{Source, document};
use super::*;
use crate::eval::figures::{Comparison, Estimate, Verdict};
use crate::eval::metrics::{Against, Metrics};

fn sample(documents: &[DocumentScore]) -> Sample<'_> {
    Sample { documents, subset: &[], names: &[], kl: &[] }
}

fn quick(seed: u64) -> Bootstrap {
    Bootstrap { seed, resamples: 500 }
}

fn of(documents: &[DocumentScore]) -> Statistics {
    statistics(&sample(documents), None, quick(1), "document").unwrap()
}

/// Documents that vary, with everything in them.
fn documents(count: usize, seed: u64) -> Vec<DocumentScore> {
    let mut source = Source::new(seed);
    (0..count)
        .map(|_| {
            let mut score = document(&mut source, 0.8);
            score.entropy = score.nll * (0.8 + 0.2 * source.uniform());
            score.correct = score.tokens / 3;
            if let Some(against) = &mut score.against {
                against.correct = score.tokens / 4;
                against.delta_p = score.tokens as f64 * 0.1 * (source.uniform() - 0.6);
                against.delta_p_squared = score.tokens as f64 * 0.02 * source.uniform();
            }
            score
        })
        .collect()
}

fn versus(statistics: &Statistics) -> &Comparison {
    statistics.all.versus.as_ref().unwrap()
}

fn is(estimate: Estimate, value: f64) {
    let found = estimate.value.unwrap();
    assert!((found - value).abs() <= 1e-12 * value.abs(), "{found} is not {value}");
    let (low, high) = (estimate.low.unwrap(), estimate.high.unwrap());
    assert!(low < found && found < high, "{low} {found} {high}");
}

#[test]
fn values_are_ratios_of_sums() {
    let documents = documents(60, 3);
    let against = || documents.iter().map(|d| d.against.unwrap());
    let tokens: f64 = documents.iter().map(|d| d.tokens as f64).sum();
    let bytes: f64 = documents.iter().map(|d| d.bytes as f64).sum();
    let nll: f64 = documents.iter().map(|d| d.nll).sum();
    let base: f64 = against().map(|a| a.nll).sum();
    let statistics = of(&documents);
    let all = &statistics.all;
    let metrics = Metrics::new(&documents).unwrap();
    // Bit for bit.
    assert_eq!(all.xent.value, Some(metrics.xent));
    assert_eq!(all.ppl.value, Some(metrics.ppl));
    assert_eq!(all.entropy.value, Some(metrics.entropy));
    assert_eq!(all.bits_per_byte.value, Some(metrics.bits_per_byte));
    assert_eq!((all.docs, all.tokens, all.bytes), (60, metrics.tokens, metrics.bytes));
    is(all.ppl, (nll / tokens).exp());
    is(all.accuracy, documents.iter().map(|d| d.correct as f64).sum::<f64>() / tokens);
    let versus = versus(&statistics);
    let near = |estimate: Estimate, value: f64| {
        assert!((estimate.value.unwrap() - value).abs() < 1e-11, "{estimate:?} {value}");
    };
    near(versus.delta_xent, (nll - base) / tokens);
    near(versus.delta_bits_per_byte, (nll - base) / std::f64::consts::LN_2 / bytes);
    near(versus.delta_ppl_percent, 100.0 * (((nll - base) / tokens).exp() - 1.0));
    is(versus.kl.as_ref().unwrap().mean, against().map(|a| a.kl).sum::<f64>() / tokens);
    is(versus.agreement.unwrap(), against().map(|a| a.agree as f64).sum::<f64>() / tokens);
    is(versus.delta_p_mean.unwrap(), against().map(|a| a.delta_p).sum::<f64>() / tokens);
    let squares: f64 = against().map(|a| a.delta_p_squared).sum();
    is(versus.delta_p_rms.unwrap(), (squares / tokens).sqrt());
    assert_eq!(versus.stage, "baseline");
    // Ends go through the functions that make one figure of another.
    let end = versus.delta_xent.high.unwrap();
    assert_eq!(versus.delta_ppl_percent.high.unwrap(), 100.0 * end.exp_m1());
    assert_eq!(all.ppl.low.unwrap(), all.xent.low.unwrap().exp());
}

#[test]
fn documents_without_tokens_change_nothing() {
    let some = documents(30, 4);
    let mut with = some.clone();
    with.insert(0, DocumentScore::default());
    with.insert(17, DocumentScore::default());
    assert_eq!(of(&with), of(&some));
    assert_eq!(statistics(&sample(&[]), None, quick(1), "document"), None);
    let nothing = [DocumentScore::default()];
    assert_eq!(statistics(&sample(&nothing), None, quick(1), "document"), None);
}

#[test]
fn identical_documents_have_intervals_without_width() {
    let one = documents(1, 5)[0];
    let statistics = of(&[one; 40]);
    let versus = versus(&statistics);
    for estimate in [statistics.all.xent, statistics.all.ppl, versus.delta_xent] {
        assert_eq!((estimate.low, estimate.high), (estimate.value, estimate.value));
    }
    // A stage that is the baseline in every bit.
    let against = Against { nll: one.nll, agree: one.tokens, ..Against::default() };
    let same = DocumentScore { against: Some(against), ..one };
    let statistics = of(&[same; 40]);
    let versus = statistics.all.versus.as_ref().unwrap();
    let exact = |value| Estimate { value: Some(value), low: Some(value), high: Some(value) };
    assert_eq!(versus.delta_xent, exact(0.0));
    assert_eq!(versus.agreement, Some(exact(1.0)));
    assert_eq!(versus.verdict, Verdict::NoSignificantDifference);
    let sentence = statistics.sentence().unwrap();
    assert_eq!(
        sentence,
        "no significant difference (+0.0000 ± 0.0000 nats a token, 95 %, paired, 40 documents)"
    );
}

#[test]
fn few_documents_have_values_but_no_intervals() {
    let statistics = of(&documents(MIN_DOCUMENTS - 1, 6));
    let versus = versus(&statistics);
    assert!(statistics.all.xent.value.is_some() && versus.delta_xent.value.is_some());
    assert_eq!((statistics.all.xent.low, versus.delta_xent.high), (None, None));
    assert_eq!(versus.verdict, Verdict::TooFewDocuments);
    assert_eq!(versus.sentence(1, "document"), "too few documents (1; at least 10 are needed)");
    assert!(of(&documents(MIN_DOCUMENTS, 6)).all.xent.low.is_some());
}

/// For documents of equal length a ratio is a mean, and the interval must be near Student's.
#[test]
fn equal_lengths_give_students_interval() {
    let mut source = Source::new(7);
    let values: Vec<f64> = (0..40).map(|_| 3.0 + 0.4 * source.normal()).collect();
    let documents: Vec<_> = values
        .iter()
        .map(|value| DocumentScore {
            nll: 100.0 * value,
            tokens: 100,
            bytes: 400,
            ..DocumentScore::default()
        })
        .collect();
    let statistics =
        statistics(&sample(&documents), None, Bootstrap::default(), "document").unwrap();
    let mean = values.iter().sum::<f64>() / 40.0;
    let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / 39.0;
    // The 97.5 % quantile of Student's t with 39 degrees of freedom.
    let half = 2.0227 * (variance / 40.0).sqrt();
    let xent = statistics.all.xent;
    assert!((xent.low.unwrap() - (mean - half)).abs() < 0.15 * half, "{xent:?} {mean} {half}");
    assert!((xent.high.unwrap() - (mean + half)).abs() < 0.15 * half, "{xent:?} {mean} {half}");
}

#[test]
fn rare_events_keep_intervals_in_range() {
    // One document in 50 has a token on which the two differ.
    let mut documents: Vec<_> = documents(50, 8);
    for document in &mut documents {
        let against = document.against.as_mut().unwrap();
        (against.agree, against.kl) = (document.tokens, 0.0);
    }
    documents[20].against.as_mut().unwrap().agree -= 1;
    documents[20].against.as_mut().unwrap().kl = 0.5;
    let statistics = of(&documents);
    let versus = versus(&statistics);
    let agreement = versus.agreement.unwrap();
    let (low, high) = (agreement.low.unwrap(), agreement.high.unwrap());
    assert_eq!(high, 1.0);
    let missing = 1.0 - agreement.value.unwrap();
    assert!((2.0 * missing..6.0 * missing).contains(&(1.0 - low)), "{agreement:?}");
    let kl = versus.kl.as_ref().unwrap().mean;
    assert!(kl.low == Some(0.0) && kl.high > kl.value, "{kl:?}");
}

#[test]
fn pairing_beats_comparing_two_absolute_figures() {
    let statistics = of(&documents(200, 9));
    let width = |estimate: Estimate| estimate.high.unwrap() - estimate.low.unwrap();
    let versus = versus(&statistics);
    assert!(width(versus.delta_xent) < 0.1 * width(statistics.all.xent));
    assert_eq!(versus.verdict, Verdict::Worse);
    let sentence = statistics.sentence().unwrap();
    assert!(sentence.starts_with("worse by 0.03"), "{sentence}");
    assert!(sentence.ends_with("nats a token (95 %, paired, 200 documents)"), "{sentence}");
}

#[test]
fn another_runs_documents_give_the_same_differences() {
    let side_by_side = documents(50, 10);
    let apart: Vec<_> =
        side_by_side.iter().map(|d| DocumentScore { against: None, ..*d }).collect();
    let other: Vec<_> = side_by_side
        .iter()
        .map(|d| DocumentScore { nll: d.against.unwrap().nll, against: None, ..*d })
        .collect();
    let compared = |documents: &[DocumentScore], others: &[DocumentScore]| {
        let reference = Reference { stage: "fp16", documents: others };
        statistics(&sample(documents), Some(&reference), quick(1), "window").unwrap()
    };
    let (a, b) = (compared(&side_by_side, &[]), compared(&apart, &other));
    let (a, b) = (versus(&a), versus(&b));
    assert_eq!(a.delta_xent, b.delta_xent);
    assert_eq!((a.stage.as_str(), b.stage.as_str()), ("fp16", "fp16"));
    assert!(a.kl.is_some() && b.kl.is_none() && b.agreement.is_none());
    // Other documents, or fewer, are no pairs.
    assert_eq!(compared(&apart, &other[1..]).all.versus, None);
    assert_eq!(statistics(&sample(&apart), None, quick(1), "window").unwrap().all.versus, None);
}

#[test]
fn losses_that_are_not_finite_spoil_only_what_they_enter() {
    for bad in [f64::NAN, f64::INFINITY] {
        let mut documents = documents(30, 11);
        documents[3].nll = bad;
        documents[4].against.as_mut().unwrap().kl = bad;
        let statistics = of(&documents);
        let versus = versus(&statistics);
        let none = Estimate { value: None, low: None, high: None };
        assert_eq!((statistics.all.xent, statistics.all.bits_per_byte), (none, none));
        assert_eq!((versus.delta_xent, versus.kl.as_ref().unwrap().mean), (none, none));
        assert_eq!(versus.verdict, Verdict::NotFinite);
        assert!(versus.agreement.unwrap().low.is_some() && statistics.all.entropy.high.is_some());
        assert!(statistics.sentence().unwrap().contains("not finite"));
        assert!(!serde_json::to_string(&statistics).unwrap().contains("NaN"));
    }
}

#[test]
fn the_seed_decides_and_threads_do_not() {
    let documents = documents(120, 12);
    let names: Vec<String> = ["b", "a"].map(str::to_owned).into();
    let subset: Vec<_> = (0..120).map(|i| [Some(0), Some(1), None][i % 3]).collect();
    let sample = Sample { documents: &documents, subset: &subset, names: &names, kl: &[] };
    let run = |threads, seed| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let statistics = pool.install(|| statistics(&sample, None, quick(seed), "document"));
        serde_json::to_string(&statistics).unwrap()
    };
    let first = run(1, 5);
    assert_eq!(run(1, 5), first);
    assert_eq!(run(2, 5), first);
    assert_eq!(run(7, 5), first);
    assert_ne!(run(1, 6), first);
    // The stream is the same on every platform and with every version of the generator.
    let pinned: Statistics = serde_json::from_str(&first).unwrap();
    let low = pinned.all.xent.low.unwrap();
    assert!((low - 3.130_772_943_329).abs() < 1e-9, "{low}");
}

#[test]
fn subsets_stand_alone_and_average_with_equal_weight() {
    let documents = documents(100, 13);
    let names: Vec<String> = ["Wikipedia", "ArXiv", "FreeLaw", "Empty"].map(str::to_owned).into();
    let member = |i: usize| match i {
        0..60 => Some(0),
        60..90 => Some(1),
        90..95 => Some(2),
        _ => None,
    };
    let subset: Vec<_> = (0..100).map(member).collect();
    let sample = Sample { documents: &documents, subset: &subset, names: &names, kl: &[] };
    let statistics = statistics(&sample, None, quick(1), "document").unwrap();
    let seen: Vec<_> = statistics
        .subsets
        .iter()
        .map(|s| (s.subset.as_str(), s.figures.docs, s.too_few, s.figures.xent.low.is_some()))
        .collect();
    assert_eq!(
        seen,
        [
            ("ArXiv", 30, false, true),
            ("Empty", 0, true, false),
            ("FreeLaw", 5, true, false),
            ("Wikipedia", 60, false, true)
        ]
    );
    let part = |range: std::ops::Range<usize>| Metrics::new(&documents[range]).unwrap().xent;
    assert_eq!(statistics.subsets[0].figures.xent.value, Some(part(60..90)));
    let average = statistics.macro_average.as_ref().unwrap();
    is(average.xent, (part(0..60) + part(60..90) + part(90..95)) / 3.0);
    is(average.ppl, average.xent.value.unwrap().exp());
    assert_eq!((average.docs, statistics.all.docs), (95, 100));
    // A subset measured without the others has the same interval.
    let alone = Sample {
        documents: &documents[60..90],
        subset: &[Some(0); 30],
        names: &names[1..2],
        kl: &[],
    };
    let alone = super::statistics(&alone, None, quick(1), "document").unwrap();
    assert_eq!(alone.subsets[0], statistics.subsets[0]);
    // One document does not show how its subset varies.
    let mut lone = subset.clone();
    lone[91..95].fill(None);
    let sample = Sample { subset: &lone, ..sample };
    let lone = super::statistics(&sample, None, quick(1), "document").unwrap();
    let average = lone.macro_average.unwrap();
    assert!(average.xent.value.is_some() && average.xent.low.is_none());
}

#[test]
fn percentiles_are_numpys_and_the_histogram_counts_all() {
    let documents = documents(12, 14);
    let mut kl: Vec<Vec<f32>> = vec![Vec::new(); 12];
    kl[0] = (0..7).map(|i| i as f32).collect();
    kl[1] = vec![0.0, 1e-12, 1e-9, 0.5, 1e30];
    let divergence = |kl: &[Vec<f32>]| {
        let sample = Sample { kl, ..sample(&documents) };
        let statistics = statistics(&sample, None, quick(1), "document").unwrap();
        statistics.all.versus.unwrap().kl.unwrap()
    };
    let found = divergence(&kl);
    // numpy.percentile([0, 1, 2, 3, 4, 5, 6, 0, 1e-12, 1e-9, 0.5, 1e30], [50, 90]).
    assert_eq!((found.median, found.p90), (Some(1.5), Some(5.9)));
    assert_eq!(found.max, Some(f64::from(1e30f32)));
    assert_eq!(found.histogram.len(), HISTOGRAM_BINS);
    assert_eq!(found.histogram.iter().sum::<u64>(), 12);
    // 0, 0, 1e-12 and 1e-9: the first bin ends at 10^-8.75.
    assert_eq!(found.histogram[0], 4);
    // log10(0.5) = -0.301: bin 4 (9 - 0.301) = 34.8.
    assert_eq!((found.histogram[34], found.histogram[36]), (1, 1));
    assert_eq!(found.histogram[43], 1);
    kl[2] = vec![f32::INFINITY];
    let found = divergence(&kl);
    assert_eq!((found.median, found.max, found.p99), (Some(2.0), None, None));
    kl[3] = vec![f32::NAN];
    let found = divergence(&kl);
    assert_eq!((found.median, found.max), (None, None));
    assert_eq!(found.histogram.iter().sum::<u64>(), 13);
}

#[test]
fn sentences_show_both_distances_where_they_differ() {
    let statistics = of(&documents(30, 15));
    let say = |value, low, high| {
        let delta = Estimate { value: Some(value), low: Some(low), high: Some(high) };
        let comparison = Comparison {
            delta_xent: delta,
            verdict: Verdict::of(&delta),
            ..versus(&statistics).clone()
        };
        comparison.sentence(200, "document")
    };
    let tail = "nats a token (95 %, paired, 200 documents)";
    assert_eq!(say(0.0311, 0.0269, 0.0353), format!("worse by 0.0311 ± 0.0042 {tail}"));
    assert_eq!(say(-0.0311, -0.0353, -0.0269), format!("better by 0.0311 ± 0.0042 {tail}"));
    assert_eq!(say(0.6, 0.5, 0.9), format!("worse by 0.6000 (+0.3000 -0.1000) {tail}"));
    assert_eq!(say(-0.6, -0.9, -0.5), format!("better by 0.6000 (+0.3000 -0.1000) {tail}"));
    assert_eq!(
        say(-0.000_02, -0.000_05, 0.000_01),
        "no significant difference (-0.000020 ± 0.000030 nats a token, 95 %, paired, 200 documents)"
    );
}
