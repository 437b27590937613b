//! mxrewrite.
pub mod onnx;
pub mod rewrite;
