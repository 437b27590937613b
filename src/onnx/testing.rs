//! Models built from messages, for tests.

use super::proto::{
    Dimension, DimensionValue, Node, OperatorSetId, Tensor, TensorShape, TensorType, Type,
    ValueInfo,
};
use super::wire;
use super::{DataType, Model};
use bytes::Bytes;
use prost::Message as _;

/// A model under construction; fields are public for tests to bend.
#[derive(Clone, Debug, Default)]
pub(crate) struct ModelBuilder {
    pub nodes: Vec<Node>,
    pub initializers: Vec<Tensor>,
    pub inputs: Vec<ValueInfo>,
    pub outputs: Vec<ValueInfo>,
    pub value_infos: Vec<ValueInfo>,
    pub opset: i64,
}

impl ModelBuilder {
    pub(crate) fn new(opset: i64) -> Self {
        Self { opset, ..Self::default() }
    }

    pub(crate) fn input(mut self, name: &str, data_type: DataType, dims: &[&str]) -> Self {
        self.inputs.push(value(name, data_type, dims));
        self
    }

    pub(crate) fn output(mut self, name: &str, data_type: DataType, dims: &[&str]) -> Self {
        self.outputs.push(value(name, data_type, dims));
        self
    }

    pub(crate) fn floats(mut self, name: &str, dims: &[i64], values: &[f32]) -> Self {
        self.initializers.push(float_tensor(name, dims, values));
        self
    }

    pub(crate) fn ints(mut self, name: &str, dims: &[i64], values: &[i64]) -> Self {
        let raw: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.initializers.push(tensor(name, DataType::Int64, dims, raw));
        self
    }

    pub(crate) fn node(mut self, op: &str, inputs: &[&str], outputs: &[&str]) -> Self {
        let own = |list: &[&str]| list.iter().map(|&s| s.to_owned()).collect();
        self.nodes.push(Node {
            op_type: Some(op.to_owned()),
            name: Some(format!("node_{}", outputs[0])),
            input: own(inputs),
            output: own(outputs),
            ..Node::default()
        });
        self
    }

    /// Changes the last node.
    pub(crate) fn with(mut self, change: impl FnOnce(&mut Node)) -> Self {
        change(self.nodes.last_mut().expect("a node"));
        self
    }

    /// The encoded graph.
    pub(crate) fn graph(&self) -> Vec<u8> {
        let mut graph = Vec::new();
        let mut put = |number, message: Vec<u8>| graph.extend(wire::len_field(number, &message));
        self.nodes.iter().for_each(|node| put(1, node.encode_to_vec()));
        put(2, b"main".to_vec());
        self.initializers.iter().for_each(|tensor| put(5, tensor.encode_to_vec()));
        self.inputs.iter().for_each(|value| put(11, value.encode_to_vec()));
        self.outputs.iter().for_each(|value| put(12, value.encode_to_vec()));
        self.value_infos.iter().for_each(|value| put(13, value.encode_to_vec()));
        graph
    }

    /// The encoded model.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut model = vec![0x08, 8];
        model.extend(wire::len_field(2, b"test"));
        model.extend(wire::len_field(7, &self.graph()));
        let opset = OperatorSetId { domain: None, version: Some(self.opset) };
        model.extend(wire::len_field(8, &opset.encode_to_vec()));
        model
    }

    pub(crate) fn model(&self) -> Model {
        Model::from_bytes(Bytes::from(self.bytes()), None).expect("a valid model")
    }
}

pub(crate) fn tensor(name: &str, data_type: DataType, dims: &[i64], raw: Vec<u8>) -> Tensor {
    Tensor {
        name: Some(name.to_owned()),
        dims: dims.to_vec(),
        data_type: Some(data_type as i32),
        raw_data: Some(raw.into()),
        ..Tensor::default()
    }
}

pub(crate) fn float_tensor(name: &str, dims: &[i64], values: &[f32]) -> Tensor {
    let raw = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    tensor(name, DataType::Float, dims, raw)
}

/// A value; an extent that is no number is a symbol.
pub(crate) fn value(name: &str, data_type: DataType, dims: &[&str]) -> ValueInfo {
    let dim = dims.iter().map(|d| Dimension {
        value: Some(match d.parse() {
            Ok(extent) => DimensionValue::Value(extent),
            Err(_) => DimensionValue::Param((*d).to_owned()),
        }),
        denotation: None,
    });
    let tensor_type = TensorType {
        elem_type: Some(data_type as i32),
        shape: Some(TensorShape { dim: dim.collect() }),
    };
    ValueInfo {
        name: Some(name.to_owned()),
        r#type: Some(Type { tensor_type: Some(tensor_type), ..Type::default() }),
        ..ValueInfo::default()
    }
}
