//! Constant weights repacked for this machine's kernels when a session is made.

use std::sync::LazyLock;

use mx_kernels::{
    Error, LinearProblem, PackedWeight, Parallel, PreparedWeight, Serial, StdThreads,
};

use crate::{guard::OpError, host::Node};

/// Weights under so many elements are repacked without threads.
const SMALL: usize = 1 << 20;

/// Whether weights are repacked. The environment variable `MX_CPU_REPACK=0` says no: slower, and no second
/// copy of the weights in memory.
fn wanted() -> bool {
    std::env::var_os("MX_CPU_REPACK").is_none_or(|v| v != "0")
}

/// The packed bytes of inputs `codes` and `scales` where both are constants and repacking is wanted, given
/// to `f` with a function that repacks one weight.
pub(crate) fn constants<R: Default>(
    node: &Node<'_, '_>,
    (codes, scales): (usize, usize),
    f: impl FnOnce(&[u8], &[u8]) -> Result<R, Error>,
) -> Result<R, OpError> {
    if !wanted() {
        return Ok(R::default());
    }
    let (Some(codes), Some(scales)) = (node.constant(codes)?, node.constant(scales)?) else {
        return Ok(R::default());
    };
    Ok(f(&codes.values::<u8>()?, &scales.values::<u8>()?)?)
}

/// `w` for products like `problem`; `None` where no kernel of this machine has a use for that.
pub(crate) fn weight(problem: &LinearProblem, w: &PackedWeight<'_>) -> Option<PreparedWeight> {
    PreparedWeight::new(problem, w, threads(w.n().saturating_mul(w.k())))
}

/// The machine's threads for so many elements: session creation has none of ONNX Runtime's.
pub(crate) fn threads(elements: usize) -> &'static dyn Parallel {
    static THREADS: LazyLock<StdThreads> =
        LazyLock::new(|| StdThreads(std::thread::available_parallelism().map_or(1, usize::from)));
    if elements < SMALL { &Serial } else { &*THREADS }
}
