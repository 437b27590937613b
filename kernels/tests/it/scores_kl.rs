//! The divergence and the baseline's likelihood where sums in f32 could lose digits, against f64 about
//! the mean.

use mx_kernels::{BaselineScores, Float, Serial, TokenScores, scores::token_scores_by};

use crate::common::{Random, emulated, variants};

/// ln of the share of the largest probability below which a token may count as 0.
const COUNTS: f64 = -125.0 * std::f64::consts::LN_2;

fn largest(row: &[f32]) -> f64 {
    f64::from(row.iter().copied().fold(f32::NEG_INFINITY, f32::max))
}

fn log_sum(row: &[f32]) -> f64 {
    let max = largest(row);
    row.iter().map(|&v| (f64::from(v) - max).exp()).sum::<f64>().ln() + max
}

/// KL(base || this): ln(1 + A + B) - B with d relative to its mean, so that little cancels.
fn definition(base: &[f32], this: &[f32]) -> f64 {
    let (max, ln_base, ln_this) = (largest(base), log_sum(base), log_sum(this));
    let pairs = || base.iter().zip(this).map(|(&b, &t)| (f64::from(b), f64::from(t)));
    let counting = || pairs().filter(|(b, _)| b - max >= COUNTS);
    let mean: f64 = counting().map(|(b, t)| (b - ln_base).exp() * (t - b)).sum();
    let apart = ln_this - ln_base - mean;
    if apart > 1.0 {
        return apart;
    }
    let rest: f64 = counting().map(|(b, t)| (b - ln_base).exp() * (t - b - mean)).sum();
    let excess = |(b, t): (f64, f64)| {
        if b - max >= COUNTS {
            (b - ln_base).exp() * ((t - b - mean).exp_m1() - (t - b - mean))
        } else {
            // Nothing to be divided by: what this row has there.
            (t - mean - ln_base).exp()
        }
    };
    let a: f64 = pairs().map(excess).sum();
    ((a + rest).ln_1p() - rest).max(0.0)
}

/// nll, kl, baseline nll.
fn scores(variant: &str, base: &[f32], this: &[f32], label: usize) -> [f32; 3] {
    let (mut nll, mut entropy, mut top1) = ([9.0], [9.0], [9]);
    let (mut kl, mut base_nll) = ([9.0], [9.0]);
    let with = Some(BaselineScores { kl: &mut kl, nll: &mut base_nll });
    let out = TokenScores { nll: &mut nll, entropy: &mut entropy, top1: &mut top1, baseline: with };
    let (labels, vocab, base) = ([label as i64], this.len(), Some(Float::F32(base)));
    token_scores_by(variant, Float::F32(this), &labels, vocab, base, out, &Serial).unwrap();
    [nll[0], kl[0], base_nll[0]]
}

fn assert_near(got: f32, want: f64, floor: f64, what: &str) {
    if want.is_infinite() {
        assert_eq!(f64::from(got), want, "{what}");
        return;
    }
    let error = (f64::from(got) - want).abs();
    let ratio = error / want.abs();
    // Both sides are rounded to f32.
    assert!(
        error <= 1.06e-6 * want.abs() + floor,
        "{what}: {got:e}, not {want:e}, off by {ratio:e}"
    );
}

/// Every variant's divergence against the definition.
fn assert_kl(base: &[f32], this: &[f32], floor: f64, what: &str) {
    let want = definition(base, this);
    for variant in variants() {
        let got = scores(variant, base, this, 0)[1];
        assert_near(got, want, floor, &format!("{variant}, {what}"));
    }
}

fn noisy(row: &[f32], noise: f32, random: &mut Random) -> Vec<f32> {
    row.iter().map(|v| v + noise * random.normal()).collect()
}

#[test]
fn what_lies_in_front_of_the_baselines_first_logit_counts() {
    let inf = f32::INFINITY;
    let base: Vec<f32> = (0..1024).map(|i| if i < 512 { -inf } else { 0.0 }).collect();
    assert_kl(&base, &[0.0; 1024], 0.0, "half of the probability");
    let mut random = Random(21);
    let mut base: Vec<f32> = (0..32_000).map(|_| 3.0 * random.normal()).collect();
    let mut this = noisy(&base, 0.02, &mut random);
    base[..600].fill(-inf);
    this[..600].fill(0.0);
    assert_kl(&base, &this, 0.0, "a masked beginning");
    this[..600].fill(-inf);
    assert_kl(&base, &this, 0.0, "masked in both");
    // A baseline whose first chunk falls to nothing.
    for far in [50.0, 80.0, 200.0, 800.0, 1500.0] {
        let mut base = vec![0.0; 1024];
        base[512..].iter_mut().for_each(|v| *v = far);
        assert_kl(&base, &[0.0; 1024], 0.0, &format!("a first chunk {far} below"));
        assert_kl(&[0.0; 1024], &base, 0.0, &format!("this row's first chunk {far} below"));
    }
}

#[test]
fn what_this_row_rules_out_counts_wherever_it_lies() {
    for gap in [0.0, 50.0, 86.0, 87.0, 88.0, 95.0, 300.0, 1000.0, 30_000.0] {
        for (ruled_out, best) in [(0, 600), (600, 0), (0, 1), (1, 0), (600, 601)] {
            let (mut base, mut this) = (vec![0.0; 1024], vec![0.0; 1024]);
            base[best] = gap;
            this[ruled_out] = f32::NEG_INFINITY;
            let want = definition(&base, &this);
            assert_eq!(want == f64::INFINITY, gap < 86.6, "the test's own rule");
            for variant in variants().into_iter().chain(["exact"]) {
                let got = scores(variant, &base, &this, 0)[1];
                let what = format!("{variant}, {ruled_out} ruled out, {best} at {gap}");
                assert_near(got, want, 1e-13, &what);
            }
        }
    }
}

#[test]
fn best_tokens_that_are_not_typical() {
    for (vocab, spread, noises) in [
        (300, 1.0, [0.0, 0.001].as_slice()),
        (32_000, 1.0, &[0.0, 0.001]),
        (151_936, 0.5, &[0.0, 1e-4, 0.01]),
        (151_936, 3.0, &[0.0, 0.01]),
    ] {
        if vocab > 100_000 && emulated() {
            println!("skipped: a vocabulary of {vocab} takes minutes emulated");
            continue;
        }
        let mut random = Random(22);
        let base: Vec<f32> = (0..vocab).map(|_| spread * random.normal()).collect();
        let best = base.iter().position(|&v| f64::from(v) == largest(&base)).unwrap();
        for moved in [0.1, 0.3, 1.0, -1.2, 3.0, -4.0, 8.0] {
            for &noise in noises {
                let mut this = noisy(&base, noise, &mut random);
                this[best] += moved;
                let what = format!("{vocab}, spread {spread}, noise {noise}, best {moved:+}");
                assert_kl(&base, &this, 0.0, &what);
                // One of the others, so that a single term in f32 is all there is.
                let other = (best + vocab / 2) % vocab;
                this[best] = base[best];
                this[other] += moved;
                assert_kl(&base, &this, 0.0, &format!("{what}, but another"));
            }
        }
    }
}

#[test]
fn rows_that_differ_by_a_constant() {
    for vocab in [1000, 32_000] {
        for offset in [0.0, 0.3, -16.0, 16.0, 400.0, -2000.0, 2000.0, 15_000.0] {
            for (spread, noise) in [(3.0, 0.001), (0.5, 1e-4), (8.0, 0.03)] {
                let mut random = Random(23);
                let base: Vec<f32> = (0..vocab).map(|_| spread * random.normal()).collect();
                let mut this = noisy(&base, noise, &mut random);
                this.iter_mut().for_each(|v| *v += offset);
                let what = format!("{vocab}, offset {offset}, spread {spread}, noise {noise}");
                assert_kl(&base, &this, 0.0, &what);
                // The offset in the baseline, and twice in this row.
                let high: Vec<f32> = base.iter().map(|v| v - offset).collect();
                assert_kl(&high, &this, 0.0, &format!("{what}, in both"));
            }
        }
    }
}

/// The weight and the mean difference move from chunk to chunk.
#[test]
fn rows_that_are_not_alike_all_along() {
    // Of the thousand that a logit is in.
    type Shape = fn(f32) -> f32;
    let vocab = 20_000;
    let part = |i: usize| (i / 1000) as f32;
    let shapes: [(&str, Shape, Shape); 6] = [
        ("the weight grows", |p| p, |p| 0.001 * p),
        ("the weight falls", |p| -p, |p| 0.001 * p),
        (
            "a heavy end",
            |p| if p < 19.0 { -30.0 } else { 0.0 },
            |p| if p < 19.0 { 0.0 } else { 0.7 },
        ),
        ("a heavy beginning", |p| if p > 0.0 { -12.0 } else { 0.0 }, |p| 0.1 * p),
        ("one difference, then another", |_| 0.0, |p| if p < 10.0 { 1.0 } else { -1.0 }),
        ("steps", |p| (p % 3.0) * 4.0, |p| 3.0 - 0.02 * (p % 5.0)),
    ];
    for (name, logit, difference) in shapes {
        for noise in [0.0, 1e-3] {
            let mut random = Random(24);
            let base: Vec<f32> =
                (0..vocab).map(|i| logit(part(i)) + 0.5 * random.normal()).collect();
            let mut this = noisy(&base, noise, &mut random);
            this.iter_mut().enumerate().for_each(|(i, v)| *v += difference(part(i)));
            // A high token in front: everything else is one epoch after the other.
            let mut high = base.clone();
            high[0] = 12.0;
            assert_kl(&base, &this, 0.0, &format!("{name}, noise {noise}"));
            assert_kl(&high, &this, 0.0, &format!("{name}, noise {noise}, high first"));
        }
    }
}

/// Sums of equal terms round the same way every time.
#[test]
fn equal_terms_of_the_divergence() {
    for step in 0..40 {
        let by = 0.01 + 0.037 * step as f32;
        for vocab in [4096, 50_257] {
            let base: Vec<f32> = (0..vocab).map(|i| if i % 97 == 0 { 0.0 } else { -1.3 }).collect();
            let sign = |i: usize| if (i / 2).is_multiple_of(2) { 1.0 } else { -1.0 };
            let this: Vec<f32> = base.iter().enumerate().map(|(i, v)| v + by * sign(i)).collect();
            assert_kl(&base, &this, 0.0, &format!("{vocab}, {by} up or down"));
        }
    }
}

#[test]
fn certain_baselines_keep_their_digits() {
    for gap in [10.0, 30.0, 50.0, 70.0, 80.0, 86.0] {
        for (vocab, best, other) in
            [(2, 1, 0), (2, 0, 1), (2000, 1024, 3), (2000, 3, 1024), (2000, 600, 599)]
        {
            // Nothing but the two counts.
            let mut base = vec![f32::NEG_INFINITY; vocab];
            (base[best], base[other]) = (gap, 0.0);
            let mut this = base.clone();
            this[other] = 0.5;
            let want = [
                (0.5 - f64::from(gap)).exp().ln_1p(),
                definition(&base, &this),
                (-f64::from(gap)).exp().ln_1p(),
            ];
            for variant in variants().into_iter().chain(["exact"]) {
                let got = scores(variant, &base, &this, best);
                let what = format!("{variant}, {vocab}, best {best} at {gap}, {other}");
                assert_near(got[0], want[0], 1e-44, &format!("{what}: nll"));
                assert_near(got[2], want[2], 1e-44, &format!("{what}: baseline nll"));
                let floor = if variant == "exact" { 1e-13 } else { 1e-44 };
                assert_near(got[1], want[1], floor, &format!("{what}: kl"));
            }
        }
    }
}

/// The sums where one term is all there is, near where they change from powers to exponentials too.
#[test]
fn a_single_term_of_any_size() {
    let mut random = Random(25);
    for step in 0..600 {
        let size = 0.05 + 0.0041 * step as f32;
        let moved = if step % 5 == 0 { -size } else { size };
        let base = random.normals(2000);
        let mut this = base.clone();
        this[random.below(2000)] += moved;
        assert_kl(&base, &this, 0.0, &format!("one token by {moved}"));
    }
}

/// No logit after the first chunk is larger, so that weight alone says when the mean is taken anew.
#[test]
fn a_first_chunk_that_is_not_typical() {
    let mut random = Random(26);
    let mut base: Vec<f32> = (0..151_936).map(|_| 0.5 * random.normal()).collect();
    base[0] = 6.0;
    for by in [0.11, 0.3, 0.7, -0.7, 0.95, 1.7] {
        let mut this = base.clone();
        this[512..].iter_mut().for_each(|v| *v += by);
        assert_kl(&base, &this, 0.0, &format!("a first chunk {by} off"));
    }
}
