//! Scores of a row in f64, as the definitions write them: what the fast kernels are held against, and
//! what takes over where they give up (logits past 20,000, infinities of one row, NaN).

use super::{Distribution, Divergence};
use crate::tensor::Float;

/// Softmax of a row.
pub(crate) fn softmax(row: &Float<'_>) -> Distribution {
    let (mut max, mut at, mut nan) = (f32::NEG_INFINITY, 0, false);
    for i in 0..row.len() {
        let v = row.get(i);
        nan |= v.is_nan();
        if v > max {
            (max, at) = (v, i);
        }
    }
    if nan {
        return Distribution::undefined(-1);
    }
    if max.is_infinite() {
        return Distribution::undefined(at as i64);
    }
    let max = f64::from(max);
    let (mut rest, mut weighted) = (0.0, 0.0);
    for i in (0..row.len()).filter(|&i| i != at) {
        let d = f64::from(row.get(i)) - max;
        let p = d.exp();
        rest += p;
        // -inf has probability 0 and adds nothing, where 0 * -inf would be NaN.
        weighted += if p == 0.0 { 0.0 } else { p * d };
    }
    Distribution { max, argmax: at as i64, rest, weighted }
}

/// ln of the share of the baseline's largest probability below which a token counts as 0 in the
/// divergence, even where this row rules it out. The fast kernels see every token from here up.
const COUNTS: f64 = -125.0 * std::f64::consts::LN_2;

/// Softmax of both rows and KL(base || this).
pub(crate) fn divergence(base: &Float<'_>, this: &Float<'_>) -> Divergence {
    let (b, t) = (softmax(base), softmax(this));
    let mut total = 0.0;
    for i in 0..base.len() {
        let (db, dt) = (f64::from(base.get(i)) - b.max, f64::from(this.get(i)) - t.max);
        total += if db < COUNTS { 0.0 } else { db.exp() * (db - dt) };
    }
    let kl = total / (1.0 + b.rest) - b.rest.ln_1p() + t.rest.ln_1p();
    Divergence { base: b, this: t, kl: not_negative(kl) }
}

/// Rounding can leave -1e-17 where the distributions agree; NaN stays.
pub(crate) fn not_negative(kl: f64) -> f64 {
    if kl < 0.0 { 0.0 } else { kl }
}
