//! The head, and what products by constants cost.

use crate::graph::{GraphView, domain, is_op};
use crate::onnx::proto::Node;

/// The last product before the logits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Head {
    /// Its node.
    pub node: usize,
    /// What it multiplies, `[batch, sequence, hidden]`.
    pub x: String,
}

/// Finds the head behind the logits, through operators that look at one position by itself.
pub(super) fn find_head(view: &GraphView, logits: &str) -> Option<Head> {
    const POINTWISE: [&str; 7] = ["Cast", "Identity", "Mul", "Div", "Add", "Sub", "Tanh"];
    let maker = |value: &str| {
        view.nodes().iter().position(|node| node.output.iter().any(|output| output == value))
    };
    let mut value = logits.to_owned();
    for _ in 0..16 {
        let index = maker(&value)?;
        let node = &view.nodes()[index];
        let dynamic: Vec<&String> =
            node.input.iter().filter(|v| !v.is_empty() && !view.is_constant(v)).collect();
        let [x] = &dynamic[..] else { return None };
        if is_op(node, "MatMul") && node.input.first() == Some(*x) {
            return (view.uses(&value).len() == 1).then(|| Head { node: index, x: (*x).clone() });
        }
        // A constant of more than one row would have to be gathered as well.
        let small = |v: &String| {
            let dims = view.constant(v).map(|constant| constant.dims.clone());
            dims.is_some_and(|dims| dims.iter().rev().skip(1).all(|&dim| dim == 1))
        };
        let constants = node.input.iter().filter(|v| view.is_constant(v));
        let pointwise = POINTWISE.iter().any(|op| is_op(node, op));
        if !pointwise || !constants.into_iter().all(small) || view.uses(&value).len() != 1 {
            return None;
        }
        value = (*x).clone();
    }
    None
}

/// Numbers in the constant matrices that the nodes multiply by: what a pass over one token costs.
pub(super) fn weights(view: &GraphView, nodes: &[usize]) -> u64 {
    nodes.iter().map(|&index| weight(view, &view.nodes()[index])).sum()
}

/// The same of one node.
pub(super) fn weight(view: &GraphView, node: &Node) -> u64 {
    let fused = node.op_type.as_deref() == Some("FusedMatMul");
    if !(is_op(node, "MatMul") || is_op(node, "Gemm") || fused && !domain(node).is_empty()) {
        return 0;
    }
    let constants = node.input.iter().take(2).filter(|value| view.is_constant(value));
    constants.filter_map(|value| elements(view, value)).max().unwrap_or(0)
}

/// Elements of a constant, through what only moves or casts them.
fn elements(view: &GraphView, value: &str) -> Option<u64> {
    let mut value = value.to_owned();
    for _ in 0..16 {
        if let Some(constant) = view.constant(&value) {
            let dims = constant.dims.iter().map(|&dim| u64::try_from(dim).ok());
            return dims.reduce(|a, b| a?.checked_mul(b?)).flatten();
        }
        let maker = view.nodes().iter().find(|node| node.output.contains(&value))?;
        value.clone_from(maker.input.first()?);
    }
    None
}
