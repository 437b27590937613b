//! Dense products through cuBLASLt, which is looked for at run time.
#![allow(unsafe_code)]

use std::{
    collections::HashMap,
    ffi::c_void,
    panic::catch_unwind,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use cudarc::cublaslt::{result, sys};

use super::{CudaError, DevicePtr, FloatType, Gpu, Stream};

// `cublasOperation_t`, which cudarc has in another module.
const AS_STORED: u32 = 0;
const TRANSPOSED: u32 = 1;
/// 0: fp8 tensor cores keep few bits of a running sum, and cuBLASLt adds it to float32 now and then.
const FAST_ACCUMULATION: i8 = 0;
/// Alignment that operands of a plan have at least, in bytes; without being told, cuBLASLt relies on
/// 256, which slices of a tensor lack.
const ALIGNMENT: u32 = 16;

/// Scratch memory that cuBLASLt may use, in bytes.
pub const WORKSPACE: usize = 32 << 20;

/// Element type of the factors of a dense product.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Factor {
    /// bfloat16.
    Bf16,
    /// fp8 E4M3; compute capability 8.9 or newer.
    Fp8E4M3,
}

/// `d[m, n] = alpha * x[m, k] * w[n, k]^T (+ bias[n])`, all row-major, sums in fp32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct DenseProblem {
    /// Rows of x.
    pub m: usize,
    /// Rows of w.
    pub n: usize,
    /// Contraction length.
    pub k: usize,
    /// Elements from row to row of x and of w.
    pub pitch: usize,
    /// Type of x and w.
    pub factor: Factor,
    /// Type of d and of the bias.
    pub out: FloatType,
    /// Whether there is a bias.
    pub bias: bool,
    /// Whether k may be divided: faster for few rows, but the same input need not give the same bits
    /// again.
    pub split: bool,
}

/// Where the operands of a dense product lie.
#[derive(Debug, Clone, Copy)]
pub struct DenseBuffers {
    /// [m, pitch].
    pub x: DevicePtr,
    /// [n, pitch].
    pub w: DevicePtr,
    /// float32 factors of x and of w, or 0.
    pub scales: [DevicePtr; 2],
    /// `[n]` of d's type.
    pub bias: DevicePtr,
    /// [m, n].
    pub d: DevicePtr,
    /// [`WORKSPACE`] bytes, aligned to 256.
    pub workspace: DevicePtr,
}

/// A dense product that cuBLASLt has an algorithm for.
#[derive(Clone, Copy)]
pub struct Dense {
    gpu: &'static Gpu,
    problem: DenseProblem,
    handle: Handle,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

impl std::fmt::Debug for Dense {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.problem.fmt(f)
    }
}

#[derive(Clone, Copy)]
struct Handle(sys::cublasLtHandle_t);

// SAFETY: cuBLASLt handles may be used from every thread.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

#[derive(Default)]
struct Known {
    handles: HashMap<u32, Handle>,
    algorithms: HashMap<(u32, DenseProblem), Option<sys::cublasLtMatmulAlgo_t>>,
}

fn known() -> std::sync::MutexGuard<'static, Option<Known>> {
    static KNOWN: Mutex<Option<Known>> = Mutex::new(None);
    KNOWN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn check(call: &'static str, code: sys::cublasStatus_t) -> Result<(), CudaError> {
    code.result().map_err(|e| CudaError::Call { call, reason: format!("{:?}", e.0) })
}

/// Whether cuBLASLt can be loaded. A library that is there is looked for once, under a dozen names; one
/// that is not may still come.
///
/// # Errors
/// It is not found.
pub fn available() -> Result<(), CudaError> {
    static PRESENT: AtomicBool = AtomicBool::new(false);
    if PRESENT.load(Ordering::Relaxed) {
        return Ok(());
    }
    // SAFETY: loading a library of NVIDIA's runs its initialisers, as every CUDA program does.
    let present = catch_unwind(|| unsafe { sys::is_culib_present() }).unwrap_or(false);
    if present {
        PRESENT.store(true, Ordering::Relaxed);
        return Ok(());
    }
    Err(CudaError::Library {
        library: "libcublasLt",
        reason: "not found; put the folder of libcublasLt.so.13 (CUDA toolkit, or the Python \
                 package nvidia-cublas) on LD_LIBRARY_PATH"
            .into(),
    })
}

impl Known {
    /// The device's handle, made when it is first asked for.
    fn handle(&mut self, gpu: &'static Gpu) -> Result<Handle, CudaError> {
        if let Some(handle) = self.handles.get(&gpu.ordinal()) {
            return Ok(*handle);
        }
        let made = gpu.with_current(|| {
            catch_unwind(result::create_handle)
                .unwrap_or(Err(result::CublasError(
                    sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED,
                )))
                .map_err(|e| CudaError::Call {
                    call: "cublasLtCreate",
                    reason: format!("{:?}", e.0),
                })
        })?;
        Ok(*self.handles.entry(gpu.ordinal()).or_insert(Handle(made)))
    }
}

/// Sets cuBLASLt up for a device, which must not happen while a stream is being captured.
///
/// # Errors
/// No cuBLASLt, or one that refuses the device.
pub fn prepare(gpu: &'static Gpu) -> Result<(), CudaError> {
    available()?;
    known().get_or_insert_default().handle(gpu).map(drop)
}

impl Dense {
    /// An algorithm for `problem`; the search costs about a tenth of a millisecond the first time.
    ///
    /// # Errors
    /// No cuBLASLt, or a problem that it has no algorithm for.
    pub fn new(gpu: &'static Gpu, problem: DenseProblem) -> Result<Self, CudaError> {
        available()?;
        let mut known = known();
        let known = known.get_or_insert_default();
        let handle = known.handle(gpu)?;
        let algorithm = match known.algorithms.get(&(gpu.ordinal(), problem)) {
            Some(algorithm) => *algorithm,
            None => {
                let found = gpu.with_current(|| search(handle, &problem))?;
                known.algorithms.insert((gpu.ordinal(), problem), found);
                found
            }
        };
        let algorithm = algorithm.ok_or_else(|| {
            CudaError::Unsupported(format!("cuBLASLt has no algorithm for {problem:?}"))
        })?;
        Ok(Self { gpu, problem, handle, algorithm })
    }

    /// Enqueues the product on `stream`.
    ///
    /// # Safety
    /// The buffers are device memory as long as the problem says and stay valid until the stream
    /// has run the work; nothing else uses the workspace meanwhile.
    ///
    /// # Errors
    /// What cuBLASLt refuses.
    pub unsafe fn run(
        &self,
        stream: Stream,
        alpha: f32,
        b: &DenseBuffers,
    ) -> Result<(), CudaError> {
        let beta = 0.0_f32;
        self.gpu.with_current(|| {
            let described = Described::new(&self.problem)?;
            // SAFETY: descriptors are alive; pointers are as the caller promises.
            unsafe {
                if self.problem.bias {
                    described.set(
                        sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER,
                        &b.bias,
                    )?;
                }
                if b.scales != [0; 2] {
                    described.set_scales(b.scales)?;
                }
                check(
                    "cublasLtMatmul",
                    sys::cublasLtMatmul(
                        self.handle.0,
                        described.operation,
                        (&raw const alpha).cast(),
                        b.w as *const c_void,
                        described.w,
                        b.x as *const c_void,
                        described.x,
                        (&raw const beta).cast(),
                        b.d as *const c_void,
                        described.d,
                        b.d as *mut c_void,
                        described.d,
                        &self.algorithm,
                        b.workspace as *mut c_void,
                        WORKSPACE,
                        stream.0.cast(),
                    ),
                )
            }
        })
    }
}

/// cuBLASLt's descriptors of a problem.
struct Described {
    operation: sys::cublasLtMatmulDesc_t,
    w: sys::cublasLtMatrixLayout_t,
    x: sys::cublasLtMatrixLayout_t,
    d: sys::cublasLtMatrixLayout_t,
}

impl Described {
    fn new(p: &DenseProblem) -> Result<Self, CudaError> {
        use sys::cublasLtMatmulDescAttributes_t as A;
        let factor = match p.factor {
            Factor::Bf16 => sys::cudaDataType_t::CUDA_R_16BF,
            Factor::Fp8E4M3 => sys::cudaDataType_t::CUDA_R_8F_E4M3,
        };
        let out = match p.out {
            FloatType::F32 => sys::cudaDataType_t::CUDA_R_32F,
            FloatType::F16 => sys::cudaDataType_t::CUDA_R_16F,
            FloatType::Bf16 => sys::cudaDataType_t::CUDA_R_16BF,
        };
        let failed = |call| {
            move |e: result::CublasError| CudaError::Call { call, reason: format!("{:?}", e.0) }
        };
        let layout = |kind, rows: usize, columns: usize, pitch: usize| {
            result::create_matrix_layout(kind, rows as u64, columns as u64, pitch as i64)
                .map_err(failed("cublasLtMatrixLayoutCreate"))
        };
        let mut described = Self {
            operation: std::ptr::null_mut(),
            w: std::ptr::null_mut(),
            x: std::ptr::null_mut(),
            d: std::ptr::null_mut(),
        };
        described.operation = result::create_matmul_desc(
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            sys::cudaDataType_t::CUDA_R_32F,
        )
        .map_err(failed("cublasLtMatmulDescCreate"))?;
        described.w = layout(factor, p.k, p.n, p.pitch)?;
        described.x = layout(factor, p.k, p.m, p.pitch)?;
        described.d = layout(out, p.n, p.m, p.n)?;
        // SAFETY: the values have the attributes' types.
        unsafe {
            described.set(A::CUBLASLT_MATMUL_DESC_TRANSA, &TRANSPOSED)?;
            described.set(A::CUBLASLT_MATMUL_DESC_TRANSB, &AS_STORED)?;
            if p.bias {
                described.set(
                    A::CUBLASLT_MATMUL_DESC_EPILOGUE,
                    &sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS,
                )?;
                described.set(A::CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &out)?;
            }
            if p.factor == Factor::Fp8E4M3 {
                described.set(A::CUBLASLT_MATMUL_DESC_FAST_ACCUM, &FAST_ACCUMULATION)?;
            }
        }
        Ok(described)
    }

    /// Addresses of the float32 factors of x and of w. cuBLASLt is column-major: its first factor is
    /// w.
    fn set_scales(&self, [x, w]: [DevicePtr; 2]) -> Result<(), CudaError> {
        use sys::cublasLtMatmulDescAttributes_t as A;
        // SAFETY: the attributes are pointers.
        unsafe {
            self.set(A::CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, &w)?;
            self.set(A::CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, &x)
        }
    }

    /// # Safety
    /// `value` is of the attribute's type.
    unsafe fn set<T>(
        &self,
        attribute: sys::cublasLtMatmulDescAttributes_t,
        value: &T,
    ) -> Result<(), CudaError> {
        // SAFETY: the descriptor is alive; the value is copied.
        let done = unsafe {
            result::set_matmul_desc_attribute(
                self.operation,
                attribute,
                std::ptr::from_ref(value).cast(),
                size_of::<T>(),
            )
        };
        done.map_err(|e| CudaError::Call {
            call: "cublasLtMatmulDescSetAttribute",
            reason: format!("{attribute:?}: {:?}", e.0),
        })
    }
}

impl Drop for Described {
    fn drop(&mut self) {
        // SAFETY: created once, destroyed once; null ones were never created.
        unsafe {
            for layout in [self.w, self.x, self.d] {
                if !layout.is_null() {
                    let _ = result::destroy_matrix_layout(layout);
                }
            }
            if !self.operation.is_null() {
                let _ = result::destroy_matmul_desc(self.operation);
            }
        }
    }
}

/// cuBLASLt's first choice, or `None` where it has none.
fn search(
    handle: Handle,
    problem: &DenseProblem,
) -> Result<Option<sys::cublasLtMatmulAlgo_t>, CudaError> {
    let described = Described::new(problem)?;
    let failed = |e: result::CublasError| CudaError::Call {
        call: "cublasLtMatmulPreference",
        reason: format!("{:?}", e.0),
    };
    if problem.factor == Factor::Fp8E4M3 {
        // Which algorithms there are may follow from whether there are scales; nothing is read.
        described.set_scales([u64::from(ALIGNMENT); 2])?;
    }
    let preference = result::create_matmul_pref().map_err(failed)?;
    // SAFETY: all descriptors are alive; the preference is destroyed once.
    unsafe {
        let found = prefer(preference, problem).ok().map(|()| {
            result::get_matmul_algo_heuristic(
                handle.0,
                described.operation,
                described.w,
                described.x,
                described.d,
                described.d,
                preference,
            )
        });
        let _ = result::destroy_matmul_pref(preference);
        Ok(found.and_then(Result::ok).map(|found| found.algo))
    }
}

/// What an algorithm for `problem` may use and rely on.
///
/// # Safety
/// `preference` is alive.
unsafe fn prefer(
    preference: sys::cublasLtMatmulPreference_t,
    problem: &DenseProblem,
) -> Result<(), result::CublasError> {
    use sys::cublasLtMatmulPreferenceAttributes_t as A;
    let schemes: u32 = if problem.split { u32::MAX } else { 0 };
    let (workspace, alignment) = (WORKSPACE, ALIGNMENT);
    let aligned = [
        A::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
        A::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        A::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
        A::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
    ];
    // SAFETY: the values have the attributes' types and are copied.
    unsafe {
        let set = |attribute, value: *const c_void, size| {
            result::set_matmul_pref_attribute(preference, attribute, value, size)
        };
        let number = |attribute, value: &u32| {
            set(attribute, std::ptr::from_ref(value).cast(), size_of::<u32>())
        };
        set(
            A::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
            (&raw const workspace).cast(),
            size_of::<usize>(),
        )?;
        number(A::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &schemes)?;
        // What plans promise of their buffers. Products that may divide k are no plan's.
        if !problem.split {
            for attribute in aligned {
                number(attribute, &alignment)?;
            }
        }
    }
    Ok(())
}
