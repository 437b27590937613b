//! Tests of the crate as a whole: golden vectors, and every CPU variant against the reference.

#![allow(clippy::print_stdout)] // what was skipped, and why

mod act_matmul;
mod common;
mod cuda;
mod golden;
mod linear;
mod quantize;
mod scores;
mod scores_kl;
mod variant;
