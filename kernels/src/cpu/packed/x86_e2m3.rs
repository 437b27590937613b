//! e2m3 for AVX2: integers from codes, and one row of x with the weight's signs in place of an offset.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::{
    super::{avx2::Avx2, panel::PANEL, simd::Simd},
    integer::{DotArgs, Integers},
    layout::{BLOCK, block_bytes},
    tables::{Tables, offset},
    x86_integer::{Maddubs, add16, add32, pairs},
};
use crate::formats::ElementFormat;

const BYTES: usize = block_bytes(ElementFormat::Fp6E2M3);
/// Largest magnitude.
const LARGEST: i32 = offset(ElementFormat::Fp6E2M3);

/// Magnitudes, and bytes with their signs, none of which is 0.
#[derive(Clone, Copy)]
pub(super) struct Parts {
    magnitude: __m256i,
    sign: __m256i,
}

impl Parts {
    /// Integers + [`offset`].
    ///
    /// # Safety
    /// avx2 is there.
    #[inline(always)]
    pub(super) unsafe fn with_offset(self) -> __m256i {
        // SAFETY: register operations only.
        unsafe {
            let v = _mm256_sign_epi8(self.magnitude, self.sign);
            _mm256_add_epi8(v, _mm256_set1_epi8(LARGEST as i8))
        }
    }

    /// Sums of pairs of products.
    ///
    /// # Safety
    /// avx2 is there.
    #[inline(always)]
    unsafe fn times(self, x: __m256i) -> __m256i {
        // SAFETY: register operations only.
        unsafe { _mm256_maddubs_epi16(self.magnitude, _mm256_sign_epi8(x, self.sign)) }
    }
}

/// Codes whose low four bits are those of `low`, whose upper bit of the exponent and sign are bits
/// 2Q and 2Q + 1 of `high`.
///
/// Below 16 the integer is the low four bits; from there on a table has what is above them. With the sign
/// this takes four operations less than a look-up of 64 codes.
///
/// # Safety
/// avx2 is there.
#[inline(always)]
unsafe fn parts<const Q: usize>(tables: *const Tables, low: __m256i, high: __m256i) -> Parts {
    // SAFETY: register operations, and the tables are there.
    unsafe {
        let above = (&raw const (*tables).above).cast();
        let above = _mm256_broadcastsi128_si256(_mm_loadu_si128(above));
        let low = _mm256_and_si256(low, _mm256_set1_epi8(0xf));
        let (upper, sign) = match Q {
            0 => (_mm256_slli_epi16::<7>(high), _mm256_slli_epi16::<6>(high)),
            1 => (_mm256_slli_epi16::<5>(high), _mm256_slli_epi16::<4>(high)),
            2 => (_mm256_slli_epi16::<3>(high), _mm256_slli_epi16::<2>(high)),
            _ => (_mm256_slli_epi16::<1>(high), high),
        };
        // An index with bit 7 finds 0.
        let small = _mm256_andnot_si256(upper, _mm256_set1_epi8(-128));
        let above = _mm256_shuffle_epi8(above, _mm256_or_si256(low, small));
        Parts {
            magnitude: _mm256_add_epi8(low, above),
            sign: _mm256_or_si256(sign, _mm256_set1_epi8(1)),
        }
    }
}

/// Registers 2c and 2c + 1 of a block, both halves of each.
///
/// # Safety
/// avx2 is there; so is the block.
#[inline(always)]
pub(super) unsafe fn decode(tables: *const Tables, block: *const u8, c: usize) -> [[Parts; 2]; 2] {
    // SAFETY: the caller's promise.
    unsafe {
        let [a, b] = pairs::load(block.add(64 * c));
        let [p, q] = pairs::load(block.add(256 + 64 * (c / 2)));
        let (odd_a, odd_b) = (_mm256_srli_epi16::<4>(a), _mm256_srli_epi16::<4>(b));
        if c.is_multiple_of(2) {
            [
                [parts::<0>(tables, a, p), parts::<0>(tables, b, q)],
                [parts::<1>(tables, odd_a, p), parts::<1>(tables, odd_b, q)],
            ]
        } else {
            [
                [parts::<2>(tables, a, p), parts::<2>(tables, b, q)],
                [parts::<3>(tables, odd_a, p), parts::<3>(tables, odd_b, q)],
            ]
        }
    }
}

/// c[16] (+)= one row of x times w over the blocks, from codes. x gets the signs of the weight, so that there is
/// no offset to add and to take out, and sums of two pairs fit sixteen bits with any x, which is never -128.
///
/// # Safety
/// avx2 and fma are there; everything in `args` holds a row, a panel and `args.blocks` blocks.
#[inline(always)]
pub(crate) unsafe fn dot_one(args: &DotArgs) {
    const { assert!(LARGEST * 127 * 4 <= i16::MAX as i32) };
    // SAFETY: all offsets stay within what the caller vouches for.
    unsafe {
        let ones = _mm256_set1_epi16(1);
        let mut sums = Avx2::splat(0.0);
        for b in 0..args.blocks {
            let w = args.panel.codes.add(b * BYTES);
            Maddubs::ask(w, BYTES / 64);
            let mut acc = [_mm256_setzero_si256(); 2];
            for c in 0..4 {
                let [first, second] = decode(args.tables, w, c);
                let x = args.x.add(b * BLOCK + 8 * c).cast::<[i32; 2]>().read_unaligned();
                let x = x.map(|x| _mm256_set1_epi32(x));
                for h in 0..2 {
                    let pairs = add16(first[h].times(x[0]), second[h].times(x[1]));
                    acc[h] = add32(acc[h], _mm256_madd_epi16(pairs, ones));
                }
            }
            let scales = pairs::scales(args.panel.scales.add(b * PANEL));
            sums = pairs::scale_add(sums, acc, scales, args.x_scales.add(b));
        }
        let sums = if args.add { Avx2::add(Avx2::load(args.c), sums) } else { sums };
        Avx2::store(args.c, sums);
    }
}
