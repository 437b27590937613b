//! Times `linear` and prints GF/s: `cargo run --release -p mx-kernels --example bench_linear --
//! [FORMAT,...] [M,...] [THREADS,...] [KxN] [both|weight|FORMAT of x]`. `MX_CPU_VARIANT` forces a variant.
//! `raw` multiplies the file's codes, `packed` the repacked weight.
//!
//! Beside the wall clock it shows the CPU time of all threads: on a busy machine only that one tells
//! anything. Weights are rotated, so that a small M reads them from memory as a model's layers do.
#![allow(clippy::print_stdout)]

use std::time::Instant;

use mx_kernels::{
    ElementFormat, Float, FloatMut, LinearProblem, PackedWeight, PreparedWeight, QuantSpec,
    StdThreads, cpu, linear, linear_prepared, quantize_rows,
};

/// Zero-mean values from a linear congruential generator.
fn random(len: usize, mut state: u64) -> Vec<f32> {
    let mut next = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..len).map(|_| next() + next() + next()).collect()
}

/// CPU seconds of this process, all threads together.
#[allow(unsafe_code)]
fn cpu_seconds() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is valid for writes; the clock exists on every Linux.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

/// GB/s at which so many threads add up 512 MiB together, the best of five.
fn read_bandwidth(threads: usize) -> f64 {
    let data: Vec<u64> = (0..64 << 20).collect();
    let mut best = f64::MAX;
    for _ in 0..5 {
        let start = Instant::now();
        let total: u64 = std::thread::scope(|scope| {
            let parts = data.chunks(data.len().div_ceil(threads));
            let sums: Vec<_> = parts.map(|p| scope.spawn(|| sum(p))).collect();
            sums.into_iter().map(|s| s.join().expect("sum")).fold(0, u64::wrapping_add)
        });
        std::hint::black_box(total);
        best = best.min(start.elapsed().as_secs_f64());
    }
    (data.len() * 8) as f64 / best / 1e9
}

/// A sum in 64 strands, so that vectors and not additions bound it.
fn sum(data: &[u64]) -> u64 {
    let mut sums = [0_u64; 64];
    for chunk in data.as_chunks::<64>().0 {
        for (sum, v) in sums.iter_mut().zip(chunk) {
            *sum = sum.wrapping_add(*v);
        }
    }
    sums.iter().fold(0, |a, v| a.wrapping_add(*v))
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let list = |i: usize, default: &str| -> Vec<String> {
        let text = arguments.get(i).map_or(default, String::as_str);
        text.split(',').map(str::to_owned).collect()
    };
    let formats = list(0, "fp8_e4m3,fp4_e2m1");
    let shape = list(3, "4096x14336");
    let (k, n) = shape[0].split_once('x').expect("KxN");
    let (k, n): (usize, usize) = (k.parse().expect("K"), n.parse().expect("N"));
    let operand = &list(4, "both")[0];
    println!("{} K={k} N={n}, x: {operand}", cpu::variant());
    for threads in list(2, "1,2") {
        let threads: usize = threads.parse().expect("threads");
        println!("memory is read at {:.1} GB/s by {threads} threads", read_bandwidth(threads));
    }
    let w = random(n * k, 1);
    for format in formats {
        let spec = QuantSpec::mx(format.parse::<ElementFormat>().expect("format")).expect("mx");
        let (mut codes, mut scales) =
            (vec![0; spec.codes_len(n, k)], vec![0; spec.scales_len(n, k)]);
        let start = Instant::now();
        quantize_rows(&spec, &w, n, k, &mut codes, &mut scales).expect("quantise");
        println!("{format}: weight quantised in {:.0} ms", start.elapsed().as_secs_f64() * 1e3);
        let activation = match operand.as_str() {
            "both" => Some(spec),
            "weight" => None,
            format => Some(QuantSpec::mx(format.parse().expect("format")).expect("mx")),
        };
        let problem = LinearProblem { n, k, weight: spec, activation, alpha: 1.0, beta: 1.0 };
        let start = Instant::now();
        let copies: Vec<_> = (0..(600 << 20) / codes.len().max(64 << 20))
            .map(|_| {
                let w = PackedWeight::new(spec, n, k, &codes, &scales).expect("weight");
                let prepared = PreparedWeight::new(&problem, &w, &StdThreads(1));
                (codes.clone(), scales.clone(), prepared)
            })
            .collect();
        println!(
            "{format}: {} copies, {:.0} ms each to repack",
            copies.len(),
            start.elapsed().as_secs_f64() * 1e3 / copies.len() as f64
        );
        for m in list(1, "1,2,4,8,16,64,512") {
            let m: usize = m.parse().expect("M");
            let (x, mut y) = (random(m * k, 2), vec![0.0; m * n]);
            for threads in list(2, "1,2") {
                let threads = StdThreads(threads.parse().expect("threads"));
                for packed in [false, true] {
                    let (mut best, mut best_cpu) = (f64::MAX, f64::MAX);
                    for i in 0..if m < 64 { 24 } else { 4 } {
                        let (codes, scales, prepared) = &copies[i % copies.len()];
                        let w = PackedWeight::new(spec, n, k, codes, scales).expect("weight");
                        let (start, cpu) = (Instant::now(), cpu_seconds());
                        let (x, y) = (Float::F32(&x), FloatMut::F32(&mut y));
                        match prepared.as_ref().filter(|_| packed) {
                            Some(p) => linear_prepared(&problem, x, &w, p, None, y, &threads),
                            None => linear(&problem, x, &w, None, y, &threads),
                        }
                        .expect("linear");
                        best = best.min(start.elapsed().as_secs_f64());
                        best_cpu = best_cpu.min(cpu_seconds() - cpu);
                    }
                    let (work, bytes) =
                        (2.0 * (m * n * k) as f64 / 1e9, codes.len() + scales.len());
                    println!(
                        "{format} M={m:<4} threads={} {}  {:9.3} ms {:7.1} GF/s {:5.1} GB/s   cpu {:9.3} ms {:7.1} GF/s",
                        threads.0,
                        if packed { "packed" } else { "raw   " },
                        best * 1e3,
                        work / best,
                        bytes as f64 / best / 1e9,
                        best_cpu * 1e3,
                        work / best_cpu
                    );
                }
            }
        }
    }
}
