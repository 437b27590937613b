//! `y = alpha * x * w^T (+ beta * bias)` on packed weights.

use super::{CudaError, DevicePtr, FloatType, Gpu, Stream};
use crate::LinearProblem;

/// Where the operands of one product lie in device memory.
#[derive(Debug, Clone, Copy)]
pub struct LinearBuffers {
    /// X, [m, k].
    pub x: DevicePtr,
    /// Packed codes, [n, row bytes].
    pub codes: DevicePtr,
    /// Scales, [n, blocks] bytes for `e8m0`, one float32 for `tensor`, 0 for `none`.
    pub scales: DevicePtr,
    /// Bias, [n] of X's type, or 0.
    pub bias: DevicePtr,
    /// Y, [m, n] of X's type.
    pub y: DevicePtr,
    /// At least [`LinearPlan::scratch_bytes`] bytes, aligned to 256.
    pub scratch: DevicePtr,
}

/// How a product of given size is computed on a device.
#[derive(Debug, Clone)]
pub struct LinearPlan {
    scratch_bytes: usize,
}

impl LinearPlan {
    /// A plan for `m` rows of `x_type`. Cheap: no device call.
    ///
    /// # Errors
    /// An invalid specification or a dimension of zero.
    pub fn new(
        gpu: &'static Gpu,
        problem: &LinearProblem,
        m: usize,
        x_type: FloatType,
        has_bias: bool,
    ) -> Result<Self, CudaError> {
        let _ = (gpu, problem, m, x_type, has_bias);
        Err(CudaError::Unsupported("not built yet".into()))
    }

    /// Bytes of scratch memory that [`Self::run`] needs.
    pub fn scratch_bytes(&self) -> usize {
        self.scratch_bytes
    }

    /// Enqueues the product on `stream`.
    ///
    /// # Safety
    /// The buffers are device memory of the plan's device, as long as the plan's shapes say, and
    /// stay valid until the stream has run the work.
    ///
    /// # Errors
    /// A launch that CUDA refuses.
    #[allow(unsafe_code)]
    pub unsafe fn run(&self, stream: Stream, buffers: &LinearBuffers) -> Result<(), CudaError> {
        let _ = (stream, buffers);
        Err(CudaError::Unsupported("not built yet".into()))
    }
}
