//! The two inner loops: a tile of y from a panel, and dot products straight from the codes.
#![allow(unsafe_code)]
// Two or three arrays run along one index; an iterator over one of them would hide that.
#![allow(clippy::needless_range_loop)]

use super::{
    panel::{PANEL, Weight},
    simd::{Codec, Simd},
};

/// k of a chunk: floats of one row of x that lie together, see [`XPanel`].
pub(crate) const CHUNK: usize = 256;

/// x as the kernels read it: [chunk][row][CHUNK], zero behind k, so that the rows of a tile are a
/// fixed and small distance apart.
#[derive(Clone, Copy)]
pub(crate) struct XPanel {
    pub data: *const f32,
    pub rows: usize,
}

// SAFETY: tasks only read through the pointer while its owner waits for them.
unsafe impl Sync for XPanel {}

impl XPanel {
    /// Address of row `m` at `k`.
    ///
    /// # Safety
    /// `m < rows` and `k` lies within the chunks.
    #[inline(always)]
    pub(crate) unsafe fn at(&self, m: usize, k: usize) -> *const f32 {
        // SAFETY: the caller vouches for both indices.
        unsafe { self.data.add((k / CHUNK * self.rows + m) * CHUNK + k % CHUNK) }
    }
}

/// c[MR, NV * 16] (+)= x[MR, kc] * panels: one chain of multiply-adds per element, from zero.
///
/// `x` rows are CHUNK apart; the NV panels are `panel_stride` floats apart, each [kc][16].
///
/// # Safety
/// The machine has the instructions of `S`; x holds MR rows of kc, the panels kc rows, c MR rows
/// of NV * 16 floats `ldc` apart.
#[inline(always)]
pub(crate) unsafe fn tile<S: Simd, const MR: usize, const NV: usize>(
    x: *const f32,
    panels: *const f32,
    panel_stride: usize,
    kc: usize,
    c: *mut f32,
    ldc: usize,
    add: bool,
) {
    // SAFETY: all offsets stay within what the caller vouches for.
    unsafe {
        let mut acc = [[S::splat(0.0); NV]; MR];
        for k in 0..kc {
            let mut w = [S::splat(0.0); NV];
            for (v, w) in w.iter_mut().enumerate() {
                *w = S::load(panels.add(v * panel_stride + k * PANEL));
            }
            for r in 0..MR {
                let x = S::splat(*x.add(r * CHUNK + k));
                for v in 0..NV {
                    acc[r][v] = S::fma(x, w[v], acc[r][v]);
                }
            }
        }
        for (r, acc) in acc.into_iter().enumerate() {
            for (v, mut sum) in acc.into_iter().enumerate() {
                let c = c.add(r * ldc + v * PANEL);
                if add {
                    sum = S::add(S::load(c), sum);
                }
                S::store(c, sum);
            }
        }
    }
}

/// out[NB][MB] = w[n0.., k] * x[m0.., k]: each lane sums every sixteenth k, then the lanes.
///
/// # Safety
/// The machine has the instructions of `S`; `n0 + NB <= w.n`, `m0 + MB <= x.rows`, and x covers
/// w.k rounded up to whole chunks, zero behind w.k.
#[inline(always)]
pub(crate) unsafe fn dots<S: Simd, C: Codec, const MB: usize, const NB: usize>(
    w: &Weight<'_>,
    x: XPanel,
    m0: usize,
    n0: usize,
    out: &mut [f32],
    bad: &mut [bool],
) {
    let (k_end, block_size) = (w.packed.k(), w.packed.spec().block_size);
    let starts: [*const u8; NB] = std::array::from_fn(|j| w.row(n0 + j).as_ptr());
    // SAFETY: units are read below the blocks of each row; x is padded to whole chunks.
    unsafe {
        let mut acc = [[S::splat(0.0); MB]; NB];
        for block in 0..w.packed.spec().blocks(k_end) {
            let mut factors = [S::splat(0.0); NB];
            for j in 0..NB {
                factors[j] = S::splat(w.factor(n0 + j, block, &mut bad[j]));
            }
            let end = ((block + 1) * block_size).min(k_end);
            let mut k = block * block_size;
            while k < end {
                let xs = x.at(m0, k);
                for j in 0..NB {
                    let from = starts[j].add(k / 16 * C::UNIT);
                    S::prefetch(from.wrapping_add(512));
                    let values = unit::<S, C>(from, end - k, factors[j]);
                    for i in 0..MB {
                        acc[j][i] = S::fma(values, S::load(xs.add(i * CHUNK)), acc[j][i]);
                    }
                }
                k += 16;
            }
        }
        for j in 0..NB {
            for i in 0..MB {
                out[j * MB + i] = S::sum(acc[j][i]);
            }
        }
    }
}

/// Sixteen values along k; from `left` on they are zero.
///
/// # Safety
/// The machine has the instructions of `S`; `from` holds UNIT bytes.
#[inline(always)]
unsafe fn unit<S: Simd, C: Codec>(from: *const u8, left: usize, factor: S::V) -> S::V {
    // SAFETY: the caller's promise is passed on.
    unsafe {
        if C::BITS == 16 {
            if left >= 16 {
                return S::load_bf16(from);
            }
            let mut bytes = [0_u8; 32];
            std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), 2 * left);
            return S::load_bf16(bytes.as_ptr());
        }
        let mut codes = S::unpack::<C>(from);
        if left < 16 {
            codes = S::keep(codes, left);
        }
        S::mul(S::decode::<C>(codes), factor)
    }
}
