//! Which kernels a product takes, and the tiles of x that they want.

use super::{
    Path,
    integer::Dot,
    kernels::{
        Bf16Kernels, IntegerKernels, Together, WordKernels, code_index, float_index, integer_index,
    },
    tables,
    x::Form,
};
use crate::{cpu::Kernels, formats::ElementFormat, tensor::LinearProblem};

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
    /// Straight from the codes, by rows of a tile.
    Codes(&'a [Dot]),
    Integer(&'a IntegerKernels, usize, usize),
    Words(&'a WordKernels, usize),
    Bf16(&'a Bf16Kernels, usize),
}

pub(super) struct Way<'a> {
    pub inner: Inner<'a>,
    pub form: Form,
    /// Rows of the highest tile.
    pub most: usize,
    /// Kernels of several panels by rows, where memory is read faster so.
    pub together: &'a [Together],
}

impl<'a> Way<'a> {
    pub(super) fn new(kernels: &'a Kernels, problem: &LinearProblem, path: Path) -> Option<Self> {
        let packed = &kernels.packed;
        let (w, x) = (problem.weight.format, problem.activation.map(|spec| spec.format));
        let quantised = x.is_some();
        let mut together: &[Together] = &[];
        let (inner, form, most) = match path {
            Path::Integer => {
                let (integer, x) = (packed.integer?, x?);
                let index = integer_index(w)?;
                let room = super::room(w, x);
                let shift = tables::integer_shift(w)? + tables::integer_shift(x)?;
                let form = Form::Integer {
                    shift: tables::integer_shift(x)?,
                    total: shift,
                    offset: tables::offset(w),
                };
                let most = integer.panels[room].len();
                together = integer.together[index];
                (Inner::Integer(integer, index, room), form, most)
            }
            Path::Split => {
                let (integer, index, x) = (packed.integer?, code_index(w)?, x?);
                let shift = tables::whole_shift(x)?;
                let (total, offset) = (shift + tables::whole_shift(w)?, tables::offset(w));
                let form = match x {
                    ElementFormat::Fp6E3M2 => Form::Split { total, offset },
                    _ => Form::Integer { shift, total, offset },
                };
                let dots = integer.codes[index][0];
                together = integer.together[index];
                (Inner::Codes(dots), form, dots.len() / form.rows())
            }
            Path::Words => {
                let (words, shift) = (packed.words?, tables::whole_shift(x?)?);
                let form = Form::Words { shift, total: shift + tables::whole_shift(w)? };
                (Inner::Words(words, code_index(w)?), form, words.tiles.len())
            }
            Path::Planes => {
                let (integer, index) = (packed.integer?, code_index(w)?);
                let form =
                    Form::Planes { offset: tables::offset(w), shift: tables::whole_shift(w)? };
                together = integer.together[index];
                (Inner::Codes(integer.codes[index][2]), form, 1)
            }
            Path::Bf16Codes(parts) => {
                let bf16 = packed.bf16?;
                let table = if parts == 1 { &bf16.one } else { &bf16.two };
                let dots = table[float_index(w)?];
                let form = if quantised { Form::Bf16 } else { Form::Parts(parts) };
                (Inner::Codes(dots), form, dots.len())
            }
            Path::Bf16Panels(parts) => {
                let bf16 = packed.bf16?;
                let form = if quantised { Form::FoldedBf16 } else { Form::Parts(parts) };
                (Inner::Bf16(bf16, float_index(w)?), form, bf16.tiles.len())
            }
            Path::FloatCodes => {
                let (float, index) = (packed.float?, float_index(w)?);
                let dots = float.dots[index];
                together = float.together[index];
                (Inner::Codes(dots), Form::F32, dots.len())
            }
            Path::FloatPanels => return None,
        };
        let together = if packed.together { together } else { &[] };
        Some(Self { inner, form, most, together })
    }
}
