//! What a code means, as the tables that the kernels look it up in.

use crate::formats::ElementFormat;

/// log2 of the factor that makes every value of a format an integer of at most eight bits; `None`
/// where there is none.
pub(crate) const fn integer_shift(format: ElementFormat) -> Option<i32> {
    match format {
        ElementFormat::Fp4E2M1 => Some(1),
        ElementFormat::Fp6E2M3 => Some(3),
        ElementFormat::MxInt8 => Some(6),
        _ => None,
    }
}

/// What is added to a weight's integers so that none is negative.
pub(crate) const fn offset(format: ElementFormat) -> i32 {
    match format {
        ElementFormat::Fp4E2M1 => 12,
        ElementFormat::Fp6E2M3 => 60,
        _ => 128,
    }
}

/// Tables of one format, by code. Where a format has fewer codes than a table has places they repeat,
/// so that bits above the code do not matter.
#[repr(C, align(64))]
#[derive(Debug)]
pub(crate) struct Tables {
    /// Integer + [`offset`] of a code of at most six bits.
    pub unsigned: [u8; 64],
    /// The same without the offset, as i8.
    pub signed: [u8; 64],
    /// High and low bytes of the value as bfloat16: of the 128 magnitudes of eight-bit codes, of
    /// shorter codes with their signs.
    pub high: [u8; 128],
    pub low: [u8; 128],
    /// The value of a code of four bits as bfloat16, and as f32.
    pub words: [u16; 32],
    pub floats: [f32; 16],
}

impl Tables {
    pub(crate) fn new(format: ElementFormat) -> Self {
        let count = format.code_count().min(128);
        let value = |i: usize| format.decode(i as u32 % count);
        let shift = integer_shift(format).unwrap_or(0);
        let integer = |i: usize| (value(i) * (1 << shift) as f32) as i32;
        let bf16 = |i: usize| (value(i).to_bits() >> 16) as u16;
        Self {
            unsigned: std::array::from_fn(|i| (integer(i) + offset(format)) as u8),
            signed: std::array::from_fn(|i| integer(i) as u8),
            high: std::array::from_fn(|i| (bf16(i) >> 8) as u8),
            low: std::array::from_fn(|i| bf16(i) as u8),
            words: std::array::from_fn(bf16),
            floats: std::array::from_fn(value),
        }
    }
}
