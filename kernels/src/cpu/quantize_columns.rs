//! Blocks of weights stored [k, n], sixteen columns side by side, so that the largest magnitude and
//! the codes of a column take no shuffles. Only the codes are turned round, as bytes: a quarter of
//! what turning floats costs.
//!
//! A weight's rows are a multiple of the page size apart as often as not, so that the lines of a few
//! columns share a handful of places in the caches. They are therefore read as rows of a strip of
//! columns, in order, into lines that lie close to each other; the codes leave the same way.
#![allow(unsafe_code)]

use super::{
    rows::{self, RowQuant, by_format, by_rounding},
    simd::{Codec, Simd},
};
use crate::{
    pack,
    quantize::{FloatType, Rounding},
};

/// Columns that are quantised side by side.
pub(crate) const COLUMNS: usize = 16;

/// Columns whose blocks are done together: a kilobyte of f32 for each k, since every k is another page.
pub(crate) const STRIP: usize = COLUMNS * GROUPS;
const GROUPS: usize = 16;

/// One value of each of [`COLUMNS`] columns.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Line(pub [f32; COLUMNS]);

/// Lines from one k to the next: one more than needed, so that those of a column are not all in the
/// same place of the first cache.
pub(crate) const PITCH: usize = GROUPS + 1;

/// One block of up to [`STRIP`] columns where it lies in a weight [k, n].
pub(crate) struct Strip<'a> {
    /// From the block's first element on.
    pub bytes: &'a [u8],
    pub float_type: FloatType,
    /// Bytes from one k to the next.
    pub stride: usize,
    /// k of the block that are there; the rest of the block is zeros.
    pub len: usize,
    pub columns: usize,
}

/// What [`code_columns`] works in, and its results for a few blocks of a strip.
pub(crate) struct Scratch {
    values: Vec<Line>,
    amax: [[u32; COLUMNS]; GROUPS],
    column: Vec<f32>,
    unpacked: Vec<u8>,
    block_bytes: usize,
    /// Blocks that fit.
    pub blocks: usize,
    /// Packed codes [STRIP, blocks, bytes of a block].
    packed: Vec<u8>,
    /// [blocks, STRIP].
    scales: Vec<[u8; COLUMNS]>,
}

/// Bytes of a column's codes that are written together: four cache lines.
const TOGETHER: usize = 256;

impl Scratch {
    pub(crate) fn new(q: &RowQuant) -> Self {
        let (block_size, block_bytes) = (q.spec.block_size, q.spec.block_bytes());
        let blocks = TOGETHER.div_ceil(block_bytes);
        Self {
            values: vec![Line([0.0; COLUMNS]); block_size * PITCH],
            amax: [[0; COLUMNS]; GROUPS],
            column: vec![0.0; block_size],
            unpacked: vec![0; block_size],
            block_bytes,
            blocks,
            packed: vec![0; STRIP * blocks * block_bytes],
            scales: vec![[0; COLUMNS]; blocks * GROUPS],
        }
    }

    /// Packed codes of the first `blocks` blocks of a column.
    pub(crate) fn packed(&self, column: usize, blocks: usize) -> &[u8] {
        &self.packed[column * self.blocks * self.block_bytes..][..blocks * self.block_bytes]
    }

    /// Scale byte of a block of a column.
    pub(crate) fn scale(&self, column: usize, block: usize) -> u8 {
        self.scales[block * GROUPS..][..GROUPS].as_flattened()[column]
    }
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

/// [`load`] of sixteen as a vector.
///
/// # Safety
/// As for [`code_columns`].
#[inline(always)]
unsafe fn load_all<S: Simd, const T: u8>(bytes: &[u8]) -> S::V {
    // SAFETY: the caller's promise is passed on; sixteen elements are there.
    unsafe {
        match T {
            0 => {
                let bits = bytemuck::pod_read_unaligned::<[u32; COLUMNS]>(&bytes[..4 * COLUMNS]);
                S::load(bits.map(|bits| f32::from_bits(u32::from_le(bits))).as_ptr())
            }
            1 => S::load_f16(bytes[..2 * COLUMNS].as_ptr()),
            _ => S::load_bf16(bytes[..2 * COLUMNS].as_ptr()),
        }
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

/// The packed codes and scale bytes of a block of a strip, into block `slot` of the scratch.
///
/// # Safety
/// Only on a machine with the instructions of `S`.
#[inline(always)]
pub(crate) unsafe fn code_columns<S: Simd>(
    q: &RowQuant,
    strip: &Strip<'_>,
    slot: usize,
    scratch: &mut Scratch,
) {
    let (values, amax) = (&mut scratch.values[..], &mut scratch.amax);
    // SAFETY: the caller's promise is passed on.
    unsafe {
        match strip.float_type {
            FloatType::F32 => gather::<S, { FloatType::F32 as u8 }>(strip, values, amax),
            FloatType::F16 => gather::<S, { FloatType::F16 as u8 }>(strip, values, amax),
            FloatType::Bf16 => gather::<S, { FloatType::Bf16 as u8 }>(strip, values, amax),
        }
        by_format!(q, C => by_rounding!(q, codes<S, C>(q, strip, slot, scratch)));
    }
}

/// How many rows ahead the lines of a strip are asked for.
const AHEAD: usize = 2;

/// The strip as f32, with zeros where it ends early, and each column's largest magnitude as bits.
///
/// # Safety
/// As for [`code_columns`].
#[inline(always)]
unsafe fn gather<S: Simd, const T: u8>(
    strip: &Strip<'_>,
    values: &mut [Line],
    amax: &mut [[u32; COLUMNS]; GROUPS],
) {
    let float_type = match T {
        0 => FloatType::F32,
        1 => FloatType::F16,
        _ => FloatType::Bf16,
    };
    if !strip.columns.is_multiple_of(COLUMNS) || strip.len * PITCH < values.len() {
        values.fill(Line([0.0; COLUMNS]));
    }
    *amax = [[0; COLUMNS]; GROUPS];
    let width = float_type.width();
    for (j, lines) in values.chunks_exact_mut(PITCH).take(strip.len).enumerate() {
        let row = &strip.bytes[j * strip.stride..][..strip.columns * width];
        let sixteens = row.chunks_exact(COLUMNS * width);
        let rest = sixteens.remainder();
        for ((bytes, line), amax) in sixteens.zip(&mut *lines).zip(&mut *amax) {
            // SAFETY: the caller's promise is passed on; a line is sixteen floats, and so is `amax`.
            unsafe {
                // Rows are pages apart, which no hardware follows.
                S::prefetch(bytes.as_ptr().wrapping_add(AHEAD * strip.stride));
                let v = load_all::<S, T>(bytes);
                S::store(line.0.as_mut_ptr(), v);
                raise::<S>(amax, v);
            }
        }
        if !rest.is_empty() {
            let group = strip.columns / COLUMNS;
            load(float_type, rest, &mut lines[group].0);
            // SAFETY: as above.
            unsafe { raise::<S>(&mut amax[group], S::load(lines[group].0.as_ptr())) };
        }
    }
}

/// Largest magnitudes with those of `v`, as bits.
///
/// # Safety
/// As for [`code_columns`].
#[inline(always)]
unsafe fn raise<S: Simd>(amax: &mut [u32; COLUMNS], v: S::V) {
    let amax = amax.as_mut_ptr().cast::<f32>();
    // SAFETY: sixteen numbers of four bytes.
    unsafe { S::store(amax, S::max_magnitude(S::load(amax), v)) };
}

#[inline(always)]
unsafe fn codes<S: Simd, C: Codec, const R: u8>(
    q: &RowQuant,
    strip: &Strip<'_>,
    slot: usize,
    scratch: &mut Scratch,
) {
    let block = q.spec.block_size;
    let pitch = scratch.blocks * scratch.block_bytes;
    let groups = strip.columns.div_ceil(COLUMNS);
    for group in 0..groups {
        let values = &scratch.values[group..];
        let scales = &mut scratch.scales[slot * GROUPS + group];
        let (inverses, odd) = rows::inverses(q, &scratch.amax[group], scales);
        let first = group * COLUMNS * pitch + slot * scratch.block_bytes;
        let out = &mut scratch.packed[first..];
        assert!(values.len() > (block - 1) * PITCH);
        assert!(out.len() >= (COLUMNS - 1) * pitch + scratch.block_bytes);
        // SAFETY: the caller's promise is passed on; a block of lines is there, and the packed bytes
        // of a block for each of sixteen columns.
        unsafe {
            S::pack_columns::<C, R>(values.as_ptr(), block, &inverses, out.as_mut_ptr(), pitch)
        };
        if odd == 0 {
            continue;
        }
        for c in (0..COLUMNS).filter(|c| odd >> c & 1 != 0) {
            for (to, line) in scratch.column.iter_mut().zip(values.iter().step_by(PITCH)) {
                *to = line.0[c];
            }
            rows::code_row(q, &scratch.column, &mut scratch.unpacked, &mut scales[c..=c]);
            let out = &mut out[c * pitch..][..scratch.block_bytes];
            pack::pack_bytes(q.spec.format, &scratch.unpacked, out);
        }
    }
}

/// [`Simd::pack_columns`] in plain code.
///
/// # Safety
/// As there.
#[inline(always)]
pub(super) unsafe fn pack_columns<C: Codec, const R: u8>(
    values: *const Line,
    block: usize,
    inverses: &[f32; COLUMNS],
    out: *mut u8,
    pitch: usize,
) {
    for at in (0..block).step_by(COLUMNS) {
        let mut codes = [[0_u8; COLUMNS]; COLUMNS];
        for (j, codes) in codes.iter_mut().enumerate() {
            // SAFETY: the caller vouches for `block` lines.
            let line = unsafe { &*values.add((at + j) * PITCH) };
            for c in 0..COLUMNS {
                codes[c] = rows::code::<R>(&C::CONSTANTS, line.0[c], inverses[c]);
            }
        }
        let turned: [[u8; COLUMNS]; COLUMNS] =
            std::array::from_fn(|c| std::array::from_fn(|j| codes[j][c]));
        for (c, codes) in turned.iter().enumerate() {
            // SAFETY: the caller vouches for the packed bytes of a block in every column.
            let out = unsafe {
                std::slice::from_raw_parts_mut(out.add(c * pitch + at * C::BITS / 8), C::UNIT)
            };
            pack::pack_bytes(C::FORMAT, codes, out);
        }
    }
}
