//! What can go wrong in a rewrite, from options to files.

use std::path::PathBuf;

use super::{CheckpointError, ExecuteError, FilterError, RecipeError, Skipped};
use crate::{graph::GraphError, onnx};

/// Why a rewrite did not happen. No output file is left then.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RewriteError {
    /// Options that contradict each other.
    #[error(transparent)]
    Recipe(#[from] RecipeError),
    /// A regular expression that cannot be used.
    #[error(transparent)]
    Filter(#[from] FilterError),
    /// A checkpoint that cannot be used.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A model that cannot be read or written.
    #[error(transparent)]
    Onnx(#[from] onnx::Error),
    /// A model whose graph is not valid.
    #[error("'{}': {source}", path.display())]
    Graph {
        /// The model.
        path: PathBuf,
        /// What is wrong with it.
        source: GraphError,
    },
    /// No layer was chosen.
    #[error("nothing to replace in '{}': {selection} selects none of {count} candidates \
             (name layers with --include, or pass --allow-empty)", path.display(), count = candidates.len())]
    NothingToReplace {
        /// The model.
        path: PathBuf,
        /// What the selection is called (`tier a`).
        selection: String,
        /// Every candidate and why it is left alone.
        candidates: Vec<Skipped>,
    },
    /// A plan that cannot be carried out.
    #[error("'{}': {source}", path.display())]
    Execute {
        /// The model.
        path: PathBuf,
        /// Why not.
        source: ExecuteError,
    },
}

impl RewriteError {
    /// True when the options are at fault rather than a file.
    pub fn is_usage(&self) -> bool {
        matches!(self, Self::Recipe(_) | Self::Filter(_))
    }
}
