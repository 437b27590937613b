//! `MatMul(X, W)` with W a constant [k, n], and `MatMul(X, Transpose(W))` with W a constant [n, k].

use super::{Linear, Stored, operands, stored};
use crate::graph::GraphView;

pub(super) fn find(view: &GraphView, index: usize) -> Result<Linear, String> {
    let node = &view.nodes()[index];
    let found = operands(view, node)?;
    let Stored { n, k, layout, region } = stored(&found.weight, true)?;
    Ok(Linear {
        node: index,
        x: found.x.to_owned(),
        transpose_x: false,
        y: node.output[0].clone(),
        layout,
        region,
        weight: found.weight,
        operand: found.operand.to_owned(),
        n,
        k,
        alpha: 1.0,
        bias: None,
        residual: None,
        replaces: vec![index],
        experts: None,
    })
}
