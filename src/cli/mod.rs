//! The two commands: arguments to one library call to an exit code.
//!
//! They are a part of the library so that the binaries and the Python package's entry points run
//! the same code.

use std::ffi::OsString;
use std::sync::OnceLock;

pub mod mxeval;
pub mod mxrewrite;
mod signals;

/// The command as it was typed, for reports: a host program's own arguments are others.
static TYPED: OnceLock<Vec<String>> = OnceLock::new();

/// Notes the arguments, the command's name first, and hands them on to the parser.
fn typed(arguments: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let arguments: Vec<_> = arguments.into_iter().collect();
    let text = arguments.iter().map(|argument| argument.to_string_lossy().into_owned());
    // A process that runs two commands keeps the first; none does.
    let _ = TYPED.set(text.collect());
    arguments
}

/// The command as it was typed.
fn command_line() -> Vec<String> {
    TYPED.get().cloned().unwrap_or_default()
}
