//! `y = alpha * x * w^T (+ beta * bias)` on fp8 tensor cores: both operands E4M3, each with one
//! scale for the whole tensor ("real NV-FP8", current scaling).
//!
//! X's largest magnitude is found (`fold.cu`), X becomes codes (`fp8.cu`), cuBLASLt multiplies the
//! codes as they lie, and the factor `alpha * scale of x * scale of w` is applied to its sums: by
//! cuBLASLt where that gives Y, else by `finish.cu`.
//!
//! # Numbers
//!
//! Codes and X's scale have the CPU's bits, and a NaN code makes NaN. Sums do not have the bound of
//! the other paths. Tensor cores of Ada and Hopper align the products of one step (32; 16 on Ada) and
//! the running sum to the largest exponent among them and drop what lies more than 13 bits below it
//! (DeepSeek-V3 report, arXiv:2412.19437, section 3.5.2; bit by bit in arXiv:2511.10909); Blackwell
//! keeps 25 bits. cuBLASLt, with fast accumulation off, adds the running sum to a float32 now and
//! then; NVIDIA does not say how often. With S = sum |x_i w_i| the error is at most
//!
//! - 2^-9 S for zero-mean random data: tested; a model of the hardware gives 2^-11;
//! - 2^-6 S for data of one sign: tested; the model gives 2^-9.6 where the sum is promoted every 128
//!   k, 2^-7.2 every 512 k, and 2^-3.7 for k = 4096 without promotion;
//! - (8 + L/32) 2^-8 S for any data, where L is the k between promotions (NVIDIA's open kernels have
//!   128). A step of 32 loses less than 32 * 2^-13 * 2^e, where e is the exponent that it aligns to:
//!   that of the running sum, of which |sum| <= S, or that of a product, which is at least 2^e / 8
//!   (one factor may be subnormal, and with two nothing is dropped). Over L/32 steps the former add
//!   up to L/32 * S, the latter to 8 S. Blackwell's 25 bits make it 2^-12 of that.
#![allow(unsafe_code)]

use super::{
    Args, CudaError, DevicePtr, FloatType, Gpu, Launch, Stream, Unit,
    blas::{self, Dense, DenseBuffers, DenseProblem, Factor},
    linear::LARGEST_BLOCKS,
    params::{Fp8Codes, Quant},
};
use crate::{ElementFormat, LinearProblem, QuantSpec, ScaleKind};

/// [`LinearPlan::path_name`](super::LinearPlan::path_name) of a product on fp8 tensor cores.
///
/// It is taken where weight and activation are E4M3 under a tensor scale, n is a multiple of 16, the
/// device has compute capability 8.9 or higher and cuBLASLt can be loaded. Its sums do not have the
/// bound of the others: with S = sum |x_i w_i| the error is at most 2^-9 S for zero-mean random data,
/// 2^-6 S for data of one sign and (8 + L/32) 2^-8 S for any, where cuBLASLt adds to float32 every L k
/// (`docs/cuda.md`).
pub const PATH: &str = "fp8 cublaslt";

pub(super) const UNIT: Unit = Unit::plain("fp8");

/// Lowest compute capability with fp8 tensor cores.
const LOWEST: (u32, u32) = (8, 9);
/// Codes of k and features that cuBLASLt's fp8 products come in.
const GRAIN: usize = 16;
/// k that one block of `fp8_codes` takes.
const BLOCK_K: usize = 1024;
/// Bytes of the three scales that the kernel leaves behind: X's own, the factor of the sums, 1.
pub(super) const SCALES_BYTES: usize = 48;
const FACTOR: u64 = 16;
const ONE: u64 = 32;

/// cuBLASLt's fp8 product for a plan.
#[derive(Debug, Clone)]
pub(super) struct Fp8 {
    gpu: &'static Gpu,
    problem: LinearProblem,
    x_type: FloatType,
    quant: Quant,
    /// The product of a whole piece of X, and of the rows that are left over.
    products: [(usize, Dense); 2],
    /// Whether cuBLASLt leaves sums in float32 that the last kernel scales.
    partial: bool,
}

/// Where a piece's operands lie.
#[derive(Debug, Clone, Copy)]
pub(super) struct Buffers {
    /// [rows, k] of X's type.
    pub x: DevicePtr,
    /// [`LARGEST_BLOCKS`] partial maxima of the whole X.
    pub amax: DevicePtr,
    /// [rows, row bytes].
    pub x_codes: DevicePtr,
    /// [`SCALES_BYTES`].
    pub scales: DevicePtr,
    /// A byte a row.
    pub bad: DevicePtr,
    /// A word, or 0 where the last kernel looks at every sum.
    pub any_bad: DevicePtr,
    /// [n, row bytes].
    pub w_codes: DevicePtr,
    /// One float32.
    pub w_scale: DevicePtr,
    /// `[n]` of X's type, or 0.
    pub bias: DevicePtr,
    /// Y, or float32 sums.
    pub out: DevicePtr,
    /// [`blas::WORKSPACE`] bytes.
    pub workspace: DevicePtr,
}

impl Fp8 {
    /// The product of `m` rows in pieces of `piece`, or `None` where other kernels have to do.
    pub fn new(
        gpu: &'static Gpu,
        problem: &LinearProblem,
        (m, piece): (usize, usize),
        x_type: FloatType,
        has_bias: bool,
    ) -> Option<Self> {
        let spec = problem.activation.filter(|_| applies(gpu, problem))?;
        let make = |partial: bool| {
            let product = |rows: usize| {
                let dense = DenseProblem {
                    m: rows,
                    n: problem.n,
                    k: problem.k.next_multiple_of(GRAIN),
                    pitch: problem.weight.row_bytes(problem.k),
                    factor: Factor::Fp8E4M3,
                    out: if partial { FloatType::F32 } else { x_type },
                    bias: has_bias && !partial,
                    split: false,
                };
                Dense::new(gpu, dense).ok().map(|dense| (rows, dense))
            };
            let whole = product(piece)?;
            let left = if m.is_multiple_of(piece) { whole } else { product(m % piece)? };
            let (problem, quant) = (*problem, Quant::of(&spec));
            Some(Self { gpu, problem, x_type, quant, products: [whole, left], partial })
        };
        let direct = if goes_direct(problem, x_type, has_bias) { make(false) } else { None };
        direct.or_else(|| make(true))
    }

    /// Whether cuBLASLt leaves float32 sums rather than Y.
    pub fn partial(&self) -> bool {
        self.partial
    }

    /// Bytes of one row of X's codes: as many as of W's.
    pub fn row_bytes(&self) -> usize {
        self.problem.weight.row_bytes(self.problem.k)
    }

    /// Enqueues quantisation and product of `rows` rows.
    ///
    /// # Safety
    /// The buffers are as long as [`Buffers`] says and stay valid until the stream has run the work.
    ///
    /// # Errors
    /// A Y that is not aligned, a launch that CUDA refuses.
    pub unsafe fn run(&self, stream: Stream, rows: usize, b: &Buffers) -> Result<(), CudaError> {
        if !b.out.is_multiple_of(16) {
            return Err(CudaError::Unsupported("Y is not aligned to 16 bytes".into()));
        }
        let product = self.products.iter().find(|(m, _)| *m == rows);
        let Some((_, product)) = product else {
            return Err(CudaError::Unsupported(format!("no product was planned for {rows} rows")));
        };
        let factor = if self.partial { ONE } else { FACTOR };
        let buffers = DenseBuffers {
            x: b.x_codes,
            w: b.w_codes,
            scales: [b.scales + factor, b.scales + ONE],
            bias: b.bias,
            d: b.out,
            workspace: b.workspace,
        };
        // SAFETY: as the caller promises; both operands have rows of `row_bytes`.
        unsafe {
            self.quantise(stream, rows, b)?;
            product.run(stream, 1.0, &buffers)
        }
    }

    unsafe fn quantise(&self, stream: Stream, rows: usize, b: &Buffers) -> Result<(), CudaError> {
        let codes = Fp8Codes {
            x: b.x,
            codes: b.x_codes,
            amax: b.amax,
            scale_w: b.w_scale,
            scales: b.scales,
            bad: b.bad,
            any_bad: b.any_bad,
            amax_count: LARGEST_BLOCKS as i32,
            m: rows as i32,
            k: self.problem.k as i32,
            pitch: self.row_bytes() as i32,
            kind: self.x_type as i32,
            alpha: self.problem.alpha,
            quant: self.quant,
        };
        let across = self.row_bytes().div_ceil(BLOCK_K);
        // As many blocks as run at a time: each has to find the scale first.
        let most = (self.gpu.attributes().multiprocessors as usize * 16).div_ceil(across);
        let grid = (across as u32, rows.min(most) as u32, 1);
        let shape = Launch::new(grid, (128, 1, 1)).overlap(rows <= 128);
        let function = self.gpu.function(UNIT, "fp8_codes")?;
        // SAFETY: rows and widths are the buffers'.
        unsafe { function.launch(&shape, stream, &mut Args::new().with(codes)) }
    }
}

/// Whether fp8 tensor cores can have the product: E4M3 under a tensor scale on both sides, and
/// features in whole grains (k always is: rows of codes are padded).
fn applies(gpu: &Gpu, problem: &LinearProblem) -> bool {
    let fits =
        |spec: &QuantSpec| spec.format == ElementFormat::Fp8E4M3 && spec.scale == ScaleKind::Tensor;
    gpu.attributes().capability >= LOWEST
        && fits(&problem.weight)
        && problem.activation.as_ref().is_some_and(fits)
        && problem.n.is_multiple_of(GRAIN)
}

/// Whether cuBLASLt can give Y itself. Its bias is of 16 bits and has no factor. And where the last
/// grain of k reaches behind the row's end, an imported weight may hold NaN there: the last kernel
/// looks at every sum that is not finite.
fn goes_direct(problem: &LinearProblem, x_type: FloatType, has_bias: bool) -> bool {
    let biased = !has_bias || (x_type != FloatType::F32 && problem.beta == 1.0);
    biased && problem.k.is_multiple_of(GRAIN)
}

/// Loads what [`Fp8`] needs, where a problem may take it.
///
/// # Errors
/// A kernel that does not compile or load.
pub(super) fn prepare(gpu: &'static Gpu, problem: &LinearProblem) -> Result<(), CudaError> {
    if applies(gpu, problem) {
        gpu.function(UNIT, "fp8_codes")?;
        // Without cuBLASLt plans take other kernels, as `LinearPlan::path_name` tells.
        let _ = blas::prepare(gpu);
    }
    Ok(())
}
