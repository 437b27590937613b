//! What can go wrong with a GenAI folder.

use std::path::PathBuf;

use crate::{onnx, rewrite::RewriteError};

/// Why a folder was not rewritten. No output folder is left then.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GenaiError {
    /// The operating system refused something.
    #[error("cannot {action} '{}': {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A configuration that is none, or one that cannot be followed.
    #[error("'{}': {field}: {what}", path.display())]
    Config {
        /// The `genai_config.json`.
        path: PathBuf,
        /// The field, with dots (`model.decoder.filename`).
        field: String,
        /// What is wrong with it and what to do.
        what: String,
    },
    /// The configuration is no JSON.
    #[error("'{}': not valid JSON: {source}", path.display())]
    Json {
        /// The `genai_config.json`.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// A model or an output that cannot be read or written.
    #[error(transparent)]
    Onnx(#[from] onnx::Error),
    /// The rewrite of a model.
    #[error(transparent)]
    Rewrite(#[from] RewriteError),
    /// A decoder of which no float weights are left.
    #[error(
        "nothing to replace in '{}': its layers are MatMulNBits, quantised already; make the folder again with \
         the builder's -p fp32, fp16 or bf16", path.display()
    )]
    Quantised {
        /// The model.
        path: PathBuf,
    },
    /// The operator library is not where it is looked for.
    #[error(
        "libmx_custom_ops.so was not found ({tried}): name it with --ops-library or in the environment variable \
         MX_OPS_LIBRARY"
    )]
    NoLibrary {
        /// Where it was looked for.
        tried: String,
    },
    /// An output that must not be written.
    #[error("cannot write '{}': {what}", path.display())]
    Output {
        /// The output folder.
        path: PathBuf,
        /// Why not and what to do.
        what: String,
    },
}

impl GenaiError {
    /// An [`GenaiError::Io`], for `map_err`.
    pub(super) fn io(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { action, path, source }
    }
}
