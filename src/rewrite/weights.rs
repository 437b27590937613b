//! Constant weights as rows along k, whatever way they are stored, read in tiles.

use crate::onnx::{self, DataType, TensorView};
use bytes::Bytes;
use mx_kernels::{FloatType, QuantSpec, ScaleKind, StoredWeight};
use rayon::prelude::*;
use std::sync::Arc;

use super::{
    buffers::Buffers,
    execute::ExecuteError,
    sites::{Layout, Region, Weight},
};

/// Float32 values of one tile: large enough to keep threads busy, small beside the weight.
const TILE_VALUES: usize = 1 << 20;

/// Where rows are made: the threads of the rewrite.
#[derive(Clone, Debug, Default)]
pub(crate) struct Threads {
    pool: Option<Arc<rayon::ThreadPool>>,
    buffers: Buffers,
}

impl Threads {
    /// `None` = one a processor.
    pub(crate) fn new(threads: Option<usize>) -> Result<Self, ExecuteError> {
        let Some(threads) = threads else { return Ok(Self::default()) };
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads.max(1)).build();
        let pool = pool.map_err(|e| ExecuteError::Threads { threads, reason: e.to_string() })?;
        Ok(Self { pool: Some(Arc::new(pool)), buffers: Buffers::default() })
    }

    fn count(&self) -> usize {
        self.pool
            .as_ref()
            .map_or_else(rayon::current_num_threads, |pool| pool.current_num_threads())
    }

    /// Makes `count` things in parallel and takes them in order, a few of them in memory at a time.
    pub(crate) fn in_order<T: Send>(
        &self,
        count: usize,
        make: impl Fn(usize) -> Result<T, onnx::Error> + Sync,
        mut take: impl FnMut(T) -> Result<(), onnx::Error> + Send,
    ) -> Result<(), onnx::Error> {
        let group = TILES_AHEAD * self.count();
        let mut ready = Vec::new();
        self.run(|| {
            for first in (0..count).step_by(group) {
                let indices = first..count.min(first + group);
                let (made, taken) = rayon::join(
                    || indices.into_par_iter().map(&make).collect::<Result<Vec<T>, _>>(),
                    || ready.drain(..).try_for_each(&mut take),
                );
                taken?;
                ready = made?;
            }
            ready.into_iter().try_for_each(take)
        })
    }

    pub(crate) fn run<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        match &self.pool {
            Some(pool) => pool.install(work),
            None => work(),
        }
    }
}

/// Packed bytes of one tile of a weight that is written in order.
const TILE_BYTES: usize = 4 << 20;
/// Columns of a transposed weight that the kernels take together.
const STRIP: usize = 256;
/// Tiles a thread makes while those before are written: both are in memory.
const TILES_AHEAD: usize = 2;

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

    /// Value `j` of rows `first ..`, as many as `out` takes.
    pub(crate) fn column(
        &self,
        j: usize,
        first: usize,
        out: &mut [f32],
    ) -> Result<(), onnx::Error> {
        let Region { start, pitch } = self.region;
        match self.layout {
            Layout::KN => self.view.read_f32(start + j * pitch + first, out),
            Layout::NK => out.chunks_mut(1).enumerate().try_for_each(|(row, out)| {
                self.view.read_f32(start + (first + row) * pitch + j, out)
            }),
        }
    }

    /// The stored element type.
    pub(crate) fn data_type(&self) -> DataType {
        self.view.data_type
    }

    /// Takes the weight's pages out of memory.
    pub(crate) fn release(&self) {
        onnx::release(&self.view.bytes);
    }

    /// The weight as the kernels take it from where it lies, in a type that they know.
    fn stored(&self) -> Option<StoredWeight<'_>> {
        let float_type = match self.view.data_type {
            DataType::Float => FloatType::F32,
            DataType::Float16 => FloatType::F16,
            DataType::Bfloat16 => FloatType::Bf16,
            _ => return None,
        };
        let (n, k, transposed) = (self.n, self.k, self.layout == Layout::KN);
        Some(StoredWeight { bytes: self.bytes()?, float_type, n, k, transposed })
    }

    /// Its own bytes, which may be a part of the tensor's; `None` where others lie between its rows.
    fn bytes(&self) -> Option<&[u8]> {
        let Region { start, pitch } = self.region;
        let inner = if self.layout == Layout::NK { self.k } else { self.n };
        let size = self.view.bytes.len() / self.view.elements().max(1);
        (pitch == inner).then(|| &self.view.bytes[start * size..][..self.n * self.k * size])
    }

    /// The packed codes and the scales of all rows, in order, a tile at a time. Under `tensor` every
    /// element is divided by `divisor` and there are no scales.
    pub(crate) fn quantize(
        &self,
        threads: &Threads,
        spec: &QuantSpec,
        divisor: f32,
        mut take: impl FnMut(Bytes, &[u8]) -> Result<(), onnx::Error> + Send,
    ) -> Result<(), onnx::Error> {
        let (row, row_scales) = (spec.row_bytes(self.k), spec.scales_len(1, self.k));
        // Tiles for every thread, also of a small weight; whole strips of columns, for weights that are
        // stored transposed.
        let share = self.n.div_ceil(4 * threads.count());
        let tile = (TILE_BYTES / row).min(share).max(64);
        let whole = if tile < STRIP { 64 } else { STRIP };
        let tile = tile / whole * whole;
        let make = |index: usize| {
            let first = index * tile;
            let rows = tile.min(self.n - first);
            let (mut codes, mut scales) =
                (threads.buffers.lend(rows * row), vec![0; rows * row_scales]);
            self.quantize_tile(spec, divisor, first, codes.as_mut(), &mut scales)?;
            Ok((Bytes::from_owner(codes), scales))
        };
        threads.in_order(self.n.div_ceil(tile), make, |(codes, scales)| take(codes, &scales))?;
        // A weight that is stored transposed is read from end to end by every tile.
        onnx::release(&self.view.bytes);
        Ok(())
    }

    fn quantize_tile(
        &self,
        spec: &QuantSpec,
        divisor: f32,
        first: usize,
        codes: &mut [u8],
        scales: &mut [u8],
    ) -> Result<(), onnx::Error> {
        let failed = |error: mx_kernels::Error| onnx::Error::Payload {
            tensor: self.name().to_owned(),
            what: error.to_string(),
        };
        if let Some(weight) = self.stored().filter(|_| spec.scale == ScaleKind::E8M0) {
            mx_kernels::quantize_weight(spec, &weight, first, codes, scales).map_err(failed)?;
        } else {
            let (row, row_scales) = (spec.row_bytes(self.k), spec.scales_len(1, self.k));
            let (step, rows) = (self.tile(), codes.len() / row);
            let mut values = vec![0.0; step.min(rows) * self.k];
            for at in (0..rows).step_by(step) {
                let count = step.min(rows - at);
                let values = &mut values[..count * self.k];
                self.read(first + at, values)?;
                if divisor != 1.0 {
                    values.iter_mut().for_each(|v| *v /= divisor);
                }
                let codes = &mut codes[at * row..][..count * row];
                let scales = &mut scales[at * row_scales..][..count * row_scales];
                mx_kernels::quantize_rows(spec, values, count, self.k, codes, scales)
                    .map_err(failed)?;
            }
        }
        if let (Layout::NK, Some(bytes)) = (self.layout, self.bytes()) {
            let width = bytes.len() / self.n;
            let rows = codes.len() / spec.row_bytes(self.k);
            onnx::release(&bytes[first * width..][..rows * width]);
        }
        Ok(())
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
