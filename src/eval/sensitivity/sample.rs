//! Which documents are measured on, and which are left for later.

use crate::eval::windows::{Corpus, Window};
use std::collections::VecDeque;

/// Indices of the windows of `count` documents, in the order of the text: subsets take turns, each
/// with its earliest documents, so that a text that is sorted by subset is not sampled from its first
/// subset alone. `taken` are documents that do not count.
pub(crate) fn spread(corpus: &Corpus, count: usize, taken: &[usize]) -> Vec<usize> {
    let mut queues: Vec<(Option<usize>, VecDeque<usize>)> = Vec::new();
    for (index, window) in corpus.windows.iter().enumerate() {
        if taken.contains(&window.document) {
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

/// The windows themselves, and the documents they are of.
pub(crate) fn windows(corpus: &Corpus, chosen: &[usize]) -> (Vec<Window>, Vec<usize>) {
    let windows: Vec<Window> = chosen.iter().map(|&index| corpus.windows[index].clone()).collect();
    let documents = windows.iter().map(|window| window.document).collect();
    (windows, documents)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::windows::Source;

    #[test]
    fn subsets_take_turns_and_what_is_taken_stays_out() {
        let subsets = [Some(0), Some(0), Some(0), Some(0), Some(1), None, Some(1)];
        let corpus = Corpus {
            windows: (0..7).map(|d| Window::whole(vec![1, 2, 3], 2, d)).collect(),
            documents: subsets.map(|subset| Source { subset }).to_vec(),
            ..Corpus::default()
        };
        assert_eq!(spread(&corpus, 4, &[]), [0, 1, 4, 5]);
        assert_eq!(spread(&corpus, 5, &[0, 1]), [2, 3, 4, 5, 6]);
        assert_eq!(spread(&corpus, 99, &[]).len(), 7);
        let (windows, documents) = windows(&corpus, &[1, 4]);
        assert_eq!((windows.len(), documents), (2, vec![1, 4]));
    }
}
