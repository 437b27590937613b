//! How far one tensor is from another, added up over runs.

use serde::{Serialize, Serializer, ser::SerializeMap};

use super::numbers::Numbers;

/// Error of B against A over all elements of all runs, in float64.
///
/// Elements that are NaN, or the same infinity, in both are equal. Where only one of the two is finite
/// the largest error is infinite, and the pair is left out of the means.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Difference {
    /// Elements compared.
    pub elements: u64,
    /// max |b - a|.
    pub max_abs: f64,
    sum_abs: f64,
    signal: f64,
    noise: f64,
    finite: u64,
    /// Smallest and largest finite element of A.
    range: Option<(f64, f64)>,
    /// NaNs in A.
    pub nan_a: u64,
    /// NaNs in B.
    pub nan_b: u64,
    /// Infinities in A.
    pub inf_a: u64,
    /// Infinities in B.
    pub inf_b: u64,
    /// Elements that are NaN in B and not in A.
    pub new_nan: u64,
}

impl Difference {
    /// Adds a run's tensors, which have the same number of elements.
    pub fn add(&mut self, a: &Numbers, b: &Numbers) {
        for (&a, &b) in a.values.iter().zip(&b.values) {
            self.add_pair(a, b);
        }
    }

    fn add_pair(&mut self, a: f64, b: f64) {
        self.elements += 1;
        self.nan_a += u64::from(a.is_nan());
        self.nan_b += u64::from(b.is_nan());
        self.inf_a += u64::from(a.is_infinite());
        self.inf_b += u64::from(b.is_infinite());
        self.new_nan += u64::from(b.is_nan() && !a.is_nan());
        if a.is_finite() {
            let (low, high) = self.range.unwrap_or((a, a));
            self.range = Some((low.min(a), high.max(a)));
        }
        if !(a.is_finite() && b.is_finite()) {
            let equal = a == b || (a.is_nan() && b.is_nan());
            if !equal {
                self.max_abs = f64::INFINITY;
            }
            return;
        }
        let error = (b - a).abs();
        self.finite += 1;
        self.max_abs = self.max_abs.max(error);
        self.sum_abs += error;
        self.signal += a * a;
        self.noise += error * error;
    }

    /// mean |b - a| over the pairs of finite elements.
    pub fn mean_abs(&self) -> f64 {
        self.sum_abs / self.finite.max(1) as f64
    }

    /// [`Self::max_abs`] as a share of the range of A's elements; `None` where A is constant.
    pub fn relative(&self) -> Option<f64> {
        let (low, high) = self.range?;
        (high > low).then(|| self.max_abs / (high - low))
    }

    /// Signal-to-noise ratio in decibels, 10 log10(sum a^2 / sum (b - a)^2) over the pairs of finite
    /// elements; infinite where they are equal.
    pub fn sqnr(&self) -> f64 {
        match self.noise > 0.0 {
            true => 10.0 * (self.signal / self.noise).log10(),
            false => f64::INFINITY,
        }
    }
}

/// The JSON: a number that is infinite or does not exist is null.
impl Serialize for Difference {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let finite = |value: f64| value.is_finite().then_some(value);
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("elements", &self.elements)?;
        map.serialize_entry("max_abs_error", &finite(self.max_abs))?;
        map.serialize_entry("mean_abs_error", &self.mean_abs())?;
        map.serialize_entry("relative_to_range", &self.relative().and_then(finite))?;
        map.serialize_entry("sqnr_db", &finite(self.sqnr()))?;
        map.serialize_entry("identical", &(self.max_abs == 0.0))?;
        map.serialize_entry("nan_a", &self.nan_a)?;
        map.serialize_entry("nan_b", &self.nan_b)?;
        map.serialize_entry("inf_a", &self.inf_a)?;
        map.serialize_entry("inf_b", &self.inf_b)?;
        map.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn difference(a: &[f64], b: &[f64]) -> Difference {
        let numbers = |values: &[f64]| Numbers {
            dtype: "float32",
            shape: vec![values.len()],
            values: values.to_vec(),
        };
        let mut difference = Difference::default();
        difference.add(&numbers(a), &numbers(b));
        difference
    }

    #[test]
    fn figures_are_those_of_their_definitions() {
        let d = difference(&[3.0, -4.0, 0.0, 1.0], &[3.0, -3.5, 0.25, 1.0]);
        assert_eq!((d.elements, d.max_abs, d.mean_abs()), (4, 0.5, 0.1875));
        assert_eq!(d.relative(), Some(0.5 / 7.0));
        let expected = 10.0 * (26.0f64 / (0.25 + 0.0625)).log10();
        assert!((d.sqnr() - expected).abs() < 1e-12);
        assert_eq!(difference(&[1.0, 1.0], &[1.0, 1.0]).sqnr(), f64::INFINITY);
        assert_eq!(difference(&[1.0, 1.0], &[1.0, 2.0]).relative(), None);
    }

    #[test]
    fn what_is_not_finite_is_counted_and_equal_only_to_itself() {
        let (nan, inf) = (f64::NAN, f64::INFINITY);
        let same = difference(&[nan, inf, -inf, 1.0], &[nan, inf, -inf, 1.5]);
        assert_eq!((same.max_abs, same.nan_a, same.nan_b), (0.5, 1, 1));
        assert_eq!((same.inf_a, same.inf_b, same.new_nan), (2, 2, 0));
        for (a, b) in [(1.0, nan), (nan, 1.0), (inf, -inf), (1.0, inf)] {
            assert_eq!(difference(&[a], &[b]).max_abs, inf, "{a} {b}");
        }
        assert_eq!(difference(&[1.0, inf], &[nan, nan]).new_nan, 2);
        let json = serde_json::to_value(difference(&[1.0], &[nan])).unwrap();
        assert!(json["max_abs_error"].is_null() && json["nan_b"] == 1, "{json}");
    }
}
