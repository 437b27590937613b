//! Every variant's quantisation, byte for byte against the reference.

use mx_kernels::{
    ElementFormat, FloatType, QuantSpec, Rounding, ScaleKind, ScaleRule, StoredWeight, cpu::forced,
    quantize_weight, reference,
};

use crate::common::{Guarded, Random, specs, variants};

/// Blocks that reach every branch: ordinary, wide, tiny, huge, ties, zeros, special values.
fn nasty(random: &mut Random, len: usize) -> Vec<f32> {
    let mut x = Vec::with_capacity(len);
    while x.len() < len {
        let kind = random.below(9);
        let exponent = random.below(250) as i32 - 125;
        for _ in 0..16 {
            let v = random.normal();
            x.push(match kind {
                0 | 1 => v,
                2 => v * 2f32.powi(exponent),
                3 => v * 2f32.powi(random.below(40) as i32 - 20),
                4 => f32::from_bits(random.bits() as u32 & 0x807f_ffff),
                5 => (random.below(65) as f32 - 32.0) / 4.0 * 2f32.powi(exponent / 2),
                6 => {
                    if random.below(2) == 0 {
                        0.0
                    } else {
                        -0.0
                    }
                }
                7 => f32::from_bits(random.bits() as u32),
                _ => f32::MAX * v.clamp(-1.0, 1.0),
            });
        }
        if random.below(60) == 0 {
            let at = x.len() - 1 - random.below(16);
            x[at] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][random.below(3)];
        }
    }
    x.truncate(len);
    x
}

#[test]
fn every_variant_writes_the_references_bytes() {
    let mut random = Random(1);
    for variant in variants() {
        for base in specs() {
            for rounding in Rounding::ALL {
                for rule in ScaleRule::ALL {
                    if base.scale != ScaleKind::E8M0 && *rule != ScaleRule::Floor {
                        continue;
                    }
                    let block_size = [16, 32, 64, 128, 256][random.below(5)];
                    let spec =
                        QuantSpec::new(base.format, base.scale, block_size, *rounding, *rule);
                    check(variant, &spec.unwrap(), &mut random);
                }
            }
        }
    }
}

fn check(variant: &str, spec: &QuantSpec, random: &mut Random) {
    for k in [1, 5, 16, 49, 64, 300, 1024] {
        let rows = 1 + random.below(6);
        let x = Guarded::new(&nasty(random, rows * k));
        let (bytes, scale_bytes) = (spec.codes_len(rows, k), spec.scales_len(rows, k));
        let (mut codes, mut scales) = (vec![0x55; bytes], vec![0x55; scale_bytes]);
        reference::quantize_rows(spec, x.get(), rows, k, &mut codes, &mut scales).unwrap();
        let mut got = (Guarded::new(&vec![0xaa; bytes]), Guarded::new(&vec![0xaa; scale_bytes]));
        let (c, s) = (got.0.get_mut(), got.1.get_mut());
        forced::quantize_rows(variant, spec, x.get(), rows, k, c, s).unwrap();
        assert_eq!(c, codes, "{variant} {spec:?} k={k}");
        assert_eq!(s, scales, "{variant} {spec:?} k={k}");

        let mut want = vec![0.0; rows * k];
        reference::fake_quantize_rows(spec, x.get(), rows, k, &mut want).unwrap();
        let mut out = Guarded::new(&vec![7.0_f32; rows * k]);
        forced::fake_quantize_rows(variant, spec, x.get(), rows, k, out.get_mut()).unwrap();
        for (i, (a, b)) in out.get().iter().zip(&want).enumerate() {
            let same = a == b || a.is_nan() && b.is_nan();
            assert!(same, "{variant} {spec:?} k={k} [{i}]: {a:e}, not {b:e}");
        }
    }
}

/// Every mid-point of every format, and its neighbours, through the fast path.
#[test]
fn every_tie_of_every_format() {
    for variant in variants() {
        for format in ElementFormat::ALL.into_iter().filter(|f| *f != ElementFormat::Bf16) {
            let half = format.code_count() / 2;
            let mut x = Vec::new();
            for code in 0..half - 1 {
                let (a, b) = (format.decode(code), format.decode(code + 1));
                if a.is_finite() && b.is_finite() {
                    for v in [a, (a + b) / 2.0] {
                        x.extend([v.next_down().abs(), v, v.next_up(), -v]);
                    }
                }
            }
            // The largest in front of each fifteen keeps the block's exponent at zero.
            let rows: Vec<f32> = x
                .chunks(15)
                .flat_map(|c| std::iter::once(format.largest()).chain(c.iter().copied()))
                .collect();
            for rounding in Rounding::ALL {
                let spec = QuantSpec::new(format, ScaleKind::E8M0, 16, *rounding, ScaleRule::Floor);
                let (spec, k) = (spec.unwrap(), rows.len());
                let (n, s) = (spec.codes_len(1, k), spec.scales_len(1, k));
                let (mut a, mut b) = ((vec![0; n], vec![0; s]), (vec![0; n], vec![0; s]));
                reference::quantize_rows(&spec, &rows, 1, k, &mut a.0, &mut a.1).unwrap();
                forced::quantize_rows(variant, &spec, &rows, 1, k, &mut b.0, &mut b.1).unwrap();
                assert!(a.1.iter().all(|&s| s == 127));
                assert_eq!(a, b, "{variant} {spec:?}");
            }
        }
    }
}

/// A weight's bytes at an odd address, as a protobuf may hold them, [n, k] or turned round.
fn stored(x: &[f32], k: usize, float_type: FloatType, transposed: bool) -> Vec<u8> {
    let n = x.len() / k;
    let mut bytes = vec![0x77];
    for i in 0..x.len() {
        let v = if transposed { x[i % n * k + i / n] } else { x[i] };
        match float_type {
            FloatType::F32 => bytes.extend(v.to_le_bytes()),
            FloatType::F16 => bytes.extend(half::f16::from_f32(v).to_le_bytes()),
            FloatType::Bf16 => bytes.extend(half::bf16::from_f32(v).to_le_bytes()),
        }
    }
    bytes
}

/// Every variant, stored type and orientation; tails of k and n; parts of a weight.
#[test]
fn stored_weights_become_the_references_bytes() {
    let mut random = Random(2);
    for variant in variants() {
        for base in specs().into_iter().filter(|s| s.scale == ScaleKind::E8M0) {
            for (i, rounding) in Rounding::ALL.iter().enumerate() {
                for (j, rule) in ScaleRule::ALL.iter().enumerate() {
                    let block = [16, 32, 64, 128, 256][random.below(5)];
                    let spec = QuantSpec::new(base.format, base.scale, block, *rounding, *rule);
                    let float_type = [FloatType::F32, FloatType::F16, FloatType::Bf16][(i + j) % 3];
                    check_stored(variant, &spec.unwrap(), float_type, &mut random);
                }
            }
        }
    }
}

/// [n, k]; with tails of blocks, of sixteen columns, and of strips of 256.
const SHAPES: [(usize, usize); 6] =
    [(1, 1), (7, 40), (16, 64), (83, 300), (256 + 16 + 5, 300), (512, 70)];

fn check_stored(variant: &str, spec: &QuantSpec, float_type: FloatType, random: &mut Random) {
    for (n, k) in SHAPES {
        let mut x = nasty(random, n * k);
        for v in &mut x {
            *v = match float_type {
                FloatType::F32 => *v,
                // Scaled down, else most of them would be infinite.
                FloatType::F16 => half::f16::from_f32(*v / (v.abs().sqrt() + 1.0)).to_f32(),
                FloatType::Bf16 => half::bf16::from_f32(*v).to_f32(),
            };
        }
        let (bytes, scale_bytes) = (spec.codes_len(n, k), spec.scales_len(n, k));
        let mut want = (vec![0x55; bytes], vec![0x55; scale_bytes]);
        reference::quantize_rows(spec, &x, n, k, &mut want.0, &mut want.1).unwrap();
        for transposed in [false, true] {
            let bytes = Guarded::new(&stored(&x, k, float_type, transposed));
            let weight = StoredWeight { bytes: &bytes.get()[1..], float_type, n, k, transposed };
            for (first, rows) in [(0, n), (n / 50, n - n / 50), (n / 3, n - n / 3), (n / 2, 1)] {
                let (row, row_scales) = (spec.row_bytes(k), spec.blocks(k));
                let mut codes = Guarded::new(&vec![0xaa; rows * row]);
                let mut scales = Guarded::new(&vec![0xaa; rows * row_scales]);
                let (c, s) = (codes.get_mut(), scales.get_mut());
                forced::quantize_weight(variant, spec, &weight, first, c, s).unwrap();
                let what =
                    format!("{variant} {spec:?} {float_type:?} {n}x{k} {transposed} {first}");
                assert_eq!(c, &want.0[first * row..][..rows * row], "{what}");
                assert_eq!(s, &want.1[first * row_scales..][..rows * row_scales], "{what}");
            }
        }
    }
}

/// Every finite f16 is what half says it is, by rows, and sixteen columns at a time: in blocks of
/// neighbours, and in blocks of its own, where the most of it is seen.
#[test]
fn every_f16_is_widened_exactly() {
    let x: Vec<f32> = (0..=u16::MAX)
        .map(half::f16::from_bits)
        .filter(|v| v.is_finite())
        .map(half::f16::to_f32)
        .collect();
    let spec = QuantSpec::mx(ElementFormat::MxInt8).unwrap();
    for k in [128, 1] {
        let n = x.len() / k;
        assert!(n * k == x.len() && n.is_multiple_of(16));
        let (len, scales) = (spec.codes_len(n, k), spec.scales_len(n, k));
        let (mut a, mut b) = ((vec![0; len], vec![0; scales]), (vec![0; len], vec![0; scales]));
        reference::quantize_rows(&spec, &x, n, k, &mut a.0, &mut a.1).unwrap();
        for transposed in [false, true] {
            let bytes = &stored(&x, k, FloatType::F16, transposed)[1..];
            let weight = StoredWeight { bytes, float_type: FloatType::F16, n, k, transposed };
            for variant in variants() {
                forced::quantize_weight(variant, &spec, &weight, 0, &mut b.0, &mut b.1).unwrap();
                // Not as assert_eq: a failure would print megabytes.
                assert!(a == b, "{variant}, k {k}, transposed {transposed}");
            }
        }
    }
}

#[test]
fn parts_that_a_weight_does_not_have_are_refused() {
    let spec = QuantSpec::mx(ElementFormat::Fp8E4M3).unwrap();
    let bytes = vec![0; 4 * 32 * 4];
    let good =
        StoredWeight { bytes: &bytes, float_type: FloatType::F32, n: 4, k: 32, transposed: true };
    let run = |spec: &QuantSpec, weight: &StoredWeight<'_>, first: usize, rows: usize| {
        let (mut codes, mut scales) = (vec![0; rows * 32], vec![0; rows]);
        quantize_weight(spec, weight, first, &mut codes, &mut scales)
    };
    assert_eq!(run(&spec, &good, 1, 3), Ok(()));
    assert!(run(&spec, &good, 1, 4).is_err());
    assert!(run(&spec, &good, usize::MAX, 1).is_err());
    for transposed in [true, false] {
        let weight = StoredWeight { transposed, ..good };
        assert_eq!(run(&spec, &weight, 4, 0), Ok(()));
        assert!(run(&spec, &weight, 5, 0).is_err());
        assert!(run(&spec, &weight, usize::MAX, 0).is_err());
    }
    assert!(run(&spec, &StoredWeight { n: 5, ..good }, 0, 1).is_err());
    assert!(run(&spec, &StoredWeight { n: usize::MAX, ..good }, 0, 1).is_err());
    assert!(run(&spec, &StoredWeight { k: 0, ..good }, 0, 1).is_err());
    assert!(run(&spec, &StoredWeight { float_type: FloatType::F16, ..good }, 0, 1).is_err());
    let tensor = QuantSpec { scale: ScaleKind::Tensor, ..spec };
    assert!(run(&tensor, &good, 0, 1).is_err());
}
