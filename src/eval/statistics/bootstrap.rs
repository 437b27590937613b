//! The studentised bootstrap of ratios.

use super::Bootstrap;
use super::table::{FIXED, MEANS, Mean, Table, Values};
use chacha20::ChaCha8Rng;
use rand_core::{Rng, SeedableRng};
use rayon::prelude::*;
use sha2::{Digest, Sha256};

/// Tail of a 95 % interval.
const TAIL: f64 = 0.025;

/// Resamples that a thread takes at a time.
const BLOCK: usize = 64;

/// Share of resamples without any spread beyond which a studentised end rests on nothing.
const WITHOUT_SPREAD: f64 = TAIL / 10.0;

/// Lower and upper ends, where there are any.
pub(super) type Ends = [Option<(f64, f64)>; MEANS];

/// By resample and mean: the ratio's distance from the sample's, and the resample's own estimate of
/// its variance.
#[derive(Clone, Debug)]
pub(super) struct Draws {
    pub means: usize,
    pub pairs: Vec<[f64; 2]>,
}

impl Draws {
    /// Resamples the documents of `table` with replacement.
    ///
    /// The key of the generator is made of the seed and `name`, so that a subset's interval depends
    /// on no other subset; its stream is the number of the resample, so that it depends on no
    /// thread.
    pub fn new(table: &Table, bootstrap: Bootstrap, name: &str) -> Self {
        let means = table.means();
        let hash = Sha256::new()
            .chain_update(b"mxeval bootstrap")
            .chain_update(bootstrap.seed.to_le_bytes())
            .chain_update(name.as_bytes())
            .finalize();
        let mut key = [0; 32];
        key.copy_from_slice(&hash);
        let mut pairs = vec![[0.0; 2]; bootstrap.resamples * means];
        pairs.par_chunks_mut(BLOCK * means).enumerate().for_each(|(block, pairs)| {
            let mut sums = vec![0.0; table.stride()];
            for (index, pairs) in pairs.chunks_exact_mut(means).enumerate() {
                let mut generator = ChaCha8Rng::from_seed(key);
                generator.set_stream((block * BLOCK + index) as u64);
                resample(table, &mut generator, &mut sums);
                studentise(&sums, pairs);
            }
        });
        Self { means, pairs }
    }

    /// Adds another set's draws, made independently.
    pub fn add(&mut self, other: &Self) {
        for (pair, other) in self.pairs.iter_mut().zip(&other.pairs) {
            pair[0] += other[0];
            pair[1] += other[1];
        }
    }

    /// The draws of `factor` times what is drawn.
    pub fn scaled(&self, factor: f64) -> Self {
        let pairs = self.pairs.iter().map(|[d, v]| [d * factor, v * factor * factor]).collect();
        Self { means: self.means, pairs }
    }

    /// The interval of each mean.
    pub fn intervals(&self, values: &Values, errors: &Values) -> Ends {
        let mut ends = [None; MEANS];
        for (index, mean) in Mean::ALL.into_iter().enumerate().take(self.means) {
            let (value, error) = (values[index], errors[index]);
            if value.is_finite() && error.is_finite() {
                let draws = self.pairs.iter().skip(index).step_by(self.means);
                ends[index] = Some(clip(mean, value, interval(draws, value, error)));
            }
        }
        ends
    }
}

/// The interval that the draws of one mean give.
pub(super) fn interval<'a>(
    draws: impl Iterator<Item = &'a [f64; 2]> + Clone,
    value: f64,
    error: f64,
) -> (f64, f64) {
    if error == 0.0 {
        return (value, value);
    }
    let flat = |variance: f64| variance <= 1e-10 * error * error;
    let count = draws.clone().count() as f64;
    let without = draws.clone().filter(|[_, variance]| flat(*variance)).count() as f64;
    if without > WITHOUT_SPREAD * count {
        // Nearly all documents are alike, so many resamples have no variance to divide by.
        let (low, high) = tails(draws.map(|[distance, _]| *distance).collect());
        return (value + low, value + high);
    }
    let t = |&[distance, variance]: &[f64; 2]| match flat(variance) {
        true if distance == 0.0 => 0.0,
        true => f64::INFINITY.copysign(distance),
        false => distance / variance.sqrt(),
    };
    let (low, high) = tails(draws.map(t).collect());
    (value - high * error, value - low * error)
}

/// The [`TAIL`] quantiles: of B values those of rank TAIL (B + 1) from either end.
pub(super) fn tails(mut values: Vec<f64>) -> (f64, f64) {
    let rank = (TAIL * (values.len() + 1) as f64).round() as usize;
    let index = rank.saturating_sub(1).min(values.len().saturating_sub(1));
    let opposite = values.len().saturating_sub(1) - index;
    let low = *values.select_nth_unstable_by(index, f64::total_cmp).1;
    let high = *values.select_nth_unstable_by(opposite, f64::total_cmp).1;
    (low, high)
}

/// Keeps an interval where the mean can lie, and the value inside.
fn clip(mean: Mean, value: f64, (low, high): (f64, f64)) -> (f64, f64) {
    let (least, most) = mean.range();
    (low.max(least).min(value), high.min(most).max(value))
}

/// Adds up as many rows as there are, each drawn from all.
fn resample(table: &Table, generator: &mut ChaCha8Rng, sums: &mut [f64]) {
    sums.fill(0.0);
    let (stride, count) = (table.stride(), table.documents);
    for _ in 0..count {
        // Multiply and shift: the same index on every platform.
        let index = ((u128::from(generator.next_u64()) * count as u128) >> 64) as usize;
        for (sum, value) in sums.iter_mut().zip(&table.rows[index * stride..][..stride]) {
            *sum += value;
        }
    }
}

/// Distance and linearised variance of each ratio in a resample: with residuals e of the sample,
/// d = sum e / sum x and the sum of (e - d x)^2 over (sum x)^2.
fn studentise(sums: &[f64], pairs: &mut [[f64; 2]]) {
    for ((mean, pair), columns) in
        Mean::ALL.into_iter().zip(pairs).zip(sums[FIXED..].chunks_exact(3))
    {
        let unit = usize::from(mean.by_byte());
        let (x, xx) = (sums[unit], sums[2 + unit]);
        // A resample without a byte says nothing about bits a byte.
        if x > 0.0 {
            let d = columns[0] / x;
            let squares = columns[1] - 2.0 * d * columns[2] + d * d * xx;
            *pair = [d, squares.max(0.0) / (x * x)];
        }
    }
}
