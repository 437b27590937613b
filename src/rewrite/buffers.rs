//! Memory of tiles that is used again: fresh pages cost as much as filling them does.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Buffers that wait to be used again; clones share them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Buffers(Arc<Mutex<Vec<Vec<u8>>>>);

/// Buffers that wait at most; more are given back to the system.
const WAITING: usize = 16;

impl Buffers {
    /// A buffer of so many bytes, whatever they are.
    pub(crate) fn lend(&self, len: usize) -> Lent {
        let fitting = {
            let mut waiting = self.waiting();
            let found = waiting.iter().position(|bytes| bytes.len() >= len);
            found.map(|index| waiting.swap_remove(index))
        };
        let whole = fitting.unwrap_or_else(|| vec![0; len]);
        Lent { whole, len, home: self.clone() }
    }

    fn waiting(&self) -> MutexGuard<'_, Vec<Vec<u8>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A buffer that goes back when it is dropped.
pub(crate) struct Lent {
    whole: Vec<u8>,
    len: usize,
    home: Buffers,
}

impl AsMut<[u8]> for Lent {
    fn as_mut(&mut self) -> &mut [u8] {
        &mut self.whole[..self.len]
    }
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        &self.whole[..self.len]
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let mut waiting = self.home.waiting();
        if waiting.len() == WAITING {
            waiting.remove(0);
        }
        waiting.push(std::mem::take(&mut self.whole));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_dropped_is_lent_again() {
        let buffers = Buffers::default();
        let large = buffers.lend(1000);
        let place = large.as_ref().as_ptr();
        drop(large);
        let (small, other) = (buffers.lend(900), buffers.lend(1000));
        assert_eq!(small.as_ref().as_ptr(), place);
        assert_eq!((small.as_ref().len(), other.as_ref().len()), (900, 1000));
        drop((0..40).map(|_| buffers.lend(10)).collect::<Vec<_>>());
        assert_eq!(buffers.waiting().len(), WAITING);
    }
}
