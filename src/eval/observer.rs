//! Who watches a run; the library prints nothing itself.

use super::record::Record;
use std::path::Path;

/// Watches a run, from several threads at once. Stages are told apart by a number of the run's.
pub trait Observer: Sync {
    /// The output folder is ours; rewritten models lie under `work` while they are measured.
    fn opened(&self, work: &Path) {
        let _ = work;
    }
    /// Something worth a line.
    fn note(&self, text: &str) {
        let _ = text;
    }
    /// Something the user should know.
    fn warn(&self, text: &str) {
        let _ = text;
    }
    /// A stage begins with its rewriting; `total` tokens are to be scored.
    fn stage_started(&self, number: usize, model: &str, stage: &str, total: u64) {
        let _ = (number, model, stage, total);
    }
    /// `tokens` more of a stage have been scored.
    fn progress(&self, number: usize, tokens: u64) {
        let _ = (number, tokens);
    }
    /// Whether to stop; asked after every batch.
    fn interrupted(&self) -> bool {
        false
    }
    /// A stage is over.
    fn stage_finished(&self, number: usize, record: &Record) {
        let _ = (number, record);
    }
}

/// Watches nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Observer for Silent {}
