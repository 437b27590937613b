//! Whole rows through the variant's row kernels; the reference does what they leave out.
#![allow(unsafe_code)]

use super::{Kernels, rows::RowQuant};
use crate::{
    error::{Error, check_len},
    formats::ElementFormat,
    pack,
    quantize::check_rows,
    reference,
    scale::ScaleKind,
    tensor::QuantSpec,
};

/// See [`crate::quantize_rows`].
pub(crate) fn quantize_rows(
    kernels: &Kernels,
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
    let quant = RowQuant::new(*spec);
    let by_row = x.chunks_exact(k).zip(codes.chunks_exact_mut(spec.row_bytes(k)));
    match spec.scale {
        ScaleKind::E8M0 => {
            let blocks = spec.blocks(k);
            let mut unpacked = vec![0_u8; blocks * spec.block_size];
            for ((x, codes), scales) in by_row.zip(scales.chunks_exact_mut(blocks)) {
                // SAFETY: the table of a variant is only handed out where `detect` says yes.
                unsafe {
                    (kernels.code_row)(&quant, x, &mut unpacked, scales);
                    (kernels.pack_row)(spec.format, &unpacked, codes);
                }
            }
            Ok(())
        }
        ScaleKind::None if spec.format == ElementFormat::Bf16 => {
            let padded = spec.blocks(k) * spec.block_size;
            let (mut values, mut unpacked) = (vec![0.0_f32; k], vec![0_u16; padded]);
            for (x, codes) in by_row {
                // SAFETY: as above.
                unsafe { (kernels.fake_row)(&quant, x, 1.0, &mut values) };
                for (code, v) in unpacked.iter_mut().zip(&values) {
                    *code = (v.to_bits() >> 16) as u16;
                }
                pack::pack(spec.format, &unpacked, codes);
            }
            Ok(())
        }
        ScaleKind::None | ScaleKind::Tensor => {
            reference::quantize_rows(spec, x, rows, k, codes, scales)
        }
    }
}

/// See [`crate::fake_quantize_rows`].
pub(crate) fn fake_quantize_rows(
    kernels: &Kernels,
    spec: &QuantSpec,
    x: &[f32],
    rows: usize,
    k: usize,
    out: &mut [f32],
) -> Result<(), Error> {
    check_rows(spec, rows, k, x.len())?;
    check_len("out", out.len(), rows.saturating_mul(k))?;
    let quant = RowQuant::new(*spec);
    let mut divisor = 1.0;
    if spec.scale == ScaleKind::Tensor {
        divisor = reference::tensor_scale(spec.format, reference::finite_amax(x.iter().copied()).0);
    }
    for (x, out) in x.chunks_exact(k).zip(out.chunks_exact_mut(k)) {
        // SAFETY: the table of a variant is only handed out where `detect` says yes.
        if unsafe { (kernels.fake_row)(&quant, x, divisor, out) } {
            for (o, v) in out.iter_mut().zip(reference::fake_row_f64(spec, x)) {
                *o = v as f32;
            }
        }
        if divisor != 1.0 {
            for o in out {
                *o = (f64::from(*o) * f64::from(divisor)) as f32;
            }
        }
    }
    Ok(())
}
