//! Errors of operators, and the wall that keeps panics on this side of the C boundary.

use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind},
};

use thiserror::Error;

use crate::{contract::ContractError, host::ElementType};

/// Why a node cannot be created or computed.
#[derive(Debug, Error)]
pub(crate) enum OpError {
    #[error(transparent)]
    Contract(#[from] ContractError),
    #[error(transparent)]
    Kernel(#[from] mx_kernels::Error),
    #[error(transparent)]
    Cuda(#[from] mx_kernels::cuda::CudaError),
    #[error("ONNX Runtime's {call} failed: {message}")]
    Host { call: &'static str, message: String },
    #[error("a value is not a tensor")]
    NotTensor,
    #[error("a tensor has no data")]
    NoData,
    #[error("a tensor has {rank} dimensions, at most {most} are supported")]
    Rank { rank: usize, most: usize },
    #[error("a tensor has impossible dimensions {0:?}")]
    Dimensions(Vec<i64>),
    #[error("a tensor has element type {}, expected {}", found.name(), expected.name())]
    ElementType { found: ElementType, expected: ElementType },
    #[error("output {index} cannot be allocated as declared")]
    Output { index: usize },
    #[error("output {output} needs the input {input}, which is absent")]
    OutputWithout { output: &'static str, input: &'static str },
    #[error("a tensor lies in {found}, the kernel runs on GPU {ordinal}")]
    Place { found: String, ordinal: u32 },
    #[error("the CUDA provider allocates in {0}")]
    NotOnGpu(String),
    #[error("a tensor at {address:#x} is not aligned to {alignment} bytes: bind memory that is")]
    Alignment { address: u64, alignment: u64 },
    #[error("internal error, please report it: {0}")]
    Panic(String),
}

/// Runs `body` for the node `node` of operator `op`; an error or panic becomes an error of ONNX
/// Runtime that names both.
pub(crate) fn protect<T>(
    op: &str,
    node: &str,
    body: impl FnOnce() -> Result<T, OpError>,
) -> ort::Result<T> {
    catch_unwind(AssertUnwindSafe(body))
        .unwrap_or_else(|cause| Err(OpError::Panic(panic_message(&*cause))))
        .map_err(|error| ort::Error::new(printable(&format!("{op} node '{node}': {error}"))))
}

/// What a panic said.
pub(crate) fn panic_message(cause: &(dyn Any + Send)) -> String {
    let text = cause.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| cause.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "panic without a message".to_owned())
}

/// A message fit for a C string: no control characters (a NUL would cut it, or make `ort` panic),
/// and of bounded length, whatever a corrupt model calls its nodes.
pub(crate) fn printable(message: &str) -> String {
    const MOST: usize = 2000;
    let clean = |c: char| if c.is_control() { '\u{fffd}' } else { c };
    message.chars().take(MOST).map(clean).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_lose_what_c_strings_cannot_hold() {
        assert_eq!(printable("a\0b\nc"), "a\u{fffd}b\u{fffd}c");
        assert_eq!(printable(&"é".repeat(5000)).chars().count(), 2000);
    }

    #[test]
    fn panics_of_both_kinds_keep_their_message() {
        let of = |body: fn()| panic_message(&*catch_unwind(body).unwrap_err());
        assert_eq!(of(|| panic!("plain")), "plain");
        let n = std::hint::black_box(3);
        assert_eq!(panic_message(&*catch_unwind(|| panic!("{n}")).unwrap_err()), "3");
    }
}
