//! Inputs out of a `.safetensors` file.

use std::path::Path;

use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};

use super::{
    error::{Result, VerifyError},
    numbers::Numbers,
};

/// Every tensor of the file, by name.
pub(super) fn read(path: &Path) -> Result<Vec<(String, Numbers)>> {
    let fail = |reason: String| VerifyError::Inputs { path: path.to_owned(), reason };
    let bytes = std::fs::read(path).map_err(|error| fail(error.to_string()))?;
    let file = SafeTensors::deserialize(&bytes)
        .map_err(|error| fail(format!("is no .safetensors file: {error}")))?;
    let tensor = |(name, view): (String, TensorView<'_>)| {
        let numbers = numbers(&view).ok_or_else(|| {
            fail(format!("tensor `{name}` is {:?}, which is no type of an input", view.dtype()))
        })?;
        Ok((name, numbers))
    };
    file.tensors().into_iter().map(tensor).collect()
}

fn numbers(view: &TensorView<'_>) -> Option<Numbers> {
    /// The file's reader has held the length against the shape.
    fn each<const N: usize>(bytes: &[u8], to: impl Fn([u8; N]) -> f64) -> Vec<f64> {
        bytes.as_chunks::<N>().0.iter().map(|&chunk| to(chunk)).collect()
    }
    let bytes = view.data();
    let (dtype, values) = match view.dtype() {
        Dtype::F32 => ("float32", each(bytes, |b| f32::from_le_bytes(b).into())),
        Dtype::F16 => ("float16", each(bytes, |b| f16::from_le_bytes(b).into())),
        Dtype::BF16 => ("bfloat16", each(bytes, |b| bf16::from_le_bytes(b).into())),
        Dtype::F64 => ("float64", each(bytes, f64::from_le_bytes)),
        Dtype::I64 => ("int64", each(bytes, |b| i64::from_le_bytes(b) as f64)),
        Dtype::I32 => ("int32", each(bytes, |b| i32::from_le_bytes(b).into())),
        Dtype::I8 => ("int8", each(bytes, |b| i8::from_le_bytes(b).into())),
        Dtype::U8 => ("uint8", each(bytes, |[b]: [u8; 1]| b.into())),
        Dtype::BOOL => ("bool", each(bytes, |[b]: [u8; 1]| b.into())),
        _ => return None,
    };
    Some(Numbers { dtype, shape: view.shape().to_vec(), values })
}
