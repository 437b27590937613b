//! What quantising costs each weight: the expected signal-to-quantisation-noise ratio, from the
//! weight's own numbers. It reads every weight once, so that it is made for a plan that is shown and
//! not for one that is carried out.

use mx_kernels::{QuantSpec, ScaleKind, fake_quantize_rows, reference::tensor_scale};

use super::{
    RewritePlan,
    execute::ExecuteError,
    patch::Patch,
    recipe::SiteFormat,
    weights::{Rows, Threads},
};
use crate::onnx::{self, Model};

/// Sets [`PlannedSite::expected_sqnr`](super::PlannedSite::expected_sqnr) of every site: 10 log10 of
/// sum w^2 / sum (w - q)^2 in decibels, where q is the weight after quantising. Infinite where nothing
/// is lost (codes of a checkpoint are the weight, whatever the graph's float type made of it), NaN where the weight is not finite.
///
/// # Errors
/// A weight that cannot be read.
pub fn measure_plan(
    model: &Model,
    plan: &mut RewritePlan,
    threads: Option<usize>,
) -> Result<(), ExecuteError> {
    let patch = Patch::new(model, Threads::new(threads)?)?;
    for planned in &mut plan.sites {
        if planned.imported().is_some() {
            planned.expected_sqnr = Some(f64::INFINITY);
            continue;
        }
        let (_, parts) = patch.stack(&planned.site)?;
        planned.expected_sqnr = Some(decibels(&parts, &planned.format, &patch.threads)?);
    }
    Ok(())
}

/// Of a weight in `parts`.
fn decibels(parts: &[Rows], format: &SiteFormat, threads: &Threads) -> Result<f64, onnx::Error> {
    let scale = match format {
        SiteFormat::Mx { weight, .. } if weight.scale == ScaleKind::Tensor => {
            let each = parts.iter().map(|rows| largest(rows, threads));
            let each = each.collect::<Result<Vec<f32>, _>>()?;
            tensor_scale(weight.format, each.into_iter().fold(0.0, f32::max))
        }
        _ => 1.0,
    };
    let (mut signal, mut noise) = (0.0, 0.0);
    for rows in parts {
        let (of_part, lost) = powers(rows, format, scale, threads)?;
        (signal, noise) = (signal + of_part, noise + lost);
    }
    Ok(if noise == 0.0 { f64::INFINITY } else { 10.0 * (signal / noise).log10() })
}

/// Sums of w^2 and of (w - q)^2.
fn powers(
    rows: &Rows,
    format: &SiteFormat,
    scale: f32,
    threads: &Threads,
) -> Result<(f64, f64), onnx::Error> {
    let (mut signal, mut noise) = (vec![0.0_f64; rows.n], vec![0.0_f64; rows.n]);
    rows.for_tiles(threads, (&mut signal, 1), (&mut noise, 1), |values, signal, noise| {
        let mut quantised = vec![0.0; values.len()];
        quantise(format, scale, values, rows.k, &mut quantised).map_err(|error| {
            onnx::Error::Payload { tensor: rows.name().to_owned(), what: error.to_string() }
        })?;
        let pairs = values.chunks(rows.k).zip(quantised.chunks(rows.k));
        for ((row, quantised), (signal, noise)) in pairs.zip(signal.iter_mut().zip(noise)) {
            for (&w, &q) in row.iter().zip(quantised) {
                let (w, q) = (f64::from(w), f64::from(q));
                *signal += w * w;
                *noise += (w - q) * (w - q);
            }
        }
        Ok(())
    })?;
    // Row by row in order, so that threads change nothing.
    Ok((signal.iter().sum(), noise.iter().sum()))
}

/// Largest finite magnitude of the weight.
fn largest(rows: &Rows, threads: &Threads) -> Result<f32, onnx::Error> {
    let mut largest = vec![0.0_f32; rows.n];
    let none = (&mut [] as &mut [f32], 0);
    rows.for_tiles(threads, (&mut largest, 1), none, |values, largest, _| {
        for (row, largest) in values.chunks(rows.k).zip(largest) {
            let finite = row.iter().map(|v| v.abs()).filter(|v| v.is_finite());
            *largest = finite.fold(0.0, f32::max);
        }
        Ok(())
    })?;
    Ok(largest.into_iter().fold(0.0, f32::max))
}

/// The rows as they are after quantising and dequantising.
fn quantise(
    format: &SiteFormat,
    scale: f32,
    values: &[f32],
    k: usize,
    out: &mut [f32],
) -> Result<(), mx_kernels::Error> {
    match format {
        SiteFormat::Mx { weight, .. } if weight.scale == ScaleKind::Tensor => {
            // Divided by the scale, values are those of the plain cast.
            let cast = QuantSpec { scale: ScaleKind::None, ..*weight };
            let quotients: Vec<f32> = values.iter().map(|v| v / scale).collect();
            fake_quantize_rows(&cast, &quotients, values.len() / k, k, out)?;
            out.iter_mut().for_each(|value| *value *= scale);
            Ok(())
        }
        SiteFormat::Mx { weight, .. } => {
            fake_quantize_rows(weight, values, values.len() / k, k, out)
        }
        SiteFormat::Int8 => {
            for (row, out) in values.chunks(k).zip(out.chunks_mut(k)) {
                quantise_channel(row, out);
            }
            Ok(())
        }
        SiteFormat::Bf16 => {
            for (value, out) in values.iter().zip(out) {
                *out = half::bf16::from_f32(*value).to_f32();
            }
            Ok(())
        }
        SiteFormat::Fp16 => {
            let largest = half::f16::MAX.to_f32();
            for (value, out) in values.iter().zip(out) {
                *out = half::f16::from_f32(value.clamp(-largest, largest)).to_f32();
            }
            Ok(())
        }
    }
}

/// One output channel as int8 with one scale.
fn quantise_channel(row: &[f32], out: &mut [f32]) {
    let scale = row.iter().fold(0.0_f32, |max, v| max.max(v.abs())) / 127.0;
    for (value, out) in row.iter().zip(out) {
        *out = if scale == 0.0 { 0.0 } else { (value / scale).round_ties_even() * scale };
    }
}
