//! Where a line of a weight may be in the checkpoint, by a few of its values.
//!
//! A line's key is a hash of [`PROBES`] of its values at fixed places. Equal lines have equal keys;
//! what has the same key is compared whole before it is believed.

use std::collections::HashSet;

use rayon::prelude::*;

use super::matrix::{FloatKind, Matrix, bits};
use crate::{onnx, rewrite::weights::Rows};

/// Values of a line that its key is made of.
pub(super) const PROBES: usize = 16;

/// Most lines of one key that are looked at: a checkpoint of zeros has millions.
const MOST: usize = 64;

/// A line of a matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Line {
    /// Which of the checkpoint's matrices.
    pub matrix: usize,
    /// A column of it, not a row.
    pub columns: bool,
    /// Its number.
    pub line: usize,
}

/// Lines by key: sorted by it, those of one key in the checkpoint's order.
#[derive(Debug)]
pub(super) struct Index(Vec<(u64, Line)>);

/// The places that a key of `length` values looks at, spread evenly.
pub(super) fn places(length: usize) -> [usize; PROBES] {
    std::array::from_fn(|i| {
        (((2 * i + 1) as u128 * length as u128) / (2 * PROBES) as u128) as usize
    })
}

fn key(length: usize, values: impl Iterator<Item = f32>) -> u64 {
    // Multiply and rotate, with a finish that spreads to all bits; any mixing would do.
    let mix =
        |hash: u64, word: u64| (hash.rotate_left(5) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let hash = values.fold(mix(0, length as u64), |hash, value| mix(hash, bits(value).into()));
    hash ^ hash >> 29
}

/// The key of a checkpoint's line, its values rounded to the graph's type.
pub(super) fn line_key(matrix: &Matrix, line: Line, target: FloatKind) -> u64 {
    let (_, length) = matrix.lines(line.columns);
    let value = |at| matrix.at_line(line.columns, line.line, at, target);
    key(length, places(length).into_iter().map(value))
}

/// The keys of the rows `first .. first + count` of a graph's weight.
pub(super) fn row_keys(rows: &Rows, first: usize, count: usize) -> Result<Vec<u64>, onnx::Error> {
    let mut columns = Vec::with_capacity(PROBES);
    for place in places(rows.k) {
        let mut column = vec![0.0; count];
        rows.column(place, first, &mut column)?;
        columns.push(column);
    }
    Ok((0..count).map(|row| key(rows.k, columns.iter().map(|column| column[row]))).collect())
}

impl Index {
    /// The lines at which a weight is likely to begin: the first and the second (interleaved pairs),
    /// and those that halve a matrix or cut it in three.
    pub fn of_anchors(matrices: &[Matrix], lengths: &HashSet<usize>, target: FloatKind) -> Self {
        let anchors = |lines: usize| {
            let mut anchors = vec![0, 1, lines / 3, lines / 2, 2 * (lines / 3)];
            anchors.retain(|&line| line < lines);
            anchors.sort_unstable();
            anchors.dedup();
            anchors
        };
        Self::collect(matrices, lengths, target, anchors, |_| true)
    }

    /// Every line whose key is one of `wanted`.
    pub fn of_lines(
        matrices: &[Matrix],
        lengths: &HashSet<usize>,
        target: FloatKind,
        wanted: &HashSet<u64>,
    ) -> Self {
        let all = |lines: usize| (0..lines).collect();
        Self::collect(matrices, lengths, target, all, |key| wanted.contains(&key))
    }

    fn collect(
        matrices: &[Matrix],
        lengths: &HashSet<usize>,
        target: FloatKind,
        choose: impl Fn(usize) -> Vec<usize> + Sync,
        keep: impl Fn(u64) -> bool + Sync,
    ) -> Self {
        let of_matrix = |(number, matrix): (usize, &Matrix)| {
            let mut found = Vec::new();
            for columns in [false, true] {
                let (lines, length) = matrix.lines(columns);
                if columns && !matrix.has_columns() || !lengths.contains(&length) {
                    continue;
                }
                let lines =
                    choose(lines).into_iter().map(|line| Line { matrix: number, columns, line });
                let keyed = lines.map(|line| (line_key(matrix, line, target), line));
                found.extend(keyed.filter(|&(key, _)| keep(key)));
            }
            onnx::release(matrix.bytes());
            found
        };
        let found: Vec<_> = matrices.par_iter().enumerate().map(of_matrix).collect();
        let mut lines: Vec<(u64, Line)> = Vec::with_capacity(found.iter().map(Vec::len).sum());
        lines.extend(found.into_iter().flatten());
        lines.par_sort_by_key(|&(key, _)| key);
        Self(lines)
    }

    /// Lines that may be the one with this key, in the checkpoint's order.
    pub fn get(&self, key: u64) -> impl Iterator<Item = Line> {
        let from = &self.0[self.0.partition_point(|&(other, _)| other < key)..];
        from.iter().take_while(move |&&(other, _)| other == key).take(MOST).map(|&(_, line)| line)
    }
}
