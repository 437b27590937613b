//! `ActMatMulPlan` against the specification, however products are batched.
#![allow(unsafe_code)]

use half::{bf16, f16};
use mx_kernels::{
    ActMatMulProblem, ElementFormat, Float, FloatMut, QuantSpec, Rounding, ScaleKind, ScaleRule,
    cuda::{ActMatMulBuffers, ActMatMulPlan, CudaError, FloatType, Gpu},
    fake_quantize_rows, reference,
};

use super::{
    common::{Buffer, OwnStream, gpu, quick},
    linear::Element,
};
use crate::common::{Random, specs};

fn fp8() -> QuantSpec {
    QuantSpec::mx(ElementFormat::Fp8E4M3).unwrap()
}

/// Specifications that a product of activations takes.
fn act_specs() -> Vec<QuantSpec> {
    specs().into_iter().filter(|spec| spec.scale != ScaleKind::Tensor).collect()
}

fn problem<'a>(
    [m, n, k]: [usize; 3],
    spec: QuantSpec,
    batches: &'a [(usize, usize)],
) -> ActMatMulProblem<'a> {
    let (a_spec, b_spec) = (spec, spec);
    ActMatMulProblem { m, n, k, a_spec, b_spec, transpose_b: false, alpha: 1.0, batches }
}

/// The products on the device, twice; the scratch is poisoned.
fn run<T: Element>(
    gpu: &'static Gpu,
    stream: &OwnStream,
    problem: &ActMatMulProblem<'_>,
    a: &[T],
    b: &[T],
) -> Vec<T> {
    let plan = ActMatMulPlan::new(gpu, problem, T::TYPE).unwrap();
    let (a, b) = (Buffer::of(a), Buffer::of(b));
    let y = Buffer::poisoned(problem.batches.len() * problem.m * problem.n * size_of::<T>());
    let scratch = Buffer::poisoned(plan.scratch_bytes());
    let buffers = ActMatMulBuffers { a: a.ptr(), b: b.ptr(), y: y.ptr(), scratch: scratch.ptr() };
    let once = || {
        // SAFETY: buffers as long as the plan says, alive until the stream is done.
        unsafe { plan.run(stream.get(), &buffers) }.unwrap();
        stream.synchronize();
        (y.read::<T>(), y.read::<u8>())
    };
    let (first, bytes) = once();
    y.fill(0xff);
    assert!(bytes == once().1, "another result the second time: {problem:?}");
    scratch.read::<u8>();
    first
}

/// Matrix `index` of b, quantised, as rows [n, k].
fn columns(p: &ActMatMulProblem<'_>, b: &[f32], index: usize) -> Vec<f32> {
    let (n, k) = (p.n, p.k);
    let matrix = &b[index * n * k..][..n * k];
    let rows: Vec<f32> = match p.transpose_b {
        true => matrix.to_vec(),
        false => (0..n * k).map(|i| matrix[i % k * n + i / k]).collect(),
    };
    let mut out = vec![0.0; n * k];
    fake_quantize_rows(&p.b_spec, &rows, n, k, &mut out).unwrap();
    out
}

/// Runs the products and holds every one of them against the specification.
fn check<T: Element>(
    gpu: &'static Gpu,
    stream: &OwnStream,
    p: &ActMatMulProblem<'_>,
    a: &[f32],
    b: &[f32],
) -> f64 {
    let of = |v: &[f32]| v.iter().map(|&v| T::from_f32(v)).collect::<Vec<T>>();
    let back = |v: &[T]| v.iter().map(|v| v.to_f64() as f32).collect::<Vec<f32>>();
    let (a, b) = (of(a), of(b));
    let got = run(gpu, stream, p, &a, &b);
    let (a, b) = (back(&a), back(&b));
    let (m, n, k) = (p.m, p.n, p.k);
    let mut want = vec![0.0_f32; got.len()];
    reference::act_matmul(p, Float::F32(&a), Float::F32(&b), FloatMut::F32(&mut want)).unwrap();
    let mut most: f64 = 0.0;
    for (index, &(ia, ib)) in p.batches.iter().enumerate() {
        let mut rows = vec![0.0; m * k];
        fake_quantize_rows(&p.a_spec, &a[ia * m * k..][..m * k], m, k, &mut rows).unwrap();
        let columns = columns(p, &b, ib);
        for at in 0..m * n {
            let (i, j) = (at / n, at % n);
            let (got, want) =
                (got[index * m * n + at].to_f64(), f64::from(want[index * m * n + at]));
            let name = || format!("product {index} [{i}, {j}]: {got:e}, not {want:e}; {p:?}");
            if !want.is_finite() {
                assert!(got == want || got.is_nan() && want.is_nan(), "{}", name());
                continue;
            }
            let magnitude: f64 = rows[i * k..][..k]
                .iter()
                .zip(&columns[j * k..][..k])
                .map(|(x, w)| (f64::from(*x) * f64::from(*w)).abs())
                .sum::<f64>()
                * f64::from(p.alpha).abs();
            let tiny = f64::from(f32::MIN_POSITIVE);
            if want.abs() < tiny && got.abs() < tiny {
                continue;
            }
            let subnormal = if T::TYPE == FloatType::F16 { 2f64.powi(-25) } else { 0.0 };
            let rounding = (T::EPSILON + 2f64.powi(-23)) * want.abs() + subnormal;
            let error = ((got - want).abs() - rounding).max(0.0);
            let bound = (k as f64 / 16.0 + 32.0) * 2f64.powi(-23) * magnitude;
            assert!(error <= bound, "{}, over {bound:e}", name());
            most = most.max(error / bound.max(tiny));
        }
    }
    most
}

/// Every format, block size, rounding and rule; tails; both ways round; all three types.
#[test]
fn every_spec_and_tail_both_ways_round() {
    let Some(gpu) = gpu() else { return };
    let stream = OwnStream::new();
    let mut random = Random(41);
    let shapes = [
        [1, 1, 1],
        [1, 40, 65],
        [3, 7, 32],
        [5, 33, 100],
        [17, 16, 31],
        [2, 130, 300],
        [70, 64, 128],
        [9, 300, 1025],
        [140, 19, 260],
    ];
    let mut most: f64 = 0.0;
    for spec in act_specs() {
        for shape in shapes {
            let [m, n, k] = shape;
            let spec = QuantSpec {
                block_size: [16, 32, 64, 128, 256][random.below(5)],
                rounding: Rounding::ALL[random.below(3)],
                scale_rule: ScaleRule::ALL[random.below(4)],
                ..spec
            };
            for transpose_b in [false, true] {
                let (a, b) = (random.normals(2 * m * k), random.normals(2 * k * n));
                let batches = [(0, 0), (1, 1)];
                let p = ActMatMulProblem {
                    alpha: -0.375,
                    transpose_b,
                    ..problem(shape, spec, &batches)
                };
                let worst = [
                    check::<f32>(gpu, &stream, &p, &a, &b),
                    check::<f16>(gpu, &stream, &p, &a, &b),
                    check::<bf16>(gpu, &stream, &p, &a, &b),
                ];
                most = worst.into_iter().fold(most, f64::max);
            }
            if quick() {
                break;
            }
        }
    }
    println!("worst {most:.3} of the bound");
}

/// Each operand by its own specification, which is not the other's.
#[test]
fn operands_may_be_quantised_differently() {
    let Some(gpu) = gpu() else { return };
    let stream = OwnStream::new();
    let mut random = Random(42);
    let all = act_specs();
    let count = if quick() { 6 } else { 60 };
    for _ in 0..count {
        let mut any = || QuantSpec {
            block_size: [16, 32, 64, 128, 256][random.below(5)],
            rounding: Rounding::ALL[random.below(3)],
            scale_rule: ScaleRule::ALL[random.below(4)],
            ..all[random.below(all.len())]
        };
        let (a_spec, b_spec) = (any(), any());
        let shape = [1 + random.below(40), 1 + random.below(150), 1 + random.below(600)];
        let [m, n, k] = shape;
        let (a, b) = (random.normals(m * k), random.normals(k * n));
        let transpose_b = random.below(2) == 1;
        let p =
            ActMatMulProblem { a_spec, b_spec, transpose_b, ..problem(shape, a_spec, &[(0, 0)]) };
        check::<f32>(gpu, &stream, &p, &a, &b);
    }
}

/// Pairs of broadcasting over dimensions (a has it, b has it, extent), outermost first, with the
/// numbers of matrices of a and b.
fn broadcast(dims: &[(bool, bool, usize)]) -> (Vec<(usize, usize)>, usize, usize) {
    let mut pairs = vec![(0, 0)];
    for &(a, b, n) in dims {
        let of = |old: usize, has: bool, i: usize| if has { old * n + i } else { old };
        pairs = pairs
            .iter()
            .flat_map(|&(i, j)| (0..n).map(move |t| (of(i, a, t), of(j, b, t))))
            .collect();
    }
    let count = |which: fn(&(bool, bool, usize)) -> bool| {
        dims.iter().filter(|d| which(d)).map(|d| d.2).product()
    };
    (pairs, count(|d| d.0), count(|d| d.1))
}

#[test]
fn matrices_are_shared_as_the_pairs_say() {
    let Some(gpu) = gpu() else { return };
    let stream = OwnStream::new();
    let mut random = Random(43);
    let (t, f) = (true, false);
    let mut cases: Vec<_> = [
        vec![(t, t, 7)],
        vec![(t, f, 5)],
        vec![(f, t, 5)],
        // Grouped attention: batch, heads of keys, queries per key.
        vec![(t, t, 2), (t, t, 3), (t, f, 4)],
        vec![(t, f, 2), (f, t, 3), (t, f, 2), (f, t, 2)],
        vec![(t, f, 2), (f, t, 2), (t, f, 2), (f, t, 2), (t, f, 3)],
    ]
    .iter()
    .map(|dims| broadcast(dims))
    .collect();
    cases.push((vec![(3, 2), (0, 0), (1, 2), (3, 0), (2, 1), (0, 2), (0, 0)], 4, 3));
    for (pairs, a_count, b_count) in cases {
        for shape @ [m, n, k] in [[3, 20, 70], [33, 150, 200]] {
            for transpose_b in [false, true] {
                let (mut a, b) = (random.normals(a_count * m * k), random.normals(b_count * k * n));
                // One matrix alone leaves bfloat16.
                let last = (a_count - 1) * m * k;
                a[last..last + k].iter_mut().for_each(|v| *v *= 2f32.powi(-125));
                let p = ActMatMulProblem { transpose_b, ..problem(shape, fp8(), &pairs) };
                check::<f32>(gpu, &stream, &p, &a, &b);
            }
        }
    }
}

/// Beyond the limits of one launch: products, rows, and sums in several shares of k.
#[test]
fn many_products_and_many_rows() {
    let Some(gpu) = gpu() else { return };
    let stream = OwnStream::new();
    let mut random = Random(44);
    let pairs: Vec<_> = (0..33_000).map(|i| (i, i / 3)).collect();
    type Shape<'a> = ([usize; 3], &'a [(usize, usize)]);
    let shapes: [Shape<'_>; 4] = [
        ([2, 3, 5], &pairs),
        ([33_000, 2, 17], &[(0, 0), (1, 0)]),
        ([1, 40, 9000], &[(0, 0), (1, 1)]),
        ([20, 8, 4096], &[(0, 0)]),
    ];
    for (shape @ [m, n, k], batches) in shapes {
        if quick() && m * batches.len() > 10_000 {
            continue;
        }
        let a_count = batches.iter().map(|pair| pair.0).max().unwrap() + 1;
        let b_count = batches.iter().map(|pair| pair.1).max().unwrap() + 1;
        let (a, b) = (random.normals(a_count * m * k), random.normals(b_count * k * n));
        for transpose_b in [false, true] {
            let p = ActMatMulProblem { transpose_b, ..problem(shape, fp8(), batches) };
            check::<f32>(gpu, &stream, &p, &a, &b);
        }
    }
}

/// What no normal bfloat16 holds, zero blocks, NaN and Inf, each in its row or column alone.
#[test]
fn extreme_scales_and_special_blocks() {
    let Some(gpu) = gpu() else { return };
    let stream = OwnStream::new();
    let mut random = Random(45);
    for spec in act_specs() {
        for shape @ [m, n, k] in [[3, 40, 160], [70, 20, 96], [1, 9, 4096]] {
            for (up, down) in
                [(120, -120), (-120, 120), (-126, 100), (126, -126), (60, 60), (-140, 30), (63, 64)]
            {
                let mut scaled = |len, e| -> Vec<f32> {
                    let mut v = random.normals(len);
                    v.iter_mut().for_each(|v| *v = (f64::from(*v) * 2f64.powi(e)) as f32);
                    v
                };
                let (mut a, mut b) = (scaled(m * k, up), scaled(n * k, down));
                a[..32].copy_from_slice(&random.normals(32));
                b[..32].copy_from_slice(&random.normals(32));
                a[32..64].fill(0.0);
                b[64..96].fill(-0.0);
                for (poisoned, transpose_b) in [(true, false), (true, true), (false, false)] {
                    if poisoned {
                        a[(m - 1) * k + 13] = f32::INFINITY;
                        b[n * k - 1] = f32::NAN;
                    } else {
                        a[(m - 1) * k + 13] = 0.0;
                        b[n * k - 1] = 0.0;
                    }
                    let p = ActMatMulProblem { transpose_b, ..problem(shape, spec, &[(0, 0)]) };
                    check::<f32>(gpu, &stream, &p, &a, &b);
                }
            }
        }
        if quick() {
            break;
        }
    }
}

/// A captured graph gives the same bits as a plain call.
#[test]
fn graphs_and_what_is_refused() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random(46);
    let shape @ [m, n, k] = [40, 64, 96];
    let batches = [(0, 0), (1, 0), (2, 1), (3, 1)];
    let p = problem(shape, fp8(), &batches);
    let plan = ActMatMulPlan::new(gpu, &p, FloatType::F32).unwrap();
    let (a, b) = (random.normals(4 * m * k), random.normals(2 * k * n));
    let (stream, other) = (OwnStream::new(), OwnStream::new());
    let plain = run(gpu, &other, &p, &a, &b);
    let (a, b) = (Buffer::of(&a), Buffer::of(&b));
    let y = Buffer::poisoned(batches.len() * m * n * 4);
    let scratch = Buffer::poisoned(plan.scratch_bytes());
    let buffers = ActMatMulBuffers { a: a.ptr(), b: b.ptr(), y: y.ptr(), scratch: scratch.ptr() };
    // SAFETY: the buffers outlive the graph's runs.
    let graph = stream.capture(|stream| unsafe { plan.run(stream, &buffers) });
    for _ in 0..2 {
        y.fill(0xff);
        scratch.fill(0xff);
        graph.launch(&stream);
        stream.synchronize();
        assert_eq!(y.read::<f32>(), plain);
    }
    let empty = ActMatMulProblem { batches: &[], ..p };
    let plan = ActMatMulPlan::new(gpu, &empty, FloatType::F32).unwrap();
    assert_eq!(plan.scratch_bytes(), 0);
    // SAFETY: no product, so no access.
    unsafe { plan.run(stream.get(), &buffers) }.unwrap();
    let tensor =
        QuantSpec::new(fp8().format, ScaleKind::Tensor, 32, Rounding::Even, ScaleRule::Floor);
    for bad in [
        ActMatMulProblem { k: 0, ..p },
        ActMatMulProblem { a_spec: tensor.unwrap(), ..p },
        ActMatMulProblem { b_spec: QuantSpec { block_size: 7, ..fp8() }, ..p },
    ] {
        let error = ActMatMulPlan::new(gpu, &bad, FloatType::F32).unwrap_err();
        assert!(matches!(error, CudaError::Problem(_)), "{error}");
    }
    let long = ActMatMulProblem { k: usize::MAX / 2, ..p };
    assert!(ActMatMulPlan::new(gpu, &long, FloatType::F32).is_err());
}
