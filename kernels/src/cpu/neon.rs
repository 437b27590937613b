//! NEON, which every 64-bit Arm has: sixteen floats in four registers.
#![allow(unsafe_code)]

use std::arch::{aarch64::*, asm};

use super::simd::{Codec, Simd};
use crate::formats::ElementFormat;

/// Needs neon, nothing optional.
pub(crate) struct Neon;

/// Both halves of eight f16 as f32, subnormals included. The intrinsics for it are stable from Rust
/// 1.94 on, later than this crate's oldest compiler.
#[inline(always)]
unsafe fn widen_f16(half: uint16x8_t) -> (float32x4_t, float32x4_t) {
    let (low, high): (float32x4_t, float32x4_t);
    // SAFETY: register operations of the base instruction set. No flush-to-zero touches a widening.
    unsafe {
        asm!("fcvtl {0:v}.4s, {1:v}.4h", out(vreg) low, in(vreg) half,
            options(pure, nomem, nostack, preserves_flags));
        asm!("fcvtl2 {0:v}.4s, {1:v}.8h", out(vreg) high, in(vreg) half,
            options(pure, nomem, nostack, preserves_flags));
    }
    (low, high)
}

/// Bytes as the high bytes of u16.
#[inline(always)]
unsafe fn high_bytes(codes: uint8x16_t) -> [uint16x8_t; 2] {
    // SAFETY: register operations only.
    unsafe {
        let zero = vdupq_n_u8(0);
        [vreinterpretq_u16_u8(vzip1q_u8(zero, codes)), vreinterpretq_u16_u8(vzip2q_u8(zero, codes))]
    }
}

/// Sixteen codes of at most eight bits as the bits of sixteen f16, value * 2^-SHIFT.
#[inline(always)]
unsafe fn to_f16_bits<C: Codec>(codes: uint8x16_t) -> [uint16x8_t; 2] {
    // SAFETY: register operations only.
    unsafe {
        match C::FORMAT {
            // An f16 without its low byte.
            ElementFormat::Fp8E5M2 => high_bytes(codes),
            ElementFormat::Fp8E4M3 => high_bytes(codes).map(|wide| {
                // The arithmetic shift leaves the sign in place and puts the magnitude below it.
                let half = vreinterpretq_u16_s16(vshrq_n_s16::<1>(vreinterpretq_s16_u16(wide)));
                let half = vandq_u16(half, vdupq_n_u16(0xbf80));
                let nan = vceqq_u16(vandq_u16(half, vdupq_n_u16(0x3f80)), vdupq_n_u16(0x3f80));
                vorrq_u16(half, vandq_u16(nan, vdupq_n_u16(0x7e00)))
            }),
            ElementFormat::Fp6E3M2 => {
                let low = vandq_u8(codes, vdupq_n_u8(0x1f));
                high_bytes(vbslq_u8(vdupq_n_u8(0x80), vshlq_n_u8::<2>(codes), low))
            }
            ElementFormat::Fp6E2M3 => high_bytes(codes).map(|wide| {
                let magnitude = vshrq_n_u16::<1>(vandq_u16(wide, vdupq_n_u16(0x1f00)));
                vbslq_u16(vdupq_n_u16(0x8000), vshlq_n_u16::<2>(wide), magnitude)
            }),
            ElementFormat::Fp4E2M1 => {
                const TABLE: [u8; 16] =
                    [0, 2, 4, 6, 8, 10, 12, 14, 128, 130, 132, 134, 136, 138, 140, 142];
                high_bytes(vqtbl1q_u8(vld1q_u8(TABLE.as_ptr()), codes))
            }
            ElementFormat::MxInt8 | ElementFormat::Bf16 => unreachable!("no small float"),
        }
    }
}

/// Sixteen six-bit codes: each lies in one byte or two neighbours.
#[inline(always)]
unsafe fn unpack_six(from: *const u8) -> uint8x16_t {
    /// Where a code begins and, 255 for nowhere, where its upper bits are.
    const LOW: [u8; 16] = [0, 0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9, 9, 10, 11];
    const HIGH: [u8; 16] = [255, 1, 2, 255, 255, 4, 5, 255, 255, 7, 8, 255, 255, 10, 11, 255];
    /// Shifts to the left.
    const LOW_SHIFT: [i8; 16] = [0, -6, -4, -2, 0, -6, -4, -2, 0, -6, -4, -2, 0, -6, -4, -2];
    const HIGH_SHIFT: [i8; 16] = [0, 2, 4, 0, 0, 2, 4, 0, 0, 2, 4, 0, 0, 2, 4, 0];
    // SAFETY: the caller vouches for twelve bytes, and no more are read.
    unsafe {
        let tail = from.add(8).cast::<u32>().read_unaligned();
        let v = vreinterpretq_u32_u8(vcombine_u8(vld1_u8(from), vdup_n_u8(0)));
        let v = vreinterpretq_u8_u32(vsetq_lane_u32::<2>(tail, v));
        let low = vshlq_u8(vqtbl1q_u8(v, vld1q_u8(LOW.as_ptr())), vld1q_s8(LOW_SHIFT.as_ptr()));
        let high = vshlq_u8(vqtbl1q_u8(v, vld1q_u8(HIGH.as_ptr())), vld1q_s8(HIGH_SHIFT.as_ptr()));
        vandq_u8(vorrq_u8(low, high), vdupq_n_u8(0x3f))
    }
}

/// Eight i16 as f32.
#[inline(always)]
unsafe fn widen_i16(v: int16x8_t) -> (float32x4_t, float32x4_t) {
    // SAFETY: register operations only.
    unsafe {
        let low = vcvtq_f32_s32(vmovl_s16(vget_low_s16(v)));
        (low, vcvtq_f32_s32(vmovl_high_s16(v)))
    }
}

/// Eight bfloat16 as f32.
#[inline(always)]
unsafe fn widen_bf16(v: uint16x8_t) -> (float32x4_t, float32x4_t) {
    // SAFETY: register operations only.
    unsafe {
        let low = vreinterpretq_f32_u32(vshll_n_u16::<16>(vget_low_u16(v)));
        (low, vreinterpretq_f32_u32(vshll_high_n_u16::<16>(v)))
    }
}

/// Four registers from two pairs.
#[inline(always)]
fn join(a: (float32x4_t, float32x4_t), b: (float32x4_t, float32x4_t)) -> [float32x4_t; 4] {
    [a.0, a.1, b.0, b.1]
}

impl Simd for Neon {
    type V = [float32x4_t; 4];
    type Codes = uint8x16_t;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self::V {
        // SAFETY: register operation only.
        unsafe { [vdupq_n_f32(value); 4] }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::V {
        // SAFETY: the caller vouches for sixteen floats.
        std::array::from_fn(|i| unsafe { vld1q_f32(from.add(4 * i)) })
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, v: Self::V) {
        for (i, v) in v.into_iter().enumerate() {
            // SAFETY: the caller vouches for sixteen floats.
            unsafe { vst1q_f32(to.add(4 * i), v) };
        }
    }

    #[inline(always)]
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: register operations only.
        std::array::from_fn(|i| unsafe { vaddq_f32(a[i], b[i]) })
    }

    #[inline(always)]
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: register operations only.
        std::array::from_fn(|i| unsafe { vmulq_f32(a[i], b[i]) })
    }

    #[inline(always)]
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        // SAFETY: register operations only.
        std::array::from_fn(|i| unsafe { vfmaq_f32(c[i], a[i], b[i]) })
    }

    #[inline(always)]
    unsafe fn sum(v: Self::V) -> f32 {
        // SAFETY: register operations only. The order is that of AVX2's variant.
        unsafe {
            let v = vaddq_f32(vaddq_f32(v[0], v[2]), vaddq_f32(v[1], v[3]));
            let v = vadd_f32(vget_low_f32(v), vget_high_f32(v));
            vget_lane_f32::<0>(vpadd_f32(v, v))
        }
    }

    #[inline(always)]
    unsafe fn unpack<C: Codec>(from: *const u8) -> uint8x16_t {
        // SAFETY: each arm reads the UNIT bytes that the caller vouches for: 8, 8 + 4 or 16.
        unsafe {
            match C::BITS {
                4 => {
                    let v = vld1_u8(from);
                    let v = vcombine_u8(v, v);
                    vzip1q_u8(vandq_u8(v, vdupq_n_u8(0xf)), vshrq_n_u8::<4>(v))
                }
                6 => unpack_six(from),
                _ => vld1q_u8(from),
            }
        }
    }

    #[inline(always)]
    unsafe fn keep(codes: uint8x16_t, keep: usize) -> uint8x16_t {
        const INDEX: [u8; 16] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];
        // SAFETY: register operations, and a load of a constant.
        unsafe { vandq_u8(codes, vcltq_u8(vld1q_u8(INDEX.as_ptr()), vdupq_n_u8(keep as u8))) }
    }

    #[inline(always)]
    unsafe fn decode<C: Codec>(codes: uint8x16_t) -> Self::V {
        // SAFETY: register operations only.
        unsafe {
            if matches!(C::FORMAT, ElementFormat::MxInt8) {
                let codes = vreinterpretq_s8_u8(codes);
                let low = widen_i16(vmovl_s8(vget_low_s8(codes)));
                return join(low, widen_i16(vmovl_high_s8(codes)));
            }
            let [low, high] = to_f16_bits::<C>(codes);
            join(widen_f16(low), widen_f16(high))
        }
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u8) -> Self::V {
        // SAFETY: the caller vouches for 32 bytes.
        unsafe {
            let half = |at| vreinterpretq_u16_u8(vld1q_u8(from.add(at)));
            join(widen_bf16(half(0)), widen_bf16(half(16)))
        }
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const u8) -> Self::V {
        // SAFETY: the caller vouches for 32 bytes.
        unsafe {
            let low = vreinterpretq_u16_u8(vld1q_u8(from));
            join(widen_f16(low), widen_f16(vreinterpretq_u16_u8(vld1q_u8(from.add(16)))))
        }
    }

    #[inline(always)]
    unsafe fn max_magnitude(amax: Self::V, v: Self::V) -> Self::V {
        // SAFETY: register operations only.
        std::array::from_fn(|i| unsafe {
            let magnitude = vandq_u32(vreinterpretq_u32_f32(v[i]), vdupq_n_u32(0x7fff_ffff));
            vreinterpretq_f32_u32(vmaxq_u32(vreinterpretq_u32_f32(amax[i]), magnitude))
        })
    }

    #[inline(always)]
    unsafe fn transpose(rows: [uint8x16_t; 16]) -> [uint8x16_t; 16] {
        // Each round interleaves row i with row i + 8; after four rounds byte (i, j) is at (j, i).
        let mut rows = rows;
        for _ in 0..4 {
            let mut next = rows;
            for i in 0..8 {
                // SAFETY: register operations only.
                unsafe {
                    next[2 * i] = vzip1q_u8(rows[i], rows[i + 8]);
                    next[2 * i + 1] = vzip2q_u8(rows[i], rows[i + 8]);
                }
            }
            rows = next;
        }
        rows
    }

    #[inline(always)]
    unsafe fn prefetch(address: *const u8) {
        // SAFETY: a prefetch never faults. The intrinsic for it is not stable.
        unsafe {
            asm!("prfm pldl1keep, [{0}]", in(reg) address.addr(),
                options(nomem, nostack, preserves_flags));
        }
    }
}
