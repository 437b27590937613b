//! Products of two quantised matrices against the specification, however they are batched.

use half::{bf16, f16};
use mx_kernels::{
    ActMatMulProblem, ElementFormat, Error, Float, FloatMut, Parallel, QuantSpec, Rounding,
    ScaleKind, ScaleRule, Serial, StdThreads, act_matmul, reference,
};

use crate::common::{Random, specs};

fn fp8() -> QuantSpec {
    QuantSpec::mx(ElementFormat::Fp8E4M3).unwrap()
}

fn problem<'a>(
    [m, n, k]: [usize; 3],
    spec: QuantSpec,
    batches: &'a [(usize, usize)],
) -> ActMatMulProblem<'a> {
    let (a_spec, b_spec) = (spec, spec);
    ActMatMulProblem { m, n, k, a_spec, b_spec, transpose_b: false, alpha: 1.0, batches }
}

/// Rows and columns of `size` values that many of the columns of matrices exchanged.
fn transposed(b: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(b.len());
    for matrix in b.chunks_exact(rows * columns) {
        for j in 0..columns {
            out.extend((0..rows).map(|i| matrix[i * columns + j]));
        }
    }
    out
}

/// Both implementations on float32.
fn both(problem: &ActMatMulProblem<'_>, a: &[f32], b: &[f32], par: &dyn Parallel) -> [Vec<f32>; 2] {
    let mut y = [vec![f32::NAN; problem.batches.len() * problem.m * problem.n], Vec::new()];
    y[1] = y[0].clone();
    let (a, b) = (Float::F32(a), Float::F32(b));
    act_matmul(problem, a, b, FloatMut::F32(&mut y[0]), par).unwrap();
    reference::act_matmul(problem, a, b, FloatMut::F32(&mut y[1])).unwrap();
    y
}

/// By the magnitudes of the quantised values, which `alpha` 1 and absolute operands add up.
fn assert_close(problem: &ActMatMulProblem<'_>, a: &[f32], b: &[f32], [y, want]: &[Vec<f32>; 2]) {
    let absolute = |v: &[f32]| v.iter().map(|v| v.abs()).collect::<Vec<_>>();
    let plain = ActMatMulProblem { alpha: problem.alpha.abs(), ..*problem };
    let [_, magnitude] = both(&plain, &absolute(a), &absolute(b), &Serial);
    let units = problem.k as f64 / 16.0 + 32.0;
    for i in 0..y.len() {
        let bound = units * 2f64.powi(-23) * f64::from(magnitude[i]) + 2f64.powi(-126);
        let error = (f64::from(y[i]) - f64::from(want[i])).abs();
        assert!(error <= bound, "[{i}]: {} for {}, over {bound:e}: {problem:?}", y[i], want[i]);
    }
}

#[test]
fn every_spec_and_tail_matches_the_specification_both_ways_round() {
    let mut random = Random(11);
    let shapes = [[1, 1, 1], [1, 40, 65], [3, 7, 32], [5, 33, 100], [17, 16, 31], [2, 130, 300]];
    let mut seen = 0;
    for spec in specs().into_iter().filter(|spec| spec.scale != ScaleKind::Tensor) {
        for [m, n, k] in shapes {
            let (a, b) = (random.normals(2 * m * k), random.normals(2 * k * n));
            let batches = [(0, 0), (1, 1)];
            let plain = ActMatMulProblem { alpha: -0.375, ..problem([m, n, k], spec, &batches) };
            let y = both(&plain, &a, &b, &StdThreads(3));
            assert_close(&plain, &a, &b, &y);
            let turned = ActMatMulProblem { transpose_b: true, ..plain };
            let again = both(&turned, &a, &transposed(&b, k, n), &Serial);
            assert_eq!(again[0], y[0], "b as [n, k]: {turned:?}");
            seen += 1;
        }
    }
    assert_eq!(seen, 9 * 6);
}

#[test]
fn operands_may_be_quantised_differently() {
    let mut random = Random(12);
    let (a, b) = (random.normals(4 * 96), random.normals(96 * 6));
    let of = |format, block| {
        QuantSpec::new(format, ScaleKind::E8M0, block, Rounding::Nearest, ScaleRule::Rceil).unwrap()
    };
    let mixed = ActMatMulProblem {
        a_spec: of(ElementFormat::Fp8E5M2, 16),
        b_spec: of(ElementFormat::Fp4E2M1, 64),
        ..problem([4, 6, 96], fp8(), &[(0, 0)])
    };
    let y = both(&mixed, &a, &b, &Serial);
    assert_close(&mixed, &a, &b, &y);
    let swapped = ActMatMulProblem { a_spec: mixed.b_spec, b_spec: mixed.a_spec, ..mixed };
    assert_ne!(both(&swapped, &a, &b, &Serial)[0], y[0], "which operand has which format matters");
}

/// One matrix for many, in any order, and the same bits for any number of threads.
#[test]
fn matrices_are_shared_as_the_pairs_say() {
    let mut random = Random(13);
    let [m, n, k] = [3, 20, 70];
    let (a, b) = (random.normals(4 * m * k), random.normals(3 * k * n));
    let batches = [(3, 2), (0, 0), (1, 2), (3, 0), (2, 1), (0, 2), (0, 0)];
    let shared = problem([m, n, k], fp8(), &batches);
    let y = both(&shared, &a, &b, &Serial);
    assert_close(&shared, &a, &b, &y);
    for threads in [1, 2, 5] {
        assert_eq!(both(&shared, &a, &b, &StdThreads(threads))[0], y[0], "{threads} threads");
    }
    for (i, &(ai, bi)) in batches.iter().enumerate() {
        let one = problem([m, n, k], fp8(), &[(0, 0)]);
        let [alone, _] = both(&one, &a[ai * m * k..][..m * k], &b[bi * k * n..][..k * n], &Serial);
        assert_eq!(alone, y[0][i * m * n..][..m * n], "product {i}");
    }
}

#[test]
fn a_nan_stays_in_its_row_and_column() {
    let mut random = Random(14);
    let [m, n, k] = [4, 5, 64];
    let (mut a, mut b) = (random.normals(m * k), random.normals(k * n));
    a[2 * k + 40] = f32::NAN;
    b[7 * n + 3] = f32::INFINITY;
    let [y, want] = both(&problem([m, n, k], fp8(), &[(0, 0)]), &a, &b, &Serial);
    for (i, (y, want)) in y.iter().zip(&want).enumerate() {
        let poisoned = i / n == 2 || i % n == 3;
        assert_eq!((y.is_nan(), want.is_nan()), (poisoned, poisoned), "[{i}]");
    }
}

#[test]
fn half_precision_is_rounded_once() {
    let mut random = Random(15);
    let [m, n, k] = [3, 9, 48];
    let (a, b) = (random.normals(m * k), random.normals(k * n));
    let one = problem([m, n, k], fp8(), &[(0, 0)]);
    macro_rules! check {
        ($type:ty, $variant:ident) => {
            let to = |v: &[f32]| v.iter().map(|&v| <$type>::from_f32(v)).collect::<Vec<_>>();
            let back = |v: &[$type]| v.iter().map(|v| v.to_f32()).collect::<Vec<_>>();
            let (a, b, mut y) = (to(&a), to(&b), to(&vec![0.0; m * n]));
            let out = FloatMut::$variant(&mut y);
            act_matmul(&one, Float::$variant(&a), Float::$variant(&b), out, &Serial).unwrap();
            let wide = both(&one, &back(&a), &back(&b), &Serial);
            assert_eq!(y, to(&wide[0]));
        };
    }
    check!(f16, F16);
    check!(bf16, Bf16);
}

#[test]
fn what_does_not_fit_is_refused_and_y_is_untouched() {
    let (a, b) = (vec![1.0; 2 * 3 * 32], vec![1.0; 2 * 32 * 4]);
    let pairs = [(1, 1)];
    let good = problem([3, 4, 32], fp8(), &pairs);
    let tensor =
        QuantSpec::new(fp8().format, ScaleKind::Tensor, 32, Rounding::Even, ScaleRule::Floor);
    let bad = [
        ActMatMulProblem { m: 0, ..good },
        ActMatMulProblem { k: 0, ..good },
        ActMatMulProblem { n: 5, ..good },
        ActMatMulProblem { k: usize::MAX, ..good },
        ActMatMulProblem { batches: &[(2, 0)], ..good },
        ActMatMulProblem { batches: &[(0, usize::MAX)], ..good },
        ActMatMulProblem { batches: &[(0, 0), (1, 1)], ..good },
        ActMatMulProblem { a_spec: tensor.unwrap(), ..good },
        ActMatMulProblem { b_spec: QuantSpec { block_size: 7, ..fp8() }, ..good },
    ];
    let run = |problem: &ActMatMulProblem<'_>, y: &mut [f32]| {
        act_matmul(problem, Float::F32(&a), Float::F32(&b), FloatMut::F32(y), &Serial)
    };
    for problem in &bad {
        let mut y = [7.0; 12];
        let error = run(problem, &mut y).unwrap_err();
        assert!(y.iter().all(|&v| v == 7.0), "{problem:?}: {error}");
    }
    assert!(matches!(run(&bad[0], &mut []), Err(Error::ZeroDimension("m"))));
    assert_eq!(run(&good, &mut [0.0; 12]), Ok(()));
    assert_eq!(run(&ActMatMulProblem { batches: &[], ..good }, &mut []), Ok(()));
}
