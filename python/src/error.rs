//! Errors on their way to Python.

use mxrewrite::onnx;
use mxrewrite::rewrite::{RecipeError, RewriteError};
use pyo3::create_exception;
use pyo3::exceptions::PyException;
use pyo3::prelude::*;

create_exception!(
    _native,
    NativeError,
    PyException,
    "An error as (kind, message, details); mxrewrite/_errors.py makes the public exception of it."
);

/// What went wrong, and of which kind it is.
#[derive(Debug)]
pub(crate) enum Failure {
    /// Arguments at fault.
    Usage(String),
    /// Nothing chosen; the candidates as JSON.
    Nothing(String, String),
    /// A file that cannot be read, written or rewritten.
    Model(String),
    /// An exception of Python's own, from a progress function or a signal.
    Python(PyErr),
}

impl Failure {
    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self::Usage(message.into())
    }
}

impl From<RecipeError> for Failure {
    fn from(error: RecipeError) -> Self {
        Self::Usage(error.to_string())
    }
}

impl From<mx_kernels::Error> for Failure {
    fn from(error: mx_kernels::Error) -> Self {
        Self::Usage(error.to_string())
    }
}

impl From<onnx::Error> for Failure {
    fn from(error: onnx::Error) -> Self {
        Self::Model(error.to_string())
    }
}

impl From<RewriteError> for Failure {
    fn from(error: RewriteError) -> Self {
        let text = error.to_string();
        match &error {
            error if error.is_usage() => Self::Usage(text),
            RewriteError::NothingToReplace { candidates, .. } => {
                // Candidates are strings alone, which serialise.
                let json = serde_json::to_string(candidates).unwrap_or_else(|_| "[]".to_owned());
                Self::Nothing(text, json)
            }
            _ => Self::Model(text),
        }
    }
}

impl From<serde_json::Error> for Failure {
    fn from(error: serde_json::Error) -> Self {
        Self::Model(format!("a result does not serialise: {error}"))
    }
}

impl From<PyErr> for Failure {
    fn from(error: PyErr) -> Self {
        Self::Python(error)
    }
}

impl From<Failure> for PyErr {
    fn from(failure: Failure) -> Self {
        let (kind, message, details) = match failure {
            Failure::Usage(message) => ("usage", message, String::new()),
            Failure::Nothing(message, candidates) => ("nothing", message, candidates),
            Failure::Model(message) => ("model", message, String::new()),
            Failure::Python(error) => return error,
        };
        NativeError::new_err((kind, message, details))
    }
}
