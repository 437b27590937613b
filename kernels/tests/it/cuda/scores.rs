//! Token scores on a device against those in f64.
#![allow(unsafe_code)]

use half::{bf16, f16};
use mx_kernels::{
    BaselineScores, Float, Serial, TokenScores,
    cuda::{FloatType, Gpu, ScoresBuffers, ScoresPlan, Stream},
    scores::token_scores_by,
};

use super::common::{Buffer, OwnStream, gpu, gpu_number, quick};
use crate::common::Random;

const TYPES: [FloatType; 3] = [FloatType::F32, FloatType::F16, FloatType::Bf16];

/// Logits of some type, here and there.
struct Logits {
    float: FloatType,
    /// As the type holds them.
    values: Vec<f32>,
    buffer: Buffer,
    /// Elements in front of the first one, to move it off its alignment.
    offset: usize,
}

impl Logits {
    fn new(float: FloatType, values: &[f32], offset: usize) -> Self {
        let mut all = vec![f32::NAN; offset];
        all.extend_from_slice(values);
        let (values, buffer) = match float {
            FloatType::F32 => (all.clone(), Buffer::of(&all)),
            FloatType::F16 => {
                let half: Vec<f16> = all.iter().map(|&v| f16::from_f32(v)).collect();
                (half.iter().map(|v| v.to_f32()).collect(), Buffer::of(&half))
            }
            FloatType::Bf16 => {
                let half: Vec<bf16> = all.iter().map(|&v| bf16::from_f32(v)).collect();
                (half.iter().map(|v| v.to_f32()).collect(), Buffer::of(&half))
            }
        };
        Self { float, values: values[offset..].to_vec(), buffer, offset }
    }

    fn ptr(&self) -> u64 {
        self.buffer.ptr() + (self.offset * self.float.bytes()) as u64
    }
}

#[derive(Debug, Clone)]
struct Scores {
    nll: Vec<f32>,
    entropy: Vec<f32>,
    top1: Vec<i64>,
    kl: Vec<f32>,
    baseline_nll: Vec<f32>,
}

impl Scores {
    /// Equal to the bit, NaN included.
    fn assert_same(&self, other: &Self, what: &str) {
        let bits = |v: &[f32]| v.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&self.nll), bits(&other.nll), "{what}: nll");
        assert_eq!(bits(&self.entropy), bits(&other.entropy), "{what}: entropy");
        assert_eq!(self.top1, other.top1, "{what}: top1");
        assert_eq!(bits(&self.kl), bits(&other.kl), "{what}: kl");
        assert_eq!(bits(&self.baseline_nll), bits(&other.baseline_nll), "{what}: baseline nll");
    }
}

fn on_cpu(logits: &Logits, labels: &[i64], vocab: usize, baseline: Option<&Logits>) -> Scores {
    let rows = labels.len();
    let mut s = Scores {
        nll: vec![9.0; rows],
        entropy: vec![9.0; rows],
        top1: vec![9; rows],
        kl: vec![9.0; if baseline.is_some() { rows } else { 0 }],
        baseline_nll: vec![9.0; if baseline.is_some() { rows } else { 0 }],
    };
    let with =
        baseline.is_some().then_some(BaselineScores { kl: &mut s.kl, nll: &mut s.baseline_nll });
    let out =
        TokenScores { nll: &mut s.nll, entropy: &mut s.entropy, top1: &mut s.top1, baseline: with };
    let base = baseline.map(|b| Float::F32(&b.values));
    let logits = Float::F32(&logits.values);
    token_scores_by("exact", logits, labels, vocab, base, out, &Serial).unwrap();
    s
}

/// A call with its outputs, which start poisoned.
struct Call {
    plan: ScoresPlan,
    labels: Buffer,
    out: [Buffer; 5],
    buffers: ScoresBuffers,
    with_baseline: bool,
}

impl Call {
    fn new(
        gpu: &'static Gpu,
        logits: &Logits,
        labels: &[i64],
        vocab: usize,
        baseline: Option<&Logits>,
    ) -> Self {
        let rows = labels.len();
        let plan =
            ScoresPlan::new(gpu, rows, vocab, logits.float, baseline.map(|b| b.float)).unwrap();
        let extra = if baseline.is_some() { 4 * rows } else { 0 };
        let out = [4 * rows, 4 * rows, 8 * rows, extra, extra].map(Buffer::poisoned);
        let labels = Buffer::of(labels);
        let buffers = ScoresBuffers {
            logits: logits.ptr(),
            labels: labels.ptr(),
            baseline: baseline.map_or(0, Logits::ptr),
            nll: out[0].ptr(),
            entropy: out[1].ptr(),
            top1: out[2].ptr(),
            kl: out[3].ptr(),
            baseline_nll: out[4].ptr(),
        };
        Self { plan, labels, out, buffers, with_baseline: baseline.is_some() }
    }

    fn enqueue(&self, stream: Stream) -> Result<(), mx_kernels::cuda::CudaError> {
        // SAFETY: the buffers are as long as the plan says and outlive the call.
        unsafe { self.plan.run(stream, &self.buffers) }
    }

    fn read(&self) -> Scores {
        let kl = if self.with_baseline { self.out[3].read() } else { Vec::new() };
        let baseline_nll = if self.with_baseline { self.out[4].read() } else { Vec::new() };
        let [nll, entropy, top1, ..] = &self.out;
        let _ = self.labels.read::<i64>();
        Scores { nll: nll.read(), entropy: entropy.read(), top1: top1.read(), kl, baseline_nll }
    }
}

fn on_gpu(
    gpu: &'static Gpu,
    logits: &Logits,
    labels: &[i64],
    vocab: usize,
    baseline: Option<&Logits>,
) -> Scores {
    let call = Call::new(gpu, logits, labels, vocab, baseline);
    let stream = OwnStream::new();
    call.enqueue(stream.get()).unwrap();
    stream.synchronize();
    call.read()
}

/// Both round sums in float64 to float32. `floor` is what cancellation leaves of float64.
fn assert_near(got: &[f32], want: &[f32], floor: f64, what: &str) {
    assert_eq!(got.len(), want.len());
    for (row, (&g, &w)) in got.iter().zip(want).enumerate() {
        assert!(g.to_bits() != u32::MAX, "{what} of row {row} was never written");
        if w.is_nan() || w.is_infinite() {
            assert!(g.to_bits() == w.to_bits() || (g.is_nan() && w.is_nan()), "{what} {row}: {g}");
            continue;
        }
        let (g, w) = (f64::from(g), f64::from(w));
        assert!((g - w).abs() <= 2e-7 * w.abs() + floor, "{what} of row {row}: {g:e}, not {w:e}");
    }
}

fn assert_agree(got: &Scores, want: &Scores, what: &str) {
    assert_near(&got.nll, &want.nll, 1e-13, &format!("{what}: nll"));
    assert_near(&got.entropy, &want.entropy, 1e-13, &format!("{what}: entropy"));
    assert_eq!(got.top1, want.top1, "{what}: top1");
    assert_near(&got.kl, &want.kl, 1e-11, &format!("{what}: kl"));
    assert_near(&got.baseline_nll, &want.baseline_nll, 1e-13, &format!("{what}: baseline nll"));
}

fn vocabularies() -> &'static [(usize, usize)] {
    if quick() {
        &[(1, 3), (7, 5), (32, 9), (5003, 2)]
    } else {
        &[(1, 3), (2, 64), (7, 5), (32, 300), (4096, 33), (4103, 8), (50_257, 12), (128_256, 6)]
    }
}

/// Rows of several kinds: spread out, peaked, flat, tied, partly ruled out, far from zero.
fn draw(random: &mut Random, rows: usize, vocab: usize) -> Vec<f32> {
    let mut all = Vec::with_capacity(rows * vocab);
    for row in 0..rows {
        let spread = [4.0, 30.0, 0.0, 0.5, 8.0, 100.0][row % 6];
        let shift = [0.0, 0.0, 3.0, -200.0, 600.0, 0.0][(row / 6 + row) % 6];
        for _ in 0..vocab {
            let v = random.normal() * spread + shift;
            let v = if row % 6 == 3 { v.round() } else { v };
            all.push(if row % 6 == 4 && random.below(3) == 0 { f32::NEG_INFINITY } else { v });
        }
        // Rising logits make every thread's largest change all the time.
        if row % 7 == 5 {
            all[row * vocab..].sort_by(f32::total_cmp);
        }
    }
    all
}

#[test]
fn agrees_with_the_cpu() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random(31);
    for &(vocab, rows) in vocabularies() {
        let labels: Vec<i64> =
            (0..rows).map(|r| if r % 5 == 2 { -100 } else { random.below(vocab) as i64 }).collect();
        let (a, b) = (draw(&mut random, rows, vocab), draw(&mut random, rows, vocab));
        // A baseline that nearly agrees, as that of a good format does.
        let near: Vec<f32> = a.iter().map(|v| v + 0.01 * random.normal()).collect();
        for float in TYPES {
            for offset in [0, 1] {
                let what = format!("{float:?} {rows} x {vocab} + {offset}");
                let logits = Logits::new(float, &a, offset);
                let got = on_gpu(gpu, &logits, &labels, vocab, None);
                assert_agree(&got, &on_cpu(&logits, &labels, vocab, None), &what);
                for (other, baseline) in [(FloatType::F32, &near), (float, &b)] {
                    let base = Logits::new(other, baseline, offset);
                    let with = on_gpu(gpu, &logits, &labels, vocab, Some(&base));
                    assert_agree(&with, &on_cpu(&logits, &labels, vocab, Some(&base)), &what);
                    let without = Scores { kl: vec![], baseline_nll: vec![], ..with };
                    without.assert_same(&got, "with or without a baseline");
                }
            }
        }
    }
}

#[test]
fn a_row_gives_the_same_bits_wherever_it_lies() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random(32);
    let vocab = if quick() { 1001 } else { 50_257 };
    let values = draw(&mut random, 9, vocab);
    let labels: Vec<i64> = (0..9).map(|_| random.below(vocab) as i64).collect();
    for float in TYPES {
        let first = Logits::new(float, &values, 0);
        let want = on_gpu(gpu, &first, &labels, vocab, Some(&first));
        assert_eq!(want.kl, [0.0; 9], "nothing diverges from itself");
        for offset in [0, 1, 3, 8] {
            let moved = Logits::new(float, &values, offset);
            for _ in 0..3 {
                let got = on_gpu(gpu, &moved, &labels, vocab, Some(&moved));
                got.assert_same(&want, "another place or time");
            }
        }
    }
}

#[test]
fn infinities_nan_masks_and_labels_outside() {
    let Some(gpu) = gpu() else { return };
    let (inf, nan) = (f32::INFINITY, f32::NAN);
    #[rustfmt::skip]
    let rows: [[f32; 4]; 14] = [
        [1.0, 2.0, 2.0, -1.0], [-inf, 0.0, -inf, -inf], [nan, 1.0, 2.0, 3.0], [nan; 4],
        [-inf; 4], [0.0, -inf, 0.0, -inf], [1.0, inf, inf, 0.0], [inf, nan, 0.0, 0.0],
        [0.0, -800.0, 2.0, -inf], [-0.0, 0.0, -0.0, 0.0], [3e38, -3e38, 3e38, 0.0], [0.0; 4],
        [1e-40, -1e-40, 0.0, 2e-45], [-inf, -inf, -inf, inf],
    ];
    // The same four logits at the end of a row of many threads' work, and alone.
    for (vocab, at) in [(4, 0), (5000, 4996), (5000, 0)] {
        let mut values = vec![-inf; rows.len() * rows.len() * vocab];
        let mut base = values.clone();
        let mut labels = Vec::new();
        for (i, pair) in values.chunks_mut(vocab).zip(base.chunks_mut(vocab)).enumerate() {
            pair.0[at..at + 4].copy_from_slice(&rows[i % rows.len()]);
            pair.1[at..at + 4].copy_from_slice(&rows[i / rows.len()]);
            labels.push(if i % 11 == 7 { -100 } else { (at + i % 4) as i64 });
        }
        for float in TYPES {
            let (logits, base) = (Logits::new(float, &values, 0), Logits::new(float, &base, 0));
            let got = on_gpu(gpu, &logits, &labels, vocab, Some(&base));
            let want = on_cpu(&logits, &labels, vocab, Some(&base));
            assert_agree(&got, &want, &format!("{float:?} {vocab} {at}"));
        }
    }
    // What the CPU refuses is NaN here, and nothing is read outside the logits.
    let logits = Logits::new(FloatType::F32, &[0.0; 12], 0);
    let labels = [4, -1, i64::MIN];
    let s = on_gpu(gpu, &logits, &labels, 4, Some(&logits));
    assert!(s.nll.iter().chain(&s.baseline_nll).all(|v| v.is_nan()), "{s:?}");
    assert_eq!((s.top1, s.kl), (vec![0; 3], vec![0.0; 3]));
}

#[test]
fn confident_predictions_keep_their_digits() {
    let Some(gpu) = gpu() else { return };
    for gap in [5.0_f32, 12.3, 17.0, 30.0, 80.0] {
        let logits = Logits::new(FloatType::F32, &[1000.7 + gap, 1000.7], 0);
        let s = on_gpu(gpu, &logits, &[0], 2, None);
        let d = f64::from(logits.values[0]) - f64::from(logits.values[1]);
        let want = (-d).exp().ln_1p();
        let got = f64::from(s.nll[0]);
        // ln(1 + e) in f64 keeps an absolute 2^-53.
        assert!((got - want).abs() <= 1e-6 * want + 2.3e-16, "{gap}: {got:e}, not {want:e}");
    }
}

#[test]
fn runs_in_a_graph_and_on_several_streams() {
    let Some(gpu) = gpu() else { return };
    let mut random = Random(33);
    let (vocab, labels) = (3001, [5_i64, -100, 3000, 17]);
    let first = Logits::new(FloatType::Bf16, &draw(&mut random, 4, vocab), 0);
    let second = Logits::new(FloatType::Bf16, &draw(&mut random, 4, vocab), 0);
    let want = [&first, &second].map(|l| on_gpu(gpu, l, &labels, vocab, None));
    let stream = OwnStream::new();
    let call = Call::new(gpu, &first, &labels, vocab, None);
    let graph = stream.capture(|stream| call.enqueue(stream));
    // Captured, not run: the outputs are poisoned still.
    assert!(call.read().nll.iter().all(|v| v.is_nan()));
    graph.launch(&stream);
    stream.synchronize();
    call.read().assert_same(&want[0], "graph");
    first.buffer.write(&second.buffer.read::<u16>());
    graph.launch(&stream);
    stream.synchronize();
    call.read().assert_same(&want[1], "graph on other data");
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                gpu.bind().unwrap();
                for _ in 0..if quick() { 2 } else { 20 } {
                    on_gpu(gpu, &second, &labels, vocab, None).assert_same(&want[1], "thread");
                }
            });
        }
    });
}

#[test]
fn two_devices_give_the_same_bits() {
    let (Some(first), Some(second)) = (gpu(), gpu_number(1)) else { return };
    let mut random = Random(34);
    let (vocab, labels) = (5003, [5_i64, 1, 3000]);
    let values = draw(&mut random, 3, vocab);
    let scores = [first, second].map(|gpu| {
        gpu.bind().unwrap();
        on_gpu(gpu, &Logits::new(FloatType::F32, &values, 0), &labels, vocab, None)
    });
    scores[0].assert_same(&scores[1], "the other device");
}

#[test]
fn no_rows_and_no_vocabulary() {
    let Some(gpu) = gpu() else { return };
    let none = Logits::new(FloatType::F32, &[], 0);
    assert!(on_gpu(gpu, &none, &[], 7, None).nll.is_empty());
    assert!(ScoresPlan::new(gpu, 1, 0, FloatType::F32, None).is_err());
    assert!(ScoresPlan::new(gpu, 1 << 31, 7, FloatType::F32, None).is_err());
    let one = Logits::new(FloatType::F32, &[0.0; 7], 0);
    let call = Call::new(gpu, &one, &[0], 7, None);
    let with = ScoresBuffers { baseline: one.ptr(), ..call.buffers };
    // SAFETY: nothing is enqueued.
    assert!(unsafe { call.plan.run(OwnStream::new().get(), &with) }.is_err());
    // Outputs that nobody asks for are left out.
    let some = ScoresBuffers { nll: 0, top1: 0, ..call.buffers };
    let stream = OwnStream::new();
    // SAFETY: the buffers that are there are as long as the plan says.
    unsafe { call.plan.run(stream.get(), &some) }.unwrap();
    stream.synchronize();
    let s = call.read();
    assert!((s.entropy[0] - 7f32.ln()).abs() < 1e-6 && s.nll[0].is_nan() && s.top1[0] == -1);
}
