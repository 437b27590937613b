//! The operators in stock onnxruntime, driven from Python (`tests/python/`): values against an
//! independent emulation, corrupt and mutated models, threads, lifetimes.

use std::{path::Path, process::Command};

use crate::support;

fn python(script: &str, args: &[&str]) {
    python_with(script, args, &[]);
}

fn python_with(script: &str, args: &[&str], variables: &[(&str, &str)]) {
    support::script(script, |command| {
        command.args(args).envs(variables.iter().copied());
    });
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

/// Three seconds of threads; MX_SOAK=60 for the whole minute.
#[test]
fn thirty_two_threads_and_fifty_sessions_keep_bits_and_memory() {
    python("test_sessions.py", &[]);
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

/// The header is C11 and C++17 and declares exactly what the library exports.
#[test]
fn the_header_compiles_and_declares_what_is_exported() {
    let include = support::root().join("custom_ops/include");
    let header = include.join("mx_custom_ops.h");
    for (compiler, language, standard) in [("cc", "c", "-std=c11"), ("c++", "c++", "-std=c++17")] {
        let out = Command::new(compiler)
            .args(["-x", language, standard, "-Wall", "-Wextra", "-Werror", "-pedantic"])
            .args(["-fsyntax-only", "-include"])
            .args([&header, Path::new("/dev/null")])
            .output()
            .expect("building this workspace needs a C and a C++ compiler");
        assert!(out.status.success(), "{compiler}: {}", String::from_utf8_lossy(&out.stderr));
    }
    let text = std::fs::read_to_string(&header).expect("the header was just compiled");
    // Declarations end with ");" and stand outside comments, whose lines begin with "/*" or " *".
    let code = text.lines().filter(|line| !line.starts_with("/*") && !line.starts_with(" *"));
    let mut declared: Vec<&str> = code
        .filter(|line| line.ends_with(");"))
        .filter_map(|line| line.split('(').next()?.rsplit([' ', '*']).next())
        .collect();
    declared.sort_unstable();
    assert_eq!(declared, ["MxKernels", "MxVersion", "RegisterCustomOps"]);
    let Some(library) = support::library() else {
        return support::skip("ort", "no libmx_custom_ops.so beside the binaries");
    };
    let out = Command::new("nm").args(["-D", "--defined-only"]).arg(&library).output();
    let Ok(out) = out else { return support::skip("nm", "no nm (binutils) to list symbols with") };
    let symbols = String::from_utf8_lossy(&out.stdout);
    let mut exported: Vec<&str> = symbols
        .lines()
        .filter_map(|line| line.split_once(" T ")?.1.split('@').next())
        .filter(|name| !name.starts_with('_'))
        .collect();
    exported.sort_unstable();
    assert_eq!(exported, declared, "what {} exports is not what the header has", library.display());
}
