//! What can be wrong with a model file.

use std::path::PathBuf;

use mx_custom_ops::contract::ContractError;

/// Result of the ONNX layer.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Errors of reading and writing models. Every message is one line.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused something.
    #[error("cannot {action} '{}': {source}", path.display())]
    Io {
        /// What was tried: `open`, `read`, `write`, ...
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The bytes are not an ONNX model.
    #[error("not a valid ONNX model: {what} at byte {at}")]
    Malformed {
        /// What was met or missing.
        what: String,
        /// Offset from the start of the file.
        at: u64,
    },
    /// An error inside a named file.
    #[error("'{}': {source}", path.display())]
    InFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: Box<Error>,
    },
    /// A model of a later version of this project's operators.
    #[error(transparent)]
    Newer(#[from] ContractError),
    /// A tensor that cannot be read.
    #[error("tensor '{tensor}': {what}")]
    Tensor {
        /// Name of the tensor.
        tensor: String,
        /// What is wrong with it.
        what: String,
    },
    /// A tensor whose external data cannot be read.
    #[error("tensor '{tensor}': external data file '{location}' {what}")]
    External {
        /// Name of the tensor.
        tensor: String,
        /// Its `location` entry.
        location: String,
        /// What is wrong with it.
        what: String,
    },
    /// Whoever waits for the output asked to stop ([`Progress`](super::Progress)).
    #[error("stopped before the end; nothing was written")]
    Stopped,
    /// A model that cannot be written where asked.
    #[error("cannot write '{}': {what}", path.display())]
    Output {
        /// The output.
        path: PathBuf,
        /// Why not.
        what: String,
    },
    /// A payload made while writing failed.
    #[error("cannot make tensor '{tensor}': {what}")]
    Payload {
        /// Name of the tensor.
        tensor: String,
        /// Why not.
        what: String,
    },
}

impl Error {
    /// A [`Error::Malformed`].
    pub(crate) fn malformed(what: impl Into<String>, at: u64) -> Self {
        Self::Malformed { what: what.into(), at }
    }

    /// A [`Error::Tensor`].
    pub(crate) fn tensor(tensor: &str, what: impl Into<String>) -> Self {
        Self::Tensor { tensor: tensor.to_owned(), what: what.into() }
    }
}
