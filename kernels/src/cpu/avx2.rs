//! AVX2 + FMA + F16C: sixteen floats in two registers.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::{
    columns_avx2, divergence,
    lanes::Ymm,
    quantize_columns::{COLUMNS, Line},
    simd::{Codec, Simd},
    softmax,
};
use crate::{
    formats::ElementFormat,
    scores::{Distribution, Divergence},
    tensor::Float,
};

/// Needs avx2, fma and f16c.
pub(crate) struct Avx2;

/// Sixteen codes of at most eight bits as the bits of sixteen f16, value * 2^-SHIFT.
#[inline(always)]
pub(super) unsafe fn to_f16_bits<C: Codec>(codes: __m128i) -> __m256i {
    // SAFETY: register operations only; the caller vouches for avx2.
    unsafe {
        let high = |v| _mm256_slli_epi16::<8>(_mm256_cvtepu8_epi16(v));
        let mask = |v, bits: i32| _mm256_and_si256(v, _mm256_set1_epi16(bits as i16));
        match C::FORMAT {
            // An f16 without its low byte.
            ElementFormat::Fp8E5M2 => high(codes),
            ElementFormat::Fp8E4M3 => {
                // The arithmetic shift leaves the sign in place and puts the magnitude below it.
                let half = mask(_mm256_srai_epi16::<1>(high(codes)), 0xbf80);
                let absolute = mask(half, 0x3f80);
                let nan = _mm256_cmpeq_epi16(absolute, _mm256_set1_epi16(0x3f80));
                _mm256_or_si256(half, mask(nan, 0x7e00))
            }
            ElementFormat::Fp6E3M2 => {
                let sign = _mm_slli_epi16::<2>(_mm_and_si128(codes, _mm_set1_epi8(0x20)));
                high(_mm_or_si128(_mm_and_si128(codes, _mm_set1_epi8(0x1f)), sign))
            }
            ElementFormat::Fp6E2M3 => {
                let wide = high(codes);
                let sign = _mm256_slli_epi16::<2>(mask(wide, 0x2000));
                _mm256_or_si256(_mm256_srli_epi16::<1>(mask(wide, 0x1f00)), sign)
            }
            ElementFormat::Fp4E2M1 => {
                let table = _mm_setr_epi8(
                    0, 2, 4, 6, 8, 10, 12, 14, -128, -126, -124, -122, -120, -118, -116, -114,
                );
                high(_mm_shuffle_epi8(table, codes))
            }
            ElementFormat::MxInt8 | ElementFormat::Bf16 => unreachable!("no small float"),
        }
    }
}

/// Sixteen codes from exactly UNIT bytes.
#[inline(always)]
pub(super) unsafe fn unpack<C: Codec>(from: *const u8) -> __m128i {
    // SAFETY: each arm reads the UNIT bytes that the caller vouches for: 8, 8 + 4 or 16.
    unsafe {
        match C::BITS {
            4 => {
                let v = _mm_loadl_epi64(from.cast());
                let low = _mm_set1_epi8(0xf);
                let odd = _mm_and_si128(_mm_srli_epi16::<4>(v), low);
                _mm_unpacklo_epi8(_mm_and_si128(v, low), odd)
            }
            6 => {
                let tail = from.add(8).cast::<i32>().read_unaligned();
                let v = _mm_insert_epi32::<2>(_mm_loadl_epi64(from.cast()), tail);
                let spread = _mm_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1);
                let v = _mm_shuffle_epi8(v, spread);
                let field = |v, bits| _mm_and_si128(v, _mm_set1_epi32(bits));
                let first = _mm_or_si128(field(v, 0x3f), field(_mm_slli_epi32::<2>(v), 0x3f00));
                let third = field(_mm_slli_epi32::<4>(v), 0x3f_0000);
                let fourth = field(_mm_slli_epi32::<6>(v), 0x3f00_0000);
                _mm_or_si128(first, _mm_or_si128(third, fourth))
            }
            _ => _mm_loadu_si128(from.cast()),
        }
    }
}

/// Zeroes the codes from index `keep` on.
#[inline(always)]
pub(super) unsafe fn keep(codes: __m128i, keep: usize) -> __m128i {
    // SAFETY: register operations only.
    unsafe {
        let index = _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        _mm_and_si128(codes, _mm_cmplt_epi8(index, _mm_set1_epi8(keep as i8)))
    }
}

/// Transposes sixteen rows of sixteen bytes.
#[inline(always)]
pub(super) unsafe fn transpose(rows: [__m128i; 16]) -> [__m128i; 16] {
    // Each round interleaves row i with row i + 8; after four rounds byte (i, j) is at (j, i).
    let mut rows = rows;
    for _ in 0..4 {
        let mut next = rows;
        for i in 0..8 {
            // SAFETY: register operations only.
            unsafe {
                next[2 * i] = _mm_unpacklo_epi8(rows[i], rows[i + 8]);
                next[2 * i + 1] = _mm_unpackhi_epi8(rows[i], rows[i + 8]);
            }
        }
        rows = next;
    }
    rows
}

impl Simd for Avx2 {
    type V = (__m256, __m256);
    type Codes = __m128i;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self::V {
        // SAFETY: register operation only.
        unsafe { (_mm256_set1_ps(value), _mm256_set1_ps(value)) }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::V {
        // SAFETY: the caller vouches for sixteen floats.
        unsafe { (_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))) }
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, v: Self::V) {
        // SAFETY: the caller vouches for sixteen floats.
        unsafe {
            _mm256_storeu_ps(to, v.0);
            _mm256_storeu_ps(to.add(8), v.1);
        }
    }

    #[inline(always)]
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: register operations only.
        unsafe { (_mm256_add_ps(a.0, b.0), _mm256_add_ps(a.1, b.1)) }
    }

    #[inline(always)]
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: register operations only.
        unsafe { (_mm256_mul_ps(a.0, b.0), _mm256_mul_ps(a.1, b.1)) }
    }

    #[inline(always)]
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        // SAFETY: register operations only.
        unsafe { (_mm256_fmadd_ps(a.0, b.0, c.0), _mm256_fmadd_ps(a.1, b.1, c.1)) }
    }

    #[inline(always)]
    unsafe fn sum(v: Self::V) -> f32 {
        // SAFETY: register operations only.
        unsafe {
            let v = _mm256_add_ps(v.0, v.1);
            let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_add_ss(v, _mm_shuffle_ps::<1>(v, v)))
        }
    }

    #[inline(always)]
    unsafe fn unpack<C: Codec>(from: *const u8) -> __m128i {
        // SAFETY: the caller's promise is passed on.
        unsafe { unpack::<C>(from) }
    }

    #[inline(always)]
    unsafe fn keep(codes: __m128i, n: usize) -> __m128i {
        // SAFETY: the caller's promise is passed on.
        unsafe { keep(codes, n) }
    }

    #[inline(always)]
    unsafe fn decode<C: Codec>(codes: __m128i) -> Self::V {
        // SAFETY: register operations only.
        unsafe {
            if matches!(C::FORMAT, ElementFormat::MxInt8) {
                let high = _mm_unpackhi_epi64(codes, codes);
                let low = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes));
                return (low, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(high)));
            }
            let half = to_f16_bits::<C>(codes);
            let high = _mm256_extracti128_si256::<1>(half);
            (_mm256_cvtph_ps(_mm256_castsi256_si128(half)), _mm256_cvtph_ps(high))
        }
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u8) -> Self::V {
        // SAFETY: the caller vouches for 32 bytes.
        unsafe {
            let widen = |from: *const u8| {
                let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
            };
            (widen(from), widen(from.add(16)))
        }
    }

    #[inline(always)]
    unsafe fn transpose(rows: [__m128i; 16]) -> [__m128i; 16] {
        // SAFETY: the caller's promise is passed on.
        unsafe { transpose(rows) }
    }

    #[inline(always)]
    unsafe fn prefetch(address: *const u8) {
        // SAFETY: a prefetch never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) }
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const u8) -> Self::V {
        // SAFETY: the caller vouches for 32 bytes.
        unsafe {
            let widen = |from: *const u8| _mm256_cvtph_ps(_mm_loadu_si128(from.cast()));
            (widen(from), widen(from.add(16)))
        }
    }

    #[inline(always)]
    unsafe fn max_magnitude(amax: Self::V, v: Self::V) -> Self::V {
        // SAFETY: register operations only.
        unsafe {
            let larger = |amax, v| {
                let magnitude =
                    _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7fff_ffff));
                _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(amax), magnitude))
            };
            (larger(amax.0, v.0), larger(amax.1, v.1))
        }
    }

    #[inline(always)]
    unsafe fn pack_columns<C: Codec, const R: u8>(
        values: *const Line,
        block: usize,
        inverses: &[f32; COLUMNS],
        out: *mut u8,
        pitch: usize,
    ) {
        // SAFETY: the caller's promise is passed on.
        unsafe { columns_avx2::pack_columns::<C, R>(values, block, inverses, out, pitch) }
    }

    #[inline(always)]
    unsafe fn softmax(row: &Float<'_>) -> Option<Distribution> {
        // SAFETY: the caller's promise is passed on.
        unsafe { softmax::softmax::<Ymm>(row) }
    }

    #[inline(always)]
    unsafe fn divergence(base: &Float<'_>, this: &Float<'_>) -> Option<Divergence> {
        // SAFETY: the caller's promise is passed on.
        unsafe { divergence::divergence::<Ymm>(base, this) }
    }
}
