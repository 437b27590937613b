//! The sums of the divergence.
//!
//! With q the baseline's probabilities and d = v - base - c, for any c,
//! KL = ln(1 + A + B) - B where A = sum of q * (exp(d) - 1 - d), B = sum of q * d.
//! Every term of A is positive, so that nearly equal rows keep their digits when c is near the mean
//! of v - base. It is the mean of what has been seen, taken anew whenever the weight has doubled: what
//! is added under one c weighs no more than what that c is the mean of, so that A is never more than
//! about twice what it would be with the mean of all. A chunk that weighs more than all before has its
//! own mean taken first.
#![allow(unsafe_code)]

use std::f64::consts::LN_2;

use crate::cpu::{
    lanes::Lanes,
    softmax::{CHUNK, Softmax, drift},
};

/// Logits whose terms are added in f32: few, for where they are equal f32 errs the same way each time.
const PART: usize = 128;

/// How far apart a row's logits may be for the sums to be turned from one c to another.
const FAR: f64 = 690.0;

/// A and B so far, relative to the baseline's best token, whose own terms are added at the end.
pub(super) struct Cross {
    pub(super) c: f32,
    /// What turns this row's exponential into the baseline's times exp(d).
    ratio: f32,
    /// This row's logit at the baseline's best token.
    pub(super) at_best: f32,
    /// c is so large beside the spread of d that v - base may not be rounded before c is subtracted.
    pub(super) offset: bool,
    pub(super) a: f64,
    pub(super) b: f64,
    open_a: [f64; 16],
    open_b: [f64; 16],
    /// Weight of what was added since c was chosen, and how much may be.
    pub(super) since: f64,
    pub(super) limit: f64,
}

/// exp(d) - 1 - d.
pub(super) fn excess(d: f64) -> f64 {
    d.exp_m1() - d
}

impl Cross {
    pub(super) fn new() -> Self {
        Self {
            c: 0.0,
            ratio: 1.0,
            at_best: 0.0,
            offset: false,
            a: 0.0,
            b: 0.0,
            open_a: [0.0; 16],
            open_b: [0.0; 16],
            since: 0.0,
            limit: 0.0,
        }
    }

    /// Closes the open sums, which are relative to `unit`. `None` where this row rules out a token that
    /// the baseline does not: whether it still counts beside a later, larger logit is not known here.
    pub(super) fn close(&mut self, unit: f64) -> Option<()> {
        let a: f64 = self.open_a.iter().sum();
        let b: f64 = self.open_b.iter().sum();
        self.open_a = [0.0; 16];
        self.open_b = [0.0; 16];
        self.a += unit * a;
        self.b += unit * b;
        (a.is_finite() && b.is_finite()).then_some(())
    }

    /// d of the baseline's best token.
    pub(super) fn best(&self, base: &Softmax) -> f64 {
        f64::from(self.at_best) - f64::from(base.max) - f64::from(self.c)
    }

    /// The best token becomes one of the others of a token that is -`shift` better.
    pub(super) fn fall(&mut self, best: f64, shift: f64) -> Option<()> {
        let factor = shift.exp();
        self.a = factor * (self.a + excess(best));
        self.b = factor * (self.b + best);
        // The baseline has next to nothing here now, but this row may.
        (shift > -FAR).then_some(())
    }

    /// Chooses c: the mean of v - base of all that is closed and, if it is given, of a chunk of this
    /// weight and this sum of q * (v - base).
    pub(super) fn recentre<L: Lanes>(
        &mut self,
        chunk: Option<(f64, f64)>,
        base: &Softmax,
        this: &Softmax,
    ) -> Option<()> {
        let (m_base, m_this) = (f64::from(base.max), f64::from(this.reference.max));
        let (old, all) = (f64::from(self.c), 1.0 + base.rest);
        let mut mean = old + (self.b + self.best(base)) / all;
        (self.limit, self.since) = (all, 0.0);
        if let Some((weight, sum)) = chunk {
            mean = (mean * all + sum) / (all + weight);
            self.limit = all + weight;
        }
        if !mean.is_finite() {
            return None;
        }
        // No further from this row's best token than exp(30): `ratio` must fit an f32.
        self.c = mean.max(m_this - m_base - 30.0) as f32;
        let c = f64::from(self.c);
        let up = c - old;
        if base.rest > 0.0 || self.a > 0.0 {
            if up.abs() > FAR {
                return None;
            }
            let less = (-up).exp_m1();
            self.a = self.a * (1.0 + less) + base.rest * excess(-up) + self.b * less;
            self.b -= up * base.rest;
        }
        let spread = 2.0 * (self.a + excess(self.best(base))) / all;
        self.offset = chunk.is_some() || c * c > spread;
        let between = (this.reference.n - base.reference.n) * LN_2;
        self.ratio = (between - c * (1.0 + drift::<L>())).exp() as f32;
        Some(())
    }

    /// Adds the terms of a chunk; with `OFFSET` not even v - base is rounded.
    ///
    /// # Safety
    /// Only on a machine with the instructions of `L`; the four hold [`CHUNK`] values.
    #[inline(always)]
    pub(super) unsafe fn add<L: Lanes, const OFFSET: bool>(
        &mut self,
        base: *const f32,
        this: *const f32,
        p_base: *const f32,
        p_this: *const f32,
    ) {
        for part in (0..CHUNK).step_by(PART) {
            // SAFETY: offsets stay below CHUNK, which the caller vouches for.
            unsafe {
                let (mut a, mut b) = (L::splat(0.0), L::splat(0.0));
                let (c, ratio, minus) = (L::splat(self.c), L::splat(self.ratio), L::splat(-1.0));
                for i in (part..part + PART).step_by(L::N) {
                    let (q, p) = (L::load(p_base.add(i)), L::load(p_this.add(i)));
                    let d = difference::<L, OFFSET>(L::load(this.add(i)), L::load(base.add(i)), c);
                    // Where the baseline has no probability, d can be anything, and `far` is what counts.
                    let qd = L::where_positive(q, L::mul(q, d));
                    // (exp(d) - 1 - d) / d^2, by powers of d^2: half the chain of one power after another.
                    let k = |i: usize| L::splat(NEAR[i]);
                    let dd = L::mul(d, d);
                    let high = L::fma(dd, k(6), L::fma(d, k(5), k(4)));
                    let middle = L::fma(dd, high, L::fma(d, k(3), k(2)));
                    let near = L::fma(dd, middle, L::fma(d, k(1), k(0)));
                    let near = L::mul(near, L::mul(d, qd));
                    let far = L::sub(L::fma(p, ratio, L::mul(q, minus)), qd);
                    a = L::add(a, L::by_size(d, near, far));
                    b = L::add(b, qd);
                }
                L::add_to(&mut self.open_a, a);
                L::add_to(&mut self.open_b, b);
            }
        }
    }
}

/// this - base - c, with `EXACT` rounded as if once. Not finite where an operand is not.
///
/// # Safety
/// Only on a machine with the instructions of `L`.
#[inline(always)]
unsafe fn difference<L: Lanes, const EXACT: bool>(this: L::V, base: L::V, c: L::V) -> L::V {
    // SAFETY: register operations only.
    unsafe {
        let d = L::sub(this, base);
        if !EXACT {
            return L::sub(d, c);
        }
        // What the subtraction lost, exactly (Knuth).
        let other = L::sub(d, this);
        let lost = L::sub(L::sub(this, L::sub(d, other)), L::add(base, other));
        L::add(L::sub(d, c), lost)
    }
}

/// (exp(d) - 1 - d) / d^2 within 9e-8 on |d| <= 1, the lowest power first.
const NEAR: [f32; 7] = [
    0.5,
    0.166_666_95,
    0.041_666_515,
    0.008_330_93,
    0.001_389_133_5,
    2.032_548_4e-4,
    2.496_081_5e-5,
];
