//! ONNX files in and out.
pub mod proto;
