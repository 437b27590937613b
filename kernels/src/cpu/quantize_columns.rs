//! Blocks of weights stored [k, n]: sixteen columns side by side, so that the largest magnitude and
//! the codes of a column take no shuffles. Only the codes are turned round, as bytes: a quarter of
//! what turning floats costs.
#![allow(unsafe_code)]

use super::{
    rows::{self, RowQuant, by_rounding},
    simd::{Fp8E4M3, Simd},
};
use crate::quantize::{FloatType, Rounding};

/// Columns that are quantised side by side.
pub(crate) const COLUMNS: usize = 16;

/// What [`code_columns`] works in: large enough that clearing it for every block would cost more than
/// the block.
pub(crate) struct Scratch {
    values: Vec<[f32; COLUMNS]>,
    codes: Vec<[u8; COLUMNS]>,
    column: Vec<f32>,
}

impl Scratch {
    pub(crate) fn new(block_size: usize) -> Self {
        Self {
            values: vec![[0.0; COLUMNS]; block_size],
            codes: vec![[0; COLUMNS]; block_size],
            column: vec![0.0; block_size],
        }
    }
}

/// One block of up to sixteen columns where it lies in a weight [k, n].
pub(crate) struct Strip<'a> {
    /// From the block's first element on.
    pub bytes: &'a [u8],
    pub float_type: FloatType,
    /// Bytes from one k to the next.
    pub stride: usize,
    /// Bytes from here to what is read soon.
    pub ahead: usize,
    /// k of the block that are there; the rest of the block is zeros.
    pub len: usize,
    pub columns: usize,
}

/// Stored elements as f32, exactly.
#[inline(always)]
pub(crate) fn load(float_type: FloatType, bytes: &[u8], out: &mut [f32]) {
    match float_type {
        FloatType::F32 => {
            for (o, b) in out.iter_mut().zip(bytes.chunks_exact(4)) {
                *o = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            }
        }
        FloatType::F16 => {
            for (o, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                *o = widen(u16::from_le_bytes([b[0], b[1]]));
            }
        }
        FloatType::Bf16 => {
            for (o, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                *o = f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16);
            }
        }
    }
}

/// [`load`] for whole vectors: from the bytes alone the compiler makes sixteen moves, and what reads
/// them as one waits for them.
#[inline(always)]
fn load_all(float_type: FloatType, bytes: &[u8]) -> [f32; COLUMNS] {
    let halves = || bytemuck::pod_read_unaligned::<[u16; COLUMNS]>(bytes).map(u16::from_le);
    match float_type {
        FloatType::F32 => bytemuck::pod_read_unaligned::<[u32; COLUMNS]>(bytes)
            .map(|bits| f32::from_bits(u32::from_le(bits))),
        FloatType::F16 => halves().map(widen),
        FloatType::Bf16 => halves().map(|half| f32::from_bits(u32::from(half) << 16)),
    }
}

/// An f16 as f32, subnormals included, in operations that every vector unit has.
#[inline(always)]
pub(super) fn widen(half: u16) -> f32 {
    let magnitude = u32::from(half & 0x7fff) << 13;
    // Infinity and NaN keep a full exponent; everything else moves by the difference of the biases.
    let top = if magnitude >= 0x0f80_0000 { 0x7f80_0000 } else { 0 };
    let value = f32::from_bits(magnitude) * f32::from_bits((127 + 112) << 23);
    f32::from_bits(value.to_bits() | top | u32::from(half & 0x8000) << 16)
}

/// The codes of a strip, one a byte: `out` [16, block size], and its scale bytes.
///
/// # Safety
/// Only on a machine with the instructions of `S`.
#[inline(always)]
pub(crate) unsafe fn code_columns<S: Simd>(
    q: &RowQuant,
    strip: &Strip<'_>,
    scratch: &mut Scratch,
    out: &mut [u8],
    scales: &mut [u8; COLUMNS],
) {
    let block = q.spec.block_size;
    let Scratch { values, codes, column } = scratch;
    let amax = match strip.float_type {
        FloatType::F32 => gather::<S, { FloatType::F32 as u8 }>(strip, values),
        FloatType::F16 => gather::<S, { FloatType::F16 as u8 }>(strip, values),
        FloatType::Bf16 => gather::<S, { FloatType::Bf16 as u8 }>(strip, values),
    };
    let mut inverses = [0.0_f32; COLUMNS];
    let mut odd = [false; COLUMNS];
    for c in 0..COLUMNS {
        match rows::inverse(q, amax[c]) {
            Some((inverse, scale)) => (inverses[c], scales[c]) = (inverse, scale),
            None => odd[c] = true,
        }
    }
    by_rounding!(q, block_codes(q, values, &inverses, codes));
    // SAFETY: the caller's promise is passed on.
    unsafe { turn::<S>(codes, out) };
    for c in (0..COLUMNS).filter(|&c| odd[c]) {
        for (to, row) in column.iter_mut().zip(&*values) {
            *to = row[c];
        }
        let scale = &mut scales[c..=c];
        rows::code_row(q, column, &mut out[c * block..][..block], scale);
    }
}

/// The strip as f32, with zeros where it ends early, and each column's largest magnitude as bits.
#[inline(always)]
fn gather<S: Simd, const T: u8>(
    strip: &Strip<'_>,
    values: &mut [[f32; COLUMNS]],
) -> [u32; COLUMNS] {
    let float_type = match T {
        0 => FloatType::F32,
        1 => FloatType::F16,
        _ => FloatType::Bf16,
    };
    if strip.columns < COLUMNS || strip.len < values.len() {
        values.fill([0.0; COLUMNS]);
    }
    let width = strip.columns * float_type.width();
    let mut amax = [0_u32; COLUMNS];
    for (j, row) in values[..strip.len].iter_mut().enumerate() {
        let at = j * strip.stride;
        let bytes = &strip.bytes[at..][..width];
        // The same k's of the next block: rows are pages apart, which no hardware follows.
        // SAFETY: an address that is only asked for need not be valid.
        unsafe { S::prefetch(strip.bytes.as_ptr().wrapping_add(at + strip.ahead)) };
        if strip.columns == COLUMNS {
            *row = load_all(float_type, bytes);
        } else {
            load(float_type, bytes, &mut row[..strip.columns]);
        }
        for c in 0..COLUMNS {
            amax[c] = amax[c].max(row[c].to_bits() & 0x7fff_ffff);
        }
    }
    amax
}

#[inline(always)]
fn block_codes<const R: u8>(
    q: &RowQuant,
    values: &[[f32; COLUMNS]],
    inverses: &[f32; COLUMNS],
    out: &mut [[u8; COLUMNS]],
) {
    for (out, row) in out.iter_mut().zip(values) {
        for c in 0..COLUMNS {
            out[c] = rows::code::<R>(q, row[c], inverses[c]);
        }
    }
}

/// codes [block, 16] -> out [16, block].
///
/// # Safety
/// Only on a machine with the instructions of `S`.
#[inline(always)]
unsafe fn turn<S: Simd>(codes: &[[u8; COLUMNS]], out: &mut [u8]) {
    const { assert!(size_of::<S::Codes>() == COLUMNS) };
    let block = codes.len();
    assert_eq!(out.len(), COLUMNS * block);
    for (at, square) in codes.chunks_exact(COLUMNS).enumerate() {
        // SAFETY: each row is sixteen bytes, what `unpack` reads for an eight-bit format.
        let square: [S::Codes; COLUMNS] =
            std::array::from_fn(|j| unsafe { S::unpack::<Fp8E4M3>(square[j].as_ptr()) });
        // SAFETY: the caller's promise is passed on.
        let square = unsafe { S::transpose(square) };
        for (c, codes) in square.into_iter().enumerate() {
            let to = &mut out[c * block + at * COLUMNS..][..COLUMNS];
            // SAFETY: `to` is sixteen bytes, and so is `codes`.
            unsafe { to.as_mut_ptr().cast::<S::Codes>().write_unaligned(codes) };
        }
    }
}
