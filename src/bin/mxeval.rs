//! The `mxeval` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(mxrewrite::cli::mxeval::main(std::env::args_os()))
}
