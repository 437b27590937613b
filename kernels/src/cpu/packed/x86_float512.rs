//! Products in fp32 of AVX-512, straight from the codes: for a few rows of x, and machines whose dot product of
//! bfloat16 is slower than two multiply-adds of fp32.
//!
//! Codes become bfloat16 pairs as in `x86_bf16`, or by shifts where a block of eight-bit codes has no small
//! magnitudes; a shift and a mask take a pair apart. A code of four bits is the index of its value in a register.
#![allow(unsafe_code)]
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;

use super::{
    super::panel::PANEL,
    integer::DotArgs,
    layout::{BLOCK, ORDER, block_bytes},
    tables::words,
    x86_bf16::{Format, Look, add_to, shifted},
};

/// The floats of eight k from 8 `c` on, of sixteen rows. Without `SMALL` those of eight-bit codes are
/// 2^-[`left_out`](super::tables::Words::left_out) times as large.
#[inline(always)]
unsafe fn eight<C: Format, const SMALL: bool>(
    look: &Look,
    floats: __m512,
    block: *const u8,
    c: usize,
) -> [__m512; 8] {
    // SAFETY: the caller vouches for the block.
    unsafe {
        let mut out = [floats; 8];
        if C::FORMAT.bits() == 4 {
            let mut codes = _mm512_load_si512(block.add(64 * c).cast());
            for nibble in 0..8 {
                out[4 * (nibble % 2) + ORDER[nibble / 2]] = _mm512_permutexvar_ps(codes, floats);
                codes = _mm512_srli_epi32::<4>(codes);
            }
            return out;
        }
        let pairs = if C::FORMAT.bits() == 8 && !SMALL {
            let codes = block.add(128 * c).cast::<__m512i>();
            let first = shifted::<C>(_mm512_load_si512(codes));
            let second = shifted::<C>(_mm512_load_si512(codes.add(1)));
            [first[0], first[1], second[0], second[1]]
        } else {
            look.eight::<C>(block, c)
        };
        let mask = _mm512_set1_epi32(0xffff_0000_u32 as i32);
        for i in 0..4 {
            out[2 * i] = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs[i]));
            out[2 * i + 1] = _mm512_castsi512_ps(_mm512_and_si512(pairs[i], mask));
        }
        out
    }
}

/// c[MR][NP * 16] (+)= x * w over the blocks, of NP panels in turns; x in f32.
///
/// # Safety
/// avx512f, bw and vbmi are there; everything in `args` holds MR rows, NP panels and `args.blocks` blocks.
#[inline(always)]
pub(crate) unsafe fn dot<C: Format, const MR: usize, const NP: usize>(args: &DotArgs) {
    // SAFETY: all offsets stay within what the caller vouches for.
    unsafe {
        let look = Look::new(args.tables);
        let floats = _mm512_loadu_ps((*args.tables).floats.as_ptr());
        let mut sums = [[_mm512_setzero_ps(); NP]; MR];
        for b in 0..args.blocks {
            let mut small = false;
            for p in 0..NP {
                let at = p * args.panel_blocks + b;
                let w = args.panel.codes.add(at * block_bytes(C::FORMAT));
                for line in 0..block_bytes(C::FORMAT) / 64 {
                    _mm_prefetch::<_MM_HINT_T0>(w.wrapping_add(2048 + line * 64).cast());
                }
                small |= C::FORMAT.bits() == 8 && *args.panel.small.add(at) != 0;
            }
            if small {
                block::<C, MR, NP, true>(args, &look, floats, b, &mut sums);
            } else {
                block::<C, MR, NP, false>(args, &look, floats, b, &mut sums);
            }
        }
        for r in 0..MR {
            for p in 0..NP {
                add_to(args.c.add(r * args.ldc + p * PANEL), sums[r][p], args.add);
            }
        }
    }
}

/// Adds block `b` of each panel times both scales to the sums.
#[inline(always)]
unsafe fn block<C: Format, const MR: usize, const NP: usize, const SMALL: bool>(
    args: &DotArgs,
    look: &Look,
    floats: __m512,
    b: usize,
    sums: &mut [[__m512; NP]; MR],
) {
    // As many chains for one panel as for several: a sum's bits do not depend on its neighbours.
    let chains = if MR == 1 { 2 } else { 1 };
    // SAFETY: the caller vouches for the block.
    unsafe {
        let x = args.x.add(b * MR * 4 * BLOCK).cast::<f32>();
        let mut acc = [[[_mm512_setzero_ps(); 2]; NP]; MR];
        for c in 0..4 {
            for p in 0..NP {
                let w = args.panel.codes.add((p * args.panel_blocks + b) * block_bytes(C::FORMAT));
                let values = eight::<C, SMALL>(look, floats, w, c);
                for (i, value) in values.into_iter().enumerate() {
                    for r in 0..MR {
                        let x = _mm512_set1_ps(*x.add(r * BLOCK + 8 * c + i));
                        let sum = &mut acc[r][p][i % chains];
                        *sum = _mm512_fmadd_ps(value, x, *sum);
                    }
                }
            }
        }
        let left_out = if SMALL { 0 } else { const { words(C::FORMAT).left_out << 23 } };
        for p in 0..NP {
            let scales = args.panel.scales.add((p * args.panel_blocks + b) * PANEL);
            let scales = _mm512_cvtepu8_epi32(_mm_loadu_si128(scales.cast()));
            let scales = _mm512_slli_epi32::<23>(scales);
            for r in 0..MR {
                let [mut sum, second] = acc[r][p];
                if chains == 2 {
                    sum = _mm512_add_ps(sum, second);
                }
                let x_scale = _mm512_set1_epi32(*args.x_scales.add(b * MR + r) + left_out);
                let scale = _mm512_castsi512_ps(_mm512_add_epi32(scales, x_scale));
                sums[r][p] = _mm512_fmadd_ps(sum, scale, sums[r][p]);
            }
        }
    }
}
