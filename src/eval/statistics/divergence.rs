//! The distribution of KL over tokens.

use super::table::Document;

/// Bins of [`crate::eval::figures::Divergence::histogram`]: four a decade, from below 10^-8.75 to
/// 10^1.75 nats and above.
pub const HISTOGRAM_BINS: usize = 44;

/// Percentiles of KL over tokens, and its histogram.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Distribution {
    pub median: Option<f64>,
    pub p90: Option<f64>,
    pub p99: Option<f64>,
    pub p999: Option<f64>,
    pub max: Option<f64>,
    pub histogram: Vec<u64>,
}

/// Of all tokens of `documents`; `None` when their KL was not kept.
pub(super) fn of(documents: &[Document<'_>], histogram: bool) -> Option<Distribution> {
    let mut values: Vec<f32> = documents.iter().flat_map(|document| document.kl).copied().collect();
    if values.is_empty() {
        return None;
    }
    let bins = if histogram { bins(&values) } else { Vec::new() };
    values.sort_unstable_by(f32::total_cmp);
    // NaN has no place in the order, so nothing does (as in NumPy).
    if values.iter().any(|value| value.is_nan()) {
        return Some(Distribution { histogram: bins, ..Distribution::default() });
    }
    let percentile = |p| percentile(&values, p);
    Some(Distribution {
        median: percentile(0.5),
        p90: percentile(0.9),
        p99: percentile(0.99),
        p999: percentile(0.999),
        max: percentile(1.0),
        histogram: bins,
    })
}

/// NumPy's default definition (linear) in float64; `None` where that is not finite.
fn percentile(sorted: &[f32], p: f64) -> Option<f64> {
    let position = p * sorted.len().checked_sub(1)? as f64;
    let below = position.floor() as usize;
    let low = f64::from(*sorted.get(below)?);
    let weight = position - below as f64;
    if weight == 0.0 {
        return low.is_finite().then_some(low);
    }
    let high = f64::from(*sorted.get(below + 1)?);
    let step = high - low;
    let value = if weight < 0.5 { low + step * weight } else { high - step * (1.0 - weight) };
    value.is_finite().then_some(value)
}

/// Counts by bin; NaN is in none, zero and rounding below it in the first.
fn bins(values: &[f32]) -> Vec<u64> {
    let edges: Vec<f64> = (1..HISTOGRAM_BINS).map(|i| 10f64.powf(i as f64 / 4.0 - 9.0)).collect();
    let mut bins = vec![0; HISTOGRAM_BINS];
    for &value in values.iter().filter(|value| !value.is_nan()) {
        let bin = edges.partition_point(|&edge| edge <= f64::from(value));
        if let Some(count) = bins.get_mut(bin) {
            *count += 1;
        }
    }
    bins
}
