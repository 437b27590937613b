//! ONNX files in and out.
//!
//! A model is read through a *lossless shell* of our own: [`Model`] and [`Graph`] keep every field of
//! the file as the bytes that stand there, in their order, and decode nodes and tensor heads beside
//! them. What is not touched is written back byte for byte, unknown fields included; an unmodified
//! model is written back identical. `prost` alone would drop unknown fields, and the published
//! `onnx-protobuf` crate does not compile with the current protobuf crate (see [`proto`]).
//!
//! Files are mapped, so opening a model costs its structure, not its weights. Everything a file says
//! (lengths, offsets, shapes, names, nesting) is distrusted and checked, and errors name the byte.

mod edit;
mod encode;
mod error;
mod external;
mod graph;
mod mmap;
mod model;
mod output;
mod partial;
mod pipe;
mod progress;
pub mod proto;
mod read;
mod relocate;
mod save;
mod shards;
mod tensor;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
pub(crate) mod wire;

pub use error::{Error, Result};
pub use graph::{Graph, MAX_DEPTH, NodeId};
pub use model::{Function, Model};
pub use progress::Progress;
pub use proto::DataType;
pub use save::{SaveOptions, Saved};
pub use tensor::{
    ExternalRef, Payload, Producer, Sink, Storage, Streamer, TensorInfo, TensorView, element_bits,
};

pub(crate) use mmap::{map, release};
