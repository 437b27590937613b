//! What can be wrong with a checkpoint.

use std::path::PathBuf;

use crate::onnx;

/// Why a checkpoint cannot be used. Every message is one line.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// A weight of the model that cannot be read.
    #[error(transparent)]
    Model(Box<super::ExecuteError>),
    /// A file that cannot be opened, read or mapped.
    #[error("--checkpoint: {0}")]
    Io(onnx::Error),
    /// Nothing to read where one was named.
    #[error(
        "--checkpoint '{}': no *.safetensors there; name the folder of the model's weights or one \
         .safetensors file", path.display()
    )]
    Empty {
        /// What was named.
        path: PathBuf,
    },
    /// A file that is no safetensors, or whose header does not fit it.
    #[error("checkpoint file '{}': {what}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// An index of shards that cannot be followed.
    #[error("checkpoint index '{}': {what}", path.display())]
    Index {
        /// The index.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// A tensor that is not what its name and type say.
    #[error("tensor '{tensor}' of checkpoint file '{}': {what}", path.display())]
    Tensor {
        /// The tensor.
        tensor: String,
        /// Its file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
}
