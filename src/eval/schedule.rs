//! Batches: which windows run together.
//!
//! Planned once over the whole corpus, before anything is divided among devices: windows sorted by
//! length, then cut. The batch is the unit of a task, so a division of labour cannot change which
//! windows are padded together.

use super::windows::Window;

/// A label that is not scored.
pub const MASKED: i64 = -100;

/// Indices of windows that run together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Indices into the corpus.
    pub windows: Vec<usize>,
    /// Length of the longest window.
    pub length: usize,
}

/// Cuts the windows into batches of `batch_size` of similar length. The longest come first: a
/// batch that does not fit in memory fails at once, and the runtime's arena is sized by its first
/// request.
pub fn plan(windows: &[Window], batch_size: usize) -> Vec<Batch> {
    let mut order: Vec<usize> = (0..windows.len()).collect();
    order.sort_by_key(|&index| (std::cmp::Reverse(windows[index].inputs), index));
    order
        .chunks(batch_size.max(1))
        .map(|chunk| Batch { windows: chunk.to_vec(), length: windows[chunk[0]].inputs })
        .collect()
}

/// One batch as row-major `[rows, length]` matrices, padded on the right.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Padded {
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub length: usize,
    /// Token ids; padding repeats the row's first token, which is in every vocabulary.
    pub ids: Vec<i64>,
    /// 1 on tokens, 0 on padding.
    pub mask: Vec<i64>,
    /// At each position the token that follows it, or [`MASKED`].
    pub labels: Vec<i64>,
}

impl Padded {
    /// Lays out the windows of `batch`. `rows` and `length` are at least those of the batch; a
    /// graph with fixed extents asks for more. Rows beyond the batch repeat its first row without
    /// labels, so that no row of the attention mask is empty.
    pub fn new(windows: &[Window], batch: &Batch, rows: usize, length: usize) -> Self {
        let (rows, length) = (rows.max(batch.windows.len()), length.max(batch.length));
        let mut padded = Self {
            rows,
            length,
            ids: Vec::with_capacity(rows * length),
            mask: Vec::with_capacity(rows * length),
            labels: vec![MASKED; rows * length],
        };
        for row in 0..rows {
            let index = batch.windows.get(row).or(batch.windows.first());
            let window = index.map(|&index| &windows[index]);
            let ids: &[u32] = window.map_or(&[], |window| &window.ids[..window.inputs]);
            let padding = length - ids.len();
            padded.ids.extend(ids.iter().map(|&id| i64::from(id)));
            padded
                .ids
                .extend(std::iter::repeat_n(ids.first().map_or(0, |&id| i64::from(id)), padding));
            padded.mask.extend(std::iter::repeat_n(1, ids.len()));
            padded.mask.extend(std::iter::repeat_n(0, padding));
            if let Some(window) = window.filter(|_| row < batch.windows.len()) {
                let labels = &mut padded.labels[row * length..];
                let following = window.ids.iter().enumerate().skip(window.first_scored.max(1));
                for (place, &id) in following {
                    labels[place - 1] = i64::from(id);
                }
            }
        }
        padded
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn window(length: u32) -> Window {
        Window::whole((100..100 + length).collect(), 0, 0)
    }

    #[test]
    fn batches_hold_every_window_once_and_neighbours_in_length() {
        let windows: Vec<_> = [5, 2, 9, 2, 7, 9, 3].into_iter().map(window).collect();
        let batches = plan(&windows, 3);
        let lengths: Vec<_> = batches.iter().map(|b| b.length).collect();
        assert_eq!(lengths, [9, 5, 2]);
        assert_eq!(batches[0].windows, [2, 5, 4]);
        let mut all: Vec<_> = batches.iter().flat_map(|b| b.windows.clone()).collect();
        all.sort_unstable();
        assert_eq!(all, [0, 1, 2, 3, 4, 5, 6]);
        assert_eq!(plan(&windows, 0).len(), 7);
        assert!(plan(&[], 8).is_empty());
    }

    #[test]
    fn labels_are_the_next_tokens_and_padding_is_masked() {
        let windows = [window(3), window(2)];
        let batch = &plan(&windows, 8)[0];
        let padded = Padded::new(&windows, batch, 0, 0);
        assert_eq!((padded.rows, padded.length), (2, 3));
        assert_eq!(padded.ids, [100, 101, 102, 100, 101, 100]);
        assert_eq!(padded.mask, [1, 1, 1, 1, 1, 0]);
        assert_eq!(padded.labels, [101, 102, MASKED, 101, MASKED, MASKED]);
    }

    #[test]
    fn fixed_extents_add_rows_and_columns_that_score_nothing() {
        let windows = [window(2)];
        let batch = &plan(&windows, 8)[0];
        let padded = Padded::new(&windows, batch, 2, 4);
        assert_eq!((padded.rows, padded.length), (2, 4));
        assert_eq!(padded.ids, [100, 101, 100, 100, 100, 101, 100, 100]);
        assert_eq!(padded.mask, [1, 1, 0, 0, 1, 1, 0, 0]);
        assert_eq!(padded.labels, [101, MASKED, MASKED, MASKED, MASKED, MASKED, MASKED, MASKED]);
    }
}
