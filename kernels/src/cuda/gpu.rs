//! A device: its context, its compiled kernels, and streams on it.

use std::ffi::c_void;

use super::CudaError;

/// One CUDA device, set up for this process. Made on first use and kept until the process ends.
#[derive(Debug)]
pub struct Gpu {
    ordinal: u32,
}

impl Gpu {
    /// The device with this ordinal.
    ///
    /// # Errors
    /// No driver, no such device, or no way to compile kernels for it.
    pub fn get(ordinal: u32) -> Result<&'static Self, CudaError> {
        Err(CudaError::Device { ordinal, reason: "not built yet".into() })
    }

    /// Its number.
    pub fn ordinal(&self) -> u32 {
        self.ordinal
    }
}

/// A stream of the device that work is enqueued on; a `cudaStream_t` or `CUstream`, not owned.
#[derive(Debug, Clone, Copy)]
pub struct Stream(pub *mut c_void);
