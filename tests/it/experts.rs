//! Experts chosen at run time: the operator, and what mxrewrite makes of every form, in stock onnxruntime
//! (`tests/python/test_experts.py`).

use crate::support;

fn python(area: &str) {
    support::script("test_experts.py", |command| {
        command.arg(area);
    });
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
