//! Values: where they come from, who reads them, what is known about them.

use crate::onnx::proto::{DataType, DimensionValue, Node, Tensor, Type};

/// What makes a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// Output `slot` of a node.
    Node {
        /// Index of the node.
        index: usize,
        /// Index of its output.
        slot: usize,
    },
    /// An initialiser.
    Initializer,
    /// The caller.
    Input,
}

/// Who reads a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// A node.
    Node {
        /// Index of the node.
        index: usize,
        /// Which of its inputs; `None` = inside one of its sub-graphs.
        slot: Option<usize>,
    },
    /// The caller.
    GraphOutput,
}

/// Type and shape as the model declares them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ValueType {
    /// Element type.
    pub dtype: Option<DataType>,
    /// Extents; an unknown or symbolic one is `None`. `None` = rank unknown.
    pub dims: Option<Vec<Option<i64>>>,
}

impl ValueType {
    /// Reads a tensor's `TypeProto`; `None` for sequences, maps and the like.
    pub fn of(value: &Type) -> Option<Self> {
        let tensor = value.tensor_type.as_ref()?;
        let dtype = tensor.elem_type.and_then(|t| DataType::try_from(t).ok());
        let dims = tensor.shape.as_ref().map(|shape| {
            shape
                .dim
                .iter()
                .map(|dim| match dim.value {
                    Some(DimensionValue::Value(extent)) => Some(extent),
                    _ => None,
                })
                .collect()
        });
        Some(Self { dtype, dims })
    }
}

/// A constant tensor without its bulk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConstTensor {
    /// Element type, when it is one that the project knows.
    pub dtype: Option<DataType>,
    /// Shape.
    pub dims: Vec<i64>,
    /// The elements of a short int64 tensor (axes, shapes), when they are at hand.
    pub ints: Option<Vec<i64>>,
}

/// Longest int64 tensor whose elements are kept: axes and shapes are never longer.
pub(super) const SHORT: u64 = 16;

impl ConstTensor {
    /// The tensor of a `Constant` node; `None` for other nodes and for other kinds of constants.
    pub(super) fn of_constant_node(node: &Node) -> Option<Self> {
        if !super::is_op(node, "Constant") {
            return None;
        }
        if let Some(value) = super::attribute(node, "value_ints") {
            let dims = vec![value.ints.len() as i64];
            return Some(Self {
                dtype: Some(DataType::Int64),
                dims,
                ints: Some(value.ints.clone()),
            });
        }
        if let Some(value) = super::attribute(node, "value_int").and_then(|value| value.i) {
            return Some(Self {
                dtype: Some(DataType::Int64),
                dims: vec![],
                ints: Some(vec![value]),
            });
        }
        let tensor = super::attribute(node, "value")?.t.as_ref()?;
        let dtype = tensor.data_type.and_then(|t| DataType::try_from(t).ok());
        Some(Self { dtype, dims: tensor.dims.clone(), ints: short_ints(tensor) })
    }
}

fn short_ints(tensor: &Tensor) -> Option<Vec<i64>> {
    if tensor.data_type != Some(DataType::Int64 as i32) || tensor.data_location == Some(1) {
        return None;
    }
    let ints: Vec<i64> = match &tensor.raw_data {
        Some(raw) if raw.len() as u64 <= SHORT * 8 => {
            raw.chunks_exact(8).filter_map(|b| b.try_into().ok()).map(i64::from_le_bytes).collect()
        }
        Some(_) => return None,
        None => tensor.int64_data.clone(),
    };
    let expected = tensor.dims.iter().try_fold(1i64, |n, &dim| n.checked_mul(dim))?;
    (ints.len() as i64 == expected).then_some(ints)
}
