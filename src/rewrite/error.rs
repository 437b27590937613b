//! What can go wrong in a rewrite.

use super::{filter::FilterError, recipe::RecipeError, sites::Skipped};
use crate::{graph::GraphError, onnx};

/// Errors of a rewrite. The messages are one line, but for the list of candidates of
/// [`RewriteError::NothingFound`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RewriteError {
    /// The model cannot be read or written.
    #[error(transparent)]
    Onnx(#[from] onnx::Error),
    /// The graph is not one that ONNX allows.
    #[error(transparent)]
    Graph(#[from] GraphError),
    /// The options contradict each other.
    #[error(transparent)]
    Recipe(#[from] RecipeError),
    /// A regular expression does not compile.
    #[error(transparent)]
    Filter(#[from] FilterError),
    /// No layer was selected.
    #[error("{selection} selects no layer of this model; {}", candidates(skipped))]
    NothingFound {
        /// What the selection is called.
        selection: String,
        /// The candidates, and why each was left alone.
        skipped: Vec<Skipped>,
    },
    /// One layer cannot be replaced.
    #[error("node '{node}': {reason}")]
    Site {
        /// The layer's node.
        node: String,
        /// Why not.
        reason: String,
    },
    /// The model is too old for a lowering.
    #[error(
        "--lower {lowering} needs opset {needed} or newer, the model imports {found}; export it again"
    )]
    Opset {
        /// Name of the lowering.
        lowering: &'static str,
        /// Version that it needs.
        needed: i64,
        /// Version that the model imports.
        found: i64,
    },
    /// A model that a lowering cannot take.
    #[error("--lower {lowering}: {reason}")]
    Unsupported {
        /// Name of the lowering.
        lowering: &'static str,
        /// Why.
        reason: String,
    },
    /// No threads to quantise with.
    #[error("cannot start {threads} threads: {reason}")]
    Threads {
        /// How many were asked for.
        threads: usize,
        /// Why not.
        reason: String,
    },
}

fn candidates(skipped: &[Skipped]) -> String {
    if skipped.is_empty() {
        return "it has no MatMul or Gemm with a constant weight".to_owned();
    }
    let lines = skipped.iter().map(|s| format!("\n  {} ({}): {}", s.node, s.op, s.reason));
    format!("candidates:{}", lines.collect::<String>())
}
