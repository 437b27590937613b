//! mxrewrite.
//!
//! ```text
//! cli -> eval, verify -> rewrite -> graph -> onnx
//! verify -> eval
//! ```
//! [`onnx`] reads and writes models, [`graph`] looks at them, [`rewrite`] replaces layers, [`eval`] measures
//! what that costs on text, [`verify`] compares two models and says which kernels ran,
//! [`cli`] is the two commands.

pub mod cli;
pub mod eval;
pub mod graph;
pub mod onnx;
pub mod rewrite;
pub mod verify;
