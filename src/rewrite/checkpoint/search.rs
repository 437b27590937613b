//! A graph's weight put together from lines of the checkpoint, every value compared.

use super::{
    index::{Index, Line, line_key, row_keys},
    matrix::{FloatKind, Matrix, equal, is_one_value},
};
use crate::{onnx, rewrite::weights::Rows};

/// Values of one comparison, unless a single row has more.
const TILE_VALUES: usize = 1 << 20;

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

    /// Whether the two have a line in common.
    fn overlaps(&self, other: &Self) -> bool {
        let (a, b) = (self.first, other.first);
        if (a.matrix, a.columns) != (b.matrix, b.columns) {
            return false;
        }
        // Steps are 1 or 2: lines in common begin with the later first one, or with the next.
        let from = a.line.max(b.line);
        (from..from + 2).any(|line| self.has(line) && other.has(line))
    }

    fn has(&self, line: usize) -> bool {
        let after = line.checked_sub(self.first.line);
        after.is_some_and(|after| after % self.step == 0 && after / self.step < self.count)
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
    /// The runs that make the weight up, by the lines in `index`; `None` when a row is not found. Every
    /// row is a line of its own: what repeats lines of a parameter is not that parameter.
    pub fn assemble(&self, index: &Index) -> Result<Option<Assembly>, onnx::Error> {
        let mut assembly = Assembly::new();
        let mut row = 0;
        while row < self.rows.n {
            let key = row_keys(self.rows, row, 1)?.first().copied().unwrap_or_default();
            let mut best: Vec<Run> = Vec::new();
            for line in index.get(key) {
                let Some(run) = self.run(row, line)? else { continue };
                if assembly.iter().filter_map(|runs| runs.first()).any(|used| used.overlaps(&run)) {
                    continue;
                }
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

    /// The longest run from `row` on that begins with `line`. Rows of one repeated value, such as zeros,
    /// are in every checkpoint; a run of nothing else says nothing and is none.
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
            let (count, telling) =
                self.equal_rows(row, line, step, if goes_on { most } else { 1 })?;
            if telling && count > best.as_ref().map_or(0, |run| run.count) {
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

    /// How many of the `most` rows from `row` on are equal to their lines, value by value, and whether
    /// one of them has two values.
    fn equal_rows(
        &self,
        row: usize,
        line: Line,
        step: usize,
        most: usize,
    ) -> Result<(usize, bool), onnx::Error> {
        let (matrix, k) = (&self.matrices[line.matrix], self.rows.k);
        let tile = (TILE_VALUES / k).clamp(1, 1024).min(most);
        let (mut ours, mut theirs) = (vec![0.0; tile * k], vec![0.0; tile * k]);
        let mut telling = false;
        for done in (0..most).step_by(tile) {
            let count = tile.min(most - done);
            let (ours, theirs) = (&mut ours[..count * k], &mut theirs[..count * k]);
            self.rows.read(row + done, ours)?;
            matrix.read(line.columns, (line.line + done * step, step), self.target, theirs);
            let mut pairs = ours.chunks(k).zip(theirs.chunks(k));
            let differs = pairs.position(|(ours, theirs)| !equal(ours, theirs));
            let mut alike = ours.chunks(k).take(differs.unwrap_or(count));
            telling = telling || alike.any(|row| !is_one_value(row));
            if let Some(at) = differs {
                return Ok((done + at, telling));
            }
        }
        Ok((most, telling))
    }
}
