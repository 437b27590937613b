//! `token_scores` on rows that come from memory, and its share of the memory's read bandwidth.
//!
//! `cargo bench -p mx-kernels --bench scores -- [FILTER]`, a filter such as `f16/.*/threads=1`. The
//! environment variables are those of `common`.
#![allow(clippy::print_stdout)]

mod common;

use std::{cell::Cell, hint::black_box};

use criterion::{Criterion, SamplingMode, Throughput, measurement::Measurement};
use half::{bf16, f16};
use mx_kernels::{BaselineScores, Float, Parallel, TokenScores, token_scores};

use crate::common::{Pool, Random, clock::Clock};

/// Logits like those of a language model: most around zero, some tokens far above.
struct Logits {
    f32: Vec<f32>,
    f16: Vec<f16>,
    bf16: Vec<bf16>,
}

impl Logits {
    fn new(rows: usize, vocab: usize, seed: u64) -> Self {
        let mut random = Random(seed);
        let mut f32: Vec<f32> = random.normals(rows * vocab).iter().map(|v| v * 4.0).collect();
        for row in f32.chunks_mut(vocab) {
            for _ in 0..8 {
                let i = random.bits() as usize % vocab;
                row[i] += 12.0 + random.normal();
            }
        }
        let f16 = f32.iter().map(|&v| f16::from_f32(v)).collect();
        let bf16 = f32.iter().map(|&v| bf16::from_f32(v)).collect();
        Self { f32, f16, bf16 }
    }

    fn of(&self, kind: &str) -> (Float<'_>, usize) {
        match kind {
            "f32" => (Float::F32(&self.f32), 4),
            "f16" => (Float::F16(&self.f16), 2),
            _ => (Float::Bf16(&self.bf16), 2),
        }
    }
}

/// Scores all rows once.
fn call(logits: Float<'_>, vocab: usize, baseline: Option<Float<'_>>, par: &dyn Parallel) {
    let rows = logits.len() / vocab;
    let labels: Vec<i64> = (0..rows).map(|r| (r * 7919 % vocab) as i64).collect();
    let (mut nll, mut entropy, mut top1) = (vec![0.0; rows], vec![0.0; rows], vec![0; rows]);
    let (mut kl, mut base_nll) = (vec![0.0; rows], vec![0.0; rows]);
    let with = baseline.is_some().then_some(BaselineScores { kl: &mut kl, nll: &mut base_nll });
    let out = TokenScores { nll: &mut nll, entropy: &mut entropy, top1: &mut top1, baseline: with };
    token_scores(logits, &labels, vocab, baseline, out, par).expect("scores");
    black_box((nll, entropy, top1, kl, base_nll));
}

fn main() {
    common::say_machine();
    let clock = Clock::from_env();
    let mut criterion: Criterion<Clock> = common::clock::criterion();
    let pools = [1, 2].map(Pool::new);
    let bandwidth = [1, 2].map(|threads| common::read_bandwidth(clock, threads));
    println!(
        "memory read: 1 thread {:.1}, 2 threads {:.1} GB/s",
        bandwidth[0] / 1e9,
        bandwidth[1] / 1e9
    );
    for vocab in [32_000, 151_936] {
        // A pass over the rows of f16 is already past the last cache level.
        let rows = common::copies(2 * vocab);
        let (logits, base) = (Logits::new(rows, vocab, 1), Logits::new(rows, vocab, 2));
        for kind in ["f32", "f16", "bf16"] {
            for with in [false, true] {
                for (pool, bandwidth) in pools.iter().zip(bandwidth) {
                    let (values, size) = logits.of(kind);
                    let baseline = with.then(|| base.of(kind).0);
                    let bytes = rows * vocab * size * if with { 2 } else { 1 };
                    let what = if with { "with a baseline" } else { "alone" };
                    let id = format!("{kind}/{vocab}/{what}/threads={}", pool.threads());
                    let best = Cell::new(f64::MAX);
                    let mut group = criterion.benchmark_group("scores");
                    group.sampling_mode(SamplingMode::Flat);
                    group.throughput(Throughput::Bytes(bytes as u64));
                    group.bench_function(&id, |b| {
                        b.iter_custom(|count| {
                            let start = clock.start();
                            for _ in 0..count {
                                call(values, vocab, baseline, pool);
                            }
                            let seconds = clock.end(start);
                            let one = clock.per_thread(seconds / count as f64, pool.threads());
                            best.set(best.get().min(one));
                            seconds
                        });
                    });
                    group.finish();
                    if best.get() < f64::MAX {
                        let share = bytes as f64 / best.get() / bandwidth;
                        println!(
                            "{id}: at best {:.0} % of the memory's bandwidth\n",
                            100.0 * share
                        );
                    }
                }
            }
        }
    }
    criterion.final_summary();
}
