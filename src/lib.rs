//! mxrewrite.
//!
//! ```text
//! cli -> eval, verify, genai -> rewrite -> graph -> onnx
//! verify -> eval
//! ```
//! [`onnx`] reads and writes models, [`graph`] looks at them, [`rewrite`] replaces layers, [`eval`] measures
//! what that costs on text, [`genai`] rewrites whole folders of ONNX Runtime GenAI, [`verify`] compares two models and says which kernels ran,
//! [`cli`] is the two commands.

pub mod cli;
pub mod eval;
pub mod genai;
pub mod graph;
pub mod onnx;
pub mod rewrite;
pub mod verify;
