//! The CUDA driver: whether it is there, and its errors by name.
#![allow(unsafe_code)]

use std::{
    ffi::CStr,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::OnceLock,
};

use cudarc::driver::sys;

use super::CudaError;

/// Functions that this crate calls and that drivers older than CUDA 12 lack, or may.
/// cudarc panics on a missing one, so their presence is checked once.
const NEEDED: [&CStr; 13] = [
    c"cuInit",
    c"cuCtxPushCurrent_v2",
    c"cuCtxPopCurrent_v2",
    c"cuCtxGetCurrent",
    c"cuCtxSetCurrent",
    c"cuDevicePrimaryCtxRetain",
    c"cuModuleLoadData",
    c"cuModuleGetFunction",
    c"cuFuncSetAttribute",
    c"cuFuncGetAttribute",
    c"cuOccupancyMaxActiveBlocksPerMultiprocessor",
    c"cuLaunchKernelEx",
    c"cuStreamIsCapturing",
];

/// Loads and initialises the driver.
pub(super) fn init() -> Result<(), CudaError> {
    // Only success is kept: a driver may appear later (a module loaded, a container's mount).
    static READY: OnceLock<()> = OnceLock::new();
    if READY.get().is_some() {
        return Ok(());
    }
    let missing =
        |reason: String| CudaError::Library { library: "libcuda (the NVIDIA driver)", reason };
    catch_unwind(AssertUnwindSafe(|| {
        // SAFETY: loading libcuda runs its initialisers, as every CUDA program does.
        if !unsafe { sys::is_culib_present() } {
            return Err(missing(
                "not found on this machine; install the NVIDIA driver, or in a container pass the \
                 GPUs on"
                    .into(),
            ));
        }
        for symbol in NEEDED {
            if !has_symbol(symbol) {
                return Err(missing(format!(
                    "it has no {}: a driver of CUDA 12 or newer is needed",
                    symbol.to_string_lossy()
                )));
            }
        }
        // SAFETY: no precondition.
        let code = unsafe { sys::cuInit(0) };
        if code == sys::CUresult::CUDA_SUCCESS {
            return Ok(());
        }
        Err(missing(format!("cuInit returned {}", error_name(code))))
    }))
    .unwrap_or_else(|_| Err(missing("loading it panicked".into())))?;
    let _ = READY.set(());
    Ok(())
}

/// Whether the loaded driver exports a function. Only after the library is known to be present.
pub(super) fn has_symbol(name: &CStr) -> bool {
    // SAFETY: the library is present; the symbol's address is looked up, never called.
    unsafe { sys::culib().get::<*const ()>(name.to_bytes_with_nul()).is_ok() }
}

/// Turns a result code into an error naming the call.
pub(super) fn check(call: &'static str, code: sys::CUresult) -> Result<(), CudaError> {
    if code == sys::CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    Err(CudaError::Call { call, reason: error_name(code) })
}

/// `CUDA_ERROR_…` and its sentence, as the driver spells them.
pub(super) fn error_name(code: sys::CUresult) -> String {
    let mut name = std::ptr::null();
    let mut text = std::ptr::null();
    // SAFETY: the driver stores pointers to static strings, or leaves null for unknown codes.
    unsafe {
        let _ = sys::cuGetErrorName(code, &mut name);
        let _ = sys::cuGetErrorString(code, &mut text);
        let read = |p: *const std::ffi::c_char| {
            (!p.is_null()).then(|| CStr::from_ptr(p).to_string_lossy().into_owned())
        };
        match (read(name), read(text)) {
            (Some(name), Some(text)) => format!("{name} ({text})"),
            (Some(name), None) => name,
            _ => format!("error {}", code as u32),
        }
    }
}
