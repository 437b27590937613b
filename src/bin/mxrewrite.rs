//! The `mxrewrite` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(mxrewrite::cli::mxrewrite::main(std::env::args_os()))
}
