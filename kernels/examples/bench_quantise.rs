//! Times quantising and packing of weights on one thread and prints GB/s of input read, weights stored
//! [n, k] and [k, n]: `cargo run --release -p mx-kernels --example bench_quantise -- [FORMAT,...]
//! [KxN] [TYPE,...]`. `MX_CPU_VARIANT` forces a variant.
//!
//! CPU time of the thread, the best of seven: on a busy machine the wall clock tells nothing.
#![allow(clippy::print_stdout)]

use mx_kernels::{ElementFormat, FloatType, QuantSpec, StoredWeight, cpu, quantize_weight};

/// CPU seconds of this thread.
#[allow(unsafe_code)]
fn cpu_seconds() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is valid for writes; the clock exists on every Linux.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

/// Zero-mean values from a linear congruential generator, as a file holds them.
fn stored(len: usize, float_type: FloatType) -> Vec<u8> {
    let mut state = 1_u64;
    let mut next = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    let mut bytes = Vec::with_capacity(len * float_type.width());
    for _ in 0..len {
        let v = (next() + next() + next()) * 0.02;
        match float_type {
            FloatType::F32 => bytes.extend(v.to_le_bytes()),
            FloatType::F16 => bytes.extend(half::f16::from_f32(v).to_le_bytes()),
            FloatType::Bf16 => bytes.extend(half::bf16::from_f32(v).to_le_bytes()),
        }
    }
    bytes
}

fn rate(spec: &QuantSpec, weight: &StoredWeight<'_>) -> f64 {
    let (n, k) = (weight.n, weight.k);
    let mut codes = vec![0; spec.codes_len(n, k)];
    let mut scales = vec![0; spec.scales_len(n, k)];
    let mut best = f64::MAX;
    for _ in 0..7 {
        let start = cpu_seconds();
        quantize_weight(spec, weight, 0, &mut codes, &mut scales).expect("shapes fit");
        best = best.min(cpu_seconds() - start);
    }
    weight.bytes.len() as f64 / best / 1e9
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let argument = |i: usize, default: &str| arguments.get(i).map_or(default, |v| v).to_owned();
    let shape = argument(1, "4096x14336");
    let (k, n) = shape.split_once('x').expect("KxN");
    let (k, n): (usize, usize) = (k.parse().expect("K"), n.parse().expect("N"));
    println!("variant {}, k {k}, n {n}, GB/s of input on one thread", cpu::variant());
    println!("{:10} {:5} {:>8} {:>8}", "format", "type", "[n, k]", "[k, n]");
    for name in argument(2, "fp32,fp16,bf16").split(',') {
        let float_type = match name {
            "fp32" => FloatType::F32,
            "fp16" => FloatType::F16,
            _ => FloatType::Bf16,
        };
        let bytes = stored(n * k, float_type);
        for format in argument(0, "fp8_e4m3,fp8_e5m2,fp6_e3m2,fp6_e2m3,fp4_e2m1,mxint8").split(',')
        {
            let format: ElementFormat = format.parse().expect("a format");
            let spec = QuantSpec::mx(format).expect("an MX format");
            let [rows, columns] = [false, true].map(|transposed| {
                let weight = StoredWeight { bytes: &bytes, float_type, n, k, transposed };
                rate(&spec, &weight)
            });
            println!("{format:10} {name:5} {rows:8.2} {columns:8.2}");
        }
    }
}
