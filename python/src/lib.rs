//! The Python package's extension module, `mxrewrite._native`.
//!
//! What users see is in `mxrewrite/*.py`, which checks arguments and makes results of the JSON that comes
//! from here; numbers and models are Rust's alone. Everything that takes time releases the GIL.

mod error;
mod models;
mod numbers;
mod options;

use std::ffi::OsString;

use pyo3::prelude::*;

/// The extension module.
#[pymodule]
mod _native {
    #[pymodule_export]
    use super::error::NativeError;
    #[pymodule_export]
    use super::models::{mx_nodes, plan, rewrite};
    #[pymodule_export]
    use super::numbers::{dequantize, quantize, unpack};
    #[pymodule_export]
    use super::{run_mxeval, run_mxrewrite, version};
}

/// The package's version.
#[pyfunction]
fn version() -> &'static str {
    env!("CARGO_PKG_VERSION")
}

/// Runs the command `mxrewrite` on `arguments`, its name first; returns its exit code.
#[pyfunction]
fn run_mxrewrite(py: Python<'_>, arguments: Vec<OsString>) -> u8 {
    py.detach(|| mxrewrite::cli::mxrewrite::main(arguments))
}

/// Runs the command `mxeval` on `arguments`, its name first; returns its exit code.
#[pyfunction]
fn run_mxeval(py: Python<'_>, arguments: Vec<OsString>) -> u8 {
    py.detach(|| mxrewrite::cli::mxeval::main(arguments))
}
