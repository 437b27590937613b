//! Measuring a model on text.
//!
//! [`corpus`] streams documents, [`windows`] turns them into tokens to score, [`schedule`] into
//! batches; [`instrument`] appends the scoring node to a graph, [`session`] runs it in ONNX Runtime,
//! [`metrics`] adds up. [`run`] goes through the stages of every [`job`] and leaves records
//! ([`record`], [`store`]) and a [`report`].

pub mod corpus;
pub mod devices;
mod error;
pub mod feeds;
pub mod instrument;
pub mod job;
mod measure;
pub mod metrics;
mod process;
pub mod record;
pub mod report;
pub mod run;
pub mod runtime;
pub mod schedule;
pub mod session;
pub mod stage;
pub mod store;
pub mod windows;

pub use error::{Error, Result};
pub use measure::{Observer, Silent};
