//! Integer dot products of x86: AVX-512 VNNI, AVX-VNNI, and AVX2's multiply-add of bytes.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::{
    super::{avx2::Avx2, avx512::Avx512},
    integer::{IntFormat, Integers},
    tables::Tables,
};

/// Needs avx512f, avx512bw, avx512vbmi and avx512vnni.
pub(crate) struct Vnni512;

/// Codes of six bits from their planes: the low four bits of `low` as they come, two more bits moved to
/// their place by a shift of `high` to the left (`LEFT`) or to the right.
macro_rules! six_bits {
    ($low:expr, $high:expr, $g:expr, $left:ident, $right:ident, $select:expr) => {
        match $g % 4 {
            0 => $select($low, $left::<4>($high)),
            1 => $select($low, $left::<2>($high)),
            2 => $select($low, $high),
            _ => $select($low, $right::<2>($high)),
        }
    };
}

/// Indices of registers `2 * c` and `2 * c + 1` of a block of six-bit codes, bits 6 and 7 arbitrary.
#[inline(always)]
pub(super) unsafe fn six_512(block: *const u8, c: usize) -> [__m512i; 2] {
    // SAFETY: a block has four registers of low bits and two of high ones; avx512bw is there.
    unsafe {
        let low = _mm512_load_si512(block.add(64 * c).cast());
        let high = _mm512_load_si512(block.add(256 + 64 * (c / 2)).cast());
        let mask = _mm512_set1_epi8(0xf);
        // mask ? a : b
        let select = |a, b| _mm512_ternarylogic_epi32::<0xca>(mask, a, b);
        let odd = _mm512_srli_epi16::<4>(low);
        [
            six_bits!(low, high, 2 * c, _mm512_slli_epi16, _mm512_srli_epi16, select),
            six_bits!(odd, high, 2 * c + 1, _mm512_slli_epi16, _mm512_srli_epi16, select),
        ]
    }
}

impl Integers for Vnni512 {
    type F = Avx512;
    type W = __m512i;
    type Acc = __m512i;
    type Scales = __m512i;

    #[inline(always)]
    unsafe fn load(from: *const u8) -> __m512i {
        // SAFETY: the caller vouches for 64 aligned bytes.
        unsafe { _mm512_load_si512(from.cast()) }
    }

    #[inline(always)]
    unsafe fn store(to: *mut u8, w: __m512i) {
        // SAFETY: the caller vouches for 64 aligned bytes.
        unsafe { _mm512_store_si512(to.cast(), w) }
    }

    #[inline(always)]
    unsafe fn decode<C: IntFormat>(
        tables: *const Tables,
        block: *const u8,
        c: usize,
    ) -> [__m512i; 2] {
        // SAFETY: the caller vouches for the block; a table has 64 bytes.
        unsafe {
            let table = _mm512_load_si512((*tables).unsigned.as_ptr().cast());
            match C::FORMAT.bits() {
                4 => {
                    let codes = _mm512_load_si512(block.add(64 * c).cast());
                    let high = _mm512_srli_epi16::<4>(codes);
                    [_mm512_permutexvar_epi8(codes, table), _mm512_permutexvar_epi8(high, table)]
                }
                6 => six_512(block, c).map(|codes| _mm512_permutexvar_epi8(codes, table)),
                _ => [0, 64].map(|at| {
                    let codes = _mm512_load_si512(block.add(128 * c + at).cast());
                    _mm512_xor_si512(codes, _mm512_set1_epi8(-128))
                }),
            }
        }
    }

    #[inline(always)]
    unsafe fn start(sum: *const i32) -> __m512i {
        // SAFETY: the caller vouches for one i32.
        unsafe { _mm512_set1_epi32(*sum) }
    }

    #[inline(always)]
    unsafe fn dot<const NARROW: bool>(acc: __m512i, w: __m512i, x: *const u8) -> __m512i {
        // SAFETY: the caller vouches for four bytes.
        unsafe { _mm512_dpbusd_epi32(acc, w, _mm512_set1_epi32(x.cast::<i32>().read_unaligned())) }
    }

    #[inline(always)]
    unsafe fn scales(from: *const u8) -> __m512i {
        // SAFETY: the caller vouches for sixteen bytes.
        unsafe { _mm512_slli_epi32::<23>(_mm512_cvtepu8_epi32(_mm_loadu_si128(from.cast()))) }
    }

    #[inline(always)]
    unsafe fn scale_add<const NARROW: bool>(
        sums: __m512,
        acc: __m512i,
        scales: __m512i,
        x_scale: *const i32,
        _: *const i32,
    ) -> __m512 {
        // SAFETY: the caller vouches for one i32.
        unsafe {
            let scale = _mm512_add_epi32(scales, _mm512_set1_epi32(*x_scale));
            _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc), _mm512_castsi512_ps(scale), sums)
        }
    }
}

/// What AVX2 and AVX-VNNI share: sixteen rows are two registers.
mod pairs {
    use super::*;

    pub(super) type Two = [__m256i; 2];

    #[inline(always)]
    pub(super) unsafe fn load(from: *const u8) -> Two {
        // SAFETY: the caller vouches for 64 aligned bytes.
        unsafe { [0, 32].map(|at| _mm256_load_si256(from.add(at).cast())) }
    }

    /// Looks up codes of six bits, of which bits 6 and 7 are arbitrary.
    #[inline(always)]
    unsafe fn look_up(tables: *const Tables, codes: __m256i) -> __m256i {
        // SAFETY: a table has 64 bytes.
        unsafe {
            let low = _mm256_and_si256(codes, _mm256_set1_epi8(0xf));
            let quarter = |i: usize| {
                let table = (*tables).unsigned.as_ptr().add(16 * i);
                let table = _mm256_broadcastsi128_si256(_mm_load_si128(table.cast()));
                _mm256_shuffle_epi8(table, low)
            };
            // A blend goes by bit 7 of each byte: bits 4 and 5 are moved there.
            let (four, five) = (_mm256_slli_epi16::<3>(codes), _mm256_slli_epi16::<2>(codes));
            let first = _mm256_blendv_epi8(quarter(0), quarter(1), four);
            let second = _mm256_blendv_epi8(quarter(2), quarter(3), four);
            _mm256_blendv_epi8(first, second, five)
        }
    }

    #[inline(always)]
    pub(super) unsafe fn decode<C: IntFormat>(
        tables: *const Tables,
        block: *const u8,
        c: usize,
    ) -> [Two; 2] {
        // SAFETY: the caller vouches for the block; a table has 64 bytes.
        unsafe {
            match C::FORMAT.bits() {
                4 => {
                    let codes = load(block.add(64 * c));
                    let table = _mm_load_si128((*tables).unsigned.as_ptr().cast());
                    let table = _mm256_broadcastsi128_si256(table);
                    let mask = _mm256_set1_epi8(0xf);
                    let find = |v| _mm256_shuffle_epi8(table, _mm256_and_si256(v, mask));
                    [codes.map(find), codes.map(|v| find(_mm256_srli_epi16::<4>(v)))]
                }
                6 => {
                    let (low, high) =
                        (load(block.add(64 * c)), load(block.add(256 + 64 * (c / 2))));
                    let mask = _mm256_set1_epi8(0xf);
                    let join = |a: __m256i, b: __m256i| {
                        _mm256_or_si256(_mm256_and_si256(mask, a), _mm256_andnot_si256(mask, b))
                    };
                    let index = |half: usize, g: usize| {
                        let low =
                            if g % 2 == 0 { low[half] } else { _mm256_srli_epi16::<4>(low[half]) };
                        let high = high[half];
                        six_bits!(low, high, g, _mm256_slli_epi16, _mm256_srli_epi16, join)
                    };
                    [2 * c, 2 * c + 1].map(|g| [0, 1].map(|half| look_up(tables, index(half, g))))
                }
                _ => {
                    let flip = |v| _mm256_xor_si256(v, _mm256_set1_epi8(-128));
                    [0, 64].map(|at| load(block.add(128 * c + at)).map(flip))
                }
            }
        }
    }

    #[inline(always)]
    pub(super) unsafe fn scales(from: *const u8) -> Two {
        // SAFETY: the caller vouches for sixteen bytes.
        unsafe {
            [0, 8].map(|at| {
                let bytes = _mm_loadl_epi64(from.add(at).cast());
                _mm256_slli_epi32::<23>(_mm256_cvtepu8_epi32(bytes))
            })
        }
    }

    #[inline(always)]
    pub(super) unsafe fn scale_add(
        sums: (__m256, __m256),
        acc: Two,
        scales: Two,
        x_scale: *const i32,
    ) -> (__m256, __m256) {
        // SAFETY: the caller vouches for one i32.
        unsafe {
            let x_scale = _mm256_set1_epi32(*x_scale);
            let one = |sum, acc, scale| {
                let scale = _mm256_castsi256_ps(_mm256_add_epi32(scale, x_scale));
                _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc), scale, sum)
            };
            (one(sums.0, acc[0], scales[0]), one(sums.1, acc[1], scales[1]))
        }
    }
}

/// Needs avx2, fma and avxvnni.
pub(crate) struct AvxVnni;

/// Needs avx2 and fma. Only for formats whose sums of two products fit sixteen bits.
pub(crate) struct Maddubs;

macro_rules! shared {
    () => {
        type F = Avx2;
        type W = pairs::Two;
        type Acc = pairs::Two;
        type Scales = pairs::Two;

        #[inline(always)]
        unsafe fn load(from: *const u8) -> pairs::Two {
            // SAFETY: the caller's promise is passed on.
            unsafe { pairs::load(from) }
        }

        #[inline(always)]
        unsafe fn store(to: *mut u8, w: pairs::Two) {
            // SAFETY: the caller vouches for 64 aligned bytes.
            unsafe {
                _mm256_store_si256(to.cast(), w[0]);
                _mm256_store_si256(to.add(32).cast(), w[1]);
            }
        }

        #[inline(always)]
        unsafe fn decode<C: IntFormat>(
            tables: *const Tables,
            block: *const u8,
            c: usize,
        ) -> [pairs::Two; 2] {
            // SAFETY: the caller's promise is passed on.
            unsafe { pairs::decode::<C>(tables, block, c) }
        }

        #[inline(always)]
        unsafe fn scales(from: *const u8) -> pairs::Two {
            // SAFETY: the caller's promise is passed on.
            unsafe { pairs::scales(from) }
        }
    };
}

impl Integers for AvxVnni {
    shared!();

    #[inline(always)]
    unsafe fn start(sum: *const i32) -> pairs::Two {
        // SAFETY: the caller vouches for one i32.
        unsafe { [_mm256_set1_epi32(*sum); 2] }
    }

    #[inline(always)]
    unsafe fn dot<const NARROW: bool>(acc: pairs::Two, w: pairs::Two, x: *const u8) -> pairs::Two {
        // SAFETY: the caller vouches for four bytes.
        unsafe {
            let x = _mm256_set1_epi32(x.cast::<i32>().read_unaligned());
            [_mm256_dpbusd_avx_epi32(acc[0], w[0], x), _mm256_dpbusd_avx_epi32(acc[1], w[1], x)]
        }
    }

    #[inline(always)]
    unsafe fn scale_add<const NARROW: bool>(
        sums: (__m256, __m256),
        acc: pairs::Two,
        scales: pairs::Two,
        x_scale: *const i32,
        _: *const i32,
    ) -> (__m256, __m256) {
        // SAFETY: the caller's promise is passed on.
        unsafe { pairs::scale_add(sums, acc, scales, x_scale) }
    }
}

impl Integers for Maddubs {
    shared!();

    #[inline(always)]
    unsafe fn start(_: *const i32) -> pairs::Two {
        // SAFETY: register operation only.
        unsafe { [_mm256_setzero_si256(); 2] }
    }

    #[inline(always)]
    unsafe fn dot<const NARROW: bool>(acc: pairs::Two, w: pairs::Two, x: *const u8) -> pairs::Two {
        // SAFETY: the caller vouches for four bytes.
        unsafe {
            let x = _mm256_set1_epi32(x.cast::<i32>().read_unaligned());
            let one = |acc, w| {
                let products = _mm256_maddubs_epi16(w, x);
                if NARROW {
                    return _mm256_add_epi16(acc, products);
                }
                _mm256_add_epi32(acc, _mm256_madd_epi16(products, _mm256_set1_epi16(1)))
            };
            [one(acc[0], w[0]), one(acc[1], w[1])]
        }
    }

    #[inline(always)]
    unsafe fn scale_add<const NARROW: bool>(
        sums: (__m256, __m256),
        acc: pairs::Two,
        scales: pairs::Two,
        x_scale: *const i32,
        sum: *const i32,
    ) -> (__m256, __m256) {
        // SAFETY: the caller vouches for both i32.
        unsafe {
            let sum = _mm256_set1_epi32(*sum);
            let acc = acc.map(|acc| {
                let wide = match NARROW {
                    true => _mm256_madd_epi16(acc, _mm256_set1_epi16(1)),
                    false => acc,
                };
                _mm256_add_epi32(wide, sum)
            });
            pairs::scale_add(sums, acc, scales, x_scale)
        }
    }
}
