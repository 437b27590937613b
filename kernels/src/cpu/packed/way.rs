//! Which kernels a product takes, and the tiles of x that they want.

use super::{
    Path,
    integer::Dot,
    kernels::{Bf16Kernels, IntegerKernels, float_index, integer_index},
    layout::BLOCK,
    tables,
    x::Form,
};
use crate::{cpu::Kernels, tensor::LinearProblem};

/// Rows of x in tiles, evenly high.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tiles {
    pub rows: usize,
    /// Rows of the highest tile.
    pub most: usize,
}

impl Tiles {
    pub(super) fn count(&self) -> usize {
        self.rows.div_ceil(self.most)
    }

    /// First row of tile `t`.
    pub(super) fn start(&self, t: usize) -> usize {
        self.rows * t / self.count()
    }

    /// The tile that row `r` is in: the last that starts at or before it.
    pub(super) fn of(&self, r: usize) -> usize {
        ((r + 1) * self.count() - 1) / self.rows
    }
}

/// The kernels of a path, and what they want of x.
pub(super) enum Inner<'a> {
    /// All rows in one tile, by rows.
    Codes(&'a [Dot]),
    Integer(&'a IntegerKernels, usize, usize),
    Bf16(&'a Bf16Kernels, usize),
}

pub(super) struct Way<'a> {
    pub inner: Inner<'a>,
    pub form: Form,
    /// Rows of the highest tile.
    pub most: usize,
}

impl<'a> Way<'a> {
    pub(super) fn new(kernels: &'a Kernels, problem: &LinearProblem, path: Path) -> Option<Self> {
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
            Path::Planes => {
                let dots = packed.integer?.codes[integer_index(w)?][1];
                let form =
                    Form::Planes { offset: tables::offset(w), shift: tables::integer_shift(w)? };
                Self { inner: Inner::Codes(dots), form, most: 1 }
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
