//! How a kernel spreads its work: the host lends its threads, the kernel brings the tasks.

/// A pool of threads that runs numbered tasks.
pub trait Parallel: Sync {
    /// Threads that may work at the same time, at least 1.
    fn threads(&self) -> usize;

    /// Calls `f(0)`, ..., `f(tasks - 1)`, in any order and on any threads, and returns when all are
    /// done. No result of this crate depends on order or threads.
    fn run(&self, tasks: usize, f: &(dyn Fn(usize) + Sync));
}

/// Everything on the calling thread.
#[derive(Debug, Clone, Copy, Default)]
pub struct Serial;

impl Parallel for Serial {
    fn threads(&self) -> usize {
        1
    }

    fn run(&self, tasks: usize, f: &(dyn Fn(usize) + Sync)) {
        for task in 0..tasks {
            f(task);
        }
    }
}

/// Threads of the standard library, started for each call: for tests, benches and tools.
#[derive(Debug, Clone, Copy)]
pub struct StdThreads(
    /// Number of threads; 0 counts as 1.
    pub usize,
);

impl Parallel for StdThreads {
    fn threads(&self) -> usize {
        self.0.max(1)
    }

    fn run(&self, tasks: usize, f: &(dyn Fn(usize) + Sync)) {
        let next = std::sync::atomic::AtomicUsize::new(0);
        let work = || {
            loop {
                let task = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                if task >= tasks {
                    break;
                }
                f(task);
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..self.threads().min(tasks) {
                scope.spawn(work);
            }
            work();
        });
    }
}
