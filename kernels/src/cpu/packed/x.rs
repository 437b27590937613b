//! x as the packed kernels read it: quantised, in tiles of rows, a block of k after the other.
//!
//! A tile's rows lie together: [block][row][32], so that a kernel walks through one stretch of memory.
//! Plain code that the compiler vectorises once for each variant's instructions.
#![allow(unsafe_code)]

use super::{
    super::rows::{self, RowQuant, by_rounding},
    layout::{BLOCK, Row, X_WINDOW},
    planes::{self, PLANES, Rest},
    tables,
};
use crate::quantize::Rounding;

/// What the elements of x become.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// i8, values times 2^shift, in [`super::layout::ORDER`]. `total` is the shift of both operands, taken
    /// back by the scale; `offset` is the weight's.
    Integer { shift: i32, total: i32, offset: i32 },
    /// i16 in their order, values times 2^shift; `total` is the shift of both operands.
    Words { shift: i32, total: i32 },
    /// e3m2 as two integers of eight bits each, 16 times one and the other: [block][row][2][32].
    Split { total: i32, offset: i32 },
    /// x itself in planes of such integers: [block][plane][32].
    Planes { offset: i32, shift: i32 },
    /// bfloat16 without their scale.
    Bf16,
    /// bfloat16 with their scale.
    FoldedBf16,
    /// x itself in so many bfloat16, one or two: [block][part][row][32].
    Parts(usize),
    /// f32 without their scale, or x itself.
    F32,
}

impl Form {
    /// Bytes of 32 elements.
    pub(crate) const fn block_bytes(self) -> usize {
        BLOCK
            * match self {
                Self::Integer { .. } => 1,
                Self::Words { .. } | Self::Split { .. } => 2,
                Self::Planes { .. } => PLANES,
                Self::Bf16 | Self::FoldedBf16 => 2,
                Self::Parts(parts) => 2 * parts,
                Self::F32 => 4,
            }
    }
}

impl Form {
    /// Rows of the kernels that are one of x.
    pub(crate) const fn rows(self) -> usize {
        match self {
            Self::Split { .. } => 2,
            Self::Planes { .. } => PLANES,
            _ => 1,
        }
    }
}

/// Where one row goes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place {
    /// The row's first block of elements, its first scale and its first sum.
    pub data: *mut u8,
    pub scales: *mut i32,
    pub sums: *mut i32,
    /// Rows of the tile, as the kernels count them.
    pub rows: usize,
    /// What [`Form::Planes`] leaves of the row.
    pub rests: *mut Vec<Rest>,
}

/// How x is quantised and what it becomes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct XForm {
    pub quant: Option<RowQuant>,
    pub form: Form,
}

/// Writes one row of x, `k` floats, with zeros behind it to a whole block. Also returns the smallest
/// exponent in it: of the scales of blocks that are not zero, or of an unquantised x.
///
/// # Safety
/// `place` has room for ceil(k / 32) blocks, `place.rows` rows apart.
#[inline(always)]
pub(crate) unsafe fn pack_row(form: &XForm, x: &[f32], place: &Place) -> (Row, i32) {
    // SAFETY: the caller's promise is passed on.
    unsafe {
        match &form.quant {
            Some(quant) => by_rounding!(quant, quantised<>(quant, form.form, x, place)),
            None => match form.form {
                Form::Planes { offset, shift } => planes::pack(x, offset, shift, place),
                form => plain(form, x, place),
            },
        }
    }
}

/// # Safety
/// As [`pack_row`].
#[inline(always)]
unsafe fn quantised<const R: u8>(q: &RowQuant, form: Form, x: &[f32], place: &Place) -> (Row, i32) {
    let (mut row, mut low) = (Row::Plain, 0);
    let mut b = 0;
    for block in x.chunks(q.spec.block_size) {
        let amax = rows::amax_bits(block);
        let (mut inverse, mut exponent) = (1.0, 0);
        match rows::inverse(q, amax) {
            Some(_) if amax == 0 => {}
            Some((inv, byte)) => {
                (inverse, exponent) = (inv, i32::from(byte) - 127);
                if !X_WINDOW.contains(&exponent) {
                    (row, exponent) = (worse(row, Row::Exact), 0);
                }
                low = low.min(exponent);
            }
            // No finite largest magnitude, or an exponent outside the window.
            None if amax >= rows::INFINITY => row = Row::Nan,
            None => row = worse(row, Row::Exact),
        }
        for part in block.chunks(BLOCK) {
            let mut values = [0.0_f32; BLOCK];
            if let Ok(part) = <&[f32; BLOCK]>::try_from(part) {
                elements::<R>(q, part, inverse, &mut values);
            } else {
                let mut padded = [0.0_f32; BLOCK];
                padded[..part.len()].copy_from_slice(part);
                elements::<R>(q, &padded, inverse, &mut values);
            }
            // SAFETY: the caller vouches for every block of the row.
            unsafe { write(form, &mut values, exponent, b, place) };
            b += 1;
        }
    }
    (row, low)
}

fn worse(row: Row, other: Row) -> Row {
    if row == Row::Nan { row } else { other }
}

/// Rounded elements, without the scale.
#[inline(always)]
fn elements<const R: u8>(q: &RowQuant, x: &[f32; BLOCK], inverse: f32, out: &mut [f32; BLOCK]) {
    for (o, &v) in out.iter_mut().zip(x) {
        *o = rows::element::<R>(q, v, inverse);
    }
}

/// # Safety
/// `place` has a block `b`.
#[inline(always)]
unsafe fn write(form: Form, values: &mut [f32; BLOCK], exponent: i32, b: usize, place: &Place) {
    // SAFETY: the caller vouches for the block.
    unsafe {
        let data = place.data.add(b * place.rows * (form.block_bytes() / form.rows()));
        let at = b * place.rows;
        match form {
            Form::Words { shift, total } => {
                let factor = (1 << shift) as f32;
                let mut words = [0_i16; BLOCK];
                for (word, v) in words.iter_mut().zip(&*values) {
                    // SAFETY: elements times 2^shift are integers of at most ten bits.
                    *word = (v * factor).to_int_unchecked::<i32>() as i16;
                }
                data.cast::<[i16; BLOCK]>().write_unaligned(words);
                *place.scales.add(at) = (exponent - total) << 23;
                *place.sums.add(at) = 0;
            }
            Form::Split { total, offset } => {
                let mut parts = [[0_u8; BLOCK]; 2];
                let mut sums = [0; 2];
                for (i, v) in values.iter().enumerate() {
                    // SAFETY: the integers are 448 at most.
                    let whole = (v * 16.0).to_int_unchecked::<i32>();
                    // Both have the sign of x: in sums of magnitudes they are x.
                    for (p, part) in [whole / 16, whole % 16].into_iter().enumerate() {
                        sums[p] += part;
                        parts[p][i] = part as u8;
                    }
                }
                for p in 0..2 {
                    store_integers(&parts[p], data.add(p * BLOCK));
                    let unit = if p == 0 { tables::SPLIT_SHIFT } else { 0 };
                    *place.scales.add(at + p) = (exponent + unit - total) << 23;
                    *place.sums.add(at + p) = -offset * sums[p];
                }
            }
            Form::Integer { shift, total, offset } => {
                let factor = (1 << shift) as f32;
                let mut sum = 0;
                let mut bytes = [0_u8; BLOCK];
                for (byte, v) in bytes.iter_mut().zip(&*values) {
                    // SAFETY: elements times 2^shift are integers of at most eight bits.
                    let integer = (v * factor).to_int_unchecked::<i32>();
                    sum += integer;
                    *byte = integer as u8;
                }
                store_integers(&bytes, data);
                *place.scales.add(at) = (exponent - total) << 23;
                *place.sums.add(at) = -offset * sum;
            }
            Form::FoldedBf16 => {
                let factor = f32::from_bits(((exponent + 127) as u32) << 23);
                for v in values.iter_mut() {
                    *v *= factor;
                }
                store_bf16(values, data);
            }
            Form::Bf16 => {
                store_bf16(values, data);
                *place.scales.add(at) = exponent << 23;
            }
            Form::F32 => {
                data.cast::<[f32; BLOCK]>().write_unaligned(*values);
                *place.scales.add(at) = exponent << 23;
            }
            Form::Parts(_) | Form::Planes { .. } => {}
        }
    }
}

/// Bytes in the order of a lane: the middle two change places.
#[inline(always)]
pub(super) unsafe fn store_integers(bytes: &[u8; BLOCK], to: *mut u8) {
    let words: [u32; BLOCK / 4] = bytemuck::cast(*bytes);
    let words = words.map(|w| {
        let w = u32::from_le(w);
        (w & 0xff00_00ff | (w & 0xff00) << 8 | (w >> 8) & 0xff00).to_le()
    });
    // SAFETY: the caller vouches for 32 bytes.
    unsafe { to.cast::<[u32; BLOCK / 4]>().write_unaligned(words) }
}

/// The high halves of floats that are bfloat16.
#[inline(always)]
unsafe fn store_bf16(values: &[f32; BLOCK], to: *mut u8) {
    let mut halves = [0_u16; BLOCK];
    for (half, v) in halves.iter_mut().zip(values) {
        *half = (v.to_bits() >> 16) as u16;
    }
    // SAFETY: the caller vouches for 64 bytes.
    unsafe { to.cast::<[u16; BLOCK]>().write_unaligned(halves) }
}

/// Magnitudes of x from which a sum of products with a weight's unscaled elements may overflow.
pub(super) const HUGE: u32 = (127 + 55) << 23;

/// x as it is.
///
/// # Safety
/// As [`pack_row`].
#[inline(always)]
unsafe fn plain(form: Form, x: &[f32], place: &Place) -> (Row, i32) {
    let (mut largest, mut smallest) = (0_u32, u32::MAX);
    for v in x {
        let bits = v.to_bits() & 0x7fff_ffff;
        largest = largest.max(bits);
        // Zeros wrap round.
        smallest = smallest.min(bits.wrapping_sub(1));
    }
    let low = match smallest {
        u32::MAX => 0,
        below => (((below + 1) >> 23) as i32 - 127).min(0),
    };
    for (b, part) in x.chunks(BLOCK).enumerate() {
        let mut values = [0.0_f32; BLOCK];
        values[..part.len()].copy_from_slice(part);
        // SAFETY: the caller vouches for every block of the row.
        unsafe {
            let data = place.data.add(b * place.rows * form.block_bytes());
            match form {
                Form::Parts(parts) => {
                    for p in 0..parts {
                        let high = values.map(bf16_part);
                        store_bf16(&high, data.add(p * place.rows * 2 * BLOCK));
                        for (v, h) in values.iter_mut().zip(high) {
                            *v -= h;
                        }
                    }
                }
                _ => data.cast::<[f32; BLOCK]>().write_unaligned(values),
            }
            *place.scales.add(b * place.rows) = 0;
        }
    }
    let row = match largest {
        bits if bits > rows::INFINITY => Row::Nan,
        bits if bits >= HUGE => Row::Exact,
        _ => Row::Plain,
    };
    (row, low)
}

/// The nearest bfloat16 of a float below [`HUGE`].
#[inline(always)]
fn bf16_part(v: f32) -> f32 {
    let bits = v.to_bits();
    f32::from_bits(bits.wrapping_add(0x7fff + (bits >> 16 & 1)) & 0xffff_0000)
}
