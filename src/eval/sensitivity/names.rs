//! Names of what a graph with choices has beyond the model's own inputs and outputs.

/// The value between two segments that a run begins with.
pub(super) const HIDDEN: &str = "mx.hidden";
/// The baseline's logits.
pub(super) const BASELINE: &str = "mx.baseline";
/// Whether there are baseline logits to compare with.
pub(super) const COMPARE: &str = "mx.compare";
/// Positions along the sequence at which the head is computed.
pub(super) const POSITIONS: &str = "mx.positions";
/// Outputs of the scoring node: as [`instrument::OUTPUTS`](super::super::instrument::OUTPUTS), then
/// divergence and the baseline's loss.
pub(super) const SCORES: [&str; 5] =
    ["mx.nll", "mx.entropy", "mx.top1", "mx.kl", "mx.baseline_nll"];

/// Whether segment `i` is left out.
pub(super) fn skip(i: usize) -> String {
    format!("mx.skip.{i}")
}

/// Whether the run begins with segment `i`.
pub(super) fn start(i: usize) -> String {
    format!("mx.start.{i}")
}

/// Whether site `j` is quantised.
pub(super) fn site(j: usize) -> String {
    format!("mx.site.{j}")
}

/// Whether it is quantised to format `f`; asked in order, the last format needs no input.
pub(super) fn format(f: usize) -> String {
    format!("mx.format.{f}")
}
