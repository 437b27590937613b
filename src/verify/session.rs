//! A model in ONNX Runtime whose outputs come back as numbers.

use std::path::{Path, PathBuf};

use ort::value::DynValue;

use super::{
    error::{Result, VerifyError},
    numbers::Numbers,
};
use crate::{
    eval::{
        devices::Device,
        runtime::Runtime,
        session::{SessionOptions, builder},
    },
    onnx::Model,
};

/// Inputs of a run, by name.
pub(super) type Inputs = Vec<(String, DynValue)>;
/// Outputs of a run, by name; a sentence for those that are no tensors of numbers.
pub(super) type Outputs = Vec<(String, Result<Numbers, String>)>;

/// The output of this name, when it holds numbers.
pub(super) fn output<'a>(outputs: &'a Outputs, name: &str) -> Option<&'a Numbers> {
    outputs.iter().find(|(known, _)| known == name)?.1.as_ref().ok()
}

/// Where sessions are made.
#[derive(Clone, Copy)]
pub(super) struct Place<'a> {
    pub runtime: &'a Runtime,
    pub device: Device,
}

/// A session.
pub(super) struct Session {
    inner: ort::session::Session,
    path: PathBuf,
    device: Device,
}

impl Session {
    /// Opens `model`, which is that of the file `path` or an edited copy of it. With `profile`, the
    /// start of a file name, ONNX Runtime notes every node that it runs.
    pub fn open(
        place: Place<'_>,
        path: &Path,
        model: &Model,
        profile: Option<&Path>,
    ) -> Result<Self> {
        let device = place.device;
        let load = |reason: String| VerifyError::Load {
            path: path.to_owned(),
            device: device.to_string(),
            reason: reason.trim().to_owned(),
        };
        let bytes = model
            .to_bytes()
            .map_err(|source| VerifyError::Model { path: path.to_owned(), source })?;
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let options = SessionOptions { device, threads: None, debug: false };
        let builder = builder(place.runtime, folder, &options).map_err(|e| load(e.to_string()))?;
        let mut builder = match profile {
            Some(prefix) => builder.with_profiling(prefix).map_err(|e| load(e.to_string()))?,
            None => builder,
        };
        let inner = builder.commit_from_memory(&bytes).map_err(|e| load(e.to_string()))?;
        Ok(Self { inner, path: path.to_owned(), device })
    }

    fn failed(&self) -> impl Fn(ort::Error) -> VerifyError + use<> {
        let (path, device) = (self.path.clone(), self.device.to_string());
        move |error| VerifyError::Run {
            path: path.clone(),
            device: device.clone(),
            reason: error.to_string().trim().to_owned(),
        }
    }

    /// Runs the model.
    pub fn run(&mut self, inputs: &Inputs) -> Result<Outputs> {
        let failed = self.failed();
        let named: Vec<(&str, &DynValue)> =
            inputs.iter().map(|(name, value)| (name.as_str(), value)).collect();
        let outputs = self.inner.run(named).map_err(failed)?;
        let read = |(name, value): (&str, ort::value::ValueRef<'_>)| {
            (name.to_owned(), Numbers::read(&value))
        };
        Ok(outputs.iter().map(read).collect())
    }

    /// Ends profiling and gives the file that ONNX Runtime has written.
    pub fn end_profiling(&mut self) -> Result<PathBuf> {
        let failed = self.failed();
        self.inner.end_profiling().map(PathBuf::from).map_err(failed)
    }
}
