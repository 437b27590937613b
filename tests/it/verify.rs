//! `mxrewrite verify` and `--check`: figures against NumPy, tampered models, branches, errors.

use std::path::Path;
use std::process::{Command, Output};

use crate::{models, support};

const MODELS: [&str; 2] =
    ["fixtures/tinylm/dynamo/model.onnx", "fixtures/tinylm/torchscript/model.onnx"];

/// Runs an area of the Python script; a line is due for each model, or one without.
fn python(area: &str, models: &[&str]) {
    let stdout = support::script("test_verify.py", |command| {
        command.arg(area).args(models);
    });
    let lines = stdout.map_or(models.len().max(1), |text| text.lines().count());
    assert_eq!(lines, models.len().max(1), "{area}");
}

#[test]
fn outputs_and_layers_are_numpys() {
    python("layers", &MODELS);
}

#[test]
fn a_tampered_weight_shows_in_its_layer() {
    python("tampered", &MODELS);
}

#[test]
fn a_layer_that_is_not_mx_any_more_is_named() {
    python("missing", &MODELS);
}

#[test]
fn outputs_that_differ_are_named() {
    python("outputs", &MODELS);
}

#[test]
fn both_branches_of_a_merged_decoder_run() {
    python("merged", &[]);
}

#[test]
fn graphs_of_any_kind_are_checked_after_a_rewrite() {
    python("plain", &[]);
}

#[test]
fn layers_that_a_checkpoint_named_are_compared_without_it() {
    python("checkpoint", &[]);
}

#[test]
fn outputs_and_inputs_of_every_kind_are_what_they_are() {
    python("kinds", &[]);
}

#[test]
fn samples_that_are_refused_halfway_are_not_counted() {
    python("halfway", &[]);
}

fn verify<S: AsRef<std::ffi::OsStr>>(args: impl IntoIterator<Item = S>) -> Output {
    let mut command = Command::new(support::mxrewrite());
    command.current_dir(support::root()).arg("verify").args(args).output().expect("it starts")
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn files_that_are_no_models_and_options_that_do_not_go_together_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let text = dir.path().join("text.onnx");
    std::fs::write(&text, "no model\n").unwrap();
    let (model, text) = (MODELS[0], text.to_str().unwrap());
    for (args, code, says) in [
        (vec![model, text], 1, text),
        (vec![text, model], 1, text),
        (vec![model, "none.onnx"], 1, "none.onnx"),
        (vec![model], 2, "B.onnx"),
        (vec![model, model, "--data", "a.txt"], 2, "--tokenizer"),
        (vec![model, model, "--data", "a.safetensors", "--tokenizer", "t.json"], 2, "no use"),
        (vec![model, model, "--data", "a.safetensors", "--samples", "2"], 2, "one run"),
        (vec![model, model, "--data", "a.safetensors", "--seq-len", "8"], 2, "one run"),
        (vec![model, model, "--data", "a.txt"], 2, "Usage: mxrewrite verify"),
        (vec![model, model, "--tokenizer", "t.json"], 2, "--data"),
        (vec![model, model, "--device", "cuda:0,1"], 2, "one device"),
        (vec![model, model, "--device", "auto"], 2, "cuda:N"),
        (vec![model, model, "--max-error", "-1"], 2, "from 0 on"),
        (vec![model, model, "--max-error", "nan"], 2, "from 0 on"),
        (vec![model, model, "--max-error", "inf"], 2, "from 0 on"),
        (vec![model, model, "--min-sqnr", "nan"], 2, "decibels"),
        (vec![model, model, "--min-sqnr=-inf"], 2, "decibels"),
        (vec![model, model, "--samples", "0"], 2, "samples"),
        (vec![model, model, "--data", text, "--tokenizer", "none.json"], 1, "none.json"),
        (vec![model, model, "--ort-lib", "none.so"], 1, "--ort-lib none.so"),
    ] {
        let out = verify(&args);
        assert_eq!(out.status.code(), Some(code), "{args:?}: {}", stderr(&out));
        assert!(stderr(&out).contains(says) && out.stdout.is_empty(), "{args:?}: {}", stderr(&out));
    }
}

/// A model may be called like the subcommand, and the rewrite's own errors stay what they were.
#[test]
fn a_model_called_verify_is_rewritten_by_its_path() {
    let dir = tempfile::tempdir().unwrap();
    let graph = models::GraphProto {
        node: vec![models::node("MatMul", "/mlp/fc1/MatMul", &["x", "w"], &["y"])],
        input: vec![models::value("x", 2)],
        output: vec![models::value("y", 2)],
        initializer: vec![models::weight("w", &[64, 32])],
        ..models::GraphProto::default()
    };
    models::write(dir.path(), "verify", &models::model(graph));
    let run = |args: &[&str]| {
        Command::new(support::mxrewrite()).current_dir(dir.path()).args(args).output().unwrap()
    };
    let out = run(&["./verify", "-o", "out.onnx"]);
    assert!(out.status.success() && dir.path().join("out.onnx").is_file(), "{}", stderr(&out));
    assert_eq!(run(&["verify"]).status.code(), Some(2));
    let none = run(&[]);
    assert!(
        none.status.code() == Some(2) && stderr(&none).contains("<MODEL>"),
        "{}",
        stderr(&none)
    );
    for args in [&["./verify", "--plan", "--check"][..], &["--print-recipe", "full", "--check"]] {
        let both = run(args);
        assert!(
            both.status.code() == Some(2) && stderr(&both).contains("--check"),
            "{}",
            stderr(&both)
        );
    }
}

/// What of the workplace's exports has a cache, a merged decoder, fp16 weights or experts.
#[test]
fn exports_of_every_kind_pass() {
    if support::python_and_library().is_none() {
        return;
    }
    let Some(zoo) = support::shared().map(|shared| shared.join("zoo")).filter(|z| z.is_dir())
    else {
        return support::skip("zoo", "no ../shared/zoo beside the checkout (MX_SHARED)");
    };
    let dir = tempfile::tempdir().unwrap();
    for (name, runs, layers) in [
        ("gpt2-dynamo-fp16", 2, 8),
        ("llama31-dynamo-kv", 4, 14),
        ("llama31-genai", 4, 10),
        ("llama31-optimum-merged", 4, 28),
        ("mixtral-hfexp", 2, 24),
        ("mixtral-ts28", 2, 32),
    ] {
        passes(&zoo.join(name).join("model.onnx"), &dir.path().join(name), runs, layers);
    }
}

fn passes(model: &Path, output: &Path, runs: u64, layers: usize) {
    let out = output.with_extension("onnx");
    let made = Command::new(support::mxrewrite()).arg(model).arg("-o").arg(&out).output().unwrap();
    assert!(made.status.success(), "{}", stderr(&made));
    let args = [model.as_os_str(), out.as_os_str(), "--layers".as_ref(), "--json".as_ref()];
    let compared = verify(args);
    assert!(compared.status.success(), "{}: {}", model.display(), stderr(&compared));
    let report: serde_json::Value = serde_json::from_slice(&compared.stdout).unwrap();
    assert!(report["runs"].as_u64() >= Some(runs), "{}: {}", model.display(), report["runs"]);
    let found = report["layers"].as_array().unwrap();
    assert_eq!(found.len(), layers, "{}", model.display());
    for layer in found {
        let alone = layer["local"]["sqnr_db"].as_f64();
        assert!(alone.is_some_and(|db| (20.0..35.0).contains(&db)), "{}: {layer}", model.display());
    }
}
