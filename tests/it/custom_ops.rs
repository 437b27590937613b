//! The operators in stock onnxruntime, driven from Python (`tests/python/`): values against an
//! independent emulation, corrupt and mutated models, threads, lifetimes.

use std::process::Command;

use crate::support;

fn python(script: &str, args: &[&str]) {
    python_with(script, args, &[]);
}

fn python_with(script: &str, args: &[&str], variables: &[(&str, &str)]) {
    let Some((python, library)) = support::python_and_library() else { return };
    let out = Command::new(python)
        .arg(support::root().join("tests/python").join(script))
        .args(args)
        .env("MX_CUSTOM_OPS", library)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .envs(variables.iter().copied())
        .output()
        .expect("the Python interpreter was probed before");
    let stdout = String::from_utf8_lossy(&out.stdout);
    assert!(
        out.status.success(),
        "{script} {args:?}: {}\n{stdout}{}",
        out.status,
        String::from_utf8_lossy(&out.stderr)
    );
    println!("{script} {args:?}: {}", stdout.trim());
}

#[test]
fn values_match_the_emulation() {
    python("test_custom_ops.py", &["values"]);
}

/// The kernels that read the file's layout, which is what weights that are no constants take too.
#[test]
fn values_match_without_repacking() {
    python_with("test_custom_ops.py", &["values", "special"], &[("MX_CPU_REPACK", "0")]);
}

#[test]
fn special_values_and_any_number_of_threads_give_the_same_bits() {
    python("test_custom_ops.py", &["special"]);
}

#[test]
fn weights_may_be_dynamic_and_shapes_unknown() {
    python("test_custom_ops.py", &["inputs"]);
}

#[test]
fn products_of_activations_match_the_emulation() {
    python("test_custom_ops.py", &["act-matmul"]);
}

#[test]
fn token_scores_match_float64() {
    python("test_custom_ops.py", &["scores"]);
}

#[test]
fn corrupt_models_raise_errors_that_name_the_node() {
    python("test_custom_ops.py", &["errors", "compute-errors"]);
}

#[test]
fn threads_share_a_session_and_sessions_come_and_go() {
    python("test_custom_ops.py", &["threads", "lifetime"]);
}

#[test]
fn two_thousand_mutations_crash_nothing() {
    python("fuzz_custom_ops.py", &["--count", "2000"]);
}

/// Who loads the operators into a server must not get the rest of this workspace with them.
#[test]
fn the_library_links_neither_graph_nor_tokenizer_nor_parquet() {
    let out = Command::new(env!("CARGO"))
        .args(["tree", "--offline", "--locked", "-p", "mx-custom-ops", "-e", "normal,build"])
        .args(["--prefix", "none"])
        .current_dir(support::root())
        .output()
        .expect("cargo runs this test");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let tree = String::from_utf8_lossy(&out.stdout);
    assert!(tree.contains("mx-kernels"), "{tree}");
    for unwanted in ["petgraph", "tokenizers", "parquet", "arrow", "prost", "hf-hub", "onig"] {
        let found = tree.lines().find(|line| line.starts_with(unwanted));
        assert_eq!(found, None, "the operator library depends on {unwanted}");
    }
}

/// The bench of the operators holds every contender against the product of its dequantised operands.
#[test]
fn what_is_benched_computes_what_it_should() {
    python("../../scripts/bench_ops.py", &["--check", "--threads", "1"]);
}
