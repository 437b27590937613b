//! Scores of predicted tokens: negative log-likelihood, entropy, best token, divergence.
#![allow(unsafe_code)]

use crate::{
    cpu,
    error::{Error, check_len},
    parallel::Parallel,
    tensor::Float,
};

/// Label of a position that scores nothing.
pub const MASKED: i64 = -100;

/// What [`token_scores`] writes, one value a row; all are 0 where the label is [`MASKED`].
#[derive(Debug)]
pub struct TokenScores<'a> {
    /// Negative log-likelihood of the label, in nats.
    pub nll: &'a mut [f32],
    /// Entropy of the predicted distribution, in nats.
    pub entropy: &'a mut [f32],
    /// First token of the largest logit; -1 in a row with NaN.
    pub top1: &'a mut [i64],
    /// Against a baseline, when there is one.
    pub baseline: Option<BaselineScores<'a>>,
}

/// The further outputs when baseline logits are given.
#[derive(Debug)]
pub struct BaselineScores<'a> {
    /// Kullback-Leibler divergence of this distribution from the baseline's, KL(baseline || this),
    /// in nats.
    pub kl: &'a mut [f32],
    /// Negative log-likelihood of the label under the baseline, in nats.
    pub nll: &'a mut [f32],
}

/// Rows that one task scores: few enough to balance, enough to hide a task's cost.
const ROWS_PER_TASK: usize = 4;
/// Logits widened at a time; small enough for the stack and the first cache level.
const CHUNK: usize = 512;

/// Scores every row of `logits` [rows, vocab] against its label.
///
/// Sums run in f64, so that nll is within 1e-6 of float64's, relatively. A logit of -inf has
/// probability 0. A row with NaN or without any finite largest logit scores NaN (entropy and kl
/// too) with top1 -1, or the first +inf.
///
/// # Errors
/// [`Error::Label`] for a label outside the vocabulary other than [`MASKED`], and lengths that do
/// not fit: `rows` is the number of labels.
pub fn token_scores(
    logits: Float<'_>,
    labels: &[i64],
    vocab: usize,
    baseline: Option<Float<'_>>,
    out: TokenScores<'_>,
    par: &dyn Parallel,
) -> Result<(), Error> {
    let rows = labels.len();
    if vocab == 0 {
        return Err(Error::ZeroDimension("vocabulary"));
    }
    check_len("logits", logits.len(), rows.saturating_mul(vocab))?;
    check_len("nll", out.nll.len(), rows)?;
    check_len("entropy", out.entropy.len(), rows)?;
    check_len("top1", out.top1.len(), rows)?;
    if let Some(baseline) = &baseline {
        check_len("baseline logits", baseline.len(), logits.len())?;
    }
    match (&out.baseline, &baseline) {
        (Some(b), Some(_)) => {
            check_len("kl", b.kl.len(), rows)?;
            check_len("baseline nll", b.nll.len(), rows)?;
        }
        (Some(b), None) => check_len("kl without baseline logits", b.kl.len(), 0)?,
        (None, _) => {}
    }
    for (row, &label) in labels.iter().enumerate() {
        if label != MASKED && usize::try_from(label).map_or(true, |label| label >= vocab) {
            return Err(Error::Label { row, label, vocab });
        }
    }
    let mut results = vec![RowScores::default(); rows];
    let tasks: Vec<std::sync::Mutex<&mut [RowScores]>> =
        results.chunks_mut(ROWS_PER_TASK).map(std::sync::Mutex::new).collect();
    par.run(tasks.len(), &|task| {
        // Every task is run once, so the lock is never contended; a poisoned one is never read.
        let Ok(mut chunk) = tasks[task].lock() else { return };
        for (i, result) in chunk.iter_mut().enumerate() {
            let row = task * ROWS_PER_TASK + i;
            if labels[row] != MASKED {
                *result = score_row(&logits, baseline.as_ref(), row, vocab, labels[row] as usize);
            }
        }
    });
    drop(tasks);
    for (row, r) in results.iter().enumerate() {
        out.nll[row] = r.nll as f32;
        out.entropy[row] = r.entropy as f32;
        out.top1[row] = r.top1;
    }
    if let (Some(b), Some(_)) = (out.baseline, baseline) {
        for (row, r) in results.iter().enumerate() {
            b.kl[row] = r.kl as f32;
            b.nll[row] = r.baseline_nll as f32;
        }
    }
    Ok(())
}

/// The scores of one row, before rounding to f32; zeros where masked.
#[derive(Debug, Clone, Copy, Default)]
struct RowScores {
    nll: f64,
    entropy: f64,
    top1: i64,
    kl: f64,
    baseline_nll: f64,
}

fn score_row(
    logits: &Float<'_>,
    baseline: Option<&Float<'_>>,
    row: usize,
    vocab: usize,
    label: usize,
) -> RowScores {
    let this = Distribution::of(logits, row, vocab);
    let mut scores = RowScores {
        nll: this.log_sum - (f64::from(logits.get(row * vocab + label)) - this.max),
        entropy: this.log_sum - this.weighted / this.sum,
        top1: this.argmax,
        ..RowScores::default()
    };
    if let Some(baseline) = baseline {
        let base = Distribution::of(baseline, row, vocab);
        let at = row * vocab + label;
        scores.baseline_nll = base.log_sum - (f64::from(baseline.get(at)) - base.max);
        scores.kl = divergence(&base, baseline, &this, logits, row, vocab);
    }
    scores
}

/// One row's softmax in sums: everything relative to the largest logit.
struct Distribution {
    /// Largest logit; NaN in a row with NaN.
    max: f64,
    /// First index of it, -1 in a row with NaN.
    argmax: i64,
    /// Sum of exp(l - max).
    sum: f64,
    /// Sum of exp(l - max) * (l - max).
    weighted: f64,
    /// ln of `sum`.
    log_sum: f64,
}

impl Distribution {
    fn of(logits: &Float<'_>, row: usize, vocab: usize) -> Self {
        let mut buffer = [0.0_f32; CHUNK];
        let (mut max, mut argmax, mut nan) = (f32::NEG_INFINITY, 0, false);
        for_chunks(vocab, |start, len| {
            let values = &mut buffer[..len];
            logits.load(row * vocab + start, values);
            let mut chunk_max = f32::NEG_INFINITY;
            let mut chunk_nan = false;
            for &v in &*values {
                chunk_max = if v > chunk_max { v } else { chunk_max };
                chunk_nan |= v.is_nan();
            }
            nan |= chunk_nan;
            if chunk_max > max {
                max = chunk_max;
                argmax = start + values.iter().position(|&v| v == chunk_max).unwrap_or(0);
            }
        });
        if nan {
            let n = f64::NAN;
            return Self { max: n, argmax: -1, sum: n, weighted: n, log_sum: n };
        }
        let max = f64::from(max);
        let (mut sum, mut weighted) = (0.0, 0.0);
        for_chunks(vocab, |start, len| {
            let values = &mut buffer[..len];
            logits.load(row * vocab + start, values);
            // SAFETY: the table of a variant is only handed out where `detect` says yes.
            let (s, w) = unsafe { (cpu::kernels().softmax_sums)(values, max) };
            sum += s;
            weighted += w;
        });
        Self { max, argmax: argmax as i64, sum, weighted, log_sum: sum.ln() }
    }
}

/// KL(base || this) of one row, in nats.
fn divergence(
    base: &Distribution,
    base_logits: &Float<'_>,
    this: &Distribution,
    logits: &Float<'_>,
    row: usize,
    vocab: usize,
) -> f64 {
    let mut total = 0.0;
    let (mut a, mut b) = ([0.0_f32; CHUNK], [0.0_f32; CHUNK]);
    for_chunks(vocab, |start, len| {
        base_logits.load(row * vocab + start, &mut a[..len]);
        logits.load(row * vocab + start, &mut b[..len]);
        // SAFETY: the table of a variant is only handed out where `detect` says yes.
        total +=
            unsafe { (cpu::kernels().divergence_sum)(&a[..len], &b[..len], base.max, this.max) };
    });
    let kl = total / base.sum - base.log_sum + this.log_sum;
    // Rounding can leave -1e-17 where the distributions agree; NaN stays.
    if kl < 0.0 { 0.0 } else { kl }
}

/// Independent sums, so that additions overlap; always joined in the same order.
const LANES: usize = 8;

/// Sums of p and p * d over d = value - max, p = exp(d). Compiled once for each variant.
#[inline(always)]
pub(crate) fn softmax_sums(values: &[f32], max: f64) -> (f64, f64) {
    let (mut sums, mut weights) = ([0.0; LANES], [0.0; LANES]);
    let mut add = |i: usize, v: f32| {
        let d = f64::from(v) - max;
        let p = exp_negative(d);
        sums[i] += p;
        // -inf has probability 0 and adds nothing, where 0 * -inf would be NaN.
        weights[i] += p * if d < -800.0 { 0.0 } else { d };
    };
    let (chunks, tail) = values.as_chunks::<LANES>();
    for lanes in chunks {
        for (i, &v) in lanes.iter().enumerate() {
            add(i, v);
        }
    }
    for (i, &v) in tail.iter().enumerate() {
        add(i, v);
    }
    (sums.iter().sum(), weights.iter().sum())
}

/// Sum of p * (da - db) with p = exp(da): `a` the baseline's logits, `b` the others, each relative
/// to its row's largest. Compiled once for each variant.
#[inline(always)]
pub(crate) fn divergence_sum(a: &[f32], b: &[f32], max_a: f64, max_b: f64) -> f64 {
    let mut sums = [0.0; LANES];
    let mut add = |i: usize, a: f32, b: f32| {
        let (da, db) = (f64::from(a) - max_a, f64::from(b) - max_b);
        let p = exp_negative(da);
        let term = p * (da - db);
        sums[i] += if p == 0.0 { 0.0 } else { term };
    };
    let ((a, a_tail), (b, b_tail)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in a.iter().zip(b) {
        for (i, (&a, &b)) in a.iter().zip(b).enumerate() {
            add(i, a, b);
        }
    }
    for (i, (&a, &b)) in a_tail.iter().zip(b_tail).enumerate() {
        add(i, a, b);
    }
    sums.iter().sum()
}

/// Calls `f(start, len)` for consecutive chunks of `0..total`.
fn for_chunks(total: usize, mut f: impl FnMut(usize, usize)) {
    for start in (0..total).step_by(CHUNK) {
        f(start, CHUNK.min(total - start));
    }
}

/// exp(d) for d <= 0 within 1e-13, relatively; 0 below -700 and NaN for NaN. Branch-free, so that
/// the compiler can use vectors.
#[inline(always)]
fn exp_negative(d: f64) -> f64 {
    const MAGIC: f64 = 6_755_399_441_055_744.0; // 1.5 * 2^52: adding it rounds to an integer
    // ln 2 in two parts: the first has trailing zeros, so n * LN2_HIGH is exact.
    const LN2_HIGH: f64 = 0.693_147_180_369_123_8;
    const LN2_LOW: f64 = 1.908_214_929_270_587_7e-10;
    let clamped = if d < -700.0 { -700.0 } else { d };
    let shifted = clamped * std::f64::consts::LOG2_E + MAGIC;
    let n = shifted - MAGIC;
    let r = (clamped - n * LN2_HIGH) - n * LN2_LOW;
    // Taylor to degree 11 on |r| <= 0.347: the remainder is below 1e-14.
    let mut p = 1.0 / 39_916_800.0;
    for c in [
        1.0 / 3_628_800.0,
        1.0 / 362_880.0,
        1.0 / 40_320.0,
        1.0 / 5_040.0,
        1.0 / 720.0,
        1.0 / 120.0,
        1.0 / 24.0,
        1.0 / 6.0,
        0.5,
        1.0,
        1.0,
    ] {
        p = p * r + c;
    }
    let power = f64::from_bits(shifted.to_bits().wrapping_add(1023) << 52);
    if d < -700.0 { 0.0 } else { p * power }
}
