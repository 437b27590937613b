//! `Gemm(X, W, C)`: alpha * X' * W' + beta * C with either operand transposed.

use super::{Linear, Stored, Traced, operands, stored, trace};
use crate::{
    graph::{GraphView, float_attribute, int_attribute},
    rewrite::{Bias, BiasShape},
};

pub(super) fn find(view: &GraphView, index: usize) -> Result<Linear, String> {
    let node = &view.nodes()[index];
    let found = operands(view, node)?;
    let k_first = int_attribute(node, "transB", 0) == 0;
    let Stored { n, k, layout, region } = stored(&found.weight, k_first)?;
    let c = node.input.get(2).filter(|value| !value.is_empty());
    let addend = addend(view, c, float_attribute(node, "beta", 1.0), n, &found.weight)?;
    let (bias, residual) = match addend {
        Addend::None => (None, None),
        Addend::Bias(bias) => (Some(bias), None),
        Addend::Residual(value) => (None, Some(value)),
    };
    Ok(Linear {
        node: index,
        x: found.x.to_owned(),
        transpose_x: int_attribute(node, "transA", 0) != 0,
        y: node.output[0].clone(),
        layout,
        region,
        weight: found.weight,
        operand: found.operand.to_owned(),
        n,
        k,
        alpha: float_attribute(node, "alpha", 1.0),
        bias,
        residual,
        replaces: vec![index],
        experts: None,
    })
}

enum Addend {
    None,
    Bias(Bias),
    Residual(String),
}

/// C as the operator's bias where its shape allows, else as an Add that follows.
fn addend(
    view: &GraphView,
    c: Option<&String>,
    beta: f32,
    n: usize,
    weight: &super::Constant,
) -> Result<Addend, String> {
    let Some(value) = c.filter(|_| beta != 0.0) else { return Ok(Addend::None) };
    let wide = i64::try_from(n).unwrap_or(i64::MAX);
    let constant = match trace(view, value) {
        Traced::Constant(constant) if constant.operand_dtype == weight.operand_dtype => {
            Some(constant)
        }
        _ => None,
    };
    let shape = match &constant {
        Some(constant) => match constant.dims()[..] {
            [extent] if extent == wide => Some(BiasShape::Vector),
            [] | [1] | [1, 1] => Some(BiasShape::Scalar),
            [1, extent] if extent == wide => Some(BiasShape::Row),
            _ => None,
        },
        None => {
            let dims = view.value_type(value).and_then(|known| known.dims.as_deref());
            (dims == Some(&[Some(wide)])).then_some(BiasShape::Vector)
        }
    };
    // A reshaped bias is made anew from the stored numbers, so those have to be of X's type, and all
    // of them.
    let constant =
        constant.filter(|constant| constant.dtype == constant.operand_dtype && constant.is_whole());
    let shape = shape.filter(|&shape| shape == BiasShape::Vector || constant.is_some());
    match shape {
        Some(shape) => Ok(Addend::Bias(Bias {
            value: value.clone(),
            constant: constant.map(|constant| constant.root),
            shape,
            beta,
        })),
        None if beta == 1.0 => Ok(Addend::Residual(value.clone())),
        None => Err(format!(
            "its C '{value}' is no bias of shape [{n}] and its beta is {beta}, which an Add cannot apply"
        )),
    }
}
