//! Memory that calls use again: a buffer a thread, so that a decoder step does not pay for fresh
//! pages. The kernels bound what they ask for.

use std::cell::RefCell;

thread_local! {
    /// What tasks use, and what the calling thread keeps while its tasks run.
    static TASK: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
    static CALL: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Floats of a cache line.
const LINE: usize = 16;

fn with<R>(cell: &RefCell<Vec<f32>>, len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    // A host that runs a task inside a task finds the cell taken and gets memory of its own.
    let mut own = Vec::new();
    let mut kept = cell.try_borrow_mut();
    let buffer = kept.as_deref_mut().unwrap_or(&mut own);
    if buffer.len() < len + LINE {
        // Emptied first: the old contents need not move.
        buffer.clear();
        buffer.resize(len + LINE, 0.0);
    }
    let start = buffer.as_ptr().align_offset(64).min(LINE);
    f(&mut buffer[start..start + len])
}

/// Lends `len` floats, aligned to a cache line, with whatever they hold, to a task.
pub(crate) fn for_task<R>(len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    TASK.with(|cell| with(cell, len, f))
}

/// Lends `len` floats as [`for_task`] does, to the thread that starts the tasks.
pub(crate) fn for_call<R>(len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    CALL.with(|cell| with(cell, len, f))
}
