//! Scores of predicted tokens on a device.

use super::{CudaError, DevicePtr, FloatType, Gpu, Stream, units::Unit};

/// The kernels of this module.
pub(super) const UNIT: Unit = Unit::plain("scores");

/// Where the operands of [`crate::token_scores`] lie in device memory.
#[derive(Debug, Clone, Copy)]
pub struct ScoresBuffers {
    /// Logits, [rows, vocab].
    pub logits: DevicePtr,
    /// Labels, int64 [rows].
    pub labels: DevicePtr,
    /// Baseline logits, [rows, vocab], or 0.
    pub baseline: DevicePtr,
    /// float32 [rows].
    pub nll: DevicePtr,
    /// float32 [rows].
    pub entropy: DevicePtr,
    /// int64 [rows].
    pub top1: DevicePtr,
    /// float32 [rows], or 0 where nobody asks for it.
    pub kl: DevicePtr,
    /// float32 [rows], or 0 where nobody asks for it.
    pub baseline_nll: DevicePtr,
    /// At least [`ScoresPlan::scratch_bytes`] bytes, aligned to 256.
    pub scratch: DevicePtr,
}

/// How scores of given size are computed on a device.
#[derive(Debug, Clone)]
pub struct ScoresPlan {
    scratch_bytes: usize,
}

impl ScoresPlan {
    /// A plan for `rows` rows of logits. Cheap: no device call.
    ///
    /// # Errors
    /// No rows or no vocabulary.
    pub fn new(
        gpu: &'static Gpu,
        rows: usize,
        vocab: usize,
        logits: FloatType,
        has_baseline: bool,
    ) -> Result<Self, CudaError> {
        let _ = (gpu, rows, vocab, logits, has_baseline);
        Err(CudaError::Unsupported("not built yet".into()))
    }

    /// Bytes of scratch memory that [`Self::run`] needs.
    pub fn scratch_bytes(&self) -> usize {
        self.scratch_bytes
    }

    /// Enqueues the scores on `stream`. A label outside the vocabulary (and not masked) scores NaN:
    /// no kernel can answer an error.
    ///
    /// # Safety
    /// The buffers are device memory of the plan's device, as long as the plan's shapes say, and
    /// stay valid until the stream has run the work.
    ///
    /// # Errors
    /// A launch that CUDA refuses.
    #[allow(unsafe_code)]
    pub unsafe fn run(&self, stream: Stream, buffers: &ScoresBuffers) -> Result<(), CudaError> {
        let _ = (stream, buffers);
        Err(CudaError::Unsupported("not built yet".into()))
    }
}
