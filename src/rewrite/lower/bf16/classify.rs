//! What is known about each value, and what each operator does to it.

use std::collections::HashMap;

use super::islands::ConstantShape;
use crate::onnx::{DataType, proto::Node};

/// A value.
#[derive(Clone, Debug, Default)]
pub(in crate::rewrite::lower) struct Value {
    /// Element type, when it is known.
    pub data_type: Option<DataType>,
    /// Computed from activations.
    pub model: bool,
    /// Every element is a bfloat16 value.
    pub rounded: bool,
    /// A constant, or one that was only moved: its name and shape as stored.
    pub constant: Option<(String, ConstantShape)>,
}

/// The values that a graph and the graphs around it define.
#[derive(Clone, Debug, Default)]
pub(in crate::rewrite::lower) struct Scope {
    pub values: HashMap<String, Value>,
}

/// Operators whose results are elements of their inputs (or those negated): of rounded inputs they
/// are rounded.
pub(in crate::rewrite::lower) fn is_exact(op: &str) -> bool {
    matches!(
        op,
        "Identity"
            | "Reshape"
            | "Transpose"
            | "Squeeze"
            | "Unsqueeze"
            | "Flatten"
            | "Slice"
            | "Split"
            | "Concat"
            | "Gather"
            | "GatherND"
            | "GatherElements"
            | "Expand"
            | "Tile"
            | "Pad"
            | "Where"
            | "Neg"
            | "Abs"
            | "Relu"
            | "Max"
            | "Min"
            | "Clip"
            | "Cast"
            | "CastLike"
            | "TopK"
            | "ReduceMax"
            | "ReduceMin"
            | "MaxPool"
            | "Dropout"
            | "Compress"
            | "Sign"
            | "DepthToSpace"
            | "SpaceToDepth"
            | "Trilu"
            | "If"
    )
}

/// Operators that give a constant's elements in another order or shape.
pub(in crate::rewrite::lower) fn moves_constant(op: &str) -> bool {
    matches!(
        op,
        "Identity"
            | "Reshape"
            | "Transpose"
            | "Squeeze"
            | "Unsqueeze"
            | "Flatten"
            | "Slice"
            | "Split"
            | "Expand"
            | "Cast"
    )
}

/// True when the result is a model value although no input is one: rows of an embedding, a Linear.
pub(in crate::rewrite::lower) fn is_source(
    node: &Node,
    constant: &dyn Fn(&str) -> Option<ConstantShape>,
) -> bool {
    let constant = |index: usize| node.input.get(index).and_then(|name| constant(name));
    match node.op_type.as_deref().unwrap_or("") {
        "Gather" | "EmbedLayerNormalization" | "GatherND" => {
            constant(0).is_some_and(|shape| shape.rank >= 2 && !shape.is_scalar())
                && constant(1).is_none()
        }
        // With k = 1 it is an outer product: rotary angles.
        "MatMul" | "Gemm" => {
            constant(1).is_some_and(|shape| shape.rank == 2 && shape.first > 1)
                && constant(0).is_none()
        }
        _ => false,
    }
}
