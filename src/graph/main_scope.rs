//! A graph of a model as a [`Scope`].

use super::{
    error::GraphError,
    scopes::{Scope, sparse_names},
    value::{ConstTensor, SHORT, ValueType},
};
use crate::onnx::{
    DataType, Graph, Model, TensorInfo,
    proto::{Node, ValueInfo},
};

impl Scope {
    /// The main graph or a body of it. Nodes keep their written order.
    ///
    /// # Errors
    /// A short integer tensor (axes, shapes) whose elements cannot be read.
    pub fn of_graph(model: &Model, graph: &Graph) -> Result<Self, GraphError> {
        let mut scope = Self {
            nodes: graph.nodes().map(|(_, node)| node.clone()).collect(),
            inputs: graph.inputs().filter_map(|value| value.name.clone()).collect(),
            outputs: graph.outputs().filter_map(|value| value.name.clone()).collect(),
            ..Self::default()
        };
        for tensor in graph.initializers() {
            scope.initializers.push((tensor.name.clone(), constant(model, tensor)?));
        }
        // Sparse initialisers are carried and never quantised: known by name only.
        for name in graph.other.iter().flat_map(sparse_names) {
            scope.initializers.push((name, ConstTensor::default()));
        }
        for value in graph.value_infos().chain(graph.inputs()).chain(graph.outputs()) {
            scope.types.extend(typed(value));
        }
        Ok(scope)
    }
}

fn constant(model: &Model, tensor: &TensorInfo) -> Result<ConstTensor, GraphError> {
    let short = tensor.data_type() == Some(DataType::Int64)
        && tensor.elements().is_ok_and(|elements| elements <= SHORT);
    let ints = if short { Some(model.tensor(tensor)?.to_i64()?) } else { None };
    Ok(ConstTensor { dtype: tensor.data_type(), dims: tensor.dims.clone(), ints })
}

fn typed(value: &ValueInfo) -> Option<(String, ValueType)> {
    Some((value.name.clone()?, ValueType::of(value.r#type.as_ref()?)?))
}

/// The nodes of the model's local functions, with the name of each.
///
/// # Errors
/// A function that cannot be decoded.
pub fn functions(model: &Model) -> Result<Vec<(String, Vec<Node>)>, GraphError> {
    let functions = model.functions()?;
    Ok(functions.into_iter().map(|f| (format!("{}.{}", f.domain, f.name), f.nodes)).collect())
}
