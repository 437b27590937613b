//! Dot products of later Arm cores: four bytes a lane (Armv8.2, `dotprod`) and two bfloat16 a lane
//! (Armv8.6, `bf16`).
//!
//! A register of weights holds a lane for each of four rows; x is the same for all of them, so it
//! is one lane in a scalar's place, which takes no broadcast. The intrinsics are not stable.
//!
//! The caller is compiled for the instructions: the assembler asks for that too.
#![allow(unsafe_code)]

use std::arch::{aarch64::*, asm};

/// Whether this machine has [`sdot`].
pub(crate) fn has_dotprod() -> bool {
    std::arch::is_aarch64_feature_detected!("dotprod")
}

/// Whether this machine has [`bfdot`].
#[cfg_attr(not(test), expect(dead_code, reason = "no packed kernels of bfloat16 yet"))]
pub(crate) fn has_bf16() -> bool {
    std::arch::is_aarch64_feature_detected!("bf16")
}

/// Lane i: acc[i] + sum of w[4i + j] * x[j], j below 4, signed bytes, modulo 2^32.
///
/// # Safety
/// Only on a machine with `dotprod`, inside a function compiled for it.
#[inline(always)]
pub(crate) unsafe fn sdot(acc: int32x4_t, w: int8x16_t, x: [i8; 4]) -> int32x4_t {
    let mut sum = acc;
    // SAFETY: register operation; the caller vouches for the instruction.
    unsafe {
        asm!("sdot {0:v}.4s, {1:v}.16b, {2:v}.4b[0]", inout(vreg) sum, in(vreg) w,
            in(vreg) u32::from_le_bytes(x.map(i8::cast_unsigned)),
            options(pure, nomem, nostack, preserves_flags));
    }
    sum
}

/// Lane i: acc[i] + (w[2i] * x[0] + w[2i + 1] * x[1]), bfloat16 bits.
///
/// Whatever the rounding mode, both additions round to odd (an inexact result is cut off and its
/// last bit set: an error below one unit in the last place, against half a unit of an [`vfmaq_f32`])
/// and subnormal numbers, read or written, are zeros. Products are exact.
///
/// # Safety
/// Only on a machine with `bf16`, inside a function compiled for it.
#[cfg_attr(not(test), expect(dead_code, reason = "no packed kernels of bfloat16 yet"))]
#[inline(always)]
pub(crate) unsafe fn bfdot(acc: float32x4_t, w: uint16x8_t, x: [u16; 2]) -> float32x4_t {
    let mut sum = acc;
    // SAFETY: register operation; the caller vouches for the instruction.
    unsafe {
        asm!("bfdot {0:v}.4s, {1:v}.8h, {2:v}.2h[0]", inout(vreg) sum, in(vreg) w,
            in(vreg) u32::from(x[0]) | u32::from(x[1]) << 16,
            options(pure, nomem, nostack, preserves_flags));
    }
    sum
}

#[cfg(test)]
#[allow(clippy::print_stdout)] // what was skipped, and why
mod tests {
    use super::*;

    /// Prints whether the machine has what a test needs; `MX_REQUIRE` turns a lack into a failure.
    fn has(name: &str, detected: bool) -> bool {
        let required = std::env::var("MX_REQUIRE").unwrap_or_default();
        if detected {
            println!("instructions {name}: tested");
        } else {
            println!("instructions {name}: skipped, this machine lacks them");
            assert!(!required.split(',').any(|r| r == name), "MX_REQUIRE names {name}");
        }
        detected
    }

    /// xorshift64.
    fn random(state: &mut u64) -> u64 {
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        *state
    }

    #[target_feature(enable = "dotprod")]
    fn sdot_lanes(acc: [i32; 4], w: [i8; 16], x: [i8; 4]) -> [i32; 4] {
        let mut out = [0; 4];
        // SAFETY: the arrays are as long as the registers; this function has the instruction.
        unsafe {
            let sum = sdot(vld1q_s32(acc.as_ptr()), vld1q_s8(w.as_ptr()), x);
            vst1q_s32(out.as_mut_ptr(), sum);
        }
        out
    }

    #[test]
    fn sdot_is_the_sum_of_products() {
        if !has("dotprod", has_dotprod()) {
            return;
        }
        let mut state = 1;
        for round in 0..20_000 {
            // Extremes often enough that they meet.
            let mut byte = || {
                let bits = random(&mut state);
                if bits >> 62 == 0 { [-128, 127, -1, 0][bits as usize % 4] } else { bits as i8 }
            };
            let (w, x) = (std::array::from_fn(|_| byte()), std::array::from_fn(|_| byte()));
            let acc = std::array::from_fn(|_| random(&mut state) as i32 >> (round % 32));
            let want: [i32; 4] = std::array::from_fn(|i| {
                let product = |j: usize| i32::from(w[4 * i + j]) * i32::from(x[j]);
                (0..4).map(product).fold(acc[i], i32::wrapping_add)
            });
            // SAFETY: the machine has the instruction.
            assert_eq!(unsafe { sdot_lanes(acc, w, x) }, want, "{acc:?} {w:?} {x:?}");
        }
    }

    #[target_feature(enable = "bf16")]
    fn bfdot_lanes(acc: [f32; 4], w: [u16; 8], x: [u16; 2]) -> [f32; 4] {
        let mut out = [0.0; 4];
        // SAFETY: the arrays are as long as the registers; this function has the instruction.
        unsafe {
            let sum = bfdot(vld1q_f32(acc.as_ptr()), vld1q_u16(w.as_ptr()), x);
            vst1q_f32(out.as_mut_ptr(), sum);
        }
        out
    }

    /// a + b as an f32, rounded to odd; a and b are such that it is a normal f32 or zero.
    fn add_to_odd(a: f64, b: f64) -> f32 {
        let sum = a + b;
        // What the f64 lost (two-sum).
        let part = sum - a;
        let lost = (a - (sum - part)) + (b - part);
        let mut bits = sum.to_bits();
        if lost != 0.0 && (lost < 0.0) != (sum < 0.0) {
            // Cut off instead of rounded up.
            bits -= 1;
        }
        // An f32 is the upper bits of such an f64, with a smaller bias.
        let dropped = bits & ((1 << 29) - 1) != 0 || lost != 0.0;
        let cut = f64::from_bits(bits & !((1 << 29) - 1)) as f32;
        f32::from_bits(cut.to_bits() | u32::from(dropped))
    }

    fn widen(bits: u16) -> f64 {
        f64::from(f32::from_bits(u32::from(bits) << 16))
    }

    /// Exponents of at most `spread` values around that of 1.
    fn bf16_bits(state: &mut u64, spread: u64) -> u16 {
        let bits = random(state);
        let exponent = (127 - spread / 2 + (bits >> 32) % spread) as u16;
        (bits & 0x807f) as u16 | exponent << 7
    }

    #[test]
    fn bfdot_rounds_to_odd() {
        if !has("bf16", has_bf16()) {
            return;
        }
        let mut state = 2;
        let mut inexact = 0;
        for round in 0..40_000 {
            // Near each other or far apart; products and sums stay far from the ends.
            let spread = round % 30 + 1;
            let w: [u16; 8] = std::array::from_fn(|_| bf16_bits(&mut state, spread));
            let x: [u16; 2] = std::array::from_fn(|_| bf16_bits(&mut state, spread));
            let acc: [f32; 4] = std::array::from_fn(|_| {
                let fraction = random(&mut state) as u32 & 0xffff;
                f32::from_bits(u32::from(bf16_bits(&mut state, spread)) << 16 | fraction)
            });
            let want: [f32; 4] = std::array::from_fn(|i| {
                let product = |j: usize| widen(w[2 * i + j]) * widen(x[j]);
                let pair = add_to_odd(product(0), product(1));
                let sum = add_to_odd(f64::from(acc[i]), f64::from(pair));
                inexact += usize::from(f64::from(sum) != f64::from(acc[i]) + f64::from(pair));
                sum
            });
            // SAFETY: the machine has the instruction.
            assert_eq!(unsafe { bfdot_lanes(acc, w, x) }, want, "{acc:?} {w:x?} {x:x?}");
        }
        assert!(inexact > 10_000, "{inexact} sums were rounded");
    }

    #[test]
    fn bfdot_flushes_subnormals_and_keeps_special_values() {
        if !has("bf16", has_bf16()) {
            return;
        }
        let (one, minus_one, tiny, infinity, nan) = (0x3f80, 0xbf80, 0x0040, 0x7f80, 0x7fc0);
        let lane = |acc: f32, w: [u16; 2], x: [u16; 2]| -> f32 {
            let w = std::array::from_fn(|i| w[i % 2]);
            // SAFETY: the machine has the instruction.
            let lanes = unsafe { bfdot_lanes([acc; 4], w, x) };
            lanes[0]
        };
        assert_eq!(lane(0.0, [tiny, 0], [one, one]), 0.0);
        assert_eq!(lane(f32::from_bits(1), [0, 0], [one, one]), 0.0);
        assert_eq!(lane(1.0, [infinity, one], [one, one]), f32::INFINITY);
        assert!(lane(1.0, [infinity, infinity], [one, minus_one]).is_nan());
        assert!(lane(1.0, [nan, 0], [one, one]).is_nan());
        assert!(lane(f32::NAN, [0, 0], [one, one]).is_nan());
    }
}
