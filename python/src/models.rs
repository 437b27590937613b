//! Plans and rewrites, as JSON texts.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use mxrewrite::onnx::{Model, Progress};
use mxrewrite::rewrite as library;
use mxrewrite::rewrite::RewriteError;
use pyo3::prelude::*;

use crate::error::Failure;
use crate::options::Options;

/// The plan of a rewrite as JSON, the text of `mxrewrite --plan --json`; `sqnr` reads every weight once.
#[pyfunction]
pub(crate) fn plan(
    py: Python<'_>,
    model: PathBuf,
    options: Options,
    sqnr: bool,
) -> Result<String, Failure> {
    let options = options.resolve()?;
    py.detach(|| {
        let (opened, mut plan) = library::plan_file(&model, &options)?;
        if sqnr {
            library::measure_plan(&opened, &mut plan, options.threads)
                .map_err(|source| RewriteError::Execute { path: model.clone(), source })?;
        }
        // As everywhere else an empty plan is an error, unless it was expected.
        library::require_sites(&model, &plan, &options)?;
        Ok(serde_json::to_string(&plan)?)
    })
}

/// Rewrites a file; the report as JSON, the text of `mxrewrite --json`. `progress` gets the bytes that are
/// written and those of the whole output.
#[pyfunction]
pub(crate) fn rewrite(
    py: Python<'_>,
    model: PathBuf,
    output: Option<PathBuf>,
    options: Options,
    progress: Option<Py<PyAny>>,
) -> Result<String, Failure> {
    let options = options.resolve()?;
    let raised = Arc::new(Mutex::new(None));
    let listener = listener(progress, Arc::clone(&raised));
    py.detach(|| {
        let output = output.unwrap_or_else(|| library::default_output(&model, &options));
        let report = library::rewrite_file_telling(&model, &output, &options, &listener);
        if let Some(error) = raised.lock().unwrap_or_else(PoisonError::into_inner).take() {
            return Err(Failure::Python(error));
        }
        Ok(serde_json::to_string(&report?)?)
    })
}

/// Names of a model's nodes of domain `mx`, in its If, Loop and Scan bodies, too.
#[pyfunction]
pub(crate) fn mx_nodes(py: Python<'_>, model: PathBuf) -> Result<Vec<String>, Failure> {
    py.detach(|| Ok(mxrewrite::verify::mx_node_names(&Model::open(&model)?)?))
}

/// Asks Python for signals (Ctrl-C) and calls its function, if there is one; what either raises ends the
/// writing.
fn listener(function: Option<Py<PyAny>>, raised: Arc<Mutex<Option<PyErr>>>) -> Progress {
    Progress::new(move |done, total| {
        let told = Python::attach(|py| {
            py.check_signals()?;
            function.as_ref().map(|function| function.call1(py, (done, total))).transpose()
        });
        match told {
            Ok(_) => ControlFlow::Continue(()),
            Err(error) => {
                *raised.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                ControlFlow::Break(())
            }
        }
    })
}
