//! Nodes, bodies and values to build graphs of.

use crate::onnx::Graph;
use crate::onnx::proto::{
    Attribute, AttributeType, DataType, Dimension, DimensionValue, Node, TensorShape, TensorType,
    Type, ValueInfo,
};
use bytes::Bytes;

/// An encoded body that makes one value.
pub(super) fn body(title: &str, nodes: Vec<Node>, output: &str) -> Result<Bytes, String> {
    let mut graph = named_graph(title)?;
    for node in nodes {
        graph.push_node(node);
    }
    graph.add_output(untyped(output));
    graph.to_bytes().map_err(|error| error.to_string())
}

/// An empty graph with a name, which a graph has to have.
pub(super) fn named_graph(title: &str) -> Result<Graph, String> {
    /// `GraphProto.name`.
    #[derive(Clone, PartialEq, prost::Message)]
    struct Named {
        #[prost(string, optional, tag = "2")]
        name: Option<String>,
    }
    let named = Named { name: Some(title.to_owned()) };
    let bytes = Bytes::from(prost::Message::encode_to_vec(&named));
    Graph::parse(&bytes, 0).map_err(|error| error.to_string())
}

pub(super) fn conditional(
    title: &str,
    condition: &str,
    outputs: Vec<String>,
    then: Bytes,
    otherwise: Bytes,
) -> Node {
    let branch = |name: &str, graph: Bytes| Attribute {
        name: Some(name.to_owned()),
        g: Some(graph),
        r#type: Some(AttributeType::Graph as i32),
        ..Attribute::default()
    };
    Node {
        op_type: Some("If".to_owned()),
        name: Some(title.to_owned()),
        input: vec![condition.to_owned()],
        output: outputs,
        attribute: vec![branch("then_branch", then), branch("else_branch", otherwise)],
        ..Node::default()
    }
}

pub(super) fn simple(op: &str, inputs: &[&str], output: &str) -> Node {
    Node {
        op_type: Some(op.to_owned()),
        name: Some(format!("{output}/{op}")),
        input: inputs.iter().map(|&input| input.to_owned()).collect(),
        output: vec![output.to_owned()],
        ..Node::default()
    }
}

/// A value whose type ONNX Runtime infers.
pub(super) fn untyped(name: &str) -> ValueInfo {
    ValueInfo { name: Some(name.to_owned()), ..ValueInfo::default() }
}

pub(super) fn bool_scalar(name: &str) -> ValueInfo {
    tensor(name, DataType::Bool, Some(&[]))
}

/// A tensor with open extents; of unknown rank without `symbols`.
pub(super) fn tensor(name: &str, element: DataType, symbols: Option<&[&str]>) -> ValueInfo {
    let dim = |symbol: &&str| Dimension {
        value: Some(DimensionValue::Param((*symbol).to_owned())),
        denotation: None,
    };
    let shape = symbols.map(|symbols| TensorShape { dim: symbols.iter().map(dim).collect() });
    let tensor = TensorType { elem_type: Some(element as i32), shape };
    let r#type = Type { tensor_type: Some(tensor), ..Type::default() };
    ValueInfo { r#type: Some(r#type), ..untyped(name) }
}
