//! `linear` on the file's codes and on repacked weights, by format, operands, rows of x, shape and threads,
//! on weights that come from memory.
//!
//! `cargo bench -p mx-kernels --bench linear -- [FILTER]`, a filter such as `packed/fp4_e2m1/both/4096x14336/m=1/`.
//! Weights are rotated: as many copies as make up four times the last cache level, so that a small m
//! reads them as a model's layers do. `MX_BENCH_SHAPES=KxN,...` and `MX_BENCH_ROWS=M,...` replace what is
//! listed below; the other environment variables are those of `common`.
#![allow(clippy::print_stdout)]

mod common;

use std::{cell::OnceCell, hint::black_box};

use criterion::{Criterion, SamplingMode, Throughput};
use mx_kernels::{
    ElementFormat, Float, FloatMut, LinearProblem, PackedWeight, Parallel, PreparedWeight,
    QuantSpec, StdThreads, linear, linear_prepared,
};

use crate::common::{Pool, Random, clock::Clock};

const SHAPES: &str = "4096x14336,14336x4096";
const ROWS: &str = "1,8,64,512";
const THREADS: [usize; 2] = [1, 2];

/// Copies of a weight with random codes, taken in turns.
struct Weights {
    problem: LinearProblem,
    /// Codes, scales and, where they are multiplied repacked and this machine has a use for that, all again.
    copies: Vec<(Vec<u8>, Vec<u8>, Option<PreparedWeight>)>,
    turn: usize,
}

impl Weights {
    fn new(problem: LinearProblem, packed: bool) -> Self {
        let LinearProblem { n, k, weight: spec, .. } = problem;
        let mut random = Random(3);
        let mut bytes = |len: usize| -> Vec<u8> {
            (0..len.div_ceil(8)).flat_map(|_| random.bits().to_le_bytes()).take(len).collect()
        };
        let mut codes = bytes(spec.codes_len(n, k));
        if spec.format.bits() == 8 {
            // The largest exponents, with E4M3's NaN and E5M2's Inf among them, stay away.
            codes.iter_mut().for_each(|c| *c &= 0xbf);
        }
        let mut scales = bytes(spec.scales_len(n, k));
        scales.iter_mut().for_each(|s| *s = 118 + *s % 6);
        let copies = common::copies(codes.len() + scales.len());
        let copies = (0..copies).map(|_| {
            let w = PackedWeight::new(spec, n, k, &codes, &scales).expect("weight");
            let prepared = packed.then(|| PreparedWeight::new(&problem, &w, &StdThreads(2)));
            (codes.clone(), scales.clone(), prepared.flatten())
        });
        Self { problem, copies: copies.collect(), turn: 0 }
    }

    /// One call with the next copy.
    fn call(&mut self, x: &[f32], y: &mut [f32], par: &dyn Parallel) {
        let LinearProblem { n, k, weight, .. } = self.problem;
        self.turn = (self.turn + 1) % self.copies.len();
        let (codes, scales, prepared) = &self.copies[self.turn];
        let w = PackedWeight::new(weight, n, k, codes, scales).expect("weight");
        let (x, out) = (Float::F32(x), FloatMut::F32(y));
        match prepared {
            Some(prepared) => linear_prepared(&self.problem, x, &w, prepared, None, out, par),
            None => linear(&self.problem, x, &w, None, out, par),
        }
        .expect("linear");
        black_box(y);
    }
}

fn list<T: std::str::FromStr>(variable: &str, default: &str, separator: char) -> Vec<T> {
    let text = std::env::var(variable).unwrap_or_else(|_| default.to_owned());
    text.split(separator).filter_map(|v| v.parse().ok()).collect()
}

/// Every m and number of threads of one weight, which is made when the first of them runs.
fn bench(criterion: &mut Criterion<Clock>, problem: LinearProblem, packed: bool, pools: &[Pool]) {
    let LinearProblem { n, k, weight, activation, .. } = problem;
    let mut weights = OnceCell::new();
    let bytes = weight.codes_len(n, k) + weight.scales_len(n, k);
    let layout = if packed { "packed" } else { "file" };
    let operands = if activation.is_some() { "both" } else { "weight" };
    let mut group = criterion.benchmark_group("linear");
    group.sampling_mode(SamplingMode::Flat);
    for m in list("MX_BENCH_ROWS", ROWS, ',') {
        let m: usize = m;
        let x = OnceCell::new();
        for pool in pools {
            let id = format!(
                "{layout}/{}/{operands}/{k}x{n}/m={m}/threads={}",
                weight.format,
                pool.threads()
            );
            // Below some rows what counts is the weight's way from memory.
            let rate = if m <= 2 { bytes } else { 2 * m * n * k } as u64;
            group.throughput(if m <= 2 {
                Throughput::Bytes(rate)
            } else {
                Throughput::Elements(rate)
            });
            group.bench_function(id, |b| {
                let x: &Vec<f32> = x.get_or_init(|| Random(2).normals(m * k));
                weights.get_or_init(|| Weights::new(problem, packed));
                let weights = weights.get_mut().expect("made above");
                let mut y = vec![0.0; m * n];
                b.iter(|| weights.call(x, &mut y, pool));
            });
        }
    }
    group.finish();
}

fn main() {
    common::say_machine();
    let clock = Clock::from_env();
    for threads in THREADS {
        let read = common::read_bandwidth(clock, threads) / 1e9;
        let each = read / threads as f64;
        println!("memory read with {threads} threads: {read:.1} GB/s, {each:.1} per core");
    }
    let pools = THREADS.map(Pool::new);
    let mut criterion = common::clock::criterion();
    for shape in list::<String>("MX_BENCH_SHAPES", SHAPES, ',') {
        let sizes: Vec<usize> = shape.split('x').filter_map(|v| v.parse().ok()).collect();
        let [k, n] = sizes[..] else { continue };
        for &format in ElementFormat::ALL.iter().filter(|f| f.bits() <= 8) {
            let spec = QuantSpec::mx(format).expect("an MX format");
            for activation in [Some(spec), None] {
                let problem =
                    LinearProblem { n, k, weight: spec, activation, alpha: 1.0, beta: 1.0 };
                for packed in [true, false] {
                    bench(&mut criterion, problem, packed, &pools);
                }
            }
        }
    }
    criterion.final_summary();
}
