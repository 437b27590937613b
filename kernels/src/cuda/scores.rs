//! Scores of predicted tokens on a device.

use super::{Args, CudaError, DevicePtr, FloatType, Function, Gpu, Launch, Stream, units::Unit};
use crate::Error;

/// The kernels of this module.
pub(super) const UNIT: Unit = Unit::plain("scores");

/// Threads of a block, which scores one row; `THREADS` in the source.
const THREADS: u32 = 512;

/// Where the operands of one call lie in device memory. An output that nobody asks for is 0.
#[derive(Debug, Clone, Copy)]
pub struct ScoresBuffers {
    /// Logits, [rows, vocab].
    pub logits: DevicePtr,
    /// Labels, `[rows]` int64; [`crate::scores::MASKED`] scores nothing.
    pub labels: DevicePtr,
    /// Logits of the baseline, [rows, vocab], or 0.
    pub baseline: DevicePtr,
    /// Negative log-likelihood of the label in nats, `[rows]` float32.
    pub nll: DevicePtr,
    /// Entropy in nats, `[rows]` float32.
    pub entropy: DevicePtr,
    /// First token of the largest logit, `[rows]` int64; -1 in a row with NaN.
    pub top1: DevicePtr,
    /// KL(baseline || this) in nats, `[rows]` float32.
    pub kl: DevicePtr,
    /// Negative log-likelihood under the baseline, `[rows]` float32.
    pub baseline_nll: DevicePtr,
}

/// [`crate::token_scores`] on a device, for given sizes.
///
/// The same definitions hold, with exponentials and sums in float64 over one pass; the CPU's results
/// are within 1e-6 of these, relatively. One thing differs: a device
/// cannot refuse a label outside the vocabulary; its row's nll and baseline nll are NaN.
#[derive(Debug, Clone)]
pub struct ScoresPlan {
    function: Function,
    rows: u32,
    vocab: u32,
    logits: FloatType,
    baseline: Option<FloatType>,
}

impl ScoresPlan {
    /// A plan for `rows` rows of `vocab` logits, and of baseline logits where their type is given.
    /// The first one of a device loads the kernels.
    ///
    /// # Errors
    /// A vocabulary of zero, sizes past 2^31 - 1, or kernels that cannot be had.
    pub fn new(
        gpu: &'static Gpu,
        rows: usize,
        vocab: usize,
        logits: FloatType,
        baseline: Option<FloatType>,
    ) -> Result<Self, CudaError> {
        if vocab == 0 {
            return Err(Error::ZeroDimension("vocabulary").into());
        }
        let count = |what: &str, n: usize| {
            i32::try_from(n).map(i32::cast_unsigned).map_err(|_| {
                CudaError::Unsupported(format!("{n} {what}: at most 2147483647 on a GPU"))
            })
        };
        let (rows, vocab) = (count("rows", rows)?, count("logits a row", vocab)?);
        let name = match baseline {
            None => "token_scores",
            Some(_) => "token_scores_baseline",
        };
        let function = gpu.function(UNIT, name)?;
        Ok(Self { function, rows, vocab, logits, baseline })
    }

    /// Enqueues the scores of every row on `stream`.
    ///
    /// # Safety
    /// The buffers are device memory of the plan's device, as long as the plan's sizes say, each
    /// aligned to its elements, and stay valid until the stream has run the work.
    ///
    /// # Errors
    /// A baseline where the plan has none or the other way round, and a launch that CUDA refuses.
    #[allow(unsafe_code)]
    pub unsafe fn run(&self, stream: Stream, buffers: &ScoresBuffers) -> Result<(), CudaError> {
        let b = buffers;
        let mut args = Args::new().with(b.logits);
        match self.baseline {
            Some(_) if b.baseline == 0 && self.rows > 0 => {
                return Err(CudaError::Unsupported(
                    "token scores planned with a baseline are given none".into(),
                ));
            }
            None if b.baseline != 0 => {
                return Err(CudaError::Unsupported(
                    "token scores planned without a baseline are given one".into(),
                ));
            }
            Some(_) => args.push(b.baseline),
            None => {}
        }
        for pointer in [b.labels, b.nll, b.entropy, b.top1] {
            args.push(pointer);
        }
        if self.baseline.is_some() {
            args.push(b.kl);
            args.push(b.baseline_nll);
        }
        args.push(self.vocab);
        args.push(code(self.logits));
        if let Some(baseline) = self.baseline {
            args.push(code(baseline));
        }
        let shape = Launch::linear(self.rows, THREADS);
        // SAFETY: the arguments in the kernel's order; the caller promises the rest.
        unsafe { self.function.launch(&shape, stream, &mut args) }
    }
}

/// `TYPE_…` in the source.
fn code(float: FloatType) -> i32 {
    match float {
        FloatType::F32 => 0,
        FloatType::F16 => 1,
        FloatType::Bf16 => 2,
    }
}
