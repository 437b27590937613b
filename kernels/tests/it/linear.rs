//! Every variant's `linear` against the exact result, within the documented bounds.

mod planes;
mod special;

use half::{bf16, f16};
use mx_kernels::{
    ElementFormat, Error, Float, FloatMut, LinearProblem, PackedWeight, Parallel, QuantSpec,
    Rounding, ScaleKind, ScaleRule, Serial, StdThreads, cpu::forced, dequantize_rows,
    fake_quantize_rows, linear, quantize_rows, reference,
};

use crate::common::{Guarded, Random, specs, variants};

/// A variant's kernels on the file's codes or on a repacked weight.
#[derive(Debug, Clone, Copy)]
struct Way {
    variant: &'static str,
    prepared: bool,
}

impl std::fmt::Display for Way {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}{}", self.variant, if self.prepared { " (prepared)" } else { "" })
    }
}

impl Way {
    fn linear(
        self,
        problem: &LinearProblem,
        x: Float<'_>,
        w: &PackedWeight<'_>,
        bias: Option<Float<'_>>,
        y: FloatMut<'_>,
        par: &dyn Parallel,
    ) -> Result<(), Error> {
        let run = if self.prepared { forced::linear_prepared } else { forced::linear };
        run(self.variant, problem, x, w, bias, y, par)
    }
}

fn ways() -> Vec<Way> {
    let of = |variant| [false, true].map(|prepared| Way { variant, prepared });
    variants().into_iter().flat_map(of).collect()
}

/// A packed weight in memory that ends at an unreadable page.
struct Weight {
    spec: QuantSpec,
    n: usize,
    k: usize,
    codes: Guarded<u8>,
    scales: Guarded<u8>,
}

impl Weight {
    fn quantise(spec: QuantSpec, n: usize, k: usize, values: &[f32]) -> Self {
        let (mut codes, mut scales) =
            (vec![0; spec.codes_len(n, k)], vec![0; spec.scales_len(n, k)]);
        quantize_rows(&spec, values, n, k, &mut codes, &mut scales).unwrap();
        Self { spec, n, k, codes: Guarded::new(&codes), scales: Guarded::new(&scales) }
    }

    fn view(&self) -> PackedWeight<'_> {
        PackedWeight::new(self.spec, self.n, self.k, self.codes.get(), self.scales.get()).unwrap()
    }

    fn problem(&self, activation: Option<QuantSpec>) -> LinearProblem {
        LinearProblem { n: self.n, k: self.k, weight: self.spec, activation, alpha: 1.0, beta: 1.0 }
    }
}

/// The exact sums and the sums of magnitudes, [m, n], in f64.
fn exact(problem: &LinearProblem, x: &[f32], w: &PackedWeight<'_>) -> (Vec<f64>, Vec<f64>) {
    let (n, k) = (problem.n, problem.k);
    let m = x.len() / k;
    let mut xs = x.to_vec();
    if let Some(spec) = &problem.activation {
        fake_quantize_rows(spec, x, m, k, &mut xs).unwrap();
    }
    let mut ws = vec![0.0; n * k];
    dequantize_rows(w.spec(), w.codes(), w.scales(), n, k, &mut ws).unwrap();
    let (mut sums, mut magnitudes) = (vec![0.0; m * n], vec![0.0; m * n]);
    for i in 0..m {
        for j in 0..n {
            for (x, w) in xs[i * k..][..k].iter().zip(&ws[j * k..][..k]) {
                let product = f64::from(*x) * f64::from(*w);
                sums[i * n + j] += product;
                magnitudes[i * n + j] += product.abs();
            }
        }
    }
    (sums, magnitudes)
}

/// Checks |y - want| <= units * 2^-23 * magnitude, or a flushed result below 2^-126.
fn assert_close(y: &[f32], want: &[f64], magnitude: &[f64], units: f64, what: &str) {
    for i in 0..y.len() {
        let (y, want) = (f64::from(y[i]), want[i]);
        if want.is_nan() || want.is_infinite() {
            assert!(y == want || y.is_nan() && want.is_nan(), "{what} [{i}]: {y}, not {want}");
            continue;
        }
        let flushed = want.abs() < 2f64.powi(-126) && y == 0.0;
        let bound = units * 2f64.powi(-23) * magnitude[i] + 2f64.powi(-149);
        let error = (y - want).abs();
        assert!(flushed || error <= bound, "{what} [{i}]: {y:e}, not {want:e}, over {bound:e}");
    }
}

fn any_data_units(k: usize) -> f64 {
    k as f64 / 16.0 + 32.0
}

/// Rows x columns x k that reach every tile height, ragged panels, chunks and tails.
const SHAPES: &[(usize, usize, usize)] = &[
    (1, 1, 1),
    (1, 5, 31),
    (1, 33, 300),
    (2, 7, 64),
    (2, 18, 257),
    (3, 40, 96),
    (4, 9, 530),
    (5, 17, 33),
    (6, 16, 256),
    (7, 31, 255),
    (8, 64, 512),
    (9, 65, 49),
    (13, 3, 700),
    (14, 32, 17),
    (15, 100, 128),
    (29, 20, 768),
    (64, 48, 96),
    (130, 70, 320),
    (3, 4, 2048),
    (20, 6, 2100),
];

#[test]
fn random_data_stays_within_the_tight_bound() {
    for way in ways() {
        let mut random = Random(2);
        for spec in specs() {
            for &(m, n, k) in SHAPES {
                for quantised in [true, false] {
                    let w = Weight::quantise(spec, n, k, &random.normals(n * k));
                    let problem = w.problem(quantised.then_some(spec));
                    let x = Guarded::new(&random.normals(m * k));
                    let mut y = Guarded::new(&vec![0.0_f32; m * n]);
                    let out = FloatMut::F32(y.get_mut());
                    let x = Float::F32(x.get());
                    way.linear(&problem, x, &w.view(), None, out, &Serial).unwrap();
                    let Float::F32(x) = x else { unreachable!() };
                    let (want, magnitude) = exact(&problem, x, &w.view());
                    let what = format!("{way} {spec:?} {m}x{n}x{k} {quantised}");
                    assert_close(y.get(), &want, &magnitude, 32.0, &what);
                }
            }
        }
    }
}

/// Sums of one sign and of equal terms, where rounding errors add up.
#[test]
fn systematic_data_stays_within_the_wide_bound() {
    for way in ways() {
        let mut random = Random(3);
        for spec in specs() {
            for k in [40, 64, 65, 73, 130, 703, 704, 1599, 1600, 4096] {
                for m in [1, 4, 7] {
                    let n = 9;
                    for constant in [true, false] {
                        let mut value = || if constant { 1.3 } else { 1.0 + random.normal().abs() };
                        let w: Vec<f32> = (0..n * k).map(|_| value()).collect();
                        let x: Vec<f32> = (0..m * k).map(|_| value()).collect();
                        let w = Weight::quantise(spec, n, k, &w);
                        let problem = w.problem(None);
                        let mut y = vec![0.0; m * n];
                        let out = FloatMut::F32(&mut y);
                        let view = w.view();
                        let input = Float::F32(&x);
                        way.linear(&problem, input, &view, None, out, &Serial).unwrap();
                        let (want, magnitude) = exact(&problem, &x, &view);
                        let what = format!("{way} {spec:?} m={m} k={k}");
                        assert_close(&y, &want, &magnitude, any_data_units(k), &what);
                    }
                }
            }
        }
    }
}

/// More k than a chain or a panel holds, more x than stays near, more rows than one pass takes: within the
/// bound, and the same bits whatever the threads.
#[test]
fn many_steps_and_groups() {
    for way in ways() {
        let mut random = Random(14);
        for format in [ElementFormat::Fp8E4M3, ElementFormat::Fp6E2M3, ElementFormat::Fp4E2M1] {
            let spec = QuantSpec::mx(format).unwrap();
            for (m, n, k) in [(1, 300, 4128), (40, 48, 4128), (600, 40, 1100)] {
                let w = Weight::quantise(spec, n, k, &random.normals(n * k));
                let x = random.normals(m * k);
                let brain: Vec<bf16> = x.iter().map(|&v| bf16::from_f32(v)).collect();
                for (activation, half) in [(Some(spec), false), (None, false), (None, true)] {
                    let problem = w.problem(activation);
                    let run = |threads: usize| -> Vec<f32> {
                        let mut y = vec![f32::NAN; m * n];
                        let x = if half { Float::Bf16(&brain) } else { Float::F32(&x) };
                        let (out, par) = (FloatMut::F32(&mut y), StdThreads(threads));
                        way.linear(&problem, x, &w.view(), None, out, &par).unwrap();
                        y
                    };
                    let what = format!("{way} {format} {m}x{n}x{k} {}", activation.is_some());
                    let once = run(1);
                    for threads in [3, 8] {
                        let bits = |y: &[f32]| y.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
                        assert_eq!(bits(&once), bits(&run(threads)), "{what} {threads} threads");
                    }
                    let values: Vec<f32> = match half {
                        true => brain.iter().map(|v| v.to_f32()).collect(),
                        false => x.clone(),
                    };
                    let (want, magnitude) = exact(&problem, &values, &w.view());
                    assert_close(&once, &want, &magnitude, 32.0, &what);
                }
            }
        }
    }
}

/// Every pair of formats with block scales, several block sizes, every number of rows up to a few tiles:
/// what W4A8 and the like take, and the edges of tiles and panels.
#[test]
fn pairs_of_formats_and_all_heights() {
    let formats = || specs().into_iter().filter(|s| s.scale == ScaleKind::E8M0).map(|s| s.format);
    for way in ways() {
        let mut random = Random(9);
        for w_format in formats() {
            for x_format in formats() {
                for block_size in [32, 64, 256] {
                    let spec = |format| QuantSpec { block_size, ..QuantSpec::mx(format).unwrap() };
                    let (n, k) = (1 + random.below(70), 1 + random.below(600));
                    let mut weight = random.normals(n * k);
                    weight[..32.min(k)].fill(0.0);
                    let w = Weight::quantise(spec(w_format), n, k, &weight);
                    let heights = [1 + random.below(13), 14 + random.below(117)];
                    let heights =
                        if block_size == 32 { heights.to_vec() } else { vec![heights[0]] };
                    for m in heights {
                        let problem = w.problem(Some(spec(x_format)));
                        let x = Guarded::new(&random.normals(m * k));
                        let mut y = Guarded::new(&vec![f32::NAN; m * n]);
                        let out = FloatMut::F32(y.get_mut());
                        let par = StdThreads(1 + random.below(3));
                        way.linear(&problem, Float::F32(x.get()), &w.view(), None, out, &par)
                            .unwrap();
                        let (want, magnitude) = exact(&problem, x.get(), &w.view());
                        let what = format!("{way} {w_format} x {x_format} {m}x{n}x{k}");
                        assert_close(y.get(), &want, &magnitude, 32.0, &what);
                    }
                }
            }
        }
    }
}

/// Few rows and many panels, which some kernels take several at a time: within the bound, and each feature's bits do
/// not depend on those beside it, nor on the threads.
#[test]
fn panels_at_a_time() {
    let formats = || specs().into_iter().filter(|s| s.scale == ScaleKind::E8M0).map(|s| s.format);
    for way in ways() {
        let mut random = Random(16);
        for w_format in formats() {
            for x_format in formats().map(Some).chain([None]) {
                let spec = |format| QuantSpec::mx(format).unwrap();
                // Enough work for more than one thread.
                let (m, k) = (1 + random.below(5), 1030 + random.below(400));
                for n in [64, 16 * 4 + 1, 16 * 7, 16 * 9 - 3] {
                    let values = random.normals(n * k);
                    let w = Weight::quantise(spec(w_format), n, k, &values);
                    let x = Guarded::new(&random.normals(m * k));
                    let run = |w: &Weight, threads: usize| {
                        let problem = w.problem(x_format.map(spec));
                        let mut y = Guarded::new(&vec![f32::NAN; m * w.n]);
                        let out = FloatMut::F32(y.get_mut());
                        let par = StdThreads(threads);
                        way.linear(&problem, Float::F32(x.get()), &w.view(), None, out, &par)
                            .unwrap();
                        y.get().to_vec()
                    };
                    let what = format!("{way} {w_format} x {x_format:?} {m}x{n}x{k}");
                    let y = run(&w, 1);
                    let (want, magnitude) =
                        exact(&w.problem(x_format.map(spec)), x.get(), &w.view());
                    assert_close(&y, &want, &magnitude, 32.0, &what);
                    let bits = |y: &[f32]| y.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
                    assert_eq!(bits(&y), bits(&run(&w, 3)), "{what}: three threads");
                    let panel = 16 * random.below(n / 16);
                    let few = &values[panel * k..(panel + 16) * k];
                    let few = Weight::quantise(spec(w_format), 16, k, few);
                    let alone = run(&few, 1);
                    for (row, alone) in y.chunks(n).zip(alone.chunks(16)) {
                        let row = &row[panel..panel + 16];
                        assert_eq!(bits(row), bits(alone), "{what}: panel of {panel} alone");
                    }
                }
            }
        }
    }
}

/// All heights from 1 to 130 for each format, quantised and weight-only in every type of x. An emulator
/// computes the exact sums so slowly that it takes every seventh above 16.
#[test]
fn every_height() {
    let sparse = crate::common::emulated();
    if sparse {
        println!("skipped: six of seven heights above 16, in an emulator");
    }
    for way in ways() {
        let mut random = Random(10);
        for spec in specs().into_iter().filter(|s| s.scale == ScaleKind::E8M0) {
            let (n, k) = (35, 544);
            let w = Weight::quantise(spec, n, k, &random.normals(n * k));
            for m in (1..=130).filter(|m| !sparse || *m <= 16 || m % 7 == 0) {
                let problem = w.problem((m % 2 == 0).then_some(spec));
                let x = random.normals(m * k);
                let half: Vec<f16> = x.iter().map(|&v| f16::from_f32(v)).collect();
                let brain: Vec<bf16> = x.iter().map(|&v| bf16::from_f32(v)).collect();
                let (x, values): (_, Vec<f32>) = match m % 3 {
                    0 => (Float::F32(&x), x.clone()),
                    1 => (Float::F16(&half), half.iter().map(|v| v.to_f32()).collect()),
                    _ => (Float::Bf16(&brain), brain.iter().map(|v| v.to_f32()).collect()),
                };
                let mut y = vec![f32::NAN; m * n];
                way.linear(&problem, x, &w.view(), None, FloatMut::F32(&mut y), &Serial).unwrap();
                let (want, magnitude) = exact(&problem, &values, &w.view());
                let what = format!("{way} {spec:?} m={m} {:?}", problem.activation.is_some());
                assert_close(&y, &want, &magnitude, 32.0, &what);
            }
        }
    }
}

/// Imported weights may hold any bytes: all codes, all scale bytes, garbage behind the row's end.
#[test]
fn every_code_and_scale_byte_means_what_the_reference_says() {
    for way in ways() {
        let mut random = Random(5);
        for spec in specs() {
            for (m, n, k) in [(1, 24, 250), (3, 10, 63), (7, 40, 250), (2, 300, 33)] {
                let codes: Vec<u8> =
                    (0..spec.codes_len(n, k)).map(|_| random.bits() as u8).collect();
                let scales: Vec<u8> = match spec.scale {
                    ScaleKind::Tensor => 0.37_f32.to_le_bytes().to_vec(),
                    _ => (0..spec.scales_len(n, k)).map(|_| random.bits() as u8).collect(),
                };
                let (codes, scales) = (Guarded::new(&codes), Guarded::new(&scales));
                let w = Weight { spec, n, k, codes, scales };
                // One-hot x: each result is one weight, so that extremes do not hide each other.
                let mut x = vec![0.0_f32; m * k];
                for i in 0..m {
                    x[i * k + (i * 17 + random.below(k)) % k] = 1.0;
                }
                let problem = w.problem(None);
                let (mut got, mut want) = (vec![0.0_f32; m * n], vec![0.0_f32; m * n]);
                let (x, view) = (Float::F32(&x), w.view());
                let out = FloatMut::F32(&mut got);
                way.linear(&problem, x, &view, None, out, &Serial).unwrap();
                reference::linear(&problem, x, &view, None, FloatMut::F32(&mut want)).unwrap();
                for (i, (a, b)) in got.iter().zip(&want).enumerate() {
                    let same = a == b || a.is_nan() && b.is_nan();
                    assert!(same, "{way} {spec:?} {m}x{n}x{k} [{i}]: {a:e}, not {b:e}");
                }
            }
        }
    }
}

/// Every finite code with an ordinary scale, sixteen neighbours to a panel, so that some panels hold small
/// magnitudes and others none; one-hot x at every height that takes codes directly.
#[test]
fn every_code_at_every_small_height() {
    let (n, k) = (256, 64);
    for way in ways() {
        for spec in specs().into_iter().filter(|s| s.scale == ScaleKind::E8M0) {
            let count = 1_u32 << spec.format.bits();
            let finite = |code: u32| if spec.format.decode(code).is_finite() { code } else { 0x38 };
            let codes: Vec<u32> = (0..n as u32).map(|row| finite(row % count)).collect();
            // Four codes are whole bytes in every format.
            let four = |code: u32| -> u32 {
                (0..4).fold(0, |bits, i| bits | code << (i * spec.format.bits()))
            };
            let bytes: Vec<u8> = codes
                .iter()
                .flat_map(|&code| {
                    let bytes = four(code).to_le_bytes();
                    bytes[..spec.format.bits() as usize / 2].repeat(k / 4)
                })
                .collect();
            let scales = vec![126; spec.scales_len(n, k)];
            let (packed, scales) = (Guarded::new(&bytes), Guarded::new(&scales));
            let w = Weight { spec, n, k, codes: packed, scales };
            for m in 1..10 {
                let mut x = vec![0.0_f32; m * k];
                (0..m).for_each(|i| x[i * k + (i * 23 + m * 5) % k] = 3.0);
                let mut y = vec![f32::NAN; m * n];
                let out = FloatMut::F32(&mut y);
                way.linear(&w.problem(None), Float::F32(&x), &w.view(), None, out, &Serial)
                    .unwrap();
                for (i, y) in y.iter().enumerate() {
                    let want = 1.5 * spec.format.decode(codes[i % n]);
                    assert!(*y == want, "{way} {spec:?} m={m} [{i}]: {y:e}, not {want:e}");
                }
            }
        }
    }
}

/// f16 and bf16 in and out, with bias, alpha and beta, in guarded memory.
#[test]
fn half_types_bias_alpha_and_beta() {
    for way in ways() {
        let mut random = Random(6);
        for spec in specs() {
            for (m, n, k) in [(1, 37, 70), (5, 37, 70), (17, 16, 300)] {
                let w = Weight::quantise(spec, n, k, &random.normals(n * k));
                let activation = (random.below(2) == 0).then_some(spec);
                let problem = LinearProblem { alpha: -1.5, beta: 0.25, ..w.problem(activation) };
                let (x, bias) = (random.normals(m * k), random.normals(n));
                macro_rules! check {
                    ($kind:ident, $type:ty, $epsilon:expr) => {{
                        let of = |v: &[f32]| -> Vec<$type> {
                            v.iter().map(|&v| <$type>::from_f32(v)).collect()
                        };
                        let (x, bias) = (Guarded::new(&of(&x)), Guarded::new(&of(&bias)));
                        let mut y = Guarded::new(&vec![<$type>::from_f32(9.0); m * n]);
                        let mut want = vec![<$type>::from_f32(9.0); m * n];
                        let (x, bias) = (Float::$kind(x.get()), Some(Float::$kind(bias.get())));
                        let (view, out) = (w.view(), FloatMut::$kind(y.get_mut()));
                        way.linear(&problem, x, &view, bias, out, &Serial).unwrap();
                        let out = FloatMut::$kind(&mut want);
                        reference::linear(&problem, x, &view, bias, out).unwrap();
                        for (a, b) in y.get().iter().zip(&want) {
                            let (a, b) = (f64::from(*a), f64::from(*b));
                            // One step of the type, or the sum's own error near zero.
                            let bound = $epsilon * b.abs() + 1e-4;
                            assert!((a - b).abs() <= bound, "{way} {spec:?}: {a}, not {b}");
                        }
                    }};
                }
                check!(F16, f16, 2f64.powi(-10));
                check!(Bf16, bf16, 2f64.powi(-7));
                // f32 goes through the same code; its bias too must end at the guard page.
                let bias = Guarded::new(&bias);
                let (mut y, mut want) = (vec![0.0_f32; m * n], vec![0.0_f32; m * n]);
                let (x, bias, view) = (Float::F32(&x), Some(Float::F32(bias.get())), w.view());
                let out = FloatMut::F32(&mut y);
                way.linear(&problem, x, &view, bias, out, &Serial).unwrap();
                let out = FloatMut::F32(&mut want);
                reference::linear(&problem, x, &view, bias, out).unwrap();
                for (a, b) in y.iter().zip(&want) {
                    assert!((a - b).abs() <= 1e-4, "{way} {spec:?}: {a}, not {b}");
                }
            }
        }
    }
}

#[test]
fn same_bits_whatever_the_threads() {
    for way in ways() {
        let mut random = Random(7);
        for format in [ElementFormat::Fp8E4M3, ElementFormat::Fp6E2M3, ElementFormat::Fp4E2M1] {
            let spec = QuantSpec::mx(format).unwrap();
            for (m, n, k) in [(1, 1000, 200), (3, 200, 700), (70, 90, 300), (600, 16, 130)] {
                let w = Weight::quantise(spec, n, k, &random.normals(n * k));
                let (problem, x) = (w.problem(Some(spec)), random.normals(m * k));
                let run = |threads: usize| -> Vec<u32> {
                    let mut y = vec![0.0; m * n];
                    let (x, out) = (Float::F32(&x), FloatMut::F32(&mut y));
                    let par = StdThreads(threads);
                    way.linear(&problem, x, &w.view(), None, out, &par).unwrap();
                    y.into_iter().map(f32::to_bits).collect()
                };
                let once = run(1);
                for threads in [1, 2, 3, 8] {
                    assert_eq!(once, run(threads), "{way} {format} {m}x{n}x{k} {threads}");
                }
            }
        }
    }
}

#[test]
fn more_rows_than_fit_at_once() {
    let mut random = Random(8);
    let spec = QuantSpec::mx(ElementFormat::Fp4E2M1).unwrap();
    let (m, n, k) = (1100, 5, 40);
    let w = Weight::quantise(spec, n, k, &random.normals(n * k));
    let (problem, x) = (w.problem(Some(spec)), random.normals(m * k));
    let mut y = vec![0.0; m * n];
    linear(&problem, Float::F32(&x), &w.view(), None, FloatMut::F32(&mut y), &Serial).unwrap();
    let (want, magnitude) = exact(&problem, &x, &w.view());
    assert_close(&y, &want, &magnitude, 32.0, "1100 rows");
}

#[test]
fn what_does_not_fit_is_an_error() {
    let spec = QuantSpec::mx(ElementFormat::Fp8E4M3).unwrap();
    let w = Weight::quantise(spec, 4, 40, &[1.0; 160]);
    let problem = w.problem(None);
    let run = |problem: &LinearProblem, x: usize, bias: usize, y: usize| {
        let (x, bias, mut y) = (vec![0.0; x], vec![0.0; bias], vec![0.0; y]);
        let (x, bias) = (Float::F32(&x), Some(Float::F32(&bias)));
        linear(problem, x, &w.view(), bias, FloatMut::F32(&mut y), &Serial)
    };
    assert_eq!(run(&problem, 80, 4, 8), Ok(()));
    assert_eq!(run(&problem, 0, 4, 0), Ok(()));
    assert!(matches!(run(&problem, 81, 4, 8), Err(Error::Rows { .. })));
    assert!(matches!(run(&problem, 80, 3, 8), Err(Error::Length { what: "bias", .. })));
    assert!(matches!(run(&problem, 80, 4, 9), Err(Error::Length { what: "y", .. })));
    let other = LinearProblem { k: 80, ..problem };
    assert!(matches!(run(&other, 80, 4, 4), Err(Error::Mismatch { .. })));
    let invalid = QuantSpec { block_size: 0, ..spec };
    let other = LinearProblem { activation: Some(invalid), ..problem };
    assert_eq!(run(&other, 80, 4, 8), Err(Error::BlockSize(0)));
    let short = PackedWeight::new(spec, 4, 40, &w.codes.get()[1..], w.scales.get());
    assert!(matches!(short, Err(Error::Length { what: "codes", .. })));
    let huge = PackedWeight::new(spec, usize::MAX, usize::MAX, &[], &[]);
    assert!(matches!(huge, Err(Error::Length { .. })));
    let unscaled = QuantSpec::new(
        ElementFormat::Fp4E2M1,
        ScaleKind::None,
        32,
        Rounding::Even,
        ScaleRule::Floor,
    );
    assert!(matches!(unscaled, Err(Error::Combination { .. })));
}
