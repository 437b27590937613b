//! Many rows of x: panels of the weight are decoded once and multiplied with all tiles.
#![allow(unsafe_code)]

use super::{
    integer::{Dot, DotArgs},
    kernels::{Bf16Kernels, Unpack},
    layout::{BLOCK, block_bytes},
    run::{COLUMNS, Call},
    way::Inner,
};
use crate::{
    cpu::{linear as plain, panel::PANEL, scratch},
    parallel::Parallel,
};

/// Bytes of x that stay in a second-level cache beside a panel.
const NEAR: usize = 512 << 10;
/// Bytes of the panel that integers are unpacked to.
const INTEGER_BYTES: usize = 16 << 10;

impl Call<'_> {
    /// More rows: tasks take COLUMNS output features, fewer where that leaves threads idle, and split
    /// the tiles too when there are few features.
    pub(super) fn run_panels(&self, par: &dyn Parallel) {
        let threads = par.threads();
        let width = PANEL * self.span();
        let mut columns = COLUMNS;
        while columns > width && self.w.n().div_ceil(columns) < 3 * threads {
            columns /= 2;
        }
        let stripes = self.w.n().div_ceil(columns);
        let tiles = self.tiles.count();
        let wanted = if threads > 1 { (3 * threads).div_ceil(stripes) } else { 1 };
        // Every split decodes the weight again.
        let splits = wanted.min(tiles.div_ceil(3)).min(self.tiles.rows.div_ceil(128)).max(1);
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
                    Inner::Integer(kernels, index, room) => {
                        let (unpack, tiles) = (kernels.unpack[index], kernels.panels[room]);
                        self.integer_task(unpack, tiles, range, n0, used, panel, c);
                    }
                    Inner::Words(kernels, index) => {
                        let (unpack, tiles) = (kernels.unpack[index], kernels.tiles);
                        self.integer_task(unpack, tiles, range, n0, used, panel, c);
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
        unpack: Unpack,
        tiles: &[Dot],
        (t0, t1): (usize, usize),
        n0: usize,
        columns: usize,
        panel: &mut [f32],
        c: &mut [f32],
    ) {
        let (m0, m1) = (self.tiles.start(t0), self.tiles.start(t1));
        let out = panel.as_mut_ptr().cast::<u8>();
        let most = INTEGER_BYTES / (PANEL * self.way.form.block_bytes());
        self.steps(m1 - m0, columns / PANEL, most, |p, b, blocks| {
            let codes = self.prepared.layout.at(n0 / PANEL + p, b).codes;
            // SAFETY: the variant runs here, the panel holds INTEGER_BYTES.
            unsafe { unpack(&*self.prepared.tables, codes, blocks, out) };
            let c = &mut c[p * PANEL..];
            self.each_tile((t0, t1), n0 / PANEL + p, b, blocks, out, c, columns, |rows, args| {
                // SAFETY: as above, and everything is as `args` says.
                unsafe { tiles[rows - 1](args) };
            });
        });
    }

    /// Multiplies what a panel was decoded to with tiles t0 to t1: `f` gets their rows and what a kernel needs.
    #[allow(clippy::too_many_arguments)]
    fn each_tile(
        &self,
        (t0, t1): (usize, usize),
        panel: usize,
        b: usize,
        blocks: usize,
        decoded: *const u8,
        c: &mut [f32],
        columns: usize,
        f: impl Fn(usize, &DotArgs),
    ) {
        let m0 = self.tiles.start(t0);
        for t in t0..t1 {
            let (start, end) = (self.tiles.start(t), self.tiles.start(t + 1));
            let c = c[(start - m0) * columns..].as_mut_ptr();
            let mut args = self.args(t, panel, b, blocks, c, columns);
            args.panel.codes = decoded;
            f(end - start, &args);
        }
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
                // SAFETY: the variant runs here, `panel` holds so many panels of `step` blocks.
                unsafe {
                    let (out, at) = (out.add(v * stride), layout.at(source, b));
                    kernels.decode[index](&*self.prepared.tables, at, blocks, out);
                }
            }
            let (c, panel) = (&mut c[p * PANEL..], (n0 / PANEL + p).min(last));
            self.each_tile((t0, t1), panel, b, blocks, out, c, columns, |rows, args| {
                // SAFETY: as above, and everything is as `args` says.
                unsafe { kernels.tiles[rows - 1](args, stride) };
            });
        });
    }
}

/// k of one chain of fp32 additions in panels: as `cpu::linear` has it, and twice as long where the bound
/// of any data, (k/16 + 32) * 2^-23, leaves room for c/2 + k/(2c).
fn chain(k: usize) -> usize {
    if k >= 4096 { MOST_CHAIN } else { plain::chain(k) }
}

const MOST_CHAIN: usize = 512;

/// Floats that hold INTEGER_BYTES of integers or two panels of a chain of bfloat16.
const PANEL_FLOATS: usize = 2 * PANEL * MOST_CHAIN / 2;
const _: () = assert!(INTEGER_BYTES <= 4 * PANEL_FLOATS);
const _: () = assert!(block_bytes(crate::ElementFormat::MxInt8) == PANEL * BLOCK);
