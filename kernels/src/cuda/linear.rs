//! `y = alpha * x * w^T (+ beta * bias)` on packed weights.
//!
//! Three kernels, one after the other: x is quantised and folded to bfloat16 (`fold.cu`), the
//! product runs on tensor cores with the weight decoded on its way to registers (`linear.cu`), and
//! partial sums are added, scaled and written (`finish.cu`). Values that no normal bfloat16 holds
//! mark their row or column, whose sums the last kernel takes again in fp64. On compute capability
//! 9.0 more than a few rows run in `wide.cu`; elsewhere many rows go through cuBLASLt, with W decoded
//! to memory. Products of E4M3 under tensor scales go to fp8 tensor cores instead where there are any
//! (`fp8.rs`).
#![allow(unsafe_code)]

mod launches;

use super::{
    Choice, CudaError, DevicePtr, FloatType, Gpu, Stream, Unit,
    blas::{self, Dense, DenseProblem, Factor},
    fp8::{self, Fp8},
    tiles::{self, Route, STEP, Tiling},
    wide::Wide,
};
use crate::{ElementFormat, LinearProblem, QuantSpec, ScaleKind};

pub(super) use launches::launch_finish;

pub(super) const FOLD: Unit = Unit::plain("fold");
pub(super) const FINISH: Unit = Unit::plain("finish");

/// k that one block of `fold` takes.
pub(super) const FOLD_K: usize = 1024;
/// Blocks of the search for a tensor's largest magnitude.
pub(super) const LARGEST_BLOCKS: usize = 256;
/// Rows beyond which a product runs in several pieces: scratch memory stays below about this.
const MOST_SCRATCH: usize = 512 << 20;
/// Most rows of one piece: the last kernel has one block a row in y.
const MOST_ROWS: usize = 32 << 10;
/// Rows from which on a weight is worth decoding to memory.
const DENSE_ROWS: usize = 512;
/// Most scratch memory of a product whose weight is decoded to memory.
const MOST_DENSE: usize = 1 << 30;
/// Alignment of each part of the scratch memory.
const ALIGN: usize = 256;

/// Where the operands of one product lie in device memory.
#[derive(Debug, Clone, Copy)]
pub struct LinearBuffers {
    /// X, [m, k].
    pub x: DevicePtr,
    /// Packed codes, [n, row bytes], aligned to 16 bytes.
    pub codes: DevicePtr,
    /// Scales, [n, blocks] bytes for `e8m0`, one float32 for `tensor`, 0 for `none`.
    pub scales: DevicePtr,
    /// Bias, `[n]` of X's type, or 0.
    pub bias: DevicePtr,
    /// Y, [m, n] of X's type, aligned to 16 bytes.
    pub y: DevicePtr,
    /// At least [`LinearPlan::scratch_bytes`] bytes, aligned to 256.
    pub scratch: DevicePtr,
}

/// How a product of given size is computed on a device. Sums have the bound of the CPU's, but on
/// [fp8 tensor cores](super::FP8_PATH).
#[derive(Debug, Clone)]
pub struct LinearPlan {
    gpu: &'static Gpu,
    problem: LinearProblem,
    m: usize,
    x_type: FloatType,
    has_bias: bool,
    /// Rows that run at a time.
    piece: usize,
    layout: Layout,
    path: Path,
}

/// Which kernels compute the product.
#[derive(Debug, Clone)]
enum Path {
    /// No rows.
    Nothing,
    /// `linear.cu`: W is decoded on its way to the tensor cores.
    Fused(Tiling),
    /// `wide.cu`: the same for many rows, on compute capability 9.0.
    Wide(Wide),
    /// W is decoded to bfloat16 in memory, then cuBLASLt.
    Dense(Dense),
    /// cuBLASLt on the codes of both operands.
    Fp8(Box<Fp8>),
}

/// Where the parts of the scratch memory begin.
#[derive(Debug, Clone, Copy, Default)]
struct Layout {
    bad_m: usize,
    bad_n: usize,
    amax: usize,
    scale: usize,
    any_bad: usize,
    weight: usize,
    workspace: usize,
    partial: usize,
    total: usize,
}

impl LinearPlan {
    /// Loads every kernel that products like `problem` need: compiling takes up to seconds and
    /// cannot happen while a stream is being captured.
    ///
    /// # Errors
    /// No way to compile, or a driver that refuses the result.
    pub fn prepare(gpu: &'static Gpu, problem: &LinearProblem) -> Result<(), CudaError> {
        Tiling::prepare(gpu, problem.weight.format)?;
        Wide::prepare(gpu, problem);
        gpu.function(tiles::unit(problem.weight.format), "dequantise")?;
        for name in ["fold", "fold_tiles", "fold_tiles_bf16", "largest"] {
            gpu.function(FOLD, name)?;
        }
        for name in ["finish", "repair"] {
            gpu.function(FINISH, name)?;
        }
        fp8::prepare(gpu, problem)
    }

    /// A plan for `m` rows of `x_type`.
    ///
    /// # Errors
    /// An invalid specification, a dimension of zero, or sizes beyond 2^31.
    pub fn new(
        gpu: &'static Gpu,
        problem: &LinearProblem,
        m: usize,
        x_type: FloatType,
        has_bias: bool,
    ) -> Result<Self, CudaError> {
        Self::choosing(gpu, problem, m, x_type, has_bias, Choice::from_env())
    }

    /// The same by kernels of the caller's choice, for tests and measurements. Where the choice
    /// does not apply, the next best is taken; [`Self::path`] tells.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn choosing(
        gpu: &'static Gpu,
        problem: &LinearProblem,
        m: usize,
        x_type: FloatType,
        has_bias: bool,
        choice: Choice,
    ) -> Result<Self, CudaError> {
        check_problem(problem, m)?;
        let mut piece = m.min(MOST_ROWS);
        loop {
            let plan = Self::with_piece(gpu, problem, (m, piece), x_type, has_bias, choice)?;
            if plan.layout.total <= MOST_SCRATCH || piece <= 128 {
                return Ok(plan);
            }
            piece = piece.div_ceil(2).next_multiple_of(128);
        }
    }

    fn with_piece(
        gpu: &'static Gpu,
        problem: &LinearProblem,
        (m, piece): (usize, usize),
        x_type: FloatType,
        has_bias: bool,
        choice: Choice,
    ) -> Result<Self, CudaError> {
        let problem = *problem;
        let (layout, path) = (Layout::default(), Path::Nothing);
        let mut plan = Self { gpu, problem, m, x_type, has_bias, piece, layout, path };
        if m == 0 {
            return Ok(plan);
        }
        if choice != Choice::Fused
            && let Some(fp8) = Fp8::new(gpu, &problem, (m, piece), x_type, has_bias)
        {
            plan.path = Path::Fp8(Box::new(fp8));
            plan.lay_out();
            return Ok(plan);
        }
        let rows = plan.terms() * piece;
        let division = match choice {
            Choice::Wide { tile, splits } => Some((tile, splits)),
            _ => None,
        };
        if !matches!(choice, Choice::Fused | Choice::Dense)
            && let Some(wide) = Wide::new(gpu, &problem, rows, division)?
        {
            plan.path = Path::Wide(wide);
            plan.lay_out();
            return Ok(plan);
        }
        if choice != Choice::Fused
            && let Some(dense) = plan.dense()
        {
            plan.path = Path::Dense(dense);
            plan.lay_out();
            if plan.layout.total <= MOST_DENSE {
                return Ok(plan);
            }
        }
        plan.path = Path::Fused(Tiling::new(
            gpu,
            problem.weight.format,
            (rows, problem.n, problem.k, 1),
            route(&problem),
        )?);
        plan.lay_out();
        Ok(plan)
    }

    /// cuBLASLt's product, where there are rows enough for it and it can be had.
    fn dense(&self) -> Option<Dense> {
        let rows = self.terms() * self.m;
        if rows < DENSE_ROWS || self.piece < self.m {
            return None;
        }
        let out = if self.dense_partial() { FloatType::F32 } else { self.x_type };
        let width = self.problem.k.next_multiple_of(8);
        let problem = DenseProblem {
            m: rows,
            n: self.problem.n,
            k: width,
            pitch: width,
            factor: Factor::Bf16,
            out,
            bias: self.has_bias && !self.dense_partial(),
            split: false,
        };
        Dense::new(self.gpu, problem).ok()
    }

    /// Whether a dense product goes through fp32: cuBLASLt writes no float16 of bfloat16 factors,
    /// and adds a bias as it is.
    fn dense_partial(&self) -> bool {
        self.terms() > 1
            || self.tensor_scale()
            || self.x_type == FloatType::F16
            || (self.has_bias && self.problem.beta != 1.0)
    }

    fn lay_out(&mut self) {
        let mut at = 0;
        let mut part = |bytes: usize| {
            let start = at;
            at = (start + bytes).next_multiple_of(ALIGN);
            start
        };
        let rows = self.terms() * self.piece;
        let fp8 = matches!(self.path, Path::Fp8(_));
        part(self.padded(self.piece) * self.width() * if fp8 { 1 } else { 2 });
        let dense = matches!(self.path, Path::Dense(_));
        let bad_m = part(self.piece * self.parts());
        let bad_n = part(self.parts_n(self.piece) * self.problem.n);
        let amax = part(LARGEST_BLOCKS * 4);
        let scale = part(fp8::SCALES_BYTES);
        let any_bad = part(4);
        let weight = part(if dense { self.problem.n * self.width() * 2 } else { 0 });
        let workspace = part(if dense || fp8 { blas::WORKSPACE } else { 0 });
        let partial =
            part(if self.partial() { self.splits() * rows * self.problem.n * 4 } else { 0 });
        self.layout =
            Layout { bad_m, bad_n, amax, scale, any_bad, weight, workspace, partial, total: at };
    }

    /// Bytes of scratch memory that [`Self::run`] needs.
    pub fn scratch_bytes(&self) -> usize {
        self.layout.total
    }

    /// [`Self::path_name`] with the tile and the shares of k, for tests and measurements.
    pub fn path(&self) -> String {
        match &self.path {
            Path::Fused(tiling) => {
                let end = if tiling.whole { ", whole" } else { "" };
                format!("fused_{}, {} splits{end}", tiling.rows, tiling.splits)
            }
            Path::Wide(wide) => format!("wide_{}, {} splits", wide.tile, wide.splits),
            _ => self.path_name().into(),
        }
    }

    /// Which kernels compute the product: [`FP8_PATH`](super::FP8_PATH), `dense` (W decoded to
    /// memory, then cuBLASLt), `fused` or `wide` (W decoded on its way to tensor cores) or, for no
    /// rows, `nothing`.
    pub fn path_name(&self) -> &'static str {
        match self.path {
            Path::Nothing => "nothing",
            Path::Fused(_) => "fused",
            Path::Wide(_) => "wide",
            Path::Dense(_) => "dense",
            Path::Fp8(_) => fp8::PATH,
        }
    }

    /// bfloat16 terms that hold a value of X exactly.
    fn terms(&self) -> usize {
        match (self.problem.activation, self.x_type) {
            (Some(_), _) | (None, FloatType::Bf16) => 1,
            (None, FloatType::F16) => 2,
            (None, FloatType::F32) => 3,
        }
    }

    fn steps(&self) -> usize {
        self.problem.k.div_ceil(STEP)
    }

    /// k of the folded X, or of its codes.
    fn width(&self) -> usize {
        match &self.path {
            Path::Fp8(fp8) => fp8.row_bytes(),
            Path::Dense(_) => self.problem.k.next_multiple_of(8),
            _ => self.steps() * STEP,
        }
    }

    /// Blocks that each say of every row whether they saw something that does not fit.
    fn parts(&self) -> usize {
        match self.path {
            Path::Fp8(_) => 1,
            _ => self.width().div_ceil(FOLD_K),
        }
    }

    /// Blocks that each say of every column whether they saw something that does not fit.
    fn parts_n(&self, rows: usize) -> usize {
        match self.path {
            // NaN of W comes out of the product.
            Path::Fp8(_) => 0,
            Path::Fused(tiling) => tiling.splits * (self.padded(rows) / tiling.rows),
            Path::Wide(wide) => wide.splits * (self.padded(rows) / wide.tile),
            _ => self.width().div_ceil(FOLD_K),
        }
    }

    /// Rows of the folded X, whole tiles.
    fn padded(&self, rows: usize) -> usize {
        match self.path {
            Path::Fused(tiling) => (self.terms() * rows).next_multiple_of(tiling.rows),
            Path::Wide(wide) => (self.terms() * rows).next_multiple_of(wide.tile),
            _ => self.terms() * rows,
        }
    }

    fn splits(&self) -> usize {
        match self.path {
            Path::Fused(tiling) => tiling.splits,
            Path::Wide(wide) => wide.splits,
            _ => 1,
        }
    }

    /// Whether the product kernel leaves partial sums rather than Y.
    fn partial(&self) -> bool {
        match &self.path {
            Path::Fp8(fp8) => fp8.partial(),
            Path::Dense(_) => self.dense_partial(),
            Path::Fused(tiling) if tiling.whole => false,
            _ => self.splits() > 1 || self.terms() > 1 || self.tensor_scale(),
        }
    }

    /// The word that says whether Y needs a repair; 0 where the last kernel looks at every sum.
    fn any_bad(&self, b: &LinearBuffers) -> DevicePtr {
        if self.partial() || self.whole() { 0 } else { b.scratch + self.layout.any_bad as u64 }
    }

    /// Whether the product kernel ends the product.
    fn whole(&self) -> bool {
        matches!(self.path, Path::Fused(tiling) if tiling.whole)
    }

    fn tensor_scale(&self) -> bool {
        self.problem.weight.scale == ScaleKind::Tensor
    }

    /// Enqueues the product on `stream`.
    ///
    /// # Safety
    /// The buffers are device memory of the plan's device, as long as the plan's shapes say, and
    /// stay valid until the stream has run the work. No other work uses the scratch meanwhile.
    ///
    /// # Errors
    /// A buffer that is not aligned, a launch that CUDA refuses.
    pub unsafe fn run(&self, stream: Stream, buffers: &LinearBuffers) -> Result<(), CudaError> {
        if self.m == 0 {
            return Ok(());
        }
        // cuBLASLt takes a bias as it lies; our own kernels take it element by element.
        let bias =
            if matches!(self.path, Path::Dense(_) | Path::Fp8(_)) { buffers.bias } else { 0 };
        let aligned = [(buffers.codes, 16), (buffers.scales, 4), (buffers.y, 16), (bias, 16)];
        if aligned.iter().any(|(at, bytes)| !at.is_multiple_of(*bytes)) {
            return Err(CudaError::Unsupported(
                "packed codes, y or the bias are not aligned to 16 bytes, or scales not to 4"
                    .into(),
            ));
        }
        // SAFETY: as the caller promises; every kernel below stays within the plan's shapes.
        unsafe {
            if self.tensor_scale() && self.problem.activation.is_some() {
                self.largest(stream, buffers)?;
            }
            for first in (0..self.m).step_by(self.piece) {
                let rows = self.piece.min(self.m - first);
                let size = self.x_type.bytes();
                let piece = LinearBuffers {
                    x: buffers.x + (first * self.problem.k * size) as u64,
                    y: buffers.y + (first * self.problem.n * size) as u64,
                    ..*buffers
                };
                if let Path::Fp8(fp8) = &self.path {
                    fp8.run(stream, rows, &self.fp8_buffers(&piece))?;
                } else {
                    self.bf16_product(stream, &piece, rows)?;
                }
                if !self.whole() {
                    self.finish(stream, &piece, rows)?;
                }
            }
        }
        Ok(())
    }
}

/// How this weight can reach the tensor cores.
fn route(problem: &LinearProblem) -> Route {
    let weight = &problem.weight;
    let streams = problem.k.is_multiple_of(STEP)
        && weight.row_bytes(problem.k).is_multiple_of(16)
        && (weight.scale != ScaleKind::E8M0 || weight.block_size == 32);
    match weight.scale {
        _ if !streams => Route::Shared,
        ScaleKind::Tensor => Route::Registers,
        _ => Route::Whole,
    }
}

/// How `fold` orders X for weights of a format.
pub(super) fn order(format: ElementFormat) -> i32 {
    match format.bits() {
        16 => 0,
        8 => 1,
        _ => 2,
    }
}

/// Power of two that X carries for weights of a format; `SHIFT` of `weights.cuh`.
pub(super) fn shift(format: ElementFormat) -> i32 {
    if format == ElementFormat::Bf16 { 0 } else { 32 }
}

/// Widest copy that rows of W are aligned for.
pub(super) fn copy_bytes(codes: DevicePtr, row_bytes: usize) -> i32 {
    let aligned =
        |bytes: u64| codes.is_multiple_of(bytes) && (row_bytes as u64).is_multiple_of(bytes);
    [16, 8].into_iter().find(|&bytes| aligned(bytes)).unwrap_or(4) as i32
}

/// Checks what the kernels' 32-bit sizes rely on.
fn check_problem(problem: &LinearProblem, m: usize) -> Result<(), CudaError> {
    let zero = |what| Err(CudaError::Problem(crate::Error::ZeroDimension(what)));
    if problem.n == 0 {
        return zero("n");
    }
    if problem.k == 0 {
        return zero("k");
    }
    let check = |spec: &QuantSpec| spec.validate();
    check(&problem.weight)?;
    problem.activation.as_ref().map_or(Ok(()), check)?;
    let tensor = |spec: &QuantSpec| spec.scale == ScaleKind::Tensor;
    if problem.activation.is_some_and(|x| tensor(&x) != tensor(&problem.weight)) {
        return Err(CudaError::Unsupported(
            "a tensor scale of one operand beside another kind of scale of the other".into(),
        ));
    }
    let most = i32::MAX as usize - (1 << 16);
    if problem.n > most || problem.k > most || problem.weight.row_bytes(problem.k) > most {
        let (n, k) = (problem.n, problem.k);
        return Err(CudaError::Unsupported(format!(
            "a weight of {n} x {k} is beyond 32-bit sizes"
        )));
    }
    match (m as u64).checked_mul(problem.k.max(problem.n) as u64) {
        Some(elements) if elements < 1 << 40 => Ok(()),
        _ => Err(CudaError::Unsupported(format!("{m} rows are too many"))),
    }
}
