//! How many kernels a session made, by execution provider.
//!
//! ONNX Runtime makes a session's kernels in the thread that creates the session, so counts are kept
//! by thread: [`reset`], create a session, [`made`]. A program that wants every node on the GPU can
//! so tell, without a profile, that one fell back to the CPU, and what became of fp8 weights.

use std::cell::Cell;

/// Kernels made in this thread since the last [`reset`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Census {
    /// On the CPU provider.
    pub cpu: usize,
    /// On the CUDA provider.
    pub cuda: usize,
    /// Of those, products that run on fp8 tensor cores.
    pub fp8: usize,
}

thread_local! {
    static MADE: Cell<Census> = const { Cell::new(Census { cpu: 0, cuda: 0, fp8: 0 }) };
}

/// Starts counting anew in this thread.
pub fn reset() {
    MADE.set(Census::default());
}

/// Kernels made in this thread since the last [`reset`].
pub fn made() -> Census {
    MADE.get()
}

/// Counts a kernel of the CPU provider.
pub(crate) fn cpu() {
    MADE.set(Census { cpu: MADE.get().cpu + 1, ..MADE.get() });
}

/// Counts a kernel of the CUDA provider.
pub(crate) fn cuda() {
    MADE.set(Census { cuda: MADE.get().cuda + 1, ..MADE.get() });
}

/// Counts a kernel, counted as one of the CUDA provider already, that uses fp8 tensor cores.
pub(crate) fn fp8() {
    MADE.set(Census { fp8: MADE.get().fp8 + 1, ..MADE.get() });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_count_for_themselves() {
        reset();
        cpu();
        cuda();
        cuda();
        fp8();
        std::thread::spawn(|| assert_eq!(made(), Census::default())).join().unwrap();
        assert_eq!(made(), Census { cpu: 1, cuda: 2, fp8: 1 });
        reset();
        assert_eq!(made(), Census::default());
    }
}
