//! Codes of columns, packed: eight columns in a register, four k of each gathered by the packing
//! instructions, so that turning them round takes no more than the narrowing does.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::{
    quantize_columns::{COLUMNS, Line, PITCH},
    simd::Codec,
};
use crate::{formats::ElementFormat, quantize::Rounding};

/// See [`super::simd::Simd::pack_columns`].
///
/// # Safety
/// As there; needs avx2.
#[inline(always)]
pub(super) unsafe fn pack_columns<C: Codec, const R: u8>(
    values: *const Line,
    block: usize,
    inverses: &[f32; COLUMNS],
    out: *mut u8,
    pitch: usize,
) {
    for half in [0, COLUMNS / 2] {
        // SAFETY: the caller vouches for `block` lines and for a block's packed bytes in every
        // column; both are reached sixteen k at a time.
        unsafe {
            let inverse = _mm256_loadu_ps(inverses.as_ptr().add(half));
            let out = out.add(half * pitch);
            for at in (0..block).step_by(COLUMNS) {
                let first = values.add(at * PITCH).cast::<f32>().add(half);
                let four = |i: usize| four::<C, R>(first.add(4 * i * PITCH * COLUMNS), inverse);
                let fours = [four(0), four(1), four(2), four(3)];
                store::<C>(fours, out.add(at * C::BITS / 8), pitch);
            }
        }
    }
}

/// |v| * inverse rounded to a code without its sign, perhaps one of more than the largest: `rows::code`,
/// lane by lane.
#[inline(always)]
unsafe fn magnitude<C: Codec, const R: u8>(v: __m256, inverse: __m256) -> __m256i {
    let (m, emin) = (C::CONSTANTS.m as i32, C::CONSTANTS.emin_bits as i32);
    // SAFETY: register operations only; the caller vouches for avx2.
    unsafe {
        let all = |bits: i32| _mm256_set1_epi32(bits);
        let absolute = _mm256_and_ps(v, _mm256_castsi256_ps(all(0x7fff_ffff)));
        let scaled = _mm256_mul_ps(absolute, inverse);
        let exponent = match C::FORMAT {
            // Below two, everything has the quantum of one.
            ElementFormat::MxInt8 => all(emin),
            _ => {
                let exponent = _mm256_and_si256(_mm256_castps_si256(scaled), all(0x7f80_0000));
                _mm256_max_epi32(exponent, all(emin))
            }
        };
        let c = _mm256_add_epi32(exponent, all((23 - m) << 23));
        let sum = _mm256_add_ps(scaled, _mm256_castsi256_ps(c));
        let mut units = _mm256_sub_epi32(_mm256_castps_si256(sum), c);
        // A comparison that holds is -1.
        if R == Rounding::Floor as u8 {
            let rounded = _mm256_sub_ps(sum, _mm256_castsi256_ps(c));
            let above = _mm256_cmp_ps::<_CMP_GT_OQ>(rounded, scaled);
            units = _mm256_add_epi32(units, _mm256_castps_si256(above));
        } else if R == Rounding::Nearest as u8 {
            let rounded = _mm256_sub_ps(sum, _mm256_castsi256_ps(c));
            let half = _mm256_sub_epi32(exponent, all((m + 1) << 23));
            let rest = _mm256_sub_ps(scaled, rounded);
            let tie = _mm256_cmp_ps::<_CMP_EQ_OQ>(rest, _mm256_castsi256_ps(half));
            units = _mm256_sub_epi32(units, _mm256_castps_si256(tie));
        }
        let steps = _mm256_sub_epi32(exponent, all(emin));
        let steps = _mm256_srl_epi32(steps, _mm_cvtsi32_si128(23 - m));
        _mm256_add_epi32(units, steps)
    }
}

/// Four k of eight columns: their codes, one a byte, columns in the order 0 to 3 and 4 to 7 of the
/// two halves.
#[inline(always)]
unsafe fn four<C: Codec, const R: u8>(from: *const f32, inverse: __m256) -> __m256i {
    // SAFETY: the caller vouches for four lines and for avx2.
    unsafe {
        let line = |j: usize| _mm256_loadu_ps(from.add(j * PITCH * COLUMNS));
        let v = [line(0), line(1), line(2), line(3)];
        let magnitude = |j: usize| magnitude::<C, R>(v[j], inverse);
        let m = [magnitude(0), magnitude(1), magnitude(2), magnitude(3)];
        let pairs = (_mm256_packus_epi32(m[0], m[1]), _mm256_packus_epi32(m[2], m[3]));
        let largest = _mm256_set1_epi8(C::FORMAT.row().max_code() as i8);
        let codes = _mm256_min_epu8(_mm256_packus_epi16(pairs.0, pairs.1), largest);
        // As integers floats saturate to a byte that has their sign, and is zero only for zero.
        let bits = |j: usize| _mm256_castps_si256(v[j]);
        let pairs = (_mm256_packs_epi32(bits(0), bits(1)), _mm256_packs_epi32(bits(2), bits(3)));
        let signs = _mm256_packs_epi16(pairs.0, pairs.1);
        let codes = match C::FORMAT {
            ElementFormat::MxInt8 => _mm256_sign_epi8(codes, signs),
            _ => {
                let signs = _mm256_srl_epi32(signs, _mm_cvtsi32_si128(8 - C::BITS as i32));
                let bit = _mm256_set1_epi8((1_u8 << (C::BITS - 1)) as i8);
                _mm256_or_si256(codes, _mm256_and_si256(signs, bit))
            }
        };
        let turn = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        _mm256_shuffle_epi8(codes, _mm256_broadcastsi128_si256(turn))
    }
}

/// Four times four k of eight columns, packed, to the columns.
#[inline(always)]
unsafe fn store<C: Codec>(codes: [__m256i; 4], out: *mut u8, pitch: usize) {
    // SAFETY: the caller vouches for the bytes of sixteen codes in each column, and for avx2.
    unsafe {
        if C::BITS == 4 {
            // Two codes to a byte, in words.
            let two = |i: usize| _mm256_maddubs_epi16(codes[i], _mm256_set1_epi16(0x1001));
            let (even, odd) =
                (_mm256_packus_epi16(two(0), two(2)), _mm256_packus_epi16(two(1), two(3)));
            let first = _mm256_unpacklo_epi16(even, odd);
            let last = _mm256_unpackhi_epi16(even, odd);
            store_eights(_mm256_unpacklo_epi32(first, last), out, pitch);
            store_eights(_mm256_unpackhi_epi32(first, last), out.add(2 * pitch), pitch);
            return;
        }
        // Four codes of six bits to 24.
        let word = |i: usize| {
            if C::BITS == 8 {
                return codes[i];
            }
            let twelve = _mm256_maddubs_epi16(codes[i], _mm256_set1_epi16(0x4001));
            _mm256_madd_epi16(twelve, _mm256_set1_epi32(0x1000_0001))
        };
        let words = [word(0), word(1), word(2), word(3)];
        let a = _mm256_unpacklo_epi32(words[0], words[1]);
        let b = _mm256_unpackhi_epi32(words[0], words[1]);
        let c = _mm256_unpacklo_epi32(words[2], words[3]);
        let d = _mm256_unpackhi_epi32(words[2], words[3]);
        let columns = [
            _mm256_unpacklo_epi64(a, c),
            _mm256_unpackhi_epi64(a, c),
            _mm256_unpacklo_epi64(b, d),
            _mm256_unpackhi_epi64(b, d),
        ];
        for (i, codes) in columns.into_iter().enumerate() {
            let (low, high) = (out.add(i * pitch), out.add((i + 4) * pitch));
            store_one::<C>(_mm256_castsi256_si128(codes), low);
            store_one::<C>(_mm256_extracti128_si256::<1>(codes), high);
        }
    }
}

/// Eight bytes to each of the columns 0, 1, 4 and 5.
#[inline(always)]
unsafe fn store_eights(columns: __m256i, out: *mut u8, pitch: usize) {
    // SAFETY: as for `store`.
    unsafe {
        let (low, high) = (_mm256_castsi256_si128(columns), _mm256_extracti128_si256::<1>(columns));
        for (pair, out) in [(low, out), (high, out.add(4 * pitch))] {
            _mm_storel_epi64(out.cast(), pair);
            _mm_storeh_pd(out.add(pitch).cast(), _mm_castsi128_pd(pair));
        }
    }
}

/// Sixteen codes of a column: sixteen bytes, or four times three in as many words.
#[inline(always)]
unsafe fn store_one<C: Codec>(codes: __m128i, out: *mut u8) {
    // SAFETY: as for `store`.
    unsafe {
        if C::BITS == 8 {
            _mm_storeu_si128(out.cast(), codes);
            return;
        }
        let close = _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1);
        let codes = _mm_shuffle_epi8(codes, close);
        _mm_storel_epi64(out.cast(), codes);
        out.add(8).cast::<i32>().write_unaligned(_mm_extract_epi32::<2>(codes));
    }
}
