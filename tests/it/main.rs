//! What crosses crates or runs a binary; one module an area.
#![allow(clippy::print_stdout, reason = "tests say what they skipped and what they measured")]

mod checkpoint;
mod cli;
mod compare;
mod custom_ops;
mod data;
mod docs;
mod eval;
mod eval_pairs;
mod eval_tasks;
mod examples;
mod experts;
mod genai;
mod hostile;
mod judges;
mod lowerings;
mod models;
mod modes;
mod package;
mod packed;
mod recipes;
mod sensitivity;
mod shell;
mod size;
mod support;
mod verify;
mod zoo;
