//! A corpus scored on one device, or its batches spread over several.
//!
//! Scores are kept by document, so that neither the number of devices nor who took which batch can
//! change a figure. A batch that does not fit in memory is cut in half and tried again.

use super::devices::Device;
use super::error::{Error, Result};
use super::metrics::DocumentScore;
use super::schedule::Batch;
use super::windows::Window;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Barrier, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A loaded model that scores windows; a test puts its own in place of a session.
pub trait Score: Send {
    /// Scores the windows of one batch; the results are in the order of `batch.windows`.
    ///
    /// # Errors
    /// The runtime fails, or the windows are longer than the graph's fixed sequence.
    fn score(&mut self, windows: &[Window], batch: &Batch) -> Result<Vec<DocumentScore>>;

    /// Whether fewer rows take less memory; they do not in a graph with a fixed number of rows.
    fn splits(&self) -> bool;

    /// Time spent inside the runtime so far.
    fn running(&self) -> Duration;
}

/// Loads the model on a device.
pub(super) type Open<'a> = dyn Fn(Device) -> Result<Box<dyn Score>> + Sync + 'a;

/// What is to be scored, and who is told.
pub(super) struct Work<'a> {
    pub windows: &'a [Window],
    pub batches: &'a [Batch],
    /// Score the first batch once before the clock starts: a GPU sets up libraries and memory then.
    pub warm_up: bool,
    /// Tokens that have been scored.
    pub progress: &'a (dyn Fn(u64) + Sync),
    pub warn: &'a (dyn Fn(&str) + Sync),
    pub interrupted: &'a (dyn Fn() -> bool + Sync),
}

/// Scores of a corpus.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Scored {
    /// By document.
    pub documents: Vec<DocumentScore>,
    /// Wall time without loading.
    pub seconds: f64,
    /// Wall time of loading.
    pub load_seconds: f64,
    /// Time of all threads while scoring.
    pub thread_seconds: f64,
    /// Of it, what was spent outside the runtime.
    pub outside_run_seconds: f64,
    /// Rows that a batch was cut to after running out of memory.
    pub halved_to: Option<usize>,
}

impl Scored {
    /// Time outside the runtime as a share of the threads' time.
    pub fn outside_run_share(&self) -> f64 {
        if self.thread_seconds > 0.0 { self.outside_run_seconds / self.thread_seconds } else { 0.0 }
    }
}

/// Scores the corpus on `devices`, one thread and one model each.
///
/// # Errors
/// The first fault of any device; [`Error::Interrupted`].
pub(super) fn score(work: &Work<'_>, devices: &[Device], open: &Open<'_>) -> Result<Scored> {
    let shared = Shared {
        work,
        open,
        next: AtomicUsize::new(0),
        loaded: Barrier::new(devices.len().max(1)),
        failed: AtomicBool::new(false),
        documents: Mutex::new(vec![DocumentScore::default(); work.windows.len()]),
    };
    let first = devices.first().copied().unwrap_or(Device::Cpu);
    let shares: Vec<Result<Share>> = std::thread::scope(|scope| {
        let others: Vec<_> = devices
            .iter()
            .skip(1)
            .map(|&device| {
                scope.spawn({
                    let shared = &shared;
                    move || shared.share(device)
                })
            })
            .collect();
        let own = shared.share(first);
        let joined = others
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|panic| Err(Error::from_panic(&*panic))));
        std::iter::once(own).chain(joined).collect()
    });
    let mut scored = Scored::default();
    for share in shares {
        let share = share?;
        scored.seconds = scored.seconds.max(share.seconds);
        scored.load_seconds = scored.load_seconds.max(share.load_seconds);
        scored.thread_seconds += share.seconds;
        scored.outside_run_seconds += share.seconds - share.running.as_secs_f64();
        scored.halved_to = scored.halved_to.into_iter().chain(share.halved_to).min();
    }
    scored.documents = shared.documents.into_inner().unwrap_or_else(PoisonError::into_inner);
    Ok(scored)
}

struct Shared<'a> {
    work: &'a Work<'a>,
    open: &'a Open<'a>,
    /// The batch to take next.
    next: AtomicUsize,
    /// Every device has loaded, or failed to.
    loaded: Barrier,
    failed: AtomicBool,
    documents: Mutex<Vec<DocumentScore>>,
}

/// What one device did.
#[derive(Default)]
struct Share {
    seconds: f64,
    load_seconds: f64,
    running: Duration,
    halved_to: Option<usize>,
}

impl Shared<'_> {
    /// Loads and scores in one thread, since CUDA's current device belongs to the thread.
    fn share(&self, device: Device) -> Result<Share> {
        let mut fit = Fit::default();
        let start = Instant::now();
        let opened = self.noted(|| {
            let mut model = (self.open)(device)?;
            if self.work.warm_up
                && let Some(batch) = self.work.batches.first()
            {
                fit.score(&mut *model, self.work, batch, device)?;
            }
            Ok(model)
        });
        let load_seconds = start.elapsed().as_secs_f64();
        self.loaded.wait();
        let mut model = opened?;
        let (before, start) = (model.running(), Instant::now());
        self.noted(|| self.batches(&mut *model, &mut fit, device))?;
        let (seconds, running) = (start.elapsed().as_secs_f64(), model.running() - before);
        Ok(Share { seconds, load_seconds, running, halved_to: fit.smallest })
    }

    /// Does `work`; the others stop when it fails.
    fn noted<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let done = Error::catch(work);
        if done.is_err() {
            self.failed.store(true, Ordering::SeqCst);
        }
        done
    }

    fn batches(&self, model: &mut dyn Score, fit: &mut Fit, device: Device) -> Result<()> {
        while !self.failed.load(Ordering::SeqCst) {
            let index = self.next.fetch_add(1, Ordering::SeqCst);
            let Some(batch) = self.work.batches.get(index) else { break };
            let scores = fit.score(model, self.work, batch, device)?;
            let tokens = scores.iter().map(|score| score.tokens).sum();
            let mut documents = self.documents.lock().unwrap_or_else(PoisonError::into_inner);
            for (&index, score) in batch.windows.iter().zip(scores) {
                documents[index] = score;
            }
            drop(documents);
            (self.work.progress)(tokens);
            if (self.work.interrupted)() {
                return Err(Error::Interrupted);
            }
        }
        Ok(())
    }
}

/// How much fits on a device.
#[derive(Debug, Default)]
struct Fit {
    /// Padded tokens of the largest run allowed since the device ran out of memory.
    most_tokens: Option<usize>,
    /// The fewest rows that a batch was cut to.
    smallest: Option<usize>,
}

impl Fit {
    /// Scores a batch, in parts where it has to be.
    fn score(
        &mut self,
        model: &mut dyn Score,
        work: &Work<'_>,
        batch: &Batch,
        device: Device,
    ) -> Result<Vec<DocumentScore>> {
        let mut scores = Vec::with_capacity(batch.windows.len());
        let mut rest = &batch.windows[..];
        while !rest.is_empty() {
            let rows = self.rows(batch.length).min(rest.len());
            // The part is padded as the whole batch would be.
            let part = Batch { windows: rest[..rows].to_vec(), length: batch.length };
            match model.score(work.windows, &part) {
                Ok(part) => {
                    scores.extend(part);
                    rest = &rest[rows..];
                }
                Err(error) if rows > 1 && model.splits() && error.is_out_of_memory() => {
                    let half = rows.div_ceil(2);
                    self.most_tokens = Some(half * batch.length);
                    self.smallest = Some(self.smallest.map_or(half, |rows| rows.min(half)));
                    (work.warn)(&format!(
                        "{device} ran out of memory on {rows} documents of {} tokens; going on \
                         with {half}",
                        batch.length
                    ));
                }
                Err(error) => return Err(error),
            }
        }
        Ok(scores)
    }

    /// Rows of `length` tokens that may run together; at least one.
    fn rows(&self, length: usize) -> usize {
        self.most_tokens.map_or(usize::MAX, |most| (most / length.max(1)).max(1))
    }
}

#[cfg(test)]
mod tests;
