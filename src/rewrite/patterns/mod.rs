//! The spellings of a Linear layer, one a file. Matching reads the graph and never changes it.

mod bias_add;
mod experts;
mod fused_matmul;
mod gemm;
mod matmul;
mod slices;
mod trace;

#[cfg(test)]
mod tests;

use trace::MAX_CHAIN;
pub(crate) use trace::{Constant, Traced, trace};

use crate::{
    graph::{GraphView, domain, op_name},
    onnx::proto::{DataType, Node},
    rewrite::{Bias, Experts, Layout, Region},
};

/// A Linear, whichever way it is spelled.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Linear {
    pub node: usize,
    pub x: String,
    pub transpose_x: bool,
    pub y: String,
    pub weight: Constant,
    pub operand: String,
    pub layout: Layout,
    pub region: Region,
    pub n: usize,
    pub k: usize,
    pub alpha: f32,
    pub bias: Option<Bias>,
    pub residual: Option<String>,
    pub replaces: Vec<usize>,
    pub experts: Option<Experts>,
}

/// What a node is.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Match {
    /// A Linear.
    Linear(Box<Linear>),
    /// It looks like one and is not, or cannot be replaced; the reason.
    Not(String),
}

/// Operators that hold a product with a weight and that no pattern takes apart.
const OPAQUE: &[(&str, &str)] = &[
    ("com.microsoft", "Attention"),
    ("com.microsoft", "QAttention"),
    ("com.microsoft", "FusedGemm"),
    ("com.microsoft", "GemmFastGelu"),
    ("com.microsoft", "GemmFloat8"),
    ("com.microsoft", "TransposeMatMul"),
    ("com.microsoft", "FusedMatMulActivation"),
    ("com.microsoft", "MatMulNBits"),
    ("com.microsoft", "MatMulBnb4"),
    ("com.microsoft", "MatMulInteger16"),
    ("com.microsoft", "MatMulIntegerToFloat"),
    ("com.microsoft", "DynamicQuantizeMatMul"),
    ("com.microsoft", "QGemm"),
    ("com.microsoft", "QMoE"),
    ("com.microsoft", "MoE"),
    ("", "MatMulInteger"),
    ("", "QLinearMatMul"),
];

/// Looks at one node; `None` when it is no product at all.
pub(crate) fn match_node(view: &GraphView, index: usize) -> Option<Match> {
    let node = &view.nodes()[index];
    let found = match (domain(node), node.op_type.as_deref().unwrap_or_default()) {
        ("", "MatMul") => experts::find(view, index).unwrap_or_else(|| matmul::find(view, index)),
        ("", "Gemm") => gemm::find(view, index),
        ("com.microsoft", "FusedMatMul") => {
            experts::find(view, index).unwrap_or_else(|| fused_matmul::find(view, index))
        }
        ("mx", _) if is_candidate(node) => {
            Err("it is an mx operator: this layer is rewritten already".to_owned())
        }
        _ if is_candidate(node) => Err(format!(
            "{} is not taken apart: its weights are inside the operator",
            op_name(node)
        )),
        _ => return None,
    };
    Some(match found {
        Ok(linear) => Match::Linear(Box::new(bias_add::fold(view, linear))),
        Err(reason) => Match::Not(reason),
    })
}

/// True for every operator that ends in one of the two lists.
pub(crate) fn is_candidate(node: &Node) -> bool {
    let op = node.op_type.as_deref().unwrap_or_default();
    match domain(node) {
        "" if matches!(op, "MatMul" | "Gemm") => true,
        "com.microsoft" if op == "FusedMatMul" => true,
        "mx" => matches!(op, "MxMatMul" | "MxExpertMatMul" | "MxActMatMul"),
        domain => OPAQUE.contains(&(domain, op)),
    }
}

/// The two operands of a product, told apart: X and the constant weight.
struct Operands<'a> {
    x: &'a str,
    weight: Constant,
    operand: &'a str,
}

/// Operand 0 dynamic and operand 1 a constant matrix; anything else is a reason.
fn operands<'a>(view: &GraphView, node: &'a Node) -> Result<Operands<'a>, String> {
    let [a, b, ..] = &node.input[..] else {
        return Err(format!("it has {} inputs and needs two", node.input.len()));
    };
    if a.is_empty() || b.is_empty() || node.output.first().is_none_or(String::is_empty) {
        return Err("one of its operands or its output is absent".to_owned());
    }
    // X may well be looked up in a constant (an embedding): what counts is whether it can change.
    let weight = match (view.is_constant(a), trace(view, b)) {
        (false, Traced::Constant(weight)) => weight,
        (false, Traced::Unusable(reason)) => return Err(chosen(view, b).unwrap_or(reason)),
        (false, Traced::Dynamic) => {
            let reason = chosen(view, a).or_else(|| chosen(view, b));
            return Err(reason.unwrap_or_else(|| "two dynamic operands: not a Linear".to_owned()));
        }
        (true, _) if !view.is_constant(b) => {
            return Err("its constant is the left operand: not a Linear".to_owned());
        }
        (true, _) => {
            return Err("both operands are constant: nothing to quantise at run time".to_owned());
        }
    };
    use DataType::{Bfloat16, Float, Float16};
    if !matches!(weight.dtype, Float | Float16 | Bfloat16) {
        return Err(format!(
            "its weight '{}' is {:?}; float32, float16 and bfloat16 can be quantised",
            weight.root, weight.dtype
        ));
    }
    if weight.axes.len() != 2 {
        return Err(format!(
            "its weight '{}' has shape {:?}, rank {}; a Linear's has rank 2",
            weight.root,
            weight.dims(),
            weight.axes.len()
        ));
    }
    Ok(Operands { x: a, weight, operand: b })
}

/// Why an operand that is an expert's weight cannot be replaced here.
fn chosen(view: &GraphView, operand: &str) -> Option<String> {
    let stack = slices::stack(view, operand)?;
    Some(chosen_reason(&stack, "only MatMul and FusedMatMul with one such operand are understood"))
}

/// The same for a stack, by name and shape.
fn chosen_reason((name, dims): &(String, Vec<i64>), why: &str) -> String {
    format!(
        "its weight is a part of the stack '{name}' {dims:?}, rank {}, chosen at run time, and cannot be \
         replaced: {why}",
        dims.len()
    )
}

/// A weight as an operator's rows need it.
struct Stored {
    n: usize,
    k: usize,
    layout: Layout,
    region: Region,
}

/// How a weight is stored; `k_first` when its first axis is the contracted one.
fn stored(weight: &Constant, k_first: bool) -> Result<Stored, String> {
    let (n, k) = extents(weight, k_first)?;
    let layout = weight.layout(k_first);
    let region = weight.region(layout, k_first).ok_or_else(|| {
        format!(
            "its weight is a part of '{}' {:?} of which neither rows nor columns are contiguous",
            weight.root, weight.stored
        )
    })?;
    Ok(Stored { n, k, layout, region })
}

/// n and k of a weight; `k_first` when its first axis is the contracted one.
fn extents(weight: &Constant, k_first: bool) -> Result<(usize, usize), String> {
    let dims: Vec<usize> =
        weight.dims().iter().filter_map(|&d| usize::try_from(d).ok().filter(|&d| d > 0)).collect();
    match dims[..] {
        [k, n] if k_first => Ok((n, k)),
        [n, k] => Ok((n, k)),
        _ => Err(format!("its weight '{}' has the empty shape {:?}", weight.root, weight.dims())),
    }
}
