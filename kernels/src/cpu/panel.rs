//! Weights as f32: a panel of decoded codes with their scales folded in.
//!
//! A panel holds kc x 16 floats, k outermost, so that the tile kernel loads sixteen output features
//! at a time. Scales are folded in; a block whose scale cannot be folded without leaving the normal
//! f32 reports its row, which is then computed in f64 (`linear::exact_rows`).
#![allow(unsafe_code)]
// Two or three arrays run along one index; an iterator over one of them would hide that.
#![allow(clippy::needless_range_loop)]

use super::simd::{Codec, Simd, shift};
use crate::{
    formats::ElementFormat,
    scale::{SCALE_NAN, ScaleKind},
    tensor::PackedWeight,
};

/// Rows of a panel: output features in one [`Simd::V`].
pub(crate) const PANEL: usize = 16;

/// How far ahead of its use a code is asked for, in k.
const AHEAD: usize = 256;

/// Smallest and largest e for which every non-zero element times 2^e is a normal f32.
pub(crate) fn exponent_window(format: ElementFormat) -> (i32, i32) {
    let row = format.row();
    // The code -128, which only imported weights hold, is -2: one power above emax.
    let top = if format == ElementFormat::MxInt8 { 1 } else { row.emax };
    (-126 - (row.emin() - row.mantissa_bits as i32), 127 - top)
}

/// For each scale byte the factor that makes a decoded code its value: 2^(e + SHIFT), NaN for a NaN
/// block and 0 where value or factor would leave the normal f32.
struct ScaleTable([f32; 256]);

impl ScaleTable {
    fn new(format: ElementFormat, shift: i32) -> Self {
        let (low, high) = exponent_window(format);
        Self(std::array::from_fn(|byte| {
            let e = byte as i32 - 127;
            if byte == usize::from(SCALE_NAN) {
                f32::NAN
            } else if (low..=high).contains(&e) && (-126..=127).contains(&(e + shift)) {
                f32::from_bits(((e + shift + 127) as u32) << 23)
            } else {
                0.0
            }
        }))
    }
}

/// A weight with what decoding needs besides.
pub(crate) struct Weight<'a> {
    pub packed: PackedWeight<'a>,
    table: ScaleTable,
    /// The same factor for all blocks, where there are no block scales.
    uniform: f32,
    /// Packed bytes and scale bytes of a row; the latter 0 without block scales.
    row_bytes: usize,
    row_scales: usize,
}

impl<'a> Weight<'a> {
    pub(crate) fn new(packed: PackedWeight<'a>) -> Self {
        let (spec, k) = (packed.spec(), packed.k());
        let shift = shift(spec.format);
        Self {
            packed,
            table: ScaleTable::new(spec.format, shift),
            uniform: f32::from_bits(((shift + 127) as u32) << 23),
            row_bytes: spec.row_bytes(k),
            row_scales: if spec.scale == ScaleKind::E8M0 { spec.blocks(k) } else { 0 },
        }
    }

    /// Packed bytes of row `n`.
    #[inline(always)]
    pub(crate) fn row(&self, n: usize) -> &[u8] {
        &self.packed.codes()[n * self.row_bytes..(n + 1) * self.row_bytes]
    }

    /// Factor of block `b` of row `n`; sets `bad` where it cannot be folded.
    #[inline(always)]
    pub(crate) fn factor(&self, n: usize, b: usize, bad: &mut bool) -> f32 {
        if self.row_scales == 0 {
            return self.uniform;
        }
        let byte = self.packed.scales()[n * self.row_scales + b];
        let factor = self.table.0[usize::from(byte)];
        if factor == 0.0 {
            *bad |= !self.is_zero(n, b);
        }
        factor
    }

    /// Whether every code of a block is a zero: then any scale does.
    #[cold]
    fn is_zero(&self, n: usize, b: usize) -> bool {
        let spec = self.packed.spec();
        let bytes = spec.block_bytes();
        let block = &self.row(n)[b * bytes..(b + 1) * bytes];
        let mut codes = vec![0_u16; spec.block_size];
        crate::pack::unpack(spec.format, block, &mut codes);
        codes.iter().all(|&code| spec.format.decode(u32::from(code)) == 0.0)
    }
}

/// Decodes rows `n0..n0 + 16` (the last row again past the end), k from `k0` to `k0 + kc`, to
/// `out[(k - k0) * 16 + row]`. `k0` is a multiple of 16; `out` holds ceil(kc / 16) * 16 rows.
///
/// # Safety
/// The machine has the instructions of `S`; `k0 + kc` is at most k; `out` is large enough.
#[inline(always)]
pub(crate) unsafe fn decode_panel<S: Simd, C: Codec>(
    w: &Weight<'_>,
    n0: usize,
    k0: usize,
    kc: usize,
    out: *mut f32,
    bad: &mut [bool; PANEL],
) {
    let block_size = w.packed.spec().block_size;
    let rows: [usize; PANEL] = std::array::from_fn(|j| (n0 + j).min(w.packed.n() - 1));
    let starts = rows.map(|n| w.row(n).as_ptr());
    let mut k = k0;
    while k < k0 + kc {
        let block = k / block_size;
        let mut factors = [0.0_f32; PANEL];
        for j in 0..PANEL {
            factors[j] = w.factor(rows[j], block, &mut bad[j]);
        }
        let end = ((block + 1) * block_size).min(k0 + kc);
        while k < end {
            // SAFETY: k is a multiple of 16 below w.k and rows hold whole blocks of codes, of at
            // least 16, so UNIT bytes lie at k's offset; `out` holds the 16 rows from k - k0 on.
            unsafe {
                let at = k / 16 * C::UNIT;
                let factor = S::load(factors.as_ptr());
                let out = out.add((k - k0) * PANEL);
                // Rows are far apart, which hardware does not foresee: ask for the next chunk, a
                // quarter of the rows at a time, as a cache line lasts for four units or more.
                for j in 0..PANEL / 4 {
                    let row = starts[k / 16 % 4 * 4 + j];
                    S::prefetch(row.wrapping_add(at + AHEAD / 16 * C::UNIT));
                }
                if C::BITS == 16 {
                    decode_unit_bf16::<S>(&starts, at, out);
                } else {
                    decode_unit::<S, C>(&starts, at, factor, out);
                }
            }
            k += 16;
        }
    }
}

/// Sixteen rows of sixteen codes, transposed as bytes before they are widened.
#[inline(always)]
unsafe fn decode_unit<S: Simd, C: Codec>(
    starts: &[*const u8; PANEL],
    at: usize,
    factor: S::V,
    out: *mut f32,
) {
    // SAFETY: the caller vouches for UNIT bytes at `at` of each row and 16 rows of `out`.
    unsafe {
        let mut codes = [S::unpack::<C>(starts[0].add(at)); PANEL];
        for j in 1..PANEL {
            codes[j] = S::unpack::<C>(starts[j].add(at));
        }
        let columns = S::transpose(codes);
        for (i, column) in columns.into_iter().enumerate() {
            S::store(out.add(i * PANEL), S::mul(S::decode::<C>(column), factor));
        }
    }
}

/// bf16 has two bytes a code: widened first, transposed as floats.
#[inline(always)]
unsafe fn decode_unit_bf16<S: Simd>(starts: &[*const u8; PANEL], at: usize, out: *mut f32) {
    let mut values = [[0.0_f32; 16]; PANEL];
    for (values, start) in values.iter_mut().zip(starts) {
        // SAFETY: the caller vouches for 32 bytes at `at` of each row.
        unsafe { S::store(values.as_mut_ptr(), S::load_bf16(start.add(at))) };
    }
    for i in 0..16 {
        let row: [f32; PANEL] = std::array::from_fn(|j| values[j][i]);
        // SAFETY: the caller vouches for 16 rows of `out`.
        unsafe { S::store(out.add(i * PANEL), S::load(row.as_ptr())) };
    }
}
