//! `LinearPlan` against the exact result and the reference.
#![allow(unsafe_code)]

use std::{cell::RefCell, collections::BTreeMap};

use bytemuck::Pod;
use half::{bf16, f16};
use mx_kernels::{
    ElementFormat, Float, FloatMut, LinearProblem, PackedWeight, QuantSpec, Rounding, ScaleKind,
    ScaleRule,
    cuda::{Choice, DevicePtr, FloatType, Gpu, LinearBuffers, LinearPlan},
    dequantize_rows, fake_quantize_rows, quantize_rows, reference,
};

use super::{
    common::{Buffer, OwnStream, gpu, quick},
    fp8::zero_mean_bound,
};
use crate::common::{Random, specs};

/// A packed weight, here and on the device.
pub(super) struct Weight {
    spec: QuantSpec,
    n: usize,
    k: usize,
    codes: Vec<u8>,
    scales: Vec<u8>,
    device: (Buffer, Buffer),
}

impl Weight {
    pub(super) fn new(
        spec: QuantSpec,
        n: usize,
        k: usize,
        codes: Vec<u8>,
        scales: Vec<u8>,
    ) -> Self {
        let device = (Buffer::of(&codes), Buffer::of(&scales));
        Self { spec, n, k, codes, scales, device }
    }

    pub(super) fn quantised(spec: QuantSpec, n: usize, k: usize, values: &[f32]) -> Self {
        let (mut codes, mut scales) =
            (vec![0; spec.codes_len(n, k)], vec![0; spec.scales_len(n, k)]);
        quantize_rows(&spec, values, n, k, &mut codes, &mut scales).unwrap();
        Self::new(spec, n, k, codes, scales)
    }

    /// Random finite codes, scales around 1: zero-mean data, made faster than quantised.
    pub(super) fn random(spec: QuantSpec, n: usize, k: usize, random: &mut Random) -> Self {
        let mut codes: Vec<u8> = Vec::with_capacity(spec.codes_len(n, k) + 8);
        while codes.len() < spec.codes_len(n, k) {
            codes.extend(random.bits().to_le_bytes());
        }
        codes.truncate(spec.codes_len(n, k));
        match spec.format {
            // No Inf and NaN codes.
            ElementFormat::Fp8E4M3 | ElementFormat::Fp8E5M2 => codes.iter_mut().for_each(|c| {
                *c &= if spec.format == ElementFormat::Fp8E4M3 { 0xf7 } else { 0xbf };
            }),
            ElementFormat::Bf16 => codes.chunks_mut(2).for_each(|c| c[1] = c[1] & 0x81 | 0x3e),
            ElementFormat::MxInt8 => codes.iter_mut().for_each(|c| *c = (*c).max(1)),
            _ => {}
        }
        let mut scales = vec![0; spec.scales_len(n, k)];
        match spec.scale {
            ScaleKind::Tensor => scales.copy_from_slice(&0.37_f32.to_le_bytes()),
            _ => scales.iter_mut().for_each(|s| *s = 124 + (random.bits() % 6) as u8),
        }
        Self::new(spec, n, k, codes, scales)
    }

    pub(super) fn codes(&self) -> &[u8] {
        &self.codes
    }

    pub(super) fn scales(&self) -> &[u8] {
        &self.scales
    }

    /// Addresses of codes and scales on the device.
    pub(super) fn device(&self) -> (DevicePtr, DevicePtr) {
        (self.device.0.ptr(), self.device.1.ptr())
    }

    pub(super) fn view(&self) -> PackedWeight<'_> {
        PackedWeight::new(self.spec, self.n, self.k, &self.codes, &self.scales).unwrap()
    }

    pub(super) fn problem(&self, activation: Option<QuantSpec>) -> LinearProblem {
        LinearProblem { n: self.n, k: self.k, weight: self.spec, activation, alpha: 1.0, beta: 1.0 }
    }

    /// Row j in f64.
    fn row(&self, j: usize) -> Vec<f64> {
        let (row_bytes, blocks) = (self.spec.row_bytes(self.k), self.spec.blocks(self.k));
        let scales = match self.spec.scale {
            ScaleKind::E8M0 => &self.scales[j * blocks..(j + 1) * blocks],
            _ => &self.scales[..],
        };
        let mut out = vec![0.0; self.k];
        let codes = &self.codes[j * row_bytes..(j + 1) * row_bytes];
        dequantize_rows(&self.spec, codes, scales, 1, self.k, &mut out).unwrap();
        out.into_iter().map(f64::from).collect()
    }
}

/// A float type with its number on the device.
pub(super) trait Element: Pod + PartialEq {
    const TYPE: FloatType;
    const EPSILON: f64;
    fn from_f32(v: f32) -> Self;
    fn to_f64(self) -> f64;
}

macro_rules! elements {
    ($($rust:ty, $kind:ident, $epsilon:expr, $from:expr, $to:expr);*) => {
        $(impl Element for $rust {
            const TYPE: FloatType = FloatType::$kind;
            const EPSILON: f64 = $epsilon;
            fn from_f32(v: f32) -> Self {
                $from(v)
            }
            fn to_f64(self) -> f64 {
                f64::from($to(self))
            }
        })*
    };
}
elements!(
    f32, F32, 0.0, |v| v, |v: f32| v;
    f16, F16, 1.0 / 2048.0, f16::from_f32, f16::to_f32;
    bf16, Bf16, 1.0 / 256.0, bf16::from_f32, bf16::to_f32
);

/// Kernels that take turns in [`run`]; where one does not apply, the plan takes another. A prime number of
/// them, so that they do not keep step with the loops of the tests.
const CHOICES: [Choice; 11] = [
    Choice::Wide { tile: 256, splits: 1 },
    Choice::Fastest,
    Choice::Wide { tile: 64, splits: 1 },
    Choice::Fused,
    Choice::Wide { tile: 256, splits: 1 },
    Choice::Fastest,
    Choice::Wide { tile: 128, splits: 3 },
    Choice::Dense,
    Choice::Wide { tile: 64, splits: 4 },
    Choice::Wide { tile: 128, splits: 1 },
    Choice::Wide { tile: 256, splits: 2 },
];

thread_local! {
    /// Products of this test so far, by the kernels that took them.
    static TAKEN: RefCell<BTreeMap<String, usize>> = const { RefCell::new(BTreeMap::new()) };
}

/// Prints what a test exercised.
fn print_taken() {
    TAKEN.with_borrow(|taken| {
        let list: Vec<_> = taken.iter().map(|(path, count)| format!("{path}: {count}")).collect();
        println!("products by kernel: {}", list.join("; "));
    });
}

/// Y of one product; the scratch is poisoned. Each call takes another kernel.
pub(super) fn run<T: Element>(
    gpu: &'static Gpu,
    stream: &OwnStream,
    problem: &LinearProblem,
    w: &Weight,
    x: &[T],
    bias: Option<&[T]>,
) -> Vec<T> {
    let calls: usize = TAKEN.with_borrow(|taken| taken.values().sum());
    run_by(gpu, stream, problem, w, x, bias, CHOICES[calls % CHOICES.len()])
}

/// [`run`] by these kernels.
#[allow(clippy::too_many_arguments)]
pub(super) fn run_by<T: Element>(
    gpu: &'static Gpu,
    stream: &OwnStream,
    problem: &LinearProblem,
    w: &Weight,
    x: &[T],
    bias: Option<&[T]>,
    choice: Choice,
) -> Vec<T> {
    let m = x.len() / problem.k;
    let plan = LinearPlan::choosing(gpu, problem, m, T::TYPE, bias.is_some(), choice).unwrap();
    let kernel = plan.path().split(',').next().unwrap_or_default().to_owned();
    TAKEN.with_borrow_mut(|taken| *taken.entry(kernel).or_default() += 1);
    let (x, bias) = (Buffer::of(x), bias.map(Buffer::of));
    let y = Buffer::poisoned(m * problem.n * size_of::<T>());
    let scratch = Buffer::poisoned(plan.scratch_bytes());
    let buffers = LinearBuffers {
        x: x.ptr(),
        codes: w.device.0.ptr(),
        scales: w.device.1.ptr(),
        bias: bias.as_ref().map_or(0, Buffer::ptr),
        y: y.ptr(),
        scratch: scratch.ptr(),
    };
    // SAFETY: buffers as long as the plan says, alive until the stream is done.
    unsafe { plan.run(stream.get(), &buffers) }.unwrap();
    stream.synchronize();
    let first = y.read::<T>();
    scratch.read::<u8>();
    // SAFETY: as above.
    unsafe { plan.run(stream.get(), &buffers) }.unwrap();
    stream.synchronize();
    let second = y.read::<T>();
    let pairs = first.iter().zip(&second).enumerate();
    let different: Vec<_> =
        pairs.filter(|(_, (a, b))| bytemuck::bytes_of(*a) != bytemuck::bytes_of(*b)).collect();
    if let Some((i, (a, b))) = different.first() {
        let (count, a, b) = (different.len(), a.to_f64(), b.to_f64());
        let path = plan.path();
        panic!(
            "{problem:?} m={m} {path}: {count} results differ the second time, [{i}] {a:e} then {b:e}"
        );
    }
    first
}

fn some(len: usize, most: usize, random: &mut Random) -> Vec<usize> {
    let mut all: Vec<usize> = (0..len).collect();
    if len > most {
        all = (0..most - 2).map(|_| random.below(len)).chain([0, len - 1]).collect();
    }
    all
}

/// Worst error of a sample of Y, in units of the sum of magnitudes times 2^-23.
pub(super) fn worst<T: Element>(
    problem: &LinearProblem,
    w: &Weight,
    x: &[T],
    bias: Option<&[T]>,
    y: &[T],
    random: &mut Random,
) -> f64 {
    let (n, k) = (problem.n, problem.k);
    let m = x.len() / k;
    let mut xs: Vec<f32> = x.iter().map(|v| v.to_f64() as f32).collect();
    if let Some(spec) = &problem.activation {
        let values = xs.clone();
        fake_quantize_rows(spec, &values, m, k, &mut xs).unwrap();
    }
    let rows = some(m, 12, random);
    let mut most: f64 = 0.0;
    for j in some(n, 12, random) {
        let w = w.row(j);
        for &i in &rows {
            let (mut sum, mut magnitude) = (0.0, 0.0);
            for (x, w) in xs[i * k..][..k].iter().zip(&w) {
                sum += f64::from(*x) * w;
                magnitude += (f64::from(*x) * w).abs();
            }
            let alpha = f64::from(problem.alpha);
            let add = bias.map_or(0.0, |b| f64::from(problem.beta) * b[j].to_f64());
            let (want, got) = (alpha * sum + add, y[i * n + j].to_f64());
            let rounding = T::EPSILON * want.abs() + 2f64.powi(-24) * (add.abs() + want.abs());
            let error = ((got - want).abs() - rounding).max(0.0) / alpha.abs();
            assert!(error.is_finite(), "[{i}, {j}] {got} {want}");
            most = most.max(error / magnitude.max(1e-300) * 2f64.powi(23));
        }
    }
    most
}

fn mx(format: ElementFormat) -> QuantSpec {
    QuantSpec::mx(format).unwrap()
}

const MX: [ElementFormat; 5] = [
    ElementFormat::Fp8E4M3,
    ElementFormat::Fp8E5M2,
    ElementFormat::Fp6E3M2,
    ElementFormat::Fp6E2M3,
    ElementFormat::Fp4E2M1,
];

/// Every M, N and K of the list, against f64; two random members of each row of the table
/// per format, all of them with `MX_GPU_FULL=1`. A thread a format: the CPU has most of the work.
#[test]
fn shapes() {
    let Some(gpu) = gpu() else { return };
    if quick() {
        // compute-sanitizer's racecheck loses track of kernels that several threads launch.
        return MX.into_iter().for_each(|format| shapes_of(gpu, format));
    }
    std::thread::scope(|scope| {
        let formats = MX.map(|format| scope.spawn(move || shapes_of(gpu, format)));
        for format in formats {
            if let Err(panic) = format.join() {
                std::panic::resume_unwind(panic);
            }
        }
    });
}

fn shapes_of(gpu: &'static Gpu, format: ElementFormat) {
    gpu.bind().unwrap();
    let stream = OwnStream::new();
    let full = std::env::var("MX_GPU_FULL").is_ok_and(|v| v == "1");
    let sizes: &[usize] =
        if quick() { &[32, 100, 576] } else { &[32, 96, 100, 576, 1536, 4096, 14336] };
    let rows: &[usize] = if quick() { &[1, 33, 200] } else { &[1, 2, 7, 16, 33, 64, 200, 1024] };
    let spec = mx(format);
    let mut random = Random(11 + format as u64);
    let (mut most, mut count) = (0.0_f64, 0);
    for &n in sizes {
        for &k in sizes {
            if n * k > 30 << 20 && !full && random.below(3) > 0 {
                continue;
            }
            let w = Weight::random(spec, n, k, &mut random);
            for &m in rows {
                if !full && random.below(4) > 1 {
                    continue;
                }
                let activation = match random.below(4) {
                    0 => None,
                    1 => Some(mx(MX[random.below(5)])),
                    _ => Some(spec),
                };
                let problem = w.problem(activation);
                let x = random.normals(m * k);
                let y = run(gpu, &stream, &problem, &w, &x, None);
                let units = worst(&problem, &w, &x, None, &y, &mut random);
                assert!(units <= 32.0, "{format} {activation:?} {m}x{n}x{k}: {units}");
                (most, count) = (most.max(units), count + 1);
            }
        }
    }
    println!("{format}: {count} products, worst {most:.3} of 32 units");
    print_taken();
}

/// Sums of one sign and of equal terms, where rounding errors add up.
#[test]
fn systematic_data() {
    let Some(gpu) = gpu() else { return };
    let stream = OwnStream::new();
    let mut random = Random(12);
    let mut most: f64 = 0.0;
    for spec in specs() {
        for k in [40, 65, 703, 1600, 4096, 14336] {
            for m in [1, 4, 70, 130] {
                for (constant, quantised) in [(true, true), (false, true), (false, false)] {
                    let n = 19;
                    let mut value = || if constant { 1.3 } else { 1.0 + random.normal().abs() };
                    let w: Vec<f32> = (0..n * k).map(|_| value()).collect();
                    let x: Vec<f32> = (0..m * k).map(|_| value()).collect();
                    let w = Weight::quantised(spec, n, k, &w);
                    let problem = w.problem(quantised.then_some(spec));
                    let y = run(gpu, &stream, &problem, &w, &x, None);
                    let units = worst(&problem, &w, &x, None, &y, &mut random);
                    let bound = k as f64 / 16.0 + 32.0;
                    assert!(units <= bound, "{spec:?} {m}x{k}: {units} over {bound}");
                    most = most.max(units / bound);
                }
            }
        }
        if quick() {
            break;
        }
    }
    println!("worst {most:.3} of the bound");
    print_taken();
}

fn reference_of(problem: &LinearProblem, w: &Weight, x: &[f32]) -> Vec<f32> {
    let mut want = vec![0.0_f32; x.len() / problem.k * problem.n];
    let out = FloatMut::F32(&mut want);
    reference::linear(problem, Float::F32(x), &w.view(), None, out).unwrap();
    want
}

/// Imported weights may hold any bytes: all codes, all scale bytes, garbage behind the row's end.
#[test]
fn every_code_and_scale_byte() {
    let Some(gpu) = gpu() else { return };
    let stream = OwnStream::new();
    let mut random = Random(13);
    for spec in specs() {
        for block_size in [16, 32, 64, 256] {
            let spec = QuantSpec { block_size, ..spec };
            for (m, n, k) in [(1, 24, 250), (7, 40, 250), (20, 300, 33), (150, 60, 100)] {
                let codes: Vec<u8> =
                    (0..spec.codes_len(n, k)).map(|_| random.bits() as u8).collect();
                let scales: Vec<u8> = match spec.scale {
                    ScaleKind::Tensor => 0.37_f32.to_le_bytes().to_vec(),
                    _ => (0..spec.scales_len(n, k)).map(|_| random.bits() as u8).collect(),
                };
                let w = Weight::new(spec, n, k, codes, scales);
                // One-hot x: each result is one weight, so that extremes do not hide each other.
                let mut x = vec![0.0_f32; m * k];
                for i in 0..m {
                    x[i * k + (i * 17 + random.below(k)) % k] = 1.0;
                }
                let problem = w.problem(None);
                let got = run(gpu, &stream, &problem, &w, &x, None);
                for (i, (a, b)) in got.iter().zip(reference_of(&problem, &w, &x)).enumerate() {
                    let flushed = b.abs() < f32::MIN_POSITIVE && *a == 0.0;
                    let same = *a == b || a.is_nan() && b.is_nan() || flushed;
                    assert!(same, "{spec:?} {m}x{n}x{k} [{i}]: {a:e}, not {b:e}");
                }
            }
        }
    }
}

/// Kernels for the tests that try several on the same data.
const SOME: [Choice; 5] = [
    Choice::Fastest,
    Choice::Fused,
    Choice::Wide { tile: 64, splits: 1 },
    Choice::Wide { tile: 256, splits: 1 },
    Choice::Wide { tile: 128, splits: 2 },
];

/// Compares Y with the reference, which sees X as T holds it: NaN and infinities where they belong,
/// everything else within the bound and T's rounding.
fn check_special<T: Element>(
    gpu: &'static Gpu,
    stream: &OwnStream,
    problem: &LinearProblem,
    w: &Weight,
    x: &[f32],
) {
    let (n, k) = (problem.n, problem.k);
    let x: Vec<T> = x.iter().map(|&v| T::from_f32(v)).collect();
    let seen: Vec<f32> = x.iter().map(|v| v.to_f64() as f32).collect();
    let want = reference_of(problem, w, &seen);
    let magnitudes: Vec<f64> =
        (0..want.len()).map(|i| magnitude(problem, w, &seen[i / n * k..][..k], i % n)).collect();
    for choice in SOME {
        let got = run_by(gpu, stream, problem, w, &x, None, choice);
        for (i, (a, &b)) in got.iter().zip(&want).enumerate() {
            let (a, rounded) = (a.to_f64(), T::from_f32(b).to_f64());
            if !rounded.is_finite() {
                let same = a == rounded || a.is_nan() && rounded.is_nan();
                assert!(same, "{problem:?} {choice:?} [{i}]: {a:e}, not {b:e}");
                continue;
            }
            let b = f64::from(b);
            let bound = (k as f64 / 16.0 + 32.0) * 2f64.powi(-23) * magnitudes[i]
                + T::EPSILON * b.abs()
                + 2f64.powi(-149);
            let least = f64::from(f32::MIN_POSITIVE);
            let flushed = b.abs() < least && a.abs() < least;
            assert!(
                flushed || (a - b).abs() <= bound,
                "{problem:?} {choice:?} [{i}]: {a:e}, not {b:e}, over {bound:e}"
            );
        }
    }
}

/// Scales at both ends of E8M0 whose product is ordinary, subnormal inputs, zero and NaN blocks.
#[test]
fn extreme_scales_and_special_blocks() {
    let Some(gpu) = gpu() else { return };
    let stream = OwnStream::new();
    let mut random = Random(14);
    for spec in specs() {
        for m in [1, 3, 20, 140] {
            for (up, down) in
                [(120, -120), (-120, 120), (-126, 100), (126, -126), (60, 60), (-140, 30)]
            {
                for quantised in [true, false] {
                    let (n, k) = (18, 160);
                    let mut scaled = |len, e| -> Vec<f32> {
                        let mut v = random.normals(len);
                        v.iter_mut().for_each(|v| *v = (f64::from(*v) * 2f64.powi(e)) as f32);
                        v
                    };
                    let (mut x, mut w) = (scaled(m * k, up), scaled(n * k, down));
                    x[..32].copy_from_slice(&random.normals(32));
                    w[..32].copy_from_slice(&random.normals(32));
                    x[32..64].fill(0.0);
                    x[40] = -0.0;
                    w[64..96].fill(-0.0);
                    w[(n - 1) * k + 7] = f32::NAN;
                    x[(m - 1) * k + 130] = f32::INFINITY;
                    let w = Weight::quantised(spec, n, k, &w);
                    let problem = w.problem(quantised.then_some(spec));
                    check_special::<f32>(gpu, &stream, &problem, &w, &x);
                    check_special::<bf16>(gpu, &stream, &problem, &w, &x);
                }
            }
        }
        if quick() {
            break;
        }
    }
    print_taken();
}

/// Sum of |x_i w_i| in f64; quantised x from the reference, in steps that cannot overflow.
fn magnitude(problem: &LinearProblem, w: &Weight, x: &[f32], j: usize) -> f64 {
    let k = problem.k;
    let row = w.row(j);
    let mut total = 0.0;
    let mut xs = x.to_vec();
    if let Some(spec) = &problem.activation {
        fake_quantize_rows(spec, x, 1, k, &mut xs).unwrap();
    }
    for (x, w) in xs.iter().zip(row) {
        let product = (f64::from(*x) * w).abs();
        if product.is_finite() {
            total += product;
        }
    }
    total
}

/// f16, bf16 and f32 in and out, with bias, alpha and beta, all block sizes, roundings and rules.
#[test]
fn types_bias_and_factors() {
    let Some(gpu) = gpu() else { return };
    let stream = OwnStream::new();
    let mut random = Random(15);
    for spec in specs() {
        let shapes = [(1, 37, 70), (5, 130, 257), (17, 16, 300), (90, 270, 400), (300, 64, 96)];
        // Under the sanitizer all of them take six minutes.
        for &(m, n, k) in if quick() { &shapes[1..4] } else { &shapes[..] } {
            let spec = QuantSpec {
                block_size: [16, 32, 64, 128, 256][random.below(5)],
                rounding: Rounding::ALL[random.below(3)],
                scale_rule: ScaleRule::ALL[random.below(4)],
                ..spec
            };
            let w = Weight::quantised(spec, n, k, &random.normals(n * k));
            for quantised in [true, false] {
                let problem = LinearProblem {
                    alpha: -1.5,
                    beta: 0.25,
                    ..w.problem(quantised.then_some(spec))
                };
                let (x, bias) = (random.normals(m * k), random.normals(n));
                macro_rules! check {
                    ($($type:ty),*) => {$({
                        let of = |v: &[f32]| v.iter().map(|&v| <$type as Element>::from_f32(v)).collect::<Vec<_>>();
                        let (x, bias) = (of(&x), of(&bias));
                        let wide = [256, 64].map(|tile| Choice::Wide { tile, splits: 1 });
                        for (bias, choice) in [Some(&bias[..]), None]
                            .into_iter()
                            .flat_map(|bias| wide.map(|choice| (bias, choice)).into_iter().chain([(bias, Choice::Fastest)]))
                        {
                            let y = run_by(gpu, &stream, &problem, &w, &x, bias, choice);
                            let units = worst(&problem, &w, &x, bias, &y, &mut random);
                            let bound = zero_mean_bound::<$type>(gpu, &problem, m, bias.is_some());
                            assert!(units <= bound, "{spec:?} {quantised} {m}x{n}x{k}: {units}");
                        }
                    })*};
                }
                check!(f32, f16, bf16);
            }
        }
    }
}

/// A captured graph gives the same bits as a plain call, also for other inputs.
#[test]
fn graphs_and_streams() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random(16);
    for (m, format) in
        [(1, ElementFormat::Fp4E2M1), (40, ElementFormat::Fp6E3M2), (300, ElementFormat::Fp8E4M3)]
    {
        let spec = mx(format);
        let (n, k) = (600, 1024);
        let w = Weight::random(spec, n, k, &mut random);
        let problem = w.problem(Some(spec));
        let plan = LinearPlan::new(gpu, &problem, m, FloatType::F32, false).unwrap();
        let x = Buffer::of(&random.normals(m * k));
        let y = Buffer::poisoned(m * n * 4);
        let scratch = Buffer::poisoned(plan.scratch_bytes());
        let buffers = LinearBuffers {
            x: x.ptr(),
            codes: w.device.0.ptr(),
            scales: w.device.1.ptr(),
            bias: 0,
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
            let plain = run_by(gpu, &other, &problem, &w, &values, None, Choice::Fastest);
            assert_eq!(replayed, plain, "{format} m={m}");
        }
    }
}

/// More rows than one piece takes; the last piece is smaller than the others.
#[test]
fn pieces() {
    let Some(gpu) = gpu() else { return };
    let stream = OwnStream::new();
    let mut random = Random(17);
    let m = if quick() { 300 } else { (32 << 10) + 77 };
    for (n, k) in [(40, 64), (37, 160)] {
        let spec = mx(ElementFormat::Fp8E4M3);
        let w = Weight::random(spec, n, k, &mut random);
        let problem = w.problem(Some(spec));
        let x: Vec<bf16> = random.normals(m * k).iter().map(|&v| bf16::from_f32(v)).collect();
        for choice in SOME {
            let y = run_by(gpu, &stream, &problem, &w, &x, None, choice);
            let units = worst(&problem, &w, &x, None, &y, &mut random);
            assert!(units <= 32.0, "{choice:?} {m}x{n}x{k}: {units}");
        }
    }
}

/// Calls that follow one another on one stream and one scratch memory, without a wait in between.
#[test]
fn calls_share_scratch_memory() {
    let Some(gpu) = gpu() else { return };
    let stream = OwnStream::new();
    let mut random = Random(18);
    let products: Vec<_> = [(300, 256, 1024), (1, 512, 4096), (700, 130, 96), (40, 256, 2048)]
        .into_iter()
        .map(|(m, n, k)| {
            let spec = mx(MX[random.below(5)]);
            let w = Weight::random(spec, n, k, &mut random);
            let x = random.normals(m * k);
            let problem = w.problem(Some(spec));
            let alone = run_by(gpu, &stream, &problem, &w, &x, None, Choice::Fastest);
            let plan = LinearPlan::new(gpu, &problem, m, FloatType::F32, false).unwrap();
            (plan, w, Buffer::of(&x), Buffer::poisoned(m * n * 4), alone)
        })
        .collect();
    let most = products.iter().map(|(plan, ..)| plan.scratch_bytes()).max().unwrap();
    let scratch = Buffer::poisoned(most);
    for _ in 0..if quick() { 2 } else { 50 } {
        for (plan, w, x, y, _) in &products {
            let buffers = LinearBuffers {
                x: x.ptr(),
                codes: w.device.0.ptr(),
                scales: w.device.1.ptr(),
                bias: 0,
                y: y.ptr(),
                scratch: scratch.ptr(),
            };
            // SAFETY: buffers as long as the plans say, alive until the stream is done.
            unsafe { plan.run(stream.get(), &buffers) }.unwrap();
        }
    }
    stream.synchronize();
    for (plan, _, _, y, alone) in &products {
        assert_eq!(&y.read::<f32>(), alone, "{}", plan.path());
    }
}

/// On compute capability 9.0 more than a few rows go to `wide.cu`: nothing falls back unseen.
#[test]
fn many_rows_take_the_wide_kernels() {
    let Some(gpu) = gpu() else { return };
    if gpu.attributes().capability != (9, 0) {
        println!("skipped: compute capability {:?}", gpu.attributes().capability);
        return;
    }
    for format in MX {
        let spec = mx(format);
        let w = Weight::random(spec, 256, 256, &mut Random(19));
        for m in [17, 64, 200, 2048] {
            let plan =
                LinearPlan::new(gpu, &w.problem(Some(spec)), m, FloatType::Bf16, false).unwrap();
            assert_eq!(plan.path_name(), "wide", "{format} m={m}");
        }
    }
}
