//! Codes and scales of a tensor, as the file format has them, made on the device.
#![allow(unsafe_code)]

use super::{
    Args, CudaError, DevicePtr, FloatType, Gpu, Launch, Stream,
    linear::{FOLD, LARGEST_BLOCKS},
    params::{Fold, FoldLayout, Quant},
};
use crate::{Error, QuantSpec, ScaleKind};

/// Bytes of scratch memory that [`quantize_rows`] needs.
pub const QUANTIZE_SCRATCH: usize = LARGEST_BLOCKS * 4;

/// Where the operands of [`quantize_rows`] lie in device memory.
#[derive(Debug, Clone, Copy)]
pub struct QuantizeBuffers {
    /// X, [rows, k].
    pub x: DevicePtr,
    /// [`QuantSpec::codes_len`] bytes.
    pub codes: DevicePtr,
    /// [`QuantSpec::scales_len`] bytes, aligned to 4 for `tensor`; 0 for `none`.
    pub scales: DevicePtr,
    /// [`QUANTIZE_SCRATCH`] bytes, aligned to 4.
    pub scratch: DevicePtr,
}

/// [`crate::quantize_rows`] on a device: the same bits, from any of the three float types.
///
/// # Safety
/// The buffers are device memory of `gpu`, as long as the shapes say, and stay valid until the
/// stream has run the work. No other work uses the scratch meanwhile.
///
/// # Errors
/// An invalid specification, a k of zero, sizes beyond 2^31, a launch that CUDA refuses.
pub unsafe fn quantize_rows(
    gpu: &'static Gpu,
    stream: Stream,
    spec: &QuantSpec,
    (rows, k): (usize, usize),
    x_type: FloatType,
    buffers: &QuantizeBuffers,
) -> Result<(), CudaError> {
    spec.validate()?;
    if k == 0 {
        return Err(Error::ZeroDimension("k").into());
    }
    let most = i32::MAX as usize - (1 << 16);
    let blocks = rows.checked_mul(spec.blocks(k)).map(|blocks| blocks.div_ceil(128));
    let Some(grid) = blocks.filter(|&n| n <= most && rows <= most && spec.row_bytes(k) <= most)
    else {
        return Err(CudaError::Unsupported(format!("{rows} rows of {k} are beyond 32-bit sizes")));
    };
    if rows == 0 {
        return Ok(());
    }
    let fold = Fold {
        x: buffers.x,
        out: 0,
        bad: 0,
        amax: buffers.scratch,
        scale: 0,
        any_bad: 0,
        x_batch: 0,
        out_batch: 0,
        amax_count: LARGEST_BLOCKS as i32,
        m: rows as i32,
        k: k as i32,
        kind: x_type as i32,
        rows: 0,
        width: 0,
        terms: 0,
        order: 0,
        layout: FoldLayout::Rows as i32,
        shift: 0,
        parts: 0,
        quant: Quant::of(spec),
        _pad: 0,
    };
    let mut args = Args::new()
        .with(fold)
        .with(buffers.codes)
        .with(buffers.scales)
        .with(spec.blocks(k) as i32)
        .with(spec.row_bytes(k) as i32);
    // SAFETY: as the caller promises.
    unsafe {
        if spec.scale == ScaleKind::Tensor {
            largest(gpu, stream, (buffers.x, x_type, rows * k), buffers.scratch)?;
        }
        let shape = Launch::linear(grid as u32, 128);
        gpu.function(FOLD, "quantize")?.launch(&shape, stream, &mut args)
    }
}

/// Enqueues the search for the largest finite magnitude of `count` values; [`LARGEST_BLOCKS`]
/// partial results.
///
/// # Safety
/// X and `partial` are device memory of these lengths, valid until the stream has run the work.
pub(super) unsafe fn largest(
    gpu: &'static Gpu,
    stream: Stream,
    (x, x_type, count): (DevicePtr, FloatType, usize),
    partial: DevicePtr,
) -> Result<(), CudaError> {
    let mut args = Args::new().with(x).with(x_type as i32).with(count as i64).with(partial);
    let function = gpu.function(FOLD, "largest")?;
    // SAFETY: the whole of X is read; a partial result a block is written.
    unsafe { function.launch(&Launch::linear(LARGEST_BLOCKS as u32, 256), stream, &mut args) }
}
