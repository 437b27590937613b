//! Weights as files hold them, quantised in place: rows one after the other, columns in strips.
#![allow(unsafe_code)]

use super::{
    Kernels,
    quantize_columns::{STRIP, Scratch, Strip},
    rows::RowQuant,
};
use crate::{
    error::{Error, check_len},
    quantize::{FloatType, StoredWeight, check_rows},
    scale::ScaleKind,
    tensor::QuantSpec,
};

/// See [`crate::quantize_weight`].
pub(crate) fn quantize_weight(
    kernels: &Kernels,
    spec: &QuantSpec,
    weight: &StoredWeight<'_>,
    first: usize,
    codes: &mut [u8],
    scales: &mut [u8],
) -> Result<(), Error> {
    let (n, k, width) = (weight.n, weight.k, weight.float_type.width());
    check_rows(spec, n, k, weight.bytes.len() / width)?;
    check_len("weight bytes", weight.bytes.len(), n.saturating_mul(k).saturating_mul(width))?;
    if spec.scale != ScaleKind::E8M0 {
        let (format, scale) = (spec.format.name(), spec.scale.name());
        let reason = "rows of a weight can be quantised by themselves only with block scales";
        return Err(Error::Combination { format, scale, reason });
    }
    let rows = codes.len() / spec.row_bytes(k);
    check_len("codes", codes.len(), spec.codes_len(rows, k))?;
    check_len("scales", scales.len(), spec.scales_len(rows, k))?;
    if first > n || rows > n - first {
        check_len("rows", n, first.saturating_add(rows))?;
    }
    let quant = RowQuant::new(*spec);
    if weight.transposed {
        columns(kernels, &quant, weight, first, codes, scales);
    } else {
        in_rows(kernels, &quant, weight, first, codes, scales);
    }
    Ok(())
}

fn in_rows(
    kernels: &Kernels,
    quant: &RowQuant,
    weight: &StoredWeight<'_>,
    first: usize,
    codes: &mut [u8],
    scales: &mut [u8],
) {
    let (spec, k) = (&quant.spec, weight.k);
    let stride = k * weight.float_type.width();
    let mut values = vec![0.0_f32; k];
    let mut unpacked = vec![0_u8; spec.blocks(k) * spec.block_size];
    let stored = weight.bytes[first * stride..].chunks_exact(stride);
    let outputs = codes.chunks_exact_mut(spec.row_bytes(k));
    let outputs = outputs.zip(scales.chunks_exact_mut(spec.blocks(k)));
    for (bytes, (codes, scales)) in stored.zip(outputs) {
        let aligned = match weight.float_type {
            FloatType::F32 if cfg!(target_endian = "little") => {
                bytemuck::try_cast_slice(bytes).ok()
            }
            _ => None,
        };
        // SAFETY: the table of a variant is only handed out where `detect` says yes.
        unsafe {
            let row = aligned.unwrap_or_else(|| {
                (kernels.load_row)(weight.float_type, bytes, &mut values);
                &values
            });
            (kernels.code_row)(quant, row, &mut unpacked, scales);
            (kernels.pack_row)(spec.format, &unpacked, codes);
        }
    }
}

fn columns(
    kernels: &Kernels,
    quant: &RowQuant,
    weight: &StoredWeight<'_>,
    first: usize,
    codes: &mut [u8],
    scales: &mut [u8],
) {
    let (spec, k, width) = (&quant.spec, weight.k, weight.float_type.width());
    let (row_bytes, block_bytes, blocks) = (spec.row_bytes(k), spec.block_bytes(), spec.blocks(k));
    let rows = codes.len() / row_bytes;
    let stride = weight.n * width;
    let mut scratch = Scratch::new(quant);
    for strip in (0..rows).step_by(STRIP) {
        let columns = STRIP.min(rows - strip);
        for start in (0..blocks).step_by(scratch.blocks) {
            let count = scratch.blocks.min(blocks - start);
            for slot in 0..count {
                let from = (start + slot) * spec.block_size;
                let part = Strip {
                    bytes: &weight.bytes[from * stride + (first + strip) * width..],
                    float_type: weight.float_type,
                    stride,
                    len: spec.block_size.min(k - from),
                    columns,
                };
                // SAFETY: the table of a variant is only handed out where `detect` says yes.
                unsafe { (kernels.code_columns)(quant, &part, slot, &mut scratch) };
            }
            for c in 0..columns {
                let to = (strip + c) * row_bytes + start * block_bytes;
                codes[to..][..count * block_bytes].copy_from_slice(scratch.packed(c, count));
                let scales = &mut scales[(strip + c) * blocks + start..][..count];
                for (slot, scale) in scales.iter_mut().enumerate() {
                    *scale = scratch.scale(c, slot);
                }
            }
        }
    }
}
