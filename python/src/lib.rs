//! The Python package's extension module, `mxrewrite._native`.
//!
//! What users see is in `mxrewrite/*.py`, which checks arguments and makes results of the JSON that comes
//! from here; numbers and models are Rust's alone.

use std::ffi::OsString;

use pyo3::prelude::*;

/// The extension module.
#[pymodule]
mod _native {
    #[pymodule_export]
    use super::{run_mxeval, run_mxrewrite};
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
