//! The entry point that ONNX Runtime looks up in a custom-op library.
#![allow(unsafe_code)]

use std::{
    ffi::{CStr, CString},
    panic::catch_unwind,
    sync::{Mutex, PoisonError},
};

use ort::{AsPointer, sys};

use crate::{
    guard::{panic_message, printable},
    older::{self, OLDEST_MINOR},
};

/// Session configuration entry of options that have the operators.
const REGISTERED: &CStr = c"mx.registered";

/// The runtime that this library is bound to and the domain made for it, as addresses.
static BOUND: Mutex<Option<Bound>> = Mutex::new(None);

#[derive(Clone, Copy)]
struct Bound {
    api: usize,
    domain: usize,
}

/// Adds the operators of domain `mx` to `options`; called by `register_custom_ops_library`.
///
/// Needs ONNX Runtime 1.22 or newer. The operators are made once and live as long as the process,
/// so any number of session options and sessions may use them, also after the options are gone.
/// ONNX Runtime refuses to create a session from options that have the domain twice, hence options
/// that have it already, from this library or another copy of it that leaves the mark, stay as they are.
///
/// # Safety
/// `options` and `api_base` are what ONNX Runtime passes: live, or null.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn RegisterCustomOps(
    options: *mut sys::OrtSessionOptions,
    api_base: *const sys::OrtApiBase,
) -> sys::OrtStatusPtr {
    let success = sys::OrtStatusPtr(std::ptr::null_mut());
    if api_base.is_null() {
        // Nobody to make a status with, and no runtime to fail in.
        return success;
    }
    // SAFETY: `api_base` is not null and ONNX Runtime's by contract.
    let outcome = catch_unwind(|| unsafe { register(options, api_base) })
        .unwrap_or_else(|cause| Err(format!("internal error: {}", panic_message(&*cause))));
    match outcome {
        Ok(()) => success,
        // SAFETY: as above.
        Err(message) => unsafe { failure(api_base, &message) },
    }
}

/// Makes a status through version 1 of the API, which every ONNX Runtime has.
///
/// # Safety
/// `api_base` is ONNX Runtime's.
unsafe fn failure(api_base: *const sys::OrtApiBase, message: &str) -> sys::OrtStatusPtr {
    let message = CString::new(format!("mx custom ops: {}", printable(message)))
        .unwrap_or_else(|_| c"mx custom ops: registration failed".to_owned());
    // SAFETY: version 1 begins with CreateStatus; only that field is read. The message is a C string
    // that ONNX Runtime copies.
    unsafe {
        let api = ((*api_base).GetApi)(1);
        if api.is_null() {
            return sys::OrtStatusPtr(std::ptr::null_mut());
        }
        let create = (&raw const (*api).CreateStatus).read();
        create(sys::OrtErrorCode::ORT_FAIL, message.as_ptr())
    }
}

/// # Safety
/// `api_base` is ONNX Runtime's; `options` is live or null.
unsafe fn register(
    options: *mut sys::OrtSessionOptions,
    api_base: *const sys::OrtApiBase,
) -> Result<(), String> {
    if options.is_null() {
        return Err("no session options given".to_owned());
    }
    // SAFETY: `api_base` is ONNX Runtime's and its version a static C string.
    let version = unsafe { CStr::from_ptr(((*api_base).GetVersionString)()) }.to_string_lossy();
    // SAFETY: `api_base` is ONNX Runtime's.
    let api = unsafe { ((*api_base).GetApi)(sys::ORT_API_VERSION) };
    if api.is_null() {
        return Err(format!("needs ONNX Runtime 1.{OLDEST_MINOR} or newer, this is {version}"));
    }
    // SAFETY: `api` is a complete table of the version that was asked for and is never freed.
    let domain = unsafe { bound_domain(api, &version)? };
    let checked = |status| {
        // SAFETY: every status below is a call's result, and handed on once.
        let result = unsafe { ort::Error::result_from_status(status) };
        result.map_err(|error| error.message().to_owned())
    };
    // SAFETY: options and domain are live, the domain is never released, texts are C strings that are
    // copied.
    unsafe {
        let mut present = 0;
        checked(((*api).HasSessionConfigEntry)(options, REGISTERED.as_ptr(), &mut present))?;
        if present != 0 {
            return Ok(());
        }
        checked(((*api).AddCustomOpDomain)(options, domain as *mut sys::OrtCustomOpDomain))?;
        checked(((*api).AddSessionConfigEntry)(options, REGISTERED.as_ptr(), c"1".as_ptr()))
    }
}

/// The domain for `api`, made on first use.
///
/// # Safety
/// `api` is a complete table of version `ORT_API_VERSION`.
unsafe fn bound_domain(api: *const sys::OrtApi, version: &str) -> Result<usize, String> {
    let mut bound = BOUND.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(bound) = *bound {
        if bound.api == api as usize {
            return Ok(bound.domain);
        }
        return Err("already in use with another copy of ONNX Runtime in this process; \
                    load one onnxruntime only"
            .to_owned());
    }
    // `false` means that an earlier, failed registration already set it; to the same table, since a
    // process that got here with another one would have been turned away above.
    // SAFETY: `api` is a complete table of this version.
    let table = unsafe { (*api).clone() };
    let _ = ort::set_api(if older::needs_care(version) { older::careful(table) } else { table });
    let domain = crate::operator_domain().map_err(|error| error.message().to_owned())?;
    let address = domain.ptr() as usize;
    std::mem::forget(domain);
    *bound = Some(Bound { api: api as usize, domain: address });
    Ok(address)
}

#[cfg(test)]
mod tests {
    use std::{cell::RefCell, ffi::c_char, mem::MaybeUninit, ptr};

    use super::*;

    thread_local! {
        static MESSAGE: RefCell<String> = const { RefCell::new(String::new()) };
    }

    extern "system" fn create_status(
        _: sys::OrtErrorCode,
        message: *const c_char,
    ) -> sys::OrtStatusPtr {
        // SAFETY: the caller passes a C string.
        let text = unsafe { CStr::from_ptr(message) }.to_string_lossy().into_owned();
        MESSAGE.with_borrow_mut(|message| *message = text);
        sys::OrtStatusPtr(ptr::dangling_mut())
    }

    /// A runtime of API version 21, of whose table only `CreateStatus` is filled in.
    extern "system" fn get_api(version: u32) -> *const sys::OrtApi {
        if version > 21 {
            return ptr::null();
        }
        let table = Box::leak(Box::new(MaybeUninit::<sys::OrtApi>::zeroed()));
        // SAFETY: the field lies inside the table, which is leaked.
        unsafe { (&raw mut (*table.as_mut_ptr()).CreateStatus).write(create_status) };
        table.as_ptr()
    }

    extern "system" fn version() -> *const c_char {
        c"1.21.9".as_ptr()
    }

    #[test]
    fn a_runtime_that_is_too_old_gets_a_status_and_no_crash() {
        let base = sys::OrtApiBase { GetApi: get_api, GetVersionString: version };
        // SAFETY: the options are not looked at, because the runtime is refused before.
        let status = unsafe { RegisterCustomOps(ptr::dangling_mut(), &base) };
        assert!(!status.0.is_null());
        let message = MESSAGE.take();
        assert!(message.contains("1.22") && message.contains("1.21.9"), "{message}");
    }

    #[test]
    fn null_pointers_are_answered() {
        // SAFETY: null is allowed.
        assert!(unsafe { RegisterCustomOps(ptr::null_mut(), ptr::null()) }.0.is_null());
        let base = sys::OrtApiBase { GetApi: get_api, GetVersionString: version };
        // SAFETY: null options are allowed.
        let status = unsafe { RegisterCustomOps(ptr::null_mut(), &base) };
        assert!(!status.0.is_null());
        assert!(MESSAGE.take().contains("options"));
    }
}
