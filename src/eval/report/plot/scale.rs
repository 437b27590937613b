//! Scales: differences span decades and both signs.

use crate::eval::report::number::tick;
use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, Ranged, ValueFormatter};
use std::ops::Range;

/// Linear around zero, logarithmic beyond: `sign(v) log10(1 + |v| / linear)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Symlog {
    linear: f64,
}

impl Symlog {
    /// Fits the values: linear up to the power of ten below the smallest of them, over four decades at
    /// most.
    pub(super) fn new(values: impl Iterator<Item = f64>) -> Self {
        let (mut least, mut most) = (f64::INFINITY, 0f64);
        for value in values.map(f64::abs).filter(|v| v.is_finite() && *v > 0.0) {
            (least, most) = (least.min(value), most.max(value));
        }
        if most == 0.0 {
            return Self { linear: 1e-3 };
        }
        Self { linear: 10f64.powf(least.max(most * 1e-4).log10().floor()) }
    }

    pub(super) fn at(self, value: f64) -> f64 {
        value.signum() * (1.0 + value.abs() / self.linear).log10()
    }

    /// Values to label between `low` and `high`, zero among them: powers of ten, or 1, 2, 5 where those
    /// are few.
    pub(super) fn ticks(self, low: f64, high: f64) -> Vec<f64> {
        let ticks = |steps: &[f64]| {
            let magnitudes: Vec<f64> = (0..12)
                .flat_map(|power| steps.iter().map(move |step| (power, *step)))
                .map(|(power, step)| self.linear * step * 10f64.powi(power))
                .collect();
            let negative = magnitudes.iter().rev().map(|v| -v);
            let all = negative.chain([0.0]).chain(magnitudes.iter().copied());
            all.filter(|v| *v >= low && *v <= high).map(round).collect::<Vec<f64>>()
        };
        let few = ticks(&[1.0]);
        if few.len() > 3 { few } else { ticks(&[1.0, 2.0, 5.0]) }
    }
}

/// Ticks of a linear axis: about `wanted` multiples of 1, 2 or 5 times a power of ten.
pub(super) fn linear_ticks(low: f64, high: f64, wanted: usize) -> Vec<f64> {
    let rough = (high - low) / wanted.max(1) as f64;
    if !(rough.is_finite() && rough > 0.0) {
        return vec![low];
    }
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0].into_iter().find(|s| s * power >= rough).unwrap_or(10.0) * power;
    let first = (low / step).ceil() as i64;
    let last = (high / step).floor() as i64;
    (first..=last).take(64).map(|n| round(n as f64 * step)).collect()
}

/// Bits a weight that formats have, of which an axis labels those in range.
pub(super) fn bit_ticks(low: f64, high: f64) -> Vec<f64> {
    let all = [0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 12.0, 16.0, 24.0, 32.0, 64.0];
    all.into_iter().filter(|bits| *bits >= low && *bits <= high).collect()
}

/// Rid of the last digits' noise.
fn round(value: f64) -> f64 {
    format!("{value:.6e}").parse().unwrap_or(value)
}

/// An axis of positions; its ticks alone are labelled.
#[derive(Clone, Debug)]
pub(super) struct Axis {
    /// From the first position to the last.
    pub range: Range<f64>,
    /// Position and value of every tick.
    pub ticks: Vec<(f64, f64)>,
    /// Differences carry a sign.
    pub signed: bool,
}

impl Axis {
    /// The value of the tick at `position`.
    pub(super) fn value(&self, position: f64) -> f64 {
        let distance = |tick: &&(f64, f64)| (tick.0 - position).abs();
        let nearest = self.ticks.iter().min_by(|a, b| distance(a).total_cmp(&distance(b)));
        nearest.map_or(position, |tick| tick.1)
    }
}

impl Ranged for Axis {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, limit: (i32, i32)) -> i32 {
        let share = (value - self.range.start) / (self.range.end - self.range.start);
        limit.0 + (share * f64::from(limit.1 - limit.0)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        // Light lines between the ticks would only distract.
        if hint.weight().allow_light_points() {
            return Vec::new();
        }
        self.ticks.iter().map(|tick| tick.0).collect()
    }

    fn range(&self) -> Range<f64> {
        self.range.clone()
    }
}

impl ValueFormatter<f64> for Axis {
    fn format(value: &f64) -> String {
        tick(*value)
    }

    fn format_ext(&self, position: &f64) -> String {
        let value = self.value(*position);
        let plus = if self.signed && value > 0.0 { "+" } else { "" };
        format!("{plus}{}", tick(value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_keep_order_and_sign() {
        let values = [-0.01, -1e-4, 0.0, 2e-4, 0.03, 0.62];
        let scale = Symlog::new(values.into_iter());
        let at: Vec<_> = values.iter().map(|v| scale.at(*v)).collect();
        assert!(at.is_sorted() && at[2] == 0.0 && at[0] == -scale.at(0.01));
        assert_eq!(scale.ticks(-0.01, 0.62), [-0.01, -0.001, -1e-4, 0.0, 1e-4, 0.001, 0.01, 0.1]);
        assert_eq!(Symlog::new([0.3].into_iter()).ticks(0.0, 0.6), [0.0, 0.1, 0.2, 0.5]);
        assert_eq!(Symlog::new([f64::NAN, 0.0].into_iter()).linear, 1e-3);
    }

    #[test]
    fn linear_axes_have_round_numbers() {
        assert_eq!(linear_ticks(1.5, 5.6, 5), [2.0, 3.0, 4.0, 5.0]);
        assert_eq!(linear_ticks(0.0, 0.35, 4), [0.0, 0.1, 0.2, 0.3]);
        assert_eq!(linear_ticks(2.0, 2.0, 4), [2.0]);
        assert_eq!(bit_ticks(4.0, 9.0), [4.0, 5.0, 6.0, 8.0]);
        let axis = Axis { range: 0.0..2.0, ticks: vec![(0.0, 0.0), (1.0, 10.0)], signed: true };
        assert_eq!((axis.format_ext(&0.9), axis.format_ext(&0.1)), ("+10".into(), "0".into()));
        assert_eq!((axis.map(&1.0, (100, 300)), axis.map(&0.5, (300, 100))), (200, 250));
    }
}
