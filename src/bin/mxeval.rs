//! The `mxeval` command.
fn main() {}
