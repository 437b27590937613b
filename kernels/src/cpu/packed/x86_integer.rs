//! Integer dot products of x86: AVX-512 VNNI, AVX-VNNI, and AVX2's multiply-add of bytes.
#![allow(unsafe_code)]

use std::arch::{asm, x86_64::*};

use super::{
    super::{avx2::Avx2, avx512::Avx512},
    integer::{ALL, IntFormat, Integers},
    tables::Tables,
    x86_e2m3,
};
use crate::formats::ElementFormat;

/// Needs avx512f, avx512bw, avx512vbmi and avx512vnni.
pub(crate) struct Vnni512;

/// Indices of registers `2 * c` and `2 * c + 1` of a block of six-bit codes, bits 6 and 7 arbitrary.
///
/// # Safety
/// avx512bw is there; a block has four registers of low bits and two of high ones.
#[inline(always)]
pub(super) unsafe fn six_512(block: *const u8, c: usize) -> [__m512i; 2] {
    // SAFETY: the caller's promise.
    unsafe {
        let low = _mm512_load_si512(block.add(64 * c).cast());
        let high = _mm512_load_si512(block.add(256 + 64 * (c / 2)).cast());
        let odd = _mm512_srli_epi16::<4>(low);
        // The two high bits move to bits 4 and 5.
        if c.is_multiple_of(2) {
            let (first, second) = (_mm512_slli_epi16::<4>(high), _mm512_slli_epi16::<2>(high));
            [join_512(low, first), join_512(odd, second)]
        } else {
            [join_512(low, high), join_512(odd, _mm512_srli_epi16::<2>(high))]
        }
    }
}

/// The integers of a plane, by code.
#[inline(always)]
unsafe fn table<const REST: bool>(tables: *const Tables) -> *const [u8; 64] {
    // SAFETY: the caller vouches for the tables.
    unsafe { if REST { &raw const (*tables).rest } else { &raw const (*tables).unsigned } }
}

/// The low four bits of each byte from `low`, the others from `high`.
#[inline(always)]
unsafe fn join_512(low: __m512i, high: __m512i) -> __m512i {
    // SAFETY: register operations only.
    unsafe { _mm512_ternarylogic_epi32::<0xca>(_mm512_set1_epi8(0xf), low, high) }
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
    unsafe fn decode<C: IntFormat, const REST: bool>(
        tables: *const Tables,
        block: *const u8,
        c: usize,
    ) -> [__m512i; 2] {
        // SAFETY: the caller vouches for the block and the table.
        unsafe {
            let table = _mm512_loadu_si512(table::<REST>(tables).cast());
            match C::FORMAT.bits() {
                4 => {
                    let codes = _mm512_load_si512(block.add(64 * c).cast());
                    let high = _mm512_srli_epi16::<4>(codes);
                    [_mm512_permutexvar_epi8(codes, table), _mm512_permutexvar_epi8(high, table)]
                }
                6 => {
                    let [first, second] = six_512(block, c);
                    [_mm512_permutexvar_epi8(first, table), _mm512_permutexvar_epi8(second, table)]
                }
                _ => {
                    let first = _mm512_load_si512(block.add(128 * c).cast());
                    let second = _mm512_load_si512(block.add(128 * c + 64).cast());
                    let sign = _mm512_set1_epi8(-128);
                    [_mm512_xor_si512(first, sign), _mm512_xor_si512(second, sign)]
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn start(sum: *const i32) -> __m512i {
        // SAFETY: the caller vouches for one i32.
        unsafe { _mm512_set1_epi32(*sum) }
    }

    #[inline(always)]
    unsafe fn zero() -> __m512i {
        // SAFETY: register operation only.
        unsafe { _mm512_setzero_si512() }
    }

    #[inline(always)]
    unsafe fn join<const ROOM: usize>(a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: register operation only.
        unsafe { _mm512_add_epi32(a, b) }
    }

    #[inline(always)]
    unsafe fn join_planes(a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: register operations only.
        unsafe { _mm512_add_epi32(_mm512_slli_epi32::<4>(a), b) }
    }

    #[inline(always)]
    unsafe fn dot<const ROOM: usize>(acc: __m512i, w: __m512i, x: *const u8) -> __m512i {
        // SAFETY: the caller vouches for four bytes.
        unsafe { _mm512_dpbusd_epi32(acc, w, _mm512_set1_epi32(x.cast::<i32>().read_unaligned())) }
    }

    #[inline(always)]
    unsafe fn scales(from: *const u8) -> __m512i {
        // SAFETY: the caller vouches for sixteen bytes.
        unsafe { _mm512_slli_epi32::<23>(_mm512_cvtepu8_epi32(_mm_loadu_si128(from.cast()))) }
    }

    #[inline(always)]
    unsafe fn scale_add<const ROOM: usize>(
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
pub(super) mod pairs {
    use super::*;

    pub(in super::super) type Two = [__m256i; 2];

    #[inline(always)]
    pub(in super::super) unsafe fn load(from: *const u8) -> Two {
        // SAFETY: the caller vouches for 64 aligned bytes.
        unsafe { [_mm256_load_si256(from.cast()), _mm256_load_si256(from.add(32).cast())] }
    }

    /// Sixteen bytes of a table in both halves of a register.
    #[inline(always)]
    unsafe fn quarter(table: *const [u8; 64], i: usize) -> __m256i {
        // SAFETY: a table has 64 bytes.
        unsafe {
            let table = table.cast::<u8>().add(16 * i);
            _mm256_broadcastsi128_si256(_mm_loadu_si128(table.cast()))
        }
    }

    /// Looks up codes of six bits, of which bits 6 and 7 are arbitrary.
    #[inline(always)]
    unsafe fn look_up(codes_of: *const [u8; 64], codes: __m256i) -> __m256i {
        // SAFETY: the tables are there.
        unsafe {
            let low = _mm256_and_si256(codes, _mm256_set1_epi8(0xf));
            // A blend goes by bit 7 of each byte: bits 4 and 5 are moved there.
            let (four, five) = (_mm256_slli_epi16::<3>(codes), _mm256_slli_epi16::<2>(codes));
            let a = _mm256_shuffle_epi8(quarter(codes_of, 0), low);
            let b = _mm256_shuffle_epi8(quarter(codes_of, 1), low);
            let c = _mm256_shuffle_epi8(quarter(codes_of, 2), low);
            let d = _mm256_shuffle_epi8(quarter(codes_of, 3), low);
            let (first, second) = (_mm256_blendv_epi8(a, b, four), _mm256_blendv_epi8(c, d, four));
            _mm256_blendv_epi8(first, second, five)
        }
    }

    /// Codes of four bits and what the low bits of a plane hold, looked up.
    #[inline(always)]
    unsafe fn four(table: __m256i, codes: __m256i) -> __m256i {
        // SAFETY: register operations only.
        unsafe { _mm256_shuffle_epi8(table, _mm256_and_si256(codes, _mm256_set1_epi8(0xf))) }
    }

    /// Codes of six bits: the low four of `low`, above them the other bits of `high`.
    #[inline(always)]
    unsafe fn six(codes_of: *const [u8; 64], low: __m256i, high: __m256i) -> __m256i {
        // SAFETY: register operations, and the tables are there.
        unsafe {
            let mask = _mm256_set1_epi8(0xf);
            let low = _mm256_and_si256(mask, low);
            look_up(codes_of, _mm256_or_si256(low, _mm256_andnot_si256(mask, high)))
        }
    }

    #[inline(always)]
    pub(super) unsafe fn decode<C: IntFormat, const REST: bool>(
        tables: *const Tables,
        block: *const u8,
        c: usize,
    ) -> [Two; 2] {
        // SAFETY: the caller vouches for the block and the tables.
        unsafe {
            let codes_of = table::<REST>(tables);
            match C::FORMAT.bits() {
                6 if matches!(C::FORMAT, ElementFormat::Fp6E2M3) => {
                    let [first, second] = x86_e2m3::decode(tables, block, c);
                    [first.map(|w| w.with_offset()), second.map(|w| w.with_offset())]
                }
                4 => {
                    let [a, b] = load(block.add(64 * c));
                    let table = quarter(codes_of, 0);
                    let odd = [_mm256_srli_epi16::<4>(a), _mm256_srli_epi16::<4>(b)];
                    [[four(table, a), four(table, b)], [four(table, odd[0]), four(table, odd[1])]]
                }
                6 => {
                    let [a, b] = load(block.add(64 * c));
                    let [p, q] = load(block.add(256 + 64 * (c / 2)));
                    let odd = [_mm256_srli_epi16::<4>(a), _mm256_srli_epi16::<4>(b)];
                    // The two high bits move to bits 4 and 5.
                    let (first, second) = if c.is_multiple_of(2) {
                        (
                            [_mm256_slli_epi16::<4>(p), _mm256_slli_epi16::<4>(q)],
                            [_mm256_slli_epi16::<2>(p), _mm256_slli_epi16::<2>(q)],
                        )
                    } else {
                        ([p, q], [_mm256_srli_epi16::<2>(p), _mm256_srli_epi16::<2>(q)])
                    };
                    [
                        [six(codes_of, a, first[0]), six(codes_of, b, first[1])],
                        [six(codes_of, odd[0], second[0]), six(codes_of, odd[1], second[1])],
                    ]
                }
                _ => {
                    let ([a, b], [c, d]) =
                        (load(block.add(128 * c)), load(block.add(128 * c + 64)));
                    let sign = _mm256_set1_epi8(-128);
                    [
                        [_mm256_xor_si256(a, sign), _mm256_xor_si256(b, sign)],
                        [_mm256_xor_si256(c, sign), _mm256_xor_si256(d, sign)],
                    ]
                }
            }
        }
    }

    #[inline(always)]
    pub(in super::super) unsafe fn scales(from: *const u8) -> Two {
        // SAFETY: the caller vouches for sixteen bytes.
        unsafe {
            let (a, b) = (_mm_loadl_epi64(from.cast()), _mm_loadl_epi64(from.add(8).cast()));
            [
                _mm256_slli_epi32::<23>(_mm256_cvtepu8_epi32(a)),
                _mm256_slli_epi32::<23>(_mm256_cvtepu8_epi32(b)),
            ]
        }
    }

    #[inline(always)]
    pub(in super::super) unsafe fn scale_add(
        sums: (__m256, __m256),
        acc: Two,
        scales: Two,
        x_scale: *const i32,
    ) -> (__m256, __m256) {
        // SAFETY: the caller vouches for one i32.
        unsafe {
            let x_scale = _mm256_set1_epi32(*x_scale);
            let a = _mm256_castsi256_ps(_mm256_add_epi32(scales[0], x_scale));
            let b = _mm256_castsi256_ps(_mm256_add_epi32(scales[1], x_scale));
            (
                _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc[0]), a, sums.0),
                _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc[1]), b, sums.1),
            )
        }
    }
}

/// Needs avx2, fma and avxvnni.
pub(crate) struct AvxVnni;

/// Needs avx2 and fma. Only for formats whose sums of two products fit sixteen bits.
pub(crate) struct Maddubs;

/// `narrow`: sums may be of sixteen bits.
macro_rules! shared {
    ($narrow:literal) => {
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
        unsafe fn decode<C: IntFormat, const REST: bool>(
            tables: *const Tables,
            block: *const u8,
            c: usize,
        ) -> [pairs::Two; 2] {
            // SAFETY: the caller's promise is passed on.
            unsafe { pairs::decode::<C, REST>(tables, block, c) }
        }

        #[inline(always)]
        unsafe fn zero() -> pairs::Two {
            // SAFETY: register operation only.
            unsafe { [_mm256_setzero_si256(); 2] }
        }

        #[inline(always)]
        unsafe fn join<const ROOM: usize>(a: pairs::Two, b: pairs::Two) -> pairs::Two {
            // SAFETY: register operations only.
            unsafe {
                if ROOM == ALL && $narrow {
                    [_mm256_add_epi16(a[0], b[0]), _mm256_add_epi16(a[1], b[1])]
                } else {
                    [_mm256_add_epi32(a[0], b[0]), _mm256_add_epi32(a[1], b[1])]
                }
            }
        }

        #[inline(always)]
        unsafe fn join_planes(a: pairs::Two, b: pairs::Two) -> pairs::Two {
            // SAFETY: register operations only.
            unsafe {
                [
                    _mm256_add_epi32(_mm256_slli_epi32::<4>(a[0]), b[0]),
                    _mm256_add_epi32(_mm256_slli_epi32::<4>(a[1]), b[1]),
                ]
            }
        }

        #[inline(always)]
        unsafe fn scales(from: *const u8) -> pairs::Two {
            // SAFETY: the caller's promise is passed on.
            unsafe { pairs::scales(from) }
        }
    };
}

impl Integers for AvxVnni {
    shared!(false);

    #[inline(always)]
    unsafe fn start(sum: *const i32) -> pairs::Two {
        // SAFETY: the caller vouches for one i32.
        unsafe { [_mm256_set1_epi32(*sum); 2] }
    }

    #[inline(always)]
    unsafe fn dot<const ROOM: usize>(acc: pairs::Two, w: pairs::Two, x: *const u8) -> pairs::Two {
        // SAFETY: the caller vouches for four bytes.
        unsafe {
            let x = _mm256_set1_epi32(x.cast::<i32>().read_unaligned());
            [_mm256_dpbusd_avx_epi32(acc[0], w[0], x), _mm256_dpbusd_avx_epi32(acc[1], w[1], x)]
        }
    }

    #[inline(always)]
    unsafe fn scale_add<const ROOM: usize>(
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

/// Additions that the compiler does not put in another order: it would make trees of a block's sums, for
/// which sixteen registers do not suffice.
macro_rules! ordered_addition {
    ($name:ident, $instruction:literal) => {
        #[target_feature(enable = "avx2")]
        #[inline]
        pub(super) unsafe fn $name(a: __m256i, b: __m256i) -> __m256i {
            let sum;
            // SAFETY: register operation only.
            unsafe {
                asm!(
                    concat!($instruction, " {}, {}, {}"),
                    lateout(ymm_reg) sum,
                    in(ymm_reg) a,
                    in(ymm_reg) b,
                    options(pure, nomem, nostack, preserves_flags),
                );
            }
            sum
        }
    };
}
ordered_addition!(add16, "vpaddw");
ordered_addition!(add32, "vpaddd");

impl Integers for Maddubs {
    shared!(true);

    #[inline(always)]
    unsafe fn start(_: *const i32) -> pairs::Two {
        // SAFETY: the caller's promise is passed on.
        unsafe { Self::zero() }
    }

    #[inline(always)]
    unsafe fn dot<const ROOM: usize>(acc: pairs::Two, w: pairs::Two, x: *const u8) -> pairs::Two {
        // SAFETY: the caller vouches for four bytes.
        unsafe {
            let x = _mm256_set1_epi32(x.cast::<i32>().read_unaligned());
            let (a, b) = (_mm256_maddubs_epi16(w[0], x), _mm256_maddubs_epi16(w[1], x));
            if ROOM == ALL {
                return [add16(acc[0], a), add16(acc[1], b)];
            }
            let ones = _mm256_set1_epi16(1);
            let (a, b) = (_mm256_madd_epi16(a, ones), _mm256_madd_epi16(b, ones));
            [add32(acc[0], a), add32(acc[1], b)]
        }
    }

    #[inline(always)]
    unsafe fn dot_two<const ROOM: usize>(
        acc: pairs::Two,
        w: [pairs::Two; 2],
        x: *const u8,
    ) -> pairs::Two {
        // SAFETY: the caller vouches for eight bytes.
        unsafe {
            let first = _mm256_set1_epi32(x.cast::<i32>().read_unaligned());
            let second = _mm256_set1_epi32(x.add(4).cast::<i32>().read_unaligned());
            let ones = _mm256_set1_epi16(1);
            let mut acc = acc;
            for h in 0..2 {
                let pairs = add16(
                    _mm256_maddubs_epi16(w[0][h], first),
                    _mm256_maddubs_epi16(w[1][h], second),
                );
                acc[h] = add32(acc[h], _mm256_madd_epi16(pairs, ones));
            }
            acc
        }
    }

    #[inline(always)]
    unsafe fn scale_add<const ROOM: usize>(
        sums: (__m256, __m256),
        acc: pairs::Two,
        scales: pairs::Two,
        x_scale: *const i32,
        sum: *const i32,
    ) -> (__m256, __m256) {
        // SAFETY: the caller vouches for both i32.
        unsafe {
            let sum = _mm256_set1_epi32(*sum);
            let mut acc = acc;
            if ROOM == ALL {
                let ones = _mm256_set1_epi16(1);
                acc = [_mm256_madd_epi16(acc[0], ones), _mm256_madd_epi16(acc[1], ones)];
            }
            let acc = [_mm256_add_epi32(acc[0], sum), _mm256_add_epi32(acc[1], sum)];
            pairs::scale_add(sums, acc, scales, x_scale)
        }
    }
}
