//! `token_scores` against sums in f64 as the definitions write them.

use half::{bf16, f16};
use mx_kernels::{
    BaselineScores, Error, Float, Parallel, Serial, StdThreads, TokenScores,
    scores::token_scores_by, token_scores,
};

use crate::common::{Guarded, Random, variants};

#[derive(Debug, Clone, PartialEq)]
struct Scores {
    nll: Vec<f32>,
    entropy: Vec<f32>,
    top1: Vec<i64>,
    kl: Vec<f32>,
    baseline_nll: Vec<f32>,
}

fn run(
    logits: Float<'_>,
    labels: &[i64],
    vocab: usize,
    baseline: Option<Float<'_>>,
    par: &dyn Parallel,
) -> Result<Scores, Error> {
    run_by(None, logits, labels, vocab, baseline, par)
}

/// By a variant, by f64 (`exact`), or by what the machine takes.
fn run_by(
    variant: Option<&str>,
    logits: Float<'_>,
    labels: &[i64],
    vocab: usize,
    baseline: Option<Float<'_>>,
    par: &dyn Parallel,
) -> Result<Scores, Error> {
    let rows = labels.len();
    let mut s = Scores {
        nll: vec![9.0; rows],
        entropy: vec![9.0; rows],
        top1: vec![9; rows],
        kl: vec![9.0; rows],
        baseline_nll: vec![9.0; rows],
    };
    let with =
        baseline.is_some().then_some(BaselineScores { kl: &mut s.kl, nll: &mut s.baseline_nll });
    let out =
        TokenScores { nll: &mut s.nll, entropy: &mut s.entropy, top1: &mut s.top1, baseline: with };
    match variant {
        Some(variant) => token_scores_by(variant, logits, labels, vocab, baseline, out, par)?,
        None => token_scores(logits, labels, vocab, baseline, out, par)?,
    }
    Ok(s)
}

/// ln p of every token, by definition.
fn log_softmax(row: &[f32]) -> Vec<f64> {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = row.iter().map(|&v| (f64::from(v) - f64::from(max)).exp()).sum();
    row.iter().map(|&v| f64::from(v) - f64::from(max) - sum.ln()).collect()
}

fn assert_near(got: f32, want: f64, what: &str) {
    let bound = 1e-6 * want.abs() + 1e-9;
    assert!((f64::from(got) - want).abs() <= bound, "{what}: {got:e}, not {want:e}");
}

#[test]
fn agrees_with_the_definitions() {
    let mut random = Random(11);
    for (vocab, spread) in [(1, 1.0), (2, 30.0), (7, 0.0), (512, 3.0), (1000, 20.0), (150_001, 8.0)]
    {
        let rows = if vocab > 10_000 { 2 } else { 9 };
        let mut draw = |scale: f32| -> Vec<f32> {
            (0..rows * vocab).map(|_| random.normal() * scale).collect()
        };
        let (mut a, b) = (draw(spread), draw(spread));
        if vocab > 4 {
            a[1] = f32::NEG_INFINITY;
        }
        let labels: Vec<i64> = (0..rows).map(|_| random.below(vocab) as i64).collect();
        let (a, b, labels) = (Guarded::new(&a), Guarded::new(&b), Guarded::new(&labels));
        let (a, b, labels) = (a.get(), b.get(), labels.get());
        // The other way round than above: b as the model, a (with -inf) as its baseline.
        let base = Some(Float::F32(a));
        let s = run(Float::F32(b), labels, vocab, base, &StdThreads(2)).unwrap();
        for r in 0..rows {
            let (p, q) =
                (log_softmax(&b[r * vocab..][..vocab]), log_softmax(&a[r * vocab..][..vocab]));
            let label = labels[r] as usize;
            let plogp = |l: &f64| if *l == f64::NEG_INFINITY { 0.0 } else { l.exp() * l };
            assert_near(s.nll[r], -p[label], "nll");
            assert_near(s.entropy[r], -p.iter().map(plogp).sum::<f64>(), "entropy");
            if q[label] == f64::NEG_INFINITY {
                assert_eq!(s.baseline_nll[r], f32::INFINITY);
            } else {
                assert_near(s.baseline_nll[r], -q[label], "baseline nll");
            }
            let term = |(q, p): (&f64, &f64)| if q.is_finite() { q.exp() * (q - p) } else { 0.0 };
            assert_near(s.kl[r], q.iter().zip(&p).map(term).sum(), "kl");
            let row = &b[r * vocab..][..vocab];
            let best = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            assert_eq!(s.top1[r], row.iter().position(|&v| v == best).unwrap() as i64);
        }
        let serial = run(Float::F32(b), labels, vocab, base, &Serial).unwrap();
        assert_eq!(s, serial, "the same bits, whatever the threads");
    }
}

#[test]
fn confident_predictions_keep_their_digits() {
    for gap in [5.0_f32, 12.3, 17.0, 30.0, 80.0] {
        let logits = [1000.7 + gap, 1000.7];
        let s = run(Float::F32(&logits), &[0], 2, None, &Serial).unwrap();
        let d = f64::from(logits[0]) - f64::from(logits[1]);
        let want = (-d).exp().ln_1p();
        let got = f64::from(s.nll[0]);
        // ln(1 + e) in f64 keeps an absolute 2^-53.
        assert!((got - want).abs() <= 1e-6 * want + 2.3e-16, "{gap}: {got:e}, not {want:e}");
    }
}

#[test]
fn masked_rows_infinities_and_nan() {
    let (inf, nan) = (f32::INFINITY, f32::NAN);
    #[rustfmt::skip]
    let logits = [
        1.0, 2.0, 2.0,
        -inf, 0.0, -inf,
        nan, 1.0, 2.0,
        nan, nan, nan,
        -inf, -inf, -inf,
        0.0, -inf, 0.0,
    ];
    let labels = [-100, 1, 1, -100, 0, 1];
    let s = run(Float::F32(&logits), &labels, 3, Some(Float::F32(&logits)), &Serial).unwrap();
    assert_eq!((s.nll[0], s.entropy[0], s.top1[0], s.kl[0]), (0.0, 0.0, 0, 0.0));
    assert_eq!((s.nll[1], s.entropy[1], s.top1[1], s.kl[1]), (0.0, 0.0, 1, 0.0));
    assert!(s.nll[2].is_nan() && s.entropy[2].is_nan() && s.kl[2].is_nan());
    assert_eq!(s.top1[2], -1);
    assert_eq!((s.nll[3], s.top1[3], s.baseline_nll[3]), (0.0, 0, 0.0));
    assert!(s.nll[4].is_nan());
    assert_eq!(s.nll[5], inf);
    assert_near(s.entropy[5], 2f64.ln(), "entropy");
    // The baseline expects what this model rules out.
    let base = [0.0, 0.0, 0.0];
    let this = [0.0, -inf, 0.0];
    let s = run(Float::F32(&this), &[0], 3, Some(Float::F32(&base)), &Serial).unwrap();
    assert_eq!(s.kl[0], inf);
}

#[test]
fn half_types_are_widened_exactly() {
    let mut random = Random(12);
    let values = random.normals(5 * 70);
    let labels = [0, 69, 3, -100, 8];
    let half: Vec<f16> = values.iter().map(|&v| f16::from_f32(v * 9.0)).collect();
    let wide: Vec<f32> = half.iter().map(|v| v.to_f32()).collect();
    let a = run(Float::F16(&half), &labels, 70, Some(Float::F32(&wide)), &Serial).unwrap();
    let b = run(Float::F32(&wide), &labels, 70, Some(Float::F16(&half)), &Serial).unwrap();
    assert_eq!(a, b);
    assert_eq!(a.kl, [0.0; 5]);
    let half: Vec<bf16> = values.iter().map(|&v| bf16::from_f32(v * 9.0)).collect();
    let wide: Vec<f32> = half.iter().map(|v| v.to_f32()).collect();
    let a = run(Float::Bf16(&half), &labels, 70, None, &Serial).unwrap();
    assert_eq!(a, run(Float::F32(&wide), &labels, 70, None, &Serial).unwrap());
}

#[test]
fn bad_labels_and_shapes_are_errors() {
    let logits = [0.0_f32; 12];
    let bad = |labels: &[i64]| run(Float::F32(&logits), labels, 4, None, &Serial);
    assert_eq!(bad(&[0, 4, 0]), Err(Error::Label { row: 1, label: 4, vocab: 4 }));
    assert_eq!(bad(&[0, 0, -1]), Err(Error::Label { row: 2, label: -1, vocab: 4 }));
    assert_eq!(bad(&[i64::MIN, 0, 0]), Err(Error::Label { row: 0, label: i64::MIN, vocab: 4 }));
    assert!(matches!(bad(&[0, 0]), Err(Error::Length { what: "logits", .. })));
    assert!(bad(&[0, 3, -100]).is_ok());
    let none = run(Float::F32(&[]), &[], 4, None, &Serial).unwrap();
    assert!(none.nll.is_empty());
    assert!(run(Float::F32(&[]), &[], 0, None, &Serial).is_err());
}

/// What nll and entropy may lack: 2^-118 for each token of less than 2^-125 of the largest probability,
/// and half a subnormal f32. One value a row.
fn floors(logits: &[f32], vocab: usize) -> Vec<f64> {
    let floor = |row: &[f32]| {
        let max = f64::from(row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        let counts = -125.0 * std::f64::consts::LN_2;
        let small = |v: &&f32| v.is_finite() && f64::from(**v) - max < counts;
        row.iter().filter(small).count() as f64 * 2f64.powi(-118) + 1e-45
    };
    logits.chunks(vocab).map(floor).collect()
}

fn assert_all_near(got: &[f32], want: &[f32], floors: &[f64], what: &str) {
    for (row, ((&got, &want), &floor)) in got.iter().zip(want).zip(floors).enumerate() {
        if want.is_finite() {
            assert_near_by(got, f64::from(want), floor, &format!("{what} of row {row}"));
        } else {
            assert!(got == want || (got.is_nan() && want.is_nan()), "{what} {row}: {got} {want}");
        }
    }
}

/// Both sides are rounded to f32.
fn assert_near_by(got: f32, want: f64, floor: f64, what: &str) {
    let error = (f64::from(got) - want).abs();
    let bound = 1.06e-6 * want.abs() + floor;
    assert!(error <= bound, "{what}: {got:e}, not {want:e}, off by {:e}", error / want.abs());
}

/// Every variant against f64, one shape of data.
fn assert_variants(logits: &[f32], base: &[f32], labels: &[i64], vocab: usize, what: &str) {
    let (tiny, base_tiny) = (floors(logits, vocab), floors(base, vocab));
    for variant in variants() {
        let (logits, base) = (Float::F32(logits), Some(Float::F32(base)));
        let by = |v, base| run_by(Some(v), logits, labels, vocab, base, &Serial).unwrap();
        let (got, want) = (by(variant, base), by("exact", base));
        let what = format!("{variant}, {what}");
        assert_all_near(&got.nll, &want.nll, &tiny, &format!("{what}: nll"));
        assert_all_near(&got.entropy, &want.entropy, &tiny, &format!("{what}: entropy"));
        assert_eq!(got.top1, want.top1, "{what}");
        // The definition cancels in f64.
        assert_all_near(&got.kl, &want.kl, &vec![1e-13; labels.len()], &format!("{what}: kl"));
        let of_base = (&got.baseline_nll, &want.baseline_nll);
        assert_all_near(of_base.0, of_base.1, &base_tiny, &format!("{what}: baseline nll"));
        // Without a baseline another kernel runs: the same scores within rounding.
        let alone = by(variant, None);
        assert_all_near(&alone.nll, &want.nll, &tiny, &format!("{what}: nll alone"));
        assert_all_near(&alone.entropy, &want.entropy, &tiny, &format!("{what}: entropy alone"));
        assert_eq!(alone.top1, want.top1, "{what}");
    }
}

#[test]
fn variants_agree_with_f64() {
    let mut random = Random(13);
    for vocab in [1, 2, 15, 16, 17, 255, 256, 257, 1000, 32_000, 50_257, 151_936] {
        for (spread, offset) in [(0.0, 3.0), (1.0, 0.0), (3.0, -20.0), (8.0, 15.0), (40.0, 1000.0)]
        {
            let rows = if vocab > 10_000 { 2 } else { 5 };
            let len = rows * vocab;
            let mut logits: Vec<f32> =
                (0..len).map(|_| random.normal() * spread + offset).collect();
            // Some tokens are ruled out by this row, by both, or (below) by the baseline.
            let mut ruled_out: Vec<usize> = (0..len / 7).map(|_| random.below(len)).collect();
            let only_base = ruled_out.split_off(len / 12);
            if vocab % 2 == 0 {
                ruled_out.iter().for_each(|&i| logits[i] = f32::NEG_INFINITY);
            }
            for noise in [0.001, 0.03, 1.0, 30.0] {
                let mut base: Vec<f32> =
                    logits.iter().map(|v| v + random.normal() * noise).collect();
                only_base.iter().for_each(|&i| base[i] = f32::NEG_INFINITY);
                let labels: Vec<i64> = (0..rows).map(|_| random.below(vocab) as i64).collect();
                let what = format!("vocabulary {vocab}, spread {spread}, noise {noise}");
                assert_variants(&logits, &base, &labels, vocab, &what);
            }
        }
    }
}

#[test]
fn near_certain_labels_of_large_vocabularies() {
    let vocab = 151_936;
    for gap in [9.0_f32, 17.0, 25.0, 40.0, 70.0] {
        // A tail of equal terms rounds the same way in every lane; then one that is not equal.
        for noise in [0.0, 0.7] {
            let mut random = Random(14);
            let mut logits: Vec<f32> = (0..vocab).map(|_| noise * random.normal()).collect();
            let best = 100_003;
            logits[best] = gap;
            let base: Vec<f32> = logits.iter().map(|v| v + 0.02 * random.normal()).collect();
            let what = format!("gap {gap}, noise {noise}");
            assert_variants(&logits, &base, &[best as i64], vocab, &what);
            let half: Vec<f16> = logits.iter().map(|&v| f16::from_f32(v)).collect();
            let tiny = floors(&logits, vocab);
            for variant in variants() {
                let by = |v, l| run_by(Some(v), l, &[best as i64], vocab, None, &Serial).unwrap();
                let (got, want) = (by(variant, Float::F16(&half)), by("exact", Float::F16(&half)));
                assert_all_near(&got.nll, &want.nll, &tiny, &format!("{variant}, f16, {what}"));
            }
        }
    }
}

fn best(row: &[f32]) -> i64 {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    row.iter().position(|&v| v == max).unwrap_or(0) as i64
}

#[test]
fn extremes_are_those_of_f64() {
    let (inf, nan) = (f32::INFINITY, f32::NAN);
    let vocab = 1300;
    // What is put where in a row of zeros; chunk borders and the tail among the places.
    let cases: [&[(usize, f32)]; 12] = [
        &[(5, 3e38), (700, -3e38)],
        &[(1299, 2e4), (0, 1.9999e4)],
        &[(511, 2.1e4), (512, 2.1e4)],
        &[(512, inf), (600, inf)],
        &[(512, inf), (1299, nan)],
        &[(0, nan)],
        &[(1298, nan), (0, 50.0)],
        &[(3, -inf), (1024, -3e38), (9, -1e5)],
        &[(1024, 80.0), (1025, 12.0), (1026, 12.4)],
        &[(1024, 87.0), (3, 86.0)],
        &[(1, 1e-40), (2, -1e-40)],
        &[(7, -1e30), (1299, 4.0)],
    ];
    for (i, case) in cases.iter().enumerate() {
        for (j, other) in cases.iter().enumerate() {
            let row = |places: &[(usize, f32)]| {
                let mut row = vec![0.0; vocab];
                places.iter().for_each(|&(at, v)| row[at] = v);
                row
            };
            let (this, base) = (row(case), row(other));
            // A token that is like most, and each row's best: tiny likelihoods.
            for label in [600, best(&this), best(&base)] {
                let what = format!("cases {i} and {j}, label {label}");
                assert_variants(&this, &base, &[label], vocab, &what);
            }
        }
        let nothing = vec![-inf; vocab];
        let mut row = nothing.clone();
        case.iter().for_each(|&(at, v)| row[at] = v);
        assert_variants(&row, &nothing, &[600], vocab, &format!("case {i}, nothing else"));
        assert_variants(&nothing, &row, &[600], vocab, &format!("case {i} against nothing"));
    }
}
