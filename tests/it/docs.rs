//! The documentation: its snippets run, its links lead somewhere, and every error is explained.

use std::process::Command;

use crate::{package, support};

fn docs(part: &str) {
    let Some((python, _)) = support::python_and_library() else { return };
    let folder = tempfile::tempdir().unwrap();
    if !package::package(folder.path()) {
        return;
    }
    let out = Command::new(python)
        .arg(support::root().join("tests/python/test_docs.py"))
        .arg(part)
        .env("PYTHONPATH", folder.path())
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env("MX_BINARIES", support::mxrewrite().parent().unwrap())
        .env_remove("MX_OPS_LIBRARY")
        .output()
        .expect("the Python interpreter was probed before");
    let stdout = String::from_utf8_lossy(&out.stdout);
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{part}: {}\n{stdout}{stderr}", out.status);
    println!("{}", stdout.trim());
}

#[test]
fn snippets_run() {
    docs("snippets");
}

#[test]
fn what_is_wrong_is_found() {
    docs("selfcheck");
}

#[test]
fn links_lead_somewhere() {
    docs("links");
}

#[test]
fn errors_are_explained() {
    docs("errors");
}
