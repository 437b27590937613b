//! `com.microsoft.FusedMatMul`: MatMul with alpha and transposed operands, made by ONNX Runtime's
//! optimizer.

use super::{Linear, Stored, matmul, operands, stored};
use crate::graph::{GraphView, float_attribute, int_attribute};

pub(super) fn find(view: &GraphView, index: usize) -> Result<Linear, String> {
    let node = &view.nodes()[index];
    for attribute in ["transA", "transBatchA", "transBatchB"] {
        // Operands first: an attention product is the better reason.
        operands(view, node)?;
        if int_attribute(node, attribute, 0) != 0 {
            return Err(format!("FusedMatMul with {attribute} is not taken apart"));
        }
    }
    let mut linear = matmul::find(view, index)?;
    linear.alpha = float_attribute(node, "alpha", 1.0);
    if int_attribute(node, "transB", 0) != 0 {
        let Stored { n, k, layout, region } = stored(&linear.weight, false)?;
        linear = Linear { n, k, layout, region, ..linear };
    }
    Ok(linear)
}
