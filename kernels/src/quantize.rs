//! Quantisation of rows: blocks along k, one scale a block, tail blocks padded with zero codes.

use crate::{
    cpu,
    error::{Error, check_len},
    reference,
    scale::names,
    tensor::QuantSpec,
};
use std::str::FromStr;

/// How an exact quotient becomes an element.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Rounding {
    /// To nearest, ties to the even code: the default.
    Even,
    /// To nearest, ties away from zero.
    Nearest,
    /// Toward zero.
    Floor,
}

names!(
    Rounding,
    "rounding",
    "even nearest floor",
    Even = "even",
    Nearest = "nearest",
    Floor = "floor"
);

/// Checks the shapes that all three functions below share.
pub(crate) fn check_rows(spec: &QuantSpec, rows: usize, k: usize, x: usize) -> Result<(), Error> {
    spec.validate()?;
    if k == 0 {
        return Err(Error::ZeroDimension("k"));
    }
    check_len("x", x, rows.saturating_mul(k))
}

/// Quantises `x` [rows, k] into packed codes [rows, row_bytes] and scales
/// ([`QuantSpec::scales_len`] bytes). Every byte of both is written.
///
/// # Errors
/// An invalid specification or a buffer of another length.
pub fn quantize_rows(
    spec: &QuantSpec,
    x: &[f32],
    rows: usize,
    k: usize,
    codes: &mut [u8],
    scales: &mut [u8],
) -> Result<(), Error> {
    cpu::quantize_rows(cpu::kernels(), spec, x, rows, k, codes, scales)
}

/// Element type of a stored weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FloatType {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
}

impl FloatType {
    /// Bytes of one element.
    pub const fn width(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }
}

/// A weight as a model file holds it: little-endian, at any alignment.
#[derive(Debug, Clone, Copy)]
pub struct StoredWeight<'a> {
    /// The elements, n * k of them.
    pub bytes: &'a [u8],
    /// Their type.
    pub float_type: FloatType,
    /// Rows, each quantised by itself.
    pub n: usize,
    /// Elements of a row.
    pub k: usize,
    /// Stored [k, n] instead of [n, k].
    pub transposed: bool,
}

/// Quantises rows `first ..` of a weight, as many as `codes` and `scales` take, into the bytes that
/// [`quantize_rows`] makes of them. Weights stored [k, n] are read in strips of columns, of
/// which one block at a time is copied (100 KiB with blocks of 32). Block scales (e8m0) only.
///
/// # Errors
/// An invalid specification, another kind of scale, rows that are not there or a buffer of another
/// length.
pub fn quantize_weight(
    spec: &QuantSpec,
    weight: &StoredWeight<'_>,
    first: usize,
    codes: &mut [u8],
    scales: &mut [u8],
) -> Result<(), Error> {
    cpu::quantize_weight(cpu::kernels(), spec, weight, first, codes, scales)
}

/// The values [rows, k] of packed codes and scales, each rounded to f32 (exact unless it lies
/// outside the range of normal f32).
///
/// # Errors
/// An invalid specification or a buffer of another length.
pub fn dequantize_rows(
    spec: &QuantSpec,
    codes: &[u8],
    scales: &[u8],
    rows: usize,
    k: usize,
    out: &mut [f32],
) -> Result<(), Error> {
    reference::dequantize_rows(spec, codes, scales, rows, k, out)
}

/// Quantises and dequantises `x` [rows, k], per row along k.
///
/// # Errors
/// An invalid specification or a buffer of another length.
pub fn fake_quantize_rows(
    spec: &QuantSpec,
    x: &[f32],
    rows: usize,
    k: usize,
    out: &mut [f32],
) -> Result<(), Error> {
    cpu::fake_quantize_rows(cpu::kernels(), spec, x, rows, k, out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ElementFormat, ScaleKind, ScaleRule};

    /// Every finite code value of a format with its code, without the sign.
    fn magnitudes(format: ElementFormat) -> Vec<(f64, u32)> {
        let half = if format == ElementFormat::MxInt8 { 128 } else { format.code_count() / 2 };
        (0..half).map(|c| (f64::from(format.decode(c)), c)).filter(|(v, _)| v.is_finite()).collect()
    }

    /// The independent slow oracle: search over all code values.
    fn search(format: ElementFormat, rounding: Rounding, v: f64) -> f64 {
        let table = magnitudes(format);
        let a = v.abs();
        let below = table.iter().rev().find(|(t, _)| *t <= a).unwrap();
        let above = table.iter().find(|(t, _)| *t >= a);
        let chosen = match above {
            None => below.0,
            Some(above) if above.1 == below.1 => below.0,
            Some(above) => {
                let (down, up) = (a - below.0, above.0 - a);
                match rounding {
                    Rounding::Floor => below.0,
                    Rounding::Nearest => {
                        if up <= down {
                            above.0
                        } else {
                            below.0
                        }
                    }
                    Rounding::Even if up == down => {
                        if below.1 % 2 == 0 {
                            below.0
                        } else {
                            above.0
                        }
                    }
                    Rounding::Even => {
                        if up < down {
                            above.0
                        } else {
                            below.0
                        }
                    }
                }
            }
        };
        chosen.copysign(v)
    }

    const SMALL: [ElementFormat; 6] = [
        ElementFormat::Fp8E4M3,
        ElementFormat::Fp8E5M2,
        ElementFormat::Fp6E3M2,
        ElementFormat::Fp6E2M3,
        ElementFormat::Fp4E2M1,
        ElementFormat::MxInt8,
    ];

    #[test]
    fn every_code_survives_decode_and_encode() {
        for format in ElementFormat::ALL {
            for rounding in Rounding::ALL {
                for code in 0..format.code_count() {
                    let v = format.decode(code);
                    if v.is_finite() && (format != ElementFormat::MxInt8 || code != 0x80) {
                        let back = reference::encode(format, *rounding, f64::from(v));
                        assert_eq!(u32::from(back), code, "{format} {rounding}");
                    }
                }
            }
        }
    }

    #[test]
    fn encode_agrees_with_a_search_over_all_codes() {
        for format in SMALL {
            let table = magnitudes(format);
            let mut probes = vec![0.0, f64::from(format.largest()) * 1.5, 1e9, 1e-9];
            for pair in table.windows(2) {
                let middle = ((pair[0].0 + pair[1].0) / 2.0) as f32;
                for v in [middle.next_down(), middle, middle.next_up()] {
                    probes.push(f64::from(v));
                }
                let code = pair[0].0 as f32;
                for v in [code.next_down(), code, code.next_up()] {
                    probes.push(f64::from(v));
                }
            }
            for rounding in Rounding::ALL {
                for probe in probes.iter().flat_map(|p| [*p, -p]) {
                    let code = reference::encode(format, *rounding, probe);
                    let got = f64::from(format.decode(u32::from(code)));
                    let want = search(format, *rounding, probe);
                    assert_eq!(got, want, "{format} {rounding} {probe:e}");
                    if format != ElementFormat::MxInt8 {
                        assert_eq!(got.is_sign_negative(), probe.is_sign_negative());
                    }
                }
            }
        }
    }

    #[test]
    fn unscaled_casts_follow_half_and_keep_nan() {
        let encode = |v: f32| reference::encode(ElementFormat::Bf16, Rounding::Even, f64::from(v));
        for i in 0..200_000_u32 {
            let v = f32::from_bits(i.wrapping_mul(0x9e37_79b9));
            if !v.is_nan() {
                assert_eq!(encode(v), half::bf16::from_f32(v).to_bits(), "{v:e}");
            }
        }
        assert_eq!(encode(f32::NAN), 0x7fc0);
        assert_eq!(encode(f32::NEG_INFINITY), 0xff80);
        let fp8 = |f, v: f32| reference::encode(f, Rounding::Even, f64::from(v));
        assert_eq!(fp8(ElementFormat::Fp8E4M3, f32::NAN), 0x7f);
        assert_eq!(fp8(ElementFormat::Fp8E4M3, f32::NEG_INFINITY), 0xfe);
        assert_eq!(fp8(ElementFormat::Fp8E5M2, f32::INFINITY), 0x7b);
    }

    #[test]
    fn special_blocks() {
        let spec = QuantSpec::mx(ElementFormat::Fp8E4M3).unwrap();
        let mut x = vec![1.0_f32; 5 * 32 + 3];
        x[3] = f32::NAN;
        x[33] = f32::NEG_INFINITY;
        x[64..96].fill(-0.0);
        x[96..128].fill(f32::from_bits(1));
        x[160] = -448.0;
        let (mut codes, mut scales) = (vec![0xaa; 6 * 32], vec![0xaa; 6]);
        quantize_rows(&spec, &x, 1, x.len(), &mut codes, &mut scales).unwrap();
        assert_eq!(scales, [0xff, 0xff, 0, 0, 119, 127]);
        assert!(codes[..64].iter().all(|&c| c == 0));
        assert!(codes[64..96].iter().all(|&c| c == 0x80));
        assert!(codes[96..128].iter().all(|&c| c == 0));
        assert!(codes[163..].iter().all(|&c| c == 0), "tail codes are zero");
        let mut out = vec![0.0; x.len()];
        dequantize_rows(&spec, &codes, &scales, 1, x.len(), &mut out).unwrap();
        assert!(out[..64].iter().all(|v| v.is_nan()));
        assert_eq!(out[128..], x[128..]);
    }

    #[test]
    fn tensor_scale_is_amax_over_largest() {
        let format = ElementFormat::Fp8E4M3;
        let spec = QuantSpec::new(format, ScaleKind::Tensor, 32, Rounding::Even, ScaleRule::Floor)
            .unwrap();
        let x = [1.0_f32, -3.5, 0.25, 7.0];
        let (mut codes, mut scales) = (vec![0; 64], [0; 4]);
        quantize_rows(&spec, &x, 2, 2, &mut codes, &mut scales).unwrap();
        assert_eq!(f32::from_le_bytes(scales), 7.0 / 448.0);
        let mut out = [0.0; 4];
        dequantize_rows(&spec, &codes, &scales, 2, 2, &mut out).unwrap();
        assert_eq!(out, x);
    }

    #[test]
    fn bad_shapes_are_errors() {
        let spec = QuantSpec::mx(ElementFormat::Fp4E2M1).unwrap();
        let x = [0.0; 40];
        let (mut codes, mut scales) = (vec![0; 32], vec![0; 2]);
        assert_eq!(quantize_rows(&spec, &x, 1, 40, &mut codes, &mut scales), Ok(()));
        assert!(quantize_rows(&spec, &x, 1, 41, &mut codes, &mut scales).is_err());
        assert!(quantize_rows(&spec, &x, 1, 40, &mut codes[1..], &mut scales).is_err());
        assert!(quantize_rows(&spec, &x, 1, 40, &mut codes, &mut scales[1..]).is_err());
        assert!(quantize_rows(&spec, &[], 1, 0, &mut [], &mut []).is_err());
        assert!(QuantSpec { block_size: 0, ..spec }.validate().is_err());
        assert!(QuantSpec::mx(ElementFormat::Bf16).is_err());
        assert_eq!(spec.row_bytes(usize::MAX), 1 << 63);
        let fp8 = QuantSpec::mx(ElementFormat::Fp8E4M3).unwrap();
        assert_eq!(fp8.codes_len(2, usize::MAX), usize::MAX);
    }
}
