//! Extreme scales, dead rows, infinities and NaN.

use mx_kernels::{
    ElementFormat, Float, FloatMut, LinearProblem, PackedWeight, QuantSpec, ScaleKind, Serial,
    StdThreads, cpu::forced, dequantize_rows, reference,
};

use super::{Way, Weight, any_data_units, assert_close, exact, ways};
use crate::common::{Guarded, Random, specs};

/// Runs something with subnormal numbers flushed to zero, as ONNX Runtime's `session.set_denormal_as_zero` has it.
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
fn flushing(run: impl FnOnce()) {
    let mut old = 0_u32;
    // SAFETY: both instructions only move the register that they name, whose other bits stay.
    unsafe {
        std::arch::asm!("stmxcsr [{}]", in(reg) &raw mut old, options(nostack));
        let new = old | 0x8040;
        std::arch::asm!("ldmxcsr [{}]", in(reg) &raw const new, options(nostack));
    }
    run();
    // SAFETY: as above.
    unsafe { std::arch::asm!("ldmxcsr [{}]", in(reg) &raw const old, options(nostack)) };
}

/// Sums that cancel to little beside a small x: codes of eight bits are floats that are too small by some powers of
/// two, which flushing is not to show; nor does a feature depend on whether its neighbours have a small code.
#[test]
#[cfg(target_arch = "x86_64")]
fn flushed_subnormals_leave_the_bound() {
    for way in ways() {
        for spec in specs().into_iter().filter(|s| s.scale == ScaleKind::E8M0) {
            for (n, exponent) in [16, 64].into_iter().flat_map(|n| (50..82).map(move |e| (n, -e))) {
                let k = 32;
                let mut w = vec![0.0_f32; n * k];
                for (r, row) in w.chunks_mut(k).enumerate() {
                    row.fill(if r == 40 { 0.0 } else { 2f32.powi(-14) });
                    row[1] = -2f32.powi(-14);
                    row[2] = 57344.0;
                }
                let w = Weight::quantise(spec, n, k, &w);
                let mut x = vec![0.0_f32; k];
                x[0] = 2f32.powi(exponent) * (1.0 + 1.9 * 2f32.powi(-17));
                x[1] = 2f32.powi(exponent);
                let problem = w.problem(None);
                let mut y = vec![0.0; n];
                let (input, out) = (Float::F32(&x), FloatMut::F32(&mut y));
                let view = w.view();
                flushing(|| way.linear(&problem, input, &view, None, out, &Serial).unwrap());
                let (want, magnitude) = exact(&problem, &x, &view);
                let what = format!("{way} {spec:?} n={n} 2^{exponent}");
                assert_close(&y, &want, &magnitude, any_data_units(k), &what);
                let same =
                    y.iter().enumerate().all(|(r, v)| r == 40 || v.to_bits() == y[0].to_bits());
                assert!(same, "{what}: {y:?}");
            }
        }
    }
}

/// Scales at both ends of E8M0 whose product is ordinary, subnormal inputs, zero and NaN blocks.
#[test]
fn extreme_scales_and_special_blocks() {
    for way in ways() {
        let mut random = Random(4);
        for spec in specs().into_iter().filter(|s| s.scale == ScaleKind::E8M0) {
            for m in [1, 3, 6, 20] {
                for (up, down) in [(120, -120), (-120, 120), (-126, 100), (126, -126), (60, 60)] {
                    let (n, k) = (18, 160);
                    let scaled = |random: &mut Random, len, e| -> Vec<f32> {
                        let mut v = random.normals(len);
                        v.iter_mut().for_each(|v| *v *= 2f32.powi(e));
                        v
                    };
                    let (mut x, mut w) =
                        (scaled(&mut random, m * k, up), scaled(&mut random, n * k, down));
                    // Row 0 of both keeps ordinary blocks beside the extreme ones.
                    x[..32].copy_from_slice(&random.normals(32));
                    w[..32].copy_from_slice(&random.normals(32));
                    x[32..64].fill(0.0);
                    w[64..96].fill(-0.0);
                    w[(n - 1) * k + 7] = f32::NAN;
                    x[(m - 1) * k + 130] = f32::INFINITY;
                    check_reference(way, spec, m, n, k, &x, &w, &mut random);
                }
            }
        }
    }
}

/// Against the reference, which never leaves f64; the bound uses its own sum of magnitudes.
#[allow(clippy::too_many_arguments)]
fn check_reference(
    way: Way,
    spec: QuantSpec,
    m: usize,
    n: usize,
    k: usize,
    x: &[f32],
    w: &[f32],
    random: &mut Random,
) {
    let w = Weight::quantise(spec, n, k, w);
    let magnitudes = {
        let absolute = |v: &[f32]| -> Vec<f32> { v.iter().map(|v| v.abs()).collect() };
        let mut values = vec![0.0; n * k];
        dequantize_rows(&spec, w.codes.get(), w.scales.get(), n, k, &mut values).unwrap();
        let w = Weight::quantise(spec, n, k, &absolute(&values));
        let mut y = vec![0.0_f32; m * n];
        let problem = w.problem(Some(spec));
        let out = FloatMut::F32(&mut y);
        reference::linear(&problem, Float::F32(&absolute(x)), &w.view(), None, out).unwrap();
        y.into_iter().map(f64::from).collect::<Vec<f64>>()
    };
    let problem = w.problem(Some(spec));
    let (mut got, mut want) = (vec![0.0_f32; m * n], vec![0.0_f32; m * n]);
    let (x, view) = (Float::F32(x), w.view());
    let threads = StdThreads(1 + random.below(3));
    let out = FloatMut::F32(&mut got);
    way.linear(&problem, x, &view, None, out, &threads).unwrap();
    reference::linear(&problem, x, &view, None, FloatMut::F32(&mut want)).unwrap();
    let want: Vec<f64> = want.into_iter().map(f64::from).collect();
    let what = format!("{way} {spec:?} {m}x{n}x{k}");
    assert_close(&got, &want, &magnitudes, any_data_units(k), &what);
}

/// Rows of a weight that training has let decay to nothing, and activations whose tails are as small as
/// those of a SiLU: ordinary numbers beside them, alone, and where only a product is out of range.
#[test]
fn tiny_values_and_dead_rows() {
    for way in ways() {
        let mut random = Random(11);
        for spec in specs().into_iter().filter(|s| s.scale == ScaleKind::E8M0) {
            for (m, w_exponent, x_exponent) in
                [(1, -70, -20), (2, -95, -4), (9, -60, -60), (33, -40, -100), (3, -110, 0)]
            {
                let (n, k) = (40, 608);
                let mut weight = random.normals(n * k);
                weight[..3 * k].iter_mut().for_each(|v| *v *= 2f32.powi(w_exponent));
                let mut x = random.normals(m * k);
                x[k - 40..].iter_mut().take(300).for_each(|v| *v *= 2f32.powi(x_exponent));
                x[5] *= 2f32.powi(x_exponent);
                let w = Weight::quantise(spec, n, k, &weight);
                for activation in [Some(spec), None] {
                    let problem = w.problem(activation);
                    let mut y = vec![f32::NAN; m * n];
                    let out = FloatMut::F32(&mut y);
                    way.linear(&problem, Float::F32(&x), &w.view(), None, out, &Serial).unwrap();
                    let (want, magnitude) = exact(&problem, &x, &w.view());
                    let what = format!("{way} {spec:?} {m} 2^{w_exponent} 2^{x_exponent}");
                    assert_close(&y, &want, &magnitude, any_data_units(k), &what);
                }
            }
        }
    }
}

/// Rows that the kernels compute shifted, in f64 or not at all, beside ordinary ones in one repacked weight;
/// every code that is a number, garbage behind the rows' ends, NaN in x.
#[test]
fn special_rows_of_repacked_weights() {
    let (n, k) = (1040, 250);
    for way in ways().into_iter().filter(|way| way.prepared) {
        let mut random = Random(12);
        for spec in specs().into_iter().filter(|s| s.scale == ScaleKind::E8M0) {
            let mut codes: Vec<u8> =
                (0..spec.codes_len(n, k)).map(|_| random.bits() as u8).collect();
            let eight = spec.format.bits() == 8 && spec.format != ElementFormat::MxInt8;
            if eight {
                codes.iter_mut().for_each(|code| *code &= 0xbf);
            }
            let blocks = spec.blocks(k);
            let mut scales: Vec<u8> =
                (0..n * blocks).map(|_| 107 + random.below(41) as u8).collect();
            let mut set = |row: usize, f: &dyn Fn(usize) -> u8| {
                (0..blocks).for_each(|b| scales[row * blocks + b] = f(b));
            };
            set(3, &|b| if b == 2 { 0xff } else { 127 });
            set(20, &|b| 20 + b as u8);
            set(21, &|_| 0);
            set(22, &|b| 230 + b as u8);
            set(23, &|_| 254);
            set(40, &|b| if b % 2 == 0 { 30 } else { 150 });
            if eight {
                codes[41 * spec.row_bytes(k) + 5] = 0x7f;
            }
            let w =
                Weight { spec, n, k, codes: Guarded::new(&codes), scales: Guarded::new(&scales) };
            let sizes = sizes_of_rows(&w.view());
            for m in [1, 3, 20, 40] {
                for activation in [Some(spec), None] {
                    let mut x = random.normals(m * k);
                    if m > 1 {
                        x[k + 17] = f32::NAN;
                    }
                    let problem = w.problem(activation);
                    let plain = w.problem(Some(QuantSpec::mx(ElementFormat::Fp8E4M3).unwrap()));
                    assert_eq!(
                        forced::repacks(way.variant, &problem, &w.view()),
                        forced::repacks(way.variant, &problem, &ordinary(&plain, spec).view()),
                        "{way} {spec:?}: special rows keep the weight from being repacked"
                    );
                    let (mut got, mut want) = (vec![0.5_f32; m * n], vec![0.0_f32; m * n]);
                    let (x, view) = (Float::F32(&x), w.view());
                    way.linear(&problem, x, &view, None, FloatMut::F32(&mut got), &StdThreads(2))
                        .unwrap();
                    reference::linear(&problem, x, &view, None, FloatMut::F32(&mut want)).unwrap();
                    let Float::F32(x) = x else { unreachable!() };
                    let largest = x.iter().fold(0.0, |a: f32, v| v.abs().max(a));
                    let bounds: Vec<f64> = sizes.iter().map(|s| s * f64::from(largest)).collect();
                    compare_rows(
                        &got,
                        &want,
                        &bounds,
                        &format!("{way} {spec:?} m={m} {activation:?}"),
                    );
                }
            }
        }
    }
}

/// A weight of the same shape and format with nothing special about it.
fn ordinary(problem: &LinearProblem, spec: QuantSpec) -> Weight {
    let values = Random(13).normals(problem.n * problem.k);
    Weight::quantise(spec, problem.n, problem.k, &values)
}

/// Sums of the magnitudes of a weight's rows; not finite for rows beyond f32.
pub(super) fn sizes_of_rows(w: &PackedWeight<'_>) -> Vec<f64> {
    let mut values = vec![0.0; w.n() * w.k()];
    dequantize_rows(w.spec(), w.codes(), w.scales(), w.n(), w.k(), &mut values).unwrap();
    values.chunks(w.k()).map(|row| row.iter().map(|v| f64::from(v.abs())).sum()).collect()
}

/// Features differ by many powers of two: each is held to the size of its own row of the weight.
pub(super) fn compare_rows(got: &[f32], want: &[f32], sizes: &[f64], what: &str) {
    for (i, (&a, &b)) in got.iter().zip(want).enumerate() {
        let size = sizes[i % sizes.len()];
        let (a, b) = (f64::from(a), f64::from(b));
        let bound = if size.is_finite() { size * 1e-5 } else { b.abs() * 1e-3 };
        let close = (a - b).abs() <= bound + 2f64.powi(-126);
        assert!(close || a == b || a.is_nan() && b.is_nan(), "{what} [{i}]: {a:e}, not {b:e}");
    }
}
