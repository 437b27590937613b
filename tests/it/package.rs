//! The Python package, of this build: the modules of `python/mxrewrite` beside the libraries that cargo made, as
//! a wheel has them. `scripts/check_wheel.sh` tests a real wheel in a fresh environment by the same script.

use std::path::Path;

use crate::support;

/// A folder for PYTHONPATH, or a skip with the reason.
fn package(folder: &Path) -> bool {
    let native = support::mxrewrite().with_file_name("lib_native.so");
    if !native.is_file() {
        support::skip("ort", "no lib_native.so beside the binaries (cargo build --workspace)");
        return false;
    }
    let Some(library) = support::library() else {
        support::skip(
            "ort",
            "no libmx_custom_ops.so beside the binaries (cargo build --workspace)",
        );
        return false;
    };
    let package = folder.join("mxrewrite");
    std::fs::create_dir(&package).unwrap();
    let link = |from: &Path, name: &str| {
        std::os::unix::fs::symlink(from, package.join(name)).unwrap();
    };
    for entry in std::fs::read_dir(support::root().join("python/mxrewrite")).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        // A build of the wheel leaves its own beside them.
        if name.ends_with(".py") || name == "py.typed" {
            link(&path, name);
        }
    }
    link(&native, "_native.abi3.so");
    link(&library, "libmx_custom_ops.so");
    true
}

/// Runs a script of `tests/python` with the package on its path.
pub(crate) fn run(script: &str, parts: &[&str]) {
    if support::python_and_library().is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    if !package(folder.path()) {
        return;
    }
    support::script(script, |command| {
        command
            .args(parts)
            .env("PYTHONPATH", folder.path())
            .env("MX_BINARIES", support::mxrewrite().parent().unwrap())
            // The package brings its own.
            .env_remove("MX_OPS_LIBRARY")
            .env_remove("MX_CUSTOM_OPS");
    });
}

fn python(parts: &[&str]) {
    run("test_package.py", parts);
}

#[test]
fn models_are_planned_and_rewritten() {
    python(&["import", "plan", "rewrite", "errors", "interrupt"]);
}

#[test]
fn numbers_are_the_emulations() {
    python(&["numbers", "gil"]);
}

#[test]
fn sessions_run_and_are_described() {
    python(&["library", "session"]);
}

#[test]
fn text_is_measured_and_commands_find_onnx_runtime() {
    python(&["evaluate", "commands"]);
}
