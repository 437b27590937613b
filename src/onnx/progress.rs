//! How far writing a model has come, told to whoever waits for it, who may also stop it.

use super::error::{Error, Result};
use std::fmt;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

type Report = dyn Fn(u64, u64) -> ControlFlow<()> + Send + Sync;

/// A listener; [`Default`] is nobody.
#[derive(Clone, Default)]
pub struct Progress(Option<Arc<Report>>);

impl Progress {
    /// Nobody listens.
    pub const NOBODY: Self = Self(None);

    /// `report` gets the bytes that are written and the bytes of the whole output, after every tensor
    /// and once before the first. [`ControlFlow::Break`] ends the writing with [`Error::Stopped`].
    pub fn new(report: impl Fn(u64, u64) -> ControlFlow<()> + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(report)))
    }

    /// Counts an output of `total` bytes.
    pub(super) fn meter(&self, total: u64) -> Result<Meter<'_>> {
        let meter = Meter { progress: self, total, done: AtomicU64::new(0) };
        meter.add(0)?;
        Ok(meter)
    }
}

impl fmt::Debug for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "Progress(..)" } else { "Progress" })
    }
}

/// The count of one output.
pub(super) struct Meter<'a> {
    progress: &'a Progress,
    total: u64,
    done: AtomicU64,
}

impl Meter<'_> {
    /// `bytes` more are written.
    pub(super) fn add(&self, bytes: u64) -> Result<()> {
        let done = self.done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        match &self.progress.0 {
            // The model's own file grows by the hashes of its data, which are not known before.
            Some(report) if report(done.min(self.total), self.total).is_break() => {
                Err(Error::Stopped)
            }
            _ => Ok(()),
        }
    }
}
