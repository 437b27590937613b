//! Which kernel of `wide.cu` takes a product of many rows, in how many shares of k.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

use super::{CudaError, Function, Gpu, Unit, tiles::STEP};
use crate::{ElementFormat, LinearProblem, ScaleKind};

/// Modules of `wide.cu`, by weight format.
const UNITS: [Unit; 6] = [
    Unit { name: "wide", defines: &[("WEIGHT", 0)] },
    Unit { name: "wide", defines: &[("WEIGHT", 1)] },
    Unit { name: "wide", defines: &[("WEIGHT", 2)] },
    Unit { name: "wide", defines: &[("WEIGHT", 3)] },
    Unit { name: "wide", defines: &[("WEIGHT", 4)] },
    Unit { name: "wide", defines: &[("WEIGHT", 5)] },
];

/// Every module of `wide.cu`.
pub(super) const fn units() -> [Unit; 6] {
    UNITS
}

/// Features that a block takes; `FEATURES` of `wide.cu`.
const FEATURES: usize = 128;
/// Threads of a block: two multiplying warpgroups and a copying one.
const THREADS: u32 = 384;
/// Registers of a thread at the start: 65,536 shared by 384 threads, in eights.
const REGISTERS: u32 = 168;
/// Rows up to which other kernels are faster.
const FEW_ROWS: usize = 16;

/// One kernel of `wide.cu`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Kernel {
    name: &'static str,
    /// Rows of X of a block.
    tile: usize,
    /// Blocks that share rows of X.
    cluster: usize,
    /// Chunks of 64 k of X in shared memory.
    stages: usize,
    /// Clock cycles of one step of 128 k, as measured on an H100.
    cycles: usize,
}

#[rustfmt::skip]
const KERNELS: [Kernel; 3] = [
    Kernel { name: "wide_64", tile: 64, cluster: 1, stages: 8, cycles: 1350 },
    Kernel { name: "wide_128", tile: 128, cluster: 2, stages: 6, cycles: 1750 },
    Kernel { name: "wide_256", tile: 256, cluster: 2, stages: 6, cycles: 2350 },
];

impl Kernel {
    /// Shared memory of a block, as `wide.cu` computes it, and what aligning it takes.
    fn shared_bytes(&self) -> usize {
        let scratch = 2 * 32 * 68 * 4;
        self.stages * self.tile * 128 + scratch + 2 * self.stages * 8 + 1024
    }
}

/// A kernel with its division of the work.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wide {
    pub function: Function,
    /// Rows of X that a block takes.
    pub tile: usize,
    /// Clusters along the features.
    pub groups_n: usize,
    /// Shares of k.
    pub splits: usize,
    pub cluster: u32,
    pub blocks: u32,
    pub shared: u32,
    pub threads: u32,
}

impl Wide {
    /// The best division for `rows` rows of X, or `None` where these kernels do not apply: another
    /// architecture, few rows, blocks of other than 32 codes. `division`: this tile and number of
    /// shares, however few rows.
    ///
    /// # Errors
    /// A kernel that cannot be had.
    pub fn new(
        gpu: &'static Gpu,
        problem: &LinearProblem,
        rows: usize,
        division: Option<(usize, usize)>,
    ) -> Result<Option<Self>, CudaError> {
        if (rows <= FEW_ROWS && division.is_none()) || !applies(gpu, problem) {
            return Ok(None);
        }
        let slots = gpu.attributes().multiprocessors as usize;
        let steps = problem.k.div_ceil(STEP);
        let wanted = division.and_then(|(tile, splits)| {
            let kernel = KERNELS.into_iter().find(|kernel| kernel.tile == tile)?;
            Some((kernel, splits.clamp(1, steps)))
        });
        let (kernel, splits) = wanted.unwrap_or_else(|| divide(slots, rows, problem.n, steps));
        let Some(function) = function(gpu, problem.weight.format, &kernel) else {
            return Ok(None);
        };
        let shared = kernel.shared_bytes() as u32;
        function.allow_shared(shared)?;
        let tiles_m = rows.div_ceil(kernel.tile);
        let groups_n = problem.n.div_ceil(FEATURES * kernel.cluster);
        let clusters = (tiles_m * groups_n * splits).min(slots / kernel.cluster).max(1);
        Ok(Some(Self {
            function,
            tile: kernel.tile,
            groups_n,
            splits,
            cluster: kernel.cluster as u32,
            blocks: (clusters * kernel.cluster) as u32,
            shared,
            threads: THREADS,
        }))
    }

    /// Loads every kernel that products like `problem` may need, so that none is compiled later,
    /// within a capture.
    pub fn prepare(gpu: &'static Gpu, problem: &LinearProblem) {
        if applies(gpu, problem) {
            for kernel in KERNELS {
                function(gpu, problem.weight.format, &kernel);
            }
        }
    }
}

/// A kernel, or `None` where it cannot be had: machine code made ahead of time for `sm_90` has none,
/// nor has every NVRTC the instructions. The kernels of `linear.cu` and cuBLASLt do as well, only
/// slower; what else is wrong with the device or the compiler, they report.
fn function(gpu: &'static Gpu, format: ElementFormat, kernel: &Kernel) -> Option<Function> {
    type Known = HashMap<(u32, usize, &'static str), Option<Function>>;
    static KNOWN: Mutex<Option<Known>> = Mutex::new(None);
    let key = (gpu.ordinal(), format as usize, kernel.name);
    let known = || KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(function) = known().get_or_insert_default().get(&key) {
        return *function;
    }
    // Not under the lock: compiling takes seconds.
    let found = gpu.function(UNITS[format as usize], kernel.name).ok();
    // Warpgroups pass registers on, in numbers that add up for exactly this many to begin with;
    // with fewer they would wait for ever.
    let found = found.filter(|function| function.registers().is_ok_and(|count| count == REGISTERS));
    known().get_or_insert_default().insert(key, found);
    found
}

/// Whether the kernels can have this weight on this device.
fn applies(gpu: &Gpu, problem: &LinearProblem) -> bool {
    let weight = &problem.weight;
    gpu.attributes().capability == (9, 0)
        && weight.format != ElementFormat::Bf16
        && weight.scale != ScaleKind::Tensor
        && weight.block_size == 32
}

/// The kernel and the number of shares of k that are the fastest by a simple count of clock cycles.
fn divide(slots: usize, rows: usize, n: usize, steps: usize) -> (Kernel, usize) {
    // Filling the pipeline and writing a tile.
    const FIXED: usize = 5000;
    // Bytes of partial sums that the whole device writes and reads in a cycle, and a further kernel.
    const BYTES: usize = 1200;
    const FINISH: usize = 3000;
    let mut best = (usize::MAX, KERNELS[0], 1);
    for kernel in KERNELS {
        let tiles =
            rows.div_ceil(kernel.tile) * n.div_ceil(FEATURES * kernel.cluster) * kernel.cluster;
        // A share of fewer than four steps spends its time filling the pipeline.
        for splits in 1..=(steps / 4).clamp(1, 32) {
            let waves = (tiles * splits).div_ceil(slots);
            let sums = if splits > 1 { splits * rows * n * 8 / BYTES + FINISH } else { 0 };
            let cost = waves * (steps.div_ceil(splits) * kernel.cycles + FIXED) + sums;
            if cost < best.0 {
                best = (cost, kernel, splits);
            }
        }
    }
    (best.1, best.2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_divided_sensibly() {
        let name = |rows, n, k: usize| {
            let (kernel, splits) = divide(132, rows, n, k.div_ceil(STEP));
            (kernel.tile, splits)
        };
        assert_eq!(name(2048, 14336, 4096), (256, 1));
        assert_eq!(name(2048, 4096, 14336), (256, 1));
        assert_eq!(name(256, 4096, 14336), (256, 4));
        assert_eq!(name(64, 14336, 4096), (64, 1));
        assert_eq!(name(128, 4096, 14336), (128, 4));
        // Never more shares than steps.
        assert_eq!(name(64, 32, 32), (64, 1));
        for kernel in KERNELS {
            assert!(kernel.shared_bytes() <= 227 << 10, "{kernel:?}");
        }
    }
}
