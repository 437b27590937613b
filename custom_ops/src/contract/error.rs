//! What can be wrong with a node, in words that name the attribute or input.

use thiserror::Error;

/// A node that does not keep the contract.
#[derive(Debug, Clone, PartialEq, Error)]
#[non_exhaustive]
pub enum ContractError {
    /// An attribute without a default is absent.
    #[error("attribute {attribute} ({expected}) is missing")]
    Missing {
        /// Attribute name.
        attribute: &'static str,
        /// ONNX type that belongs there.
        expected: &'static str,
    },
    /// An attribute has another ONNX type.
    #[error("attribute {attribute} is of type {found}, expected {expected}")]
    WrongKind {
        /// Attribute name.
        attribute: &'static str,
        /// ONNX type that belongs there.
        expected: &'static str,
        /// ONNX type found.
        found: &'static str,
    },
    /// An integer attribute is outside its range.
    #[error("attribute {attribute} is {value}, allowed: {allowed}")]
    OutOfRange {
        /// Attribute name.
        attribute: &'static str,
        /// The value found.
        value: i64,
        /// The values that are allowed.
        allowed: &'static str,
    },
    /// The model is of a later version than this library.
    #[error(
        "{what} is {found}, but mxrewrite {} supports {what} {supported} at most: update mxrewrite (or its \
         libmx_custom_ops), or rewrite the model with this version",
        env!("CARGO_PKG_VERSION")
    )]
    Newer {
        /// What has the version.
        what: &'static str,
        /// The version found.
        found: i64,
        /// The latest that this library knows.
        supported: i64,
    },
    /// A float attribute is NaN or infinite.
    #[error("attribute {attribute} is {value}, allowed: finite numbers")]
    NotFinite {
        /// Attribute name.
        attribute: &'static str,
        /// The value found.
        value: f32,
    },
    /// A string attribute is none of the known names.
    #[error("attribute {attribute} is {value:?}: {cause}")]
    Text {
        /// Attribute name.
        attribute: &'static str,
        /// The value found, cut to 40 characters.
        value: String,
        /// Which names are allowed.
        cause: String,
    },
    /// Format, scale kind and block size do not go together.
    #[error("attribute {attribute}: {source}")]
    Operand {
        /// The format attribute of the operand.
        attribute: &'static str,
        /// What the kernels say.
        source: mx_kernels::Error,
    },
    /// The packed weight would not fit into an address space.
    #[error("a weight of {n} rows of {row_bytes} bytes is too large")]
    TooLarge {
        /// Rows.
        n: usize,
        /// Bytes of a row.
        row_bytes: usize,
    },
    /// An element of the index names no expert.
    #[error("input index holds {index} at place {place}, allowed: -{experts} to {}", *experts as i64 - 1)]
    NoExpert {
        /// Place among the index's elements.
        place: usize,
        /// The element.
        index: i64,
        /// Experts in the stack.
        experts: usize,
    },
    /// An input that the attributes call for is absent.
    #[error("input {input} is missing, expected {expected}")]
    MissingInput {
        /// Input name.
        input: &'static str,
        /// What belongs there.
        expected: String,
    },
    /// An input is given although the attributes exclude it.
    #[error("input {input} must be absent: {reason}")]
    UnexpectedInput {
        /// Input name.
        input: &'static str,
        /// Why it is excluded.
        reason: &'static str,
    },
    /// An input has another element type.
    #[error("input {input} has element type {found}, expected {expected}")]
    ElementType {
        /// Input name.
        input: &'static str,
        /// Expected type.
        expected: &'static str,
        /// Type found.
        found: String,
    },
    /// An input has another shape.
    #[error("input {input} has shape {found:?}, expected {expected}")]
    Shape {
        /// Input name.
        input: &'static str,
        /// Expected shape, in words.
        expected: String,
        /// Shape found; -1 marks an unknown dimension.
        found: Vec<i64>,
    },
}
