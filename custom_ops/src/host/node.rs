//! A node while its kernel is created: attributes, declared types, constants.

use std::{
    borrow::Cow,
    ffi::{CStr, CString, c_char},
    ptr,
};

use ort::{AsPointer, operator::KernelContext, sys};

use super::{TensorView, TypeShape, check, read_type_shape};
use crate::{
    contract::{AttributeSource, AttributeValue},
    guard::OpError,
};

/// A node as a kernel is created for it.
pub(crate) struct Node<'k, 'a>(pub &'k KernelContext<'a>);

type NameCall = unsafe extern "system" fn(
    *const sys::OrtKernelInfo,
    usize,
    *mut c_char,
    *mut usize,
) -> sys::OrtStatusPtr;

impl Node<'_, '_> {
    /// The node's name, or its first output's where it has none.
    pub(crate) fn name(&self) -> String {
        match self.0.node_name() {
            Ok(name) if !name.is_empty() => name,
            _ => match self.value_name(ort::api().KernelInfo_GetOutputName, 0) {
                Some(output) => format!("(unnamed, output {output})"),
                None => "(unnamed)".to_owned(),
            },
        }
    }

    /// The address of the logger of the node's session, which no other live session has; 0 where ONNX
    /// Runtime does not tell.
    pub(crate) fn logger(&self) -> usize {
        let mut logger = ptr::null();
        // SAFETY: the node description lives as long as `self`; only the address is used.
        let status = unsafe { (ort::api().KernelInfo_GetLogger)(self.0.ptr(), &mut logger) };
        check("KernelInfo_GetLogger", status).map_or(0, |()| logger as usize)
    }

    fn value_name(&self, call: NameCall, index: usize) -> Option<String> {
        let mut size = 0;
        // SAFETY: a null buffer asks for the size only.
        let status = unsafe { call(self.0.ptr(), index, ptr::null_mut(), &mut size) };
        check("name", status).ok()?;
        let mut bytes = vec![0_u8; size];
        // SAFETY: the buffer has the size that was asked for.
        let status = unsafe { call(self.0.ptr(), index, bytes.as_mut_ptr().cast(), &mut size) };
        check("name", status).ok()?;
        Some(CStr::from_bytes_until_nul(&bytes).ok()?.to_string_lossy().into_owned())
    }

    /// Number of inputs that the node lists, absent ones in the middle included.
    pub(crate) fn input_count(&self) -> Result<usize, OpError> {
        let mut count = 0;
        // SAFETY: the node description lives as long as `self`.
        let status = unsafe { (ort::api().KernelInfo_GetInputCount)(self.0.ptr(), &mut count) };
        check("KernelInfo_GetInputCount", status)?;
        Ok(count)
    }

    /// Whether the node names something at input `index`.
    pub(crate) fn has_input(&self, index: usize) -> Result<bool, OpError> {
        if index >= self.input_count()? {
            return Ok(false);
        }
        let name = self.value_name(ort::api().KernelInfo_GetInputName, index);
        Ok(name.is_none_or(|name| !name.is_empty()))
    }

    /// Element type and shape of input `index` as the model declares them. Rank 0 may stand for an
    /// unknown rank. `None` where ONNX Runtime knows neither.
    pub(crate) fn input_type(&self, index: usize) -> Result<Option<TypeShape>, OpError> {
        let api = ort::api();
        let mut info = ptr::null_mut();
        // SAFETY: the node description lives as long as `self`.
        let status = unsafe { (api.KernelInfo_GetInputTypeInfo)(self.0.ptr(), index, &mut info) };
        if check("KernelInfo_GetInputTypeInfo", status).is_err() || info.is_null() {
            return Ok(None);
        }
        let mut tensor = ptr::null();
        // SAFETY: `info` was just made, is read while alive and released once; `tensor` is part of it.
        unsafe {
            let cast = check(
                "CastTypeInfoToTensorInfo",
                (api.CastTypeInfoToTensorInfo)(info, &mut tensor),
            );
            let shape = match cast {
                Ok(()) if tensor.is_null() => Err(OpError::NotTensor),
                Ok(()) => read_type_shape(tensor).map(Some),
                Err(error) => Err(error),
            };
            (api.ReleaseTypeInfo)(info);
            shape
        }
    }

    /// Input `index` where it is an initialiser: its true type, shape and data.
    pub(crate) fn constant(&self, index: usize) -> Result<Option<TensorView<'_>>, OpError> {
        let mut constant = 0;
        let mut value = ptr::null();
        // SAFETY: the node description lives as long as `self`; an index past the end is no constant.
        let status = unsafe {
            let call = ort::api().KernelInfoGetConstantInput_tensor;
            call(self.0.ptr(), index, &mut constant, &mut value)
        };
        check("KernelInfoGetConstantInput_tensor", status)?;
        if constant == 0 || value.is_null() {
            return Ok(None);
        }
        // SAFETY: initialisers live at least as long as their session's kernels and are read-only.
        unsafe { TensorView::new(value) }.map(Some)
    }
}

impl AttributeSource for Node<'_, '_> {
    fn attribute(&self, name: &str) -> Option<AttributeValue> {
        if let Some(value) = self.0.get::<i64>(name) {
            return Some(AttributeValue::Int(value));
        }
        if let Some(value) = self.0.get::<f32>(name) {
            return Some(AttributeValue::Float(value));
        }
        if let Some(value) = self.0.get::<String>(name) {
            return Some(AttributeValue::Text(Cow::Owned(value)));
        }
        // What is left, a string that is not UTF-8 included, is there but of no use.
        let present = self.has_string(name)
            || self.0.get::<Vec<i64>>(name).is_some()
            || self.0.get::<Vec<f32>>(name).is_some();
        present.then_some(AttributeValue::Other)
    }
}

impl Node<'_, '_> {
    fn has_string(&self, name: &str) -> bool {
        let Ok(name) = CString::new(name) else { return false };
        let mut size = 0;
        // SAFETY: a null buffer asks for the size only.
        let status = unsafe {
            let call = ort::api().KernelInfoGetAttribute_string;
            call(self.0.ptr(), name.as_ptr(), ptr::null_mut(), &mut size)
        };
        check("KernelInfoGetAttribute_string", status).is_ok()
    }
}
