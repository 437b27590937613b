//! The shell, the tensors and the writer, on models made here.

mod attacks;
mod files;
mod shell;
