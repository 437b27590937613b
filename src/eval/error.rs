//! What can go wrong while measuring a model.

use std::path::PathBuf;

/// An error of the evaluation; the message names the thing, the cause and what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be opened, read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The operating system's reason.
        source: std::io::Error,
    },
    /// Evaluation text that is not what its file name promises.
    #[error("{}: {reason}", path.display())]
    Corpus {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        reason: String,
    },
    /// A data set of the Hugging Face hub could not be fetched.
    #[error("{0}")]
    Dataset(String),
    /// The tokenizer could not be read, or failed on a document.
    #[error("tokenizer {}: {reason}", path.display())]
    Tokenizer {
        /// The tokenizer.json.
        path: PathBuf,
        /// The reason.
        reason: String,
    },
    /// Nothing in the corpus can be scored.
    #[error("{0}")]
    NothingToScore(String),
    /// The graph cannot be evaluated as a causal language model.
    #[error("model {model}: {reason}")]
    Model {
        /// The model, as the user named it.
        model: String,
        /// The reason.
        reason: String,
    },
    /// libonnxruntime could not be found or loaded.
    #[error("{0}")]
    Runtime(String),
    /// ONNX Runtime refused a session or a run.
    #[error("onnx runtime, {doing}: {reason}")]
    Ort {
        /// What was being done.
        doing: String,
        /// ONNX Runtime's message.
        reason: String,
    },
    /// A device that this build or this machine does not offer.
    #[error("{0}")]
    Device(String),
    /// An option that contradicts another one, or names nothing.
    #[error("{0}")]
    Usage(String),
    /// A fault of mxeval itself, caught so that other stages go on.
    #[error("panicked: {0}")]
    Panicked(String),
    /// The rewriter failed.
    #[error("rewrite: {0}")]
    Rewrite(String),
    /// The user stopped the run; stages that ended before are on disk.
    #[error("interrupted; finished stages are kept (--resume goes on)")]
    Interrupted,
    /// The output folder is in use or holds something else.
    #[error("{0}")]
    Output(String),
}

impl Error {
    /// Wraps an I/O error with the path it happened on.
    pub fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }

    /// Wraps an ONNX Runtime error with what was being done.
    pub fn ort<R>(doing: impl Into<String>) -> impl FnOnce(ort::Error<R>) -> Self {
        let doing = doing.into();
        move |source| Self::Ort { doing, reason: source.to_string() }
    }

    /// Whether ONNX Runtime, CUDA, cuBLAS or cuDNN ran out of memory. None of them has a code for
    /// it that survives ONNX Runtime, so their texts decide.
    pub fn is_out_of_memory(&self) -> bool {
        const SAID: [&str; 7] = [
            "out of memory",
            "failed to allocate memory",
            "available memory of",
            "cuda failure 2:",
            "cuda_error_out_of_memory",
            "_status_alloc_failed",
            "bad_alloc",
        ];
        let Self::Ort { reason, .. } = self else { return false };
        let text = reason.to_ascii_lowercase();
        SAID.iter().any(|words| text.contains(words))
    }

    /// Runs `work`; a panic in it becomes an error.
    ///
    /// # Errors
    /// Those of `work`, and [`Error::Panicked`].
    pub(super) fn catch<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        caught.unwrap_or_else(|panic| Err(Self::from_panic(&*panic)))
    }

    /// What a thread that panicked leaves.
    pub(super) fn from_panic(panic: &(dyn std::any::Any + Send)) -> Self {
        let text = panic.downcast_ref::<&str>().copied();
        let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
        Self::Panicked(text.unwrap_or("no message").to_owned())
    }
}

/// Result of the evaluation.
pub type Result<T, E = Error> = std::result::Result<T, E>;

#[cfg(test)]
mod tests {
    use super::*;

    fn ort(text: &str) -> Error {
        Error::Ort { doing: "running".into(), reason: text.into() }
    }

    #[test]
    fn running_out_of_memory_is_recognised_by_its_texts() {
        for text in [
            "/onnxruntime/core/framework/bfc_arena.cc:376 void* onnxruntime::BFCArena::\
             AllocateRawInternal(size_t, bool, Stream*) Failed to allocate memory for requested \
             buffer of size 2147483648",
            "CUDA failure 2: out of memory ; GPU=0 ; hostname=x",
            "CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; GPU=0",
            "BFCArena::AllocateRawInternal Available memory of 12 is smaller than requested bytes",
            "mx::MxMatMul node `a`: cuMemAlloc failed: CUDA_ERROR_OUT_OF_MEMORY",
            "std::bad_alloc",
        ] {
            assert!(ort(text).is_out_of_memory(), "{text}");
        }
        assert!(!ort("CUDA failure 700: an illegal memory access").is_out_of_memory());
        assert!(!Error::Runtime("out of memory".into()).is_out_of_memory());
    }

    #[test]
    fn panics_become_errors() {
        let error = Error::catch::<()>(|| panic!("at {}", 3)).unwrap_err().to_string();
        assert_eq!(error, "panicked: at 3");
        assert_eq!(Error::catch(|| Ok(3)).unwrap(), 3);
    }
}
