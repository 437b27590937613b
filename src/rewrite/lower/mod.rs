//! What a planned layer becomes: one target a file.

pub(crate) mod base;
pub(crate) mod bf16;
mod experts;
mod int8;
mod mx;
mod packer;
mod pair;
mod product;
pub(crate) mod qdq;
#[cfg(test)]
mod tests;

pub(crate) use base::cast_output_name;
pub(crate) use int8::Int8;
pub(crate) use mx::Mx;
pub(crate) use product::lower as lower_product;
pub(crate) use qdq::Qdq;

use crate::onnx::proto::{Attribute, AttributeType, Node};

/// An operator of the standard domain.
pub(crate) fn node(op: &str, name: &str, inputs: &[&str], outputs: &[&str]) -> Node {
    let own = |list: &[&str]| list.iter().map(|&s| s.to_owned()).collect();
    Node {
        op_type: Some(op.to_owned()),
        name: Some(name.to_owned()),
        input: own(inputs),
        output: own(outputs),
        ..Node::default()
    }
}

/// An INT attribute.
pub(crate) fn int(name: &str, value: i64) -> Attribute {
    Attribute {
        name: Some(name.to_owned()),
        i: Some(value),
        r#type: Some(AttributeType::Int as i32),
        ..Attribute::default()
    }
}

/// An INTS attribute.
pub(crate) fn ints(name: &str, values: &[i64]) -> Attribute {
    Attribute {
        name: Some(name.to_owned()),
        ints: values.to_vec(),
        r#type: Some(AttributeType::Ints as i32),
        ..Attribute::default()
    }
}

/// A FLOAT attribute.
pub(crate) fn float(name: &str, value: f32) -> Attribute {
    Attribute {
        name: Some(name.to_owned()),
        f: Some(value),
        r#type: Some(AttributeType::Float as i32),
        ..Attribute::default()
    }
}

/// A STRING attribute.
pub(crate) fn string(name: &str, value: &str) -> Attribute {
    Attribute {
        name: Some(name.to_owned()),
        s: Some(value.to_owned().into()),
        r#type: Some(AttributeType::String as i32),
        ..Attribute::default()
    }
}
