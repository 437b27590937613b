//! What can be wrong with a graph.

/// A graph that ONNX does not allow. Nothing is rewritten then.
#[derive(Debug, thiserror::Error)]
pub enum GraphError {
    /// Two things define the same value.
    #[error("value '{value}' is defined twice, by {by}")]
    Duplicate {
        /// The value.
        value: String,
        /// Which two.
        by: String,
    },
    /// Something reads a value that nothing defines.
    #[error("{reader} reads value '{value}', which nothing in the graph produces")]
    Undefined {
        /// Who reads it.
        reader: String,
        /// The value.
        value: String,
    },
    /// Nodes depend on each other in a circle.
    #[error("the graph has a cycle through node {node}")]
    Cycle {
        /// A node of the cycle.
        node: String,
    },
    /// Sub-graphs inside sub-graphs, deeper than any exporter goes.
    #[error("sub-graphs are nested more than {0} levels deep")]
    TooDeep(usize),
    /// A sub-graph that is no `GraphProto`.
    #[error("the sub-graph '{attribute}' of node '{node}' cannot be decoded: {reason}")]
    Body {
        /// The node that owns it.
        node: String,
        /// The attribute that holds it.
        attribute: String,
        /// Why.
        reason: String,
    },
    /// A part of the model that cannot be decoded.
    #[error(transparent)]
    Onnx(#[from] crate::onnx::Error),
}
