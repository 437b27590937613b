//! Names and positions: of operators, attributes, inputs and outputs.

/// Operator names.
pub mod op {
    /// `Y = alpha * X * W^T (+ beta * bias)` with a packed constant weight.
    pub const MX_MATMUL: &str = "MxMatMul";
    /// `Y = alpha * A * B`, both dynamic and quantised on the fly.
    pub const MX_ACT_MATMUL: &str = "MxActMatMul";
    /// `Y = alpha * X * W[index]^T`: weights chosen from a packed stack by a run-time index.
    pub const MX_EXPERT_MATMUL: &str = "MxExpertMatMul";
    /// Per-token negative log likelihood, entropy, top-1 and divergence.
    pub const TOKEN_SCORES: &str = "TokenScores";
}

/// Attribute names of `MxMatMul`, `MxActMatMul` and `MxExpertMatMul`; the ONNX attribute type comes first.
pub mod attr {
    /// int: the contraction length of X and W.
    pub const K: &str = "k";
    /// int: the number of output features, rows of W.
    pub const N: &str = "n";
    /// string: element format of the weight.
    pub const WEIGHT_FORMAT: &str = "weight_format";
    /// string: element format that X is quantised to, or `none`.
    pub const ACTIVATION_FORMAT: &str = "activation_format";
    /// string: element format that A is quantised to (`MxActMatMul`).
    pub const A_FORMAT: &str = "a_format";
    /// string: element format that B is quantised to (`MxActMatMul`), A's when absent.
    pub const B_FORMAT: &str = "b_format";
    /// int: 1 for B as [..., n, k] (`MxActMatMul`), 0 when absent.
    pub const TRANSPOSE_B: &str = "transpose_b";
    /// int: 16, 32, 64, 128 or 256 elements along k share a scale.
    pub const BLOCK_SIZE: &str = "block_size";
    /// int: how many weights the stack holds (`MxExpertMatMul`).
    pub const EXPERTS: &str = "experts";
    /// int: rank of the index, so that the shape of Y follows where ONNX Runtime cannot tell a scalar
    /// from an unknown rank; -1 or absent when it is not known (`MxExpertMatMul`).
    pub const INDEX_RANK: &str = "index_rank";
    /// string: `e8m0`, `none` or, for `MxMatMul`, `tensor`.
    pub const SCALE: &str = "scale";
    /// string: `even`, `nearest` or `floor`, for both operands.
    pub const ROUNDING: &str = "rounding";
    /// string: `floor`, `ceil`, `even` or `rceil`, for both operands.
    pub const SCALE_RULE: &str = "scale_rule";
    /// float: factor of the product, 1 when absent.
    pub const ALPHA: &str = "alpha";
    /// float: factor of the bias, 1 when absent.
    pub const BETA: &str = "beta";
    /// int: version of the packed layout, see [`crate::contract::LAYOUT`].
    pub const LAYOUT: &str = "layout";
}

/// Input positions of `MxMatMul`.
pub mod input {
    /// X, `[..., k]`.
    pub const X: usize = 0;
    /// Packed codes, uint8 `[n, row_bytes]`.
    pub const CODES: usize = 1;
    /// Scales, see [`crate::contract::ScalesShape`]; the empty name when the scale kind is `none`.
    pub const SCALES: usize = 2;
    /// Bias `[n]`, optional.
    pub const BIAS: usize = 3;
    /// How many inputs a node may list.
    pub const COUNT: usize = 4;
    /// What errors call the inputs, in order.
    pub const NAMES: [&str; COUNT] = ["X", "codes", "scales", "bias"];
}

/// Input positions of `MxActMatMul`.
pub mod operand {
    /// A, `[..., m, k]` or `[k]`.
    pub const A: usize = 0;
    /// B, `[..., k, n]`, `[..., n, k]` with `transpose_b`, or `[k]`.
    pub const B: usize = 1;
    /// What errors call the inputs, in order.
    pub const NAMES: [&str; 2] = ["A", "B"];
}

/// Input positions of `MxExpertMatMul`.
pub mod expert {
    /// X, `[..., m, k]` or `[k]`.
    pub const X: usize = 0;
    /// Which expert, int64 or int32 of any shape; its dimensions broadcast with X's leading ones.
    pub const INDEX: usize = 1;
    /// Packed codes, uint8 `[experts, n, row_bytes]`.
    pub const CODES: usize = 2;
    /// Scales, uint8 `[experts, n, blocks]`; absent when the scale kind is `none`.
    pub const SCALES: usize = 3;
    /// How many inputs a node may list.
    pub const COUNT: usize = 4;
    /// What errors call the inputs, in order.
    pub const NAMES: [&str; COUNT] = ["X", "index", "codes", "scales"];
}

/// Input and output positions of `TokenScores`.
pub mod scores {
    /// Logits `[b, s, v]`.
    pub const LOGITS: usize = 0;
    /// Labels, int64 `[b, s]`.
    pub const LABELS: usize = 1;
    /// Baseline logits `[b, s, v]`, optional.
    pub const BASELINE: usize = 2;
    /// What errors call the inputs, in order.
    pub const INPUT_NAMES: [&str; 3] = ["logits", "labels", "baseline"];
    /// Position of the output `top1`, the only one that is int64.
    pub const TOP1: usize = 2;
    /// Position of the first output that needs a baseline.
    pub const AGAINST_BASELINE: usize = 3;
    /// The outputs in order.
    pub const OUTPUT_NAMES: [&str; 5] = ["nll", "entropy", "top1", "kl", "baseline_nll"];
}
