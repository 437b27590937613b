//! Where tests find Python, the operator library and fixtures, and how they skip: aloud.
#![allow(dead_code, reason = "not every area needs everything here")]

use std::path::{Path, PathBuf};
use std::process::Command;

/// The repository's root.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// `../shared`, the project's workplace material, when it is beside the checkout (or at `MX_SHARED`).
pub fn shared() -> Option<PathBuf> {
    let path =
        std::env::var_os("MX_SHARED").map_or_else(|| root().join("../shared"), PathBuf::from);
    path.is_dir().then_some(path)
}

/// The `mxrewrite` that cargo built for these tests.
pub fn mxrewrite() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_mxrewrite"))
}

/// The custom-op library: `MX_CUSTOM_OPS`, else beside the binaries, where `cargo build --workspace`
/// puts it.
pub fn library() -> Option<PathBuf> {
    let path = std::env::var_os("MX_CUSTOM_OPS")
        .map_or_else(|| mxrewrite().with_file_name("libmx_custom_ops.so"), PathBuf::from);
    path.is_file().then_some(path)
}

/// Python with numpy, onnx and onnxruntime: `MX_PYTHON`, else `.venv/bin/python`, else `python3`.
pub fn python() -> Option<PathBuf> {
    let venv = root().join(".venv/bin/python");
    let path = match std::env::var_os("MX_PYTHON") {
        Some(path) => PathBuf::from(path),
        None if venv.is_file() => venv,
        None => PathBuf::from("python3"),
    };
    let probe = Command::new(&path).args(["-c", "import numpy, onnx, onnxruntime"]).output();
    probe.is_ok_and(|out| out.status.success()).then_some(path)
}

/// Prints why a test does not run; panics when `MX_REQUIRE` names what is missing.
pub fn skip(needs: &str, reason: &str) {
    let required = std::env::var("MX_REQUIRE").unwrap_or_default();
    assert!(!required.split(',').any(|r| r == needs), "MX_REQUIRE={required}, but {reason}");
    println!("skipped: {reason}");
}

/// Python and the operator library, or a skip with the reason.
pub fn python_and_library() -> Option<(PathBuf, PathBuf)> {
    let Some(python) = python() else {
        skip("ort", "no Python with numpy, onnx and onnxruntime (set MX_PYTHON)");
        return None;
    };
    let Some(library) = library() else {
        skip("ort", "no libmx_custom_ops.so beside the binaries (cargo build --workspace)");
        return None;
    };
    Some((python, library))
}

/// Runs a script of `tests/python` with the library and the programs named in its environment, and what
/// else `set` adds. It must succeed; what it printed is shown and returned. `None` after a skip.
pub fn script(name: &str, set: impl FnOnce(&mut Command)) -> Option<String> {
    let (python, library) = python_and_library()?;
    let mut command = Command::new(&python);
    command
        .arg(root().join("tests/python").join(name))
        .current_dir(root())
        .env("MX_PYTHON", &python)
        .env("MX_REWRITE", mxrewrite())
        .env("MX_CUSTOM_OPS", library)
        .env("PYTHONDONTWRITEBYTECODE", "1");
    set(&mut command);
    let out = command.output().expect("the Python interpreter was probed before");
    let stdout = String::from_utf8_lossy(&out.stdout).trim().to_owned();
    let arguments: Vec<_> = command.get_args().skip(1).collect();
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{name} {arguments:?}: {}\n{stdout}\n{stderr}", out.status);
    println!("{name} {arguments:?}: {stdout}");
    Some(stdout)
}
