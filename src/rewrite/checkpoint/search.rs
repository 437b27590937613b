//! A graph's weight put together from lines of the checkpoint, every value compared.

use super::{
    index::{Index, Line, line_key, row_keys},
    matrix::{FloatKind, Matrix, equal},
};
use crate::{onnx, rewrite::weights::Rows};

/// Values of one comparison.
const TILE_VALUES: usize = 1 << 18;

/// Most runs that a weight is put together from: heads that an exporter reordered.
const MOST_RUNS: usize = 4096;

/// Rows of a weight that are consecutive, or every second, lines of one matrix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Run {
    /// The line of its first row.
    pub first: Line,
    /// From one row's line to the next one's.
    pub step: usize,
    /// Rows.
    pub count: usize,
}

impl Run {
    /// Whether it is all of the matrix.
    fn is_whole(&self, matrices: &[Matrix]) -> bool {
        let (lines, _) = matrices[self.first.matrix].lines(self.first.columns);
        self.first.line == 0 && self.step == 1 && self.count == lines
    }
}

/// A weight as runs, in the order of its rows; of each all equal ones, more than one where the
/// checkpoint holds the same values several times.
pub(super) type Assembly = Vec<Vec<Run>>;

/// A weight of the graph, what it is compared with, and where.
pub(super) struct Search<'a> {
    pub matrices: &'a [Matrix],
    pub rows: &'a Rows,
    pub target: FloatKind,
}

impl Search<'_> {
    /// The runs that make the weight up, by the lines in `index`; `None` when a row is not found.
    pub fn assemble(&self, index: &Index) -> Result<Option<Assembly>, onnx::Error> {
        let mut assembly = Assembly::new();
        let mut row = 0;
        while row < self.rows.n {
            let key = row_keys(self.rows, row, 1)?.first().copied().unwrap_or_default();
            let mut best: Vec<Run> = Vec::new();
            for &line in index.get(key) {
                let Some(run) = self.run(row, line)? else { continue };
                let longest = best.first().map_or(0, |best| best.count);
                if run.count > longest {
                    best.clear();
                }
                // The rows and the columns of a symmetric matrix are the same ones.
                let known = best.iter().any(|best| best.first.matrix == run.first.matrix);
                if run.count >= longest && !known {
                    best.push(run);
                }
            }
            if best.iter().any(|run| run.is_whole(self.matrices)) {
                best.retain(|run| run.is_whole(self.matrices));
            }
            let Some(run) = best.first() else { return Ok(None) };
            row += run.count;
            assembly.push(best);
            if assembly.len() > MOST_RUNS {
                return Ok(None);
            }
        }
        Ok(Some(assembly))
    }

    /// The longest run from `row` on that begins with `line`.
    fn run(&self, row: usize, line: Line) -> Result<Option<Run>, onnx::Error> {
        let (lines, length) = self.matrices[line.matrix].lines(line.columns);
        if length != self.rows.k {
            return Ok(None);
        }
        let mut best: Option<Run> = None;
        for step in [1, 2] {
            let most = ((lines - line.line).div_ceil(step)).min(self.rows.n - row);
            let next = Line { line: line.line + step, ..line };
            let goes_on = most > 1 && self.may_be(row + 1, next)?;
            if step > 1 && !goes_on {
                continue;
            }
            let count = self.equal_rows(row, line, step, if goes_on { most } else { 1 })?;
            if count > best.as_ref().map_or(0, |run| run.count) {
                best = Some(Run { first: line, step, count });
            }
            if count > 1 {
                break;
            }
        }
        Ok(best)
    }

    fn may_be(&self, row: usize, line: Line) -> Result<bool, onnx::Error> {
        let key = line_key(&self.matrices[line.matrix], line, self.target);
        Ok(row_keys(self.rows, row, 1)?.first() == Some(&key))
    }

    /// How many of the `most` rows from `row` on are equal to their lines, value by value.
    fn equal_rows(
        &self,
        row: usize,
        line: Line,
        step: usize,
        most: usize,
    ) -> Result<usize, onnx::Error> {
        let (matrix, k) = (&self.matrices[line.matrix], self.rows.k);
        let tile = (TILE_VALUES / k).clamp(64, 1024).min(most);
        let (mut ours, mut theirs) = (vec![0.0; tile * k], vec![0.0; tile * k]);
        for done in (0..most).step_by(tile) {
            let count = tile.min(most - done);
            let (ours, theirs) = (&mut ours[..count * k], &mut theirs[..count * k]);
            self.rows.read(row + done, ours)?;
            matrix.read(line.columns, (line.line + done * step, step), self.target, theirs);
            let mut pairs = ours.chunks(k).zip(theirs.chunks(k));
            if let Some(at) = pairs.position(|(ours, theirs)| !equal(ours, theirs)) {
                return Ok(done + at);
            }
        }
        Ok(most)
    }
}
