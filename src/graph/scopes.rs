//! Scopes: the main graph, and the bodies of If, Loop, Scan and local functions. Bodies are decoded on
//! demand and only to be looked at.

use std::collections::{BTreeSet, HashSet};

use bytes::Bytes;
use prost::Message;

use super::{
    error::GraphError,
    value::{ConstTensor, ValueType},
};
use crate::onnx::proto::{Node, Tensor, ValueInfo};

/// Deepest nesting of sub-graphs that is followed.
const MAX_DEPTH: usize = 32;

/// What a [`GraphView`](super::GraphView) is built from.
#[derive(Debug, Default)]
pub struct Scope {
    /// Nodes in file order.
    pub nodes: Vec<Node>,
    /// Names of the inputs.
    pub inputs: Vec<String>,
    /// Names of the outputs.
    pub outputs: Vec<String>,
    /// Initialisers.
    pub initializers: Vec<(String, ConstTensor)>,
    /// Declared types of inputs, outputs and intermediate values.
    pub types: std::collections::HashMap<String, ValueType>,
}

/// The fields of `GraphProto` that looking needs.
#[derive(Clone, PartialEq, Message)]
struct Body {
    #[prost(message, repeated, tag = "1")]
    node: Vec<Node>,
    #[prost(string, optional, tag = "2")]
    name: Option<String>,
    #[prost(message, repeated, tag = "5")]
    initializer: Vec<Tensor>,
    #[prost(message, repeated, tag = "11")]
    input: Vec<ValueInfo>,
    #[prost(message, repeated, tag = "12")]
    output: Vec<ValueInfo>,
    #[prost(message, repeated, tag = "15")]
    sparse_initializer: Vec<SparseTensor>,
}

/// A body nested in a node, and where.
#[derive(Clone, Debug)]
pub struct SubScope {
    /// Where it is: `else_branch of If optimum::if`, outermost first.
    pub title: String,
    /// Its nodes.
    pub nodes: Vec<Node>,
}

/// Every body inside `node`, at any depth, outer ones first.
///
/// # Errors
/// A body that cannot be decoded, or nesting that no exporter produces.
pub fn sub_scopes(node: &Node, name: &str) -> Result<Vec<SubScope>, GraphError> {
    let mut found = Vec::new();
    collect(node, name, "", 0, &mut found)?;
    Ok(found)
}

fn collect(
    node: &Node,
    name: &str,
    inside: &str,
    depth: usize,
    found: &mut Vec<SubScope>,
) -> Result<(), GraphError> {
    for (attribute, body) in bodies(node, depth)? {
        let op = super::op_name(node);
        let title = format!("{attribute} of {op} {name}{inside}");
        found.push(SubScope { title: title.clone(), nodes: body.node.clone() });
        for (index, nested) in body.node.iter().enumerate() {
            let name = super::label(index, nested);
            collect(nested, &name, &format!(", in {title}"), depth + 1, found)?;
        }
    }
    Ok(())
}

/// Names that the bodies inside `node` read from scopes around it.
pub(super) fn captured_values(node: &Node) -> Result<Vec<String>, GraphError> {
    let mut free = BTreeSet::new();
    for (_, body) in bodies(node, 0)? {
        free.extend(free_values(&body, 1)?);
    }
    Ok(free.into_iter().collect())
}

fn free_values(body: &Body, depth: usize) -> Result<BTreeSet<String>, GraphError> {
    let inputs = body.input.iter().filter_map(|v| v.name.clone());
    let initializers = body.initializer.iter().filter_map(|t| t.name.clone());
    let mut own: HashSet<String> = inputs.chain(initializers).collect();
    let sparse = body.sparse_initializer.iter().filter_map(|s| s.values.as_ref()?.name.clone());
    own.extend(sparse);
    own.extend(body.node.iter().flat_map(|node| node.output.iter().cloned()));
    let mut free = BTreeSet::new();
    for node in &body.node {
        free.extend(node.input.iter().filter(|v| !v.is_empty() && !own.contains(*v)).cloned());
        for (_, nested) in bodies(node, depth)? {
            free.extend(free_values(&nested, depth + 1)?.into_iter().filter(|v| !own.contains(v)));
        }
    }
    let outputs = body.output.iter().filter_map(|v| v.name.clone());
    free.extend(outputs.filter(|v| !v.is_empty() && !own.contains(v)));
    Ok(free)
}

/// Names of the sparse initialisers among the fields of an encoded `GraphProto`, which are their
/// `values` tensors' names. Anything else in `message` is passed over.
pub(super) fn sparse_names(message: &Bytes) -> Vec<String> {
    Sparse::decode(message.clone()).map_or_else(|_| Vec::new(), |sparse| sparse.names())
}

/// The field of `GraphProto` that holds sparse initialisers.
#[derive(Clone, PartialEq, Message)]
struct Sparse {
    #[prost(message, repeated, tag = "15")]
    tensors: Vec<SparseTensor>,
}

/// `SparseTensorProto`, as far as its name.
#[derive(Clone, PartialEq, Message)]
struct SparseTensor {
    #[prost(message, optional, tag = "1")]
    values: Option<Tensor>,
}

impl Sparse {
    fn names(&self) -> Vec<String> {
        self.tensors.iter().filter_map(|tensor| tensor.values.as_ref()?.name.clone()).collect()
    }
}

fn bodies(node: &Node, depth: usize) -> Result<Vec<(String, Body)>, GraphError> {
    let mut bodies = Vec::new();
    for attribute in &node.attribute {
        for graph in attribute.g.iter().chain(&attribute.graphs) {
            if depth >= MAX_DEPTH {
                return Err(GraphError::TooDeep(MAX_DEPTH));
            }
            let name = attribute.name.clone().unwrap_or_default();
            let body = Body::decode(graph.clone()).map_err(|error| GraphError::Body {
                node: node.name.clone().unwrap_or_default(),
                attribute: name.clone(),
                reason: error.to_string(),
            })?;
            bodies.push((name, body));
        }
    }
    Ok(bodies)
}
