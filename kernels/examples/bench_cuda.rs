//! Times the whole operator against cuBLASLt's bfloat16 product of the same shape, in one run.
//!
//! `cargo run --release -p mx-kernels --example bench_cuda -- [M,M,...] [--formats F,F] [--shapes NxK,...] [--fused] [--wide TILE:SPLITS,...]`
//! A format is that of MX weights and activations, or `nvfp8`: E4M3 under one scale a tensor.
//! `--fused` and `--wide` add contenders that take those kernels.
//! Each call is a CUDA graph; every repetition uses another copy of the weight, together larger than
//! the second-level cache; competitors alternate, medians are printed.
#![allow(unsafe_code, clippy::print_stdout)]

use std::time::Duration;

use cudarc::driver::sys;
use mx_kernels::{
    ElementFormat, LinearProblem, QuantSpec, ScaleKind,
    cuda::{
        Choice, FloatType, Gpu, LinearBuffers, LinearPlan, Stream,
        blas::{self, Dense, DenseBuffers, DenseProblem, Factor},
    },
};

fn ok(code: sys::CUresult) {
    assert_eq!(code, sys::CUresult::CUDA_SUCCESS);
}

fn alloc(bytes: usize) -> u64 {
    let mut p = 0;
    // SAFETY: plain allocation; freed by the end of the process.
    ok(unsafe { sys::cuMemAlloc_v2(&mut p, bytes.max(256)) });
    p
}

fn random(bytes: usize, mask: u8, or: u8) -> Vec<u8> {
    let mut state = 88172645463325252_u64;
    let mut out = Vec::with_capacity(bytes + 8);
    while out.len() < bytes {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.extend(state.to_le_bytes().map(|b| b & mask | or));
    }
    out.truncate(bytes);
    out
}

/// bfloat16 values about 1 in magnitude.
fn bf16s(count: usize) -> Vec<u8> {
    let mut bytes = random(count * 2, 0xff, 0);
    bytes.chunks_mut(2).for_each(|c| c[1] = c[1] & 0x80 | 0x3f);
    bytes
}

fn upload(values: &[u8]) -> u64 {
    let p = alloc(values.len());
    // SAFETY: just allocated with that length.
    ok(unsafe { sys::cuMemcpyHtoD_v2(p, values.as_ptr().cast(), values.len()) });
    p
}

fn free(p: u64) {
    // SAFETY: allocated once.
    ok(unsafe { sys::cuMemFree_v2(p) });
}

struct Graph(sys::CUgraphExec);

fn capture(stream: sys::CUstream, work: impl FnOnce(Stream)) -> Graph {
    let (mut graph, mut exec) = (std::ptr::null_mut(), std::ptr::null_mut());
    // SAFETY: a live stream.
    unsafe {
        ok(sys::cuStreamBeginCapture_v2(
            stream,
            sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL,
        ));
        work(Stream(stream.cast()));
        ok(sys::cuStreamEndCapture(stream, &mut graph));
        ok(sys::cuGraphInstantiateWithFlags(&mut exec, graph, 0));
        ok(sys::cuGraphDestroy(graph));
    }
    Graph(exec)
}

/// Microseconds of one call, from a graph that holds one call for each copy of the weight.
fn time(stream: sys::CUstream, graph: &Graph, calls: usize) -> f64 {
    let mut ms = 0.0;
    // SAFETY: live handles.
    unsafe {
        let (mut a, mut b) = (std::ptr::null_mut(), std::ptr::null_mut());
        ok(sys::cuEventCreate(&mut a, 0));
        ok(sys::cuEventCreate(&mut b, 0));
        ok(sys::cuEventRecord(a, stream));
        ok(sys::cuGraphLaunch(graph.0, stream));
        ok(sys::cuEventRecord(b, stream));
        ok(sys::cuEventSynchronize(b));
        ok(sys::cuEventElapsedTime_v2(&mut ms, a, b));
        ok(sys::cuEventDestroy_v2(a));
        ok(sys::cuEventDestroy_v2(b));
    }
    f64::from(ms) * 1000.0 / calls as f64
}

fn median(mut v: Vec<f64>) -> f64 {
    v.sort_by(f64::total_cmp);
    v[v.len() / 2]
}

/// What quantises both operands, by its name on the command line.
fn contender(name: &str) -> (String, QuantSpec) {
    let format = if name == "nvfp8" { ElementFormat::Fp8E4M3 } else { name.parse().unwrap() };
    let mut spec = QuantSpec::mx(format).unwrap();
    if name == "nvfp8" {
        spec.scale = ScaleKind::Tensor;
    }
    (name.to_owned(), spec)
}

/// Random codes, finite in every format, and scales about 1.
fn weight(spec: &QuantSpec, n: usize, k: usize) -> (Vec<u8>, Vec<u8>) {
    let mask = match spec.format {
        ElementFormat::Fp8E4M3 => 0xf7,
        ElementFormat::Fp8E5M2 => 0xbf,
        _ => 0xff,
    };
    let scales = match spec.scale {
        ScaleKind::Tensor => 0.01_f32.to_le_bytes().to_vec(),
        _ => random(spec.scales_len(n, k), 1, 126),
    };
    (random(spec.codes_len(n, k), mask, 0), scales)
}

fn main() {
    let mut rows = vec![1, 16, 64, 256, 2048, 4096];
    let mut formats: Vec<_> = ElementFormat::ALL[..5].iter().map(|f| contender(f.name())).collect();
    let mut shapes = vec![(14336, 4096), (4096, 14336)];
    let mut choices = vec![Choice::Fastest];
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--formats" => {
                formats = args.next().unwrap().split(',').map(contender).collect();
            }
            "--shapes" => {
                let pair = |s: &str| {
                    let (n, k) = s.split_once('x').unwrap();
                    (n.parse().unwrap(), k.parse().unwrap())
                };
                shapes = args.next().unwrap().split(',').map(pair).collect();
            }
            "--wide" => {
                let pair = |s: &str| {
                    let (tile, splits) = s.split_once(':').unwrap();
                    Choice::Wide { tile: tile.parse().unwrap(), splits: splits.parse().unwrap() }
                };
                choices.extend(args.next().unwrap().split(',').map(pair));
            }
            "--fused" => choices.push(Choice::Fused),
            list => rows = list.split(',').map(|m| m.parse().unwrap()).collect(),
        }
    }
    let gpu = Gpu::get(0).unwrap();
    gpu.bind().unwrap();
    println!(
        "{}; x bfloat16, both operands quantised; us a call (times as fast as bf16)",
        gpu.attributes().name
    );
    let mut stream = std::ptr::null_mut();
    // SAFETY: stores a stream.
    ok(unsafe { sys::cuStreamCreate(&mut stream, 1) });
    for (n, k) in shapes {
        for &m in &rows {
            row(gpu, stream, &formats, &choices, (m, n, k));
        }
    }
}

fn row(
    gpu: &'static Gpu,
    stream: sys::CUstream,
    formats: &[(String, QuantSpec)],
    choices: &[Choice],
    (m, n, k): (usize, usize, usize),
) {
    let copies = |bytes: usize| (240_usize << 20).div_ceil(bytes).clamp(2, 12);
    let x = upload(&bf16s(m * k));
    let y = alloc(m * n * 2);
    let workspace = alloc(blas::WORKSPACE);
    let mut contenders = Vec::new();
    let mut memory = vec![x, y, workspace];
    let dense = Dense::new(
        gpu,
        DenseProblem {
            m,
            n,
            k,
            pitch: k,
            factor: Factor::Bf16,
            out: FloatType::Bf16,
            bias: false,
            split: true,
        },
    )
    .unwrap();
    let host = bf16s(n * k);
    let weights: Vec<u64> = (0..copies(n * k * 2)).map(|_| upload(&host)).collect();
    memory.extend(&weights);
    let graph = capture(stream, |stream| {
        for &w in &weights {
            let b = DenseBuffers { x, w, scales: [0; 2], bias: 0, d: y, workspace };
            // SAFETY: buffers of those shapes.
            unsafe { dense.run(stream, 1.0, &b) }.unwrap();
        }
    });
    contenders.push(("bf16".to_owned(), graph, weights.len(), Vec::new()));
    for (name, spec) in formats {
        let spec = *spec;
        let problem =
            LinearProblem { n, k, weight: spec, activation: Some(spec), alpha: 1.0, beta: 1.0 };
        LinearPlan::prepare(gpu, &problem).unwrap();
        let (codes, scales) = weight(&spec, n, k);
        let weights: Vec<(u64, u64)> =
            (0..copies(codes.len())).map(|_| (upload(&codes), upload(&scales))).collect();
        memory.extend(weights.iter().flat_map(|(a, b)| [*a, *b]));
        for &choice in choices {
            let plan =
                LinearPlan::choosing(gpu, &problem, m, FloatType::Bf16, false, choice).unwrap();
            let scratch = alloc(plan.scratch_bytes());
            memory.push(scratch);
            let graph = capture(stream, |stream| {
                for &(codes, scales) in &weights {
                    let b = LinearBuffers { x, codes, scales, bias: 0, y, scratch };
                    // SAFETY: buffers of the plan's shapes.
                    unsafe { plan.run(stream, &b) }.unwrap();
                }
            });
            let name = match choices.len() {
                1 if name != "nvfp8" => name.clone(),
                _ => format!("{name} [{}]", plan.path()),
            };
            contenders.push((name, graph, weights.len(), Vec::new()));
        }
    }
    for round in 0..12 {
        for (_, graph, calls, times) in &mut contenders {
            let us = time(stream, graph, *calls);
            if round >= 2 {
                times.push(us);
            }
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    let medians: Vec<_> =
        contenders.iter().map(|(name, _, _, t)| (name, median(t.clone()))).collect();
    let base = medians[0].1;
    print!("M={m:<5} N={n:<6} K={k:<6} bf16 {base:8.2}");
    for (name, us) in &medians[1..] {
        print!(" | {name} {us:8.2} ({:.2})", base / us);
    }
    println!();
    for (_, graph, ..) in contenders {
        // SAFETY: instantiated once.
        ok(unsafe { sys::cuGraphExecDestroy(graph.0) });
    }
    memory.into_iter().for_each(free);
}
