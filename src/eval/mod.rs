//! Measuring a model on text.
//!
//! [`corpus`] streams documents, [`windows`] turns them into tokens to score, [`schedule`] into
//! batches; [`instrument`] appends the scoring node to a graph, [`session`] runs it in ONNX Runtime,
//! [`metrics`] adds up, [`statistics`] says how far to trust it. [`devices`] chooses where. [`run`] puts the stages of every [`job`] into one
//! queue from which teams of devices (`workers`) take, each `measure`s a stage by `score`, and
//! leaves records ([`record`], [`store`]) and a [`report`]; [`compare`] lays runs side by side.

pub mod compare;
pub mod corpus;
mod describe;
pub mod devices;
mod error;
pub mod feeds;
pub mod figures;
pub mod gpus;
mod identity;
pub mod instrument;
pub mod job;
mod loading;
mod measure;
pub mod metrics;
mod observer;
mod pair;
mod peaks;
mod process;
pub mod record;
pub mod report;
pub mod run;
pub mod runtime;
pub mod schedule;
pub mod score;
pub mod scores;
mod scoring;
pub mod search;
pub mod sensitivity;
pub mod session;
pub mod stage;
pub mod statistics;
pub mod store;
mod summary;
pub mod tasks;
mod texts;
pub mod windows;
mod workers;

pub use error::{Error, Result};
pub use observer::{Observer, Silent};
