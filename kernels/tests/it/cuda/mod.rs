//! What runs on, or is made for, an NVIDIA GPU.

pub mod common;
mod linear;
mod runtime;
mod scores;
mod units;
