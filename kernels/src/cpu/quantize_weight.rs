//! Weights as files hold them, quantised in place: rows one after the other, columns in strips.
#![allow(unsafe_code)]

use super::{
    Kernels,
    quantize_columns::{COLUMNS, Scratch, Strip},
    rows::RowQuant,
};
use crate::{
    error::{Error, check_len},
    quantize::{FloatType, StoredWeight, check_rows},
    scale::ScaleKind,
    tensor::QuantSpec,
};

/// Columns whose blocks are done together: a kilobyte of f32 for each k, since every k is another page.
const STRIP: usize = 256;

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
    check_len("rows", n.saturating_sub(first).min(rows), rows)?;
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
    let mut unpacked = vec![0_u8; COLUMNS * spec.block_size];
    let mut bytes = [0_u8; COLUMNS];
    let mut scratch = Scratch::new(spec.block_size);
    for strip in (0..rows).step_by(STRIP) {
        for block in 0..blocks {
            let from = block * spec.block_size;
            for row in (strip..rows.min(strip + STRIP)).step_by(COLUMNS) {
                let part = Strip {
                    bytes: &weight.bytes[from * stride + (first + row) * width..],
                    float_type: weight.float_type,
                    stride,
                    ahead: spec.block_size * stride,
                    len: spec.block_size.min(k - from),
                    columns: COLUMNS.min(rows - row),
                };
                // SAFETY: the table of a variant is only handed out where `detect` says yes.
                unsafe {
                    let scratch = &mut scratch;
                    (kernels.code_columns)(quant, &part, scratch, &mut unpacked, &mut bytes);
                }
                for c in 0..part.columns {
                    let out = &mut codes[(row + c) * row_bytes + block * block_bytes..];
                    let unpacked = &unpacked[c * spec.block_size..][..spec.block_size];
                    // SAFETY: as above.
                    unsafe { (kernels.pack_row)(spec.format, unpacked, &mut out[..block_bytes]) };
                    scales[(row + c) * blocks + block] = bytes[c];
                }
            }
        }
    }
}
