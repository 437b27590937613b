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
    /// Weight-only int8, symmetric per output channel: standard DequantizeLinear.
    #[serde(rename = "int8")]
    Int8,
    /// Every weight and every float result of the whole graph rounded to bfloat16.
    #[serde(rename = "bf16")]
    Bf16,
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
    pub const ALL: [Self; 7] = [
        Self::Mx,
        Self::Int8,
        Self::Bf16,
        Self::Bfp16,
        Self::NvFp8EmuE4m3,
        Self::NvFp8EmuE5m2,
        Self::NvFp8,
    ];

    /// The name used on the command line, in stage names and in file names.
    pub fn name(self) -> &'static str {
        match self {
            Self::Mx => "mx",
            Self::Int8 => "int8",
            Self::Bf16 => "bf16",
            Self::Bfp16 => "bfp16",
            Self::NvFp8EmuE4m3 => "nvfp8-emu-e4m3",
            Self::NvFp8EmuE5m2 => "nvfp8-emu-e5m2",
            Self::NvFp8 => "nvfp8",
        }
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

/// A lowering name that is unknown or not built yet.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LoweringError {
    /// A name from the design whose implementation does not exist yet.
    #[error("lowering '{0}' is not available yet; available are {list}", list = names())]
    NotAvailable(String),
    /// Any other name.
    #[error("unknown lowering '{0}'; available are {list}", list = names())]
    Unknown(String),
}

fn names() -> String {
    Lowering::ALL.map(Lowering::name).join(", ")
}

impl FromStr for Lowering {
    type Err = LoweringError;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::ALL.into_iter().find(|lowering| lowering.name() == name).ok_or_else(|| match name {
            "qdq" | "fp16" => LoweringError::NotAvailable(name.to_owned()),
            _ => LoweringError::Unknown(name.to_owned()),
        })
    }
}
