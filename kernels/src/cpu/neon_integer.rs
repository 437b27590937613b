//! Integer dot products of repacked weights on 64-bit Arm, by Armv8.2's `sdot`.
//!
//! Both operands are signed, so a weight carries no offset and sums start at zero.
#![allow(unsafe_code)]

use std::arch::aarch64::*;

use super::{
    neon::Neon,
    neon_dot::sdot,
    packed::{
        integer::{
            self, ALL, Codes, Dot, DotArgs, E2M1, E2M3, Int8, IntFormat, Integers, Unpacked,
        },
        kernels::IntegerKernels,
        tables::Tables,
    },
};

/// Needs dotprod.
pub(crate) struct NeonDot;

/// A register of the layout, 64 bytes: of each of sixteen rows four bytes, or one sum.
type Bytes = [uint8x16_t; 4];
type Words = [int32x4_t; 4];

#[inline(always)]
unsafe fn load(from: *const u8) -> Bytes {
    // SAFETY: the caller vouches for 64 bytes.
    std::array::from_fn(|i| unsafe { vld1q_u8(from.add(16 * i)) })
}

/// Codes of four bits, in the low half of each byte, looked up.
#[inline(always)]
unsafe fn four(tables: *const Tables, codes: Bytes) -> Bytes {
    // SAFETY: the tables are there.
    let table = unsafe { vld1q_u8((*tables).signed.as_ptr()) };
    // SAFETY: register operation only.
    codes.map(|codes| unsafe { vqtbl1q_u8(table, codes) })
}

/// Codes of six bits: the low four of `low`, above them bits 4 and 5 of `high`.
#[inline(always)]
unsafe fn six(codes_of: *const [u8; 64], low: Bytes, high: Bytes) -> Bytes {
    // SAFETY: register operations, and a table has 64 bytes.
    unsafe {
        let [a, b, c, d] = load(codes_of.cast());
        let table = uint8x16x4_t(a, b, c, d);
        std::array::from_fn(|i| {
            let high = vandq_u8(high[i], vdupq_n_u8(0x30));
            vqtbl4q_u8(table, vorrq_u8(low[i], high))
        })
    }
}

#[inline(always)]
unsafe fn low_nibbles(v: Bytes) -> Bytes {
    // SAFETY: register operations only.
    v.map(|v| unsafe { vandq_u8(v, vdupq_n_u8(0xf)) })
}

#[inline(always)]
unsafe fn right<const N: i32>(v: Bytes) -> Bytes {
    // SAFETY: register operations only.
    v.map(|v| unsafe { vshrq_n_u8::<N>(v) })
}

#[inline(always)]
unsafe fn left<const N: i32>(v: Bytes) -> Bytes {
    // SAFETY: register operations only.
    v.map(|v| unsafe { vshlq_n_u8::<N>(v) })
}

impl Integers for NeonDot {
    type F = Neon;
    type W = Bytes;
    type Acc = Words;
    type Scales = Words;

    #[inline(always)]
    unsafe fn load(from: *const u8) -> Bytes {
        // SAFETY: the caller's promise is passed on.
        unsafe { load(from) }
    }

    #[inline(always)]
    unsafe fn store(to: *mut u8, w: Bytes) {
        for (i, w) in w.into_iter().enumerate() {
            // SAFETY: the caller vouches for 64 bytes.
            unsafe { vst1q_u8(to.add(16 * i), w) };
        }
    }

    #[inline(always)]
    unsafe fn decode<C: IntFormat, const REST: bool>(
        tables: *const Tables,
        block: *const u8,
        c: usize,
    ) -> [Bytes; 2] {
        // SAFETY: the caller vouches for the block, whose registers are as `layout` says.
        unsafe {
            match C::FORMAT.bits() {
                4 => {
                    let codes = load(block.add(64 * c));
                    [four(tables, low_nibbles(codes)), four(tables, right::<4>(codes))]
                }
                6 => {
                    let table =
                        if REST { &raw const (*tables).rest } else { &raw const (*tables).signed };
                    let codes = load(block.add(64 * c));
                    let high = load(block.add(256 + 64 * (c / 2)));
                    let (even, odd) = (low_nibbles(codes), right::<4>(codes));
                    // The two high bits move to bits 4 and 5.
                    if c.is_multiple_of(2) {
                        [six(table, even, left::<4>(high)), six(table, odd, left::<2>(high))]
                    } else {
                        [six(table, even, high), six(table, odd, right::<2>(high))]
                    }
                }
                _ => [load(block.add(128 * c)), load(block.add(128 * c + 64))],
            }
        }
    }

    #[inline(always)]
    unsafe fn start(_: *const i32) -> Words {
        // SAFETY: the caller's promise is passed on.
        unsafe { Self::zero() }
    }

    #[inline(always)]
    unsafe fn zero() -> Words {
        // SAFETY: register operation only.
        unsafe { [vdupq_n_s32(0); 4] }
    }

    #[inline(always)]
    unsafe fn join<const ROOM: usize>(a: Words, b: Words) -> Words {
        // SAFETY: register operations only.
        std::array::from_fn(|i| unsafe { vaddq_s32(a[i], b[i]) })
    }

    #[inline(always)]
    unsafe fn join_planes(a: Words, b: Words) -> Words {
        // SAFETY: register operations only.
        std::array::from_fn(|i| unsafe { vaddq_s32(vshlq_n_s32::<4>(a[i]), b[i]) })
    }

    #[inline(always)]
    unsafe fn dot<const ROOM: usize>(acc: Words, w: Bytes, x: *const u8) -> Words {
        let mut acc = acc;
        // SAFETY: the caller vouches for four bytes, and for the instruction.
        unsafe {
            let x = x.cast::<[i8; 4]>().read();
            for (acc, w) in acc.iter_mut().zip(w) {
                *acc = sdot(*acc, vreinterpretq_s8_u8(w), x);
            }
        }
        acc
    }

    #[inline(always)]
    unsafe fn scales(from: *const u8) -> Words {
        // SAFETY: the caller vouches for sixteen bytes.
        unsafe {
            let bytes = vld1q_u8(from);
            // By 7 and by 16, the most that a widening shifts.
            let (low, high) = (vshll_n_u8::<7>(vget_low_u8(bytes)), vshll_high_n_u8::<7>(bytes));
            [
                vreinterpretq_s32_u32(vshll_n_u16::<16>(vget_low_u16(low))),
                vreinterpretq_s32_u32(vshll_high_n_u16::<16>(low)),
                vreinterpretq_s32_u32(vshll_n_u16::<16>(vget_low_u16(high))),
                vreinterpretq_s32_u32(vshll_high_n_u16::<16>(high)),
            ]
        }
    }

    #[inline(always)]
    unsafe fn scale_add<const ROOM: usize>(
        sums: [float32x4_t; 4],
        acc: Words,
        scales: Words,
        x_scale: *const i32,
        _: *const i32,
    ) -> [float32x4_t; 4] {
        // SAFETY: the caller vouches for one i32.
        let x_scale = unsafe { vdupq_n_s32(*x_scale) };
        // SAFETY: register operations only.
        std::array::from_fn(|i| unsafe {
            let scale = vreinterpretq_f32_s32(vaddq_s32(scales[i], x_scale));
            vfmaq_f32(sums[i], vcvtq_f32_s32(acc[i]), scale)
        })
    }
}

#[target_feature(enable = "dotprod")]
unsafe fn dot<W: integer::Source<NeonDot>, const MR: usize>(args: &DotArgs) {
    // SAFETY: the caller's promise is passed on.
    unsafe { integer::dot::<NeonDot, W, MR, 1, ALL>(args) }
}

#[target_feature(enable = "dotprod")]
unsafe fn unpack<C: IntFormat>(
    tables: *const Tables,
    codes: *const u8,
    blocks: usize,
    out: *mut u8,
) {
    // SAFETY: the caller's promise is passed on.
    unsafe { integer::unpack::<NeonDot, C>(tables, codes, blocks, out) }
}

/// Sums have 32 bits, so how many fit sixteen makes no difference.
const fn dots<W: integer::Source<NeonDot>>() -> [&'static [Dot]; 3] {
    [&[dot::<W, 1>, dot::<W, 2>, dot::<W, 3>, dot::<W, 4>]; 3]
}

/// Only for machines with dotprod.
pub(crate) static KERNELS: IntegerKernels = IntegerKernels {
    wide: false,
    // Kernels of e3m2 would serve single rows alone, for a copy of the weight.
    codes: [dots::<Codes<E2M1>>(), dots::<Codes<E2M3>>(), dots::<Codes<Int8>>(), [&[]; 3]],
    together: [&[]; 4],
    panels: dots::<Unpacked>(),
    unpack: [unpack::<E2M1>, unpack::<E2M3>, unpack::<Int8>],
};
