//! The driver: x to its tiles, tiles to y.
//!
//! As in `cpu::linear` every element of y is a fixed sum, whatever task computes it.
#![allow(unsafe_code)]

use std::sync::OnceLock;

use super::{
    Path, PreparedWeight,
    integer::{Dot, DotArgs},
    kernels::{Bf16Kernels, IntegerKernels, float_index, integer_index},
    layout::{BLOCK, LOWEST, Row, block_bytes},
    tables,
    x::{Form, Place, XForm},
};
use crate::{
    cpu::{
        Kernels,
        buffers::Output,
        linear::{self as plain, SERIAL_WORK},
        panel::PANEL,
        rows::RowQuant,
        scratch,
    },
    error::Error,
    parallel::{Parallel, Serial},
    reference,
    tensor::{Float, FloatMut, LinearProblem, PackedWeight},
};

/// Rows of x at a time: with COLUMNS columns their sums fill a quarter of a second-level cache.
const MAX_ROWS: usize = 512;
/// Bytes of x at a time.
const X_BYTES: usize = 16 << 20;
/// Output features of a task.
const COLUMNS: usize = 128;
/// Panels of a task that takes its weights straight from the codes, at most.
const CODE_PANELS: usize = 32;
/// Bytes of x that stay in a second-level cache beside a panel.
const NEAR: usize = 512 << 10;
/// Blocks of k for which a panel of integers is unpacked: 16 KiB.
const INTEGER_BLOCKS: usize = 32;

/// See [`crate::linear_prepared`].
#[allow(clippy::too_many_arguments)]
pub(crate) fn linear(
    kernels: &Kernels,
    problem: &LinearProblem,
    x: Float<'_>,
    w: &PackedWeight<'_>,
    prepared: &PreparedWeight,
    bias: Option<Float<'_>>,
    mut y: FloatMut<'_>,
    par: &dyn Parallel,
) -> Result<(), Error> {
    let m = problem.check(&x, w, bias.as_ref(), &y)?;
    let parts = matches!(x, Float::Bf16(_)).then_some(1);
    let path = match prepared.is_of(w) {
        true => kernels.packed.choose_for(problem, m, parts),
        false => None,
    };
    let way = match path {
        Some(Path::FloatPanels) => {
            return plain::linear(kernels, problem, x, w, Some(prepared), bias, y, par);
        }
        None => return plain::linear(kernels, problem, x, w, None, bias, y, par),
        Some(path) => Way::new(kernels, problem, path),
    };
    let Some(way) = way else {
        return plain::linear(kernels, problem, x, w, None, bias, y, par);
    };
    let done = {
        let (y, bias) = (Output::of(&mut y), plain::scaled_bias(problem, bias.as_ref()));
        let work = m.saturating_mul(problem.n).saturating_mul(problem.k);
        let par = if work < SERIAL_WORK { &Serial } else { par };
        groups(m, &way, prepared.layout.blocks, |tiles, row0, buffer| {
            let call = Call {
                kernels,
                problem,
                way: &way,
                w,
                prepared,
                x: &x,
                row0,
                tiles,
                data: buffer.as_mut_ptr().cast(),
                exact: (0..tiles.rows).map(|_| OnceLock::new()).collect(),
                states: Vec::new(),
                bias: &bias,
                y: &y,
            };
            call.run(par)
        })
    };
    if done {
        return Ok(());
    }
    plain::linear(kernels, problem, x, w, Some(prepared), bias, y, par)
}

/// Calls `f` with stretches of `m` rows of x, each with its first row and a buffer for it, until it says
/// no.
fn groups(
    m: usize,
    way: &Way<'_>,
    blocks: usize,
    f: impl Fn(Tiles, usize, &mut [f32]) -> bool,
) -> bool {
    let row_bytes = blocks * (way.form.block_bytes() + 2 * size_of::<i32>());
    let most = (X_BYTES / row_bytes).clamp(1, MAX_ROWS);
    let groups = m.div_ceil(most);
    (0..groups).all(|group| {
        let (row0, end) = (m * group / groups, m * (group + 1) / groups);
        let rows = end - row0;
        scratch::for_call((rows * row_bytes).div_ceil(4), |buffer| {
            f(Tiles { rows, most: way.most }, row0, buffer)
        })
    })
}

/// Rows of x in tiles, evenly high.
#[derive(Debug, Clone, Copy)]
struct Tiles {
    rows: usize,
    most: usize,
}

impl Tiles {
    fn count(&self) -> usize {
        self.rows.div_ceil(self.most)
    }

    /// First row of tile `t`.
    fn start(&self, t: usize) -> usize {
        self.rows * t / self.count()
    }

    /// The tile that row `r` is in: the last that starts at or before it.
    fn of(&self, r: usize) -> usize {
        ((r + 1) * self.count() - 1) / self.rows
    }
}

/// The kernels of a path, and what they want of x.
enum Inner<'a> {
    /// All rows in one tile, by rows.
    Codes(&'a [Dot]),
    Integer(&'a IntegerKernels, usize, usize),
    Bf16(&'a Bf16Kernels, usize),
}

struct Way<'a> {
    inner: Inner<'a>,
    form: Form,
    /// Rows of the highest tile.
    most: usize,
}

impl<'a> Way<'a> {
    fn new(kernels: &'a Kernels, problem: &LinearProblem, path: Path) -> Option<Self> {
        let packed = &kernels.packed;
        let (w, x) = (problem.weight.format, problem.activation.map(|spec| spec.format));
        let quantised = x.is_some();
        Some(match path {
            Path::Integer => {
                let (integer, x) = (packed.integer?, x?);
                let index = integer_index(w)?;
                let narrow = usize::from(super::sum_fits(w, x, BLOCK as i32 / 2));
                let shift = tables::integer_shift(w)? + tables::integer_shift(x)?;
                let form = Form::Integer {
                    shift: tables::integer_shift(x)?,
                    total: shift,
                    offset: tables::offset(w),
                };
                let most = integer.panels[narrow].len();
                Self { inner: Inner::Integer(integer, index, narrow), form, most }
            }
            Path::Bf16Codes(parts) => {
                let bf16 = packed.bf16?;
                let table = if parts == 1 { &bf16.one } else { &bf16.two };
                let dots = table[float_index(w)?];
                let form = if quantised { Form::Bf16 } else { Form::Parts(parts) };
                Self { inner: Inner::Codes(dots), form, most: dots.len() }
            }
            Path::Bf16Panels(parts) => {
                let bf16 = packed.bf16?;
                let form = if quantised { Form::FoldedBf16 } else { Form::Parts(parts) };
                Self { inner: Inner::Bf16(bf16, float_index(w)?), form, most: bf16.tiles.len() }
            }
            Path::FloatCodes => {
                let dots = packed.float?.dots[float_index(w)?];
                Self { inner: Inner::Codes(dots), form: Form::F32, most: dots.len() }
            }
            Path::FloatPanels => return None,
        })
    }
}

/// Some rows of x against the whole weight.
struct Call<'a> {
    kernels: &'a Kernels,
    problem: &'a LinearProblem,
    way: &'a Way<'a>,
    w: &'a PackedWeight<'a>,
    prepared: &'a PreparedWeight,
    x: &'a Float<'a>,
    /// First row of x in y.
    row0: usize,
    tiles: Tiles,
    /// [tile][block][row] elements, then scales, then sums.
    data: *mut u8,
    /// Rows of x in f64, made where they are needed for rows of the weight.
    exact: Vec<OnceLock<Vec<f64>>>,
    states: Vec<Row>,
    /// beta * bias, or zeros.
    bias: &'a [f64],
    y: &'a Output,
}

// SAFETY: tasks write disjoint parts of `data` while x is packed and only read it afterwards.
unsafe impl Sync for Call<'_> {}

impl Call<'_> {
    fn blocks(&self) -> usize {
        self.prepared.layout.blocks
    }

    /// False where x has exponents that these kernels do not take: y is then not complete.
    fn run(mut self, par: &dyn Parallel) -> bool {
        if !self.pack_x(par) {
            return false;
        }
        let single = self.tiles.count() == 1;
        match self.way.inner {
            Inner::Codes(dots) => self.run_codes(dots, par),
            Inner::Integer(kernels, index, narrow) if single => {
                self.run_codes(kernels.codes[index][narrow], par);
            }
            _ => self.run_panels(par),
        }
        true
    }

    /// Where the scales start, and the sums.
    fn scales(&self) -> (*mut i32, *mut i32) {
        let count = self.tiles.rows * self.blocks();
        // SAFETY: the buffer was made for both behind the elements, whose bytes are a multiple of 32.
        unsafe {
            let scales = self.data.add(count * self.way.form.block_bytes()).cast::<i32>();
            (scales, scales.add(count))
        }
    }

    /// Whether the kernels take what comes of it.
    fn pack_x(&mut self, par: &dyn Parallel) -> bool {
        let (k, rows) = (self.problem.k, self.tiles.rows);
        let form = XForm { quant: self.problem.activation.map(RowQuant::new), form: self.way.form };
        let states: Vec<OnceLock<(Row, i32)>> = (0..rows).map(|_| OnceLock::new()).collect();
        let this = &*self;
        let one = |r: usize, raw: &mut [f32]| {
            let row = match this.x.slice((this.row0 + r) * k, k) {
                Float::F32(row) => row,
                other => {
                    other.load(0, raw);
                    &*raw
                }
            };
            let place = this.place(r);
            // SAFETY: the table of a variant is only handed out where `detect` says yes; only this call
            // writes the row's place.
            let _ = states[r].set(unsafe { (this.kernels.pack_x)(&form, row, &place) });
        };
        let per_task = (SERIAL_WORK / 4 / k).max(1);
        let tasks = rows.div_ceil(per_task);
        let run = |task: usize| {
            scratch::for_task(k, |raw| {
                for r in task * per_task..((task + 1) * per_task).min(rows) {
                    one(r, raw);
                }
            });
        };
        if tasks == 1 {
            run(0)
        } else {
            par.run(tasks, &run)
        }
        let states = states.iter().map(|s| s.get().copied().unwrap_or((Row::Exact, 0)));
        let mut low = 0;
        self.states = states
            .map(|(row, exponent)| {
                low = low.min(exponent);
                row
            })
            .collect();
        low >= LOWEST
            && low + self.prepared.layout.low >= LOWEST
            && !self.states.contains(&Row::Exact)
    }

    fn place(&self, r: usize) -> Place {
        let tile = self.tiles.of(r);
        let (start, end) = (self.tiles.start(tile), self.tiles.start(tile + 1));
        let (scales, sums) = self.scales();
        let parts = if let Form::Parts(parts) = self.way.form { parts } else { 1 };
        // SAFETY: a tile's rows start behind those of the tiles before it.
        unsafe {
            let first = start * self.blocks();
            let at = self.data.add(first * self.way.form.block_bytes());
            Place {
                data: at.add((r - start) * self.way.form.block_bytes() / parts),
                scales: scales.add(first + r - start),
                sums: sums.add(first + r - start),
                rows: end - start,
            }
        }
    }

    /// What a kernel needs for tile `t` and panel `p` from block `b` on.
    fn args(
        &self,
        t: usize,
        p: usize,
        b: usize,
        blocks: usize,
        c: *mut f32,
        ldc: usize,
    ) -> DotArgs {
        let (start, end) = (self.tiles.start(t), self.tiles.start(t + 1));
        let first = start * self.blocks() + b * (end - start);
        let (scales, sums) = self.scales();
        let layout = &self.prepared.layout;
        // SAFETY: tile and block exist.
        unsafe {
            DotArgs {
                tables: &*self.prepared.tables,
                w: layout.codes(p, b),
                scales: layout.scales(p, b),
                x: self.data.add(first * self.way.form.block_bytes()),
                x_scales: scales.add(first),
                x_sums: sums.add(first),
                blocks,
                parts: if let Form::Parts(parts) = self.way.form { parts } else { 1 },
                c,
                ldc,
                add: b > 0,
            }
        }
    }

    /// Few rows: each task takes a stretch of panels straight from the codes.
    fn run_codes(&self, dots: &[Dot], par: &dyn Parallel) {
        let panels = self.w.n().div_ceil(PANEL);
        let per_task = panels.div_ceil(4 * par.threads()).clamp(1, CODE_PANELS);
        let tiles = self.tiles.count();
        par.run(panels.div_ceil(per_task), &|task| {
            let p0 = task * per_task;
            let count = per_task.min(panels - p0);
            let ldc = count * PANEL;
            scratch::for_task(self.tiles.rows * ldc, |c| {
                for p in 0..count {
                    for t in 0..tiles {
                        let (start, end) = (self.tiles.start(t), self.tiles.start(t + 1));
                        let c = c[start * ldc + p * PANEL..].as_mut_ptr();
                        let args = self.args(t, p0 + p, 0, self.blocks(), c, ldc);
                        // SAFETY: the variant runs here and everything is as `args` says.
                        unsafe { dots[end - start - 1](&args) };
                    }
                }
                self.finish(0, self.tiles.rows, p0 * PANEL, c, ldc);
            });
        });
    }

    /// More rows: tasks take COLUMNS output features, fewer where that leaves threads idle, and split
    /// the tiles too when there are few features.
    fn run_panels(&self, par: &dyn Parallel) {
        let threads = par.threads();
        let width = PANEL * self.span();
        let mut columns = COLUMNS;
        while columns > width && self.w.n().div_ceil(columns) < 3 * threads {
            columns /= 2;
        }
        let stripes = self.w.n().div_ceil(columns);
        let tiles = self.tiles.count();
        let wanted = if threads > 1 { (3 * threads).div_ceil(stripes) } else { 1 };
        let splits = wanted.min(tiles.div_ceil(3)).max(1);
        par.run(stripes * splits, &|task| {
            let (stripe, split) = (task / splits, task % splits);
            let range = (tiles * split / splits, tiles * (split + 1) / splits);
            let n0 = stripe * columns;
            let used = columns.min((self.w.n() - n0).next_multiple_of(width));
            let rows = self.tiles.start(range.1) - self.tiles.start(range.0);
            let (panel, c) = (PANEL_FLOATS, rows * used);
            scratch::for_task(panel + c, |scratch| {
                let (panel, c) = scratch.split_at_mut(panel);
                match self.way.inner {
                    Inner::Integer(kernels, index, narrow) => {
                        self.integer_task(kernels, index, narrow, range, n0, used, panel, c);
                    }
                    Inner::Bf16(kernels, index) => {
                        self.bf16_task(kernels, index, range, n0, used, panel, c);
                    }
                    Inner::Codes(_) => {}
                }
                let (m0, m1) = (self.tiles.start(range.0), self.tiles.start(range.1));
                self.finish(m0, m1, n0, c, used);
            });
        });
    }

    /// Panels that a tile spans.
    fn span(&self) -> usize {
        if let Inner::Bf16(kernels, _) = self.way.inner { kernels.panels } else { 1 }
    }

    /// The steps of a task: panels (first, count) by blocks of k (first, count). While the rows of x stay
    /// in the second-level cache for all k, a panel is read from end to end, as memory likes it; more rows
    /// take a stretch of k with all panels.
    fn steps(
        &self,
        rows: usize,
        panels: usize,
        blocks: usize,
        mut f: impl FnMut(usize, usize, usize),
    ) {
        let span = self.span();
        let starts = (0..self.blocks()).step_by(blocks);
        let mut step = |p: usize, b: usize| f(p, b, blocks.min(self.blocks() - b));
        if rows * self.blocks() * self.way.form.block_bytes() <= NEAR {
            for p in (0..panels).step_by(span) {
                starts.clone().for_each(|b| step(p, b));
            }
        } else {
            for b in starts {
                (0..panels).step_by(span).for_each(|p| step(p, b));
            }
        }
    }

    #[allow(clippy::too_many_arguments)]
    fn integer_task(
        &self,
        kernels: &IntegerKernels,
        index: usize,
        narrow: usize,
        (t0, t1): (usize, usize),
        n0: usize,
        columns: usize,
        panel: &mut [f32],
        c: &mut [f32],
    ) {
        let (m0, m1) = (self.tiles.start(t0), self.tiles.start(t1));
        let out = panel.as_mut_ptr().cast::<u8>();
        self.steps(m1 - m0, columns / PANEL, INTEGER_BLOCKS, |p, b, blocks| {
            let codes = self.prepared.layout.codes(n0 / PANEL + p, b);
            // SAFETY: the variant runs here, the panel holds INTEGER_BLOCKS blocks.
            unsafe { kernels.unpack[index](&*self.prepared.tables, codes, blocks, out) };
            for t in t0..t1 {
                let (start, end) = (self.tiles.start(t), self.tiles.start(t + 1));
                let c = c[(start - m0) * columns + p * PANEL..].as_mut_ptr();
                let mut args = self.args(t, n0 / PANEL + p, b, blocks, c, columns);
                args.w = out;
                // SAFETY: as above, and everything is as `args` says.
                unsafe { kernels.panels[narrow][end - start - 1](&args) };
            }
        });
    }

    #[allow(clippy::too_many_arguments)]
    fn bf16_task(
        &self,
        kernels: &Bf16Kernels,
        index: usize,
        (t0, t1): (usize, usize),
        n0: usize,
        columns: usize,
        panel: &mut [f32],
        c: &mut [f32],
    ) {
        let (m0, m1) = (self.tiles.start(t0), self.tiles.start(t1));
        let last = self.w.n().div_ceil(PANEL) - 1;
        let step = chain(self.problem.k) / BLOCK;
        let stride = step * PANEL * BLOCK * 2;
        let out = panel.as_mut_ptr().cast::<u8>();
        let layout = &self.prepared.layout;
        self.steps(m1 - m0, columns / PANEL, step, |p, b, blocks| {
            for v in 0..kernels.panels {
                // Past the last panel the columns of the tile are never written to y.
                let source = (n0 / PANEL + p + v).min(last);
                let (codes, scales) = (layout.codes(source, b), layout.scales(source, b));
                // SAFETY: the variant runs here, `panel` holds so many panels of `step` blocks.
                unsafe {
                    let out = out.add(v * stride);
                    kernels.decode[index](&*self.prepared.tables, codes, scales, blocks, out);
                }
            }
            for t in t0..t1 {
                let (start, end) = (self.tiles.start(t), self.tiles.start(t + 1));
                let c = c[(start - m0) * columns + p * PANEL..].as_mut_ptr();
                let mut args = self.args(t, (n0 / PANEL + p).min(last), b, blocks, c, columns);
                args.w = out;
                // SAFETY: as above, and everything is as `args` says.
                unsafe { kernels.tiles[end - start - 1](&args, stride) };
            }
        });
    }

    /// Puts rows that are not plain right, then scales, adds the bias and writes y.
    fn finish(&self, m0: usize, m1: usize, n0: usize, c: &mut [f32], ldc: usize) {
        let columns = ldc.min(self.w.n() - n0);
        let special = self.prepared.layout.special;
        if special || self.states[m0..m1].iter().any(|&row| row != Row::Plain) {
            self.special(m0, m1, n0, columns, c, ldc);
        }
        let mut out = [0.0_f32; COLUMNS];
        for m in m0..m1 {
            for from in (0..columns).step_by(COLUMNS) {
                let len = COLUMNS.min(columns - from);
                let c = &c[(m - m0) * ldc + from..][..len];
                let n = n0 + from;
                let (bias, out) = (&self.bias[n..n + len], &mut out[..len]);
                // SAFETY: the variant runs here; row and columns lie within y and are this task's.
                unsafe {
                    (self.kernels.scale_row)(c, f64::from(self.problem.alpha), bias, out);
                    self.y.write((self.row0 + m) * self.w.n() + n, out);
                }
            }
        }
    }

    /// NaN where a block of NaN takes part, f64 where a scale or a value is out of the kernels' range.
    #[cold]
    fn special(&self, m0: usize, m1: usize, n0: usize, columns: usize, c: &mut [f32], ldc: usize) {
        let mut w = Vec::new();
        for j in 0..columns {
            let row = self.prepared.layout.rows[n0 + j];
            let mut decoded = false;
            for m in m0..m1 {
                let out = &mut c[(m - m0) * ldc + j];
                match (row, self.states[m]) {
                    (Row::Plain, Row::Plain) => {}
                    (Row::Nan, _) | (_, Row::Nan) => *out = f32::NAN,
                    _ => {
                        if !decoded {
                            w.resize(self.problem.k, 0.0);
                            reference::weight_row_f64(self.w, n0 + j, &mut w);
                            decoded = true;
                        }
                        let x = self.exact[m].get_or_init(|| self.exact_row(m));
                        *out = x.iter().zip(&w).map(|(x, w)| x * w).sum::<f64>() as f32;
                    }
                }
            }
        }
    }

    /// Row `m` of x, quantised, in f64.
    fn exact_row(&self, m: usize) -> Vec<f64> {
        let k = self.problem.k;
        let mut raw = vec![0.0_f32; k];
        self.x.load((self.row0 + m) * k, &mut raw);
        match &self.problem.activation {
            Some(spec) => reference::fake_row_f64(spec, &raw),
            None => raw.into_iter().map(f64::from).collect(),
        }
    }
}

/// k of one chain of fp32 additions in panels: as `cpu::linear` has it, and twice as long where the bound
/// of any data, (k/16 + 32) * 2^-23, leaves room for c/2 + k/(2c).
fn chain(k: usize) -> usize {
    if k >= 4096 { MOST_CHAIN } else { plain::chain(k) }
}

const MOST_CHAIN: usize = 512;

/// Floats that hold INTEGER_BLOCKS blocks of integers or two panels of a chain of bfloat16.
const PANEL_FLOATS: usize = 2 * PANEL * MOST_CHAIN / 2;
const _: () = assert!(INTEGER_BLOCKS * PANEL * BLOCK <= 4 * PANEL_FLOATS);
const _: () = assert!(block_bytes(crate::ElementFormat::MxInt8) == PANEL * BLOCK);
