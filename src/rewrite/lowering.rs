//! What a rewritten layer becomes.

use std::{fmt, str::FromStr};

use serde::Serialize;

use crate::onnx::DataType;

/// Target of a rewrite.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize)]
pub enum Lowering {
    /// `mx::MxMatMul` with shared exponents: OCP MX.
    #[default]
    #[serde(rename = "mx")]
    Mx,
    /// OCP MX by standard operators alone: blocked QuantizeLinear and DequantizeLinear with FLOAT8E8M0
    /// scales (opset 24; FP6 28).
    #[serde(rename = "qdq")]
    Qdq,
    /// Weight-only int8, symmetric per output channel: standard DequantizeLinear.
    #[serde(rename = "int8")]
    Int8,
    /// Every weight and every float result of the whole graph rounded to bfloat16.
    #[serde(rename = "bf16")]
    Bf16,
    /// The whole graph converted to float16.
    #[serde(rename = "fp16")]
    Fp16,
    /// `mx::MxMatMul` with bfloat16 weight and activation and no shared exponent.
    #[serde(rename = "bfp16")]
    Bfp16,
    /// `mx::MxMatMul` with a saturating cast of both operands to fp8 E4M3, no scales.
    #[serde(rename = "nvfp8-emu-e4m3")]
    NvFp8EmuE4m3,
    /// The same in fp8 E5M2.
    #[serde(rename = "nvfp8-emu-e5m2")]
    NvFp8EmuE5m2,
    /// `mx::MxMatMul` in fp8 E4M3 with one float32 scale a tensor: the weight's is stored, the
    /// activation's is found in every run (current scaling).
    #[serde(rename = "nvfp8")]
    NvFp8,
}

impl Lowering {
    /// All of them, in the order of the help text.
    pub const ALL: [Self; 9] = [
        Self::Mx,
        Self::Qdq,
        Self::Int8,
        Self::Bf16,
        Self::Fp16,
        Self::Bfp16,
        Self::NvFp8EmuE4m3,
        Self::NvFp8EmuE5m2,
        Self::NvFp8,
    ];

    /// The name used on the command line, in stage names and in file names.
    pub fn name(self) -> &'static str {
        match self {
            Self::Mx => "mx",
            Self::Qdq => "qdq",
            Self::Int8 => "int8",
            Self::Bf16 => "bf16",
            Self::Fp16 => "fp16",
            Self::Bfp16 => "bfp16",
            Self::NvFp8EmuE4m3 => "nvfp8-emu-e4m3",
            Self::NvFp8EmuE5m2 => "nvfp8-emu-e5m2",
            Self::NvFp8 => "nvfp8",
        }
    }

    /// True where the user chooses the element formats: MX, whichever operators compute it.
    pub fn takes_formats(self) -> bool {
        matches!(self, Self::Mx | Self::Qdq)
    }

    /// True where the whole graph is rounded or converted, layers or not.
    pub fn is_whole_graph(self) -> bool {
        matches!(self, Self::Bf16 | Self::Fp16)
    }

    /// Why `base` does not go with the lowering; `None` where it does.
    pub(crate) fn refuses(self, base: Option<BaseDtype>) -> Option<&'static str> {
        match (self, base?) {
            (Self::Bf16, BaseDtype::F16) => Some("the whole graph is bfloat16"),
            (Self::Fp16, BaseDtype::F32 | BaseDtype::Bf16) => Some("the whole graph is float16"),
            (Self::Qdq, _) => Some(
                "scales are computed in the graph in float32; convert the model by itself (--lower \
                 fp16, or --lower bf16 with --base-dtype bf16) and rewrite the result",
            ),
            _ => None,
        }
    }

    /// The base type of the whole graph, with that of the recipe.
    pub(crate) fn base(self, base: Option<BaseDtype>) -> Option<BaseDtype> {
        if self == Self::Fp16 { Some(BaseDtype::F16) } else { base }
    }
}

/// Float type of everything that is not MX.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub enum BaseDtype {
    /// float32.
    #[serde(rename = "fp32")]
    F32,
    /// bfloat16.
    #[serde(rename = "bf16")]
    Bf16,
    /// float16.
    #[serde(rename = "fp16")]
    F16,
}

impl BaseDtype {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::F32, Self::Bf16, Self::F16];

    /// The name used on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "fp32",
            Self::Bf16 => "bf16",
            Self::F16 => "fp16",
        }
    }

    /// ONNX's element type.
    pub fn data_type(self) -> DataType {
        match self {
            Self::F32 => DataType::Float,
            Self::Bf16 => DataType::Bfloat16,
            Self::F16 => DataType::Float16,
        }
    }
}

impl fmt::Display for BaseDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for BaseDtype {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let found = Self::ALL.into_iter().find(|base| base.name() == name);
        found.ok_or_else(|| format!("unknown type '{name}'; known are fp32, bf16, fp16"))
    }
}

impl fmt::Display for Lowering {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A lowering name that is unknown.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LoweringError {
    /// No lowering has this name.
    #[error("unknown lowering '{0}'; available are {list}", list = names())]
    Unknown(String),
}

fn names() -> String {
    Lowering::ALL.map(Lowering::name).join(", ")
}

impl FromStr for Lowering {
    type Err = LoweringError;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let found = Self::ALL.into_iter().find(|lowering| lowering.name() == name);
        found.ok_or_else(|| LoweringError::Unknown(name.to_owned()))
    }
}
