//! Token ids that windows share.

use std::fmt;
use std::ops::{Deref, Range};
use std::sync::Arc;

/// Token ids of a window: a part of the ids of its document. Overlapping windows share them, so that
/// a small `--stride` does not multiply the memory of a long document.
#[derive(Clone, Default)]
pub struct Ids {
    all: Arc<[u32]>,
    start: usize,
    end: usize,
}

impl Ids {
    /// The ids at `range` of these, in the same memory. What lies outside is left out.
    #[must_use]
    pub fn part(&self, range: Range<usize>) -> Self {
        let end = self.start.saturating_add(range.end).min(self.end);
        let start = self.start.saturating_add(range.start).min(end);
        Self { all: Arc::clone(&self.all), start, end }
    }
}

impl Deref for Ids {
    type Target = [u32];

    fn deref(&self) -> &[u32] {
        &self.all[self.start..self.end]
    }
}

impl From<Vec<u32>> for Ids {
    fn from(ids: Vec<u32>) -> Self {
        Self { start: 0, end: ids.len(), all: ids.into() }
    }
}

impl FromIterator<u32> for Ids {
    fn from_iter<I: IntoIterator<Item = u32>>(ids: I) -> Self {
        ids.into_iter().collect::<Vec<_>>().into()
    }
}

impl PartialEq for Ids {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl Eq for Ids {}

impl fmt::Debug for Ids {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}
