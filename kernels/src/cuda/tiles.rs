//! Which kernel of `linear.cu` takes a product, in how many shares of k, with how many stages.

use super::{CudaError, Function, Gpu, Unit};
use crate::ElementFormat;

/// k of one step of the kernels.
pub(super) const STEP: usize = 128;
/// Rows of X in one fragment.
pub(super) const FRAGMENT_ROWS: usize = 8;

/// Modules of `linear.cu`, by weight format.
const UNITS: [Unit; 7] = [
    Unit { name: "linear", defines: &[("WEIGHT", 0)] },
    Unit { name: "linear", defines: &[("WEIGHT", 1)] },
    Unit { name: "linear", defines: &[("WEIGHT", 2)] },
    Unit { name: "linear", defines: &[("WEIGHT", 3)] },
    Unit { name: "linear", defines: &[("WEIGHT", 4)] },
    Unit { name: "linear", defines: &[("WEIGHT", 5)] },
    Unit { name: "linear", defines: &[("WEIGHT", 6)] },
];

/// The module for weights of one format.
pub(super) const fn unit(format: ElementFormat) -> Unit {
    UNITS[format as usize]
}

/// Every module of `linear.cu`.
pub(super) const fn units() -> [Unit; 7] {
    UNITS
}

/// One kernel of `linear.cu`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Kernel {
    name: &'static str,
    /// Rows of X of a block.
    rows: usize,
    /// Features of a block.
    features: usize,
    /// Blocks that a multiprocessor's registers hold.
    per_multiprocessor: usize,
    /// Threads of a block.
    threads: u32,
}

#[rustfmt::skip]
const KERNELS: [Kernel; 5] = [
    Kernel { name: "linear_8", rows: 8, features: 128, per_multiprocessor: 3, threads: 256 },
    Kernel { name: "linear_16", rows: 16, features: 128, per_multiprocessor: 3, threads: 256 },
    Kernel { name: "linear_32", rows: 32, features: 128, per_multiprocessor: 2, threads: 256 },
    Kernel { name: "linear_64", rows: 64, features: 128, per_multiprocessor: 2, threads: 256 },
    Kernel { name: "linear_128", rows: 128, features: 256, per_multiprocessor: 1, threads: 256 },
];

/// For few rows and weights in whole steps: no shared memory between codes and registers.
#[rustfmt::skip]
const STREAMS: [Kernel; 2] = [
    Kernel { name: "stream_8", rows: 8, features: 64, per_multiprocessor: 5, threads: 128 },
    Kernel { name: "stream_16", rows: 16, features: 64, per_multiprocessor: 4, threads: 128 },
];

/// The first of them, which also adds the shares of k and writes Y: a cluster of blocks reads each
/// other's sums. With sixteen rows clusters wait for room longer than the other kernel takes.
#[rustfmt::skip]
const WHOLE: Kernel =
    Kernel { name: "whole_8", rows: 8, features: 64, per_multiprocessor: 5, threads: 128 };
/// Blocks that a cluster has on every device with clusters.
const MOST_CLUSTER: usize = 8;

/// How a weight can reach the tensor cores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Route {
    /// Through shared memory, whatever its rows look like.
    Shared,
    /// Straight to registers too, where rows are few: the weight is constant, in whole steps, its
    /// rows aligned to 16 bytes, with scales for 32 codes each or none.
    Registers,
    /// The same, and no factor comes from memory: one kernel can end the product.
    Whole,
}

/// A kernel with its division of the work.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tiling {
    pub function: Function,
    /// Rows of X that a block takes.
    pub rows: usize,
    /// Blocks along the features.
    pub columns: u32,
    /// Shares of k.
    pub splits: usize,
    pub shared: u32,
    pub threads: u32,
    /// Whether the kernel ends the product, with the blocks of all shares in a cluster.
    pub whole: bool,
}

impl Tiling {
    /// For `rows` rows of X, `n` features and `k`, `batch` times.
    pub fn new(
        gpu: &'static Gpu,
        format: ElementFormat,
        (rows, n, k, batch): (usize, usize, usize, usize),
        route: Route,
    ) -> Result<Self, CudaError> {
        let attributes = gpu.attributes();
        let wanted = KERNELS.iter().position(|kernel| rows <= kernel.rows).unwrap_or(4);
        let fits =
            |kernel: &Kernel| shared_bytes(kernel, format) <= attributes.shared_per_block as usize;
        let kernel =
            KERNELS[..=wanted].iter().rev().find(|kernel| fits(kernel)).ok_or_else(|| {
                let have = attributes.shared_per_block;
                CudaError::Unsupported(format!("{have} bytes of shared memory a block are too few"))
            })?;
        let whole = route == Route::Whole && rows <= WHOLE.rows && batch == 1 && has_clusters(gpu);
        let streamed = match route {
            Route::Shared => None,
            _ if whole => Some(&WHOLE),
            _ => STREAMS.iter().find(|kernel| rows <= kernel.rows),
        };
        let shared = if streamed.is_some() { 0 } else { shared_bytes(kernel, format) as u32 };
        let kernel = streamed.unwrap_or(kernel);
        let function = gpu.function(unit(format), kernel.name)?;
        function.allow_shared(shared)?;

        let grid = (n.div_ceil(kernel.features), rows.div_ceil(kernel.rows));
        let slots = attributes.multiprocessors as usize * kernel.per_multiprocessor;
        // A share of fewer than four steps spends its time filling the pipeline.
        let most = (k.div_ceil(STEP) / 4).max(1);
        let most = if whole { most.min(MOST_CLUSTER) } else { most };
        let splits = (slots / (grid.0 * grid.1 * batch).max(1)).clamp(1, most);
        Ok(Self {
            function,
            rows: kernel.rows,
            columns: grid.0 as u32,
            splits,
            shared,
            threads: kernel.threads,
            whole,
        })
    }

    /// Loads every kernel of a format, so that none is compiled later, within a capture.
    pub fn prepare(gpu: &'static Gpu, format: ElementFormat) -> Result<(), CudaError> {
        let whole = has_clusters(gpu).then_some(&WHOLE);
        for kernel in KERNELS.iter().chain(&STREAMS).chain(whole) {
            gpu.function(unit(format), kernel.name)?;
        }
        Ok(())
    }
}

/// Whether this device runs [`WHOLE`]: it has clusters, and of those that do it was tried on this one.
fn has_clusters(gpu: &Gpu) -> bool {
    gpu.attributes().capability == (9, 0)
}

/// Shared memory of a block: `STAGES` steps of k, as `linear.cu` computes them.
fn shared_bytes(kernel: &Kernel, format: ElementFormat) -> usize {
    let stage = kernel.features * STEP * format.bits() as usize / 8 + kernel.rows * STEP * 2;
    let room = match kernel.rows {
        ..=16 => 75 << 10,
        17..=64 => 98 << 10,
        _ => 200 << 10,
    };
    stage * (room / stage).clamp(2, 6)
}
