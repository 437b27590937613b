//! Constant weights as rows along k, whatever way they are stored, read in tiles.

use crate::onnx::{self, TensorView};
use rayon::prelude::*;
use std::sync::Arc;

use super::{
    execute::ExecuteError,
    sites::{Layout, Region, Weight},
};

/// Float32 values of one tile: large enough to keep threads busy, small beside the weight.
const TILE_VALUES: usize = 1 << 20;

/// Where rows are made: the threads of the rewrite.
#[derive(Clone, Debug, Default)]
pub(crate) struct Threads(Option<Arc<rayon::ThreadPool>>);

impl Threads {
    /// `None` = one a processor.
    pub(crate) fn new(threads: Option<usize>) -> Result<Self, ExecuteError> {
        let Some(threads) = threads else { return Ok(Self(None)) };
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads.max(1)).build();
        let pool = pool.map_err(|e| ExecuteError::Threads { threads, reason: e.to_string() })?;
        Ok(Self(Some(Arc::new(pool))))
    }

    pub(crate) fn run<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        match &self.0 {
            Some(pool) => pool.install(work),
            None => work(),
        }
    }
}

/// A weight [n, k], row-major along k for its readers; stored so or transposed.
#[derive(Clone, Debug)]
pub(crate) struct Rows {
    view: TensorView,
    layout: Layout,
    region: Region,
    pub n: usize,
    pub k: usize,
}

impl Rows {
    /// The weight in `view`, which must hold its n * k numbers.
    pub(crate) fn new(
        view: TensorView,
        weight: &Weight,
        n: usize,
        k: usize,
    ) -> Result<Self, onnx::Error> {
        let Region { start, pitch } = weight.region;
        let (outer, inner) = if weight.layout == Layout::NK { (n, k) } else { (k, n) };
        let end = outer
            .checked_sub(1)
            .and_then(|rows| rows.checked_mul(pitch)?.checked_add(inner)?.checked_add(start));
        let fits = end.is_some_and(|end| end <= view.elements()) && pitch >= inner && inner > 0;
        if !fits {
            return Err(onnx::Error::Tensor {
                what: format!("shape {:?} does not hold a weight of {n} x {k}", view.dims),
                tensor: view.name,
            });
        }
        Ok(Self { view, layout: weight.layout, region: weight.region, n, k })
    }

    /// Name of the tensor.
    pub(crate) fn name(&self) -> &str {
        &self.view.name
    }

    /// Rows `first ..` as float32, as many as `out` takes.
    pub(crate) fn read(&self, first: usize, out: &mut [f32]) -> Result<(), onnx::Error> {
        let Region { start, pitch } = self.region;
        match self.layout {
            Layout::NK if pitch == self.k => self.view.read_f32(start + first * pitch, out),
            Layout::NK => out
                .chunks_mut(self.k)
                .enumerate()
                .try_for_each(|(row, out)| self.view.read_f32(start + (first + row) * pitch, out)),
            Layout::KN => {
                let rows = out.len() / self.k;
                let mut column = vec![0.0; rows];
                for j in 0..self.k {
                    self.view.read_f32(start + j * pitch + first, &mut column)?;
                    for (i, value) in column.iter().enumerate() {
                        out[i * self.k + j] = *value;
                    }
                }
                Ok(())
            }
        }
    }

    /// Rows of one tile.
    fn tile(&self) -> usize {
        // A multiple of a cache line of values, for the columns of a transposed weight.
        (TILE_VALUES / self.k).next_multiple_of(16).clamp(1, self.n)
    }

    /// Runs `work(values, a, b)` on every tile, in parallel: the tile's rows as float32, and the
    /// parts of the two outputs that belong to them (`a_row`, `b_row` elements a row, possibly 0).
    pub(crate) fn for_tiles<A: Send, B: Send>(
        &self,
        threads: &Threads,
        (a, a_row): (&mut [A], usize),
        (b, b_row): (&mut [B], usize),
        work: impl Fn(&[f32], &mut [A], &mut [B]) -> Result<(), onnx::Error> + Sync,
    ) -> Result<(), onnx::Error> {
        let tile = self.tile();
        let mut jobs = Vec::with_capacity(self.n.div_ceil(tile));
        let (mut a, mut b) = (a, b);
        for first in (0..self.n).step_by(tile) {
            let rows = tile.min(self.n - first);
            let (a_part, a_rest) = a.split_at_mut(rows * a_row);
            let (b_part, b_rest) = b.split_at_mut(rows * b_row);
            jobs.push((first, rows, a_part, b_part));
            (a, b) = (a_rest, b_rest);
        }
        threads.run(|| {
            jobs.into_par_iter().try_for_each(|(first, rows, a, b)| {
                let mut values = vec![0.0; rows * self.k];
                self.read(first, &mut values)?;
                work(&values, a, b)
            })
        })
    }
}
