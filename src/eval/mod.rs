//! Measuring a model on text: corpus to windows to per-token scores to metrics to a report.
pub mod corpus;
mod error;
pub mod metrics;
pub mod schedule;
pub mod windows;

pub use error::{Error, Result};
