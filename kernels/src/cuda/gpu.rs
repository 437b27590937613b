//! A device: its context, its compiled kernels, and streams on it.
#![allow(unsafe_code)]

use std::{
    collections::HashMap,
    ffi::{CString, c_int, c_void},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use cudarc::driver::{result, sys};

use super::{
    CudaError,
    cache::Store,
    driver::{self, check},
    launch::Function,
    units::{Arch, Unit},
};

/// Lowest compute capability that the kernels are written for: bfloat16 and `cp.async`.
const LOWEST: (u32, u32) = (8, 0);

/// One CUDA device, set up for this process. Made on first use and kept until the process ends.
///
/// It uses the device's primary context, which CUDA's runtime, and so ONNX Runtime and PyTorch,
/// use too. Numbers are CUDA's for this process: `CUDA_VISIBLE_DEVICES` is applied before.
#[derive(Debug)]
pub struct Gpu {
    ordinal: u32,
    context: Context,
    attributes: Attributes,
    modules: Mutex<HashMap<Unit, Arc<Mutex<Option<Module>>>>>,
}

/// What a device is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attributes {
    /// Its name, for example `NVIDIA H100 80GB HBM3`.
    pub name: String,
    /// Compute capability, major and minor.
    pub capability: (u32, u32),
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Shared memory that one block may have when it asks for it, in bytes.
    pub shared_per_block: u32,
    /// Shared memory of one multiprocessor, in bytes.
    pub shared_per_multiprocessor: u32,
    /// Second-level cache, in bytes.
    pub l2_bytes: u32,
    /// Memory, in bytes.
    pub memory_bytes: u64,
}

/// A `CUcontext`; valid until the process ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Context(sys::CUcontext);

// SAFETY: contexts may be used from every thread.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

/// A loaded module; never unloaded.
#[derive(Debug)]
struct Module {
    module: sys::CUmodule,
    functions: HashMap<String, Function>,
}

// SAFETY: modules may be used from every thread.
unsafe impl Send for Module {}

impl Gpu {
    /// The device with this number.
    ///
    /// # Errors
    /// No driver, no such device, or one that is too old. A failure is not remembered.
    pub fn get(ordinal: u32) -> Result<&'static Self, CudaError> {
        static GPUS: Mutex<Vec<&'static Gpu>> = Mutex::new(Vec::new());
        let mut gpus = lock(&GPUS);
        if let Some(gpu) = gpus.iter().find(|gpu| gpu.ordinal == ordinal) {
            return Ok(gpu);
        }
        let gpu: &'static Self = Box::leak(Box::new(Self::open(ordinal)?));
        gpus.push(gpu);
        Ok(gpu)
    }

    /// How many devices this process sees; 0 without a driver is an error, not a number.
    ///
    /// # Errors
    /// No driver, or none that works.
    pub fn count() -> Result<u32, CudaError> {
        driver::init()?;
        let count = result::device::get_count().map_err(|e| CudaError::Call {
            call: "cuDeviceGetCount",
            reason: driver::error_name(e.0),
        })?;
        Ok(u32::try_from(count).unwrap_or(0))
    }

    fn open(ordinal: u32) -> Result<Self, CudaError> {
        let count = Self::count()?;
        let fail = |reason: String| CudaError::Device { ordinal, reason };
        if ordinal >= count {
            return Err(fail(format!("this process sees {count} CUDA devices")));
        }
        let failed = |what: &str| {
            let what = what.to_string();
            move |e: result::DriverError| fail(format!("{what}: {}", driver::error_name(e.0)))
        };
        let device = result::device::get(ordinal as c_int).map_err(failed("cuDeviceGet"))?;
        let attributes = Attributes::of(device).map_err(failed("its attributes"))?;
        if attributes.capability < LOWEST {
            let ((major, minor), (a, b)) = (attributes.capability, LOWEST);
            return Err(fail(format!(
                "{} has compute capability {major}.{minor}; the kernels need {a}.{b}",
                attributes.name
            )));
        }
        // SAFETY: `device` is a device; the context is never released.
        let context =
            unsafe { result::primary_ctx::retain(device) }.map_err(failed("its context"))?;
        Ok(Self { ordinal, context: Context(context), attributes, modules: Mutex::default() })
    }

    /// Its number.
    pub fn ordinal(&self) -> u32 {
        self.ordinal
    }

    /// What it is.
    pub fn attributes(&self) -> &Attributes {
        &self.attributes
    }

    /// The architecture that kernels are compiled for.
    pub fn arch(&self) -> Arch {
        let (major, minor) = self.attributes.capability;
        Arch::of_device(major, minor)
    }

    /// Its primary context, a `CUcontext`.
    pub fn context(&self) -> *mut c_void {
        self.context.0.cast()
    }

    /// Makes the device the calling thread's current one, as `cudaSetDevice` does.
    ///
    /// # Errors
    /// A context that an earlier fault has broken.
    pub fn bind(&self) -> Result<(), CudaError> {
        // SAFETY: the context lives until the process ends.
        check("cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(self.context.0) })
    }

    /// Runs `work` with the device current, and leaves the thread's current device as it was.
    ///
    /// # Errors
    /// What `work` returns, or a context that an earlier fault has broken.
    pub fn with_current<T>(
        &self,
        work: impl FnOnce() -> Result<T, CudaError>,
    ) -> Result<T, CudaError> {
        let mut current = std::ptr::null_mut();
        // SAFETY: stores a context or null.
        check("cuCtxGetCurrent", unsafe { sys::cuCtxGetCurrent(&mut current) })?;
        if current == self.context.0 {
            return work();
        }
        /// Pops on every way out, a panic included.
        struct Pop;
        impl Drop for Pop {
            fn drop(&mut self) {
                let mut popped = std::ptr::null_mut();
                // SAFETY: the context pushed below is on top.
                let _ = unsafe { sys::cuCtxPopCurrent_v2(&mut popped) };
            }
        }
        // SAFETY: the context lives until the process ends.
        check("cuCtxPushCurrent", unsafe { sys::cuCtxPushCurrent_v2(self.context.0) })?;
        let _pop = Pop;
        work()
    }

    /// Whether work on `stream` goes into a graph that is being captured.
    ///
    /// # Safety
    /// `stream` is a stream of this device.
    ///
    /// # Errors
    /// What the driver says, for the default stream also that another one is being captured.
    pub unsafe fn is_capturing(&self, stream: Stream) -> Result<bool, CudaError> {
        self.with_current(|| {
            let mut status = sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
            // SAFETY: as the caller promises; the status is written.
            let code = unsafe { sys::cuStreamIsCapturing(stream.0.cast(), &mut status) };
            check("cuStreamIsCapturing", code)?;
            Ok(status != sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE)
        })
    }

    /// Enqueues zeros into `words` 32-bit words.
    ///
    /// # Safety
    /// `to` is device memory of at least that length, valid until the stream has run the work.
    ///
    /// # Errors
    /// What CUDA refuses.
    pub(super) unsafe fn clear(
        &self,
        stream: Stream,
        to: super::DevicePtr,
        words: usize,
    ) -> Result<(), CudaError> {
        self.with_current(|| {
            // SAFETY: as the caller promises.
            let code = unsafe { sys::cuMemsetD32Async(to, 0, words, stream.0.cast()) };
            check("cuMemsetD32Async", code)
        })
    }

    /// A kernel of a unit. The first call for a unit finds or compiles its machine code and loads
    /// it, which takes up to seconds and must not happen while a stream is being captured; later
    /// ones look it up.
    ///
    /// # Errors
    /// No way to compile, a source that does not compile, code that the driver refuses, or no
    /// kernel of that name.
    pub fn function(&'static self, unit: Unit, name: &str) -> Result<Function, CudaError> {
        let slot = Arc::clone(lock(&self.modules).entry(unit).or_default());
        // Held while compiling: others who want this unit wait for it, other units go on.
        let mut slot = lock(&slot);
        if let Some(function) = slot.as_ref().and_then(|module| module.functions.get(name)) {
            return Ok(*function);
        }
        self.with_current(|| {
            let module = match slot.take() {
                Some(module) => slot.insert(module),
                None => slot.insert(self.load(&unit)?),
            };
            let function = Function::of(self, module.module, &unit, name)?;
            module.functions.insert(name.to_string(), function);
            Ok(function)
        })
    }

    fn load(&self, unit: &Unit) -> Result<Module, CudaError> {
        let cubin = Store::from_env().cubin(unit, self.arch())?;
        let mut module = std::ptr::null_mut();
        // SAFETY: a whole cubin, whose length its ELF header tells; the driver copies it.
        let code = unsafe { sys::cuModuleLoadData(&mut module, cubin.as_ptr().cast()) };
        if code != sys::CUresult::CUDA_SUCCESS {
            return Err(CudaError::Device {
                ordinal: self.ordinal,
                reason: format!(
                    "the driver refuses {} for {}: {}; is it older than the NVRTC that compiled \
                     this?",
                    unit.stem(),
                    self.arch(),
                    driver::error_name(code)
                ),
            });
        }
        Ok(Module { module, functions: HashMap::new() })
    }
}

impl Attributes {
    fn of(device: sys::CUdevice) -> Result<Self, result::DriverError> {
        use sys::CUdevice_attribute as A;
        let get = |attribute| {
            // SAFETY: `device` is a device.
            let value = unsafe { result::device::get_attribute(device, attribute) }?;
            Ok(u32::try_from(value).unwrap_or(0))
        };
        Ok(Self {
            name: result::device::get_name(device)?,
            capability: (
                get(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                get(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            ),
            multiprocessors: get(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            shared_per_block: get(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
            shared_per_multiprocessor: get(
                A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR,
            )?,
            l2_bytes: get(A::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?,
            // SAFETY: `device` is a device.
            memory_bytes: unsafe { result::device::total_mem(device) }? as u64,
        })
    }
}

/// A stream of the device that work is enqueued on; a `cudaStream_t` or `CUstream`, not owned.
#[derive(Debug, Clone, Copy)]
pub struct Stream(pub *mut c_void);

/// Names of kernels in errors live as long as the process; there are few.
pub(super) fn leak(name: String) -> &'static str {
    Box::leak(name.into_boxed_str())
}

pub(super) fn c_name(name: &str) -> Result<CString, CudaError> {
    CString::new(name).map_err(|_| CudaError::Unsupported(format!("kernel name {name:?}")))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
