//! Weights repacked once, for kernels that stream them: integer, bfloat16 and fp32 products.
//!
//! `layout` has the order, `x` the other operand, `integer`, `x86_*` the kernels, `run` the driver.

mod finish;
pub(crate) mod integer;
pub(crate) mod kernels;
pub(crate) mod layout;
mod panels;
pub(crate) mod planes;
mod run;
pub(crate) mod tables;
mod way;
pub(crate) mod x;
#[cfg(target_arch = "x86_64")]
pub(crate) mod x86_amx;
#[cfg(target_arch = "x86_64")]
mod x86_bf16;
#[cfg(target_arch = "x86_64")]
mod x86_e2m3;
#[cfg(target_arch = "x86_64")]
mod x86_float;
#[cfg(target_arch = "x86_64")]
mod x86_float512;
#[cfg(target_arch = "x86_64")]
mod x86_integer;
#[cfg(target_arch = "x86_64")]
mod x86_words;

pub(crate) use run::linear;

use self::{
    kernels::{PackedKernels, SPLIT, code_index, float_index, integer_index},
    layout::{Layout, Row},
    tables::Tables,
};
use super::Kernels;
use crate::{
    formats::ElementFormat,
    parallel::Parallel,
    tensor::{LinearProblem, PackedWeight, QuantSpec},
};

/// A weight [n, k] in the order in which this machine's kernels read it.
///
/// It is as large as the packed bytes (rows rounded up to sixteen, k to 32) and independent of them, but
/// [`crate::linear_prepared`] still needs them: what the kernels do not take (infinities, x with exponents
/// at the ends of f32's range, and on some machines all but few rows of x) is computed from the original.
#[derive(Debug)]
pub struct PreparedWeight {
    pub(crate) layout: Layout,
    pub(crate) tables: Box<Tables>,
    n: usize,
    k: usize,
    spec: QuantSpec,
}

impl PreparedWeight {
    /// Repacks `w` for problems like `problem` on the threads of `par`; `None` where this machine has
    /// no kernel that would use it, for one row of x or more: `mxint8` without integer products, blocks of 16, scales other than
    /// `e8m0`, fewer than eight features, and more than one row in 512 whose scales are over 2^40 apart or
    /// that has infinities.
    pub fn new(problem: &LinearProblem, w: &PackedWeight<'_>, par: &dyn Parallel) -> Option<Self> {
        Self::with(super::kernels(), problem, w, par)
    }

    pub(crate) fn with(
        kernels: &Kernels,
        problem: &LinearProblem,
        w: &PackedWeight<'_>,
        par: &dyn Parallel,
    ) -> Option<Self> {
        if kernels.packed.choose(problem, 1).is_none() || !Layout::fits(w) || w.n() < FEW_FEATURES {
            return None;
        }
        let layout = Layout::new(w, par);
        let exact = layout.rows.iter().filter(|&&row| row == Row::Exact).count();
        (exact <= w.n() / 512).then(|| Self {
            layout,
            tables: Box::new(Tables::new(w.spec().format)),
            n: w.n(),
            k: w.k(),
            spec: *w.spec(),
        })
    }

    /// Bytes of memory that it takes.
    pub fn bytes(&self) -> usize {
        self.layout.bytes() + size_of::<Tables>() + size_of::<Self>()
    }

    /// Whether it was made of a weight like `w`.
    pub(crate) fn is_of(&self, w: &PackedWeight<'_>) -> bool {
        (self.n, self.k, &self.spec) == (w.n(), w.k(), w.spec())
    }
}

/// Output features below which a panel of sixteen would be mostly empty.
const FEW_FEATURES: usize = 8;

/// Which kernels multiply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Path {
    /// Exact integers.
    Integer,
    /// The same where e3m2 takes part, two integers an element.
    Split,
    /// Panels of sixteen-bit integers, the same formats.
    Words,
    /// The first with an x of floats in planes, see `planes`.
    Planes,
    /// bfloat16 straight from the codes, x in so many parts.
    Bf16Codes(usize),
    /// Panels of bfloat16, x in so many parts.
    Bf16Panels(usize),
    /// fp32 straight from the codes.
    FloatCodes,
    /// Panels of fp32.
    FloatPanels,
}

/// Up to so many rows of x fp32 straight from the codes beats panels of bfloat16.
const FLOAT_ROWS: usize = 4;
/// Most rows of the kernels that are rows of x in two integers an element.
const SPLIT_ROWS: usize = 8;
/// Rows of x from which on panels of sixteen-bit integers beat fp32 straight from the codes.
const WORD_ROWS: usize = 5;
/// From this k on x in two bfloat16, exact to 2^-18, keeps to the bound of any data.
const TWO_PARTS: usize = 512;

impl PackedKernels {
    /// The way for `m` rows of x; `None` where only [`crate::linear`] has one.
    pub(crate) fn choose(&self, problem: &LinearProblem, m: usize) -> Option<Path> {
        self.choose_for(problem, m, None)
    }

    /// [`Self::choose`] where it is known in how many bfloat16 an unquantised x is exact.
    pub(crate) fn choose_for(
        &self,
        problem: &LinearProblem,
        m: usize,
        parts: Option<usize>,
    ) -> Option<Path> {
        let format = problem.weight.format;
        let quantised = match &problem.activation {
            Some(x) if x.scale != crate::ScaleKind::E8M0 => return None,
            Some(x) if !x.block_size.is_multiple_of(layout::BLOCK) => return None,
            Some(x) => Some(x.format),
            None => None,
        };
        if let (Some(x), Some(integer)) = (quantised, self.integer)
            && integer_index(format).is_some()
            && integer_index(x).is_some()
            && (!integer.wide || pair_fits(format, x))
            && (self.bf16.is_none_or(|bf16| m <= bf16.integer_rows)
                || float_index(format).is_none())
        {
            return Some(Path::Integer);
        }
        if quantised.is_some_and(|x| self.takes_split(format, x, m)) {
            return Some(Path::Split);
        }
        if quantised.is_some_and(|x| self.takes_words(format, x, m)) {
            return Some(Path::Words);
        }
        if m == 1 && self.takes_planes(problem) && (parts != Some(1) || !self.bf16_codes()) {
            return Some(Path::Planes);
        }
        self.choose_floats(problem, m, parts)
    }

    /// Whether bfloat16 is the fast way for a few rows.
    fn bf16_codes(&self) -> bool {
        self.bf16.is_some_and(|bf16| bf16.code_rows > 0)
    }

    /// Whether m rows of x go through kernels for two integers an element.
    fn takes_split(&self, w: ElementFormat, x: ElementFormat, m: usize) -> bool {
        let split = [w, x].contains(&ElementFormat::Fp6E3M2);
        let (Some(integer), Some(w), Some(_)) = (self.integer, code_index(w), code_index(x)) else {
            return false;
        };
        let rows = m * if x == ElementFormat::Fp6E3M2 { 2 } else { 1 };
        split
            && !integer.codes[SPLIT][0].is_empty()
            && !self.bf16_codes()
            && rows <= integer.codes[w][0].len().min(SPLIT_ROWS)
    }

    /// Whether m rows of x go through panels of sixteen-bit integers.
    fn takes_words(&self, w: ElementFormat, x: ElementFormat, m: usize) -> bool {
        self.words.is_some()
            && [w, x].contains(&ElementFormat::Fp6E3M2)
            && code_index(w).is_some()
            && code_index(x).is_some()
            && m >= WORD_ROWS
    }

    /// Whether one row of x may go in planes. Sums of sixteen bits have room for those of e2m1 alone.
    fn takes_planes(&self, problem: &LinearProblem) -> bool {
        let Some(integer) = self.integer else { return false };
        let fits = match problem.weight.format {
            ElementFormat::Fp4E2M1 => true,
            ElementFormat::Fp6E2M3 => !integer.wide,
            ElementFormat::Fp6E3M2 => {
                integer.codes[SPLIT][0].len() >= planes::PLANES && !self.bf16_codes()
            }
            _ => false,
        };
        fits && problem.activation.is_none()
    }

    /// The way by floats.
    pub(crate) fn choose_floats(
        &self,
        problem: &LinearProblem,
        m: usize,
        parts: Option<usize>,
    ) -> Option<Path> {
        let quantised = problem.activation.map(|x| x.format);
        let index = float_index(problem.weight.format)?;
        if let Some(bf16) = self.bf16 {
            // Where nothing is known x is taken in two parts, which float32 is not exactly.
            let exact = quantised.is_some() || parts.is_some() || problem.k >= TWO_PARTS;
            let (parts, kernels) = match (quantised, parts) {
                (Some(_), _) | (None, Some(1)) => (1, &bf16.one),
                _ => (2, &bf16.two),
            };
            if exact && m <= kernels[index].len().min(bf16.code_rows) {
                return Some(Path::Bf16Codes(parts));
            }
            let few = m <= FLOAT_ROWS && kernels[index].is_empty();
            if exact && !few && (parts == 1 || bf16.parts) {
                return Some(Path::Bf16Panels(parts));
            }
        }
        let float = self.float?;
        match m <= float.code_rows && !float.dots[index].is_empty() {
            true => Some(Path::FloatCodes),
            false => Some(Path::FloatPanels),
        }
    }
}

/// Largest magnitude of a weight's integers with their offset, of x's without.
const fn largest(format: ElementFormat) -> (i32, i32) {
    match format {
        ElementFormat::Fp4E2M1 => (24, 12),
        ElementFormat::Fp6E2M3 => (120, 60),
        _ => (255, 127),
    }
}

/// Whether sums of `terms` products fit sixteen bits.
pub(crate) const fn sum_fits(w: ElementFormat, x: ElementFormat, terms: i32) -> bool {
    largest(w).0 * largest(x).1 * terms <= i16::MAX as i32
}

/// How many sums of pairs fit sixteen bits, as an index: one, two, or all of a block.
pub(crate) const fn room(w: ElementFormat, x: ElementFormat) -> usize {
    if sum_fits(w, x, layout::BLOCK as i32 / 2) {
        2
    } else if sum_fits(w, x, 4) {
        1
    } else {
        0
    }
}

// A block's sum of pairs fits sixteen bits for planes, too.
const _: () = assert!(
    largest(ElementFormat::Fp4E2M1).0 * planes::LARGEST * (layout::BLOCK as i32 / 2)
        <= i16::MAX as i32
);

const fn pair_fits(w: ElementFormat, x: ElementFormat) -> bool {
    sum_fits(w, x, 2)
}
