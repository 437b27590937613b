//! Constants: which there are, and their bfloat16 form.

use std::collections::HashMap;
use std::sync::Arc;

use half::{bf16, f16};

use super::{islands::ConstantShape, types::is_rounded_type};
use crate::onnx::{
    self, DataType, Graph, Model, NodeId, Payload, TensorInfo,
    proto::{Attribute, Node, Tensor},
};
use prost::Message as _;

/// The largest finite bfloat16 value, 3.3895314e38.
pub(in crate::rewrite::lower) const LARGEST: f32 = f32::from_bits(0x7f7f_0000);

/// Rounds half to even; what is finite stays finite.
pub(in crate::rewrite::lower) fn to_bf16(value: f32) -> f32 {
    let rounded = bf16::from_f32(value).to_f32();
    if rounded.is_infinite() && value.is_finite() { LARGEST.copysign(value) } else { rounded }
}

/// A finite value beyond the range becomes the largest finite one; everything else stays.
fn clamp(value: f32) -> f32 {
    if value.is_finite() { value.clamp(-LARGEST, LARGEST) } else { value }
}

/// The tensor of a `Constant` node.
pub(in crate::rewrite::lower) fn of_node(node: &Node) -> Option<&Tensor> {
    let constant = node.op_type.as_deref() == Some("Constant");
    let value = node.attribute.iter().find(|a| constant && a.name.as_deref() == Some("value"))?;
    value.t.as_ref()
}

fn info_of(tensor: &Tensor) -> Result<TensorInfo, onnx::Error> {
    TensorInfo::parse(tensor.encode_to_vec().into(), 0)
}

fn shape_of(dims: &[i64]) -> ConstantShape {
    let extent = |d: &i64| u64::try_from(*d).unwrap_or(0);
    ConstantShape {
        rank: dims.len(),
        elements: dims.iter().map(extent).fold(1, u64::saturating_mul),
        first: dims.first().map_or(1, extent),
    }
}

/// Shapes of the float constants that a graph defines.
pub(in crate::rewrite::lower) fn shapes(
    graph: &Graph,
) -> HashMap<String, (ConstantShape, DataType)> {
    let mut out = HashMap::new();
    for info in graph.initializers() {
        if let Some(data_type) = info.data_type() {
            out.insert(info.name.clone(), (shape_of(&info.dims), data_type));
        }
    }
    for (_, node) in graph.nodes() {
        let Some(name) = node.output.first() else { continue };
        if let Some(tensor) = of_node(node) {
            let data_type = tensor.data_type.and_then(|t| DataType::try_from(t).ok());
            if let Some(data_type) = data_type {
                out.insert(name.clone(), (shape_of(&tensor.dims), data_type));
            }
        } else if node.op_type.as_deref() == Some("Constant") {
            let shape = |attribute: &Attribute| match attribute.name.as_deref() {
                Some("value_float") => Some(shape_of(&[])),
                Some("value_floats") => Some(shape_of(&[attribute.floats.len() as i64])),
                _ => None,
            };
            if let Some(shape) = node.attribute.iter().find_map(shape) {
                out.insert(name.clone(), (shape, DataType::Float));
            }
        }
    }
    out
}

/// An initialiser with every element rounded, made when it is written.
pub(in crate::rewrite::lower) fn rounded(
    model: &Model,
    info: &TensorInfo,
) -> Result<TensorInfo, onnx::Error> {
    let view = model.tensor(info)?;
    let (data_type, len) = (view.data_type, view.bytes.len() as u64);
    let make = Arc::new(move || map(&view, to_bf16));
    let payload = Payload::Lazy { len, make };
    Ok(TensorInfo::new(&info.name, info.dims.clone(), data_type, payload))
}

/// A small initialiser with its elements brought into range; `None` when they are.
pub(in crate::rewrite::lower) fn clamped(
    model: &Model,
    info: &TensorInfo,
) -> Result<Option<TensorInfo>, onnx::Error> {
    let view = model.tensor(info)?;
    if !is_rounded_type(view.data_type) || !beyond(&view)? {
        return Ok(None);
    }
    let bytes = Payload::Bytes(map(&view, clamp)?);
    Ok(Some(TensorInfo::new(&info.name, info.dims.clone(), view.data_type, bytes)))
}

/// The `Constant` or `ConstantOfShape` node with its elements rounded (or brought into range);
/// `None` when nothing changes.
pub(in crate::rewrite::lower) fn changed_node(
    model: &Model,
    node: &Node,
    round: bool,
) -> Result<Option<Node>, onnx::Error> {
    let change = if round { to_bf16 } else { clamp };
    let mut out = node.clone();
    for attribute in &mut out.attribute {
        if let Some(value) = &mut attribute.f {
            *value = change(*value);
        }
        attribute.floats.iter_mut().for_each(|value| *value = change(*value));
        let Some(tensor) = &mut attribute.t else { continue };
        let info = info_of(tensor)?;
        if !info.data_type().is_some_and(is_rounded_type) {
            continue;
        }
        let view = model.tensor(&info)?;
        if round || beyond(&view)? {
            *tensor = Tensor {
                dims: std::mem::take(&mut tensor.dims),
                data_type: tensor.data_type,
                name: tensor.name.take(),
                raw_data: Some(map(&view, change)?),
                ..Tensor::default()
            };
        }
    }
    Ok((out != *node).then_some(out))
}

fn beyond(view: &onnx::TensorView) -> Result<bool, onnx::Error> {
    let mut values = vec![0.0; view.elements().min(TILE)];
    for start in (0..view.elements()).step_by(TILE) {
        let tile = TILE.min(view.elements() - start);
        view.read_f32(start, &mut values[..tile])?;
        if values[..tile].iter().any(|v| v.is_finite() && v.abs() > LARGEST) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Elements converted at a time.
const TILE: usize = 1 << 16;

/// Every element changed, in the tensor's own type.
fn map(view: &onnx::TensorView, change: fn(f32) -> f32) -> Result<bytes::Bytes, onnx::Error> {
    let mut out = Vec::with_capacity(view.bytes.len());
    let mut values = vec![0.0; view.elements().min(TILE)];
    for start in (0..view.elements()).step_by(TILE) {
        let values = &mut values[..TILE.min(view.elements() - start)];
        view.read_f32(start, values)?;
        for &value in values.iter() {
            let value = change(value);
            match view.data_type {
                DataType::Float16 => out.extend(f16::from_f32(value).to_le_bytes()),
                DataType::Double => out.extend(f64::from(value).to_le_bytes()),
                _ => out.extend(value.to_le_bytes()),
            }
        }
    }
    Ok(out.into())
}

/// Initialisers and constant nodes that are searched for values beyond the range: mask constants are
/// small or square, weights are rounded anyway.
pub(in crate::rewrite::lower) fn constant_nodes(graph: &Graph) -> Vec<NodeId> {
    let holds =
        |node: &Node| matches!(node.op_type.as_deref(), Some("Constant" | "ConstantOfShape"));
    graph.nodes().filter(|(_, node)| holds(node)).map(|(id, _)| id).collect()
}
