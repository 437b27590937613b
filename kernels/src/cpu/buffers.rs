//! What goes into the kernels and what comes out: x to its panel, results to y.
#![allow(unsafe_code)]

use std::sync::OnceLock;

use super::{Kernels, linear::SERIAL_WORK, rows::RowQuant, scratch, tile::CHUNK};
use crate::{
    parallel::Parallel,
    reference,
    scale::ScaleKind,
    tensor::{Float, FloatMut, LinearProblem},
};

/// Where results go; tasks write disjoint elements.
pub(crate) enum Output {
    F32(*mut f32),
    F16(*mut half::f16),
    Bf16(*mut half::bf16),
}

// SAFETY: each element is written by one task, and the owner waits for all of them.
unsafe impl Sync for Output {}

impl Output {
    /// The elements of `y`.
    pub(crate) fn of(y: &mut FloatMut<'_>) -> Self {
        match y {
            FloatMut::F32(y) => Self::F32(y.as_mut_ptr()),
            FloatMut::F16(y) => Self::F16(y.as_mut_ptr()),
            FloatMut::Bf16(y) => Self::Bf16(y.as_mut_ptr()),
        }
    }

    /// Writes `values` from element `at` on.
    ///
    /// # Safety
    /// The elements lie within the output, and no other task writes them.
    pub(crate) unsafe fn write(&self, at: usize, values: &[f32]) {
        // SAFETY: the caller vouches for the range.
        unsafe {
            match *self {
                Self::F32(y) => {
                    std::slice::from_raw_parts_mut(y.add(at), values.len()).copy_from_slice(values);
                }
                Self::F16(y) => {
                    let y = std::slice::from_raw_parts_mut(y.add(at), values.len());
                    half::slice::HalfFloatSliceExt::convert_from_f32_slice(y, values);
                }
                Self::Bf16(y) => {
                    let y = std::slice::from_raw_parts_mut(y.add(at), values.len());
                    half::slice::HalfFloatSliceExt::convert_from_f32_slice(y, values);
                }
            }
        }
    }
}

/// The activation's scale for a whole tensor, else 1.
pub(crate) fn tensor_divisor(problem: &LinearProblem, x: &Float<'_>) -> f32 {
    match &problem.activation {
        Some(spec) if spec.scale == ScaleKind::Tensor => {
            let finite = (0..x.len()).map(|i| x.get(i).abs()).filter(|v| v.is_finite());
            reference::tensor_scale(spec.format, finite.fold(0.0, f32::max))
        }
        _ => 1.0,
    }
}

/// A pointer that tasks write disjoint parts through.
struct Shared(*mut f32);
// SAFETY: see the one use below.
unsafe impl Sync for Shared {}

/// Fills `buffer` with rows `row0..row0 + rows` of x, quantised, in `XPanel`'s order. Rows that do
/// not fit normal f32 come back in f64.
#[allow(clippy::too_many_arguments)]
pub(crate) fn prepare_x(
    kernels: &Kernels,
    problem: &LinearProblem,
    x: &Float<'_>,
    divisor: f32,
    row0: usize,
    rows: usize,
    buffer: &mut [f32],
    par: &dyn Parallel,
) -> Vec<OnceLock<Vec<f64>>> {
    let k = problem.k;
    let exact: Vec<OnceLock<Vec<f64>>> = (0..rows).map(|_| OnceLock::new()).collect();
    let quant = problem.activation.map(RowQuant::new);
    let target = Shared(buffer.as_mut_ptr());
    let target = &target;
    let one = |r: usize, scratch: &mut [f32]| {
        let (raw, quantised) = scratch.split_at_mut(k);
        x.load((row0 + r) * k, raw);
        let mut values: &[f32] = raw;
        if let Some(quant) = &quant {
            // SAFETY: the table of a variant is only handed out where `detect` says yes.
            if unsafe { (kernels.fake_row)(quant, raw, divisor, quantised) } {
                let _ = exact[r].set(reference::fake_row_f64(&quant.spec, raw));
            }
            values = quantised;
        }
        for (c, part) in values.chunks(CHUNK).enumerate() {
            // SAFETY: chunk c of row r is in the buffer of rows * ceil(k / CHUNK) chunks, and only
            // this call writes it.
            let to = unsafe {
                std::slice::from_raw_parts_mut(target.0.add((c * rows + r) * CHUNK), CHUNK)
            };
            to[..part.len()].copy_from_slice(part);
            to[part.len()..].fill(0.0);
        }
    };
    let per_task = (SERIAL_WORK / 4 / k).max(1);
    let tasks = rows.div_ceil(per_task);
    let run = |task: usize| {
        scratch::for_task(2 * k, |scratch| {
            for r in task * per_task..((task + 1) * per_task).min(rows) {
                one(r, scratch);
            }
        });
    };
    if tasks == 1 {
        run(0)
    } else {
        par.run(tasks, &run)
    }
    exact
}
