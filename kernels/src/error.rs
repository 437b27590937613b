//! The one error type of the crate.

/// Why a call was refused. Nothing has been written to the outputs when one of these comes back.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Error {
    /// A name from a file or a command line that no table of this crate holds.
    #[error("unknown {what} \"{name}\": expected one of {expected}")]
    UnknownName {
        /// What was being named, for example "element format".
        what: &'static str,
        /// The name as it was given.
        name: String,
        /// The names that exist, separated by spaces.
        expected: &'static str,
    },
    /// A block size outside the supported set.
    #[error("block size {0} is not supported: use 16, 32, 64, 128 or 256")]
    BlockSize(usize),
    /// An element format that cannot be used with a kind of scale.
    #[error("element format {format} does not go with scale \"{scale}\": {reason}")]
    Combination {
        /// Name of the element format.
        format: &'static str,
        /// Name of the kind of scale.
        scale: &'static str,
        /// Which formats would do.
        reason: &'static str,
    },
    /// A buffer whose length does not follow from the shape.
    #[error("{what} holds {actual} elements, but the shape needs {expected}")]
    Length {
        /// Which buffer.
        what: &'static str,
        /// Elements that the shape needs.
        expected: usize,
        /// Elements that the buffer holds.
        actual: usize,
    },
    /// A buffer that should hold whole rows and does not.
    #[error("{what} holds {actual} elements, which is no whole number of rows of {row}")]
    Rows {
        /// Which buffer.
        what: &'static str,
        /// Elements in one row.
        row: usize,
        /// Elements that the buffer holds.
        actual: usize,
    },
    /// A dimension that must be at least one.
    #[error("{0} is zero: it must be at least 1")]
    ZeroDimension(&'static str),
    /// The problem and the weight disagree.
    #[error("the problem and its weight disagree on {what}: {problem} and {weight}")]
    Mismatch {
        /// What they disagree on.
        what: &'static str,
        /// The problem's value.
        problem: String,
        /// The weight's value.
        weight: String,
    },
    /// A label that is no token of the vocabulary.
    #[error("row {row}: label {label} is outside the vocabulary of {vocab} (and not -100, masked)")]
    Label {
        /// Row of the logits.
        row: usize,
        /// The label found there.
        label: i64,
        /// Size of the vocabulary.
        vocab: usize,
    },
}

/// Checks one buffer's length.
pub(crate) fn check_len(what: &'static str, actual: usize, expected: usize) -> Result<(), Error> {
    if actual == expected { Ok(()) } else { Err(Error::Length { what, expected, actual }) }
}
