//! Tensors as they come out of ONNX Runtime, whatever their type, as numbers.

use crate::{eval::feeds, onnx::DataType};
use half::{bf16, f16};
use ort::value::{DynValue, PrimitiveTensorElementType, Tensor, TensorElementType, ValueType};

/// A tensor. float64 holds every number of the types that models compute in; of an int64 or uint64
/// beyond 2^53 it holds the nearest.
#[derive(Clone, Debug, PartialEq)]
pub struct Numbers {
    /// Element type, by ONNX's name (`float16`).
    pub dtype: &'static str,
    /// Extents.
    pub shape: Vec<usize>,
    /// Elements, row-major.
    pub values: Vec<f64>,
}

impl Numbers {
    /// Reads a value in host memory.
    ///
    /// # Errors
    /// Not a tensor of numbers; the sentence says what it is.
    pub fn read(value: &DynValue) -> Result<Self, String> {
        let ValueType::Tensor { ty, shape, .. } = value.dtype() else {
            return Err(format!("is {}, not a tensor", value.dtype()));
        };
        let shape: Vec<usize> =
            shape.iter().map(|&extent| usize::try_from(extent).unwrap_or(0)).collect();
        // An empty tensor may have no address at all.
        let empty = shape.contains(&0);
        let (dtype, values) = match ty {
            TensorElementType::Float32 => ("float32", read(value, empty, |v: f32| v.into())),
            TensorElementType::Float16 => ("float16", read(value, empty, |v: f16| v.into())),
            TensorElementType::Bfloat16 => ("bfloat16", read(value, empty, |v: bf16| v.into())),
            TensorElementType::Float64 => ("float64", read(value, empty, |v: f64| v)),
            TensorElementType::Int64 => ("int64", read(value, empty, |v: i64| v as f64)),
            TensorElementType::Int32 => ("int32", read(value, empty, |v: i32| v.into())),
            TensorElementType::Int16 => ("int16", read(value, empty, |v: i16| v.into())),
            TensorElementType::Int8 => ("int8", read(value, empty, |v: i8| v.into())),
            TensorElementType::Uint64 => ("uint64", read(value, empty, |v: u64| v as f64)),
            TensorElementType::Uint32 => ("uint32", read(value, empty, |v: u32| v.into())),
            TensorElementType::Uint16 => ("uint16", read(value, empty, |v: u16| v.into())),
            TensorElementType::Uint8 => ("uint8", read(value, empty, |v: u8| v.into())),
            TensorElementType::Bool => {
                ("bool", read(value, empty, |v: bool| f64::from(u8::from(v))))
            }
            other => return Err(format!("holds {other}, which is not compared")),
        };
        Ok(Self { dtype, shape, values: values? })
    }

    /// The same numbers as an input of ONNX Runtime, rounded to `element`.
    ///
    /// # Errors
    /// A type that inputs are not made in.
    pub fn to_input(&self, element: DataType) -> ort::Result<DynValue> {
        let shape = self.shape.clone();
        fn cast<T>(values: &[f64], to: impl Fn(f64) -> T) -> Vec<T> {
            values.iter().map(|&value| to(value)).collect()
        }
        let values = &self.values;
        Ok(match element {
            DataType::Float => Tensor::from_array((shape, cast(values, |v| v as f32)))?.into_dyn(),
            DataType::Float16 => {
                Tensor::from_array((shape, cast(values, f16::from_f64)))?.into_dyn()
            }
            DataType::Bfloat16 => {
                Tensor::from_array((shape, cast(values, bf16::from_f64)))?.into_dyn()
            }
            DataType::Double => Tensor::from_array((shape, values.clone()))?.into_dyn(),
            other => feeds::numbers(other, shape, cast(values, |v| v as i64))?,
        })
    }
}

fn read<T: PrimitiveTensorElementType + Copy>(
    value: &DynValue,
    empty: bool,
    to: impl Fn(T) -> f64,
) -> Result<Vec<f64>, String> {
    if empty {
        return Ok(Vec::new());
    }
    let (_, values) = value.try_extract_tensor::<T>().map_err(|error| error.to_string())?;
    Ok(values.iter().map(|&value| to(value)).collect())
}
