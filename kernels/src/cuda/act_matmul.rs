//! Products of two matrices that are both quantised on the fly.
//!
//! B is quantised and folded to a bfloat16 weight, A as X of a linear layer; then the kernels of a
//! linear layer run, one launch for all products of a [`Run`]. A column of B that no normal
//! bfloat16 holds is NaN in the weight, which the product marks as it marks such codes of a weight.
#![allow(unsafe_code)]

use super::{
    Args, CudaError, DevicePtr, FloatType, Gpu, Launch, Stream,
    batches::{Run, runs},
    linear::{FINISH, FOLD, FOLD_K, launch_finish},
    params::{Finish, Fold, FoldB, FoldLayout, Linear, Operand, Quant},
    tiles::{FRAGMENT_ROWS, Route, STEP, Tiling},
};
use crate::{ActMatMulProblem, ElementFormat, QuantSpec};

/// Products of one launch: a grid has 65535 blocks in y and z at most.
const MOST_PRODUCTS: usize = 32 << 10;
/// Rows of one launch.
const MOST_ROWS: usize = 32 << 10;
/// Scratch memory that a launch of several products stays below.
const MOST_SCRATCH: usize = 512 << 20;
/// Alignment of each part of the scratch memory.
const ALIGN: usize = 256;

/// Where the operands of [`crate::act_matmul()`] lie in device memory.
#[derive(Debug, Clone, Copy)]
pub struct ActMatMulBuffers {
    /// A's matrices.
    pub a: DevicePtr,
    /// B's matrices.
    pub b: DevicePtr,
    /// The products, aligned to 16 bytes.
    pub y: DevicePtr,
    /// At least [`ActMatMulPlan::scratch_bytes`] bytes, aligned to 256.
    pub scratch: DevicePtr,
}

/// How products of given size are computed on a device.
#[derive(Debug, Clone)]
pub struct ActMatMulPlan {
    gpu: &'static Gpu,
    m: usize,
    n: usize,
    k: usize,
    a_spec: QuantSpec,
    b_spec: QuantSpec,
    transpose_b: bool,
    alpha: f32,
    element: FloatType,
    runs: Vec<(Run, Tiling)>,
    scratch_bytes: usize,
}

/// Where the parts of the scratch memory of one run begin.
#[derive(Debug, Clone, Copy)]
struct Layout {
    b: usize,
    a: usize,
    bad_m: usize,
    bad_n: usize,
    any_bad: usize,
    partial: usize,
    total: usize,
}

/// One launch: some rows of every product of a run.
struct Piece<'a> {
    run: &'a Run,
    tiling: &'a Tiling,
    layout: Layout,
    rows: usize,
    /// Of the first matrix of the run; y of the first row.
    buffers: ActMatMulBuffers,
}

impl ActMatMulPlan {
    /// Loads every kernel that plans use: compiling takes up to seconds and cannot happen while a
    /// stream is being captured.
    ///
    /// # Errors
    /// No way to compile, or a driver that refuses the result.
    pub fn prepare(gpu: &'static Gpu) -> Result<(), CudaError> {
        Tiling::prepare(gpu, ElementFormat::Bf16)?;
        for name in ["fold", "fold_b"] {
            gpu.function(FOLD, name)?;
        }
        for name in ["finish", "repair"] {
            gpu.function(FINISH, name)?;
        }
        Ok(())
    }

    /// A plan for matrices of `element`.
    ///
    /// # Errors
    /// As [`ActMatMulProblem::check_sizes`], or matrices beyond 2^31 rows or columns.
    pub fn new(
        gpu: &'static Gpu,
        problem: &ActMatMulProblem<'_>,
        element: FloatType,
    ) -> Result<Self, CudaError> {
        problem.check_sizes()?;
        let (m, n, k) = (problem.m, problem.n, problem.k);
        let most = i32::MAX as usize - (1 << 16);
        if m > most || n > most || k > most / 2 {
            return Err(CudaError::Unsupported(format!(
                "a product of {m} x {k} and {k} x {n} is beyond 32-bit sizes"
            )));
        }
        let mut plan = Self {
            gpu,
            m,
            n,
            k,
            a_spec: problem.a_spec,
            b_spec: problem.b_spec,
            transpose_b: problem.transpose_b,
            alpha: problem.alpha,
            element,
            runs: Vec::new(),
            scratch_bytes: 0,
        };
        let one = plan.product_bytes();
        let most = if m > MOST_ROWS { 1 } else { (MOST_SCRATCH / one).clamp(1, MOST_PRODUCTS) };
        for run in runs(problem.batches, most) {
            let sizes = (plan.piece_rows(), n, k, run.count);
            let tiling = Tiling::new(gpu, ElementFormat::Bf16, sizes, Route::Shared)?;
            plan.scratch_bytes = plan.scratch_bytes.max(plan.layout(&run, &tiling).total);
            plan.runs.push((run, tiling));
        }
        Ok(plan)
    }

    /// Bytes of scratch memory that [`Self::run`] needs.
    pub fn scratch_bytes(&self) -> usize {
        self.scratch_bytes
    }

    /// k as the folded operands have it.
    fn width(&self) -> usize {
        self.k.next_multiple_of(STEP)
    }

    fn piece_rows(&self) -> usize {
        self.m.min(MOST_ROWS)
    }

    /// Blocks of `fold` that share a row.
    fn parts(&self) -> usize {
        self.width().div_ceil(FOLD_K)
    }

    /// Scratch memory of one product, about.
    fn product_bytes(&self) -> usize {
        let rows = self.piece_rows().next_multiple_of(128);
        2 * self.width() * (rows + self.n) + 4 * rows * self.n
    }

    fn layout(&self, run: &Run, tiling: &Tiling) -> Layout {
        let mut at = 0;
        let mut part = |bytes: usize| {
            let start = at;
            at = (start + bytes).next_multiple_of(ALIGN);
            start
        };
        let (rows, splits) = (self.piece_rows(), tiling.splits);
        let partial = if splits > 1 { run.count * splits * rows * self.n * 4 } else { 0 };
        let mut layout = Layout {
            b: part(run.b.1 * self.n * self.width() * 2),
            a: part(run.a.1 * rows.next_multiple_of(tiling.rows) * self.width() * 2),
            bad_m: part(run.a.1 * rows * self.parts()),
            bad_n: part(run.count * rows.div_ceil(tiling.rows) * splits * self.n),
            any_bad: part(4),
            partial: part(partial),
            total: 0,
        };
        layout.total = at;
        layout
    }

    /// Enqueues the products on `stream`.
    ///
    /// # Safety
    /// The buffers are device memory of the plan's device, as long as the plan's shapes say, and
    /// stay valid until the stream has run the work. No other work uses the scratch meanwhile.
    ///
    /// # Errors
    /// A launch that CUDA refuses.
    pub unsafe fn run(&self, stream: Stream, buffers: &ActMatMulBuffers) -> Result<(), CudaError> {
        if !buffers.y.is_multiple_of(16) {
            return Err(CudaError::Unsupported("y is not aligned to 16 bytes".into()));
        }
        let size = self.element.bytes();
        let at = |base: DevicePtr, elements: usize| base + (elements * size) as u64;
        let mut folded = None;
        for (run, tiling) in &self.runs {
            for row in (0..self.m).step_by(MOST_ROWS) {
                let piece = Piece {
                    run,
                    tiling,
                    layout: self.layout(run, tiling),
                    rows: MOST_ROWS.min(self.m - row),
                    buffers: ActMatMulBuffers {
                        a: at(buffers.a, run.a.0 * self.m * self.k + row * self.k),
                        b: at(buffers.b, run.b.0 * self.k * self.n),
                        y: at(buffers.y, run.first * self.m * self.n + row * self.n),
                        scratch: buffers.scratch,
                    },
                };
                debug_assert!(row == 0 || run.count == 1);
                // SAFETY: as the caller promises; every kernel stays within the plan's shapes. B's
                // part of the scratch memory comes first, so that it is the same in every piece.
                unsafe {
                    if folded != Some(run.b) {
                        self.fold_b(stream, &piece)?;
                        folded = Some(run.b);
                    }
                    if tiling.splits == 1 {
                        self.gpu.clear(stream, piece.any_bad(), 1)?;
                    }
                    self.fold_a(stream, &piece)?;
                    self.product(stream, &piece)?;
                    self.finish(stream, &piece)?;
                }
            }
        }
        Ok(())
    }

    unsafe fn fold_b(&self, stream: Stream, p: &Piece<'_>) -> Result<(), CudaError> {
        let (count, width) = (p.run.b.1, self.width());
        let out = p.at(p.layout.b);
        if self.transpose_b {
            // Rows of [n, k] are what `fold` takes.
            let fold = Fold {
                x: p.buffers.b,
                out,
                x_batch: (self.n * self.k) as i64,
                out_batch: (self.n * width / 8) as i64,
                m: self.n as i32,
                rows: self.n as i32,
                order: 0,
                layout: FoldLayout::RowsNan as i32,
                quant: Quant::of(&self.b_spec),
                ..self.fold()
            };
            let grid = (self.n as u32, self.parts() as u32, count as u32);
            // SAFETY: rows and widths are the buffers'.
            return unsafe { self.launch_fold(stream, grid, fold) };
        }
        let fold = FoldB {
            b: p.buffers.b,
            out,
            b_batch: (self.k * self.n) as i64,
            n: self.n as i32,
            k: self.k as i32,
            kind: self.element as i32,
            width: width as i32,
            quant: Quant::of(&self.b_spec),
        };
        let blocks = width.div_ceil(self.b_spec.block_size).min(65535) as u32;
        let grid = (self.n.div_ceil(64) as u32, blocks, count as u32);
        let shape = Launch::new(grid, (64, 1, 1));
        // SAFETY: shapes are the buffers'.
        unsafe {
            self.gpu.function(FOLD, "fold_b")?.launch(&shape, stream, &mut Args::new().with(fold))
        }
    }

    /// What both operands have in common.
    fn fold(&self) -> Fold {
        Fold {
            x: 0,
            out: 0,
            bad: 0,
            amax: 0,
            scale: 0,
            any_bad: 0,
            x_batch: 0,
            out_batch: 0,
            amax_count: 0,
            m: 0,
            k: self.k as i32,
            kind: self.element as i32,
            rows: 0,
            width: self.width() as i32,
            terms: 1,
            order: 0,
            layout: FoldLayout::Rows as i32,
            shift: 0,
            parts: self.parts() as i32,
            quant: Quant::as_is(),
            _pad: 0,
        }
    }

    unsafe fn launch_fold(
        &self,
        stream: Stream,
        grid: (u32, u32, u32),
        fold: Fold,
    ) -> Result<(), CudaError> {
        let shape = Launch::new(grid, (128, 1, 1));
        // SAFETY: the caller answers for `fold`.
        unsafe {
            self.gpu.function(FOLD, "fold")?.launch(&shape, stream, &mut Args::new().with(fold))
        }
    }

    unsafe fn fold_a(&self, stream: Stream, p: &Piece<'_>) -> Result<(), CudaError> {
        let padded = p.padded();
        let fold = Fold {
            x: p.buffers.a,
            out: p.at(p.layout.a),
            bad: p.at(p.layout.bad_m),
            any_bad: p.any_bad(),
            x_batch: (self.m * self.k) as i64,
            out_batch: (padded * self.width() / 8) as i64,
            m: p.rows as i32,
            rows: padded as i32,
            layout: FoldLayout::Fragments as i32,
            quant: Quant::of(&self.a_spec),
            ..self.fold()
        };
        let grid = (padded as u32, self.parts() as u32, p.run.a.1 as u32);
        // SAFETY: rows and widths are the buffers'.
        unsafe { self.launch_fold(stream, grid, fold) }
    }

    unsafe fn product(&self, stream: Stream, p: &Piece<'_>) -> Result<(), CudaError> {
        let (width, padded, splits) = (self.width(), p.padded(), p.tiling.splits);
        let linear = Linear {
            codes: p.at(p.layout.b),
            scales: 0,
            x: p.at(p.layout.a),
            y: if p.partial() { p.at(p.layout.partial) } else { p.buffers.y },
            bias: 0,
            bad_n: p.at(p.layout.bad_n),
            any_bad: p.any_bad(),
            x_batch: (padded * width / 8) as i64,
            w_batch: (self.n * width * 2) as i64,
            n: self.n as i32,
            row_bytes: (width * 2) as i32,
            blocks: 0,
            block_shift: 5,
            steps: (width / STEP) as i32,
            splits: splits as i32,
            rows: p.rows as i32,
            tiles: (padded / FRAGMENT_ROWS) as i32,
            copy_bytes: 16,
            partial: i32::from(p.partial()),
            kind: self.element as i32,
            // The kernel before makes W.
            w_constant: 0,
            alpha: self.alpha,
            beta: 0.0,
            batches: p.run.batches,
        };
        let grid = (p.tiling.columns, p.row_blocks() as u32, (p.run.count * splits) as u32);
        let shape =
            Launch::new(grid, (p.tiling.threads, 1, 1)).shared(p.tiling.shared).overlap(true);
        // SAFETY: shapes and strides are the scratch memory's and Y's.
        unsafe { p.tiling.function.launch(&shape, stream, &mut Args::new().with(linear)) }
    }

    unsafe fn finish(&self, stream: Stream, p: &Piece<'_>) -> Result<(), CudaError> {
        let operand = |values, size: usize, (row_stride, k_stride): (usize, usize), spec| Operand {
            values,
            codes: 0,
            scales: 0,
            scale: 0,
            batch: size as i64,
            row_stride: row_stride as i64,
            k_stride: k_stride as i64,
            row_bytes: 0,
            kind: self.element as i32,
            quant: Quant::of(spec),
        };
        let b_strides = if self.transpose_b { (self.k, 1) } else { (1, self.n) };
        let finish = Finish {
            partial: if p.partial() { p.at(p.layout.partial) } else { 0 },
            y: p.buffers.y,
            bias: 0,
            bad_m: p.at(p.layout.bad_m),
            bad_n: p.at(p.layout.bad_n),
            factor_x: 0,
            factor_w: 0,
            any_bad: p.any_bad(),
            kind: self.element as i32,
            m: p.rows as i32,
            n: self.n as i32,
            k: self.k as i32,
            splits: p.tiling.splits as i32,
            terms: 1,
            parts_m: self.parts() as i32,
            parts_n: (p.tiling.splits * p.row_blocks()) as i32,
            alpha: self.alpha,
            beta: 0.0,
            x: operand(p.buffers.a, self.m * self.k, (self.k, 1), &self.a_spec),
            w: operand(p.buffers.b, self.k * self.n, b_strides, &self.b_spec),
            batches: p.run.batches,
        };
        // SAFETY: shapes and strides are the buffers'.
        unsafe { launch_finish(self.gpu, stream, &finish, p.partial(), p.run.count) }
    }
}

impl Piece<'_> {
    fn at(&self, offset: usize) -> DevicePtr {
        self.buffers.scratch + offset as u64
    }

    /// Whether the product kernel leaves partial sums rather than Y.
    fn partial(&self) -> bool {
        self.tiling.splits > 1
    }

    /// The word that says whether Y needs a repair; 0 where the last kernel looks at every sum.
    fn any_bad(&self) -> DevicePtr {
        if self.partial() { 0 } else { self.at(self.layout.any_bad) }
    }

    fn row_blocks(&self) -> usize {
        self.rows.div_ceil(self.tiling.rows)
    }

    /// Rows of a folded matrix of A.
    fn padded(&self) -> usize {
        self.row_blocks() * self.tiling.rows
    }
}
