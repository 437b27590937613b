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

    /// The same numbers as an input of ONNX Runtime, rounded to `element` where that is a float type.
    ///
    /// # Errors
    /// A type that inputs are not made in, or that does not hold one of the numbers.
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
            other => {
                // An int64 is read as the nearest float64, which may be past the last int64.
                let own = other == DataType::Int64 && self.dtype == "int64";
                let odd = values.iter().find(|&&value| !own && !holds(other, value));
                if let Some(odd) = odd {
                    return Err(ort::Error::new(format!("{odd} is no number of type {other:?}")));
                }
                feeds::numbers(other, shape, cast(values, |v| v as i64))?
            }
        })
    }
}

/// Whether a type of whole numbers has this one.
fn holds(element: DataType, value: f64) -> bool {
    let (least, most) = match element {
        DataType::Int32 => (i32::MIN.into(), i32::MAX.into()),
        DataType::Bool => (0.0, 1.0),
        // The nearest float64 of i64::MAX is one too many.
        _ => (i64::MIN as f64, (i64::MAX as f64).next_down()),
    };
    value.fract() == 0.0 && (least..=most).contains(&value)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integer_types_hold_the_whole_numbers_of_their_range() {
        for (element, value, held) in [
            (DataType::Int64, -3.0, true),
            (DataType::Int64, 2.5, false),
            (DataType::Int64, f64::NAN, false),
            (DataType::Int64, f64::INFINITY, false),
            (DataType::Int64, 2f64.powi(63), false),
            (DataType::Int64, -(2f64.powi(63)), true),
            (DataType::Int32, 2f64.powi(31), false),
            (DataType::Int32, -(2f64.powi(31)), true),
            (DataType::Bool, 1.0, true),
            (DataType::Bool, 2.0, false),
        ] {
            assert_eq!(holds(element, value), held, "{element:?} {value}");
        }
    }
}
