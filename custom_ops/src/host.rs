//! ONNX Runtime's C API as this crate sees it: nodes with their static types, tensors as slices.
//!
//! The safe wrappers of `ort` read every type and dimension of a value on each call, panic on types
//! newer than themselves and fail as a whole where one optional input is absent, so the few calls
//! that matter are made here, with every answer checked.
#![allow(unsafe_code)]

mod gpu;
mod infer;
mod node;

use std::{borrow::Cow, ffi::c_void, marker::PhantomData, ptr};

use half::{bf16, f16};
use ort::{AsPointer, operator::ComputeContext, sys};

pub(crate) use self::{
    gpu::{Scratch, ScratchPool, device_output, stream},
    infer::{inferred_input, set_inferred},
    node::Node,
};
use crate::guard::OpError;

/// Longest list of dimensions that is believed; ONNX Runtime's own kernels stop far below.
const MAX_RANK: usize = 64;

/// Turns a status into a result and releases it.
fn check(call: &'static str, status: sys::OrtStatusPtr) -> Result<(), OpError> {
    // SAFETY: `status` was just returned by an ONNX Runtime call and is not used again.
    unsafe { ort::Error::result_from_status(status) }
        .map_err(|error| OpError::Host { call, message: error.message().to_owned() })
}

/// An ONNX element type by its number, which may be newer than this library.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ElementType(pub i32);

impl ElementType {
    pub(crate) const F32: Self = Self(1);
    pub(crate) const U8: Self = Self(2);
    pub(crate) const I32: Self = Self(6);
    pub(crate) const I64: Self = Self(7);
    pub(crate) const F16: Self = Self(10);
    pub(crate) const BF16: Self = Self(16);

    /// ONNX's name of the type.
    pub(crate) fn name(self) -> Cow<'static, str> {
        Cow::Borrowed(match self.0 {
            1 => "float32",
            2 => "uint8",
            3 => "int8",
            4 => "uint16",
            5 => "int16",
            6 => "int32",
            7 => "int64",
            8 => "string",
            9 => "bool",
            10 => "float16",
            11 => "float64",
            12 => "uint32",
            13 => "uint64",
            16 => "bfloat16",
            other => return Cow::Owned(format!("ONNX type {other}")),
        })
    }
}

/// A Rust type that holds one element of a tensor.
///
/// # Safety
/// Every bit pattern of `TYPE`'s size is a value of the type.
pub(crate) unsafe trait Element: Copy + 'static {
    const TYPE: ElementType;
}

macro_rules! elements {
    ($($rust:ty = $onnx:ident),*) => {
        $(
            // SAFETY: plain numbers of the size that ONNX gives the type; all bit patterns are values.
            unsafe impl Element for $rust {
                const TYPE: ElementType = ElementType::$onnx;
            }
        )*
    };
}
elements!(f32 = F32, u8 = U8, i32 = I32, i64 = I64, f16 = F16, bf16 = BF16);

/// Element type and dimensions, of a value or as far as a model declares them.
#[derive(Debug, Clone)]
pub(crate) struct TypeShape {
    pub element: ElementType,
    /// -1 where a model leaves a dimension open.
    pub dims: Vec<i64>,
}

/// Reads a type and shape description.
///
/// # Safety
/// `info` points to a live `OrtTensorTypeAndShapeInfo`.
unsafe fn read_type_shape(
    info: *const sys::OrtTensorTypeAndShapeInfo,
) -> Result<TypeShape, OpError> {
    let api = ort::api();
    let mut element = 0_i32;
    // SAFETY: `info` is live; the enumeration is an int in C and is received as one, because a newer
    // runtime may know types that the Rust enumeration does not.
    let status = unsafe { (api.GetTensorElementType)(info, (&raw mut element).cast()) };
    check("GetTensorElementType", status)?;
    let mut rank = 0;
    // SAFETY: `info` is live and `rank` is writable.
    check("GetDimensionsCount", unsafe { (api.GetDimensionsCount)(info, &mut rank) })?;
    if rank > MAX_RANK {
        return Err(OpError::Rank { rank, most: MAX_RANK });
    }
    let mut dims = vec![0_i64; rank];
    // SAFETY: `dims` has room for `rank` values.
    check("GetDimensions", unsafe { (api.GetDimensions)(info, dims.as_mut_ptr(), rank) })?;
    Ok(TypeShape { element: ElementType(element), dims })
}

/// A tensor owned by ONNX Runtime, readable for `'a`. Where its elements lie, in host or in device
/// memory, is up to who asks for them.
#[derive(Debug)]
pub(crate) struct TensorView<'a> {
    shape: TypeShape,
    value: *const sys::OrtValue,
    data: *const c_void,
    lifetime: PhantomData<&'a ()>,
}

impl<'a> TensorView<'a> {
    /// # Safety
    /// `value` points to an `OrtValue` that lives and is not written for `'a`.
    unsafe fn new(value: *const sys::OrtValue) -> Result<Self, OpError> {
        let api = ort::api();
        let mut is_tensor = 0;
        // SAFETY: `value` is live.
        check("IsTensor", unsafe { (api.IsTensor)(value, &mut is_tensor) })?;
        if is_tensor == 0 {
            return Err(OpError::NotTensor);
        }
        let mut info = ptr::null_mut();
        // SAFETY: `value` is live; the description is released below.
        let status = unsafe { (api.GetTensorTypeAndShape)(value, &mut info) };
        check("GetTensorTypeAndShape", status)?;
        // SAFETY: `info` was just made and is released once.
        let shape = unsafe {
            let shape = read_type_shape(info);
            (api.ReleaseTensorTypeAndShapeInfo)(info);
            shape?
        };
        let mut data = ptr::null_mut();
        // SAFETY: `value` is a live tensor; the pointer is only read from.
        let status = unsafe { (api.GetTensorMutableData)(value.cast_mut(), &mut data) };
        check("GetTensorMutableData", status)?;
        Ok(Self { shape, value, data, lifetime: PhantomData })
    }

    pub(crate) fn element(&self) -> ElementType {
        self.shape.element
    }

    pub(crate) fn dims(&self) -> &[i64] {
        &self.shape.dims
    }

    /// The elements, in host memory: for kernels of the CPU provider only. Copied only where the data
    /// is not aligned for `T`, as data mapped from an external file may be.
    pub(crate) fn values<T: Element>(&self) -> Result<Cow<'a, [T]>, OpError> {
        if self.shape.element != T::TYPE {
            return Err(OpError::ElementType { found: self.shape.element, expected: T::TYPE });
        }
        let len = elements(&self.shape.dims)?;
        if len == 0 {
            return Ok(Cow::Borrowed(&[]));
        }
        if self.data.is_null() {
            return Err(OpError::NoData);
        }
        let data = self.data.cast::<T>();
        if data.is_aligned() {
            // SAFETY: a tensor of this type and shape holds `len` elements, aligned, alive for 'a.
            return Ok(Cow::Borrowed(unsafe { std::slice::from_raw_parts(data, len) }));
        }
        // SAFETY: as above, and the reads ask for no alignment.
        Ok(Cow::Owned((0..len).map(|i| unsafe { data.add(i).read_unaligned() }).collect()))
    }
}

/// The number of elements of a shape.
pub(crate) fn elements(dims: &[i64]) -> Result<usize, OpError> {
    dims.iter()
        .try_fold(1_usize, |count, &dim| count.checked_mul(usize::try_from(dim).ok()?))
        .filter(|&count| count <= isize::MAX as usize / 8)
        .ok_or_else(|| OpError::Dimensions(dims.to_vec()))
}

/// Input `index` of a running kernel, `None` when the node leaves it out.
pub(crate) fn input(ctx: &ComputeContext, index: usize) -> Result<Option<TensorView<'_>>, OpError> {
    let mut value = ptr::null();
    // SAFETY: the context lives for the call; an index past the end answers null.
    let status = unsafe { (ort::api().KernelContext_GetInput)(ctx.ptr(), index, &mut value) };
    check("KernelContext_GetInput", status)?;
    if value.is_null() {
        return Ok(None);
    }
    // SAFETY: inputs live and stay unwritten until compute returns.
    unsafe { TensorView::new(value) }.map(Some)
}

/// Allocates output `index`, `None` when the node leaves it out.
fn output_view<'a>(
    ctx: &'a ComputeContext,
    index: usize,
    element: ElementType,
    dims: &[i64],
) -> Result<Option<TensorView<'a>>, OpError> {
    elements(dims)?;
    let mut value = ptr::null_mut();
    // SAFETY: the context lives for the call; `dims` is readable.
    let status = unsafe {
        let ctx = ctx.ptr().cast_mut();
        let call = ort::api().KernelContext_GetOutput;
        call(ctx, index, dims.as_ptr(), dims.len(), &mut value)
    };
    check("KernelContext_GetOutput", status)?;
    if value.is_null() {
        return Ok(None);
    }
    // SAFETY: the output lives until compute returns.
    let view = unsafe { TensorView::new(value)? };
    if view.element() != element || view.dims() != dims {
        return Err(OpError::Output { index });
    }
    Ok(Some(view))
}

/// Allocates output `index` in host memory and returns its elements, `None` when the node leaves it
/// out. The contents are whatever ONNX Runtime's allocator left there.
#[allow(clippy::mut_from_ref)] // The context hands out memory that it does not look at itself.
pub(crate) fn output<'a, T: Element>(
    ctx: &'a ComputeContext,
    index: usize,
    dims: &[i64],
) -> Result<Option<&'a mut [T]>, OpError> {
    let Some(view) = output_view(ctx, index, T::TYPE, dims)? else { return Ok(None) };
    let len = elements(dims)?;
    if len == 0 {
        return Ok(Some(&mut []));
    }
    let data = view.data.cast_mut().cast::<T>();
    if data.is_null() || !data.is_aligned() {
        return Err(OpError::Output { index });
    }
    // SAFETY: ONNX Runtime allocated `len` elements of T for this output alone; callers ask for each
    // output once. Numbers have no invalid bit patterns.
    Ok(Some(unsafe { std::slice::from_raw_parts_mut(data, len) }))
}
