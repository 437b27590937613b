//! From a block's largest magnitude to its shared exponent (OCP MX v1.0, section 6.3).

use std::str::FromStr;

use crate::{error::Error, formats::ElementFormat};

/// Scale byte of a block that holds NaN or infinity; E8M0's NaN (OCP MX v1.0, section 5.4.1).
pub const SCALE_NAN: u8 = 0xff;

/// Smallest and largest shared exponent of E8M0.
pub const EXPONENT_RANGE: std::ops::RangeInclusive<i32> = -127..=127;

/// What accompanies the codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ScaleKind {
    /// One power of two a block, as a biased exponent byte.
    E8M0,
    /// Nothing: a saturating cast, element by element.
    None,
    /// One float32 a tensor: largest magnitude / largest of the format.
    Tensor,
}

/// How a block's largest magnitude `a` becomes its exponent `e`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ScaleRule {
    /// floor(log2 a) - emax: the rule of the OCP specification.
    Floor,
    /// ceil(log2 a) - emax.
    Ceil,
    /// `a` rounded half to even to the element's mantissa bits, then as `Floor`.
    Even,
    /// ceil(log2(a / largest)): the smallest scale that saturates nothing.
    Rceil,
}

macro_rules! names {
    ($type:ty, $what:literal, $expected:literal, $($variant:ident = $name:literal),+) => {
        impl $type {
            /// Name in models, recipes and on the command line.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name),+ }
            }

            /// Every value, in the order of the declaration.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];
        }

        impl FromStr for $type {
            type Err = Error;

            fn from_str(name: &str) -> Result<Self, Error> {
                match name {
                    $($name => Ok(Self::$variant),)+
                    _ => Err(Error::UnknownName { what: $what, name: name.to_owned(), expected: $expected }),
                }
            }
        }

        impl std::fmt::Display for $type {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.name())
            }
        }
    };
}
pub(crate) use names;

names!(ScaleKind, "scale", "e8m0 none tensor", E8M0 = "e8m0", None = "none", Tensor = "tensor");
names!(
    ScaleRule,
    "scale rule",
    "floor ceil even rceil",
    Floor = "floor",
    Ceil = "ceil",
    Even = "even",
    Rceil = "rceil"
);

/// floor(log2 |a|) and the 24-bit significand (leading one at bit 23) of a finite, non-zero float.
#[inline(always)]
fn split(a: f32) -> (i32, u32) {
    let bits = a.to_bits() & 0x7fff_ffff;
    let exponent = (bits >> 23) as i32;
    let mantissa = bits & 0x007f_ffff;
    if exponent == 0 {
        let shift = mantissa.leading_zeros() - 8;
        (-126 - shift as i32, mantissa << shift)
    } else {
        (exponent - 127, mantissa | 0x0080_0000)
    }
}

/// Shared exponent, in -127..=127, of a block whose largest magnitude is `amax` (finite, not zero).
#[inline(always)]
pub fn shared_exponent(rule: ScaleRule, format: ElementFormat, amax: f32) -> i32 {
    let (floor, significand) = split(amax);
    let up = match rule {
        ScaleRule::Floor => false,
        ScaleRule::Ceil => significand != 0x0080_0000,
        // Only the carry out of the rounding matters, and a tie just below the next power of two
        // has an odd neighbour below: half to even rounds it up.
        ScaleRule::Even => significand + (1 << (22 - format.row().mantissa_bits)) >= 0x0100_0000,
        ScaleRule::Rceil => significand > split(format.largest()).1,
    };
    (floor + i32::from(up) - format.emax()).clamp(-127, 127)
}

/// 2^e for a shared exponent or any sum of two, exact in f64.
#[inline(always)]
pub fn exp2_f64(e: i32) -> f64 {
    debug_assert!((-1022..=1023).contains(&e));
    f64::from_bits(((e + 1023) as u64) << 52)
}

/// Value of a scale byte: 2^(byte - 127), or NaN for 0xff.
#[inline(always)]
pub fn scale_value(byte: u8) -> f64 {
    if byte == SCALE_NAN { f64::NAN } else { exp2_f64(i32::from(byte) - 127) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for rule in ScaleRule::ALL {
            assert_eq!(rule.name().parse(), Ok(*rule));
        }
        for kind in ScaleKind::ALL {
            assert_eq!(kind.name().parse(), Ok(*kind));
        }
    }

    /// Rounds `a` half to even to `m` mantissa bits, the slow way.
    fn round_mantissa(a: f64, m: i32) -> f64 {
        let quantum = (a.log2().floor() - m as f64).exp2();
        (a / quantum).round_ties_even() * quantum
    }

    #[test]
    fn rules_match_their_definitions() {
        let mut mantissas = vec![1.0_f64, 1.0 + f64::EPSILON * 2f64.powi(29)];
        for i in 0..=1024 {
            mantissas.push(1.0 + f64::from(i) / 1024.0);
        }
        mantissas.push(2.0 - 2f64.powi(-23));
        for format in ElementFormat::ALL.into_iter().filter(|f| *f != ElementFormat::Bf16) {
            for exponent in [-100, -3, 0, 5, 100] {
                for mantissa in &mantissas {
                    // A float just below a power of two has no exact log2; step by comparison.
                    let a = mantissa * exp2_f64(exponent);
                    let a32 = a as f32;
                    assert_eq!(f64::from(a32), a);
                    let floor = |v: f64| (-200..200).rev().find(|&e| exp2_f64(e) <= v).unwrap();
                    let ceil = |v: f64| (-200..200).find(|&e| exp2_f64(e) >= v).unwrap();
                    let largest = f64::from(format.largest());
                    let smallest_fit = (-200..200).find(|&e| largest * exp2_f64(e) >= a).unwrap();
                    let m = format.row().mantissa_bits as i32;
                    let get = |rule| shared_exponent(rule, format, a32);
                    assert_eq!(get(ScaleRule::Floor), floor(a) - format.emax());
                    assert_eq!(get(ScaleRule::Ceil), ceil(a) - format.emax());
                    assert_eq!(get(ScaleRule::Rceil), smallest_fit);
                    let base = exp2_f64(floor(a));
                    let rounded = round_mantissa(a / base, m) * base;
                    assert_eq!(get(ScaleRule::Even), floor(rounded) - format.emax());
                }
            }
        }
    }

    #[test]
    fn subnormals_and_clamping() {
        let tiny = f32::from_bits(1);
        assert_eq!(split(tiny), (-149, 0x0080_0000));
        assert_eq!(split(f32::from_bits(3)), (-148, 0x00c0_0000));
        assert_eq!(shared_exponent(ScaleRule::Floor, ElementFormat::Fp8E4M3, tiny), -127);
        assert_eq!(shared_exponent(ScaleRule::Floor, ElementFormat::MxInt8, f32::MAX), 127);
        assert_eq!(shared_exponent(ScaleRule::Ceil, ElementFormat::MxInt8, f32::MAX), 127);
    }
}
