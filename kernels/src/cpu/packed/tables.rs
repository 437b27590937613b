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

/// [`integer_shift`] with which e3m2 is 16 a + b, a and b small.
pub(crate) const SPLIT_SHIFT: i32 = 4;

/// log2 of the factor that makes every value an integer, or two small ones.
pub(crate) const fn whole_shift(format: ElementFormat) -> Option<i32> {
    match format {
        ElementFormat::Fp6E3M2 => Some(SPLIT_SHIFT),
        _ => integer_shift(format),
    }
}

/// What is added to a weight's integers so that none is negative; to the larger one of two.
pub(crate) const fn offset(format: ElementFormat) -> i32 {
    match format {
        ElementFormat::Fp4E2M1 => 12,
        ElementFormat::Fp6E2M3 => 60,
        ElementFormat::Fp6E3M2 => 28,
        _ => 128,
    }
}

/// How codes of eight bits become upper halves of floats by a shift.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Words {
    /// Bits to the right, from the upper byte of a word.
    pub shift: u32,
    /// Sign, exponent and mantissa there.
    pub mask: u16,
    /// What the exponent's other bits are filled with.
    pub exponent: u16,
    /// log2 of what the floats are too small by.
    pub left_out: i32,
    /// Magnitudes below this have no implicit bit: zero and the subnormal ones.
    pub small: u8,
}

/// [`Words`] of a format; shorter codes go by tables and leave nothing out.
pub(crate) const fn words(format: ElementFormat) -> Words {
    match format {
        ElementFormat::Fp8E4M3 => {
            Words { shift: 4, mask: 0x87f0, exponent: 0x3800, left_out: 8, small: 8 }
        }
        ElementFormat::Fp8E5M2 => {
            Words { shift: 3, mask: 0x8fe0, exponent: 0x3000, left_out: 16, small: 4 }
        }
        _ => Words { shift: 0, mask: 0, exponent: 0, left_out: 0, small: 0 },
    }
}

/// Tables of one format, by code. Where a format has fewer codes than a table has places they repeat,
/// so that bits above the code do not matter.
#[repr(C, align(64))]
#[derive(Debug)]
pub(crate) struct Tables {
    /// Integer + [`offset`] of a code of at most six bits; of e3m2 the integer / 16, rounded down.
    pub unsigned: [u8; 64],
    /// What that leaves of e3m2.
    pub rest: [u8; 64],
    /// The same without the offset, as i8.
    pub signed: [u8; 64],
    /// High and low bytes of the value as bfloat16: of the 128 magnitudes of eight-bit codes, of
    /// shorter codes with their signs.
    pub high: [u8; 128],
    pub low: [u8; 128],
    /// The value of a code of four bits as bfloat16, and as f32.
    pub words: [u16; 32],
    pub floats: [f32; 16],
    /// What to flip in the bytes of small magnitudes that [`Words`] got wrong, by magnitude + 16 - [`Words::small`].
    pub mend_high: [u8; 16],
    pub mend_low: [u8; 16],
    /// By how much e2m3's integers from 16 up are above the low four bits of their codes.
    pub above: [u8; 16],
}

// AVX-512 takes these as whole registers.
const _: () = {
    use std::mem::offset_of;
    let whole = [
        offset_of!(Tables, unsigned),
        offset_of!(Tables, rest),
        offset_of!(Tables, signed),
        offset_of!(Tables, high),
        offset_of!(Tables, low),
        offset_of!(Tables, words),
        offset_of!(Tables, floats),
    ];
    let mut i = 0;
    while i < whole.len() {
        assert!(whole[i].is_multiple_of(align_of::<Tables>()));
        i += 1;
    }
};

impl Tables {
    pub(crate) fn new(format: ElementFormat) -> Self {
        let count = format.code_count().min(128);
        let value = |i: usize| format.decode(i as u32 % count);
        let shift = whole_shift(format).unwrap_or(0);
        let whole = |i: usize| (value(i) * (1 << shift) as f32) as i32;
        let split = format == ElementFormat::Fp6E3M2;
        let integer = |i: usize| if split { whole(i) >> 4 } else { whole(i) };
        let bf16 = |i: usize| (value(i).to_bits() >> 16) as u16;
        let mend = |i: usize| mend(format, i as u8);
        Self {
            unsigned: std::array::from_fn(|i| (integer(i) + offset(format)) as u8),
            rest: std::array::from_fn(|i| if split { (whole(i) & 15) as u8 } else { 0 }),
            signed: std::array::from_fn(|i| integer(i) as u8),
            high: std::array::from_fn(|i| (bf16(i) >> 8) as u8),
            low: std::array::from_fn(|i| bf16(i) as u8),
            words: std::array::from_fn(bf16),
            floats: std::array::from_fn(value),
            mend_high: std::array::from_fn(|i| (mend(i) >> 8) as u8),
            mend_low: std::array::from_fn(|i| mend(i) as u8),
            above: std::array::from_fn(|i| (integer(16 + i) - i as i32) as u8),
        }
    }
}

/// The difference of a small magnitude's word, `i` - 16 + [`Words::small`], from what the shift makes of it.
fn mend(format: ElementFormat, i: u8) -> u16 {
    let words = words(format);
    let Some(magnitude) = (i + words.small).checked_sub(16) else { return 0 };
    let value = format.decode(u32::from(magnitude)) / (1_u32 << words.left_out) as f32;
    let shifted = u16::from(magnitude) << (8 - words.shift) | words.exponent;
    (value.to_bits() >> 16) as u16 ^ shifted
}
