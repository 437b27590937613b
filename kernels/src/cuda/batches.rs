//! Broadcasting: lists of pairs of matrices as few launches of many products.

use super::params::Batches;

/// Products that follow one another in Y and whose matrices lie at even distances.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    /// First product, and how many.
    pub first: usize,
    pub count: usize,
    /// First matrix of A, and how many from there to the last.
    pub a: (usize, usize),
    /// First matrix of B, and how many from there to the last.
    pub b: (usize, usize),
    pub batches: Batches,
}

/// Divides the list into runs of at most `most` products and matrices. Pairs made by broadcasting
/// take one run per `most` of them where at most four dimensions are left after merging.
pub(super) fn runs(pairs: &[(usize, usize)], most: usize) -> Vec<Run> {
    let mut runs = Vec::new();
    let mut first = 0;
    while first < pairs.len() {
        let run = longest(pairs, first, most.max(1));
        first += run.count;
        runs.push(run);
    }
    runs
}

/// The longest run from `first` on: innermost dimension first, each as long as the pattern holds.
fn longest(pairs: &[(usize, usize)], first: usize, most: usize) -> Run {
    let (a0, b0) = pairs[first];
    let rest = &pairs[first..];
    let mut run = Run {
        first,
        count: 1,
        a: (a0, 1),
        b: (b0, 1),
        batches: Batches { dims: [1; 4], a: [0; 4], b: [0; 4] },
    };
    for dim in (0..4).rev() {
        let size = run.count;
        let Some(&(a1, b1)) = rest.get(size) else { break };
        let (Some(a_step), Some(b_step)) = (a1.checked_sub(a0), b1.checked_sub(b0)) else { break };
        // How often the pattern may repeat before a limit is met.
        let room = |have: usize, step: usize| match step {
            0 => usize::MAX,
            _ => (most.saturating_sub(have)) / step,
        };
        let times = (most / size)
            .min(room(run.a.1, a_step).saturating_add(1))
            .min(room(run.b.1, b_step).saturating_add(1));
        let repeats = |t: usize| {
            let Some(chunk) = rest.get(t * size..(t + 1) * size) else { return false };
            chunk.iter().zip(rest).all(|(&(a, b), &(a_like, b_like))| {
                a.checked_sub(a_like) == Some(t * a_step)
                    && b.checked_sub(b_like) == Some(t * b_step)
            })
        };
        let long = (1..times).take_while(|&t| repeats(t)).count() + 1;
        if long == 1 {
            break;
        }
        run.batches.dims[dim] = long as i32;
        run.batches.a[dim] = a_step as i32;
        run.batches.b[dim] = b_step as i32;
        run.count *= long;
        run.a.1 += (long - 1) * a_step;
        run.b.1 += (long - 1) * b_step;
    }
    run
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernels make of a run.
    fn pairs_of(run: &Run) -> Vec<(usize, usize)> {
        let of = |index: usize| {
            let (mut rest, mut a, mut b) = (index as i32, run.a.0 as i32, run.b.0 as i32);
            for d in (0..4).rev() {
                let i = rest % run.batches.dims[d];
                rest /= run.batches.dims[d];
                a += i * run.batches.a[d];
                b += i * run.batches.b[d];
            }
            (a as usize, b as usize)
        };
        (0..run.count).map(of).collect()
    }

    /// Pairs of broadcasting over dimensions (a has it, b has it, extent), outermost first.
    fn broadcast(dims: &[(bool, bool, usize)]) -> Vec<(usize, usize)> {
        let mut pairs = vec![(0, 0)];
        for &(a, b, n) in dims {
            let of = |old: usize, has: bool, i: usize| if has { old * n + i } else { old };
            pairs = pairs
                .iter()
                .flat_map(|&(i, j)| (0..n).map(move |t| (of(i, a, t), of(j, b, t))))
                .collect();
        }
        pairs
    }

    fn check(pairs: &[(usize, usize)], most: usize) -> usize {
        let runs = runs(pairs, most);
        let mut all = Vec::new();
        for run in &runs {
            assert_eq!(run.first, all.len());
            let these = pairs_of(run);
            assert!(run.count <= most && run.a.1 <= most && run.b.1 <= most, "{run:?}");
            for &(a, b) in &these {
                assert!((run.a.0..run.a.0 + run.a.1).contains(&a), "{run:?}");
                assert!((run.b.0..run.b.0 + run.b.1).contains(&b), "{run:?}");
            }
            all.extend(these);
        }
        assert_eq!(all, pairs);
        runs.len()
    }

    #[test]
    fn broadcasting_takes_one_run() {
        let (t, f) = (true, false);
        for dims in [
            vec![(t, t, 1)],
            vec![(t, t, 5), (t, t, 3)],
            vec![(t, f, 4)],
            vec![(f, t, 4), (t, f, 3)],
            vec![(t, t, 2), (t, f, 3), (t, t, 4)],
            vec![(t, f, 2), (f, t, 3), (t, f, 2), (f, t, 5)],
            vec![(t, t, 2), (t, t, 2), (t, f, 3), (t, f, 2), (t, t, 2)],
        ] {
            assert_eq!(check(&broadcast(&dims), 1000), 1, "{dims:?}");
        }
        assert_eq!(check(&[], 10), 0);
    }

    #[test]
    fn more_than_four_dimensions_and_limits_take_several() {
        let (t, f) = (true, false);
        let five = [(t, f, 3), (f, t, 2), (t, f, 2), (f, t, 2), (t, f, 2)];
        assert_eq!(check(&broadcast(&five), 1000), 3);
        assert_eq!(check(&broadcast(&[(t, t, 100)]), 32), 4);
        let grouped = broadcast(&[(t, t, 10), (t, f, 3)]);
        for most in [1, 2, 3, 4, 7, 16, 30] {
            check(&grouped, most);
        }
    }

    #[test]
    fn any_list_is_reproduced() {
        let mut state = 1_u64;
        for most in [1, 3, 1000] {
            for len in [1, 2, 10, 100] {
                let mut next = || {
                    state = state.wrapping_mul(6364136223846793005).wrapping_add(1);
                    (state >> 60) as usize
                };
                let pairs: Vec<_> = (0..len).map(|_| (next(), next())).collect();
                check(&pairs, most);
            }
        }
    }
}
