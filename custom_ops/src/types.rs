//! The float types of activations: what ONNX Runtime, the contract and the kernels call them.

use half::{bf16, f16};
use mx_kernels::{Float, FloatMut, cuda::FloatType};
use ort::value::TensorElementType;

use crate::host::{Element, ElementType};

/// The float types that activations may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum XType {
    F32,
    F16,
    Bf16,
}

impl XType {
    pub(crate) const ALL: [Self; 3] = [Self::F32, Self::F16, Self::Bf16];

    pub(crate) fn ort(self) -> TensorElementType {
        match self {
            Self::F32 => TensorElementType::Float32,
            Self::F16 => TensorElementType::Float16,
            Self::Bf16 => TensorElementType::Bfloat16,
        }
    }

    pub(crate) fn element(self) -> ElementType {
        match self {
            Self::F32 => ElementType::F32,
            Self::F16 => ElementType::F16,
            Self::Bf16 => ElementType::BF16,
        }
    }

    pub(crate) fn float_type(self) -> FloatType {
        match self {
            Self::F32 => FloatType::F32,
            Self::F16 => FloatType::F16,
            Self::Bf16 => FloatType::Bf16,
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::Bf16 => "bfloat16",
        }
    }

    pub(crate) fn of(element: ElementType) -> Option<Self> {
        Self::ALL.into_iter().find(|x| x.element() == element)
    }
}

/// A float type in host memory.
pub(crate) trait XElement: Element + Default {
    fn float(values: &[Self]) -> Float<'_>;
    fn float_mut(values: &mut [Self]) -> FloatMut<'_>;
}

macro_rules! x_elements {
    ($($rust:ty = $variant:ident),*) => {
        $(impl XElement for $rust {
            fn float(values: &[Self]) -> Float<'_> {
                Float::$variant(values)
            }
            fn float_mut(values: &mut [Self]) -> FloatMut<'_> {
                FloatMut::$variant(values)
            }
        })*
    };
}
x_elements!(f32 = F32, f16 = F16, bf16 = Bf16);
