//! The driver: x to its tiles, tiles to y.
//!
//! As in `cpu::linear` every element of y is a fixed sum, whatever task computes it.
#![allow(unsafe_code)]

use std::sync::OnceLock;

use super::{
    Path, PreparedWeight,
    integer::{Dot, DotArgs},
    kernels::Together,
    layout::{BLOCK, LOWEST, Row},
    planes::Rest,
    tables::words,
    way::{Inner, Tiles, Way},
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
    tensor::{Float, FloatMut, LinearProblem, PackedWeight},
};

/// Rows of x at a time: with COLUMNS columns their sums fill a quarter of a second-level cache.
const MAX_ROWS: usize = 512;
/// Bytes of x at a time.
const X_BYTES: usize = 16 << 20;
/// Bytes between the elements of two tiles: tiles of 32 rows are a power of two long, and without a gap
/// the same k of all of them would share a few sets of a cache.
const GAP: usize = 129 * 64;
/// Output features of a task.
pub(super) const COLUMNS: usize = 128;
/// Panels of a task that takes its weights straight from the codes, at most.
const CODE_PANELS: usize = 32;

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
    // In how many bfloat16 an x that is not quantised is exact.
    let parts = match x {
        Float::F32(_) => None,
        Float::F16(_) => Some(2),
        Float::Bf16(_) => Some(1),
    };
    let scaled_bias = plain::scaled_bias(problem, bias.as_ref());
    let work = m.saturating_mul(problem.n).saturating_mul(problem.k);
    let threads = if work < SERIAL_WORK { &Serial } else { par };
    let product =
        Product { kernels, problem, x: &x, w, prepared, bias: &scaled_bias, par: threads };
    let packed = &kernels.packed;
    let mut path = match prepared.is_of(w) {
        true => packed.choose_for(problem, m, parts),
        false => None,
    };
    if path == Some(Path::Planes) {
        let way = Way::new(kernels, problem, Path::Planes);
        if way.is_some_and(|way| product.run(&way, 0, m, &mut y)) {
            return Ok(());
        }
        path = packed.choose_floats(problem, m, parts);
    }
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
    let groups = m.div_ceil((X_BYTES / product.row_bytes(&way)).clamp(1, MAX_ROWS));
    for group in 0..groups {
        let (row0, end) = (m * group / groups, m * (group + 1) / groups);
        if !product.run(&way, row0, end - row0, &mut y) {
            let rows = end - row0;
            let x = x.slice(row0 * problem.k, rows * problem.k);
            let y = y.slice_mut(row0 * problem.n, rows * problem.n);
            plain::linear(kernels, problem, x, w, Some(prepared), bias, y, par)?;
        }
    }
    Ok(())
}

/// The operands of a product.
struct Product<'a> {
    kernels: &'a Kernels,
    problem: &'a LinearProblem,
    x: &'a Float<'a>,
    w: &'a PackedWeight<'a>,
    prepared: &'a PreparedWeight,
    /// beta * bias, or zeros.
    bias: &'a [f64],
    par: &'a dyn Parallel,
}

impl Product<'_> {
    /// Bytes of a row of x as the kernels read it.
    fn row_bytes(&self, way: &Way<'_>) -> usize {
        let sums = 2 * size_of::<i32>() * way.form.rows();
        self.prepared.layout.blocks * (way.form.block_bytes() + sums)
    }

    /// Computes some rows of y; false, and y is not complete, where x has what the kernels do not take.
    fn run(&self, way: &Way<'_>, row0: usize, rows: usize, y: &mut FloatMut<'_>) -> bool {
        let &Self { kernels, problem, x, w, prepared, bias, par } = self;
        let tiles = Tiles { rows, most: way.most };
        let bytes = rows * self.row_bytes(way) + tiles.count() * GAP;
        let specials = if prepared.layout.special { rows } else { 0 };
        let out = Output::of(y);
        scratch::for_call(bytes.div_ceil(4), |buffer| {
            let call = Call {
                kernels,
                problem,
                way,
                w,
                prepared,
                x,
                row0,
                tiles,
                data: buffer.as_mut_ptr().cast(),
                exact: (0..specials).map(|_| OnceLock::new()).collect(),
                states: Vec::new(),
                rests: Vec::new(),
                bias,
                y: &out,
            };
            call.run(par)
        })
    }
}

/// Some rows of x against the whole weight.
pub(super) struct Call<'a> {
    pub kernels: &'a Kernels,
    pub problem: &'a LinearProblem,
    pub way: &'a Way<'a>,
    pub w: &'a PackedWeight<'a>,
    pub prepared: &'a PreparedWeight,
    pub x: &'a Float<'a>,
    /// First row of x in y.
    pub row0: usize,
    pub tiles: Tiles,
    /// [tile][block][row] elements with a [`GAP`] behind each tile, then scales, then sums.
    pub data: *mut u8,
    /// Rows of x in f64, made where rows of the weight need them; none where the weight has no such row.
    pub exact: Vec<OnceLock<Vec<f64>>>,
    pub states: Vec<Row>,
    /// What the planes of the only row lack.
    pub rests: Vec<Rest>,
    /// beta * bias, or zeros.
    pub bias: &'a [f64],
    pub y: &'a Output,
}

/// A pointer for whichever thread has the row.
#[derive(Clone, Copy)]
struct Shared(*mut Vec<Rest>);
// SAFETY: only the task of the row goes through it.
unsafe impl Sync for Shared {}

impl Shared {
    fn get(&self) -> *mut Vec<Rest> {
        self.0
    }
}

// SAFETY: tasks write disjoint parts of `data` while x is packed and only read it afterwards.
unsafe impl Sync for Call<'_> {}

impl Call<'_> {
    pub(super) fn blocks(&self) -> usize {
        self.prepared.layout.blocks
    }

    /// False where x has exponents that these kernels do not take: y is then not complete.
    fn run(mut self, par: &dyn Parallel) -> bool {
        if !self.pack_x(par) {
            return false;
        }
        let single = self.tiles.count() == 1;
        match self.way.inner {
            Inner::Codes(dots) => self.run_codes(dots, self.way.together, par),
            Inner::Integer(kernels, index, room) if single => {
                self.run_codes(kernels.codes[index][room], self.way.together, par);
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
            let bytes = count * self.way.form.block_bytes() + self.tiles.count() * GAP;
            let scales = self.data.add(bytes).cast::<i32>();
            (scales, scales.add(count * self.way.form.rows()))
        }
    }

    /// Whether the kernels take what comes of it.
    fn pack_x(&mut self, par: &dyn Parallel) -> bool {
        let (k, rows) = (self.problem.k, self.tiles.rows);
        let form = XForm { quant: self.problem.activation.map(RowQuant::new), form: self.way.form };
        let states: Vec<OnceLock<(Row, i32)>> = (0..rows).map(|_| OnceLock::new()).collect();
        // Planes are of a single row, which alone writes to the list.
        let mut rests = std::mem::take(&mut self.rests);
        let rests_at = Shared(&raw mut rests);
        let this = &*self;
        let one = |r: usize, raw: &mut [f32]| {
            let row = match this.x.slice((this.row0 + r) * k, k) {
                Float::F32(row) => row,
                other => {
                    other.load(0, raw);
                    &*raw
                }
            };
            let place = this.place(r, rests_at.get());
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
        self.rests = rests;
        let states = states.iter().map(|s| s.get().copied().unwrap_or((Row::Exact, 0)));
        let mut low = 0;
        self.states = states
            .map(|(row, exponent)| {
                low = low.min(exponent);
                row
            })
            .collect();
        low >= LOWEST + self.left_out()
            && low + self.prepared.layout.low >= LOWEST
            && !self.states.contains(&Row::Exact)
    }

    /// log2 of what elements of the weight are too small by as factors of an x that is not quantised: where
    /// subnormal numbers are flushed, what is left of sums that cancel is to stay above them.
    fn left_out(&self) -> i32 {
        match (self.way.form, self.problem.activation) {
            (Form::F32, None) => words(self.problem.weight.format).left_out,
            _ => 0,
        }
    }

    fn place(&self, r: usize, rests: *mut Vec<Rest>) -> Place {
        let tile = self.tiles.of(r);
        let (start, end) = (self.tiles.start(tile), self.tiles.start(tile + 1));
        let (scales, sums) = self.scales();
        let parts = if let Form::Parts(parts) = self.way.form { parts } else { 1 };
        let rows = self.way.form.rows();
        // SAFETY: a tile's rows start behind those of the tiles before it.
        unsafe {
            let first = start * self.blocks();
            let at = self.data.add(first * self.way.form.block_bytes() + tile * GAP);
            Place {
                data: at.add((r - start) * self.way.form.block_bytes() / parts),
                scales: scales.add((first + r - start) * rows),
                sums: sums.add((first + r - start) * rows),
                rows: (end - start) * rows,
                rests,
            }
        }
    }

    /// What a kernel needs for tile `t` and panel `p` from block `b` on.
    pub(super) fn args(
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
                panel: layout.at(p, b),
                x: self.data.add(first * self.way.form.block_bytes() + t * GAP),
                x_scales: scales.add(first * self.way.form.rows()),
                x_sums: sums.add(first * self.way.form.rows()),
                blocks,
                parts: if let Form::Parts(parts) = self.way.form { parts } else { 1 },
                panel_blocks: self.blocks(),
                c,
                ldc,
                add: b > 0,
            }
        }
    }

    /// Few rows: each task takes a stretch of panels straight from the codes.
    fn run_codes(&self, dots: &[Dot], together: &[Together], par: &dyn Parallel) {
        let panels = self.w.n().div_ceil(PANEL);
        let tiles = self.tiles.count();
        let rows = self.way.form.rows();
        let several = if tiles == 1 { together.get(self.tiles.rows * rows - 1) } else { None };
        let most = several.map_or(1, |kernel| kernel.panels);
        let mut per_task = match par.threads() {
            1 => CODE_PANELS,
            threads => panels.div_ceil(4 * threads).clamp(1, CODE_PANELS),
        };
        // With so many threads that each has fewer, memory is shared out and an even split counts for more.
        if per_task > most {
            per_task = per_task.next_multiple_of(most);
        }
        par.run(panels.div_ceil(per_task), &|task| {
            let p0 = task * per_task;
            let count = per_task.min(panels - p0);
            let ldc = count * PANEL;
            scratch::for_task(self.tiles.rows * rows * ldc, |c| {
                let mut p = 0;
                while p < count {
                    let several = several.filter(|kernel| kernel.panels <= count - p);
                    for t in 0..tiles {
                        let (start, end) = (self.tiles.start(t), self.tiles.start(t + 1));
                        let dot = several.map_or(dots[(end - start) * rows - 1], |k| k.dot);
                        let c = c[start * rows * ldc + p * PANEL..].as_mut_ptr();
                        let args = self.args(t, p0 + p, 0, self.blocks(), c, ldc);
                        // SAFETY: the variant runs here and everything is as `args` says.
                        unsafe { dot(&args) };
                    }
                    p += several.map_or(1, |kernel| kernel.panels);
                }
                if rows > 1 {
                    self.join_parts(p0, c, ldc);
                }
                self.finish(0, self.tiles.rows, p0 * PANEL, c, ldc);
            });
        });
    }

    /// Sums of the parts of each row of x, `ldc` apart, to sums of the row, from panel `p0` on.
    fn join_parts(&self, p0: usize, c: &mut [f32], ldc: usize) {
        let parts = self.way.form.rows();
        let layout = &self.prepared.layout;
        for r in 0..self.tiles.rows {
            for at in (0..ldc).step_by(PANEL) {
                // A sum of their own for the rests, whose roundings the parts' are not to have.
                let mut sums = [0.0_f32; PANEL];
                for &rest in &self.rests {
                    let (panel, b) = (p0 + at / PANEL, rest.k / BLOCK);
                    let (tables, at) = (&self.prepared.tables, layout.at(panel, b));
                    // SAFETY: the variant runs here and the panel has the block.
                    unsafe { (self.kernels.add_rest)(tables, layout.bits, at, rest, &mut sums) };
                }
                // The smallest first.
                for p in (r * parts..(r + 1) * parts).rev() {
                    for (sum, &part) in sums.iter_mut().zip(&c[p * ldc + at..]) {
                        *sum += part;
                    }
                }
                c[r * ldc + at..][..PANEL].copy_from_slice(&sums);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::kernels::SPLIT, *};
    use crate::{ElementFormat, QuantSpec, cpu::runnable};

    /// Ordinary rows go in planes wherever sums have room for them, and rows of many magnitudes do not.
    #[test]
    fn ordinary_rows_go_in_planes() {
        let (n, k) = (48, 2080);
        for format in [ElementFormat::Fp4E2M1, ElementFormat::Fp6E2M3, ElementFormat::Fp6E3M2] {
            let spec = QuantSpec::mx(format).unwrap();
            let problem =
                LinearProblem { n, k, weight: spec, activation: None, alpha: 1.0, beta: 1.0 };
            let codes: Vec<u8> = (0..spec.codes_len(n, k)).map(|i| (i * 37 % 251) as u8).collect();
            let scales = vec![127_u8; n * k / 32];
            let w = PackedWeight::new(spec, n, k, &codes, &scales).unwrap();
            for kernels in runnable().iter().filter(|k| k.packed.integer.is_some()) {
                let what = format!("{} {format}", kernels.name);
                let Some(prepared) = PreparedWeight::with(kernels, &problem, &w, &Serial) else {
                    let neon = cfg!(target_arch = "aarch64");
                    assert!(neon && format == ElementFormat::Fp6E3M2, "{what}");
                    continue;
                };
                let integer = kernels.packed.integer.unwrap();
                let bf16 = kernels.packed.bf16.is_some_and(|bf16| bf16.code_rows > 0);
                match format {
                    ElementFormat::Fp4E2M1 => {}
                    ElementFormat::Fp6E2M3 if !integer.wide => {}
                    // Where there are kernels of four rows, and bfloat16 is not the faster way.
                    ElementFormat::Fp6E3M2 if integer.codes[SPLIT][2].len() >= 4 && !bf16 => {}
                    _ => continue,
                }
                assert_eq!(kernels.packed.choose(&problem, 1), Some(Path::Planes), "{what}");
                let way = Way::new(kernels, &problem, Path::Planes).unwrap();
                for (large, planes) in [(0, true), (3, true), (65, false)] {
                    let mut x: Vec<f32> = (0..k).map(|i| (i * 29 % 97) as f32 - 48.2).collect();
                    (0..large).for_each(|b| x[32 * b] = 1e9);
                    let (x, bias, mut y) = (Float::F32(&x), vec![0.0; n], vec![0.0; n]);
                    let product = Product {
                        kernels,
                        problem: &problem,
                        x: &x,
                        w: &w,
                        prepared: &prepared,
                        bias: &bias,
                        par: &Serial,
                    };
                    let done = product.run(&way, 0, 1, &mut FloatMut::F32(&mut y));
                    assert_eq!(done, planes, "{what} {large}");
                }
            }
        }
    }
}
