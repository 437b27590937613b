//! The `mxrewrite` command.
fn main() {}
