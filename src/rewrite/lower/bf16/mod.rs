//! The whole graph as a bfloat16 run would compute it, in a graph that stays float32 (or float16):
//! ONNX Runtime has few bfloat16 kernels for the CPU.
//!
//! Values are of two kinds. *Model* values are computed from the network's activations: from float
//! graph inputs, from rows gathered out of a weight (embeddings), from a product with a constant
//! [k, n] weight, and from anything that a model value enters. All other float values are *fixed*:
//! positions, rotary angles, masks, computed from integers and constants alone.
//!
//! - Weights: a constant of more than one element that a model operation reads is rounded in place
//!   to bfloat16 values, half to even. Single numbers of a formula (eps, a scale) are not: PyTorch
//!   keeps them in full precision.
//! - Model values: every float result is rounded by a pair of Casts, unless the operator only moves
//!   or selects values that are rounded already. The insides of norms, of biased products, of SiLU
//!   and GELU stay in float32 (see [`islands`]), as do those of single operators (Softmax,
//!   LayerNormalization): a bfloat16 run computes them so and rounds once.
//! - Fixed values stay in float32 (positions above 256 have no bfloat16) and are rounded where they
//!   enter a model operation: cosines and sines, masks.
//! - A finite constant beyond bfloat16's range (-3.4e38 in masks) becomes the largest finite value,
//!   never an infinity. So do float graph inputs.
//!
//! Names, types and order of graph inputs and outputs stay; outputs are rounded too (the logits of a
//! bfloat16 run). Sub-graphs are rounded like the main graph; model-local functions are taken as one
//! operation each. Values that are bfloat16 already are left alone.

pub(in crate::rewrite::lower) mod classify;
pub(in crate::rewrite::lower) mod constants;
pub(in crate::rewrite::lower) mod islands;
pub(in crate::rewrite::lower) mod rounding;
#[cfg(test)]
mod tests;
pub(in crate::rewrite::lower) mod types;

use super::super::{execute::ExecuteError, patch::collect_names};
use crate::onnx::Model;
use std::collections::HashSet;

/// First opset whose Cast knows bfloat16.
const OPSET: i64 = 13;

/// Rounds a model to bfloat16.
///
/// # Errors
/// An opset before 13; a sub-graph or constant that cannot be read.
pub(crate) fn round(model: &Model) -> Result<Model, ExecuteError> {
    let found = model.opset("").unwrap_or(0);
    if found < OPSET {
        return Err(ExecuteError::Opset { lowering: "bf16", needed: OPSET, found });
    }
    let mut names = HashSet::new();
    collect_names(model.graph(), &mut names)?;
    // The first pass finds out who reads each constant; its edits are thrown away.
    let mut survey = rounding::Rounding::new(model, names.clone(), HashSet::new());
    survey.graph(&mut model.graph().clone(), &classify::Scope::default())?;
    let shared = survey.shared_constants();
    let mut out = model.clone();
    let mut rounding = rounding::Rounding::new(model, names, shared);
    rounding.graph(out.graph_mut(), &classify::Scope::default())?;
    Ok(out)
}
