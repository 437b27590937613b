//! The documentation: its snippets run, its links lead somewhere, and every error is explained.

use crate::package;

fn docs(part: &str) {
    package::run("test_docs.py", &[part]);
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
