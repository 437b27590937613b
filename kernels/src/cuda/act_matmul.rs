//! Products of two matrices that are both quantised on the fly.

use super::{CudaError, DevicePtr, FloatType, Gpu, Stream};
use crate::ActMatMulProblem;

/// Where the operands of [`crate::act_matmul()`] lie in device memory.
#[derive(Debug, Clone, Copy)]
pub struct ActMatMulBuffers {
    /// A's matrices.
    pub a: DevicePtr,
    /// B's matrices.
    pub b: DevicePtr,
    /// The products.
    pub y: DevicePtr,
    /// At least [`ActMatMulPlan::scratch_bytes`] bytes, aligned to 256.
    pub scratch: DevicePtr,
}

/// How products of given size are computed on a device.
#[derive(Debug, Clone)]
pub struct ActMatMulPlan {
    scratch_bytes: usize,
}

impl ActMatMulPlan {
    /// A plan for matrices of `element`. Cheap: no device call.
    ///
    /// # Errors
    /// As [`ActMatMulProblem::check_sizes`].
    pub fn new(
        gpu: &'static Gpu,
        problem: &ActMatMulProblem<'_>,
        element: FloatType,
    ) -> Result<Self, CudaError> {
        let _ = (gpu, problem, element);
        Err(CudaError::Unsupported("not built yet".into()))
    }

    /// Bytes of scratch memory that [`Self::run`] needs.
    pub fn scratch_bytes(&self) -> usize {
        self.scratch_bytes
    }

    /// Enqueues the products on `stream`.
    ///
    /// # Safety
    /// The buffers are device memory of the plan's device, as long as the plan's shapes say, and
    /// stay valid until the stream has run the work.
    ///
    /// # Errors
    /// A launch that CUDA refuses.
    #[allow(unsafe_code)]
    pub unsafe fn run(&self, stream: Stream, buffers: &ActMatMulBuffers) -> Result<(), CudaError> {
        let _ = (stream, buffers);
        Err(CudaError::Unsupported("not built yet".into()))
    }
}
