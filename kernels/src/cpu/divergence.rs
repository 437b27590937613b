//! The divergence of two rows of logits, in one pass over both.
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

use half::{bf16, f16};

use super::{
    lanes::Lanes,
    softmax::{CHUNK, ChunkSums, Softmax, chunk_sums, drift, widen},
};
use crate::{
    scores::{Divergence, exact::not_negative},
    tensor::Float,
};

/// Logits whose terms are added in f32: few, for where they are equal f32 errs the same way each time.
const PART: usize = 128;

/// How far apart a row's logits may be for the sums to be turned from one c to another.
const FAR: f64 = 690.0;

/// Both rows' chunk and its exponentials.
struct Buffers {
    base: [f32; CHUNK],
    this: [f32; CHUNK],
    work: Work,
}

struct Work {
    p_base: [f32; CHUNK],
    p_this: [f32; CHUNK],
    scratch: [f32; CHUNK],
}

impl Buffers {
    fn new() -> Self {
        let none = [0.0; CHUNK];
        let work = Work { p_base: none, p_this: none, scratch: none };
        Self { base: none, this: none, work }
    }
}

/// A and B so far, relative to the baseline's best token, whose own terms are added at the end.
struct Cross {
    c: f32,
    /// What turns this row's exponential into the baseline's times exp(d).
    ratio: f32,
    /// This row's logit at the baseline's best token.
    at_best: f32,
    /// c is so large beside the spread of d that v - base may not be rounded before c is subtracted.
    offset: bool,
    a: f64,
    b: f64,
    open_a: [f64; 16],
    open_b: [f64; 16],
    /// Weight of what was added since c was chosen, and how much may be.
    since: f64,
    limit: f64,
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
    fn close(&mut self, unit: f64) -> Option<()> {
        let a: f64 = self.open_a.iter().sum();
        let b: f64 = self.open_b.iter().sum();
        self.open_a = [0.0; 16];
        self.open_b = [0.0; 16];
        self.a += unit * a;
        self.b += unit * b;
        (a.is_finite() && b.is_finite()).then_some(())
    }

    /// d of the baseline's best token.
    fn best(&self, base: &Softmax) -> f64 {
        f64::from(self.at_best) - f64::from(base.max) - f64::from(self.c)
    }

    /// The best token becomes one of the others of a token that is -`shift` better.
    fn fall(&mut self, best: f64, shift: f64) -> Option<()> {
        let factor = shift.exp();
        self.a = factor * (self.a + excess(best));
        self.b = factor * (self.b + best);
        // The baseline has next to nothing here now, but this row may.
        (shift > -FAR).then_some(())
    }

    /// Chooses c: the mean of v - base of all that is closed and, if it is given, of a chunk of this
    /// weight and this sum of q * (v - base).
    fn recentre<L: Lanes>(
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
    unsafe fn add<L: Lanes, const OFFSET: bool>(
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

/// Sum over the lanes.
///
/// # Safety
/// Only on a machine with the instructions of `L`.
#[inline(always)]
unsafe fn total<L: Lanes>(v: L::V) -> f64 {
    let mut lanes = [0.0; 16];
    // SAFETY: the caller's promise is passed on.
    unsafe { L::add_to(&mut lanes, v) };
    lanes.iter().sum()
}

/// Sum of q * (v - base) over a chunk.
///
/// # Safety
/// The three hold [`CHUNK`] values.
unsafe fn weighed_difference(base: *const f32, this: *const f32, q: *const f32) -> f64 {
    let mut sum = 0.0;
    for i in 0..CHUNK {
        // SAFETY: offsets stay below CHUNK, which the caller vouches for.
        let (base, this, q) = unsafe { (*base.add(i), *this.add(i), *q.add(i)) };
        if q > 0.0 {
            sum += f64::from(q) * (f64::from(this) - f64::from(base));
        }
    }
    sum
}

/// Both rows and what they share.
struct Rows {
    base: Softmax,
    this: Softmax,
    cross: Cross,
}

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
    let (b, t) = (Softmax::new::<L>(), Softmax::new::<L>());
    let mut rows = Rows { base: b, this: t, cross: Cross::new() };
    for start in (0..base.len()).step_by(CHUNK) {
        let len = CHUNK.min(base.len() - start);
        // SAFETY: the machine has the instructions, and whole chunks are what `whole` gives.
        unsafe {
            let base = whole::<L>(&base.slice(start, len), &mut buffers.base);
            let this = whole::<L>(&this.slice(start, len), &mut buffers.this);
            rows.add::<L>(start, base, this, &mut buffers.work)?;
        }
    }
    rows.finish::<L>()
}

impl Rows {
    /// Adds a chunk that begins at `start`.
    ///
    /// # Safety
    /// Only on a machine with the instructions of `L`; a chunk lies at either pointer.
    #[inline(always)]
    unsafe fn add<L: Lanes>(
        &mut self,
        start: usize,
        base: *const f32,
        this: *const f32,
        work: &mut Work,
    ) -> Option<()> {
        // SAFETY: the caller's promise is passed on, and `work` holds whole chunks.
        unsafe {
            let (p_base, p_this) = (work.p_base.as_mut_ptr(), work.p_this.as_mut_ptr());
            let of_base = chunk_sums::<L, f32, true, false>(base, &self.base.reference, p_base);
            let of_this = chunk_sums::<L, f32, true, true>(this, &self.this.reference, p_this);
            let weight = self.base.reference.unit * total::<L>(of_base.p);
            let rises = L::any_above(of_base.max, L::splat(self.base.max))
                || L::any_above(of_this.max, L::splat(self.this.max));
            if rises || self.cross.since + weight > self.cross.limit {
                self.turn::<L>(start, (base, &of_base), (this, &of_this), work)?;
            } else {
                self.base.add(&of_base);
                self.this.add(&of_this);
                self.cross.since += weight;
            }
            if self.cross.offset {
                self.cross.add::<L, true>(base, this, p_base, p_this);
            } else {
                self.cross.add::<L, false>(base, this, p_base, p_this);
            }
        }
        Some(())
    }

    /// Takes in the softmax of a chunk with new largest logits or much weight, and chooses c for it.
    ///
    /// # Safety
    /// As for [`Rows::add`].
    #[inline(always)]
    unsafe fn turn<L: Lanes>(
        &mut self,
        start: usize,
        (base, of_base): (*const f32, &ChunkSums<L>),
        (this, of_this): (*const f32, &ChunkSums<L>),
        work: &mut Work,
    ) -> Option<()> {
        let Work { p_base, p_this, scratch } = work;
        self.cross.close(self.base.close_unweighed::<L>())?;
        let this_was_there = self.this.max > f32::NEG_INFINITY;
        // SAFETY: the caller's promise is passed on, and `work` holds whole chunks.
        unsafe {
            if L::any_above(of_this.max, L::splat(self.this.max)) {
                rise::<L, true>(&mut self.this, this, start, p_this.as_mut_ptr(), scratch)?;
                p_this[self.this.at - start] = (1.0 / self.this.reference.unit) as f32;
            } else {
                self.this.add(of_this);
            }
            let mut weight = total::<L>(of_base.p);
            if L::any_above(of_base.max, L::splat(self.base.max)) {
                let (old, best) = (self.base.max, self.cross.best(&self.base));
                let p_base = p_base.as_mut_ptr();
                let sums = rise::<L, false>(&mut self.base, base, start, p_base, scratch)?;
                weight = total::<L>(sums.p);
                if old > f32::NEG_INFINITY {
                    self.cross.fall(best, f64::from(old) - f64::from(self.base.max))?;
                } else if this_was_there {
                    // What this row has there can be all that counts, and is relative to nothing.
                    return None;
                }
                self.cross.at_best = *this.add(self.base.at - start);
                // Its terms are added when the sums are.
                p_this[self.base.at - start] = 0.0;
            } else {
                self.base.add(of_base);
            }
            if self.base.max == f32::NEG_INFINITY {
                return Some(());
            }
            let unit = self.base.reference.unit;
            weight *= unit;
            let heavy = weight > 1.0 + self.base.rest;
            let chunk =
                heavy.then(|| (weight, unit * weighed_difference(base, this, p_base.as_ptr())));
            self.cross.recentre::<L>(chunk, &self.base, &self.this)?;
            if !heavy {
                self.cross.since = weight;
            }
        }
        Some(())
    }

    #[inline(always)]
    fn finish<L: Lanes>(mut self) -> Option<Divergence> {
        let mut cross = self.cross;
        cross.close(self.base.close_unweighed::<L>())?;
        let best = cross.best(&self.base);
        let (base, this) = (self.base.finish::<L>(), self.this.finish::<L>());
        let all = 1.0 + base.rest;
        let (a, b) = ((cross.a + excess(best)) / all, (cross.b + best) / all);
        // ln(1 + a + b) by the rows' own sums: better where they have little to do with each other.
        let apart = this.log_sum() - base.log_sum() - f64::from(cross.c) - b;
        let near = (a + b).ln_1p() - b;
        let kl = not_negative(if apart > 1.0 || near.is_nan() { apart } else { near });
        Some(Divergence { base, this, kl })
    }
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
/// place of its own, and gives its sums.
///
/// # Safety
/// Only on a machine with the instructions of `L`; a chunk lies at `chunk`, room for one at `p`.
#[inline(always)]
unsafe fn rise<L: Lanes, const WEIGH: bool>(
    softmax: &mut Softmax,
    chunk: *const f32,
    start: usize,
    p: *mut f32,
    scratch: &mut [f32; CHUNK],
) -> Option<ChunkSums<L>> {
    // SAFETY: the caller's promise is passed on; `scratch` is a whole chunk.
    unsafe {
        std::ptr::copy_nonoverlapping(chunk, scratch.as_mut_ptr(), CHUNK);
        if !softmax.rise::<L>(scratch, start) {
            return None;
        }
        let sums = chunk_sums::<L, f32, true, WEIGH>(scratch.as_ptr(), &softmax.reference, p);
        softmax.add(&sums);
        Some(sums)
    }
}
