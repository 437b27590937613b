//! One queue of stages, several teams of devices that take from it.
//!
//! A team measures one stage at a time, on one device or, where documents are sharded, on several.
//! Where measuring leaves the CPU free, as many threads as there are teams make the graphs of the
//! next stages meanwhile.

use super::devices::Device;
use super::error::Result;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, Scope};

/// What is done with a stage; stages are numbered.
pub(super) trait Engine: Sync {
    /// A stage that is ready to be measured.
    type Ready: Send;
    /// A measured stage.
    type Done: Send;

    /// Work for the CPU, before any device is needed.
    fn prepare(&self, stage: usize) -> Self::Ready;

    /// Work on the team's devices; `None` when it was stopped.
    fn measure(&self, stage: usize, ready: Self::Ready, team: &[Device]) -> Option<Self::Done>;

    /// Whether to take nothing more.
    fn stopped(&self) -> bool;

    /// Asks everybody to stop.
    fn stop(&self);
}

/// Measures stages 0 to `stages`; `done` gets them in the order in which they end, in this thread.
///
/// # Errors
/// Those of `done`, after everybody has stopped.
pub(super) fn run<E: Engine>(
    engine: &E,
    stages: usize,
    teams: &[Vec<Device>],
    ahead: bool,
    mut done: impl FnMut(E::Done) -> Result<()>,
) -> Result<()> {
    let queue = Queue { engine, stages, next: AtomicUsize::new(0) };
    let (results, finished) = mpsc::channel();
    thread::scope(|scope| {
        let prepared = ahead.then(|| queue.prepare_ahead(scope, teams.len()));
        for team in teams {
            let (queue, results, prepared) = (&queue, results.clone(), prepared.clone());
            scope.spawn(move || {
                while let Some((stage, ready)) = queue.take(prepared.as_deref()) {
                    let measured = queue.engine.measure(stage, ready, team);
                    if measured.is_none_or(|measured| results.send(measured).is_err()) {
                        break;
                    }
                }
            });
        }
        // From here on only the teams hold the ends of both channels: when they are gone, so is
        // everybody else.
        drop((results, prepared));
        let mut outcome = Ok(());
        for measured in finished {
            if outcome.is_ok() {
                outcome = done(measured);
                if outcome.is_err() {
                    engine.stop();
                }
            }
        }
        outcome
    })
}

struct Queue<'a, E> {
    engine: &'a E,
    stages: usize,
    next: AtomicUsize,
}

type Prepared<R> = Mutex<Receiver<(usize, R)>>;

impl<E: Engine> Queue<'_, E> {
    /// The next stage that nobody has taken.
    fn next(&self) -> Option<usize> {
        if self.engine.stopped() {
            return None;
        }
        let stage = self.next.fetch_add(1, Ordering::SeqCst);
        (stage < self.stages).then_some(stage)
    }

    /// A stage made ready, here or by one of the preparing threads.
    fn take(&self, prepared: Option<&Prepared<E::Ready>>) -> Option<(usize, E::Ready)> {
        match prepared {
            None => self.next().map(|stage| (stage, self.engine.prepare(stage))),
            Some(prepared) => {
                let prepared = prepared.lock().unwrap_or_else(PoisonError::into_inner);
                prepared.recv().ok().filter(|_| !self.engine.stopped())
            }
        }
    }

    /// Threads that prepare; each holds one stage until a team takes it, which bounds the disk space
    /// of prepared models.
    fn prepare_ahead<'scope, 'env>(
        &'env self,
        scope: &'scope Scope<'scope, 'env>,
        threads: usize,
    ) -> Arc<Prepared<E::Ready>>
    where
        E::Ready: 'scope,
    {
        let (sender, receiver) = mpsc::sync_channel(0);
        for _ in 0..threads {
            let sender: SyncSender<(usize, E::Ready)> = sender.clone();
            scope.spawn(move || {
                while let Some(stage) = self.next() {
                    if sender.send((stage, self.engine.prepare(stage))).is_err() {
                        break;
                    }
                }
            });
        }
        Arc::new(Mutex::new(receiver))
    }
}

#[cfg(test)]
mod tests {
    use super::super::error::Error;
    use super::*;
    use std::sync::atomic::AtomicBool;
    use std::time::{Duration, Instant};

    #[derive(Default)]
    struct Fake {
        stop: AtomicBool,
        /// Stages that stop as an interruption does.
        interrupted_at: Option<usize>,
        prepared: Mutex<Vec<usize>>,
        /// Prepared and not yet measured, and the most of them.
        waiting: Mutex<(usize, usize)>,
        pace: Duration,
    }

    impl Engine for Fake {
        type Ready = usize;
        type Done = (usize, usize, Vec<Device>);

        fn prepare(&self, stage: usize) -> usize {
            self.prepared.lock().unwrap().push(stage);
            let mut waiting = self.waiting.lock().unwrap();
            waiting.0 += 1;
            waiting.1 = waiting.1.max(waiting.0);
            stage * 10
        }

        fn measure(&self, stage: usize, ready: usize, team: &[Device]) -> Option<Self::Done> {
            thread::sleep(self.pace);
            self.waiting.lock().unwrap().0 -= 1;
            if self.interrupted_at == Some(stage) {
                self.stop();
                return None;
            }
            Some((stage, ready, team.to_vec()))
        }

        fn stopped(&self) -> bool {
            self.stop.load(Ordering::SeqCst)
        }

        fn stop(&self) {
            self.stop.store(true, Ordering::SeqCst);
        }
    }

    fn teams(count: u32) -> Vec<Vec<Device>> {
        (0..count).map(|ordinal| vec![Device::Cuda(ordinal)]).collect()
    }

    #[test]
    fn every_stage_is_measured_once_and_all_teams_work() {
        for ahead in [false, true] {
            let fake = Fake { pace: Duration::from_millis(5), ..Fake::default() };
            let mut seen = Vec::new();
            run(&fake, 12, &teams(2), ahead, |done| {
                seen.push(done);
                Ok(())
            })
            .unwrap();
            assert!(seen.iter().all(|(stage, ready, _)| *ready == stage * 10));
            for device in [Device::Cuda(0), Device::Cuda(1)] {
                let taken = seen.iter().filter(|(_, _, team)| team[..] == [device]).count();
                assert!(taken >= 3, "{ahead} {device} {taken}");
            }
            let mut stages: Vec<_> = seen.into_iter().map(|(stage, ..)| stage).collect();
            stages.sort_unstable();
            assert_eq!(stages, Vec::from_iter(0..12));
            // Two being measured, and two more when prepared ahead.
            let most = fake.waiting.lock().unwrap().1;
            assert!(most <= if ahead { 4 } else { 2 }, "{ahead} {most}");
        }
    }

    #[test]
    fn one_team_without_a_lead_goes_in_order() {
        let fake = Fake::default();
        let mut seen = Vec::new();
        run(&fake, 5, &teams(1), false, |(stage, ..)| {
            assert_eq!(fake.prepared.lock().unwrap()[stage], stage);
            seen.push(stage);
            Ok(())
        })
        .unwrap();
        assert_eq!(seen, [0, 1, 2, 3, 4]);
    }

    #[test]
    fn an_interruption_ends_the_run_and_keeps_what_was_done() {
        for (ahead, count) in [(false, 1), (true, 1), (true, 3)] {
            let fake =
                Fake { interrupted_at: Some(2), pace: Duration::from_millis(2), ..Fake::default() };
            let mut seen = Vec::new();
            run(&fake, 100, &teams(count), ahead, |(stage, ..)| {
                seen.push(stage);
                Ok(())
            })
            .unwrap();
            assert!(!seen.contains(&2) && seen.len() < 10, "{ahead} {seen:?}");
            assert!(count > 1 || seen == [0, 1], "{ahead} {seen:?}");
        }
    }

    #[test]
    fn a_full_disk_stops_everybody() {
        let start = Instant::now();
        let fake = Fake { pace: Duration::from_millis(2), ..Fake::default() };
        let error = run(&fake, 10_000, &teams(2), true, |_| Err(Error::Output("full".into())));
        assert_eq!(error.unwrap_err().to_string(), "full");
        assert!(start.elapsed() < Duration::from_secs(5));
    }
}
