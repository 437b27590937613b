//! Scores of predicted tokens: negative log-likelihood, entropy, best token, divergence.
#![allow(unsafe_code)]

pub(crate) mod exact;

use crate::{
    cpu::{self, Kernels},
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

/// Logits that one task scores at least: few enough to balance, enough to hide a task's cost.
const LOGITS_PER_TASK: usize = 16_384;

/// Scores every row of `logits` [rows, vocab] against its label.
///
/// Every score is within 1e-6 of float64's, relatively, near-certain labels and nearly equal rows
/// included, but for what these floors allow:
/// - Less than 2^-125 of a row's largest probability may count as 0, so that nll and entropy may be
///   2^-118 short for every such token. A label's own logit always counts.
/// - kl is the sum in f64 as its definition writes it, which keeps an absolute 1e-13, where a logit
///   is above 20,000 or a largest one below -20,000, where a row's logits are some 700 apart, where this
///   row rules out (-inf) what the baseline does not, and where the baseline rules out the first 512
///   tokens or more that this row does not. Elsewhere tokens of less than 2^-125 are all that it lacks.
/// - What is less than 2^-126 is a subnormal f32, with its digits.
///
/// A logit of -inf has probability 0; kl is infinite where this row gives 0 to a token of at least
/// 2^-125 of the baseline's largest probability. A row with NaN or without any finite largest
/// logit scores NaN (entropy and kl too) with top1 -1, or the first +inf. The same row has the same
/// bits, whatever the threads.
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
    score(Some(cpu::kernels()), logits, labels, vocab, baseline, out, par)
}

/// [`token_scores`] by one variant of the kernels, or in f64 as the definitions write it where this
/// machine has none of that name (`exact`): for tests and benches.
///
/// # Errors
/// As there.
#[doc(hidden)]
pub fn token_scores_by(
    variant: &str,
    logits: Float<'_>,
    labels: &[i64],
    vocab: usize,
    baseline: Option<Float<'_>>,
    out: TokenScores<'_>,
    par: &dyn Parallel,
) -> Result<(), Error> {
    score(cpu::by_name(variant), logits, labels, vocab, baseline, out, par)
}

fn score(
    kernels: Option<&Kernels>,
    logits: Float<'_>,
    labels: &[i64],
    vocab: usize,
    baseline: Option<Float<'_>>,
    out: TokenScores<'_>,
    par: &dyn Parallel,
) -> Result<(), Error> {
    check(&logits, labels, vocab, baseline.as_ref(), &out)?;
    let rows = labels.len();
    let mut results = vec![RowScores::default(); rows];
    let per_task = (LOGITS_PER_TASK / vocab).max(1);
    let tasks: Vec<std::sync::Mutex<&mut [RowScores]>> =
        results.chunks_mut(per_task).map(std::sync::Mutex::new).collect();
    par.run(tasks.len(), &|task| {
        // Every task is run once, so the lock is never contended; a poisoned one is never read.
        let Ok(mut chunk) = tasks[task].lock() else { return };
        for (i, result) in chunk.iter_mut().enumerate() {
            let row = task * per_task + i;
            if labels[row] != MASKED {
                let this = logits.slice(row * vocab, vocab);
                let base = baseline.map(|b| b.slice(row * vocab, vocab));
                *result = score_row(kernels, this, base, labels[row] as usize);
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

/// Lengths and labels of a call.
fn check(
    logits: &Float<'_>,
    labels: &[i64],
    vocab: usize,
    baseline: Option<&Float<'_>>,
    out: &TokenScores<'_>,
) -> Result<(), Error> {
    let rows = labels.len();
    if vocab == 0 {
        return Err(Error::ZeroDimension("vocabulary"));
    }
    check_len("logits", logits.len(), rows.saturating_mul(vocab))?;
    check_len("nll", out.nll.len(), rows)?;
    check_len("entropy", out.entropy.len(), rows)?;
    check_len("top1", out.top1.len(), rows)?;
    if let Some(baseline) = baseline {
        check_len("baseline logits", baseline.len(), logits.len())?;
    }
    match (&out.baseline, baseline) {
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
    kernels: Option<&Kernels>,
    this: Float<'_>,
    base: Option<Float<'_>>,
    label: usize,
) -> RowScores {
    let mut scores = RowScores::default();
    let softmax = if let Some(base) = base {
        // SAFETY: the table of a variant is only handed out where `detect` says yes.
        let fast = kernels.and_then(|k| unsafe { (k.divergence)(&base, &this) });
        let both = fast.unwrap_or_else(|| exact::divergence(&base, &this));
        scores.baseline_nll = both.base.nll(base.get(label));
        scores.kl = both.kl;
        both.this
    } else {
        // SAFETY: as above.
        let fast = kernels.and_then(|k| unsafe { (k.softmax)(&this) });
        fast.unwrap_or_else(|| exact::softmax(&this))
    };
    scores.nll = softmax.nll(this.get(label));
    scores.entropy = softmax.entropy();
    scores.top1 = softmax.argmax;
    scores
}

/// One row's softmax in sums: everything relative to the largest logit, which the sums leave out.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Distribution {
    /// Largest logit; NaN in a row with NaN or without a finite one.
    pub max: f64,
    /// First index of it, -1 in a row with NaN.
    pub argmax: i64,
    /// Sum of exp(l - max) over the other logits.
    pub rest: f64,
    /// Sum of exp(l - max) * (l - max) over the other logits.
    pub weighted: f64,
}

impl Distribution {
    /// What a row without a finite largest logit has.
    pub(crate) fn undefined(argmax: i64) -> Self {
        Self { max: f64::NAN, argmax, rest: f64::NAN, weighted: f64::NAN }
    }

    /// ln of the sum of exp(l) over all logits.
    pub(crate) fn log_sum(&self) -> f64 {
        self.rest.ln_1p() + self.max
    }

    /// Both terms are positive, so nothing cancels.
    fn nll(&self, logit: f32) -> f64 {
        self.rest.ln_1p() + (self.max - f64::from(logit))
    }

    fn entropy(&self) -> f64 {
        self.rest.ln_1p() - self.weighted / (1.0 + self.rest)
    }
}

/// Two rows' softmaxes and KL(base || this) in nats.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Divergence {
    pub base: Distribution,
    pub this: Distribution,
    pub kl: f64,
}
