//! Codes and scales made on the device, bit by bit those of the CPU.
#![allow(unsafe_code)]

use half::{bf16, f16};
use mx_kernels::{
    ElementFormat, QuantSpec, Rounding, ScaleKind, ScaleRule,
    cuda::{CudaError, Gpu, QUANTIZE_SCRATCH, QuantizeBuffers, quantize_rows},
    fake_quantize_rows,
};

use super::{
    common::{Buffer, OwnStream, gpu, quick},
    linear::{Element, Weight, run},
};
use crate::common::{Random, specs};

/// Codes and scales of `x` on the device.
fn on_device(
    gpu: &'static Gpu,
    stream: &OwnStream,
    spec: &QuantSpec,
    (rows, k): (usize, usize),
    x_type: mx_kernels::cuda::FloatType,
    x: &Buffer,
) -> (Vec<u8>, Vec<u8>) {
    let codes = Buffer::poisoned(spec.codes_len(rows, k));
    let scales = Buffer::poisoned(spec.scales_len(rows, k));
    let scratch = Buffer::poisoned(QUANTIZE_SCRATCH);
    let buffers = QuantizeBuffers {
        x: x.ptr(),
        codes: codes.ptr(),
        scales: scales.ptr(),
        scratch: scratch.ptr(),
    };
    // SAFETY: buffers of the lengths asked for, alive until the stream is done.
    unsafe { quantize_rows(gpu, stream.get(), spec, (rows, k), x_type, &buffers) }.unwrap();
    stream.synchronize();
    scratch.read::<u8>();
    (codes.read(), scales.read())
}

/// Values [rows, k] in one type, on both sides.
struct Data {
    name: &'static str,
    shape: (usize, usize),
    values: Vec<f32>,
    x_type: mx_kernels::cuda::FloatType,
    device: Buffer,
}

impl Data {
    fn new<T: Element>(name: &'static str, k: usize, values: &[T]) -> Self {
        let values = &values[..values.len() / k * k];
        Self {
            name,
            shape: (values.len() / k, k),
            values: values.iter().map(|v| v.to_f64() as f32).collect(),
            x_type: T::TYPE,
            device: Buffer::of(values),
        }
    }

    fn check(&self, gpu: &'static Gpu, stream: &OwnStream, spec: &QuantSpec) {
        let (rows, k) = self.shape;
        let got = on_device(gpu, stream, spec, self.shape, self.x_type, &self.device);
        let mut want = (vec![0; spec.codes_len(rows, k)], vec![0; spec.scales_len(rows, k)]);
        mx_kernels::quantize_rows(spec, &self.values, rows, k, &mut want.0, &mut want.1).unwrap();
        let differs = |a: &[u8], b: &[u8]| a.iter().zip(b).position(|(a, b)| a != b);
        if let Some(at) = differs(&got.1, &want.1) {
            panic!("{} {spec:?}: scale byte {at} is {}, not {}", self.name, got.1[at], want.1[at]);
        }
        if let Some(at) = differs(&got.0, &want.0) {
            let block = at / spec.block_bytes();
            let (row, first) = (block / spec.blocks(k), block % spec.blocks(k) * spec.block_size);
            let values = &self.values[row * k..][first..(first + spec.block_size).min(k)];
            panic!(
                "{} {spec:?}: code byte {at} is {:#x}, not {:#x}; row {row} from {first} on: \
                 {values:?}",
                self.name, got.0[at], want.0[at]
            );
        }
        assert_eq!((got.0.len(), got.1.len()), (want.0.len(), want.1.len()));
    }
}

/// Floats from bits, with exponents near one another within each run of 16.
fn clustered(len: usize, random: &mut Random) -> Vec<f32> {
    let mut exponent = 127;
    (0..len)
        .map(|i| {
            if i % 16 == 0 {
                exponent = random.below(255) as u32;
            }
            let bits = random.bits() as u32;
            let near = (exponent + (bits >> 23) % 12).min(253);
            // Half of them with few bits, where ties are common.
            let mantissa = if bits & 1 == 0 { bits & 0x007f_ffff } else { bits & 0x0078_0000 };
            f32::from_bits(bits & 0x8000_0000 | near << 23 | mantissa)
        })
        .collect()
}

/// Each value alone decides how it is rounded: neighbours of halves of steps, in one binade each.
fn ties(len: usize, random: &mut Random) -> Vec<f32> {
    (0..len)
        .map(|_| {
            let steps = random.below(1 << 9) as f32 / 64.0;
            let nudge = random.below(3) as i32 - 1;
            let v = f32::from_bits(steps.to_bits().saturating_add_signed(nudge));
            if random.below(2) == 0 { v } else { -v }
        })
        .collect()
}

fn data(random: &mut Random) -> Vec<Data> {
    let every: Vec<u16> = (0..=u16::MAX).collect();
    // In an order that puts values of all exponents into one block.
    let mixed: Vec<u16> = every.iter().map(|i| i.wrapping_mul(40503)).collect();
    let of16 = |bits: &[u16]| bits.iter().map(|&b| f16::from_bits(b)).collect::<Vec<_>>();
    let of_b16 = |bits: &[u16]| bits.iter().map(|&b| bf16::from_bits(b)).collect::<Vec<_>>();
    let len = if quick() { 2000 } else { 60_000 };
    let bits: Vec<f32> = (0..len).map(|_| f32::from_bits(random.bits() as u32)).collect();
    let tiny: Vec<f32> =
        (0..len).map(|_| f32::from_bits(random.bits() as u32 & 0x80ff_ffff)).collect();
    let specials: Vec<f32> = (0..len)
        .map(|i| match random.below(200) {
            0 => f32::NAN,
            1 => -f32::NAN,
            2 => f32::INFINITY,
            3 => f32::NEG_INFINITY,
            4..90 => [0.0, -0.0][i % 2],
            _ => random.normal(),
        })
        .collect();
    let (clustered, ties) = (clustered(len, random), ties(len, random));
    let zeros = vec![-0.0_f32; 600];
    let mut all = vec![
        Data::new("random bits", 1000, &bits),
        Data::new("near exponents", 1001, &clustered),
        Data::new("ties", 300, &ties),
        Data::new("ties, short rows", 7, &ties[..700]),
        Data::new("subnormal and tiny", 515, &tiny),
        Data::new("NaN, Inf, zeros", 257, &specials),
        Data::new("zeros", 100, &zeros),
        Data::new("one value", 1, &ties[..129]),
    ];
    if !quick() {
        all.extend([
            Data::new("every bfloat16", 65536, &of_b16(&every)),
            Data::new("every bfloat16, mixed", 8192, &of_b16(&mixed)),
            Data::new("every bfloat16 alone", 1, &of_b16(&every)),
            Data::new("every float16", 65536, &of16(&every)),
            Data::new("every float16, mixed", 1024, &of16(&mixed)),
        ]);
    }
    all
}

/// Every format, scale, rounding, rule and block size on every kind of data.
#[test]
fn codes_and_scales_are_those_of_the_cpu() {
    let Some(gpu) = gpu() else { return };
    let stream = OwnStream::new();
    let data = data(&mut Random(51));
    let mut count = 0;
    for spec in specs() {
        for rounding in Rounding::ALL {
            for scale_rule in ScaleRule::ALL {
                if spec.scale != ScaleKind::E8M0 && *scale_rule != ScaleRule::Floor {
                    continue;
                }
                for block_size in [16, 32, 64, 128, 256] {
                    let spec = QuantSpec {
                        block_size,
                        rounding: *rounding,
                        scale_rule: *scale_rule,
                        ..spec
                    };
                    for data in &data {
                        // One value a block is the same for every block size.
                        if data.shape.1 == 1 && block_size > 16 {
                            continue;
                        }
                        data.check(gpu, &stream, &spec);
                        count += 1;
                    }
                }
            }
        }
    }
    println!("{count} tensors");
    let alone = data.iter().filter(|data| data.shape.1 == 1).count();
    assert_eq!(count, (6 * 3 * 4 + 5 * 3) * (5 * data.len() - 4 * alone));
}

/// What the product multiplies by is what codes and scales stand for: X times the identity.
#[test]
fn folded_values_are_the_dequantised_ones() {
    let Some(gpu) = gpu() else { return };
    let stream = OwnStream::new();
    let mut random = Random(52);
    let k = if quick() { 100 } else { 520 };
    let identity: Vec<f32> = (0..k * k).map(|i| if i / k == i % k { 1.0 } else { 0.0 }).collect();
    let bf16 = specs().into_iter().find(|s| s.format == ElementFormat::Bf16).unwrap();
    // One weight for each order in which X is folded.
    let weights = [
        Weight::quantised(bf16, k, k, &identity),
        Weight::quantised(QuantSpec::mx(ElementFormat::Fp8E4M3).unwrap(), k, k, &identity),
        Weight::quantised(QuantSpec::mx(ElementFormat::Fp4E2M1).unwrap(), k, k, &identity),
    ];
    for spec in specs().into_iter().filter(|spec| spec.scale != ScaleKind::Tensor) {
        for (rounding, scale_rule) in
            Rounding::ALL.iter().flat_map(|r| ScaleRule::ALL.iter().map(move |s| (*r, *s)))
        {
            let block_size = [16, 32, 64, 128, 256][random.below(5)];
            let spec = QuantSpec { block_size, rounding, scale_rule, ..spec };
            for w in &weights {
                let m = 1 + random.below(70);
                let mut x = ties(m * k, &mut random);
                x.extend(random.normals(3 * k));
                x.extend(clustered(4 * k, &mut random));
                let rows = x.len() / k;
                let y = run(gpu, &stream, &w.problem(Some(spec)), w, &x, None);
                let mut want = vec![0.0; x.len()];
                fake_quantize_rows(&spec, &x, rows, k, &mut want).unwrap();
                for (i, (got, want)) in y.iter().zip(&want).enumerate() {
                    let tiny = got.abs() < f32::MIN_POSITIVE && want.abs() < f32::MIN_POSITIVE;
                    let (row, column) = (i / k, i % k);
                    assert!(
                        got == want || tiny,
                        "{spec:?} [{row}, {column}]: {got:e}, not {want:e}, of {:e}",
                        x[i]
                    );
                }
            }
            if quick() {
                break;
            }
        }
    }
}

#[test]
fn what_is_refused() {
    let Some(gpu) = gpu() else { return };
    let stream = OwnStream::new();
    let spec = QuantSpec::mx(ElementFormat::Fp4E2M1).unwrap();
    let nowhere = QuantizeBuffers { x: 0, codes: 0, scales: 0, scratch: 0 };
    let x_type = <f32 as Element>::TYPE;
    let call = |spec: QuantSpec, shape| {
        // SAFETY: nothing is enqueued for these shapes.
        unsafe { quantize_rows(gpu, stream.get(), &spec, shape, x_type, &nowhere) }
    };
    assert_eq!(call(spec, (0, 5)), Ok(()));
    assert!(matches!(call(spec, (3, 0)), Err(CudaError::Problem(_))));
    assert!(matches!(
        call(QuantSpec { block_size: 5, ..spec }, (3, 5)),
        Err(CudaError::Problem(_))
    ));
    for shape in [(usize::MAX, 32), (3, usize::MAX), (1 << 40, 1 << 40)] {
        assert!(matches!(call(spec, shape), Err(CudaError::Unsupported(_))), "{shape:?}");
    }
}
