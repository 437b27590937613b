//! mxrewrite.
pub mod graph;
pub mod onnx;
pub mod rewrite;
