//! Why something could not be done on a GPU.

/// Why something could not be done on a GPU.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum CudaError {
    /// A library that is not there, or too old.
    #[error("{library} is not available: {reason}")]
    Library {
        /// Which library.
        library: &'static str,
        /// Where it was looked for, and what to do.
        reason: String,
    },
    /// A device that does not exist or cannot be used.
    #[error("CUDA device {ordinal}: {reason}")]
    Device {
        /// Its number.
        ordinal: u32,
        /// What is wrong with it.
        reason: String,
    },
    /// A call that failed.
    #[error("{call} failed: {reason}")]
    Call {
        /// The function.
        call: &'static str,
        /// The code it returned, by name.
        reason: String,
    },
    /// A kernel source that NVRTC refuses.
    #[error("compiling {unit} for {arch} failed:\n{log}")]
    Compile {
        /// The source file.
        unit: String,
        /// The architecture, for example `sm_90`.
        arch: String,
        /// NVRTC's log.
        log: String,
    },
    /// A problem that no kernel handles.
    #[error("{0}")]
    Unsupported(String),
    /// Shapes and formats that do not go together.
    #[error(transparent)]
    Problem(#[from] crate::Error),
}
