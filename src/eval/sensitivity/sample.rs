//! Which documents are measured on, and which are left for later.

use crate::eval::windows::{Corpus, Window};
use std::collections::VecDeque;

/// Indices of the windows of `count` documents, in the order of the text: subsets take turns, each
/// with its earliest documents, so that a text that is sorted by subset is not sampled from its first
/// subset alone. Documents that begin as one of `taken` do not count, wherever in the text they are.
pub(crate) fn spread(corpus: &Corpus, count: usize, taken: &[Vec<u32>]) -> Vec<usize> {
    let mut queues: Vec<(Option<usize>, VecDeque<usize>)> = Vec::new();
    for (index, window) in corpus.windows.iter().enumerate() {
        if taken.iter().any(|beginning| same(beginning, &window.ids)) {
            continue;
        }
        let subset = corpus.documents.get(window.document).and_then(|source| source.subset);
        match queues.iter_mut().find(|(known, _)| *known == subset) {
            Some((_, queue)) => queue.push_back(index),
            None => queues.push((subset, VecDeque::from([index]))),
        }
    }
    let mut chosen = Vec::with_capacity(count.min(corpus.windows.len()));
    while chosen.len() < count {
        let before = chosen.len();
        for (_, queue) in &mut queues {
            if chosen.len() < count {
                chosen.extend(queue.pop_front());
            }
        }
        if chosen.len() == before {
            break;
        }
    }
    chosen.sort_unstable();
    chosen
}

/// Whether two texts begin alike, as far as both are known.
fn same(a: &[u32], b: &[u32]) -> bool {
    a.iter().zip(b).all(|(a, b)| a == b)
}

/// Documents to measure on.
#[derive(Clone, Debug, Default)]
pub(crate) struct Part {
    pub windows: Vec<Window>,
    /// Their numbers among the documents of the text that score anything.
    pub documents: Vec<usize>,
    /// Their first tokens, by which another text's are recognised.
    pub beginnings: Vec<Vec<u32>>,
}

impl Part {
    /// Tokens of a document that are kept to know it by.
    const KNOWN_BY: usize = 48;

    /// The documents of these windows.
    pub(crate) fn new(corpus: &Corpus, chosen: &[usize]) -> Self {
        let windows: Vec<Window> =
            chosen.iter().map(|&index| corpus.windows[index].clone()).collect();
        let beginning = |window: &Window| window.ids.iter().copied().take(Self::KNOWN_BY).collect();
        Self {
            documents: windows.iter().map(|window| window.document).collect(),
            beginnings: windows.iter().map(beginning).collect(),
            windows,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::windows::Source;

    #[test]
    fn subsets_take_turns_and_what_is_taken_stays_out() {
        let subsets = [Some(0), Some(0), Some(0), Some(0), Some(1), None, Some(1)];
        let corpus = Corpus {
            windows: (0..7).map(|d| Window::whole(vec![1, d, 3], 2, d as usize)).collect(),
            documents: subsets.map(|subset| Source { subset }).to_vec(),
            ..Corpus::default()
        };
        assert_eq!(spread(&corpus, 4, &[]), [0, 1, 4, 5]);
        let part = Part::new(&corpus, &[0, 1]);
        assert_eq!((part.windows.len(), part.documents), (2, vec![0, 1]));
        assert_eq!(spread(&corpus, 5, &part.beginnings), [2, 3, 4, 5, 6]);
        assert_eq!(spread(&corpus, 99, &[]).len(), 7);
        // Measured with a longer window.
        assert_eq!(spread(&corpus, 99, &[vec![1, 6, 3, 4]]).len(), 6);
    }
}
