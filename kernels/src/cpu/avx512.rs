//! AVX-512 (F, BW, VL, DQ): sixteen floats in one register; codes as in the AVX2 variant.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::{
    avx2, columns_avx2, divergence,
    lanes::Zmm,
    quantize_columns::{COLUMNS, Line},
    simd::{Codec, Simd},
    softmax,
};
use crate::{
    formats::ElementFormat,
    scores::{Distribution, Divergence},
    tensor::Float,
};

/// Needs avx512f, avx512bw, avx512vl, avx512dq and what AVX2's variant needs.
pub(crate) struct Avx512;

impl Simd for Avx512 {
    type V = __m512;
    type Codes = __m128i;

    #[inline(always)]
    unsafe fn splat(value: f32) -> __m512 {
        // SAFETY: register operation only.
        unsafe { _mm512_set1_ps(value) }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m512 {
        // SAFETY: the caller vouches for sixteen floats.
        unsafe { _mm512_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, v: __m512) {
        // SAFETY: the caller vouches for sixteen floats.
        unsafe { _mm512_storeu_ps(to, v) }
    }

    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        // SAFETY: register operation only.
        unsafe { _mm512_add_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        // SAFETY: register operation only.
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: register operation only.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    unsafe fn sum(v: __m512) -> f32 {
        // SAFETY: register operations only. The order is that of AVX2's variant.
        unsafe {
            let v = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
            let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_add_ss(v, _mm_shuffle_ps::<1>(v, v)))
        }
    }

    #[inline(always)]
    unsafe fn unpack<C: Codec>(from: *const u8) -> __m128i {
        // SAFETY: the caller's promise is passed on.
        unsafe { avx2::unpack::<C>(from) }
    }

    #[inline(always)]
    unsafe fn keep(codes: __m128i, keep: usize) -> __m128i {
        // SAFETY: the caller's promise is passed on.
        unsafe { avx2::keep(codes, keep) }
    }

    #[inline(always)]
    unsafe fn decode<C: Codec>(codes: __m128i) -> __m512 {
        // SAFETY: register operations only.
        unsafe {
            if matches!(C::FORMAT, ElementFormat::MxInt8) {
                return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes));
            }
            _mm512_cvtph_ps(avx2::to_f16_bits::<C>(codes))
        }
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u8) -> __m512 {
        // SAFETY: the caller vouches for 32 bytes.
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }
    }

    #[inline(always)]
    unsafe fn transpose(rows: [__m128i; 16]) -> [__m128i; 16] {
        // SAFETY: the caller's promise is passed on.
        unsafe { avx2::transpose(rows) }
    }

    #[inline(always)]
    unsafe fn prefetch(address: *const u8) {
        // SAFETY: a prefetch never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) }
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const u8) -> Self::V {
        // SAFETY: the caller vouches for 32 bytes.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
    }

    #[inline(always)]
    unsafe fn max_magnitude(amax: Self::V, v: Self::V) -> Self::V {
        // SAFETY: register operations only.
        unsafe {
            let magnitude =
                _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fff_ffff));
            _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(amax), magnitude))
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
        unsafe { softmax::softmax::<Zmm>(row) }
    }

    #[inline(always)]
    unsafe fn divergence(base: &Float<'_>, this: &Float<'_>) -> Option<Divergence> {
        // SAFETY: the caller's promise is passed on.
        unsafe { divergence::divergence::<Zmm>(base, this) }
    }
}
