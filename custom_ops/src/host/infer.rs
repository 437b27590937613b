//! Types and shapes while ONNX Runtime infers them.

use std::{
    ffi::{CStr, c_char},
    ptr,
    sync::atomic::{AtomicU64, Ordering},
};

use ort::{
    AsPointer,
    operator::ShapeInferenceContext,
    value::{Shape, SymbolicDimensions, TensorElementType, ValueType},
};

use super::{TypeShape, check, read_type_shape};
use crate::guard::OpError;

/// Element type, dimensions and dimension names of input `index` during shape inference; `None`
/// where ONNX Runtime knows nothing about it, or nothing but perhaps that it is a scalar.
pub(crate) fn inferred_input(
    ctx: &ShapeInferenceContext,
    index: usize,
) -> Result<Option<(TypeShape, Vec<String>)>, OpError> {
    let api = ort::api();
    let mut count = 0;
    // SAFETY: the context lives for the call.
    check("ShapeInferContext_GetInputCount", unsafe {
        (api.ShapeInferContext_GetInputCount)(ctx.ptr(), &mut count)
    })?;
    if index >= count {
        return Ok(None);
    }
    let mut info = ptr::null_mut();
    // SAFETY: the context lives for the call and owns the description.
    check("ShapeInferContext_GetInputTypeShape", unsafe {
        (api.ShapeInferContext_GetInputTypeShape)(ctx.ptr(), index, &mut info)
    })?;
    if info.is_null() {
        return Ok(None);
    }
    // SAFETY: `info` belongs to the context, which is alive.
    let shape = unsafe { read_type_shape(info)? };
    if shape.dims.is_empty() {
        return Ok(None);
    }
    let mut names = vec![ptr::null(); shape.dims.len()];
    // SAFETY: `names` has room for one pointer a dimension.
    check("GetSymbolicDimensions", unsafe {
        (api.GetSymbolicDimensions)(info, names.as_mut_ptr(), names.len())
    })?;
    let names = names.into_iter().map(|name: *const c_char| {
        if name.is_null() {
            return String::new();
        }
        // SAFETY: ONNX Runtime's dimension names are null-terminated and live with `info`.
        unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned()
    });
    Ok(Some((shape, names.collect())))
}

/// Tells ONNX Runtime the shape of output `index`. An unknown dimension without a name gets one of
/// its own: ONNX Runtime would take a bare -1 for a length, carry it through Shape -> Concat into a
/// Reshape's target and refuse the model ("multiple -1 dimensions").
pub(crate) fn set_inferred(
    ctx: &mut ShapeInferenceContext,
    index: usize,
    element: TensorElementType,
    dims: &[i64],
    names: &[String],
) -> Result<(), OpError> {
    static UNNAMED: AtomicU64 = AtomicU64::new(0);
    let names = dims.iter().zip(names).map(|(&dim, name)| {
        if dim < 0 && name.is_empty() {
            format!("mx_unknown_{}", UNNAMED.fetch_add(1, Ordering::Relaxed))
        } else {
            name.clone()
        }
    });
    let value = ValueType::Tensor {
        ty: element,
        shape: Shape::new(dims.iter().copied()),
        dimension_symbols: SymbolicDimensions::new(names),
    };
    ctx.set_output(index, &value).map_err(|error| OpError::Host {
        call: "ShapeInferContext_SetOutputTypeShape",
        message: error.message().to_owned(),
    })
}
