//! `LinearPlan` on fp8 tensor cores: E4M3 under tensor scales on both sides.
#![allow(unsafe_code)]

use half::{bf16, f16};
use mx_kernels::{
    ElementFormat, Float, FloatMut, LinearProblem, QuantSpec, Rounding, ScaleKind, ScaleRule,
    cuda::{Choice, FP8_PATH, FloatType, Gpu, LinearBuffers, LinearPlan, blas},
    fake_quantize_rows, reference,
};

use super::{
    common::{Buffer, OwnStream, gpu, quick},
    linear::{Element, Weight, run_by, worst},
};
use crate::common::{Random, required};

/// 2^-23, the unit in which errors are measured, times this: bounds of `cuda/fp8.rs`.
const ZERO_MEAN: f64 = 16384.0;
const ONE_SIGN: f64 = 131072.0;

/// The largest error of zero-mean data, in units of 2^-23 of the sum of magnitudes.
pub(super) fn zero_mean_bound<T: Element>(
    gpu: &'static Gpu,
    problem: &LinearProblem,
    m: usize,
    has_bias: bool,
) -> f64 {
    if path(gpu, problem, m, T::TYPE, has_bias) == FP8_PATH { ZERO_MEAN } else { 32.0 }
}

fn path(
    gpu: &'static Gpu,
    problem: &LinearProblem,
    m: usize,
    x_type: FloatType,
    has_bias: bool,
) -> &'static str {
    LinearPlan::new(gpu, problem, m, x_type, has_bias).unwrap().path_name()
}

fn e4m3() -> QuantSpec {
    QuantSpec::new(ElementFormat::Fp8E4M3, ScaleKind::Tensor, 32, Rounding::Even, ScaleRule::Floor)
        .unwrap()
}

/// The device, where its fp8 tensor cores can be had; else why not. `MX_REQUIRE=cuda` asks for
/// cuBLASLt, but not for a newer device.
fn fp8_gpu() -> Option<&'static Gpu> {
    let gpu = gpu()?;
    let (major, minor) = gpu.attributes().capability;
    if (major, minor) < (8, 9) {
        println!("skipped: compute capability {major}.{minor} has no fp8 tensor cores");
        return None;
    }
    if std::env::var("MX_CUDA_PATH").is_ok_and(|path| path == "fused") {
        println!("skipped: MX_CUDA_PATH=fused keeps cuBLASLt out");
        return None;
    }
    if let Err(e) = blas::available() {
        println!("skipped: {e}");
        assert!(!required("cuda"), "MX_REQUIRE names cuda: {e}");
        return None;
    }
    Some(gpu)
}

fn of<T: Element>(values: &[f32]) -> Vec<T> {
    values.iter().map(|&v| T::from_f32(v)).collect()
}

/// Runs a product that has to take fp8 tensor cores.
fn run_fp8<T: Element>(
    gpu: &'static Gpu,
    stream: &OwnStream,
    problem: &LinearProblem,
    w: &Weight,
    x: &[T],
    bias: Option<&[T]>,
) -> Vec<T> {
    let m = x.len() / problem.k;
    assert_eq!(path(gpu, problem, m, T::TYPE, bias.is_some()), FP8_PATH, "{problem:?} m={m}");
    run_by(gpu, stream, problem, w, x, bias, Choice::Fastest)
}

/// Which products go to fp8 tensor cores, on every device.
#[test]
fn paths() {
    let Some(gpu) = gpu() else { return };
    let has = fp8_gpu().is_some();
    let tensor = e4m3();
    let unscaled = QuantSpec { scale: ScaleKind::None, ..tensor };
    let e8m0 = QuantSpec { scale: ScaleKind::E8M0, ..tensor };
    let e5m2 = QuantSpec { format: ElementFormat::Fp8E5M2, ..tensor };
    for (weight, activation, n, expected) in [
        (tensor, Some(tensor), 64, has),
        (tensor, Some(QuantSpec { block_size: 256, rounding: Rounding::Floor, ..tensor }), 64, has),
        (tensor, Some(tensor), 100, false),
        (tensor, None, 64, false),
        (tensor, Some(e5m2), 64, false),
        (e5m2, Some(e5m2), 64, false),
    ] {
        let problem = LinearProblem { n, k: 96, weight, activation, alpha: 1.0, beta: 1.0 };
        LinearPlan::prepare(gpu, &problem).unwrap();
        for m in [1, 16, 700] {
            let path = path(gpu, &problem, m, FloatType::F32, true);
            assert_eq!(path == FP8_PATH, expected, "{weight:?} {activation:?} {m}x{n}: {path}");
        }
    }
    for (weight, activation) in [(tensor, e8m0), (tensor, unscaled), (e8m0, tensor)] {
        let activation = Some(activation);
        let problem = LinearProblem { n: 64, k: 96, weight, activation, alpha: 1.0, beta: 1.0 };
        let error = LinearPlan::new(gpu, &problem, 16, FloatType::F32, false).unwrap_err();
        assert!(error.to_string().contains("tensor scale"), "{error}");
    }
    let nothing = LinearProblem {
        n: 16,
        k: 16,
        weight: tensor,
        activation: Some(tensor),
        alpha: 1.0,
        beta: 1.0,
    };
    assert_eq!(path(gpu, &nothing, 0, FloatType::F32, false), "nothing");
}

/// Every M, N and K of the list, all three types, with and without bias and factors.
#[test]
fn shapes() {
    let Some(gpu) = fp8_gpu() else { return };
    let stream = OwnStream::new();
    let full = std::env::var("MX_GPU_FULL").is_ok_and(|v| v == "1");
    let sizes: &[usize] = if quick() { &[32, 100, 576] } else { &[32, 96, 100, 576, 1536, 4096] };
    let rows: &[usize] = if quick() { &[1, 33] } else { &[1, 2, 7, 16, 33, 200] };
    let mut random = Random(61);
    let (mut most, mut count, mut fp8) = (0.0_f64, 0, 0);
    for &n in sizes {
        for &k in sizes {
            let w = Weight::random(e4m3(), n, k, &mut random);
            for &m in rows {
                // The CPU's float64 takes most of the time.
                if n * k > 1 << 18 && !full && random.below(4) > 0 {
                    continue;
                }
                let (x, bias) = (random.normals(m * k), random.normals(n));
                macro_rules! check {
                    ($($type:ty),*) => {$(
                        for (alpha, beta, biased) in [(1.0, 1.0, false), (1.0, 1.0, true), (-1.5, 0.25, true)] {
                            let problem = LinearProblem { alpha, beta, ..w.problem(Some(e4m3())) };
                            let (x, bias) = (of::<$type>(&x), of::<$type>(&bias));
                            let bias = biased.then_some(&bias[..]);
                            let bound = zero_mean_bound::<$type>(gpu, &problem, m, biased);
                            assert_eq!(bound == ZERO_MEAN, n % 16 == 0, "{m}x{n}x{k}");
                            let y = run_by(gpu, &stream, &problem, &w, &x, bias, Choice::Fastest);
                            let units = worst(&problem, &w, &x, bias, &y, &mut random);
                            assert!(units <= bound, "{m}x{n}x{k} {alpha} {beta} {biased}: {units}");
                            if bound == ZERO_MEAN {
                                (most, fp8) = (most.max(units), fp8 + 1);
                            }
                            count += 1;
                        }
                    )*};
                }
                check!(f32, f16, bf16);
            }
        }
    }
    println!(
        "{count} products, {fp8} on fp8 tensor cores, worst 2^{:.2} S of 2^{:.0} S",
        most.log2() - 23.0,
        ZERO_MEAN.log2() - 23.0
    );
}

/// Data of one sign, where what is dropped adds up: tells whether sums are promoted to float32.
#[test]
fn data_of_one_sign() {
    let Some(gpu) = fp8_gpu() else { return };
    let stream = OwnStream::new();
    let mut random = Random(62);
    let sizes: &[usize] = if quick() { &[576] } else { &[64, 128, 576, 1536, 4096, 14336] };
    for &k in sizes {
        let n = 48;
        for (name, offset) in [("about one magnitude", 1.0), ("all magnitudes", 0.0)] {
            let w: Vec<f32> = random.normals(n * k).iter().map(|v| offset + v.abs()).collect();
            let w = Weight::quantised(e4m3(), n, k, &w);
            let problem = w.problem(Some(e4m3()));
            let mut most: f64 = 0.0;
            for m in [1, 33, 200] {
                let x: Vec<f32> = random.normals(m * k).iter().map(|v| offset + v.abs()).collect();
                // cuBLASLt has no algorithm without shares of k for a few long products.
                let taken = path(gpu, &problem, m, FloatType::F32, false);
                if k > 4096 && taken != FP8_PATH {
                    println!("k={k}, m={m}: {taken}");
                    continue;
                }
                let y = run_fp8(gpu, &stream, &problem, &w, &x, None);
                let units = worst(&problem, &w, &x, None, &y, &mut random);
                assert!(units <= ONE_SIGN, "{name} {m}x{k}: {units}");
                most = most.max(units);
            }
            println!("k={k}, {name}: worst 2^{:.2} S of 2^-6 S", most.max(1e-3).log2() - 23.0);
        }
    }
}

/// The hardest data that is known: in each step of 32, a product with a subnormal factor beside 31
/// that are just too small for the bits that are kept.
#[test]
fn small_products_beside_a_large_one() {
    let Some(gpu) = fp8_gpu() else { return };
    let (n, k, stream) = (16, 128, OwnStream::new());
    // 2^-9 * 256 beside 7/512 * 9/256, which is below 2^-11.
    let large = |i: usize| i % 32 == 5;
    let codes = (0..n * k).map(|i| if large(i % k) { 0x78 } else { 0x11 }).collect();
    let w = Weight::new(e4m3(), n, k, codes, 1.0_f32.to_le_bytes().to_vec());
    let problem = w.problem(Some(e4m3()));
    // The second row makes X's scale 1.
    let mut x: Vec<f32> =
        (0..k).map(|i| if large(i) { 1.0 / 512.0 } else { 7.0 / 512.0 }).collect();
    x.extend((0..k).map(|i| if i == 0 { 448.0 } else { 0.0 }));
    let y = run_fp8(gpu, &stream, &problem, &w, &x, None);
    let want = reference_of(&problem, &w, &x, None);
    let error = (f64::from(y[0]) / f64::from(want[0]) - 1.0).abs();
    println!("{} of {}, off by 2^{:.2}", y[0], want[0], error.max(1e-9).log2());
    assert!(error <= 1.0 / 16.0 && y[..n].iter().all(|v| *v == y[0]), "{error}");
    assert_eq!(y[n..], want[n..]);
}

fn reference_of(problem: &LinearProblem, w: &Weight, x: &[f32], bias: Option<&[f32]>) -> Vec<f32> {
    let mut want = vec![0.0_f32; x.len() / problem.k * problem.n];
    let out = FloatMut::F32(&mut want);
    reference::linear(problem, Float::F32(x), &w.view(), bias.map(Float::F32), out).unwrap();
    want
}

/// What the product multiplies by are the reference's values, to the bit: X times the identity. All
/// roundings; NaN, Inf, subnormal values, ties.
#[test]
fn codes_are_those_of_the_cpu() {
    let Some(gpu) = fp8_gpu() else { return };
    let stream = OwnStream::new();
    let mut random = Random(63);
    // The second width leaves its last grain to the rows' padding.
    let widths: [usize; 2] = if quick() { [64, 40] } else { [2048, 1000] };
    for k in widths {
        let n = k.next_multiple_of(16);
        let mut codes = vec![0; e4m3().codes_len(n, k)];
        (0..k).for_each(|i| codes[i * e4m3().row_bytes(k) + i] = 0x38);
        let w = Weight::new(e4m3(), n, k, codes, 1.0_f32.to_le_bytes().to_vec());
        for (name, values) in sets(3 * k, &mut random) {
            for rounding in Rounding::ALL {
                let spec = QuantSpec { rounding: *rounding, ..e4m3() };
                let problem = w.problem(Some(spec));
                macro_rules! check {
                    ($($type:ty),*) => {$({
                        let x = of::<$type>(&values);
                        let exact: Vec<f32> = x.iter().map(|v| v.to_f64() as f32).collect();
                        let y = run_fp8(gpu, &stream, &problem, &w, &x, None);
                        let mut want = vec![0.0; exact.len()];
                        fake_quantize_rows(&spec, &exact, exact.len() / k, k, &mut want).unwrap();
                        for (i, want) in want.iter().enumerate() {
                            let got = y[i / k * n + i % k].to_f64();
                            // A row with NaN is NaN: NaN * 0.
                            let nan = exact[i / k * k..][..k].iter().any(|v| v.is_nan());
                            let cast = <$type as Element>::from_f32(*want).to_f64();
                            let tiny = got.abs() < 2f64.powi(-126) && cast.abs() < 2f64.powi(-126);
                            assert!(
                                if nan { got.is_nan() } else { got == cast || tiny },
                                "{name} {rounding} k={k} [{i}]: {got:e}, not {cast:e}, of {:e}",
                                exact[i]
                            );
                        }
                    })*};
                }
                check!(f32, f16, bf16);
            }
        }
    }
}

/// Values that are hard to round or to scale.
fn sets(len: usize, random: &mut Random) -> Vec<(&'static str, Vec<f32>)> {
    let ties = (0..len)
        .map(|i| {
            let steps = random.below(1 << 13) as f32 / 16.0;
            let nudge = random.below(3) as i32 - 1;
            let v = f32::from_bits(steps.to_bits().saturating_add_signed(nudge));
            // The scale is 1, and nothing is rounded twice.
            if i == 0 { 448.0 } else { v.min(448.0).copysign(random.normal()) }
        })
        .collect();
    let any = (0..len).map(|_| f32::from_bits(random.bits() as u32 & 0x9fff_ffff)).collect();
    let tiny = (0..len).map(|_| f32::from_bits(random.bits() as u32 & 0x80ff_ffff)).collect();
    let mut specials = random.normals(len);
    for (i, v) in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN, -0.0].into_iter().enumerate() {
        specials[i * 7 % (len / 3)] = v;
    }
    specials[len / 3 + 3] = f32::INFINITY;
    let zeros = (0..len).map(|i| [0.0, -0.0][i % 2]).collect();
    vec![
        ("ties", ties),
        ("any exponent", any),
        ("tiny", tiny),
        ("Inf and NaN", specials),
        ("normal", random.normals(len)),
        ("zeros", zeros),
    ]
}

/// NaN and Inf in X, NaN codes in W and behind its rows' ends, zeros: where the reference has them.
#[test]
fn special_values() {
    let Some(gpu) = fp8_gpu() else { return };
    let stream = OwnStream::new();
    let mut random = Random(64);
    for (m, n, k) in [(1, 32, 160), (3, 48, 100), (20, 16, 96), (140, 64, 130)] {
        for biased in [false, true] {
            let mut w = random.normals(n * k);
            w[2 * k..3 * k].fill(0.0);
            let quantised = Weight::quantised(e4m3(), n, k, &w);
            let (mut codes, scales) = (quantised.codes().to_vec(), quantised.scales().to_vec());
            let pitch = e4m3().row_bytes(k);
            (codes[5], codes[(n - 1) * pitch + k - 1]) = (0x7f, 0xff);
            for row in codes.chunks_mut(pitch) {
                row[k..].fill(0x7f);
            }
            let w = Weight::new(e4m3(), n, k, codes, scales);
            let mut x = random.normals(m * k);
            x[k - 1] = f32::INFINITY;
            if m > 1 {
                (x[k + 3], x[2 * k + 3]) = (f32::NAN, f32::NEG_INFINITY);
                x[(m - 1) * k..].fill(-0.0);
            }
            let bias = random.normals(n);
            let bias = biased.then_some(&bias[..]);
            let problem = LinearProblem { beta: 0.5, ..w.problem(Some(e4m3())) };
            let got = run_fp8(gpu, &stream, &problem, &w, &x, bias);
            let want = reference_of(&problem, &w, &x, bias);
            for (i, (a, b)) in got.iter().zip(&want).enumerate() {
                // All values are below 2, Inf included once it is quantised.
                let close = (a - b).abs() <= 2f32.powi(-9) * 4.0 * k as f32;
                let same = if b.is_nan() { a.is_nan() } else { close };
                let exact = i / n + 1 < m || m == 1 || b.is_nan() || a == b;
                assert!(same && exact, "{m}x{n}x{k} [{}, {}]: {a:e}, not {b:e}", i / n, i % n);
            }
        }
    }
}

/// Scales whose product is no normal float32 although results are, a scale of W that is no number,
/// results beyond float16.
#[test]
fn extreme_scales() {
    let Some(gpu) = fp8_gpu() else { return };
    let stream = OwnStream::new();
    let mut random = Random(65);
    let (n, k) = (32, 96);
    let codes = Weight::quantised(e4m3(), n, k, &random.normals(n * k)).codes().to_vec();
    let power = |e: i32| 2f64.powi(e) as f32;
    for (m, up, scale, alpha) in [
        (1, -60, power(-80), 1.0),
        (7, -20, power(-126), 1.0),
        (130, 100, power(40), 1.0),
        (3, 100, power(60), power(-50)),
        (2, -100, power(-60), power(60)),
        (2, 0, 0.0, 1.0),
        (2, 0, f32::NAN, 1.0),
        (2, 0, f32::INFINITY, 1.0),
        (2, 0, -1.5, 1.0),
        (2, 0, 1.0, 0.0),
    ] {
        let w = Weight::new(e4m3(), n, k, codes.clone(), scale.to_le_bytes().to_vec());
        let problem = LinearProblem { alpha, ..w.problem(Some(e4m3())) };
        let x: Vec<f32> =
            random.normals(m * k).iter().map(|v| (f64::from(*v) * 2f64.powi(up)) as f32).collect();
        let got = run_fp8(gpu, &stream, &problem, &w, &x, None);
        let want = reference_of(&problem, &w, &x, None);
        let largest = want.iter().fold(0.0_f32, |most, v| most.max(v.abs()));
        for (i, (a, b)) in got.iter().zip(&want).enumerate() {
            let flushed = a.abs() < f32::MIN_POSITIVE && b.abs() < f32::MIN_POSITIVE;
            // Sums of magnitudes are a few times the largest sum.
            let close = (f64::from(*a) - f64::from(*b)).abs() <= 0.02 * f64::from(largest);
            let same = a == b || a.is_nan() && b.is_nan() || b.is_finite() && close;
            assert!(same || flushed, "{up} {scale:e} {alpha:e} [{i}]: {a:e}, not {b:e}");
        }
    }
    let w = Weight::new(e4m3(), n, k, codes, 1.0_f32.to_le_bytes().to_vec());
    let problem = LinearProblem { alpha: 4096.0, ..w.problem(Some(e4m3())) };
    let x = random.normals(4 * k);
    let want = reference_of(&problem, &w, &x, None);
    let got = run_fp8::<f16>(gpu, &stream, &problem, &w, &of(&x), None);
    for (a, b) in got.iter().zip(&want).filter(|(_, b)| b.abs() > 80_000.0) {
        assert_eq!(a.to_f64(), f64::from(f32::INFINITY.copysign(*b)), "of {b}");
    }
    assert!(want.iter().filter(|v| v.abs() > 80_000.0).count() > 20, "{want:?}");
}

/// More rows than one piece takes, the last piece a shorter one.
#[test]
fn pieces() {
    let Some(gpu) = fp8_gpu() else { return };
    if quick() {
        return;
    }
    let stream = OwnStream::new();
    let mut random = Random(66);
    let (m, n, k) = ((32 << 10) + 77, 32, 64);
    let w = Weight::random(e4m3(), n, k, &mut random);
    let problem = w.problem(Some(e4m3()));
    let x = random.normals(m * k);
    let y = run_fp8(gpu, &stream, &problem, &w, &x, None);
    for _ in 0..3 {
        let units = worst(&problem, &w, &x, None, &y, &mut random);
        assert!(units <= ZERO_MEAN, "{units}");
    }
}

/// A captured graph gives the same bits as a plain call, also for other inputs.
#[test]
fn graphs() {
    let Some(gpu) = fp8_gpu() else { return };
    let mut random = Random(67);
    for (m, biased) in [(1, false), (40, true), (300, false), (700, true)] {
        let (n, k) = (608, 1024);
        let w = Weight::random(e4m3(), n, k, &mut random);
        let problem = w.problem(Some(e4m3()));
        LinearPlan::prepare(gpu, &problem).unwrap();
        let plan = LinearPlan::new(gpu, &problem, m, FloatType::F32, biased).unwrap();
        assert_eq!(plan.path_name(), FP8_PATH);
        let (x, bias) = (Buffer::of(&random.normals(m * k)), random.normals(n));
        let y = Buffer::poisoned(m * n * 4);
        let (scratch, device_bias) = (Buffer::poisoned(plan.scratch_bytes()), Buffer::of(&bias));
        let buffers = LinearBuffers {
            x: x.ptr(),
            codes: w.device().0,
            scales: w.device().1,
            bias: if biased { device_bias.ptr() } else { 0 },
            y: y.ptr(),
            scratch: scratch.ptr(),
        };
        let (stream, other) = (OwnStream::new(), OwnStream::new());
        // SAFETY: the buffers outlive the graph's runs.
        let graph = stream.capture(|stream| unsafe { plan.run(stream, &buffers) });
        for _ in 0..3 {
            let values = random.normals(m * k);
            x.write(&values);
            y.fill(0xff);
            scratch.fill(0xff);
            graph.launch(&stream);
            stream.synchronize();
            let replayed = y.read::<f32>();
            let plain = run_by(
                gpu,
                &other,
                &problem,
                &w,
                &values,
                biased.then_some(&bias[..]),
                Choice::Fastest,
            );
            assert_eq!(replayed, plain, "m={m}");
        }
    }
}
