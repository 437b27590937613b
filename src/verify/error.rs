//! What can go wrong while two models are compared.

use std::path::PathBuf;

/// An error; the message names the thing, the cause and what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VerifyError {
    /// ONNX Runtime, the evaluation text, the tokenizer or a device.
    #[error(transparent)]
    Eval(#[from] crate::eval::Error),
    /// A file that is no model.
    #[error("{}: {source}", path.display())]
    Model {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: crate::onnx::Error,
    },
    /// ONNX Runtime cannot make a session of a model, so nothing can be compared.
    #[error("{}: cannot be verified, ONNX Runtime does not load it on {device}: {reason}", path.display())]
    Load {
        /// The model.
        path: PathBuf,
        /// Where it was to run.
        device: String,
        /// ONNX Runtime's reason.
        reason: String,
    },
    /// A run of a model that was loaded failed.
    #[error("{}: a run on {device} failed: {reason}", path.display())]
    Run {
        /// The model.
        path: PathBuf,
        /// Where it ran.
        device: String,
        /// ONNX Runtime's reason.
        reason: String,
    },
    /// Inputs that cannot be made up, or that do not fit.
    #[error("{}: {reason}", path.display())]
    Inputs {
        /// The model or the file of inputs.
        path: PathBuf,
        /// What is wrong, and what to do.
        reason: String,
    },
    /// An intermediate value that cannot be looked at.
    #[error("{}: {reason}", path.display())]
    Layers {
        /// The model.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// The profile that ONNX Runtime wrote cannot be read.
    #[error("the profile of {}: {reason}", path.display())]
    Profile {
        /// The model that ran.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}

/// Result of a comparison.
pub type Result<T, E = VerifyError> = std::result::Result<T, E>;
