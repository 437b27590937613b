//! Numbers as text.

use crate::eval::figures::Estimate;

/// What stands where there is no figure.
pub(super) const NOTHING: &str = "-";

/// `digits` decimals.
pub(crate) fn plain(value: Option<f64>, digits: usize) -> String {
    value.map_or_else(|| NOTHING.into(), |value| format!("{value:.digits$}"))
}

/// `digits` decimals and always a sign.
pub(crate) fn signed(value: Option<f64>, digits: usize) -> String {
    value.map_or_else(|| NOTHING.into(), |value| format!("{value:+.digits$}"))
}

/// Half the width of the interval.
pub(super) fn half_width(estimate: &Estimate) -> Option<f64> {
    Some((estimate.high? - estimate.low?) / 2.0)
}

/// The difference and half of its interval: `+0.0308 ±0.0021`.
pub(crate) fn plus_minus(estimate: &Estimate, digits: usize) -> String {
    let value = signed(estimate.value, digits);
    match half_width(estimate) {
        Some(half) => format!("{value} ±{half:.digits$}"),
        None => value,
    }
}

/// `[low, high]` of a figure.
pub(super) fn interval(estimate: &Estimate, digits: usize) -> Option<String> {
    let (low, high) = estimate.low.zip(estimate.high)?;
    Some(format!("[{low:.digits$}, {high:.digits$}]"))
}

/// `[low, high]` of a difference.
pub(super) fn signed_interval(estimate: &Estimate, digits: usize) -> Option<String> {
    let (low, high) = estimate.low.zip(estimate.high)?;
    Some(format!("[{low:+.digits$}, {high:+.digits$}]"))
}

/// What spans decades, such as a divergence: three digits, with an exponent below 0.001.
pub(super) fn small(value: Option<f64>) -> String {
    match value {
        None => NOTHING.into(),
        Some(0.0) => "0".into(),
        Some(value) if value.abs() < 1e-3 => format!("{value:.2e}"),
        Some(value) => format!("{value:.*}", decimals(value)),
    }
}

/// A difference in few characters, for a cell of a map.
pub(super) fn brief(value: f64) -> String {
    if value != 0.0 && value.abs() < 1e-3 {
        format!("{value:+.0e}")
    } else {
        let digits = if value.abs() < 0.1 { 3 } else { 2 };
        format!("{value:+.digits$}")
    }
}

/// A number without needless digits: an axis's label.
pub(super) fn tick(value: f64) -> String {
    let text = if value != 0.0 && !(1e-3..1e6).contains(&value.abs()) {
        return format!("{value:e}");
    } else {
        format!("{value:.4}")
    };
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

fn decimals(value: f64) -> usize {
    match value.abs() {
        v if v >= 100.0 => 1,
        v if v >= 10.0 => 2,
        v if v >= 1.0 => 3,
        v if v >= 0.1 => 4,
        _ => 5,
    }
}

/// Millions of bytes.
pub(super) fn megabytes(bytes: Option<u64>) -> Option<f64> {
    bytes.map(|bytes| bytes as f64 / 1e6)
}

/// Text without control characters, which neither HTML nor a terminal should get from a file name.
pub(crate) fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short_and_keep_their_sign() {
        assert_eq!(["-", "-"], [plain(None, 3).as_str(), signed(None, 3).as_str()]);
        let estimate = Estimate { value: Some(0.5), low: Some(0.25), high: Some(0.75) };
        assert_eq!(plus_minus(&estimate, 2), "+0.50 ±0.25");
        assert_eq!(plus_minus(&Estimate::exact(-0.5), 2), "-0.50");
        assert_eq!(signed_interval(&estimate, 2).unwrap(), "[+0.25, +0.75]");
        let small = |v| super::small(Some(v));
        assert_eq!([small(0.0), small(1.25e-5), small(0.0123)], ["0", "1.25e-5", "0.01230"]);
        assert_eq!(
            [brief(0.0), brief(0.0314), brief(-0.62), brief(4e-5)],
            ["+0.000", "+0.031", "-0.62", "+4e-5"]
        );
        assert_eq!(
            [tick(0.0), tick(0.001), tick(4.25), tick(1e-6)],
            ["0", "0.001", "4.25", "1e-6"]
        );
        assert_eq!(clean("a\u{1b}[31m\nb"), "a [31m b");
    }
}
