//! The specification: plain scalar code in f64, in which every step before the final rounding is
//! exact or has 53 bits. Nothing here is ever optimised; the kernels in `cpu` are held against it.

use crate::{
    act_matmul::{self, ActMatMulProblem},
    error::{Error, check_len},
    formats::ElementFormat,
    pack,
    quantize::{Rounding, check_rows},
    scale::{self, SCALE_NAN, ScaleKind},
    tensor::{Float, FloatMut, LinearProblem, PackedWeight, QuantSpec},
};

/// The code of `v`, rounded as asked and saturating at the largest finite magnitude.
///
/// The sign of zero is kept where the format has one. NaN becomes the format's NaN code with its
/// sign, or zero where there is none; an infinity saturates, but stays infinite in bf16.
pub fn encode(format: ElementFormat, rounding: Rounding, v: f64) -> u16 {
    let row = format.row();
    let sign = if v.is_sign_negative() { 1_u32 << (row.bits - 1) } else { 0 };
    if v.is_nan() {
        return format.nan_code().map_or(0, |code| (code | sign) as u16);
    }
    let magnitude = v.abs();
    let m = row.mantissa_bits as i32;
    let max_code = if format == ElementFormat::Bf16 { 0x7f80 } else { row.max_code() };
    // Beyond twice the largest there is nothing but saturation, and the casts below stay small.
    let code = if magnitude >= 2.0 * f64::from(row.largest) {
        max_code
    } else {
        let exponent = floor_log2(magnitude).max(row.emin());
        let quotient = magnitude * scale::exp2_f64(m - exponent);
        let units = match rounding {
            Rounding::Even => quotient.round_ties_even(),
            Rounding::Nearest => quotient.round(),
            Rounding::Floor => quotient.trunc(),
        } as u32;
        // Codes of one sign count up without gaps: a carry out of the mantissa is the next code.
        ((((exponent - row.emin()) as u32) << m) + units).min(max_code)
    };
    if format == ElementFormat::MxInt8 {
        return u16::from(if sign != 0 { (code as u8).wrapping_neg() } else { code as u8 });
    }
    (code | sign) as u16
}

/// floor(log2 v) of a finite v >= 0 that is no subnormal f64; far below every format for 0.
fn floor_log2(v: f64) -> i32 {
    (v.to_bits() >> 52) as i32 - 1023
}

/// Largest magnitude of a slice and whether all of it is finite.
pub(crate) fn finite_amax(x: impl Iterator<Item = f32>) -> (f32, bool) {
    x.fold(
        (0.0, true),
        |(amax, finite), v| {
            if v.is_finite() { (v.abs().max(amax), finite) } else { (amax, false) }
        },
    )
}

/// The scale of a whole tensor: largest finite magnitude / largest of the format, as f32, at least
/// 2^-126; 1 for a tensor of zeros.
pub fn tensor_scale(format: ElementFormat, amax: f32) -> f32 {
    if amax == 0.0 { 1.0 } else { (amax / format.largest()).max(f32::MIN_POSITIVE) }
}

/// Quantises one block; returns its scale byte.
fn quantize_block(spec: &QuantSpec, x: &[f32], codes: &mut [u16]) -> u8 {
    codes.fill(0);
    let (amax, finite) = finite_amax(x.iter().copied());
    if !finite {
        return SCALE_NAN;
    }
    let e =
        if amax == 0.0 { -127 } else { scale::shared_exponent(spec.scale_rule, spec.format, amax) };
    for (code, &v) in codes.iter_mut().zip(x) {
        *code = encode(spec.format, spec.rounding, f64::from(v) * scale::exp2_f64(-e));
    }
    (e + 127) as u8
}

/// See [`crate::quantize_rows`].
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
    check_rows(spec, rows, k, x.len())?;
    check_len("codes", codes.len(), spec.codes_len(rows, k))?;
    check_len("scales", scales.len(), spec.scales_len(rows, k))?;
    let mut divisor = 1.0;
    if spec.scale == ScaleKind::Tensor {
        let s = tensor_scale(spec.format, finite_amax(x.iter().copied()).0);
        scales.copy_from_slice(&pack::tensor_scale_to_bytes(s));
        divisor = s;
    }
    let mut block_codes = vec![0_u16; spec.block_size];
    let blocks = spec.blocks(k);
    for (r, row) in x.chunks_exact(k).enumerate() {
        for (b, block) in row.chunks(spec.block_size).enumerate() {
            let i = r * blocks + b;
            if spec.scale == ScaleKind::E8M0 {
                scales[i] = quantize_block(spec, block, &mut block_codes);
            } else {
                block_codes.fill(0);
                for (code, &v) in block_codes.iter_mut().zip(block) {
                    // The quotient is an f32, like that of every implementation of the scheme.
                    *code = encode(spec.format, spec.rounding, f64::from(v / divisor));
                }
            }
            let at = i * spec.block_bytes();
            pack::pack(spec.format, &block_codes, &mut codes[at..at + spec.block_bytes()]);
        }
    }
    Ok(())
}

/// The exact values of one row, without a `tensor` scale.
fn decode_row(spec: &QuantSpec, codes: &[u8], scales: &[u8], out: &mut [f64]) {
    let mut block_codes = vec![0_u16; spec.block_size];
    for (b, out) in out.chunks_mut(spec.block_size).enumerate() {
        let bytes = &codes[b * spec.block_bytes()..][..spec.block_bytes()];
        pack::unpack(spec.format, bytes, &mut block_codes);
        let scale = match spec.scale {
            ScaleKind::E8M0 => scale::scale_value(scales[b]),
            ScaleKind::None | ScaleKind::Tensor => 1.0,
        };
        for (o, &code) in out.iter_mut().zip(&block_codes) {
            *o = f64::from(spec.format.decode(u32::from(code))) * scale;
        }
    }
}

/// The exact values [rows, k] and the factor of the whole tensor (1 but for `tensor`).
fn decode_rows(
    spec: &QuantSpec,
    codes: &[u8],
    scales: &[u8],
    rows: usize,
    k: usize,
) -> (Vec<f64>, f64) {
    let mut out = vec![0.0; rows * k];
    let (row_bytes, blocks) = (spec.row_bytes(k), spec.blocks(k));
    for (r, out) in out.chunks_exact_mut(k).enumerate() {
        let scales = match spec.scale {
            ScaleKind::E8M0 => &scales[r * blocks..(r + 1) * blocks],
            _ => scales,
        };
        decode_row(spec, &codes[r * row_bytes..(r + 1) * row_bytes], scales, out);
    }
    let factor = match spec.scale {
        ScaleKind::Tensor => f64::from(pack::tensor_scale_from_bytes(scales)),
        _ => 1.0,
    };
    (out, factor)
}

/// The exact quantised values of one row of x; e8m0 only.
pub(crate) fn fake_row_f64(spec: &QuantSpec, x: &[f32]) -> Vec<f64> {
    let mut codes = vec![0_u16; spec.block_size];
    let mut out = Vec::with_capacity(x.len());
    for block in x.chunks(spec.block_size) {
        let scale = scale::scale_value(quantize_block(spec, block, &mut codes));
        let decode = |&code: &u16| f64::from(spec.format.decode(u32::from(code))) * scale;
        out.extend(codes[..block.len()].iter().map(decode));
    }
    out
}

/// The exact values of row `n` of a weight, without a `tensor` scale.
pub(crate) fn weight_row_f64(w: &PackedWeight<'_>, n: usize, out: &mut [f64]) {
    let (spec, k) = (w.spec(), w.k());
    let (bytes, blocks) = (spec.row_bytes(k), spec.blocks(k));
    let scales = match spec.scale {
        ScaleKind::E8M0 => &w.scales()[n * blocks..(n + 1) * blocks],
        _ => w.scales(),
    };
    decode_row(spec, &w.codes()[n * bytes..(n + 1) * bytes], scales, out);
}

/// See [`crate::dequantize_rows`].
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
    check_rows(spec, rows, k, out.len())?;
    check_len("codes", codes.len(), spec.codes_len(rows, k))?;
    check_len("scales", scales.len(), spec.scales_len(rows, k))?;
    let (row_bytes, blocks) = (spec.row_bytes(k), spec.blocks(k));
    for (r, out) in out.chunks_exact_mut(k).enumerate() {
        let scales = match spec.scale {
            ScaleKind::E8M0 => &scales[r * blocks..(r + 1) * blocks],
            ScaleKind::None | ScaleKind::Tensor => scales,
        };
        let row = &codes[r * row_bytes..(r + 1) * row_bytes];
        let (values, factor) = decode_rows(spec, row, scales, 1, k);
        for (o, v) in out.iter_mut().zip(values) {
            *o = (v * factor) as f32;
        }
    }
    Ok(())
}

/// See [`crate::fake_quantize_rows`].
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
    check_rows(spec, rows, k, x.len())?;
    check_len("out", out.len(), rows.saturating_mul(k))?;
    let mut codes = vec![0; spec.codes_len(rows, k)];
    let mut scales = vec![0; spec.scales_len(rows, k)];
    quantize_rows(spec, x, rows, k, &mut codes, &mut scales)?;
    dequantize_rows(spec, &codes, &scales, rows, k, out)
}

/// y = alpha * x * w^T (+ beta * bias), accumulated in f64; see [`crate::linear`].
///
/// # Errors
/// As [`crate::linear`].
pub fn linear(
    problem: &LinearProblem,
    x: Float<'_>,
    w: &PackedWeight<'_>,
    bias: Option<Float<'_>>,
    mut y: FloatMut<'_>,
) -> Result<(), Error> {
    let m = problem.check(&x, w, bias.as_ref(), &y)?;
    let (n, k) = (problem.n, problem.k);
    let mut x32 = vec![0.0; m * k];
    x.load(0, &mut x32);
    let (xs, x_factor) = match &problem.activation {
        None => (x32.iter().map(|&v| f64::from(v)).collect(), 1.0),
        Some(spec) => {
            let mut codes = vec![0; spec.codes_len(m, k)];
            let mut scales = vec![0; spec.scales_len(m, k)];
            quantize_rows(spec, &x32, m, k, &mut codes, &mut scales)?;
            decode_rows(spec, &codes, &scales, m, k)
        }
    };
    let (ws, w_factor) = decode_rows(w.spec(), w.codes(), w.scales(), n, k);
    for i in 0..m {
        let x = &xs[i * k..(i + 1) * k];
        for j in 0..n {
            let dot: f64 = x.iter().zip(&ws[j * k..(j + 1) * k]).map(|(a, b)| a * b).sum();
            let product = f64::from(problem.alpha) * (dot * x_factor * w_factor);
            let bias = bias.map_or(0.0, |b| f64::from(problem.beta) * f64::from(b.get(j)));
            y.set(i * n + j, (product + bias) as f32);
        }
    }
    Ok(())
}

/// Products of matrices that are both quantised, accumulated in f64; see [`crate::act_matmul()`].
///
/// # Errors
/// As there.
pub fn act_matmul(
    problem: &ActMatMulProblem<'_>,
    a: Float<'_>,
    b: Float<'_>,
    y: FloatMut<'_>,
) -> Result<(), Error> {
    act_matmul::in_order(problem, a, b, y, quantize_rows, |problem, x, w, y| {
        linear(problem, x, w, None, y)
    })
}
