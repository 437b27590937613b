//! Rows to their quantised values or codes: plain code that the compiler vectorises once for each
//! variant's instructions.
//!
//! With the block's exponent e inside a window, v / 2^e is exact in f32 wherever it can reach a
//! non-zero element, and adding C = 2^(exponent + 23 - mantissa bits) rounds it half to even to the
//! element's mantissa; the low bits of the sum are the mantissa as an integer. Outside the window
//! the reference does the block.

use super::simd::Codec;
use crate::{
    formats::ElementFormat,
    quantize::Rounding,
    reference,
    scale::{self, SCALE_NAN, ScaleKind, ScaleRule},
    tensor::QuantSpec,
};

/// What the inner loops need of a format.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Constants {
    format: ElementFormat,
    /// Mantissa bits.
    pub m: u32,
    /// Bits of 2^emin as an f32.
    pub emin_bits: u32,
    largest: f32,
}

impl Constants {
    pub(crate) const fn new(format: ElementFormat) -> Self {
        let row = format.row();
        let emin_bits = ((row.emin() + 127) as u32) << 23;
        Self { format, m: row.mantissa_bits, emin_bits, largest: row.largest }
    }
}

/// A specification with the constants of the inner loops.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RowQuant {
    pub spec: QuantSpec,
    constants: Constants,
    /// Exponents for which the fast path is exact and every value a normal f32.
    window: (i32, i32),
    /// Largest magnitudes with mantissa bits above these get one more power of two.
    up_above: u32,
}

impl RowQuant {
    pub(crate) fn new(spec: QuantSpec) -> Self {
        let row = spec.format.row();
        let (low, high) = super::panel::exponent_window(spec.format);
        Self {
            spec,
            constants: Constants::new(spec.format),
            // From -100 on, whatever is a subnormal f32 rounds to zero, flushed or not; up to 126,
            // 2^-e is a normal f32.
            window: (low.max(-100), high.min(126)),
            // As in `scale::shared_exponent`.
            up_above: match spec.scale_rule {
                ScaleRule::Floor => MANTISSA,
                ScaleRule::Ceil => 0,
                ScaleRule::Even => MANTISSA - (1 << (22 - row.mantissa_bits)),
                ScaleRule::Rceil => row.largest.to_bits() & MANTISSA,
            },
        }
    }
}

/// Mantissa bits of an f32.
const MANTISSA: u32 = 0x007f_ffff;

/// 2^e for exponents of normal f32.
#[inline(always)]
fn exp2(e: i32) -> f32 {
    f32::from_bits(((e + 127) as u32) << 23)
}

/// |v| * inv rounded: the mantissa as an integer and the exponent bits that it belongs to.
#[inline(always)]
fn round<const R: u8>(q: &Constants, v: f32, inv: f32) -> (u32, u32) {
    let scaled = f32::from_bits(v.to_bits() & 0x7fff_ffff) * inv;
    let scaled = if scaled < q.largest { scaled } else { q.largest };
    let exponent = (scaled.to_bits() & 0x7f80_0000).max(q.emin_bits);
    let c = f32::from_bits(exponent + ((23 - q.m) << 23));
    let sum = scaled + c;
    let mut units = sum.to_bits() - c.to_bits();
    if R == Rounding::Floor as u8 {
        units -= u32::from(sum - c > scaled);
    } else if R == Rounding::Nearest as u8 {
        // The ties that half to even sent down.
        let half = f32::from_bits(exponent - ((q.m + 1) << 23));
        units += u32::from(scaled - (sum - c) == half);
    }
    (units, exponent)
}

/// Largest magnitude as bits: 0x7f80_0000 and above mean infinity and NaN.
#[inline(always)]
pub(super) fn amax_bits(x: &[f32]) -> u32 {
    x.iter().fold(0, |max, v| max.max(v.to_bits() & 0x7fff_ffff))
}

pub(super) const INFINITY: u32 = 0x7f80_0000;

#[inline(always)]
fn values<const R: u8>(q: &Constants, x: &[f32], e: i32, out: &mut [f32]) {
    let (inv, back) = (exp2(-e), exp2(e));
    for (o, &v) in out.iter_mut().zip(x) {
        let (units, exponent) = round::<R>(q, v, inv);
        let quantum = f32::from_bits(exponent - (q.m << 23));
        let magnitude = units as i32 as f32 * quantum * back;
        *o = f32::from_bits(magnitude.to_bits() | v.to_bits() & 0x8000_0000);
    }
}

/// v * inv rounded to an element, inside the window.
#[inline(always)]
pub(super) fn element<const R: u8>(q: &RowQuant, v: f32, inv: f32) -> f32 {
    let (units, exponent) = round::<R>(&q.constants, v, inv);
    let quantum = f32::from_bits(exponent - (q.constants.m << 23));
    let magnitude = units as i32 as f32 * quantum;
    f32::from_bits(magnitude.to_bits() | v.to_bits() & 0x8000_0000)
}

/// The code of v * inv, inside the window.
#[inline(always)]
pub(super) fn code<const R: u8>(q: &Constants, v: f32, inv: f32) -> u8 {
    let (units, exponent) = round::<R>(q, v, inv);
    let code = (((exponent - q.emin_bits) >> 23) << q.m) + units;
    let negative = v.to_bits() & 0x8000_0000;
    let signed = code | negative >> (32 - q.format.bits());
    let complement = if negative != 0 { code.wrapping_neg() } else { code };
    let integer = q.format == ElementFormat::MxInt8;
    (if integer { complement } else { signed }) as u8
}

#[inline(always)]
fn codes<C: Codec, const R: u8>(x: &[f32], e: i32, out: &mut [u8]) {
    let inv = exp2(-e);
    for (o, &v) in out.iter_mut().zip(x) {
        *o = code::<R>(&C::CONSTANTS, v, inv);
    }
}

/// What a block whose largest magnitude has these bits is multiplied by, and its scale byte; `None`
/// where the block is not one for [`element`].
#[inline(always)]
pub(super) fn inverse(q: &RowQuant, amax: u32) -> Option<(f32, u8)> {
    if amax == 0 {
        // Zeros keep their signs whatever they are multiplied by.
        return Some((1.0, 0));
    }
    if amax >= INFINITY {
        return None;
    }
    let e = scale::shared_exponent(q.spec.scale_rule, q.spec.format, f32::from_bits(amax));
    (q.window.0..=q.window.1).contains(&e).then(|| (exp2(-e), (e + 127) as u8))
}

/// What each of sixteen blocks is multiplied by, from the bits of its largest magnitude, and its
/// scale byte. A bit is set for each block that is not one for [`code`].
#[inline(always)]
pub(super) fn inverses(q: &RowQuant, amax: &[u32; 16], scales: &mut [u8; 16]) -> ([f32; 16], u32) {
    let emax = q.spec.format.emax();
    let (low, high) = (q.window.0 + 127, q.window.1 + 127);
    let (mut inverses, mut odd) = ([0.0; 16], [0_u32; 16]);
    for c in 0..16 {
        let up = (amax[c] & MANTISSA) > q.up_above;
        // Infinity and NaN come out above the window, subnormals below it.
        let byte = (amax[c] >> 23) as i32 + i32::from(up) - emax;
        let zero = amax[c] == 0;
        // Zeros keep their signs whatever they are multiplied by.
        let byte = if zero { 127 } else { byte };
        let inside = (byte >= low) & (byte <= high);
        inverses[c] = f32::from_bits(if inside { (254 - byte as u32) << 23 } else { 0 });
        odd[c] = u32::from(!inside) << c;
        scales[c] = if zero { 0 } else { byte as u8 };
    }
    (inverses, odd.iter().fold(0, |all, bit| all | bit))
}

macro_rules! by_rounding {
    ($q:expr, $function:ident<$($type:ty),*>($($argument:expr),+ $(,)?)) => {
        match $q.spec.rounding {
            Rounding::Even => $function::<$($type,)* { Rounding::Even as u8 }>($($argument),+),
            Rounding::Nearest => $function::<$($type,)* { Rounding::Nearest as u8 }>($($argument),+),
            Rounding::Floor => $function::<$($type,)* { Rounding::Floor as u8 }>($($argument),+),
        }
    };
}

/// With `C` as the codec of the specification's format, so that its constants are known to the
/// compiler. Not for bf16, which has no block scales.
macro_rules! by_format {
    ($q:expr, $c:ident => $run:expr) => {
        by_format!($q, $c => $run, Fp8E4M3 Fp8E5M2 Fp6E3M2 Fp6E2M3 Fp4E2M1 MxInt8)
    };
    ($q:expr, $c:ident => $run:expr, $($format:ident)+) => {
        match $q.spec.format {
            $($crate::formats::ElementFormat::$format => {
                type $c = $crate::cpu::simd::$format;
                $run
            })+
            $crate::formats::ElementFormat::Bf16 => debug_assert!(false, "bf16 has no scale"),
        }
    };
}

pub(super) use {by_format, by_rounding};

/// The quantised values of a row, without the factor of a `tensor` scale (`divisor`, else 1).
/// Returns whether a block lies outside the window: its values are then not written.
#[inline(always)]
pub(crate) fn fake_row(q: &RowQuant, x: &[f32], divisor: f32, out: &mut [f32]) -> bool {
    match q.spec.scale {
        ScaleKind::E8M0 => {}
        _ if q.spec.format == ElementFormat::Bf16 => {
            bf16_row(q.spec.rounding, x, out);
            return false;
        }
        _ => {
            for (x, out) in x.chunks(q.spec.block_size).zip(out.chunks_mut(q.spec.block_size)) {
                unscaled_block(q, x, divisor, out);
            }
            return false;
        }
    }
    let mut bad = false;
    for (x, out) in x.chunks(q.spec.block_size).zip(out.chunks_mut(q.spec.block_size)) {
        let amax = amax_bits(x);
        if amax >= INFINITY {
            out.fill(f32::NAN);
        } else if amax == 0 {
            out.copy_from_slice(x);
        } else {
            let amax = f32::from_bits(amax);
            let e = scale::shared_exponent(q.spec.scale_rule, q.spec.format, amax);
            if e < q.window.0 || e > q.window.1 {
                bad = true;
            } else {
                by_rounding!(q, values<>(&q.constants, x, e, out));
            }
        }
    }
    bad
}

#[inline(always)]
fn unscaled_block(q: &RowQuant, x: &[f32], divisor: f32, out: &mut [f32]) {
    for (o, &v) in out.iter_mut().zip(x) {
        *o = v / divisor;
    }
    if amax_bits(out) > INFINITY {
        for o in out {
            let code = reference::encode(q.spec.format, q.spec.rounding, f64::from(*o));
            *o = q.spec.format.decode(u32::from(code));
        }
    } else {
        let mut copy = [0.0_f32; 256];
        let copy = &mut copy[..out.len()];
        copy.copy_from_slice(out);
        by_rounding!(q, values<>(&q.constants, copy, 0, out));
    }
}

#[inline(always)]
fn bf16_row(rounding: Rounding, x: &[f32], out: &mut [f32]) {
    if rounding != Rounding::Even {
        for (o, &v) in out.iter_mut().zip(x) {
            let code = reference::encode(ElementFormat::Bf16, rounding, f64::from(v));
            *o = ElementFormat::Bf16.decode(u32::from(code));
        }
        return;
    }
    for (o, &v) in out.iter_mut().zip(x) {
        let bits = v.to_bits();
        let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) & 0xffff_0000;
        let nan = bits & 0x8000_0000 | 0x7fc0_0000;
        *o = f32::from_bits(if bits & 0x7fff_ffff > INFINITY { nan } else { rounded });
    }
}

/// The codes of a row, one a byte, and its scale bytes; e8m0 only. `out` holds whole blocks.
#[inline(always)]
pub(crate) fn code_row(q: &RowQuant, x: &[f32], out: &mut [u8], scales: &mut [u8]) {
    by_format!(q, C => code_row_of::<C>(q, x, out, scales));
}

#[inline(always)]
fn code_row_of<C: Codec>(q: &RowQuant, x: &[f32], out: &mut [u8], scales: &mut [u8]) {
    let blocks = out.chunks_exact_mut(q.spec.block_size).zip(scales);
    for (x, (out, scale)) in x.chunks(q.spec.block_size).zip(blocks) {
        out[x.len()..].fill(0);
        let amax = amax_bits(x);
        if amax >= INFINITY {
            out.fill(0);
            *scale = SCALE_NAN;
            continue;
        }
        let e = match amax {
            0 => -127,
            bits => {
                let amax = f32::from_bits(bits);
                scale::shared_exponent(q.spec.scale_rule, q.spec.format, amax)
            }
        };
        *scale = (e + 127) as u8;
        if e < q.window.0 || e > q.window.1 {
            for (o, &v) in out.iter_mut().zip(x) {
                let exact = f64::from(v) * scale::exp2_f64(-e);
                *o = reference::encode(q.spec.format, q.spec.rounding, exact) as u8;
            }
        } else {
            by_rounding!(q, codes<C>(x, e, &mut out[..x.len()]));
        }
    }
}
