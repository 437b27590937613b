//! Experts chosen at run time: the operator, and what mxrewrite makes of every form, in stock onnxruntime
//! (`tests/python/test_experts.py`).

use std::process::Command;

use crate::support;

fn python(area: &str) {
    let Some((python, library)) = support::python_and_library() else { return };
    let out = Command::new(python)
        .arg(support::root().join("tests/python/test_experts.py"))
        .arg(area)
        .env("MX_REWRITE", support::mxrewrite())
        .env("MX_CUSTOM_OPS", library)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .output()
        .expect("the Python interpreter was probed before");
    let (stdout, stderr) =
        (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success(), "{area}: {}\n{stdout}{stderr}", out.status);
    println!("{area}: {}", stdout.trim());
}

#[test]
fn values_match_the_emulation() {
    python("values");
}

#[test]
fn shapes_are_those_of_matmul() {
    python("shapes");
}

#[test]
fn corrupt_nodes_and_indices_raise_errors_that_name_the_node() {
    python("errors");
}

#[test]
fn every_form_is_replaced_and_matches_the_emulation() {
    python("models");
}
