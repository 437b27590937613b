//! Which kernels ran: for a program that links this crate and wants to know what became of each node.
//!
//! Off unless asked for. The list is the process's, not a session's: [`start`], run, [`take`].

use std::{
    collections::BTreeMap,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

/// A node's runs by one kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ran {
    /// Name of the node.
    pub node: String,
    /// Its operator.
    pub op: &'static str,
    /// `cpu` or `cuda`.
    pub provider: &'static str,
    /// The kernel: on the CPU the instruction set (`avx512`, `avx2`, `scalar`), on a GPU the path
    /// ([`path_name`](mx_kernels::cuda::LinearPlan::path_name), `act_matmul`).
    pub kernel: &'static str,
    /// How often.
    pub runs: u64,
}

type Key = (String, &'static str, &'static str, &'static str);

static ON: AtomicBool = AtomicBool::new(false);
static RUNS: Mutex<BTreeMap<Key, u64>> = Mutex::new(BTreeMap::new());

/// Forgets what ran and notes every run from now on.
pub fn start() {
    runs().clear();
    ON.store(true, Ordering::Relaxed);
}

/// What ran since [`start`], by node; nothing is noted any more.
pub fn take() -> Vec<Ran> {
    ON.store(false, Ordering::Relaxed);
    let runs = std::mem::take(&mut *runs());
    let ran = |((node, op, provider, kernel), runs)| Ran { node, op, provider, kernel, runs };
    runs.into_iter().map(ran).collect()
}

fn runs() -> MutexGuard<'static, BTreeMap<Key, u64>> {
    RUNS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Notes a run on the CPU.
pub(crate) fn cpu(op: &'static str, node: &str) {
    if ON.load(Ordering::Relaxed) {
        note(op, node, "cpu", mx_kernels::cpu::variant());
    }
}

/// Notes a run on a GPU.
pub(crate) fn cuda(op: &'static str, node: &str, kernel: &'static str) {
    if ON.load(Ordering::Relaxed) {
        note(op, node, "cuda", kernel);
    }
}

fn note(op: &'static str, node: &str, provider: &'static str, kernel: &'static str) {
    *runs().entry((node.to_owned(), op, provider, kernel)).or_default() += 1;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_noted_only_between_start_and_take() {
        cuda("Op", "a", "fused");
        start();
        cuda("Op", "a", "fused");
        cuda("Op", "a", "fused");
        cuda("Op", "a", "wide");
        let ran: Vec<_> =
            take().into_iter().map(|r| (r.node, r.provider, r.kernel, r.runs)).collect();
        assert_eq!(ran, [("a".into(), "cuda", "fused", 2), ("a".into(), "cuda", "wide", 1)]);
        cuda("Op", "a", "fused");
        assert!(take().is_empty());
    }
}
