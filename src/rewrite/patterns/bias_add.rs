//! An Add behind a product: a bias when it adds a constant `[n]`, a residual otherwise.

use super::{Linear, Traced, trace};
use crate::{
    graph::{GraphView, is_op},
    rewrite::{Bias, BiasShape},
};

/// Folds the Add that follows into the Linear when it is a bias. The product's result must have no
/// other reader, graph outputs and sub-graphs included.
pub(super) fn fold(view: &GraphView, mut linear: Linear) -> Linear {
    // The operator for experts has no bias.
    if linear.bias.is_some() || linear.residual.is_some() || linear.experts.is_some() {
        return linear;
    }
    let Some((index, slot)) = view.only_reader(&linear.y) else { return linear };
    let node = &view.nodes()[index];
    let (Some(other), Some(output)) = (node.input.get(1 - slot.min(1)), node.output.first()) else {
        return linear;
    };
    if !is_op(node, "Add") || node.input.len() != 2 || output.is_empty() {
        return linear;
    }
    let Traced::Constant(constant) = trace(view, other) else { return linear };
    let is_bias = constant.operand_dtype == linear.weight.operand_dtype
        && constant.dims().iter().map(|&d| usize::try_from(d).ok()).eq([Some(linear.n)]);
    if is_bias {
        linear.bias = Some(Bias {
            value: other.clone(),
            constant: Some(constant.root),
            shape: BiasShape::Vector,
            beta: 1.0,
        });
        linear.y = output.clone();
        linear.replaces.push(index);
        linear.replaces.sort_unstable();
    }
    linear
}
