//! mxrewrite.
pub mod onnx;
