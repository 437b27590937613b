//! The driver: shapes to tasks, x to its panel, tiles to y.
//!
//! Every element of y is a fixed sum: chunks of [`chain`] products each, added in order (or, for up
//! to four rows of x, lanes along k). Which task computes it, and beside what, makes no difference.
#![allow(unsafe_code)]

use std::sync::OnceLock;

use super::{
    Kernels,
    buffers::{Output, prepare_x, tensor_divisor},
    packed::{
        PreparedWeight,
        kernels::{Decode, float_index},
        layout::{BLOCK, Row},
    },
    panel::{PANEL, Weight},
    scratch,
    tile::{CHUNK, XPanel},
    variants::BUNCH,
};
use crate::{
    error::Error,
    pack,
    parallel::{Parallel, Serial},
    reference,
    scale::ScaleKind,
    tensor::{Float, FloatMut, LinearProblem, PackedWeight},
};

/// Floats of x kept at a time: 16 MiB.
const X_FLOATS: usize = 4 << 20;
/// Rows of x at a time: with COLUMNS columns their sums fill a quarter of a second-level cache.
const MAX_ROWS: usize = 512;
/// Rows of x whose chunks (128 KiB) are multiplied by all panels of a task in turn.
const BLOCK_ROWS: usize = 128;
/// Output features of a task: eight panels of a chunk take 128 KiB. All of x streams through a task
/// once, so fewer would cost traffic.
const COLUMNS: usize = 128;
/// Up to so many rows of x are multiplied straight from the codes.
pub(super) const DOT_ROWS: usize = 4;
/// Multiply-adds under which threads cost more than they bring.
pub(crate) const SERIAL_WORK: usize = 1 << 16;

/// Products in one chain of fp32 additions. With chunks of c the error is at most
/// (c/2 + k/(2c)) * 2^-23 * sum |x w|; these keep it under (k/16 + 32) * 2^-23 for every k.
pub(super) fn chain(k: usize) -> usize {
    match k {
        0..704 => 64,
        704..1600 => 128,
        _ => CHUNK,
    }
}

/// A prepared weight and what makes floats of it.
struct Panels<'a> {
    prepared: &'a PreparedWeight,
    decode: Decode,
}

impl<'a> Panels<'a> {
    fn new(kernels: &Kernels, prepared: &'a PreparedWeight, w: &PackedWeight<'_>) -> Option<Self> {
        let decode = kernels.packed.float?.decode[float_index(w.spec().format)?];
        Some(Self { prepared, decode })
    }

    /// A panel from feature `n` on, as `panel::decode_panel` makes it of the file's codes.
    ///
    /// # Safety
    /// The variant of the kernels runs here; `out` holds CHUNK rows of 16 floats.
    unsafe fn decode(
        &self,
        n: usize,
        k0: usize,
        kc: usize,
        out: *mut f32,
        bad: &mut [bool; PANEL],
    ) {
        let layout = &self.prepared.layout;
        let (last, block) = (layout.rows.len() - 1, k0 / BLOCK);
        let panel = (n / PANEL).min(last / PANEL);
        let (panel, blocks) = (layout.at(panel, block), kc.div_ceil(BLOCK));
        // SAFETY: kc, rounded up to whole blocks, lies within the layout, and CHUNK is whole blocks.
        unsafe { (self.decode)(&*self.prepared.tables, panel, blocks, out.cast()) };
        if layout.special {
            *bad = std::array::from_fn(|j| layout.rows[(n + j).min(last)] != Row::Plain);
        }
    }
}

/// Some rows of x against the whole weight.
struct Job<'a> {
    kernels: &'a Kernels,
    weight: &'a Weight<'a>,
    panels: Option<Panels<'a>>,
    x: XPanel,
    /// Rows of x whose values do not fit f32, in f64.
    exact: &'a [OnceLock<Vec<f64>>],
    any_exact: bool,
    /// First row of x in y.
    row0: usize,
    rows: usize,
    /// alpha and the `tensor` scales.
    factor: f64,
    /// beta * bias, or zeros.
    bias: &'a [f64],
    y: &'a Output,
}

/// See [`crate::linear`]; more than [`DOT_ROWS`] rows of x take the panels from `prepared` where there
/// is one.
#[allow(clippy::too_many_arguments)]
pub(crate) fn linear(
    kernels: &Kernels,
    problem: &LinearProblem,
    x: Float<'_>,
    w: &PackedWeight<'_>,
    prepared: Option<&PreparedWeight>,
    bias: Option<Float<'_>>,
    mut y: FloatMut<'_>,
    par: &dyn Parallel,
) -> Result<(), Error> {
    let m = problem.check(&x, w, bias.as_ref(), &y)?;
    let (n, k) = (problem.n, problem.k);
    let small = m.saturating_mul(n).saturating_mul(k) < SERIAL_WORK;
    let par = if small { &Serial } else { par };
    let weight = Weight::new(*w);
    let divisor = tensor_divisor(problem, &x);
    let mut factor = f64::from(problem.alpha) * f64::from(divisor);
    if w.spec().scale == ScaleKind::Tensor {
        factor *= f64::from(pack::tensor_scale_from_bytes(w.scales()));
    }
    let bias = scaled_bias(problem, bias.as_ref());
    let y = Output::of(&mut y);
    let padded = k.div_ceil(CHUNK) * CHUNK;
    let most = (X_FLOATS / padded).clamp(1, MAX_ROWS);
    let parts = m.div_ceil(most);
    for part in 0..parts {
        let (row0, end) = (m * part / parts, m * (part + 1) / parts);
        let rows = end - row0;
        scratch::for_call(rows * padded, |buffer| {
            let exact = prepare_x(kernels, problem, &x, divisor, row0, rows, buffer, par);
            let any_exact = exact.iter().any(|row| row.get().is_some());
            let x = XPanel { data: buffer.as_ptr(), rows };
            let (bias, y, weight) = (&bias[..], &y, &weight);
            let exact = &exact[..];
            // Few rows are multiplied with the file's codes.
            let panels = prepared.filter(|_| m > DOT_ROWS);
            let panels = panels.and_then(|prepared| Panels::new(kernels, prepared, w));
            let job =
                Job { kernels, weight, panels, x, exact, any_exact, row0, rows, factor, bias, y };
            if m <= DOT_ROWS { job.run_dots(par) } else { job.run_tiles(par) }
        });
    }
    Ok(())
}

/// beta * bias, or zeros.
pub(super) fn scaled_bias(problem: &LinearProblem, bias: Option<&Float<'_>>) -> Vec<f64> {
    match bias {
        None => vec![0.0; problem.n],
        Some(b) => (0..problem.n).map(|j| f64::from(problem.beta) * f64::from(b.get(j))).collect(),
    }
}

impl Job<'_> {
    fn n(&self) -> usize {
        self.weight.packed.n()
    }

    fn k(&self) -> usize {
        self.weight.packed.k()
    }

    /// Up to [`DOT_ROWS`] rows of x: each task takes a stretch of output features.
    fn run_dots(&self, par: &dyn Parallel) {
        let per_task = (self.n().div_ceil(4 * par.threads())).next_multiple_of(4).min(256);
        par.run(self.n().div_ceil(per_task), &|task| {
            let n0 = task * per_task;
            let columns = per_task.min(self.n() - n0);
            scratch::for_task(DOT_ROWS * 256, |c| self.dots_task(n0, columns, c));
        });
    }

    fn dots_task(&self, n0: usize, columns: usize, c: &mut [f32]) {
        let rows = self.rows;
        let kernels = &self.kernels.dots[self.weight.packed.spec().format as usize][rows - 1];
        let bunch = BUNCH[rows - 1];
        let mut bad = [false; 256];
        let mut j = 0;
        while j < columns {
            let take = if columns - j >= bunch { bunch } else { 1 };
            let mut out = [0.0; 4 * DOT_ROWS];
            let (dots, bad) = (kernels[usize::from(take != bunch)], &mut bad[j..j + take]);
            // SAFETY: the variant runs here; `take` rows of w from n0 + j and all rows of x exist.
            unsafe { dots(self.weight, self.x, 0, n0 + j, &mut out, bad) };
            for t in 0..take {
                for i in 0..rows {
                    c[i * columns + j + t] = out[t * rows + i];
                }
            }
            j += take;
        }
        self.finish(0, rows, n0, columns, &bad, c, columns);
    }

    /// More rows: tasks take COLUMNS output features, fewer where that leaves threads idle, and
    /// split the rows too when there are few features.
    fn run_tiles(&self, par: &dyn Parallel) {
        let (threads, width) = (par.threads(), self.kernels.panels * PANEL);
        let mut columns = COLUMNS;
        while columns > width && self.n().div_ceil(columns) < 3 * threads {
            columns /= 2;
        }
        let stripes = self.n().div_ceil(columns);
        let tallest = self.kernels.tiles.len();
        let wanted = if threads > 1 { (3 * threads).div_ceil(stripes) } else { 1 };
        let splits = wanted.min(self.rows.div_ceil(4 * tallest)).max(1);
        par.run(stripes * splits, &|task| {
            let (stripe, split) = (task / splits, task % splits);
            let (m0, m1) = (self.rows * split / splits, self.rows * (split + 1) / splits);
            let n0 = stripe * columns;
            let floats = columns * CHUNK + (m1 - m0) * columns;
            scratch::for_task(floats, |scratch| {
                let (panels, c) = scratch.split_at_mut(columns * CHUNK);
                self.tiles_task(m0, m1, n0, columns, panels, c);
            });
        });
    }

    fn tiles_task(
        &self,
        m0: usize,
        m1: usize,
        n0: usize,
        columns: usize,
        panels: &mut [f32],
        c: &mut [f32],
    ) {
        let used = columns.min(self.n() - n0);
        let width = self.kernels.panels * PANEL;
        let panel_count = used.div_ceil(width) * self.kernels.panels;
        let decode = self.kernels.decode[self.weight.packed.spec().format as usize];
        let mut bad = [[false; PANEL]; COLUMNS / PANEL];
        // Blocks of rows, so that their chunk of x stays in the second-level cache for all panels;
        // a single block uses each panel at once, while it is in the first level.
        let blocks = (m1 - m0).div_ceil(BLOCK_ROWS);
        let (step, rounds) = match blocks {
            1 => (self.kernels.panels, panel_count / self.kernels.panels),
            _ => (panel_count, 1),
        };
        for k0 in (0..self.k()).step_by(CHUNK) {
            let kc = CHUNK.min(self.k() - k0);
            for first in (0..rounds).map(|round| round * step) {
                for p in 0..step {
                    let out = panels[p * CHUNK * PANEL..(p + 1) * CHUNK * PANEL].as_mut_ptr();
                    let n = n0 + (first + p) * PANEL;
                    let bad = &mut bad[first + p];
                    // SAFETY: the variant runs here, k0 + kc <= k, a panel holds CHUNK rows of 16.
                    unsafe {
                        match &self.panels {
                            Some(panels) => panels.decode(n, k0, kc, out, bad),
                            None => decode(self.weight, n, k0, kc, out, bad),
                        }
                    };
                }
                for block in 0..blocks {
                    let start = (m1 - m0) * block / blocks;
                    let end = (m1 - m0) * (block + 1) / blocks;
                    for p in (0..step).step_by(self.kernels.panels) {
                        let panel = &panels[p * CHUNK * PANEL..];
                        let c = &mut c[start * columns + (first + p) * PANEL..];
                        self.tile_column(m0 + start, m0 + end, k0, kc, panel, c, columns);
                    }
                }
            }
        }
        self.finish(m0, m1, n0, used, bad.as_flattened(), c, columns);
    }

    /// All tiles of one column of panels, over `kc` k from `k0` on.
    #[allow(clippy::too_many_arguments)]
    fn tile_column(
        &self,
        m0: usize,
        m1: usize,
        k0: usize,
        kc: usize,
        panel: &[f32],
        c: &mut [f32],
        ldc: usize,
    ) {
        let rows = m1 - m0;
        let tiles = rows.div_ceil(self.kernels.tiles.len());
        for t in 0..tiles {
            // Evenly high, so that no tile is too low to keep the multipliers busy.
            let (start, end) = (rows * t / tiles, rows * (t + 1) / tiles);
            let tile = self.kernels.tiles[end - start - 1];
            for sub in (0..kc).step_by(chain(self.k())) {
                let len = chain(self.k()).min(kc - sub);
                // SAFETY: rows m0 + start.. of x exist and lie CHUNK apart within a chunk; `panel`
                // holds CHUNK rows for each panel and `c` rows of ldc floats, of which the tile's
                // columns are used; the variant runs here.
                unsafe {
                    let x = self.x.at(m0 + start, k0 + sub);
                    let panel = panel[sub * PANEL..].as_ptr();
                    let c = c[start * ldc..].as_mut_ptr();
                    tile(x, panel, CHUNK * PANEL, len, c, ldc, k0 + sub > 0);
                }
            }
        }
    }

    /// Puts sums that need f64 right, then scales, adds the bias and writes y.
    #[allow(clippy::too_many_arguments)]
    fn finish(
        &self,
        m0: usize,
        m1: usize,
        n0: usize,
        columns: usize,
        bad: &[bool],
        c: &mut [f32],
        ldc: usize,
    ) {
        if let Some(panels) = &self.panels {
            for row in c.chunks_exact_mut(ldc).take(m1 - m0) {
                panels.prepared.layout.unshift(n0, &mut row[..columns]);
            }
        }
        if self.any_exact || bad.contains(&true) {
            self.exact_rows(m0, m1, n0, &bad[..columns], c, ldc);
        }
        let mut out = [0.0_f32; 256];
        let out = &mut out[..columns];
        for m in m0..m1 {
            let c = &c[(m - m0) * ldc..][..columns];
            // SAFETY: the variant runs here; row and columns lie within y and are this task's.
            unsafe {
                (self.kernels.scale_row)(c, self.factor, &self.bias[n0..n0 + columns], out);
                self.y.write((self.row0 + m) * self.n() + n0, out);
            }
        }
    }

    /// Sums in f64 where a row of x or of the weight holds values that no normal f32 is.
    #[cold]
    fn exact_rows(&self, m0: usize, m1: usize, n0: usize, bad: &[bool], c: &mut [f32], ldc: usize) {
        let k = self.k();
        let mut w = vec![0.0_f64; k];
        for (j, &bad) in bad.iter().enumerate() {
            if !bad && !self.any_exact {
                continue;
            }
            reference::weight_row_f64(&self.weight.packed, n0 + j, &mut w);
            for m in m0..m1 {
                let sum: f64 = match self.exact[m].get() {
                    Some(x) => x.iter().zip(&w).map(|(x, w)| x * w).sum(),
                    None if bad => (0..k)
                        // SAFETY: row and k lie within the panel.
                        .map(|i| f64::from(unsafe { *self.x.at(m, i) }) * w[i])
                        .sum(),
                    None => continue,
                };
                c[(m - m0) * ldc + j] = sum as f32;
            }
        }
    }
}
