//! The models' outputs against each other.

use serde::Serialize;

use super::{difference::Difference, numbers::Numbers, session::Outputs};

/// One output of both models, over all runs.
#[derive(Clone, Debug, Serialize)]
pub struct OutputReport {
    /// Its name.
    pub name: String,
    /// Element type in A.
    pub dtype_a: String,
    /// Element type in B.
    pub dtype_b: String,
    /// Shape in A in the first run.
    pub shape: Vec<usize>,
    /// The error of B.
    #[serde(flatten)]
    pub difference: Difference,
    /// Of logits: share of the positions at which A and B have the same largest logit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top1_agreement: Option<f64>,
    /// Positions that agree, and positions.
    #[serde(skip)]
    top1: (u64, u64),
}

impl OutputReport {
    /// Whether A's elements are floats.
    pub fn is_float(&self) -> bool {
        self.dtype_a.contains("float")
    }

    /// A key-value cache, of which there are many.
    pub fn is_cache(&self) -> bool {
        self.name.starts_with("present")
    }
}

/// All outputs.
#[derive(Clone, Debug, Default, Serialize)]
pub struct OutputsReport {
    /// Outputs of both, in A's order.
    pub both: Vec<OutputReport>,
    /// Outputs that only A has.
    pub only_in_a: Vec<String>,
    /// Outputs that only B has.
    pub only_in_b: Vec<String>,
    /// Outputs of another shape or kind in B.
    pub differ: Vec<String>,
    /// Outputs that cannot be compared, and why.
    pub not_compared: Vec<String>,
}

impl OutputsReport {
    /// Adds a run.
    pub(super) fn add(&mut self, run: &str, a: &Outputs, b: &Outputs) {
        let has = |outputs: &Outputs, name: &str| outputs.iter().any(|(known, _)| known == name);
        for (name, value) in a {
            let Some((_, other)) = b.iter().find(|(known, _)| known == name) else {
                remember(&mut self.only_in_a, name.clone());
                continue;
            };
            match (value, other) {
                (Ok(a), Ok(b)) if a.shape == b.shape => self.compare(name, a, b),
                (Ok(a), Ok(b)) => {
                    let (a, b) = (&a.shape, &b.shape);
                    let what = format!("output `{name}` is {a:?} in A and {b:?} in B ({run})");
                    remember(&mut self.differ, what);
                }
                (Err(a), Err(b)) if a == b => {
                    remember(&mut self.not_compared, format!("output `{name}` {a}"));
                }
                (a, b) => {
                    let kind = |value: &Result<Numbers, String>| match value {
                        Ok(numbers) => format!("holds {}", numbers.dtype),
                        Err(reason) => reason.clone(),
                    };
                    let (a, b) = (kind(a), kind(b));
                    remember(&mut self.differ, format!("output `{name}` {a} in A and {b} in B"));
                }
            }
        }
        for (name, _) in b.iter().filter(|(name, _)| !has(a, name)) {
            remember(&mut self.only_in_b, name.clone());
        }
    }

    fn compare(&mut self, name: &str, a: &Numbers, b: &Numbers) {
        let at = self.both.iter().position(|known| known.name == name).unwrap_or_else(|| {
            self.both.push(OutputReport {
                name: name.to_owned(),
                dtype_a: a.dtype.to_owned(),
                dtype_b: b.dtype.to_owned(),
                shape: a.shape.clone(),
                difference: Difference::default(),
                top1_agreement: None,
                top1: (0, 0),
            });
            self.both.len() - 1
        });
        let report = &mut self.both[at];
        report.difference.add(a, b);
        let width = a.shape.last().copied().unwrap_or(0);
        if name == "logits" && width > 0 {
            let rows = a.values.chunks(width).zip(b.values.chunks(width));
            for (a, b) in rows {
                report.top1.0 += u64::from(largest(a) == largest(b));
                report.top1.1 += 1;
            }
            report.top1_agreement = Some(report.top1.0 as f64 / report.top1.1.max(1) as f64);
        }
    }
}

fn remember(list: &mut Vec<String>, text: String) {
    if !list.contains(&text) {
        list.push(text);
    }
}

/// Where the largest number stands, the first of several; `None` where there is none but NaN.
fn largest(row: &[f64]) -> Option<usize> {
    let mut best: Option<(usize, f64)> = None;
    for (index, &value) in row.iter().enumerate() {
        if !value.is_nan() && best.is_none_or(|(_, most)| value > most) {
            best = Some((index, value));
        }
    }
    best.map(|(index, _)| index)
}
