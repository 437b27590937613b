//! mxrewrite.
pub mod eval;
pub mod graph;
pub mod onnx;
pub mod rewrite;
