//! ONNX Runtime 1.22 and 1.23: operators without shape inference, where it would crash.
//!
//! Those two describe every input of a node before they call an operator's shape inference, and
//! follow a null pointer where the node leaves out an input before its last, as an unscaled
//! `MxMatMul` with a bias does. No operator can prevent that but one without the function
//! (`OrtCustomOp::InferOutputShapeFn`): types are then inferred from what is registered, shapes are
//! left open and checked in creation and in compute, as ever.
//!
//! `ort` always sets the function, so the table of the API that it calls gets another
//! `CustomOpDomain_Add`: it adds [`Shapeless`] in place of the operators concerned.
#![allow(unsafe_code)]

use std::{
    ffi::{CStr, c_int, c_void},
    path::Path,
    sync::OnceLock,
};

use ort::sys;

use crate::contract::op;

/// The oldest ONNX Runtime, 1.x, with the API that this library calls.
pub(crate) const OLDEST_MINOR: u32 = 22;
/// The first ONNX Runtime, 1.x, whose shape inference knows absent inputs.
const FIRST_GOOD_MINOR: u32 = 24;
/// The operators with an input that may be absent before their last.
const CONCERNED: [&str; 1] = [op::MX_MATMUL];

type Add = unsafe extern "system" fn(
    *mut sys::OrtCustomOpDomain,
    *const sys::OrtCustomOp,
) -> sys::OrtStatusPtr;

/// The runtime's own `CustomOpDomain_Add`. One a process, as `ort`'s table is.
static ADD: OnceLock<Add> = OnceLock::new();

/// The minor number of a version like `1.31.1`.
pub(crate) fn minor(version: &str) -> Option<u32> {
    version.strip_prefix("1.")?.split('.').next()?.parse().ok()
}

/// Whether a runtime of this version crashes in shape inference.
pub(crate) fn needs_care(version: &str) -> bool {
    minor(version).is_some_and(|minor| minor < FIRST_GOOD_MINOR)
}

/// The table `api` of a runtime that [`needs_care`].
pub(crate) fn careful(mut api: sys::OrtApi) -> sys::OrtApi {
    ADD.get_or_init(|| api.CustomOpDomain_Add);
    api.CustomOpDomain_Add = add;
    api.SessionOptionsSetEpSelectionPolicy = set_no_policy;
    api
}

/// `ort` asks for an automatic choice of providers in all session options. ONNX Runtime 1.22 aborts over
/// it where it knows no device, as on Linux, so it is not told: what a program names is what it gets.
unsafe extern "system" fn set_no_policy(
    _: *mut sys::OrtSessionOptions,
    _: sys::OrtExecutionProviderDevicePolicy,
) -> sys::OrtStatusPtr {
    sys::OrtStatusPtr(std::ptr::null_mut())
}

/// Makes ONNX Runtime 1.22 and 1.23 safe for a Rust program that links this crate: call it after
/// `ort::init_from(library)` and before anything else of `ort`. Later versions need nothing, and
/// nothing is done for them; who loads `libmx_custom_ops.so` does not need it either.
///
/// # Errors
/// `library` is not an ONNX Runtime, or `ort` is bound already, by an earlier call to it.
pub fn bind(library: &Path) -> Result<(), String> {
    let failed = |reason: &str| format!("{}: {reason}", library.display());
    // SAFETY: loading ONNX Runtime runs its initialisers, which ask for nothing; `ort` has loaded the
    // same file already, so this only counts a use.
    let loaded =
        unsafe { libloading::Library::new(library) }.map_err(|e| failed(&e.to_string()))?;
    // SAFETY: that is the symbol's type in every ONNX Runtime.
    let base = unsafe {
        let get = loaded.get::<unsafe extern "C" fn() -> *const sys::OrtApiBase>("OrtGetApiBase");
        get.map_err(|e| failed(&e.to_string()))?()
    };
    // The table below is the library's: never closed.
    std::mem::forget(loaded);
    if base.is_null() {
        return Err(failed("OrtGetApiBase answers null"));
    }
    // SAFETY: `base` is ONNX Runtime's and its version a static C string.
    let version = unsafe { CStr::from_ptr(((*base).GetVersionString)()) }.to_string_lossy();
    if !needs_care(&version) {
        return Ok(());
    }
    // SAFETY: as above.
    let api = unsafe { ((*base).GetApi)(sys::ORT_API_VERSION) };
    if api.is_null() {
        return Err(failed(&format!("version {version} is older than 1.{OLDEST_MINOR}")));
    }
    // `careful` notes the runtime's own function, so whether an earlier call did is asked before.
    let before = ADD.get().is_some();
    // SAFETY: `api` is a complete table of the version that was asked for.
    if !ort::set_api(careful(unsafe { (*api).clone() })) && !before {
        return Err(failed("bound already: bind it before any other call of ort"));
    }
    Ok(())
}

/// An operator without shape inference; all else it hands to the one it stands for.
#[repr(C)]
struct Shapeless {
    /// First, so that a pointer to this is one to an operator.
    table: sys::OrtCustomOp,
    inner: *const sys::OrtCustomOp,
}

unsafe extern "system" fn add(
    domain: *mut sys::OrtCustomOpDomain,
    operator: *const sys::OrtCustomOp,
) -> sys::OrtStatusPtr {
    let Some(add) = ADD.get() else {
        // Not reached: `careful` fills it in before it hands out this function.
        return sys::OrtStatusPtr(std::ptr::null_mut());
    };
    // SAFETY: `operator` is a live operator, which outlives the domain.
    unsafe {
        let concerned = match (*operator).GetName {
            Some(name) => CStr::from_ptr(name(operator)).to_str(),
            None => Ok(""),
        };
        if concerned.is_ok_and(|name| CONCERNED.contains(&name)) {
            // Kept for good: a domain does not say when it goes. A hundred bytes an operator.
            let shapeless = Box::leak(Box::new(Shapeless::new(operator)));
            return add(domain, (&raw const *shapeless).cast());
        }
        add(domain, operator)
    }
}

impl Shapeless {
    /// # Safety
    /// `inner` is live.
    unsafe fn new(inner: *const sys::OrtCustomOp) -> Self {
        // SAFETY: `inner` is live. Functions that are not given an operator stay as they are.
        let own = unsafe { *inner };
        let table = sys::OrtCustomOp {
            CreateKernel: None,
            CreateKernelV2: Some(create_kernel),
            GetName: Some(get_name),
            GetExecutionProviderType: Some(get_provider),
            GetInputType: Some(get_input_type),
            GetInputTypeCount: Some(get_input_count),
            GetOutputType: Some(get_output_type),
            GetOutputTypeCount: Some(get_output_count),
            GetInputCharacteristic: Some(get_input_characteristic),
            GetOutputCharacteristic: Some(get_output_characteristic),
            GetInputMemoryType: Some(get_input_memory_type),
            GetVariadicInputMinArity: Some(get_variadic_input_arity),
            GetVariadicInputHomogeneity: Some(get_variadic_input_homogeneity),
            GetVariadicOutputMinArity: Some(get_variadic_output_arity),
            GetVariadicOutputHomogeneity: Some(get_variadic_output_homogeneity),
            InferOutputShapeFn: None,
            GetStartVersion: Some(get_start_version),
            GetEndVersion: Some(get_end_version),
            ..own
        };
        Self { table, inner }
    }
}

/// Functions that ask the operator behind a [`Shapeless`]. `ort` fills in every field of an operator's
/// table; the value after `else` is for the type only.
macro_rules! forward {
    ($($name:ident = $field:ident($($arg:ident: $type:ty),*) -> $answer:ty, else $none:expr;)*) => {
        $(unsafe extern "system" fn $name(
            operator: *const sys::OrtCustomOp $(, $arg: $type)*
        ) -> $answer {
            // SAFETY: ONNX Runtime passes the pointer that it was given, which is to a `Shapeless` that
            // lives for good; the operator behind it lives as long as the domain.
            unsafe {
                let inner = (*operator.cast::<Shapeless>()).inner;
                match (*inner).$field {
                    Some(call) => call(inner $(, $arg)*),
                    None => $none,
                }
            }
        })*
    };
}

forward! {
    create_kernel = CreateKernelV2(
        api: *const sys::OrtApi, info: *const sys::OrtKernelInfo, kernel: *mut *mut c_void
    ) -> sys::OrtStatusPtr, else sys::OrtStatusPtr(std::ptr::null_mut());
    get_name = GetName() -> *const std::ffi::c_char, else c"".as_ptr();
    get_provider = GetExecutionProviderType() -> *const std::ffi::c_char, else std::ptr::null();
    get_input_type = GetInputType(index: usize) -> sys::ONNXTensorElementDataType,
        else sys::ONNXTensorElementDataType::ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    get_input_count = GetInputTypeCount() -> usize, else 0;
    get_output_type = GetOutputType(index: usize) -> sys::ONNXTensorElementDataType,
        else sys::ONNXTensorElementDataType::ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    get_output_count = GetOutputTypeCount() -> usize, else 0;
    get_input_characteristic = GetInputCharacteristic(index: usize)
        -> sys::OrtCustomOpInputOutputCharacteristic,
        else sys::OrtCustomOpInputOutputCharacteristic::INPUT_OUTPUT_REQUIRED;
    get_output_characteristic = GetOutputCharacteristic(index: usize)
        -> sys::OrtCustomOpInputOutputCharacteristic,
        else sys::OrtCustomOpInputOutputCharacteristic::INPUT_OUTPUT_REQUIRED;
    get_input_memory_type = GetInputMemoryType(index: usize) -> sys::OrtMemType,
        else sys::OrtMemType::OrtMemTypeDefault;
    get_variadic_input_arity = GetVariadicInputMinArity() -> c_int, else 1;
    get_variadic_input_homogeneity = GetVariadicInputHomogeneity() -> c_int, else 0;
    get_variadic_output_arity = GetVariadicOutputMinArity() -> c_int, else 1;
    get_variadic_output_homogeneity = GetVariadicOutputHomogeneity() -> c_int, else 0;
    get_start_version = GetStartVersion() -> c_int, else 1;
    get_end_version = GetEndVersion() -> c_int, else c_int::MAX;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_as_far_as_they_look_like_one() {
        assert_eq!(minor("1.31.1"), Some(31));
        assert_eq!(minor("1.24.0-dev+build"), Some(24));
        assert_eq!((minor("2.0.0"), minor(""), minor("1.x")), (None, None, None));
        assert!(needs_care("1.22.0") && needs_care("1.23.2"));
        assert!(!needs_care("1.24.0") && !needs_care("1.31.1") && !needs_care("2.0.0"));
    }

    #[test]
    fn a_file_that_is_no_runtime_is_an_error() {
        let error = bind(Path::new("/nowhere/libonnxruntime.so")).unwrap_err();
        assert!(error.contains("/nowhere"), "{error}");
    }
}
