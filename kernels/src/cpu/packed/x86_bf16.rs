//! bfloat16 dot products of AVX-512.
//!
//! Every element is a bfloat16, so that products are exact; sums are fp32. Up to eight rows of x go
//! straight from the codes, with the scales applied a block at a time; more rows share a panel of
//! bfloat16 with the scales in their exponents.
#![allow(unsafe_code)]
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;

use super::{
    super::panel::PANEL,
    integer::DotArgs,
    layout::{BLOCK, PanelAt, block_bytes},
    tables::{Tables, words},
    x86_integer::six_512,
};
use crate::formats::ElementFormat;

/// A format as a type, as far as these kernels know it.
pub(crate) trait Format {
    const FORMAT: ElementFormat;
}

macro_rules! formats {
    ($($name:ident = $format:ident),*) => { $(
        pub(crate) struct $name;
        impl Format for $name {
            const FORMAT: ElementFormat = ElementFormat::$format;
        }
    )* };
}
formats!(E4M3 = Fp8E4M3, E5M2 = Fp8E5M2, E3M2 = Fp6E3M2, E2M3 = Fp6E2M3, E2M1 = Fp4E2M1);

/// Tables in registers.
#[derive(Clone, Copy)]
pub(super) struct Look {
    high: [__m512i; 2],
    low: [__m512i; 2],
    words: __m512i,
}

impl Look {
    #[inline(always)]
    pub(super) unsafe fn new(tables: *const Tables) -> Self {
        // SAFETY: tables are aligned and as long as what is read.
        unsafe {
            let high = (*tables).high.as_ptr().cast::<__m512i>();
            let low = (*tables).low.as_ptr().cast::<__m512i>();
            Self {
                high: [_mm512_load_si512(high), _mm512_load_si512(high.add(1))],
                low: [_mm512_load_si512(low), _mm512_load_si512(low.add(1))],
                words: _mm512_load_si512((*tables).words.as_ptr().cast()),
            }
        }
    }

    /// Codes of a register to pairs: k and k + 1 of each row, then k + 2 and k + 3.
    #[inline(always)]
    unsafe fn pairs<C: Format>(&self, codes: __m512i) -> [__m512i; 2] {
        // SAFETY: register operations only.
        unsafe {
            let (high, low) = if C::FORMAT.bits() == 8 {
                let sign = _mm512_set1_epi8(-128);
                let high = _mm512_permutex2var_epi8(self.high[0], codes, self.high[1]);
                // high | codes & sign
                let high = _mm512_ternarylogic_epi32::<0xf8>(high, codes, sign);
                (high, _mm512_permutex2var_epi8(self.low[0], codes, self.low[1]))
            } else {
                (
                    _mm512_permutexvar_epi8(codes, self.high[0]),
                    _mm512_permutexvar_epi8(codes, self.low[0]),
                )
            };
            let mask = _mm512_set1_epi16(0xff00_u16 as i16);
            // mask ? a : b
            let select = |a, b| _mm512_ternarylogic_epi32::<0xca>(mask, a, b);
            [select(_mm512_slli_epi16::<8>(high), low), select(high, _mm512_srli_epi16::<8>(low))]
        }
    }

    /// The sixteen pairs of k of a block from its `c`-th eighth pair on: registers 2c and 2c + 1.
    #[inline(always)]
    pub(super) unsafe fn eight<C: Format>(&self, block: *const u8, c: usize) -> [__m512i; 4] {
        // SAFETY: the caller vouches for the block.
        unsafe {
            match C::FORMAT.bits() {
                4 => {
                    let codes = _mm512_load_si512(block.add(64 * c).cast());
                    let words = self.words;
                    [
                        _mm512_permutexvar_epi16(codes, words),
                        _mm512_permutexvar_epi16(_mm512_srli_epi16::<8>(codes), words),
                        _mm512_permutexvar_epi16(_mm512_srli_epi16::<4>(codes), words),
                        _mm512_permutexvar_epi16(_mm512_srli_epi16::<12>(codes), words),
                    ]
                }
                6 => {
                    let [first, second] = six_512(block, c);
                    let (first, second) = (self.pairs::<C>(first), self.pairs::<C>(second));
                    [first[0], first[1], second[0], second[1]]
                }
                _ => {
                    let codes = block.add(128 * c).cast::<__m512i>();
                    let first = self.pairs::<C>(_mm512_load_si512(codes));
                    let second = self.pairs::<C>(_mm512_load_si512(codes.add(1)));
                    [first[0], first[1], second[0], second[1]]
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn dp(acc: __m512, w: __m512i, x: *const u8) -> __m512 {
    // SAFETY: the caller vouches for four bytes; both types are 64 bytes without a meaning of their own.
    unsafe {
        let x = _mm512_set1_epi32(x.cast::<i32>().read_unaligned());
        dp_register(acc, w, x)
    }
}

#[inline(always)]
unsafe fn dp_register(acc: __m512, w: __m512i, x: __m512i) -> __m512 {
    // SAFETY: both types are 64 bytes without a meaning of their own.
    unsafe {
        let w = std::mem::transmute::<__m512i, __m512bh>(w);
        let x = std::mem::transmute::<__m512i, __m512bh>(x);
        _mm512_dpbf16_ps(acc, w, x)
    }
}

/// c[MR][16] (+)= x * w over the blocks, straight from the codes; x in `P` parts.
///
/// # Safety
/// avx512f, bw, vbmi and bf16 are there; everything in `args` holds MR rows and `args.blocks` blocks.
#[inline(always)]
pub(crate) unsafe fn dot<C: Format, const MR: usize, const P: usize>(args: &DotArgs) {
    // SAFETY: all offsets stay within what the caller vouches for.
    unsafe {
        let look = Look::new(args.tables);
        let mut sums = [_mm512_setzero_ps(); MR];
        for b in 0..args.blocks {
            let w = args.panel.codes.add(b * block_bytes(C::FORMAT));
            let x = args.x.add(b * P * MR * 2 * BLOCK);
            for line in 0..block_bytes(C::FORMAT) / 64 {
                _mm_prefetch::<_MM_HINT_T0>(w.wrapping_add(2048 + line * 64).cast());
            }
            let mut acc = [[_mm512_setzero_ps(); 4]; MR];
            for c in 0..4 {
                let pairs = look.eight::<C>(w, c);
                for j in 0..4 {
                    for part in 0..P {
                        for r in 0..MR {
                            let x = x.add((part * MR + r) * 2 * BLOCK + (4 * c + j) * 4);
                            let sum = &mut acc[r][if MR <= CHAINED_ROWS { j } else { 0 }];
                            *sum = dp(*sum, pairs[j], x);
                        }
                    }
                }
            }
            add_block(args, b, &acc, &mut sums);
        }
        for r in 0..MR {
            add_to(args.c.add(r * args.ldc), sums[r], args.add);
        }
    }
}

/// Up to so many rows of x the sums of a block are four chains each, as a chain waits for itself.
const CHAINED_ROWS: usize = 2;

/// sums += the sums of block `b` times both scales: in four chains, or in the first alone.
#[inline(always)]
unsafe fn add_block<const MR: usize>(
    args: &DotArgs,
    b: usize,
    acc: &[[__m512; 4]; MR],
    sums: &mut [__m512; MR],
) {
    // SAFETY: the caller vouches for the block's scales.
    unsafe {
        let scales = _mm_loadu_si128(args.panel.scales.add(b * PANEL).cast());
        let scales = _mm512_slli_epi32::<23>(_mm512_cvtepu8_epi32(scales));
        for r in 0..MR {
            let x_scale = _mm512_set1_epi32(*args.x_scales.add(b * MR + r));
            let mut sum = acc[r][0];
            if MR <= CHAINED_ROWS {
                let even = _mm512_add_ps(sum, acc[r][1]);
                sum = _mm512_add_ps(even, _mm512_add_ps(acc[r][2], acc[r][3]));
            }
            let scale = _mm512_castsi512_ps(_mm512_add_epi32(scales, x_scale));
            sums[r] = _mm512_fmadd_ps(sum, scale, sums[r]);
        }
    }
}

#[inline(always)]
pub(super) unsafe fn add_to(c: *mut f32, sum: __m512, add: bool) {
    // SAFETY: the caller vouches for sixteen floats.
    unsafe {
        let sum = if add { _mm512_add_ps(_mm512_loadu_ps(c), sum) } else { sum };
        _mm512_storeu_ps(c, sum);
    }
}

/// Exponents of a block's scales, to be added to bfloat16 pairs.
#[inline(always)]
unsafe fn exponents(scales: *const u8) -> __m512i {
    // SAFETY: the caller vouches for sixteen bytes.
    unsafe {
        let scale = _mm512_cvtepu8_epi32(_mm_loadu_si128(scales.cast()));
        let e = _mm512_slli_epi32::<7>(_mm512_sub_epi32(scale, _mm512_set1_epi32(127)));
        // mask ? e : e << 16
        let mask = _mm512_set1_epi32(0xffff);
        _mm512_ternarylogic_epi32::<0xca>(mask, e, _mm512_slli_epi32::<16>(e))
    }
}

/// Pairs with the scales in their exponents; zeros stay.
#[inline(always)]
unsafe fn fold(pair: __m512i, exponents: __m512i) -> __m512i {
    // SAFETY: register operations only.
    unsafe {
        let nonzero = _mm512_test_epi16_mask(pair, _mm512_set1_epi16(0x7fff));
        _mm512_mask_add_epi16(pair, nonzero, pair, exponents)
    }
}

/// Codes of eight bits as upper halves of floats: k and k + 1 of each row, then k + 2 and k + 3; times
/// 2^-[`left_out`](super::tables::Words::left_out), and wrong for magnitudes without an implicit bit.
#[inline(always)]
pub(super) unsafe fn shifted<C: Format>(codes: __m512i) -> [__m512i; 2] {
    // SAFETY: register operations only.
    unsafe { [place::<C>(_mm512_slli_epi16::<8>(codes)), place::<C>(codes)] }
}

/// The upper bytes of words.
#[inline(always)]
unsafe fn place<C: Format>(codes: __m512i) -> __m512i {
    let words = const { words(C::FORMAT) };
    // SAFETY: register operations only.
    unsafe {
        let mask = _mm512_set1_epi16(words.mask as i16);
        let exponent = _mm512_set1_epi16(words.exponent as i16);
        let codes = match C::FORMAT {
            ElementFormat::Fp8E5M2 => _mm512_srai_epi16::<3>(codes),
            _ => _mm512_srai_epi16::<4>(codes),
        };
        // exponent | codes & mask
        _mm512_ternarylogic_epi32::<0xf8>(exponent, codes, mask)
    }
}

// What `shifted` has in its instructions.
const _: () = assert!(words(ElementFormat::Fp8E4M3).shift == 4);
const _: () = assert!(words(ElementFormat::Fp8E5M2).shift == 3);

/// Decodes `blocks` blocks of a panel with their scales: to bfloat16, [k / 2][16 rows][2], or to f32, [k][16
/// rows].
///
/// # Safety
/// The instructions are there; `out` holds 1024 bytes a block, twice as many for f32.
#[inline(always)]
pub(crate) unsafe fn decode<C: Format, const F32: bool>(
    tables: *const Tables,
    panel: PanelAt,
    blocks: usize,
    out: *mut u8,
) {
    // SAFETY: the caller vouches for the blocks.
    unsafe {
        let look = Look::new(tables);
        for b in 0..blocks {
            let codes = panel.codes.add(b * block_bytes(C::FORMAT));
            let e = exponents(panel.scales.add(b * PANEL));
            let out = out.add(b * if F32 { 2048 } else { 1024 });
            if C::FORMAT.bits() < 8 || *panel.small.add(b) != 0 {
                decode_block::<C, F32, true>(&look, codes, e, out);
            } else {
                let left_out = const { words(C::FORMAT).left_out << 7 };
                let e = _mm512_add_epi16(e, _mm512_set1_epi16(left_out as i16));
                decode_block::<C, F32, false>(&look, codes, e, out);
            }
        }
    }
}

/// # Safety
/// As [`decode`], for one block, with what is to be added to the words' exponents; without `SMALL`, it has
/// eight bits and no magnitudes without an implicit bit.
#[inline(always)]
unsafe fn decode_block<C: Format, const F32: bool, const SMALL: bool>(
    look: &Look,
    codes: *const u8,
    e: __m512i,
    out: *mut u8,
) {
    // SAFETY: the caller vouches for the block.
    unsafe {
        for c in 0..4 {
            let ahead = codes.wrapping_add(2048 + c * block_bytes(C::FORMAT) / 4);
            _mm_prefetch::<_MM_HINT_T0>(ahead.cast());
            _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(64).cast());
            let pairs = if SMALL {
                look.eight::<C>(codes, c)
            } else {
                let codes = codes.add(128 * c).cast::<__m512i>();
                let first = shifted::<C>(_mm512_load_si512(codes));
                let second = shifted::<C>(_mm512_load_si512(codes.add(1)));
                [first[0], first[1], second[0], second[1]]
            };
            for (j, pair) in pairs.into_iter().enumerate() {
                // None of the shifted ones is zero.
                let pair = if SMALL { fold(pair, e) } else { _mm512_add_epi16(pair, e) };
                let at = 4 * c + j;
                if F32 {
                    let mask = _mm512_set1_epi32(0xffff_0000_u32 as i32);
                    let out = out.add(at * 128);
                    _mm512_store_si512(out.cast(), _mm512_slli_epi32::<16>(pair));
                    _mm512_store_si512(out.add(64).cast(), _mm512_and_si512(pair, mask));
                } else {
                    _mm512_store_si512(out.add(at * 64).cast(), pair);
                }
            }
        }
    }
}

/// c[MR][NV * 16] (+)= x * panels: [`decode`]d panels `panel_stride` bytes apart.
///
/// # Safety
/// The instructions are there; x and the panels hold `args.blocks` blocks, `c` MR rows.
#[inline(always)]
pub(crate) unsafe fn tile<const MR: usize, const NV: usize>(args: &DotArgs, panel_stride: usize) {
    // SAFETY: all offsets stay within what the caller vouches for.
    unsafe {
        let mut acc = [[_mm512_setzero_ps(); NV]; MR];
        for b in 0..args.blocks {
            let x = args.x.add(b * MR * 2 * BLOCK);
            let w = args.panel.codes.add(b * 1024);
            for j in 0..16 {
                let mut pairs = [_mm512_setzero_si512(); NV];
                for v in 0..NV {
                    pairs[v] = _mm512_load_si512(w.add(v * panel_stride + j * 64).cast());
                }
                for r in 0..MR {
                    let x = x.add(r * 2 * BLOCK + j * 4);
                    let x = _mm512_set1_epi32(x.cast::<i32>().read_unaligned());
                    for v in 0..NV {
                        acc[r][v] = dp_register(acc[r][v], pairs[v], x);
                    }
                }
            }
        }
        for r in 0..MR {
            for v in 0..NV {
                add_to(args.c.add(r * args.ldc + v * PANEL), acc[r][v], args.add);
            }
        }
    }
}
