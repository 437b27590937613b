//! How often the intervals cover the truth, by simulation.
//!
//! A population of documents with log-normal lengths is made token by token: losses of neighbouring
//! tokens correlate, a document has its own difficulty and its own sensitivity to quantisation
//! (skewed), and the variant's loss is the baseline's and a difference. Data sets are drawn from
//! it, so the truth is known exactly: the population's ratios.
//!
//! `MX_COVERAGE=documents,sigma,data sets` prints the table for another setting and asserts nothing.

use super::bootstrap::{Draws, interval, tails};
use super::table::{FIXED, Mean, Table, documents};
use super::{Bootstrap, Sample};
use crate::eval::metrics::{Against, DocumentScore};
use chacha20::ChaCha8Rng;
use rand_core::{Rng, SeedableRng};
use rayon::prelude::*;

const POPULATION: usize = 20_000;
const RESAMPLES: usize = 999;
const CHECKED: [Mean; 5] =
    [Mean::Xent, Mean::DeltaXent, Mean::DeltaBitsPerByte, Mean::Kl, Mean::Agreement];

pub(super) struct Source(ChaCha8Rng);

impl Source {
    pub fn new(seed: u64) -> Self {
        Self(ChaCha8Rng::seed_from_u64(seed))
    }

    /// In (0, 1).
    pub fn uniform(&mut self) -> f64 {
        ((self.0.next_u64() >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    }

    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * self.uniform().ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.uniform() * n as f64) as usize
    }
}

/// A document of log-normal length around 300 tokens.
pub(super) fn document(source: &mut Source, sigma: f64) -> DocumentScore {
    let log = sigma * source.normal();
    let tokens = (300.0 * log.exp()).round().max(2.0);
    let difficulty = 3.2 + 0.5 * source.normal() - 0.15 * log;
    let sensitivity = (0.6 * source.normal()).exp();
    let shift = 0.03 * sensitivity + 0.01 * source.normal();
    let agreement = 1.0 / (1.0 + (-2.5 + 0.6 * sensitivity.ln()).exp());
    let mut score = DocumentScore { tokens: tokens as u64, ..DocumentScore::default() };
    let mut against = Against::default();
    let (mut base, mut change) = (0.0, 0.0);
    for _ in 0..score.tokens {
        // Correlation 0.3 from token to token.
        base = 0.3 * base + 1.9 * source.normal();
        change = 0.3 * change + 0.19 * source.normal();
        let nll = (difficulty + base).max(0.0);
        against.nll += nll;
        score.nll += nll + shift + change;
        against.kl += 0.03 * sensitivity * -source.uniform().ln();
        against.agree += u64::from(source.uniform() < agreement);
    }
    score.bytes = (tokens * 4.2 * (0.15 * source.normal()).exp()).round() as u64;
    DocumentScore { against: Some(against), ..score }
}

pub(super) fn table(scores: &[DocumentScore]) -> Table {
    let sample = Sample { documents: scores, subset: &[], names: &[], kl: &[] };
    let (pairing, documents) = documents(&sample, None);
    Table::new(&documents, pairing).unwrap()
}

/// By bisection.
fn normal_quantile(p: f64) -> f64 {
    let (mut low, mut high) = (-6.0, 6.0);
    for _ in 0..60 {
        let middle = 0.5 * (low + high);
        if normal_distribution(middle) < p { low = middle } else { high = middle }
    }
    0.5 * (low + high)
}

/// By Marsaglia's series (Journal of Statistical Software 11, 2004).
fn normal_distribution(x: f64) -> f64 {
    let x = x.clamp(-6.0, 6.0);
    let (mut sum, mut term, mut i) = (x, x, 1.0);
    while term != 0.0 && f64::abs(term) > 1e-17 * f64::abs(sum) {
        i += 2.0;
        term *= x * x / i;
        sum += term;
    }
    0.5 + sum * (-0.5 * x * x).exp() / std::f64::consts::TAU.sqrt()
}

const METHODS: [&str; 6] = [
    "normal",
    "percentile",
    "basic",
    "BCa",
    "bootstrap-t, linearised se",
    "bootstrap-t, jackknife se",
];

/// The interval by each of [`METHODS`].
fn intervals(table: &Table, draws: &Draws, mean: Mean) -> [(f64, f64); METHODS.len()] {
    let index = mean as usize;
    let value = table.values[index];
    let pairs = || draws.pairs.iter().skip(index).step_by(draws.means);
    let distances: Vec<f64> = pairs().map(|pair| pair[0]).collect();
    let (low, high) = tails(distances.clone());
    let residuals = || table.rows.iter().skip(FIXED + 3 * index).step_by(table.stride());
    let squares: f64 = residuals().map(|e| e * e).sum();
    let total = if mean.by_byte() { table.bytes } else { table.tokens } as f64;
    let error = squares.sqrt() / total;
    let acceleration = residuals().map(|e| e.powi(3)).sum::<f64>() / (6.0 * squares.powf(1.5));
    let below = distances.iter().filter(|d| **d < 0.0).count() as f64 / distances.len() as f64;
    let bias = normal_quantile(below);
    let mut sorted = distances;
    sorted.sort_unstable_by(f64::total_cmp);
    let bca = |p: f64| {
        let z = bias + normal_quantile(p);
        let rank = normal_distribution(bias + z / (1.0 - acceleration * z)) * 1000.0;
        value + sorted[(rank.round() as usize).clamp(1, sorted.len()) - 1]
    };
    [
        (value - 1.96 * error, value + 1.96 * error),
        (value + low, value + high),
        (value - high, value - low),
        (bca(0.025), bca(0.975)),
        interval(pairs(), value, error),
        draws.intervals(&table.values, &table.spread)[index].unwrap(),
    ]
}

/// Misses below and above, and summed width, by method and mean.
type Tally = [[(usize, usize, f64); CHECKED.len()]; METHODS.len()];

fn simulate(count: usize, sigma: f64, sets: usize) -> Tally {
    let mut source = Source::new(20);
    let population: Vec<_> = (0..POPULATION).map(|_| document(&mut source, sigma)).collect();
    let truth = table(&population).values;
    let done: Vec<_> = (0..sets as u64)
        .into_par_iter()
        .map(|set| {
            let mut source = Source::new(1 << 32 | set);
            let scores: Vec<_> = (0..count).map(|_| population[source.below(POPULATION)]).collect();
            let table = table(&scores);
            let draws = Draws::new(&table, Bootstrap { seed: set, resamples: RESAMPLES }, "");
            CHECKED.map(|mean| intervals(&table, &draws, mean))
        })
        .collect();
    let mut tally = Tally::default();
    for (position, mean) in CHECKED.into_iter().enumerate() {
        for (method, tally) in tally.iter_mut().enumerate() {
            let (below, above, width) = &mut tally[position];
            for (low, high) in done.iter().map(|set| set[position][method]) {
                *above += usize::from(truth[mean as usize] > high);
                *below += usize::from(truth[mean as usize] < low);
                *width += (high - low) / sets as f64;
            }
        }
    }
    print(count, sigma, sets, &tally);
    tally
}

#[allow(clippy::print_stdout)]
fn print(count: usize, sigma: f64, sets: usize, tally: &Tally) {
    println!("{count} documents, sigma {sigma}, {sets} data sets: coverage % (truth below, above)");
    print!("| method |");
    CHECKED.iter().for_each(|mean| print!(" {mean:?} |"));
    println!();
    for (method, tally) in METHODS.iter().zip(tally) {
        print!("| {method} |");
        for &(below, above, _) in tally {
            let share = |count: usize| 100.0 * count as f64 / sets as f64;
            let covered = 100.0 - share(below + above);
            print!(" {covered:.1} ({:.1}, {:.1}) |", share(below), share(above));
        }
        println!();
    }
}

fn covered(tally: &Tally, sets: usize) -> Vec<(Mean, f64)> {
    let ours = tally.last().unwrap();
    let share = |&(below, above, _): &(usize, usize, f64)| (below + above) as f64 / sets as f64;
    CHECKED.into_iter().zip(ours.iter().map(|miss| 100.0 * (1.0 - share(miss)))).collect()
}

#[test]
fn intervals_of_200_documents_cover_93_to_97_percent() {
    if let Ok(setting) = std::env::var("MX_COVERAGE") {
        let numbers: Vec<f64> = setting.split(',').map(|part| part.parse().unwrap()).collect();
        simulate(numbers[0] as usize, numbers[1], numbers[2] as usize);
        return;
    }
    for (mean, covered) in covered(&simulate(200, 0.8, 2_000), 2_000) {
        assert!((93.0..=97.0).contains(&covered), "{mean:?}: {covered} %");
    }
}

#[test]
fn intervals_of_the_fewest_documents_still_cover() {
    // The standard error of a coverage is 0.7 points here.
    for (mean, covered) in covered(&simulate(super::MIN_DOCUMENTS, 0.8, 1_000), 1_000) {
        assert!((91.0..=98.0).contains(&covered), "{mean:?}: {covered} %");
    }
}

/// 12 subsets of 3 to 14 documents.
#[test]
#[allow(clippy::print_stdout)]
fn the_interval_of_a_macro_average_covers() {
    let mut source = Source::new(30);
    let sizes: Vec<usize> = (3..15).collect();
    let subsets: Vec<Vec<_>> =
        sizes.iter().map(|_| (0..1_000).map(|_| document(&mut source, 0.8)).collect()).collect();
    let truth: Vec<_> = subsets.iter().map(|subset| table(subset)).collect();
    let truth = Table::mean_of(truth.iter()).unwrap().values;
    let names: Vec<String> = sizes.iter().map(|size| format!("{size:02}")).collect();
    let subset: Vec<_> =
        sizes.iter().enumerate().flat_map(|(i, &size)| vec![Some(i); size]).collect();
    let sets = 500;
    let missed: usize = (0..sets)
        .into_par_iter()
        .map(|set| {
            let mut source = Source::new(2 << 32 | set);
            let scores: Vec<_> = subset
                .iter()
                .flatten()
                .map(|&subset| subsets[subset][source.below(1_000)])
                .collect();
            let sample = Sample { documents: &scores, subset: &subset, names: &names, kl: &[] };
            let bootstrap = Bootstrap { seed: set, resamples: RESAMPLES };
            let statistics = super::statistics(&sample, None, bootstrap, "document").unwrap();
            let delta = statistics.macro_average.unwrap().versus.unwrap().delta_xent;
            let truth = truth[Mean::DeltaXent as usize];
            usize::from(!(delta.low.unwrap()..=delta.high.unwrap()).contains(&truth))
        })
        .sum();
    let covered = 100.0 * (1.0 - missed as f64 / sets as f64);
    println!("macro average of {} subsets: {covered:.1} %", sizes.len());
    assert!((92.0..=99.0).contains(&covered), "{covered} %");
}
