//! The element formats, as one table, and the exact meaning of every code.
//!
//! Sources: OCP Microscaling Formats (MX) Specification v1.0, section 5.3 (element formats), and
//! OCP 8-bit Floating Point Specification (OFP8) v1.0 for the Inf and NaN codes of the two fp8.

use std::str::FromStr;

use crate::error::Error;

/// How one element of a block is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ElementFormat {
    /// 1 sign, 4 exponent, 3 mantissa bits; largest 448; NaN but no infinity.
    Fp8E4M3,
    /// 1 sign, 5 exponent, 2 mantissa bits; largest 57344; IEEE-like infinity and NaN.
    Fp8E5M2,
    /// 1 sign, 3 exponent, 2 mantissa bits; largest 28.
    Fp6E3M2,
    /// 1 sign, 2 exponent, 3 mantissa bits; largest 7.5.
    Fp6E2M3,
    /// 1 sign, 2 exponent, 1 mantissa bit; largest 6.
    Fp4E2M1,
    /// Two's complement code / 64, codes -127..=127.
    MxInt8,
    /// bfloat16, only without a scale.
    Bf16,
}

/// What the code space holds besides finite numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Special {
    /// Every code is a finite number.
    None,
    /// The two codes with all bits but the sign set are NaN (E4M3).
    NanOnly,
    /// The top exponent holds infinity (mantissa 0) and NaN, as in IEEE 754.
    Ieee,
}

/// One row of the table of formats.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FormatRow {
    /// The format that the row describes.
    pub format: ElementFormat,
    /// Name in models, recipes and on the command line.
    pub name: &'static str,
    /// Bits of one packed code.
    pub bits: u32,
    /// Exponent bits; 0 for the integer format.
    pub exponent_bits: u32,
    /// Explicit mantissa bits; for MXINT8 the six fraction bits.
    pub mantissa_bits: u32,
    /// Exponent bias; for MXINT8 such that the smallest exponent is 0.
    pub bias: i32,
    /// Exponent of the largest power of two that the format holds.
    pub emax: i32,
    /// Largest finite magnitude.
    pub largest: f32,
    /// Codes that are not finite numbers.
    pub special: Special,
}

impl FormatRow {
    /// Exponent of the smallest normal number (and of every subnormal's quantum times 2^mantissa).
    pub const fn emin(&self) -> i32 {
        1 - self.bias
    }

    /// Code of `largest`, without the sign.
    pub const fn max_code(&self) -> u32 {
        match self.format {
            ElementFormat::MxInt8 => 127,
            ElementFormat::Bf16 => 0x7f7f,
            ElementFormat::Fp8E4M3 => 0x7e,
            ElementFormat::Fp8E5M2 => 0x7b,
            ElementFormat::Fp6E3M2 | ElementFormat::Fp6E2M3 => 0x1f,
            ElementFormat::Fp4E2M1 => 0x7,
        }
    }
}

#[rustfmt::skip]
const TABLE: [FormatRow; 7] = [
    FormatRow { format: ElementFormat::Fp8E4M3, name: "fp8_e4m3", bits: 8, exponent_bits: 4, mantissa_bits: 3, bias: 7, emax: 8, largest: 448.0, special: Special::NanOnly },
    FormatRow { format: ElementFormat::Fp8E5M2, name: "fp8_e5m2", bits: 8, exponent_bits: 5, mantissa_bits: 2, bias: 15, emax: 15, largest: 57344.0, special: Special::Ieee },
    FormatRow { format: ElementFormat::Fp6E3M2, name: "fp6_e3m2", bits: 6, exponent_bits: 3, mantissa_bits: 2, bias: 3, emax: 4, largest: 28.0, special: Special::None },
    FormatRow { format: ElementFormat::Fp6E2M3, name: "fp6_e2m3", bits: 6, exponent_bits: 2, mantissa_bits: 3, bias: 1, emax: 2, largest: 7.5, special: Special::None },
    FormatRow { format: ElementFormat::Fp4E2M1, name: "fp4_e2m1", bits: 4, exponent_bits: 2, mantissa_bits: 1, bias: 1, emax: 2, largest: 6.0, special: Special::None },
    FormatRow { format: ElementFormat::MxInt8, name: "mxint8", bits: 8, exponent_bits: 0, mantissa_bits: 6, bias: 1, emax: 0, largest: 127.0 / 64.0, special: Special::None },
    FormatRow { format: ElementFormat::Bf16, name: "bf16", bits: 16, exponent_bits: 8, mantissa_bits: 7, bias: 127, emax: 127, largest: 3.389_531_4e38, special: Special::Ieee },
];

impl ElementFormat {
    /// Every format, in the order of the table.
    pub const ALL: [Self; 7] = [
        Self::Fp8E4M3,
        Self::Fp8E5M2,
        Self::Fp6E3M2,
        Self::Fp6E2M3,
        Self::Fp4E2M1,
        Self::MxInt8,
        Self::Bf16,
    ];

    /// The format's row of the table.
    pub const fn row(self) -> &'static FormatRow {
        &TABLE[self as usize]
    }

    /// Name in models, recipes and on the command line, for example `fp8_e4m3`.
    pub const fn name(self) -> &'static str {
        self.row().name
    }

    /// Bits of one packed code: 4, 6, 8 or 16.
    pub const fn bits(self) -> u32 {
        self.row().bits
    }

    /// Exponent of the largest power of two that the format holds.
    pub const fn emax(self) -> i32 {
        self.row().emax
    }

    /// Largest finite magnitude.
    pub const fn largest(self) -> f32 {
        self.row().largest
    }

    /// Number of codes, 2^bits.
    pub const fn code_count(self) -> u32 {
        1 << self.bits()
    }

    /// The NaN code that an unscaled cast writes, without the sign; `None` where there is no NaN.
    pub const fn nan_code(self) -> Option<u32> {
        match self {
            Self::Fp8E4M3 | Self::Fp8E5M2 => Some(0x7f),
            Self::Bf16 => Some(0x7fc0),
            _ => None,
        }
    }

    /// The exact value of a code; bits of `code` above `bits()` are ignored.
    pub fn decode(self, code: u32) -> f32 {
        let row = self.row();
        let code = code & (self.code_count() - 1);
        match self {
            Self::MxInt8 => return f32::from(code as u8 as i8) / 64.0,
            Self::Bf16 => return f32::from_bits(code << 16),
            _ => {}
        }
        let magnitude = code & (self.code_count() / 2 - 1);
        let negative = code != magnitude;
        let m = row.mantissa_bits;
        let exponent = (magnitude >> m) as i32;
        let mantissa = magnitude & ((1 << m) - 1);
        let top = (1 << row.exponent_bits) - 1;
        let value = if row.special == Special::Ieee && exponent == top {
            if mantissa == 0 { f32::INFINITY } else { f32::NAN }
        } else if row.special == Special::NanOnly && magnitude == 0x7f {
            f32::NAN
        } else if exponent == 0 {
            mantissa as f32 * exp2(row.emin() - m as i32)
        } else {
            (mantissa | (1 << m)) as f32 * exp2(exponent - row.bias - m as i32)
        };
        if negative { -value } else { value }
    }
}

/// 2^e as an f32, for exponents of normal numbers.
const fn exp2(e: i32) -> f32 {
    f32::from_bits(((e + 127) as u32) << 23)
}

impl FromStr for ElementFormat {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        TABLE.iter().find(|row| row.name == name).map(|row| row.format).ok_or_else(|| {
            Error::UnknownName {
                what: "element format",
                name: name.to_owned(),
                expected: "fp8_e4m3 fp8_e5m2 fp6_e3m2 fp6_e2m3 fp4_e2m1 mxint8 bf16",
            }
        })
    }
}

impl std::fmt::Display for ElementFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_is_in_the_order_of_the_enum() {
        for (i, format) in ElementFormat::ALL.into_iter().enumerate() {
            assert_eq!(TABLE[i].format, format);
            assert_eq!(format.name().parse::<ElementFormat>(), Ok(format));
        }
        assert!("fp9".parse::<ElementFormat>().is_err());
    }

    #[test]
    fn largest_and_emax_follow_from_the_codes() {
        for format in ElementFormat::ALL {
            let finite = (0..format.code_count())
                .map(|code| format.decode(code))
                .filter(|v| v.is_finite() && *v > 0.0)
                .fold(0.0_f32, f32::max);
            assert_eq!(finite, format.largest(), "{format}");
            assert_eq!(finite, format.decode(format.row().max_code()), "{format}");
            assert_eq!((finite as f64).log2().floor() as i32, format.emax(), "{format}");
        }
    }

    #[test]
    fn nan_and_infinity_codes() {
        let count = |format: ElementFormat, f: fn(f32) -> bool| {
            (0..format.code_count()).filter(|&c| f(format.decode(c))).count()
        };
        assert_eq!(count(ElementFormat::Fp8E4M3, f32::is_nan), 2);
        assert_eq!(count(ElementFormat::Fp8E4M3, f32::is_infinite), 0);
        assert_eq!(count(ElementFormat::Fp8E5M2, f32::is_nan), 6);
        assert_eq!(count(ElementFormat::Fp8E5M2, f32::is_infinite), 2);
        for format in [ElementFormat::Fp6E3M2, ElementFormat::Fp6E2M3, ElementFormat::Fp4E2M1] {
            assert_eq!(count(format, f32::is_finite), format.code_count() as usize);
        }
        assert_eq!(ElementFormat::MxInt8.decode(0x80), -2.0);
        assert_eq!(ElementFormat::Fp4E2M1.decode(0xf), -6.0);
    }
}
