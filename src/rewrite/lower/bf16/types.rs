//! Which element type each value has: what the file declares, else what the operator's definition
//! says. Only float against not float, and which float, matters here.

use std::collections::HashMap;

use crate::onnx::{
    DataType, Graph,
    proto::{Node, ValueInfo},
};

/// Element type of a declared value, if it is a tensor.
pub(in crate::rewrite::lower) fn declared(value: &ValueInfo) -> Option<(String, DataType)> {
    let tensor = value.r#type.as_ref()?.tensor_type.as_ref()?;
    let data_type = DataType::try_from(tensor.elem_type?).ok()?;
    (data_type != DataType::Undefined).then_some((value.name.clone()?, data_type))
}

/// Every type that a graph declares for intermediate values and outputs.
pub(in crate::rewrite::lower) fn declarations(graph: &Graph) -> HashMap<String, DataType> {
    graph.value_infos().chain(graph.outputs()).filter_map(declared).collect()
}

/// True for the types that are rounded: float32, float16 and float64. bfloat16 already is.
pub(in crate::rewrite::lower) fn is_rounded_type(data_type: DataType) -> bool {
    matches!(data_type, DataType::Float | DataType::Float16 | DataType::Double)
}

/// True for every float type that values of a network have.
pub(in crate::rewrite::lower) fn is_float(data_type: DataType) -> bool {
    is_rounded_type(data_type) || data_type == DataType::Bfloat16
}

/// Type of output `index` of a node, from its operator and the types of its inputs.
pub(in crate::rewrite::lower) fn inferred(
    node: &Node,
    index: usize,
    inputs: &[Option<DataType>],
) -> Option<DataType> {
    use DataType as T;
    let first = inputs.first().copied().flatten();
    let attribute = |name: &str| node.attribute.iter().find(|a| a.name.as_deref() == Some(name));
    let named =
        |name: &str| attribute(name).and_then(|a| a.i).and_then(|i| T::try_from(i as i32).ok());
    match node.op_type.as_deref().unwrap_or("") {
        "Shape" | "Size" | "NonZero" | "ArgMax" | "ArgMin" => Some(T::Int64),
        "Equal" | "Less" | "LessOrEqual" | "Greater" | "GreaterOrEqual" | "And" | "Or" | "Not"
        | "Xor" | "IsNaN" | "IsInf" => Some(T::Bool),
        "Cast" => named("to"),
        "CastLike" => inputs.get(1).copied().flatten(),
        "Constant" => constant(node),
        "ConstantOfShape" => attribute("value")
            .and_then(|a| a.t.as_ref()?.data_type)
            .map_or(Some(T::Float), |t| T::try_from(t).ok()),
        "Where" => inputs.get(1).copied().flatten().or(inputs.get(2).copied().flatten()),
        "OneHot" => inputs.get(2).copied().flatten(),
        "DequantizeLinear" => inputs.get(1).copied().flatten(),
        "QuantizeLinear" => inputs.get(2).copied().flatten().or(Some(T::Uint8)),
        "EyeLike" | "RandomNormalLike" | "RandomUniformLike" | "Bernoulli" => {
            named("dtype").or(first)
        }
        "RandomNormal" | "RandomUniform" => named("dtype").or(Some(T::Float)),
        // The second result is a mask or an index.
        "TopK" | "MaxPool" if index == 1 => Some(T::Int64),
        "Dropout" if index == 1 => Some(T::Bool),
        // Everything else, other domains included, returns the type of what it computes on.
        _ => inputs.iter().flatten().copied().find(|&t| is_float(t)).or(first),
    }
}

fn constant(node: &Node) -> Option<DataType> {
    let attribute = node.attribute.first()?;
    match attribute.name.as_deref()? {
        "value" => DataType::try_from(attribute.t.as_ref()?.data_type?).ok(),
        "value_float" | "value_floats" => Some(DataType::Float),
        "value_int" | "value_ints" => Some(DataType::Int64),
        _ => Some(DataType::String),
    }
}
