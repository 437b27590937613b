//! What the kernels need from a machine, so that one text serves all variants.
//!
//! The unit is sixteen floats, [`Simd::V`]: one register of AVX-512, two of AVX2, an array in the
//! scalar variant. Codes come sixteen at a time too, one a byte ([`Simd::Codes`]).
//!
//! A float code becomes an f32 through f16: every element format is an f16 with shorter fields, so
//! sign and magnitude bits are shifted into an f16's place and the machine's f16 conversion does
//! the rest, subnormals included. The result is value * 2^-[`shift`]; whoever multiplies by
//! the scale puts the shift back.
#![allow(unsafe_code)]

use super::{
    divergence,
    lanes::Portable,
    quantize_columns::{self, COLUMNS, Line},
    rows::Constants,
    softmax,
};
use crate::{
    formats::ElementFormat,
    scores::{Distribution, Divergence},
    tensor::Float,
};

/// A format as a type, so that its constants are known when a kernel is compiled.
pub(crate) trait Codec {
    const FORMAT: ElementFormat;
    const BITS: usize = Self::FORMAT.bits() as usize;
    /// Bytes of sixteen packed codes.
    const UNIT: usize = Self::BITS * 2;
    const CONSTANTS: Constants = Constants::new(Self::FORMAT);
}

/// log2 of what [`Simd::decode`] leaves out of a format's values.
pub(crate) const fn shift(format: ElementFormat) -> i32 {
    match format {
        ElementFormat::MxInt8 => -6,
        ElementFormat::Bf16 => 0,
        format => 15 - format.row().bias,
    }
}

macro_rules! codecs {
    ($($name:ident),+) => { $(
        pub(crate) struct $name;
        impl Codec for $name {
            const FORMAT: ElementFormat = ElementFormat::$name;
        }
    )+ };
}
codecs!(Fp8E4M3, Fp8E5M2, Fp6E3M2, Fp6E2M3, Fp4E2M1, MxInt8, Bf16);

/// The operations of a variant.
///
/// # Safety
/// Every method may only run on a machine with the variant's instructions, and pointers must be
/// good for what the method's name says.
pub(crate) trait Simd {
    /// Sixteen floats.
    type V: Copy;
    /// Sixteen codes of at most eight bits, one a byte.
    type Codes: Copy;

    unsafe fn splat(value: f32) -> Self::V;
    unsafe fn load(from: *const f32) -> Self::V;
    unsafe fn store(to: *mut f32, v: Self::V);
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    /// a * b + c, fused where the machine can.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// Sum of the sixteen, in one fixed order.
    unsafe fn sum(v: Self::V) -> f32;
    /// Sixteen codes from [`Codec::UNIT`] bytes; reads exactly those. Not for bf16.
    unsafe fn unpack<C: Codec>(from: *const u8) -> Self::Codes;
    /// Zeroes all codes from index `keep` (at most 16) on.
    unsafe fn keep(codes: Self::Codes, keep: usize) -> Self::Codes;
    /// values * 2^-[`shift`]. Not for bf16.
    unsafe fn decode<C: Codec>(codes: Self::Codes) -> Self::V;
    /// The sixteen bfloat16 in 32 bytes.
    unsafe fn load_bf16(from: *const u8) -> Self::V;
    /// The sixteen f16 in 32 bytes.
    #[inline(always)]
    unsafe fn load_f16(from: *const u8) -> Self::V {
        // SAFETY: the caller vouches for 32 bytes.
        let bytes = unsafe { from.cast::<[[u8; 2]; COLUMNS]>().read_unaligned() };
        let wide = bytes.map(|half| quantize_columns::widen(u16::from_le_bytes(half)));
        // SAFETY: sixteen floats.
        unsafe { Self::load(wide.as_ptr()) }
    }
    /// The larger of `amax`, which has no signs, and |v|, by their bits: infinity and NaN count.
    #[inline(always)]
    unsafe fn max_magnitude(amax: Self::V, v: Self::V) -> Self::V {
        let (mut largest, mut other) = ([0.0_f32; COLUMNS], [0.0_f32; COLUMNS]);
        // SAFETY: sixteen floats each.
        unsafe {
            Self::store(largest.as_mut_ptr(), amax);
            Self::store(other.as_mut_ptr(), v);
            for (a, v) in largest.iter_mut().zip(other) {
                *a = f32::from_bits(a.to_bits().max(v.to_bits() & 0x7fff_ffff));
            }
            Self::load(largest.as_ptr())
        }
    }
    /// Sixteen columns' codes of a block, a multiple of sixteen lines [`quantize_columns::PITCH`]
    /// apart, packed to `out`, columns `pitch` bytes apart. Not for bf16.
    #[inline(always)]
    unsafe fn pack_columns<C: Codec, const R: u8>(
        values: *const Line,
        block: usize,
        inverses: &[f32; COLUMNS],
        out: *mut u8,
        pitch: usize,
    ) {
        // SAFETY: the caller's promise is passed on.
        unsafe { quantize_columns::pack_columns::<C, R>(values, block, inverses, out, pitch) }
    }
    /// Sixteen vectors of codes as the rows of a matrix, transposed.
    unsafe fn transpose(rows: [Self::Codes; 16]) -> [Self::Codes; 16];
    /// Asks for the cache line of an address, which need not be valid.
    unsafe fn prefetch(address: *const u8);

    /// See `softmax::softmax`.
    #[inline(always)]
    unsafe fn softmax(row: &Float<'_>) -> Option<Distribution> {
        // SAFETY: the caller's promise is passed on.
        unsafe { softmax::softmax::<Portable>(row) }
    }

    /// See `divergence::divergence`.
    #[inline(always)]
    unsafe fn divergence(base: &Float<'_>, this: &Float<'_>) -> Option<Divergence> {
        // SAFETY: the caller's promise is passed on.
        unsafe { divergence::divergence::<Portable>(base, this) }
    }
}
