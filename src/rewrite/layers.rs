//! Layer numbers: which a module path has, and ranges of them.

use std::{fmt, str::FromStr};

/// The number of the layer that a module path belongs to: its first component that is one
/// (`model.layers.3.block_sparse_moe.experts.7.w3` is of layer 3).
pub fn layer_number(path: &str) -> Option<usize> {
    path.split('.').find_map(|part| part.parse().ok())
}

/// Consecutive layers, both ends included. Negative numbers count from the end: -1 is the last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerRange {
    /// First layer.
    pub first: i64,
    /// Last layer.
    pub last: i64,
}

impl LayerRange {
    /// One layer.
    pub fn one(layer: i64) -> Self {
        Self { first: layer, last: layer }
    }

    /// True when the range means something only in a model whose depth is known.
    pub fn counts_from_end(&self) -> bool {
        // An open end is -1, which no depth is needed for.
        self.first < 0 || self.last < -1
    }

    /// Whether `layer` of a model of `depth` layers lies in the range.
    pub fn contains(&self, layer: usize, depth: Option<usize>) -> bool {
        let layer = i64::try_from(layer).unwrap_or(i64::MAX);
        if self.first >= 0 && self.last == -1 {
            return layer >= self.first;
        }
        let place = |end: i64| match (end, depth) {
            (0.., _) => Some(end),
            (_, Some(depth)) => Some(end.saturating_add(i64::try_from(depth).ok()?)),
            (_, None) => None,
        };
        place(self.first).is_some_and(|first| first <= layer)
            && place(self.last).is_some_and(|last| layer <= last)
    }
}

/// How a recipe spells the range: `3`, `-1`, `4-7`, `4-` or `last 2`.
impl fmt::Display for LayerRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.first, self.last) {
            (first, last) if first == last => write!(f, "{first}"),
            (first, -1) if first < 0 => write!(f, "last {}", first.unsigned_abs()),
            (first, -1) => write!(f, "{first}-"),
            (first, last) => write!(f, "{first}-{last}"),
        }
    }
}

impl FromStr for LayerRange {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let unknown = || {
            format!(
                "'{text}' is no range of layers: write 3, -1 (the last), \"4-7\", \"4-\", \
                 \"first 2\" or \"last 2\""
            )
        };
        let number = |text: &str| {
            let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
            digits.then(|| text.parse::<i64>().ok()).flatten().ok_or_else(unknown)
        };
        let trimmed = text.trim();
        if let Some((word, count)) = trimmed.split_once(' ') {
            let count = number(count.trim()).ok().filter(|&count| count > 0).ok_or_else(unknown)?;
            return match word {
                "first" => Ok(Self { first: 0, last: count - 1 }),
                "last" => Ok(Self { first: -count, last: -1 }),
                _ => Err(unknown()),
            };
        }
        if let Some(from_end) = trimmed.strip_prefix('-') {
            return Ok(Self::one(-number(from_end).ok().filter(|&n| n > 0).ok_or_else(unknown)?));
        }
        let Some((first, last)) = trimmed.split_once('-') else {
            return number(trimmed).map(Self::one);
        };
        let first = number(first)?;
        let last = if last.is_empty() { -1 } else { number(last)? };
        if last >= 0 && last < first {
            return Err(format!(
                "'{text}' is an empty range of layers: {last} lies before {first}"
            ));
        }
        Ok(Self { first, last })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_have_the_number_of_their_layer() {
        assert_eq!(layer_number("model.layers.3.block_sparse_moe.experts.7.w3"), Some(3));
        assert_eq!(layer_number("transformer.h.11.mlp.c_fc"), Some(11));
        assert_eq!(layer_number("lm_head"), None);
        assert_eq!(layer_number("model.fc1"), None);
    }

    #[test]
    fn ranges_are_read_printed_and_tested() {
        let inside = |text: &str| -> Vec<usize> {
            let range: LayerRange = text.parse().unwrap();
            assert_eq!(range.to_string().parse(), Ok(range), "{text}");
            (0..6).filter(|&layer| range.contains(layer, Some(6))).collect()
        };
        assert_eq!(inside("2"), [2]);
        assert_eq!(inside("1-3"), [1, 2, 3]);
        assert_eq!(inside("4-"), [4, 5]);
        assert_eq!(inside("first 2"), [0, 1]);
        assert_eq!(inside("first 1"), [0]);
        assert_eq!(inside("last 2"), [4, 5]);
        assert_eq!(inside("last 1"), [5]);
        assert_eq!(inside("-2"), [4]);
        assert_eq!(inside("last 9"), [0, 1, 2, 3, 4, 5]);
        for text in ["", "x", "3-1", "last", "last 0", "last x", "--1", "-0", "1-2-3", "+3", "1 2"]
        {
            assert!(text.parse::<LayerRange>().is_err(), "{text}");
        }
    }

    #[test]
    fn only_ranges_from_the_end_need_the_depth() {
        for (text, needs) in
            [("2", false), ("4-", false), ("0-", false), ("-1", true), ("last 3", true)]
        {
            let range: LayerRange = text.parse().unwrap();
            assert_eq!(range.counts_from_end(), needs, "{text}");
            assert_eq!(range.contains(5, None), text.ends_with('-'), "{text}");
        }
    }
}
