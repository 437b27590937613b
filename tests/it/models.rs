//! Small models built message by message, for tests that need a graph of a certain shape.
#![allow(dead_code, reason = "not every area needs every helper")]

use mxrewrite::onnx::DataType;
use mxrewrite::onnx::proto::{
    Attribute, Dimension, DimensionValue, Node, OperatorSetId, StringStringEntry, Tensor,
    TensorShape, TensorType, Type, ValueInfo,
};
use prost::Message;

/// `GraphProto`.
#[derive(Clone, PartialEq, Message)]
pub struct GraphProto {
    #[prost(message, repeated, tag = "1")]
    pub node: Vec<Node>,
    #[prost(string, optional, tag = "2")]
    pub name: Option<String>,
    #[prost(message, repeated, tag = "5")]
    pub initializer: Vec<Tensor>,
    #[prost(message, repeated, tag = "11")]
    pub input: Vec<ValueInfo>,
    #[prost(message, repeated, tag = "12")]
    pub output: Vec<ValueInfo>,
    #[prost(message, repeated, tag = "13")]
    pub value_info: Vec<ValueInfo>,
}

/// `FunctionProto`.
#[derive(Clone, PartialEq, Message)]
pub struct FunctionProto {
    #[prost(string, optional, tag = "1")]
    pub name: Option<String>,
    #[prost(string, repeated, tag = "4")]
    pub input: Vec<String>,
    #[prost(string, repeated, tag = "5")]
    pub output: Vec<String>,
    #[prost(message, repeated, tag = "7")]
    pub node: Vec<Node>,
    #[prost(message, repeated, tag = "9")]
    pub opset_import: Vec<OperatorSetId>,
    #[prost(string, optional, tag = "10")]
    pub domain: Option<String>,
}

/// `ModelProto`.
#[derive(Clone, PartialEq, Message)]
pub struct ModelProto {
    #[prost(int64, optional, tag = "1")]
    pub ir_version: Option<i64>,
    #[prost(message, optional, tag = "7")]
    pub graph: Option<GraphProto>,
    #[prost(message, repeated, tag = "8")]
    pub opset_import: Vec<OperatorSetId>,
    #[prost(message, repeated, tag = "25")]
    pub functions: Vec<FunctionProto>,
}

/// A model of one graph, IR 9 and opset 20.
pub fn model(graph: GraphProto) -> ModelProto {
    let opset = OperatorSetId { domain: Some(String::new()), version: Some(20) };
    ModelProto {
        ir_version: Some(9),
        graph: Some(graph),
        opset_import: vec![opset],
        functions: vec![],
    }
}

/// A node without attributes.
pub fn node(op: &str, name: &str, input: &[&str], output: &[&str]) -> Node {
    Node {
        op_type: Some(op.into()),
        name: Some(name.into()),
        input: input.iter().map(|&value| value.into()).collect(),
        output: output.iter().map(|&value| value.into()).collect(),
        ..Node::default()
    }
}

/// The node with an INT attribute.
pub fn with_int(mut node: Node, name: &str, value: i64) -> Node {
    let attribute = Attribute {
        name: Some(name.into()),
        i: Some(value),
        r#type: Some(2),
        ..Attribute::default()
    };
    node.attribute.push(attribute);
    node
}

/// The node with a metadata entry.
pub fn with_metadata(mut node: Node, key: &str, value: &str) -> Node {
    node.metadata_props
        .push(StringStringEntry { key: Some(key.into()), value: Some(value.into()) });
    node
}

/// A float32 initialiser with arbitrary but fixed numbers.
pub fn weight(name: &str, dims: &[i64]) -> Tensor {
    let count = dims.iter().product::<i64>();
    let values = (0..count).map(|i| ((i * 37 + 11) % 101) as f32 / 50.0 - 1.0);
    Tensor {
        name: Some(name.into()),
        dims: dims.to_vec(),
        data_type: Some(DataType::Float as i32),
        raw_data: Some(values.flat_map(f32::to_le_bytes).collect::<Vec<u8>>().into()),
        ..Tensor::default()
    }
}

/// The same tensor, pointing into another file.
pub fn external(mut tensor: Tensor, location: &str) -> Tensor {
    tensor.raw_data = None;
    tensor.data_location = Some(1);
    tensor.external_data =
        vec![StringStringEntry { key: Some("location".into()), value: Some(location.into()) }];
    tensor
}

/// A float32 value of unknown extents.
pub fn value(name: &str, rank: usize) -> ValueInfo {
    let dim = |axis| Dimension {
        value: Some(DimensionValue::Param(format!("d{axis}"))),
        denotation: None,
    };
    let shape = TensorShape { dim: (0..rank).map(dim).collect() };
    let tensor = TensorType { elem_type: Some(DataType::Float as i32), shape: Some(shape) };
    let r#type = Some(Type { tensor_type: Some(tensor), ..Type::default() });
    ValueInfo { name: Some(name.into()), r#type, ..ValueInfo::default() }
}

/// Writes a model and gives its path.
pub fn write(folder: &std::path::Path, name: &str, model: &ModelProto) -> std::path::PathBuf {
    let path = folder.join(name);
    std::fs::write(&path, model.encode_to_vec()).unwrap();
    path
}
