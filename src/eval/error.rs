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
    #[error("onnx runtime, {doing}: {source}")]
    Ort {
        /// What was being done.
        doing: String,
        /// ONNX Runtime's message.
        source: ort::Error,
    },
    /// A device that this build or this machine does not offer.
    #[error("{0}")]
    Device(String),
    /// An option that contradicts another one, or names nothing.
    #[error("{0}")]
    Usage(String),
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
        move |source| Self::Ort { doing, source: ort::Error::new(source.to_string()) }
    }
}

/// Result of the evaluation.
pub type Result<T, E = Error> = std::result::Result<T, E>;
