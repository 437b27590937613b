//! A corpus scored on one device, or its batches spread over several.
//!
//! Scores are kept by window, so that neither the number of devices nor who took which batch can
//! change a figure. A batch that does not fit in memory is cut in half and tried again.

use super::devices::Device;
use super::error::{Error, Result};
use super::metrics::WindowScore;
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
    fn score(&mut self, windows: &[Window], batch: &Batch) -> Result<Vec<WindowScore>>;

    /// Whether fewer rows take less memory; they do not in a graph with a fixed number of rows.
    fn splits(&self) -> bool;

    /// Time spent inside the runtime so far, for this model and its scores.
    fn running(&self) -> Duration;

    /// Whether a reference is to run beside it.
    fn is_pair(&self) -> bool {
        false
    }

    /// Loads the reference.
    ///
    /// # Errors
    /// Those of loading a model.
    fn attach(&mut self) -> Result<()> {
        Ok(())
    }

    /// Time spent so far in the model itself and in its reference.
    fn sides(&self) -> Option<[Duration; 2]> {
        None
    }
}

/// Loads the model on a device.
pub(super) type Open<'a, 'm> = dyn Fn(Device) -> Result<Box<dyn Score + 'm>> + Sync + 'a;

/// Told of a batch's index, its windows' scores and its seconds.
pub(super) type OnDone<'a> = dyn Fn(usize, &[WindowScore], f64) -> Result<()> + Sync + 'a;

/// What is to be scored, and who is told.
pub(super) struct Work<'a> {
    pub windows: &'a [Window],
    pub batches: &'a [Batch],
    /// Indices of the batches to run, in order.
    pub todo: &'a [usize],
    /// Score the first batch once before the clock starts: a GPU sets up libraries and memory then.
    pub warm_up: bool,
    /// Every device has loaded the model and run it once, without a reference.
    pub loaded: &'a (dyn Fn() + Sync),
    /// A batch is done: its index, the scores of its windows, the seconds it took without the
    /// reference's. Called from one thread at a time.
    pub done: &'a OnDone<'a>,
    /// Tokens that have been scored.
    pub progress: &'a (dyn Fn(u64) + Sync),
    pub warn: &'a (dyn Fn(&str) + Sync),
    pub interrupted: &'a (dyn Fn() -> bool + Sync),
}

/// How the scoring went; the scores themselves went to [`Work::done`].
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Scored {
    /// Wall time without loading and without the reference's share.
    pub seconds: f64,
    /// Wall time of loading, without the reference.
    pub load_seconds: f64,
    /// Time of all threads while scoring, without the reference's share.
    pub thread_seconds: f64,
    /// Of it, what was spent outside the runtime.
    pub outside_run_seconds: f64,
    /// Seconds in the model and in its reference, all threads.
    pub sides: Option<[f64; 2]>,
    /// Rows that a batch was cut to after running out of memory.
    pub halved_to: Option<usize>,
    /// Whether it was stopped before the last batch.
    pub interrupted: bool,
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
/// The first fault of any device, or of [`Work::done`].
pub(super) fn score<'m>(
    work: &Work<'_>,
    devices: &[Device],
    open: &Open<'_, 'm>,
) -> Result<Scored> {
    let shared = Shared {
        work,
        open,
        next: AtomicUsize::new(0),
        barrier: Barrier::new(devices.len().max(1)),
        failed: AtomicBool::new(false),
        writing: Mutex::new(()),
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
        if let Some([own, reference]) = share.sides {
            let sides = scored.sides.get_or_insert_default();
            *sides = [sides[0] + own, sides[1] + reference];
        }
        scored.halved_to = scored.halved_to.into_iter().chain(share.halved_to).min();
        scored.interrupted |= share.interrupted;
    }
    Ok(scored)
}

struct Shared<'a, 'm> {
    work: &'a Work<'a>,
    open: &'a Open<'a, 'm>,
    /// The place in [`Work::todo`] to take next.
    next: AtomicUsize,
    /// Where devices wait for each other: no reference is loaded before every model has run.
    barrier: Barrier,
    failed: AtomicBool,
    writing: Mutex<()>,
}

/// What one device did.
#[derive(Default)]
struct Share {
    seconds: f64,
    load_seconds: f64,
    running: Duration,
    sides: Option<[f64; 2]>,
    halved_to: Option<usize>,
    interrupted: bool,
}

impl Shared<'_, '_> {
    /// Loads and scores in one thread, since CUDA's current device belongs to the thread.
    fn share(&self, device: Device) -> Result<Share> {
        let mut fit = Fit::default();
        let start = Instant::now();
        let first = self.work.todo.first().and_then(|&index| self.work.batches.get(index));
        let opened = self.noted(|| {
            let mut model = (self.open)(device)?;
            let loaded = start.elapsed().as_secs_f64();
            if (self.work.warm_up || model.is_pair())
                && let Some(batch) = first
            {
                fit.score(&mut *model, self.work, batch, device)?;
            }
            Ok((model, loaded))
        });
        if self.barrier.wait().is_leader() {
            (self.work.loaded)();
        }
        self.barrier.wait();
        let attached = opened.and_then(|(mut model, loaded)| {
            self.noted(|| {
                model.attach()?;
                if self.work.warm_up
                    && model.is_pair()
                    && let Some(batch) = first
                {
                    fit.score(&mut *model, self.work, batch, device)?;
                }
                Ok((model, loaded))
            })
        });
        self.barrier.wait();
        let (mut model, load_seconds) = attached?;
        let (before, sides, start) = (model.running(), model.sides(), Instant::now());
        let interrupted = self.noted(|| self.batches(&mut *model, &mut fit, device))?;
        let mut seconds = start.elapsed().as_secs_f64();
        let sides = model.sides().zip(sides).map(|(after, before)| {
            [0, 1].map(|side| (after[side].saturating_sub(before[side])).as_secs_f64())
        });
        seconds -= sides.map_or(0.0, |[_, reference]| reference);
        let running = model.running().saturating_sub(before);
        let halved_to = fit.smallest;
        Ok(Share { seconds, load_seconds, running, sides, halved_to, interrupted })
    }

    /// Does `work`; the others stop when it fails.
    fn noted<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let done = Error::catch(work);
        if done.is_err() {
            self.failed.store(true, Ordering::SeqCst);
        }
        done
    }

    /// Whether it was interrupted.
    fn batches(&self, model: &mut dyn Score, fit: &mut Fit, device: Device) -> Result<bool> {
        while !self.failed.load(Ordering::SeqCst) {
            // After the last batch there is nothing to stop.
            if self.next.load(Ordering::SeqCst) < self.work.todo.len() && (self.work.interrupted)()
            {
                return Ok(true);
            }
            let place = self.next.fetch_add(1, Ordering::SeqCst);
            let Some(&index) = self.work.todo.get(place) else { break };
            let Some(batch) = self.work.batches.get(index) else { break };
            let reference = |model: &dyn Score| model.sides().map_or(Duration::ZERO, |s| s[1]);
            let (start, before) = (Instant::now(), reference(model));
            let scores = fit.score(model, self.work, batch, device)?;
            let beside = reference(model).saturating_sub(before);
            let seconds = start.elapsed().saturating_sub(beside).as_secs_f64();
            let tokens = scores.iter().map(|window| window.score.tokens).sum();
            let writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
            (self.work.done)(index, &scores, seconds)?;
            drop(writing);
            (self.work.progress)(tokens);
        }
        Ok(false)
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
    ) -> Result<Vec<WindowScore>> {
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
