//! Constants in another float type.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use half::{bf16, f16};
use prost::Message as _;
use rayon::prelude::*;

use crate::{
    onnx::{
        self, DataType, Model, Payload, Sink, Storage, TensorInfo, TensorView,
        proto::{Attribute, AttributeType, Node, Tensor},
        release,
    },
    rewrite::{Notes, lower::bf16::constants::of_node},
};

/// Elements converted at a time.
const TILE: usize = 1 << 16;
/// Elements of a constant that are in memory at a time.
const PIECE: usize = 1 << 22;
/// Constants up to so many elements are searched for numbers beyond a type's range: masks.
const SEARCHED: u64 = 1 << 22;

/// The largest finite number of a float type.
pub(super) fn largest(data_type: DataType) -> f32 {
    match data_type {
        DataType::Float16 => f16::MAX.to_f32(),
        DataType::Bfloat16 => bf16::MAX.to_f32(),
        _ => f32::MAX,
    }
}

/// Bytes of one element.
fn width(data_type: DataType) -> usize {
    if data_type == DataType::Float { 4 } else { 2 }
}

/// An initialiser in type `to`, made when it is written. `notes` learns then how many numbers of a
/// weight had to be limited; a single number is a mask's lowest, not a weight.
pub(super) fn converted(
    model: &Model,
    info: &TensorInfo,
    to: DataType,
    notes: &Notes,
) -> Result<TensorInfo, onnx::Error> {
    let len = info.elements()?.saturating_mul(width(to) as u64);
    let (source, original, notes) = (model.clone(), info.clone(), notes.clone());
    let write = Arc::new(move |sink: &mut Sink<'_>| {
        let view = source.tensor(&original)?;
        let mut limited = 0;
        for first in (0..view.elements()).step_by(PIECE) {
            let (bytes, beyond) =
                convert_part(&view, first, PIECE.min(view.elements() - first), to)?;
            sink(bytes)?;
            limited += beyond;
            release(part(&view, first, PIECE));
        }
        if view.elements() > 1 {
            notes.limited(&original.name, limited, type_name(to));
        }
        Ok(())
    });
    Ok(TensorInfo::new(&info.name, info.dims.clone(), to, Payload::Stream { len, write }))
}

/// The stored bytes of some elements, as far as they are there.
fn part(view: &TensorView, first: usize, count: usize) -> &[u8] {
    let width = view.bytes.len() / view.elements().max(1);
    let end = ((first + count) * width).min(view.bytes.len());
    view.bytes.get(first * width..end).unwrap_or_default()
}

/// Elements in type `to`, and how many finite ones had to be limited to its range.
fn convert_part(
    view: &TensorView,
    first: usize,
    count: usize,
    to: DataType,
) -> Result<(bytes::Bytes, u64), onnx::Error> {
    let width = width(to);
    let beyond = AtomicU64::new(0);
    let mut out = vec![0u8; count * width];
    let tiles = out.par_chunks_mut(TILE * width).enumerate();
    tiles.try_for_each(|(index, bytes)| {
        let mut values = vec![0.0; bytes.len() / width];
        view.read_f32(first + index * TILE, &mut values)?;
        let count = values.iter().filter(|&&value| limited(value, to) != value && !value.is_nan());
        beyond.fetch_add(count.count() as u64, Ordering::Relaxed);
        for (bytes, value) in bytes.chunks_exact_mut(width).zip(values) {
            match to {
                DataType::Float => bytes.copy_from_slice(&value.to_le_bytes()),
                DataType::Float16 => {
                    bytes.copy_from_slice(&f16::from_f32(limited(value, to)).to_le_bytes());
                }
                _ => bytes.copy_from_slice(&bf16::from_f32(limited(value, to)).to_le_bytes()),
            }
        }
        Ok::<_, onnx::Error>(())
    })?;
    Ok((out.into(), beyond.into_inner()))
}

fn type_name(data_type: DataType) -> &'static str {
    match data_type {
        DataType::Float16 => "float16",
        DataType::Bfloat16 => "bfloat16",
        _ => "float32",
    }
}

/// What is finite stays finite.
fn limited(value: f32, to: DataType) -> f32 {
    let largest = largest(to);
    if value.is_finite() { value.clamp(-largest, largest) } else { value }
}

/// The `Constant` node with its tensor in type `to`.
pub(super) fn converted_node(
    model: &Model,
    node: &Node,
    to: DataType,
    notes: &Notes,
) -> Result<Option<Node>, onnx::Error> {
    let Some(view) = view_of_node(model, node)? else { return Ok(None) };
    let (raw_data, limited) = convert_part(&view, 0, view.elements(), to)?;
    if view.elements() > 1 {
        notes.limited(node.output.first().map_or("", String::as_str), limited, type_name(to));
    }
    let dims = view.dims.iter().map(|&d| d as i64).collect();
    let tensor =
        Tensor { dims, data_type: Some(to as i32), raw_data: Some(raw_data), ..Tensor::default() };
    let mut out = node.clone();
    out.attribute = vec![Attribute {
        name: Some("value".to_owned()),
        t: Some(tensor),
        r#type: Some(AttributeType::Tensor as i32),
        ..Attribute::default()
    }];
    Ok(Some(out))
}

/// The float tensor of a `Constant` node, whatever attribute holds it.
fn view_of_node(model: &Model, node: &Node) -> Result<Option<TensorView>, onnx::Error> {
    if let Some(tensor) = of_node(node) {
        let info = TensorInfo::parse(tensor.encode_to_vec().into(), 0)?;
        return Ok(Some(model.tensor(&info)?));
    }
    let floats = node.attribute.iter().find_map(|a| match a.name.as_deref() {
        Some("value_float") => Some((vec![], vec![a.f?])),
        Some("value_floats") => Some((vec![a.floats.len() as i64], a.floats.clone())),
        _ => None,
    });
    let Some((dims, floats)) = floats else { return Ok(None) };
    let bytes: Vec<u8> = floats.iter().flat_map(|value| value.to_le_bytes()).collect();
    let info = TensorInfo::new("", dims, DataType::Float, Payload::Bytes(bytes.into()));
    Ok(Some(model.tensor(&info)?))
}

/// What decides the treatment of a constant.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Content {
    /// Holds a finite number beyond the range of the new type.
    pub wide: bool,
    /// A single number that the new type cannot hold exactly.
    pub inexact: bool,
}

/// Looks into an initialiser, unless it is large or not made yet.
pub(super) fn look(model: &Model, info: &TensorInfo, to: DataType) -> Result<Content, onnx::Error> {
    let unmade = matches!(&info.storage, Storage::New(payload) if !payload.is_made());
    if unmade || !info.is_float() || info.elements()? > SEARCHED {
        return Ok(Content::default());
    }
    content(&model.tensor(info)?, to)
}

/// Looks into a `Constant` or `ConstantOfShape` node.
pub(super) fn look_node(model: &Model, node: &Node, to: DataType) -> Result<Content, onnx::Error> {
    let value = node.attribute.iter().find(|a| a.name.as_deref() == Some("value"));
    let tensor = value.and_then(|a| a.t.as_ref());
    let view = match tensor {
        Some(tensor) => {
            let info = TensorInfo::parse(tensor.encode_to_vec().into(), 0)?;
            if !info.is_float() {
                return Ok(Content::default());
            }
            Some(model.tensor(&info)?)
        }
        None => view_of_node(model, node)?,
    };
    view.map_or(Ok(Content::default()), |view| content(&view, to))
}

fn content(view: &TensorView, to: DataType) -> Result<Content, onnx::Error> {
    let mut values = vec![0.0; view.elements()];
    view.read_f32(0, &mut values)?;
    let largest = largest(to);
    let wide = values.iter().any(|v| v.is_finite() && v.abs() > largest);
    let inexact = match values[..] {
        [value] => {
            let held = match to {
                DataType::Float16 => f16::from_f32(value).to_f32(),
                DataType::Bfloat16 => bf16::from_f32(value).to_f32(),
                _ => value,
            };
            value.is_finite() && held != value && !wide
        }
        _ => false,
    };
    Ok(Content { wide, inexact })
}
