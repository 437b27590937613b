//! Products in fp32 for machines without a bfloat16 dot product: AVX2, FMA and F16C.
//!
//! Codes become f16 bits, sixteen at a time, and those become floats: a register of four bytes of eight
//! rows gives pairs of k, side by side, of four rows each.
#![allow(unsafe_code)]
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;

use super::{
    super::panel::PANEL,
    integer::DotArgs,
    layout::{BLOCK, block_bytes},
    tables::Tables,
    x86_bf16::Format,
};
use crate::formats::ElementFormat;

/// Half a register of codes, one a byte: eight rows (`h` 0 or 1) of register `2 * c + g` of a block.
#[inline(always)]
unsafe fn codes<C: Format>(block: *const u8, c: usize, g: usize, h: usize) -> __m256i {
    // SAFETY: the caller vouches for the block.
    unsafe {
        if C::FORMAT.bits() == 8 {
            return _mm256_load_si256(block.add(128 * c + 64 * g + 32 * h).cast());
        }
        let mut low = _mm256_load_si256(block.add(64 * c + 32 * h).cast());
        if g == 1 {
            low = _mm256_srli_epi16::<4>(low);
        }
        low = _mm256_and_si256(low, _mm256_set1_epi8(0xf));
        if C::FORMAT.bits() == 4 {
            return low;
        }
        let high = _mm256_load_si256(block.add(256 + 64 * (c / 2) + 32 * h).cast());
        let high = match (2 * c + g) % 4 {
            0 => _mm256_slli_epi16::<4>(high),
            1 => _mm256_slli_epi16::<2>(high),
            2 => high,
            _ => _mm256_srli_epi16::<2>(high),
        };
        _mm256_or_si256(low, _mm256_and_si256(high, _mm256_set1_epi8(0x30)))
    }
}

#[inline(always)]
unsafe fn mask(v: __m256i, bits: u16) -> __m256i {
    // SAFETY: register operations only.
    unsafe { _mm256_and_si256(v, _mm256_set1_epi16(bits as i16)) }
}

/// Codes, one in the high byte of each word and zeros below, as f16 bits: value * 2^-SHIFT of `simd`.
#[inline(always)]
unsafe fn half<C: Format>(words: __m256i) -> __m256i {
    // SAFETY: register operations only.
    unsafe {
        match C::FORMAT {
            // The arithmetic shift leaves the sign in place; codes of NaN do not come here.
            ElementFormat::Fp8E4M3 => mask(_mm256_srai_epi16::<1>(words), 0xbf80),
            ElementFormat::Fp6E3M2 => {
                _mm256_or_si256(mask(_mm256_slli_epi16::<2>(words), 0x8000), mask(words, 0x1f00))
            }
            ElementFormat::Fp6E2M3 => {
                let sign = mask(_mm256_slli_epi16::<2>(words), 0x8000);
                _mm256_or_si256(mask(_mm256_srli_epi16::<1>(words), 0x0f80), sign)
            }
            ElementFormat::Fp4E2M1 => {
                let sign = mask(_mm256_slli_epi16::<4>(words), 0x8000);
                _mm256_or_si256(mask(_mm256_slli_epi16::<1>(words), 0x0e00), sign)
            }
            // e5m2 is an f16 without its low byte.
            _ => words,
        }
    }
}

/// Half a register of codes (eight rows) as floats: [pair of k][four rows][row, k].
#[inline(always)]
unsafe fn floats<C: Format>(codes: __m256i) -> [[__m256; 2]; 2] {
    // SAFETY: register operations only.
    unsafe {
        let even = half::<C>(_mm256_slli_epi16::<8>(codes));
        let odd = half::<C>(mask(codes, 0xff00));
        [
            [
                _mm256_cvtph_ps(_mm256_castsi256_si128(even)),
                _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(even)),
            ],
            [
                _mm256_cvtph_ps(_mm256_castsi256_si128(odd)),
                _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(odd)),
            ],
        ]
    }
}

/// Scales of four rows from their bytes, each twice, with the exponent `add` added.
#[inline(always)]
unsafe fn scales(from: *const u8, add: i32) -> __m256 {
    // SAFETY: the caller vouches for four bytes.
    unsafe {
        let bytes = _mm_cvtsi32_si128(from.cast::<i32>().read_unaligned());
        let wide = _mm256_cvtepu8_epi64(bytes);
        let twice = _mm256_or_si256(wide, _mm256_slli_epi64::<32>(wide));
        let scale = _mm256_slli_epi32::<23>(twice);
        _mm256_castsi256_ps(_mm256_add_epi32(scale, _mm256_set1_epi32(add)))
    }
}

/// log2 of what [`half`] leaves out, in the place of a float's exponent.
const fn shift<C: Format>() -> i32 {
    (15 - C::FORMAT.row().bias) << 23
}

/// c[MR][16] (+)= x * w over the blocks, straight from the codes; x in f32.
///
/// # Safety
/// avx2, fma and f16c are there; everything in `args` holds MR rows and `args.blocks` blocks.
#[inline(always)]
pub(crate) unsafe fn dot<C: Format, const MR: usize>(args: &DotArgs) {
    // SAFETY: all offsets stay within what the caller vouches for.
    unsafe {
        // Lanes: four rows, of each the sums of even and of odd k.
        let mut sums = [[_mm256_setzero_ps(); 4]; MR];
        for b in 0..args.blocks {
            let w = args.w.add(b * block_bytes(C::FORMAT));
            let x = args.x.add(b * MR * 4 * BLOCK).cast::<f32>();
            for line in 0..block_bytes(C::FORMAT) / 64 {
                _mm_prefetch::<_MM_HINT_T0>(w.wrapping_add(2048 + line * 64).cast());
            }
            let mut acc = [[_mm256_setzero_ps(); 4]; MR];
            for c in 0..4 {
                for g in 0..2 {
                    for h in 0..2 {
                        let values = floats::<C>(codes::<C>(w, c, g, h));
                        for p in 0..2 {
                            let k = 8 * c + 4 * g + 2 * p;
                            for r in 0..MR {
                                let x = _mm256_castpd_ps(_mm256_broadcast_sd(
                                    &*x.add(r * BLOCK + k).cast::<f64>(),
                                ));
                                for q in 0..2 {
                                    let sum = &mut acc[r][2 * h + q];
                                    *sum = _mm256_fmadd_ps(values[p][q], x, *sum);
                                }
                            }
                        }
                    }
                }
            }
            for r in 0..MR {
                let x_scale = *args.x_scales.add(b * MR + r) + shift::<C>();
                for q in 0..4 {
                    let scale = scales(args.scales.add(b * PANEL + 4 * q), x_scale);
                    sums[r][q] = _mm256_fmadd_ps(acc[r][q], scale, sums[r][q]);
                }
            }
        }
        for r in 0..MR {
            for h in 0..2 {
                let (a, b) = (sums[r][2 * h], sums[r][2 * h + 1]);
                // Pairs are added within 128 bits; the quarters then stand in the order 0, 2, 1, 3.
                let pairs = _mm256_castps_pd(_mm256_hadd_ps(a, b));
                let rows = _mm256_castpd_ps(_mm256_permute4x64_pd::<0b11_01_10_00>(pairs));
                let c = args.c.add(r * args.ldc + 8 * h);
                let rows = if args.add { _mm256_add_ps(_mm256_loadu_ps(c), rows) } else { rows };
                _mm256_storeu_ps(c, rows);
            }
        }
    }
}

/// Decodes `blocks` blocks of a panel with their scales to f32: [k][16 rows].
///
/// # Safety
/// avx2 and f16c are there; `out` holds 2048 bytes a block.
#[inline(always)]
pub(crate) unsafe fn decode<C: Format>(
    _: *const Tables,
    w: *const u8,
    scale_bytes: *const u8,
    blocks: usize,
    out: *mut u8,
) {
    // SAFETY: the caller vouches for the blocks.
    unsafe {
        for b in 0..blocks {
            let w = w.add(b * block_bytes(C::FORMAT));
            let factors: [__m256; 4] =
                std::array::from_fn(|q| scales(scale_bytes.add(b * PANEL + 4 * q), shift::<C>()));
            for c in 0..4 {
                for g in 0..2 {
                    for h in 0..2 {
                        let values = floats::<C>(codes::<C>(w, c, g, h));
                        for p in 0..2 {
                            let k = b * BLOCK + 8 * c + 4 * g + 2 * p;
                            let out = out.cast::<f32>().add(k * PANEL + 8 * h);
                            let a = _mm256_mul_ps(values[p][0], factors[2 * h]);
                            let b = _mm256_mul_ps(values[p][1], factors[2 * h + 1]);
                            store_pairs(a, b, out);
                        }
                    }
                }
            }
        }
    }
}

/// Eight rows of two k, [row][k] in `a` and `b`: the first k to `out`, the second a panel's row on.
#[inline(always)]
unsafe fn store_pairs(a: __m256, b: __m256, out: *mut f32) {
    // SAFETY: the caller vouches for both stretches.
    unsafe {
        let first = _mm256_castps_pd(_mm256_shuffle_ps::<0b10_00_10_00>(a, b));
        let second = _mm256_castps_pd(_mm256_shuffle_ps::<0b11_01_11_01>(a, b));
        let first = _mm256_castpd_ps(_mm256_permute4x64_pd::<0b11_01_10_00>(first));
        let second = _mm256_castpd_ps(_mm256_permute4x64_pd::<0b11_01_10_00>(second));
        _mm256_storeu_ps(out, first);
        _mm256_storeu_ps(out.add(PANEL), second);
    }
}
