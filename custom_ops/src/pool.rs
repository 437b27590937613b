//! ONNX Runtime's own threads for the kernels' tasks.
#![allow(unsafe_code)]

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Mutex, OnceLock, PoisonError},
};

use mx_kernels::Parallel;
use ort::operator::ComputeContext;

use crate::guard::{OpError, panic_message};

/// The intra-op pool of the session that a kernel runs in.
pub(crate) struct OrtPool<'a> {
    ctx: &'a ComputeContext,
    /// First thing that went wrong in a task; `Parallel::run` has no way to answer it.
    failure: Mutex<Option<OpError>>,
}

// SAFETY: the context is only used for `KernelContext_ParallelFor`, which reads the session's pool
// from it and may be called from any thread while compute runs; a pool cannot outlive the call.
unsafe impl Sync for OrtPool<'_> {}

impl<'a> OrtPool<'a> {
    pub(crate) fn new(ctx: &'a ComputeContext) -> Self {
        Self { ctx, failure: Mutex::new(None) }
    }

    /// The failure of any task since the pool was made.
    pub(crate) fn finish(self) -> Result<(), OpError> {
        match self.failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
            Some(failure) => Err(failure),
            None => Ok(()),
        }
    }

    fn fail(&self, error: OpError) {
        let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        failure.get_or_insert(error);
    }
}

impl Parallel for OrtPool<'_> {
    /// What the machine offers this process: the C API does not tell the size of a session's pool.
    /// Only the number of tasks depends on it, never a result.
    fn threads(&self) -> usize {
        static THREADS: OnceLock<usize> = OnceLock::new();
        *THREADS.get_or_init(|| std::thread::available_parallelism().map_or(1, usize::from))
    }

    fn run(&self, tasks: usize, f: &(dyn Fn(usize) + Sync)) {
        if tasks <= 1 {
            // The caller catches panics itself.
            return (0..tasks).for_each(f);
        }
        let task = |index| {
            if let Err(cause) = catch_unwind(AssertUnwindSafe(|| f(index))) {
                self.fail(OpError::Panic(panic_message(&*cause)));
            }
        };
        // 0 batches: threads take tasks one by one as they get free.
        if let Err(error) = self.ctx.par_for(tasks, 0, task) {
            self.fail(OpError::Host {
                call: "KernelContext_ParallelFor",
                message: error.message().to_owned(),
            });
        }
    }
}
