//! The divergence of two rows of logits, in one pass over both.
//!
//! With q the baseline's probabilities and d = v - base - c, for any c,
//! KL = ln(1 + A + B) - B where A = sum of q * (exp(d) - 1 - d), B = sum of q * d.
//! Every term of A is positive, so that nearly equal rows keep their digits when c is near the mean
//! of v - base: it is that of the baseline's best token, whose own terms are 0 then.
#![allow(unsafe_code)]

use std::f64::consts::LN_2;

use half::{bf16, f16};

use super::{
    lanes::Lanes,
    softmax::{CHUNK, Softmax, chunk_sums, drift, widen},
};
use crate::{
    scores::{Distribution, Divergence, exact::not_negative},
    tensor::Float,
};

/// Both rows' chunk and its exponentials.
struct Buffers {
    base: [f32; CHUNK],
    this: [f32; CHUNK],
    p_base: [f32; CHUNK],
    p_this: [f32; CHUNK],
    scratch: [f32; CHUNK],
}

impl Buffers {
    fn new() -> Self {
        let none = [0.0; CHUNK];
        Self { base: none, this: none, p_base: none, p_this: none, scratch: none }
    }
}

/// A and B so far, relative to the baseline's best token.
struct Cross {
    c: f32,
    /// What turns this row's exponential into the baseline's times exp(d).
    ratio: f32,
    /// This row's logit at the baseline's best token.
    at_best: f32,
    /// d of the baseline's best token: 0 unless c is not its own.
    best: f64,
    a: f64,
    b: f64,
    open_a: [f64; 16],
    open_b: [f64; 16],
    /// This row rules out a token that the baseline does not.
    infinite: bool,
}

/// exp(d) - 1 - d.
fn excess(d: f64) -> f64 {
    d.exp_m1() - d
}

impl Cross {
    fn new() -> Self {
        Self {
            c: 0.0,
            ratio: 1.0,
            at_best: 0.0,
            best: 0.0,
            a: 0.0,
            b: 0.0,
            open_a: [0.0; 16],
            open_b: [0.0; 16],
            infinite: false,
        }
    }

    /// Closes the open sums, which are relative to `unit`.
    fn close(&mut self, unit: f64) {
        let a: f64 = self.open_a.iter().sum();
        let b: f64 = self.open_b.iter().sum();
        self.open_a = [0.0; 16];
        self.open_b = [0.0; 16];
        if b == f64::NEG_INFINITY {
            self.infinite = true;
        } else {
            self.a += unit * a;
            self.b += unit * b;
        }
    }

    /// Adds the best token's own terms.
    fn close_best(&mut self) {
        if self.best == f64::NEG_INFINITY {
            self.infinite = true;
        } else {
            self.a += excess(self.best);
            self.b += self.best;
        }
    }

    /// Follows new largest logits. The sums are closed; `before` is the weight of what they hold,
    /// relative to the baseline's largest logit then, which is `shift` above (below 0) that of now.
    fn follow<L: Lanes>(&mut self, before: f64, shift: f64, base: &Softmax, this: &Softmax) {
        let (m_base, m_this) = (f64::from(base.max), f64::from(this.reference.max));
        // No further from this row's best token than exp(30): `ratio` must fit an f32.
        let c = (f64::from(self.at_best) - m_base).max(m_this - m_base - 30.0) as f32;
        let factor = shift.exp();
        if before > 0.0 && factor > 0.0 {
            let up = f64::from(c) - f64::from(self.c);
            let less = (-up).exp_m1();
            let (a, b) = (self.a, self.b);
            self.a = factor * (a * (1.0 + less) + before * excess(-up) + b * less);
            self.b = factor * (b - up * before);
        } else {
            (self.a, self.b) = (0.0, 0.0);
        }
        self.c = c;
        self.best = f64::from(self.at_best) - m_base - f64::from(c);
        let between = (this.reference.n - base.reference.n) * LN_2;
        self.ratio = (between - f64::from(c) * (1.0 + drift::<L>())).exp() as f32;
    }

    /// The divergence from the closed sums.
    fn finish(mut self, base: &Distribution, this: &Distribution) -> f64 {
        self.close_best();
        if base.rest.is_nan() || this.rest.is_nan() {
            return f64::NAN;
        }
        if self.infinite {
            return f64::INFINITY;
        }
        let all = 1.0 + base.rest;
        let (a, b) = (self.a / all, self.b / all);
        // ln(1 + a + b) by the rows' own sums: better where they have little to do with each other.
        let apart = this.log_sum() - base.log_sum() - f64::from(self.c) - b;
        let near = (a + b).ln_1p() - b;
        not_negative(if apart > 1.0 || near.is_nan() { apart } else { near })
    }

    /// Adds the terms of a chunk.
    ///
    /// # Safety
    /// Only on a machine with the instructions of `L`; the four hold [`CHUNK`] values.
    #[inline(always)]
    unsafe fn add<L: Lanes>(
        &mut self,
        base: *const f32,
        this: *const f32,
        p_base: *const f32,
        p_this: *const f32,
    ) {
        // SAFETY: offsets stay below CHUNK, which the caller vouches for.
        unsafe {
            let (mut a, mut b) = (L::splat(0.0), L::splat(0.0));
            let (c, ratio, minus_one) = (L::splat(self.c), L::splat(self.ratio), L::splat(-1.0));
            for i in (0..CHUNK).step_by(L::N) {
                let (q, p) = (L::load(p_base.add(i)), L::load(p_this.add(i)));
                let d = L::sub(L::sub(L::load(this.add(i)), L::load(base.add(i))), c);
                // Where the baseline has no probability, d can be anything, and `far` is what counts.
                let qd = L::where_positive(q, L::mul(q, d));
                // (exp(d) - 1 - d) / d^2, by powers of d^2: half the chain of one power after another.
                let k = |i: usize| L::splat(NEAR[i]);
                let dd = L::mul(d, d);
                let high = L::fma(dd, k(6), L::fma(d, k(5), k(4)));
                let middle = L::fma(dd, high, L::fma(d, k(3), k(2)));
                let near = L::fma(dd, middle, L::fma(d, k(1), k(0)));
                let near = L::mul(near, L::mul(d, qd));
                let far = L::sub(L::fma(p, ratio, L::mul(q, minus_one)), qd);
                a = L::add(a, L::by_size(d, near, far));
                b = L::add(b, qd);
            }
            L::add_to(&mut self.open_a, a);
            L::add_to(&mut self.open_b, b);
        }
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

/// KL(base || this) and the softmax of both; `None` where f32 will not do.
///
/// # Safety
/// Only on a machine with the instructions of `L`.
#[inline(always)]
pub(crate) unsafe fn divergence<L: Lanes>(
    base: &Float<'_>,
    this: &Float<'_>,
) -> Option<Divergence> {
    let mut buffers = Buffers::new();
    let (mut b, mut t, mut cross) = (Softmax::new::<L>(), Softmax::new::<L>(), Cross::new());
    for start in (0..base.len()).step_by(CHUNK) {
        let len = CHUNK.min(base.len() - start);
        let Buffers { base: wide_base, this: wide_this, p_base, p_this, scratch } = &mut buffers;
        // SAFETY: the machine has the instructions, and every pointer is that of a whole chunk.
        unsafe {
            let base_chunk = whole::<L>(&base.slice(start, len), wide_base);
            let this_chunk = whole::<L>(&this.slice(start, len), wide_this);
            let (p_base, p_this) = (p_base.as_mut_ptr(), p_this.as_mut_ptr());
            let of_base = chunk_sums::<L, f32, true, false>(base_chunk, &b.reference, p_base);
            let of_this = chunk_sums::<L, f32, true, true>(this_chunk, &t.reference, p_this);
            let base_rises = L::any_above(of_base.max, L::splat(b.max));
            let this_rises = L::any_above(of_this.max, L::splat(t.max));
            if base_rises || this_rises {
                cross.close(b.reference.unit);
                b.close::<L>();
            }
            let (old_max, old_rest) = (b.max, b.rest);
            if this_rises {
                rise::<L>(&mut t, this_chunk, start, p_this, scratch)?;
                *p_this.add(t.at - start) = (1.0 / t.reference.unit) as f32;
            } else {
                t.add(&of_this);
            }
            let (mut before, mut shift) = (old_rest, 0.0);
            if base_rises {
                rise::<L>(&mut b, base_chunk, start, p_base, scratch)?;
                if old_max > f32::NEG_INFINITY {
                    cross.close_best();
                    (before, shift) = (1.0 + old_rest, f64::from(old_max) - f64::from(b.max));
                }
                cross.at_best = *this_chunk.add(b.at - start);
                // Its terms are added when the sums are.
                *p_this.add(b.at - start) = 0.0;
            } else {
                b.add(&of_base);
            }
            if base_rises || this_rises {
                cross.follow::<L>(before, shift, &b, &t);
            }
            cross.add::<L>(base_chunk, this_chunk, p_base, p_this);
        }
    }
    cross.close(b.reference.unit);
    let (mut base, this) = (b.finish::<L>(), t.finish::<L>());
    if base.rest > 0.0 {
        // The baseline's logits are not weighed, so what `drift` takes is guessed: where it matters,
        // in a tiny rest, no term is above it and the largest is not below 1 / vocabulary of it.
        base.rest *= 1.0 - drift::<L>() * base.rest.ln().min(0.0);
    }
    Some(Divergence { base, this, kl: cross.finish(&base, &this) })
}

/// A chunk as f32: where it lies, or widened into `buffer`.
///
/// # Safety
/// Only on a machine with the instructions of `L`.
#[inline(always)]
unsafe fn whole<L: Lanes>(chunk: &Float<'_>, buffer: &mut [f32; CHUNK]) -> *const f32 {
    // SAFETY: the caller's promise is passed on.
    unsafe {
        match *chunk {
            Float::F32(v) if v.len() == CHUNK => return v.as_ptr(),
            Float::F32(v) => widen::<L, f32>(v, buffer),
            Float::F16(v) => widen::<L, f16>(v, buffer),
            Float::Bf16(v) => widen::<L, bf16>(v, buffer),
        }
    }
    buffer.as_ptr()
}

/// Takes in a chunk that holds a new largest logit, with its exponentials relative to that one, 0 in
/// place of its own.
///
/// # Safety
/// Only on a machine with the instructions of `L`; a chunk lies at `chunk`, room for one at `p`.
#[inline(always)]
unsafe fn rise<L: Lanes>(
    softmax: &mut Softmax,
    chunk: *const f32,
    start: usize,
    p: *mut f32,
    scratch: &mut [f32; CHUNK],
) -> Option<()> {
    // SAFETY: the caller's promise is passed on; `scratch` is a whole chunk.
    unsafe {
        std::ptr::copy_nonoverlapping(chunk, scratch.as_mut_ptr(), CHUNK);
        if !softmax.rise::<L>(scratch, start) {
            return None;
        }
        let sums = chunk_sums::<L, f32, true, true>(scratch.as_ptr(), &softmax.reference, p);
        softmax.add(&sums);
    }
    Some(())
}
