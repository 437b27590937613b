//! The kernels of a product, one after the other.

use super::{
    FINISH, FOLD, LARGEST_BLOCKS, LinearBuffers, LinearPlan, Path, copy_bytes, order, shift,
};
use crate::{
    ElementFormat, QuantSpec, Rounding, ScaleKind,
    cuda::{
        Args, CudaError, FloatType, Gpu, Launch, Stream,
        blas::{Dense, DenseBuffers},
        fp8,
        linear::FOLD_K,
        params::{Batches, Dequantise, Finish, Fold, FoldLayout, Linear, Operand, Quant, WideArgs},
        tiles::{self, FRAGMENT_ROWS, Tiling},
        wide::Wide,
    },
};

impl LinearPlan {
    /// X folded to bfloat16, then the product.
    pub(super) unsafe fn bf16_product(
        &self,
        stream: Stream,
        b: &LinearBuffers,
        rows: usize,
    ) -> Result<(), CudaError> {
        let any_bad = self.any_bad(b);
        // SAFETY: as the caller of `run` promises.
        unsafe {
            if any_bad != 0 {
                self.gpu.clear(stream, any_bad, 1)?;
            }
            self.fold(stream, b, rows)?;
            match &self.path {
                Path::Nothing | Path::Fp8(_) => Ok(()),
                Path::Fused(tiling) => self.product(tiling, stream, b, rows),
                Path::Wide(wide) => self.wide_product(wide, stream, b, rows),
                Path::Dense(dense) => self.dense_product(dense, stream, b),
            }
        }
    }

    pub(super) fn fp8_buffers(&self, b: &LinearBuffers) -> fp8::Buffers {
        let at = |offset: usize| b.scratch + offset as u64;
        fp8::Buffers {
            x: b.x,
            amax: at(self.layout.amax),
            x_codes: b.scratch,
            scales: at(self.layout.scale),
            bad: at(self.layout.bad_m),
            any_bad: self.any_bad(b),
            w_codes: b.codes,
            w_scale: b.scales,
            bias: b.bias,
            out: if self.partial() { at(self.layout.partial) } else { b.y },
            workspace: at(self.layout.workspace),
        }
    }
    pub(super) unsafe fn largest(
        &self,
        stream: Stream,
        b: &LinearBuffers,
    ) -> Result<(), CudaError> {
        let mut args = Args::new()
            .with(b.x)
            .with(self.x_type as i32)
            .with((self.m * self.problem.k) as i64)
            .with(b.scratch + self.layout.amax as u64);
        let function = self.gpu.function(FOLD, "largest")?;
        // SAFETY: the whole of X is read; a partial result a block is written.
        unsafe { function.launch(&Launch::linear(LARGEST_BLOCKS as u32, 256), stream, &mut args) }
    }

    unsafe fn fold(&self, stream: Stream, b: &LinearBuffers, rows: usize) -> Result<(), CudaError> {
        let terms = self.terms();
        let padded = self.padded(rows);
        let layout = match self.path {
            Path::Fused(_) => FoldLayout::Fragments,
            Path::Wide(_) => FoldLayout::Tiles,
            _ => FoldLayout::Rows,
        };
        let fold = Fold {
            x: b.x,
            out: b.scratch,
            bad: b.scratch + self.layout.bad_m as u64,
            amax: b.scratch + self.layout.amax as u64,
            scale: b.scratch + self.layout.scale as u64,
            any_bad: self.any_bad(b),
            x_batch: 0,
            out_batch: 0,
            amax_count: LARGEST_BLOCKS as i32,
            m: rows as i32,
            k: self.problem.k as i32,
            kind: self.x_type as i32,
            rows: padded as i32,
            width: self.width() as i32,
            terms: terms as i32,
            order: order(self.problem.weight.format),
            layout: layout as i32,
            shift: shift(self.problem.weight.format),
            parts: self.parts() as i32,
            quant: self.x_quant(),
            _pad: 0,
        };
        let scaled = self.problem.activation.is_some_and(|x| x.scale == ScaleKind::E8M0);
        if layout == FoldLayout::Tiles && scaled {
            let shape = Launch::new((padded as u32 / 4, self.parts() as u32, 1), (128, 1, 1));
            let pairs = self.x_type == FloatType::Bf16
                && self.problem.k.is_multiple_of(8)
                && b.x.is_multiple_of(16)
                && self.problem.activation.is_some_and(|x| pairs_suffice(&x));
            let name = if pairs { "fold_tiles_bf16" } else { "fold_tiles" };
            let function = self.gpu.function(FOLD, name)?;
            // SAFETY: rows and widths are the buffers'.
            return unsafe { function.launch(&shape, stream, &mut Args::new().with(fold)) };
        }
        let blocks = (rows + padded - terms * rows) as u32;
        let shape = Launch::new((blocks, self.parts() as u32, 1), (128, 1, 1));
        // SAFETY: rows and widths are the buffers'.
        unsafe {
            self.gpu.function(FOLD, "fold")?.launch(&shape, stream, &mut Args::new().with(fold))
        }
    }

    fn x_quant(&self) -> Quant {
        self.problem.activation.as_ref().map_or_else(Quant::as_is, Quant::of)
    }

    unsafe fn product(
        &self,
        tiling: &Tiling,
        stream: Stream,
        b: &LinearBuffers,
        rows: usize,
    ) -> Result<(), CudaError> {
        let weight = &self.problem.weight;
        let padded = self.padded(rows);
        let partial = self.partial();
        let linear = Linear {
            codes: b.codes,
            scales: if weight.scale == ScaleKind::E8M0 { b.scales } else { 0 },
            x: b.scratch,
            y: if partial { b.scratch + self.layout.partial as u64 } else { b.y },
            bias: if self.has_bias && !partial { b.bias } else { 0 },
            bad_n: b.scratch + self.layout.bad_n as u64,
            any_bad: self.any_bad(b),
            x_batch: 0,
            w_batch: 0,
            n: self.problem.n as i32,
            row_bytes: weight.row_bytes(self.problem.k) as i32,
            blocks: weight.blocks(self.problem.k) as i32,
            block_shift: weight.block_size.trailing_zeros() as i32,
            steps: self.steps() as i32,
            splits: tiling.splits as i32,
            rows: (self.terms() * rows) as i32,
            tiles: (padded / FRAGMENT_ROWS) as i32,
            copy_bytes: copy_bytes(b.codes, weight.row_bytes(self.problem.k)),
            partial: i32::from(partial),
            kind: self.x_type as i32,
            w_constant: 1,
            alpha: self.problem.alpha,
            beta: self.problem.beta,
            batches: Batches::ONE,
        };
        if tiling.whole {
            let splits = tiling.splits as u32;
            let shape = Launch::new((tiling.columns * splits, 1, 1), (tiling.threads, 1, 1));
            let mut args = Args::new().with(linear).with(self.finish_args(b, rows));
            // SAFETY: shapes and strides are the buffers'.
            return unsafe {
                tiling.function.launch(&shape.cluster(splits).overlap(true), stream, &mut args)
            };
        }
        let grid = (tiling.columns, (padded / tiling.rows) as u32, tiling.splits as u32);
        let shape = Launch::new(grid, (tiling.threads, 1, 1)).shared(tiling.shared).overlap(true);
        // SAFETY: shapes and strides are the buffers'.
        unsafe { tiling.function.launch(&shape, stream, &mut Args::new().with(linear)) }
    }

    unsafe fn wide_product(
        &self,
        wide: &Wide,
        stream: Stream,
        b: &LinearBuffers,
        rows: usize,
    ) -> Result<(), CudaError> {
        let weight = &self.problem.weight;
        let padded = self.padded(rows);
        let partial = self.partial();
        let args = WideArgs {
            codes: b.codes,
            scales: if weight.scale == ScaleKind::E8M0 { b.scales } else { 0 },
            x: b.scratch,
            y: if partial { b.scratch + self.layout.partial as u64 } else { b.y },
            bias: if self.has_bias && !partial { b.bias } else { 0 },
            bad_n: b.scratch + self.layout.bad_n as u64,
            any_bad: self.any_bad(b),
            n: self.problem.n as i32,
            row_bytes: weight.row_bytes(self.problem.k) as i32,
            blocks: weight.blocks(self.problem.k) as i32,
            steps: self.steps() as i32,
            splits: wide.splits as i32,
            rows: (self.terms() * rows) as i32,
            padded: padded as i32,
            tiles_m: (padded / wide.tile) as i32,
            groups_n: wide.groups_n as i32,
            partial: i32::from(partial),
            kind: self.x_type as i32,
            alpha: self.problem.alpha,
            beta: self.problem.beta,
            _pad: 0,
        };
        let shape = Launch::new((wide.blocks, 1, 1), (wide.threads, 1, 1))
            .shared(wide.shared)
            .cluster(wide.cluster)
            .overlap(true);
        // SAFETY: shapes and strides are the buffers'.
        unsafe { wide.function.launch(&shape, stream, &mut Args::new().with(args)) }
    }

    /// W decoded to memory, then cuBLASLt.
    unsafe fn dense_product(
        &self,
        dense: &Dense,
        stream: Stream,
        b: &LinearBuffers,
    ) -> Result<(), CudaError> {
        let weight = &self.problem.weight;
        let at = |offset: usize| b.scratch + offset as u64;
        let decode = Dequantise {
            codes: b.codes,
            scales: if weight.scale == ScaleKind::E8M0 { b.scales } else { 0 },
            out: at(self.layout.weight),
            bad_n: at(self.layout.bad_n),
            any_bad: self.any_bad(b),
            n: self.problem.n as i32,
            k: self.problem.k as i32,
            row_bytes: weight.row_bytes(self.problem.k) as i32,
            blocks: weight.blocks(self.problem.k) as i32,
            block_shift: weight.block_size.trailing_zeros() as i32,
            width: self.width() as i32,
        };
        let grid = (self.problem.n as u32, self.width().div_ceil(FOLD_K) as u32, 1);
        let shape = Launch::new(grid, (128, 1, 1));
        let function = self.gpu.function(tiles::unit(weight.format), "dequantise")?;
        let buffers = DenseBuffers {
            x: b.scratch,
            w: at(self.layout.weight),
            scales: [0; 2],
            bias: b.bias,
            d: if self.partial() { at(self.layout.partial) } else { b.y },
            workspace: at(self.layout.workspace),
        };
        let alpha = if self.partial() { 1.0 } else { self.problem.alpha };
        // SAFETY: the scratch holds W, X, the workspace and the sums as `lay_out` placed them.
        unsafe {
            function.launch(&shape, stream, &mut Args::new().with(decode))?;
            dense.run(stream, alpha, &buffers)
        }
    }

    pub(super) unsafe fn finish(
        &self,
        stream: Stream,
        b: &LinearBuffers,
        rows: usize,
    ) -> Result<(), CudaError> {
        let finish = self.finish_args(b, rows);
        // SAFETY: shapes and strides are the buffers'.
        unsafe { launch_finish(self.gpu, stream, &finish, self.partial(), 1) }
    }

    /// What the end of the product needs to know.
    fn finish_args(&self, b: &LinearBuffers, rows: usize) -> Finish {
        let partial = self.partial();
        let weight = &self.problem.weight;
        let scale = b.scratch + self.layout.scale as u64;
        let tensor = self.tensor_scale();
        Finish {
            partial: if partial { b.scratch + self.layout.partial as u64 } else { 0 },
            y: b.y,
            bias: if self.has_bias { b.bias } else { 0 },
            bad_m: b.scratch + self.layout.bad_m as u64,
            bad_n: b.scratch + self.layout.bad_n as u64,
            factor_x: if tensor && self.problem.activation.is_some() { scale } else { 0 },
            factor_w: if tensor { b.scales } else { 0 },
            any_bad: self.any_bad(b),
            kind: self.x_type as i32,
            m: rows as i32,
            n: self.problem.n as i32,
            k: self.problem.k as i32,
            splits: self.splits() as i32,
            terms: self.terms() as i32,
            parts_m: self.parts() as i32,
            parts_n: self.parts_n(rows) as i32,
            alpha: self.problem.alpha,
            beta: self.problem.beta,
            x: Operand {
                values: b.x,
                codes: 0,
                scales: 0,
                scale,
                batch: 0,
                row_stride: self.problem.k as i64,
                k_stride: 1,
                row_bytes: 0,
                kind: self.x_type as i32,
                quant: self.x_quant(),
            },
            w: Operand {
                values: 0,
                codes: b.codes,
                scales: b.scales,
                scale: 0,
                batch: 0,
                row_stride: 0,
                k_stride: 0,
                row_bytes: weight.row_bytes(self.problem.k) as i32,
                kind: 0,
                quant: Quant::of(weight),
            },
            batches: Batches::ONE,
        }
    }
}

/// Launches the last kernel of a product: the whole of it, or only the repair of a finished Y.
pub(in crate::cuda) unsafe fn launch_finish(
    gpu: &'static Gpu,
    stream: Stream,
    finish: &Finish,
    partial: bool,
    batches: usize,
) -> Result<(), CudaError> {
    let mut args = Args::new().with(*finish);
    let (name, grid) = if partial {
        let columns = (finish.n as u32).div_ceil(if finish.n % 4 == 0 { 1024 } else { 256 });
        ("finish", (columns, finish.m as u32, batches as u32))
    } else {
        args.push(batches as i32);
        ("repair", (gpu.attributes().multiprocessors.min(finish.m as u32), 1, 1))
    };
    // Overlap saves about a microsecond, which only small products notice.
    let small = finish.m * finish.terms <= 128;
    let shape = Launch::new(grid, (256, 1, 1)).overlap(small);
    // SAFETY: the caller answers for `finish`.
    unsafe { gpu.function(FINISH, name)?.launch(&shape, stream, &mut args) }
}

/// Whether bfloat16 arithmetic quantises bfloat16 values exactly.
fn pairs_suffice(spec: &QuantSpec) -> bool {
    spec.rounding == Rounding::Even
        && !matches!(spec.format, ElementFormat::MxInt8 | ElementFormat::Bf16)
}
