//! The variant for machines without a vector unit that this crate knows.
#![allow(unsafe_code)]

use std::sync::LazyLock;

use super::simd::{Codec, Simd, shift};
use crate::formats::ElementFormat;

/// Sixteen floats in an array; the compiler uses whatever the target has.
pub(crate) struct Scalar;

/// value * 2^-SHIFT of every code of every format of at most eight bits.
static TABLES: LazyLock<Vec<[f32; 256]>> = LazyLock::new(|| {
    let table = |format: ElementFormat| {
        let factor = f32::from_bits(((127 - shift(format)) as u32) << 23);
        std::array::from_fn(|code| format.decode(code as u32) * factor)
    };
    ElementFormat::ALL.iter().filter(|f| f.bits() <= 8).map(|&f| table(f)).collect()
});

impl Simd for Scalar {
    type V = [f32; 16];
    type Codes = [u8; 16];

    #[inline(always)]
    unsafe fn splat(value: f32) -> [f32; 16] {
        [value; 16]
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> [f32; 16] {
        // SAFETY: the caller vouches for sixteen floats.
        unsafe { from.cast::<[f32; 16]>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, v: [f32; 16]) {
        // SAFETY: the caller vouches for sixteen floats.
        unsafe { to.cast::<[f32; 16]>().write_unaligned(v) }
    }

    #[inline(always)]
    unsafe fn add(a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        std::array::from_fn(|i| a[i] + b[i])
    }

    #[inline(always)]
    unsafe fn mul(a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        std::array::from_fn(|i| a[i] * b[i])
    }

    #[inline(always)]
    unsafe fn fma(a: [f32; 16], b: [f32; 16], c: [f32; 16]) -> [f32; 16] {
        // Without the instruction a fused multiply-add is a slow library call.
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }

    #[inline(always)]
    unsafe fn sum(v: [f32; 16]) -> f32 {
        let mut v = v;
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                v[i] += v[i + half];
            }
        }
        v[0]
    }

    #[inline(always)]
    unsafe fn unpack<C: Codec>(from: *const u8) -> [u8; 16] {
        let mut bytes = [0_u8; 16];
        // SAFETY: the caller vouches for UNIT bytes, at most 16 of them.
        unsafe { std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), C::UNIT) };
        match C::BITS {
            4 => std::array::from_fn(|i| bytes[i / 2] >> (4 * (i % 2)) & 0xf),
            6 => std::array::from_fn(|i| {
                let at = i / 4 * 3;
                let word = u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], 0]);
                (word >> (6 * (i % 4)) & 0x3f) as u8
            }),
            _ => bytes,
        }
    }

    #[inline(always)]
    unsafe fn keep(codes: [u8; 16], keep: usize) -> [u8; 16] {
        std::array::from_fn(|i| if i < keep { codes[i] } else { 0 })
    }

    #[inline(always)]
    unsafe fn decode<C: Codec>(codes: [u8; 16]) -> [f32; 16] {
        let table = &TABLES[C::FORMAT as usize];
        codes.map(|code| table[usize::from(code)])
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u8) -> [f32; 16] {
        // SAFETY: the caller vouches for 32 bytes.
        let bytes = unsafe { from.cast::<[[u8; 2]; 16]>().read_unaligned() };
        bytes.map(|b| f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16))
    }

    #[inline(always)]
    unsafe fn transpose(rows: [[u8; 16]; 16]) -> [[u8; 16]; 16] {
        std::array::from_fn(|i| std::array::from_fn(|j| rows[j][i]))
    }

    #[inline(always)]
    unsafe fn prefetch(_address: *const u8) {}
}
