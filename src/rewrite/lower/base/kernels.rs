//! Which operators compute in which float type on ONNX Runtime's CUDA provider, and which of their
//! inputs and outputs have that type.
//!
//! From ONNX Runtime's `docs/OperatorKernels.md` (CUDAExecutionProvider) and the operator
//! definitions, for opset 13 and newer. What is not listed keeps the types that it has.

use crate::{graph, onnx::DataType, onnx::proto::Node};

/// The float inputs and outputs of an operator that share one type; `None` = all that are float.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Kernel {
    inputs: Option<&'static [usize]>,
    outputs: Option<&'static [usize]>,
    /// First opset whose kernel takes bfloat16; `i64::MAX` = none does.
    bf16: i64,
    float_only: bool,
}

impl Kernel {
    pub(super) fn takes_input(&self, slot: usize) -> bool {
        self.inputs.is_none_or(|slots| slots.contains(&slot))
    }

    pub(super) fn takes_output(&self, slot: usize) -> bool {
        self.outputs.is_none_or(|slots| slots.contains(&slot))
    }

    /// Whether the operator computes in `data_type`.
    pub(super) fn computes_in(&self, data_type: DataType, opset: i64) -> bool {
        match data_type {
            DataType::Float => true,
            _ if self.float_only => false,
            DataType::Bfloat16 => opset >= self.bf16,
            _ => true,
        }
    }
}

/// ai.onnx operators that compute in float16 from opset 13 and in bfloat16 from the given one.
const BOTH: &[(&str, i64)] = &[
    ("Abs", 13),
    ("Add", 13),
    ("Attention", 23),
    ("Compress", 13),
    ("Concat", 13),
    ("Div", 13),
    ("Erf", 13),
    ("Exp", 13),
    ("Expand", 13),
    ("Flatten", 13),
    ("Gather", 13),
    ("GatherElements", 13),
    ("GatherND", 13),
    ("Gelu", 20),
    ("Gemm", 13),
    ("HardSigmoid", 22),
    ("HardSwish", 22),
    ("Identity", 13),
    ("MatMul", 13),
    ("Max", 13),
    ("Min", 13),
    ("Mul", 13),
    ("Neg", 13),
    ("Pow", 15),
    ("RMSNormalization", 23),
    ("ReduceSum", 13),
    ("Relu", 13),
    ("Reshape", 13),
    ("RotaryEmbedding", 23),
    ("ScatterElements", 13),
    ("ScatterND", 13),
    ("Sigmoid", 13),
    ("Sign", 13),
    ("Slice", 13),
    ("Softmax", 13),
    ("Split", 13),
    ("Sqrt", 13),
    ("Squeeze", 13),
    ("Sub", 13),
    ("Sum", 13),
    ("Tanh", 13),
    ("TensorScatter", 24),
    ("Tile", 13),
    ("Transpose", 13),
    ("Trilu", 14),
    ("Unsqueeze", 13),
    ("Where", 16),
];

/// ai.onnx operators that compute in float16 only. Sums of exponentials and logarithms are not here:
/// they stay in float32.
const HALF: &[&str] = &[
    "Ceil",
    "Clip",
    "Cos",
    "Einsum",
    "Elu",
    "Equal",
    "Floor",
    "Greater",
    "GreaterOrEqual",
    "LeakyRelu",
    "Less",
    "LessOrEqual",
    "PRelu",
    "Pad",
    "Reciprocal",
    "ReduceMax",
    "ReduceMean",
    "ReduceMin",
    "Round",
    "Selu",
    "Sin",
    "Softsign",
];

/// com.microsoft operators that compute in both.
const CONTRIB: &[&str] = &[
    "Attention",
    "BiasGelu",
    "FastGelu",
    "FusedMatMul",
    "Gelu",
    "MatMulNBits",
    "MoE",
    "MultiHeadAttention",
    "QuickGelu",
    "RotaryEmbedding",
    "TransposeMatMul",
];

/// An operator that computes in float32 whatever it is asked for.
pub(super) fn float_only() -> Kernel {
    Kernel { float_only: true, ..Kernel::default() }
}

/// What is known of a node's operator.
pub(super) fn of(node: &Node) -> Option<Kernel> {
    let op = node.op_type.as_deref().unwrap_or("");
    let plain = |bf16| Some(Kernel { bf16, ..Kernel::default() });
    let first_output = |bf16| Some(Kernel { bf16, outputs: Some(&[0]), ..Kernel::default() });
    match (graph::domain(node), op) {
        // Mean and inverse deviation are float32 whatever X is.
        ("", "LayerNormalization" | "SimplifiedLayerNormalization") => first_output(1),
        ("", "TopK") => first_output(i64::MAX),
        ("", "Dropout") => {
            Some(Kernel { inputs: Some(&[0]), outputs: Some(&[0]), bf16: 13, float_only: false })
        }
        ("", op) => match BOTH.binary_search_by_key(&op, |(name, _)| name) {
            Ok(index) => plain(BOTH[index].1),
            Err(_) => HALF.binary_search(&op).ok().and_then(|_| plain(i64::MAX)),
        },
        ("com.microsoft", "SkipLayerNormalization" | "SkipSimplifiedLayerNormalization") => {
            Some(Kernel { outputs: Some(&[0, 3]), bf16: 1, ..Kernel::default() })
        }
        // Scales of a quantised cache are float32.
        ("com.microsoft", "GroupQueryAttention") => Some(Kernel {
            inputs: Some(&[0, 1, 2, 3, 4, 7, 8, 10, 11]),
            bf16: 1,
            ..Kernel::default()
        }),
        ("com.microsoft", op) => CONTRIB.contains(&op).then_some(()).and_then(|()| plain(1)),
        // Codes are integers; the scale of a tensor is float32.
        ("mx", "MxMatMul") => Some(Kernel { inputs: Some(&[0, 3]), bf16: 1, ..Kernel::default() }),
        // All else of an expert's product is integers.
        ("mx", "MxActMatMul" | "MxExpertMatMul") => plain(1),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rewrite::lower::node;

    #[test]
    fn tables_are_sorted() {
        assert!(BOTH.is_sorted_by_key(|(name, _)| name));
        assert!(HALF.is_sorted());
    }

    #[test]
    fn types_of_operators() {
        let of = |op| of(&node(op, "", &[], &[]));
        let bf16 = |op, opset| of(op).is_some_and(|k| k.computes_in(DataType::Bfloat16, opset));
        assert!(bf16("MatMul", 13) && bf16("Where", 16) && bf16("LayerNormalization", 17));
        assert!(!bf16("Where", 15) && !bf16("Pow", 14) && !bf16("ReduceMean", 20));
        assert!(of("ReduceMean").unwrap().computes_in(DataType::Float16, 13));
        assert!(of("CumSum").is_none() && of("Loop").is_none());
        assert!(!of("LayerNormalization").unwrap().takes_output(1));
        let mut matmul = node("MxMatMul", "", &[], &[]);
        matmul.domain = Some("mx".into());
        let matmul = super::of(&matmul).unwrap();
        assert!(matmul.takes_input(0) && !matmul.takes_input(2) && matmul.takes_input(3));
    }
}
