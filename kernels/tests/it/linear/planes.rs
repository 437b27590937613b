//! One row of x that is not quantised, which goes in planes where there are integer products, and what its planes lack.

use mx_kernels::{ElementFormat, Float, FloatMut, QuantSpec, Serial, reference};

use super::{
    Weight, any_data_units, assert_close, exact,
    special::{compare_rows, sizes_of_rows},
    ways,
};
use crate::common::{Random, specs};

/// Elements beside much larger ones whose weights are zero: whatever shares a scale with those, or a sum,
/// the bound is one of the products that count.
#[test]
fn small_elements_beside_large_ones_keep_their_digits() {
    for way in ways() {
        let mut random = Random(13);
        for spec in specs().into_iter().filter(|s| s.block_size.is_multiple_of(32)) {
            for k in [64, 500, 1024, 4096] {
                for (m, up, every) in [
                    (1, 6, 1),
                    (1, 12, 1),
                    (3, 12, 5),
                    (1, 20, 70),
                    (1, 20, 1),
                    (1, 45, 30),
                    (3, 45, 1),
                ] {
                    let n = if k == 500 { 70 } else { 19 };
                    let large = |i: usize| i % k % 32 == 7 && (i % k / 32).is_multiple_of(every);
                    let mut x = random.normals(m * k);
                    let mut w = random.normals(n * k);
                    for (i, v) in x.iter_mut().enumerate() {
                        *v *= if large(i) { 2f32.powi(up) } else { 2f32.powi(-(i as i32 % 7)) };
                    }
                    (0..n * k).filter(|&i| large(i)).for_each(|i| w[i] = 0.0);
                    let w = Weight::quantise(spec, n, k, &w);
                    let problem = w.problem(None);
                    let mut y = vec![0.0; m * n];
                    let out = FloatMut::F32(&mut y);
                    way.linear(&problem, Float::F32(&x), &w.view(), None, out, &Serial).unwrap();
                    let (want, magnitude) = exact(&problem, &x, &w.view());
                    let what = format!("{way} {spec:?} m={m} k={k} 2^{up} every {every}");
                    assert_close(&y, &want, &magnitude, any_data_units(k), &what);
                }
            }
        }
    }
}

/// Every block loses what it may, every addition is a tie, and all of it goes one way: what the proof of
/// the bound counts for a row in planes (`cpu/packed/planes.rs`).
#[test]
fn the_worst_row_for_planes_keeps_the_bound() {
    let formats = [ElementFormat::Fp4E2M1, ElementFormat::Fp6E2M3, ElementFormat::Fp6E3M2];
    for way in ways() {
        let cases = formats
            .into_iter()
            .flat_map(|format| [576_usize, 2016, 2048, 4096, 8192, 14336].map(|k| (format, k)));
        for (format, k) in cases {
            let (n, blocks, unit) = (70, k / 32, 2f32.powi(-9));
            let part = 2f32.powi(if k < 2048 { -19 } else { -17 });
            let last = (k / 16).div_ceil(31);
            let (mut x, mut row) = (vec![0.0_f32; k], vec![0.0_f32; k]);
            let mut set = |i: usize, value: f32, weight: f32| (x[i], row[i]) = (value, weight);
            set(0, 1024.0, 0.0);
            set(1, 0.125 * (1.0 + part), 4.0);
            set(32, 0.5 * unit, 0.0);
            set(33, 2f32.powi(-13) * unit, 1.0);
            set(34, -2f32.powi(-14) * unit, 1.0);
            for b in 2..blocks - last {
                set(32 * b, 0.125 * unit, 0.0);
                set(32 * b + 1, 2f32.powi(-15) * unit, 1.0);
                set(32 * b + 2, 2f32.powi(-16) * unit, 1.0);
            }
            for (i, at) in (32 * (blocks - last)..k).filter(|at| at % 32 != 0).enumerate() {
                if i < k / 16 {
                    set(at, 2f32.powi(-16) * unit, 1.0);
                }
                set(at / 32 * 32, 8192.0 * unit, 0.0);
            }
            let spec = QuantSpec::mx(format).unwrap();
            // Powers of two are exact whatever their block's scale.
            let w = Weight::quantise(spec, n, k, &row.repeat(n));
            let problem = w.problem(None);
            let mut y = vec![0.0; n];
            let out = FloatMut::F32(&mut y);
            way.linear(&problem, Float::F32(&x), &w.view(), None, out, &Serial).unwrap();
            let (want, magnitude) = exact(&problem, &x, &w.view());
            assert_close(&y, &want, &magnitude, any_data_units(k), &format!("{way} {format} {k}"));
        }
    }
}

/// One row with what has no planes, beside what has.
#[test]
fn single_rows_of_special_values_are_the_references() {
    let (n, k) = (40, 300);
    for way in ways() {
        let mut random = Random(15);
        for format in [ElementFormat::Fp4E2M1, ElementFormat::Fp8E4M3] {
            let spec = QuantSpec::mx(format).unwrap();
            let w = Weight::quantise(spec, n, k, &random.normals(n * k));
            let problem = w.problem(None);
            let (nan, inf) = (f32::NAN, f32::INFINITY);
            let (edge, over) = (2f32.powi(55) * 0.93, 2f32.powi(55));
            let cases: [&[f32]; 9] = [
                &[nan],
                &[inf],
                &[inf, nan],
                &[nan, inf, 1e30],
                &[-inf],
                &[over],
                &[edge],
                &[1e-45, -1e-38],
                &[],
            ];
            for (case, values) in cases.into_iter().enumerate() {
                for scale in [1.0, 2f32.powi(-53), 2f32.powi(-101), 2f32.powi(30)] {
                    let mut x = random.normals(k);
                    x[64..96].iter_mut().for_each(|v| *v *= scale);
                    for (i, &value) in values.iter().enumerate() {
                        x[40 * i + 3] = value;
                    }
                    let (mut got, mut want) = (vec![0.0; n], vec![0.0; n]);
                    let out = FloatMut::F32(&mut got);
                    way.linear(&problem, Float::F32(&x), &w.view(), None, out, &Serial).unwrap();
                    let out = FloatMut::F32(&mut want);
                    reference::linear(&problem, Float::F32(&x), &w.view(), None, out).unwrap();
                    let largest =
                        x.iter().filter(|v| v.is_finite()).fold(0.0, |a: f32, v| v.abs().max(a));
                    let sizes = sizes_of_rows(&w.view());
                    let bounds: Vec<f64> = sizes.iter().map(|s| s * f64::from(largest)).collect();
                    compare_rows(&got, &want, &bounds, &format!("{way} {format} {case} {scale}"));
                }
            }
        }
    }
}
