//! Sixteen-bit integers of x86, for e3m2: made of codes, and multiplied in pairs.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::{
    super::simd::Simd,
    integer::{IntFormat, Integers, Widen},
    tables::Tables,
    x86_integer::{AvxVnni, Vnni512, add32, pairs},
};

impl Widen for Vnni512 {
    #[inline(always)]
    unsafe fn words(plane: __m512i, rest: Option<__m512i>, offset: i16) -> [__m512i; 2] {
        // SAFETY: register operations only.
        unsafe {
            let (low, offset) = (_mm512_set1_epi16(0xff), _mm512_set1_epi16(offset));
            let mut even = _mm512_and_si512(plane, low);
            let mut odd = _mm512_srli_epi16::<8>(plane);
            if let Some(rest) = rest {
                even = _mm512_slli_epi16::<4>(even);
                odd = _mm512_slli_epi16::<4>(odd);
                even = _mm512_add_epi16(even, _mm512_and_si512(rest, low));
                odd = _mm512_add_epi16(odd, _mm512_srli_epi16::<8>(rest));
            }
            [_mm512_sub_epi16(even, offset), _mm512_sub_epi16(odd, offset)]
        }
    }
}

impl Widen for AvxVnni {
    #[inline(always)]
    unsafe fn words(plane: pairs::Two, rest: Option<pairs::Two>, offset: i16) -> [pairs::Two; 2] {
        // SAFETY: register operations only.
        unsafe {
            let (low, offset) = (_mm256_set1_epi16(0xff), _mm256_set1_epi16(offset));
            let (mut evens, mut odds) = (plane, plane);
            for h in 0..2 {
                let mut even = _mm256_and_si256(plane[h], low);
                let mut odd = _mm256_srli_epi16::<8>(plane[h]);
                if let Some(rest) = rest {
                    even = _mm256_slli_epi16::<4>(even);
                    odd = _mm256_slli_epi16::<4>(odd);
                    even = _mm256_add_epi16(even, _mm256_and_si256(rest[h], low));
                    odd = _mm256_add_epi16(odd, _mm256_srli_epi16::<8>(rest[h]));
                }
                evens[h] = _mm256_sub_epi16(even, offset);
                odds[h] = _mm256_sub_epi16(odd, offset);
            }
            [evens, odds]
        }
    }
}

/// Defines a machine of sixteen-bit integers, which is another one but for its products.
macro_rules! of_words {
    ($(#[$doc:meta])* $name:ident, $machine:ty, $register:ty, |$acc:ident, $w:ident, $x:ident| $dot:block) => {
        $(#[$doc])*
        pub(crate) struct $name;

        impl Integers for $name {
            const BYTES: usize = 2;
            type F = <$machine as Integers>::F;
            type W = $register;
            type Acc = $register;
            type Scales = $register;

            #[inline(always)]
            unsafe fn load(from: *const u8) -> $register {
                // SAFETY: the caller's promise is passed on.
                unsafe { <$machine>::load(from) }
            }

            #[inline(always)]
            unsafe fn store(to: *mut u8, w: $register) {
                // SAFETY: the caller's promise is passed on.
                unsafe { <$machine>::store(to, w) }
            }

            #[inline(always)]
            unsafe fn decode<C: IntFormat, const REST: bool>(
                tables: *const Tables,
                block: *const u8,
                c: usize,
            ) -> [$register; 2] {
                // SAFETY: the caller's promise is passed on.
                unsafe { <$machine>::decode::<C, REST>(tables, block, c) }
            }

            #[inline(always)]
            unsafe fn start(sum: *const i32) -> $register {
                // SAFETY: the caller's promise is passed on.
                unsafe { <$machine>::start(sum) }
            }

            #[inline(always)]
            unsafe fn zero() -> $register {
                // SAFETY: the caller's promise is passed on.
                unsafe { <$machine>::zero() }
            }

            #[inline(always)]
            unsafe fn join<const ROOM: usize>(a: $register, b: $register) -> $register {
                // SAFETY: the caller's promise is passed on.
                unsafe { <$machine>::join::<ROOM>(a, b) }
            }

            #[inline(always)]
            unsafe fn join_planes(a: $register, b: $register) -> $register {
                // SAFETY: the caller's promise is passed on.
                unsafe { <$machine>::join_planes(a, b) }
            }

            #[inline(always)]
            unsafe fn dot<const ROOM: usize>(
                $acc: $register,
                $w: $register,
                x: *const u8,
            ) -> $register {
                // SAFETY: the caller vouches for four bytes.
                unsafe {
                    let $x = x.cast::<i32>().read_unaligned();
                    $dot
                }
            }

            #[inline(always)]
            unsafe fn scales(from: *const u8) -> $register {
                // SAFETY: the caller's promise is passed on.
                unsafe { <$machine>::scales(from) }
            }

            #[inline(always)]
            unsafe fn scale_add<const ROOM: usize>(
                sums: <Self::F as Simd>::V,
                acc: $register,
                scales: $register,
                x_scale: *const i32,
                sum: *const i32,
            ) -> <Self::F as Simd>::V {
                // SAFETY: the caller's promise is passed on.
                unsafe { <$machine>::scale_add::<ROOM>(sums, acc, scales, x_scale, sum) }
            }
        }

        impl Widen for $name {
            #[inline(always)]
            unsafe fn words(
                plane: $register,
                rest: Option<$register>,
                offset: i16,
            ) -> [$register; 2] {
                // SAFETY: the caller's promise is passed on.
                unsafe { <$machine>::words(plane, rest, offset) }
            }
        }
    };
}

of_words!(
    /// Needs what [`Vnni512`] needs.
    Words512,
    Vnni512,
    __m512i,
    |acc, w, x| { _mm512_dpwssd_epi32(acc, w, _mm512_set1_epi32(x)) }
);

of_words!(
    /// Needs what [`AvxVnni`] needs.
    WordsVnni,
    AvxVnni,
    pairs::Two,
    |acc, w, x| {
        let x = _mm256_set1_epi32(x);
        [_mm256_dpwssd_avx_epi32(acc[0], w[0], x), _mm256_dpwssd_avx_epi32(acc[1], w[1], x)]
    }
);

of_words!(
    /// Needs avx2 and fma; of [`AvxVnni`] it takes what needs no more.
    WordsAvx2,
    AvxVnni,
    pairs::Two,
    |acc, w, x| {
        let x = _mm256_set1_epi32(x);
        [
            add32(acc[0], _mm256_madd_epi16(w[0], x)),
            add32(acc[1], _mm256_madd_epi16(w[1], x)),
        ]
    }
);
