//! What runs on, or is made for, an NVIDIA GPU.

mod act_matmul;
pub mod common;
mod fp8;
mod linear;
mod quantize;
mod runtime;
mod scores;
mod units;
