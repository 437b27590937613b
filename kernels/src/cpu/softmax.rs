//! The softmax of a row of logits in one pass: its largest, and sums over the others.
//!
//! A chunk is summed relative to the largest logit before it while its own largest is looked for.
//! The few chunks that hold a larger one are summed again without it. f32 exponentials, sixteen
//! sums in f32 over a chunk, f64 from chunk to chunk.
#![allow(unsafe_code)]

use std::f64::consts::{LN_2, LOG2_E};

use half::{bf16, f16};

use super::lanes::{Lanes, Logit};
use crate::{scores::Distribution, tensor::Float};

/// Logits of a chunk.
pub(super) const CHUNK: usize = 512;

/// Bytes from a logit to what is asked for while it is summed.
const AHEAD: usize = 2048;

/// Larger logits are left to f64: n times [`LN2_HIGH`] is exact for 15 bits of n.
const LARGEST: f32 = 2e4;

/// The logits of a chunk widened; -inf behind the end of a row.
///
/// # Safety
/// Only on a machine with the instructions of `L`.
#[inline(always)]
pub(super) unsafe fn widen<L: Lanes, T: Logit>(values: &[T], out: &mut [f32; CHUNK]) {
    let whole = values.len() / L::N * L::N;
    for i in (0..whole).step_by(L::N) {
        // SAFETY: N values lie there, and CHUNK is at least their number.
        unsafe { L::store(out[i..i + L::N].as_mut_ptr(), T::load::<L>(values[i..].as_ptr())) };
    }
    out[whole..].fill(f32::NEG_INFINITY);
    for (o, v) in out[whole..].iter_mut().zip(&values[whole..]) {
        *o = v.widen();
    }
}

/// What exponentials are relative to.
///
/// exp(v) = 2^n * 2^f with n = round(v * log2(e)), to eighths where there is a table of their powers. A
/// kernel computes 2^(n - N) * 2^f, where N is the whole number next to the largest logit's. So no
/// difference is rounded before it goes into the exponential. log2(e) in f32 is 1.3e-8 of itself too
/// small ([`drift`]), which the sums put right.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reference {
    pub max: f32,
    /// N.
    pub n: f64,
    /// exp of what the sums leave out.
    pub unit: f64,
    /// From here down an exponential is 0.
    lowest: f32,
    /// Adding it rounds to n, with (n - N + 127) * [`Lanes::STEPS`] as the lowest bits.
    magic: f32,
}

const LOG2_E_F32: f32 = LOG2_E as f32;
/// ln 2 in two parts for machines that do not fuse: n times the first is exact.
const LN2_HIGH: f32 = 0.693_359_4;
const LN2_LOW: f32 = -2.121_944_4e-4;

/// How far the kernels' log2(e) is off, relatively: less than 0, for it is too small.
#[inline(always)]
pub(super) fn drift<L: Lanes>() -> f64 {
    if L::FUSED { LOG2_E_F32 as f64 / LOG2_E - 1.0 } else { 0.0 }
}

impl Reference {
    #[inline(always)]
    pub(super) fn new<L: Lanes>(max: f32) -> Self {
        let n = (f64::from(max) * LOG2_E).round();
        Self {
            max,
            n,
            unit: (n * LN_2 - f64::from(max) * (1.0 + drift::<L>())).exp(),
            lowest: ((n - 127.0) * LN_2) as f32,
            magic: ((1.5 * f64::from(1 << 23) / L::STEPS) + 127.0 - n) as f32,
        }
    }
}

/// Coefficients as whole registers in memory, from where an instruction takes them; the compiler
/// makes a broadcast of its own of every constant that it knows.
#[repr(align(64))]
struct Wide([[f32; 16]; 6]);

/// 2^f within 1.1e-7 on |f| <= 0.5, exact at 0; the highest power first.
#[allow(clippy::approx_constant)] // the fit's, a few units from ln 2
static POWER: Wide = Wide([
    [0.001_326_472_7; 16],
    [0.009_671_513; 16],
    [0.055_507_336; 16],
    [0.240_222_42; 16],
    [0.693_147; 16],
    [1.0; 16],
]);

/// (2^f - 1) / f on |f| <= 1/16, so that 2^f is within 2.7e-8; the highest power first.
static STEP_POWER: Wide = Wide([
    [0.055_511_475; 16],
    [0.240_257_64; 16],
    [LN_2 as f32; 16],
    [0.0; 16],
    [0.0; 16],
    [0.0; 16],
]);

/// The sums of a chunk, one a lane.
pub(super) struct ChunkSums<L: Lanes> {
    /// Of p, relative to the reference's unit.
    pub p: L::V,
    /// Of p * (v - max).
    pub weighted: L::V,
    /// Largest values; NaN is passed over (and makes the other sums NaN).
    pub max: L::V,
}

/// exp(v) relative to the reference in three steps, within 2.5e-7; NaN for NaN, anything 88 above the
/// reference's largest logit and more.
///
/// One after another the steps are a chain of 30 to 45 cycles, of which a core's window holds too few
/// vectors to keep its units busy. A loop takes three vectors at a time, each a step further.
struct Exp<L: Lanes> {
    v: L::V,
    shifted: L::V,
    f: L::V,
    p: L::V,
}

impl<L: Lanes> Exp<L> {
    /// v * log2(e) = n + f.
    #[inline(always)]
    unsafe fn reduce(v: L::V, r: &Reference) -> Self {
        // SAFETY: register operations only.
        unsafe {
            let shifted = L::fma(v, L::splat(LOG2_E_F32), L::splat(r.magic));
            let n = L::sub(shifted, L::splat(r.magic));
            let f = if L::FUSED {
                L::fma(v, L::splat(LOG2_E_F32), L::mul(n, L::splat(-1.0)))
            } else {
                let f = L::sub(v, L::mul(n, L::splat(LN2_HIGH)));
                L::mul(L::sub(f, L::mul(n, L::splat(LN2_LOW))), L::splat(LOG2_E_F32))
            };
            Self { v, shifted, f, p: f }
        }
    }

    /// The upper half of 2^f, or 2^f - 1 where the rest is a step.
    #[inline(always)]
    unsafe fn begin(mut self, power: &Wide) -> Self {
        // SAFETY: the coefficients are whole registers.
        unsafe {
            let c = |i: usize| power.0[i].as_ptr();
            let p = L::fma(self.f, L::load(c(0)), L::load(c(1)));
            let p = L::fma(p, self.f, L::load(c(2)));
            self.p =
                if L::STEPS > 1.0 { L::mul(p, self.f) } else { L::fma(p, self.f, L::load(c(3))) };
        }
        self
    }

    #[inline(always)]
    unsafe fn finish(&self, power: &Wide) -> L::V {
        // SAFETY: the coefficients are whole registers.
        unsafe {
            if L::STEPS > 1.0 {
                let step = L::step(self.shifted);
                return L::fma(step, self.p, step);
            }
            let p = L::fma(self.p, self.f, L::load(power.0[4].as_ptr()));
            let p = L::fma(p, self.f, L::load(power.0[5].as_ptr()));
            L::mul(p, L::step(self.shifted))
        }
    }
}

/// The sums of a chunk of [`CHUNK`] logits; with `KEEP`, its exponentials go to `out`;
/// without `WEIGH`, the sum of p * (v - max) stays 0.
///
/// # Safety
/// A chunk of logits is at `from`, with `KEEP` room for as many floats at `out`, on a machine with
/// the instructions of `L`.
#[inline(always)]
pub(super) unsafe fn chunk_sums<L: Lanes, T: Logit, const KEEP: bool, const WEIGH: bool>(
    from: *const T,
    r: &Reference,
    out: *mut f32,
) -> ChunkSums<L> {
    // SAFETY: offsets stay below CHUNK, which the caller vouches for; CHUNK is a multiple of 2 N.
    unsafe {
        let mut pass = Pass::<L>::new(r);
        let mut second = pass.load(from).begin(pass.power);
        let mut first = pass.load(from.add(L::N));
        for i in (2 * L::N..CHUNK).step_by(L::N) {
            pass.add::<KEEP, WEIGH>(&second, out.wrapping_add(i - 2 * L::N));
            second = first.begin(pass.power);
            first = pass.load(from.add(i));
        }
        pass.add::<KEEP, WEIGH>(&second, out.wrapping_add(CHUNK - 2 * L::N));
        pass.add::<KEEP, WEIGH>(&first.begin(pass.power), out.wrapping_add(CHUNK - L::N));
        let Pass { sums, weights, max, .. } = pass;
        let (p, weighted) = (L::add(sums.0, sums.1), L::add(weights.0, weights.1));
        ChunkSums { p, weighted, max }
    }
}

/// The registers of a pass over a chunk.
struct Pass<'a, L: Lanes> {
    r: &'a Reference,
    power: &'static Wide,
    max: L::V,
    // Two sums in turns: in long chains of equal terms f32 can err the same way every time.
    sums: (L::V, L::V),
    weights: (L::V, L::V),
}

impl<'a, L: Lanes> Pass<'a, L> {
    #[inline(always)]
    unsafe fn new(r: &'a Reference) -> Self {
        // SAFETY: register operations only.
        let (zero, max) = unsafe { (L::splat(0.0), L::splat(f32::NEG_INFINITY)) };
        Self {
            r,
            power: std::hint::black_box(if L::STEPS > 1.0 { &STEP_POWER } else { &POWER }),
            max,
            sums: (zero, zero),
            weights: (zero, zero),
        }
    }

    #[inline(always)]
    unsafe fn load<T: Logit>(&mut self, from: *const T) -> Exp<L> {
        // SAFETY: the caller vouches for N logits.
        unsafe {
            // The hardware's own prefetching ends at every page.
            L::prefetch(from.wrapping_byte_add(AHEAD).cast());
            let v = T::load::<L>(from);
            self.max = L::max(v, self.max);
            // NaN stays, as the second of the two.
            Exp::<L>::reduce(L::max(L::splat(self.r.lowest), v), self.r)
        }
    }

    #[inline(always)]
    unsafe fn add<const KEEP: bool, const WEIGH: bool>(&mut self, e: &Exp<L>, out: *mut f32) {
        // SAFETY: with KEEP the caller vouches for room for N floats.
        unsafe {
            let p = e.finish(self.power);
            let d = L::sub(e.v, L::splat(self.r.max));
            self.sums = (self.sums.1, L::add(self.sums.0, p));
            if WEIGH {
                self.weights = (self.weights.1, L::fma(p, d, self.weights.0));
            }
            if KEEP {
                L::store(out, p);
            }
        }
    }
}

/// A row's sums so far.
pub(super) struct Softmax {
    /// Relative to what the open sums are; its `max` is 0 while there is no finite logit.
    pub reference: Reference,
    /// Largest logit, -inf while there is none, and its first index.
    pub max: f32,
    pub at: usize,
    /// Closed sums of p and p * d over all but the largest, relative to it.
    pub rest: f64,
    weighted: f64,
    open: [f64; 16],
    open_weighted: [f64; 16],
}

impl Softmax {
    #[inline(always)]
    pub(super) fn new<L: Lanes>() -> Self {
        Self {
            reference: Reference::new::<L>(0.0),
            max: f32::NEG_INFINITY,
            at: 0,
            rest: 0.0,
            weighted: 0.0,
            open: [0.0; 16],
            open_weighted: [0.0; 16],
        }
    }

    #[inline(always)]
    pub(super) unsafe fn add<L: Lanes>(&mut self, sums: &ChunkSums<L>) {
        // SAFETY: the caller has the instructions of `L`.
        unsafe {
            L::add_to(&mut self.open, sums.p);
            L::add_to(&mut self.open_weighted, sums.weighted);
        }
    }

    /// Turns the open sums into closed ones.
    #[inline(always)]
    pub(super) fn close<L: Lanes>(&mut self) {
        let sum: f64 = self.open.iter().sum();
        let weighted: f64 = self.open_weighted.iter().sum();
        // p is exp(d * (1 + drift)), and its derivative is p * d.
        self.rest += self.reference.unit * (sum - drift::<L>() * weighted);
        self.weighted += self.reference.unit * weighted;
        self.open = [0.0; 16];
        self.open_weighted = [0.0; 16];
    }

    /// [`Softmax::close`] where the logits were not weighed; gives what an open term is multiplied by.
    ///
    /// What `drift` takes is guessed. Where it matters, in tiny sums, no logit is above the sum's
    /// logarithm, and the largest is not further below it than that of the vocabulary.
    #[inline(always)]
    pub(super) fn close_unweighed<L: Lanes>(&mut self) -> f64 {
        let sum = self.reference.unit * self.open.iter().sum::<f64>();
        let logit = if sum > 0.0 { sum.ln().min(0.0) } else { 0.0 };
        let right = 1.0 - drift::<L>() * logit;
        self.rest += right * sum;
        self.open = [0.0; 16];
        right * self.reference.unit
    }

    /// Looks for the largest of a chunk that begins at `start`, makes it the row's and takes it out
    /// of the chunk. False where f32 will not do.
    #[inline(always)]
    pub(super) fn rise<L: Lanes>(&mut self, chunk: &mut [f32; CHUNK], start: usize) -> bool {
        let (mut max, mut at) = (self.max, 0);
        for (i, &v) in chunk.iter().enumerate() {
            if v > max {
                (max, at) = (v, i);
            }
        }
        if max.abs() > LARGEST {
            return false;
        }
        self.close::<L>();
        if self.max > f32::NEG_INFINITY {
            let shift = f64::from(self.max) - f64::from(max);
            let factor = shift.exp();
            let all = self.rest + 1.0;
            self.weighted = factor * (self.weighted + shift * all);
            self.rest = factor * all;
        }
        (self.max, self.at) = (max, start + at);
        self.reference = Reference::new::<L>(max);
        chunk[at] = f32::NEG_INFINITY;
        true
    }

    #[inline(always)]
    pub(super) fn finish<L: Lanes>(mut self) -> Distribution {
        self.close::<L>();
        if self.rest.is_nan() {
            return Distribution::undefined(-1);
        }
        if self.max == f32::NEG_INFINITY {
            return Distribution::undefined(0);
        }
        let (rest, weighted) = (self.rest, self.weighted);
        Distribution { max: f64::from(self.max), argmax: self.at as i64, rest, weighted }
    }
}

/// The softmax of a row; `None` where f32 will not do.
///
/// # Safety
/// Only on a machine with the instructions of `L`.
#[inline(always)]
pub(crate) unsafe fn softmax<L: Lanes>(row: &Float<'_>) -> Option<Distribution> {
    // SAFETY: the caller's promise is passed on.
    unsafe {
        match *row {
            Float::F32(row) => softmax_of::<L, f32>(row),
            Float::F16(row) => softmax_of::<L, f16>(row),
            Float::Bf16(row) => softmax_of::<L, bf16>(row),
        }
    }
}

#[inline(always)]
unsafe fn softmax_of<L: Lanes, T: Logit>(row: &[T]) -> Option<Distribution> {
    let mut all = Softmax::new::<L>();
    let mut buffer = [0.0; CHUNK];
    for start in (0..row.len()).step_by(CHUNK) {
        let chunk = &row[start..row.len().min(start + CHUNK)];
        // SAFETY: a whole chunk lies in the row or in the buffer; the machine has the instructions.
        unsafe {
            let nowhere = std::ptr::null_mut();
            let mut sums = if chunk.len() == CHUNK {
                chunk_sums::<L, T, false, true>(chunk.as_ptr(), &all.reference, nowhere)
            } else {
                widen::<L, T>(chunk, &mut buffer);
                chunk_sums::<L, f32, false, true>(buffer.as_ptr(), &all.reference, nowhere)
            };
            if L::any_above(sums.max, L::splat(all.max)) {
                widen::<L, T>(chunk, &mut buffer);
                if !all.rise::<L>(&mut buffer, start) {
                    return None;
                }
                sums = chunk_sums::<L, f32, false, true>(buffer.as_ptr(), &all.reference, nowhere);
            }
            all.add(&sums);
        }
    }
    Some(all.finish::<L>())
}
