//! The divergence of two rows of logits, in one pass over both.
//!
//! See [`cross`] for the sums.
#![allow(unsafe_code)]

mod cross;

use half::{bf16, f16};

use self::cross::{Cross, excess};
use super::{
    lanes::Lanes,
    softmax::{CHUNK, ChunkSums, Softmax, chunk_sums, widen},
};
use crate::{
    scores::{Divergence, exact::not_negative},
    tensor::Float,
};

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
