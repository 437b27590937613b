//! What mxrewrite's targets compute in stock onnxruntime, and outputs of runs that are cut short.

use std::process::{Command, Stdio};
use std::time::Duration;

use mxrewrite::onnx::Model;

use crate::support;

const MODELS: [&str; 2] =
    ["fixtures/tinylm/dynamo/model.onnx", "fixtures/tinylm/torchscript/model.onnx"];

fn python(area: &str, models: &[&str]) {
    script("test_lowerings.py", area, models);
}

/// Runs a script with an argument of its own (unless that is empty) and models; a line is due for each.
fn script(name: &str, area: &str, models: &[&str]) {
    let stdout = support::script(name, |command| {
        command.args(Some(area).filter(|area| !area.is_empty())).args(models);
    });
    let lines = stdout.map_or(models.len(), |text| text.lines().count());
    assert_eq!(lines, models.len(), "{name} {area}");
}

#[test]
fn int8_is_the_dequantised_product() {
    python("int8", &MODELS);
}

/// Every format that standard operators know, by onnx's reference evaluator.
#[test]
fn qdq_computes_what_mx_does() {
    script("test_qdq.py", "", &["fp8_e4m3", "fp8_e5m2", "fp6_e3m2", "fp6_e2m3", "fp4_e2m1"]);
}

#[test]
fn fp16_converts_the_whole_graph() {
    python("fp16", &MODELS);
}

#[test]
fn bf16_rounds_weights_and_results() {
    python("bf16", &MODELS);
}

#[test]
fn unscaled_targets_round_both_operands() {
    python("unscaled", &["layer"]);
}

#[test]
fn attention_quantises_both_operands_of_its_products() {
    script("test_attention.py", "", &MODELS);
}

#[test]
fn nvfp8_scales_both_tensors() {
    python("nvfp8", &MODELS);
}

/// Every kind of export that differs for a conversion: fp16 and bf16 weights, operators of
/// com.microsoft, sub-graphs, a cache, experts.
#[test]
fn base_types_compute_what_the_original_computes() {
    script("test_base_dtype.py", "", &MODELS);
    let Some(shared) = support::shared() else {
        return support::skip("shared", "no ../shared with the zoo");
    };
    let names = [
        "gpt2-dynamo-fp16",
        "qwen2-ts-bf16",
        "llama31-genai",
        "llama31-optimum-merged",
        "llama31-dynamo-kv",
        "mixtral-ts28",
        "phi-hfexp-ort",
    ];
    let paths: Vec<String> = names
        .iter()
        .map(|name| shared.join("zoo").join(name).join("model.onnx").display().to_string())
        .collect();
    script("test_base_dtype.py", "", &paths.iter().map(String::as_str).collect::<Vec<_>>());
}

/// The generated model of the measurements is a Llama, and its layers are found.
#[test]
fn make_llama_writes_a_llama() {
    let stdout = support::script("test_make_llama.py", |_| ());
    assert_eq!(stdout.map_or(3, |text| text.lines().count()), 3);
}

/// A killed run leaves no model that is not whole, and no file but those that `--resume` takes up,
/// which the next run to the same place removes.
#[test]
fn a_killed_run_leaves_no_more_than_resume_needs() {
    let dir = tempfile::tempdir().unwrap();
    let input = support::root().join(MODELS[0]);
    for delay in 0..40 {
        let output = dir.path().join(format!("{delay}.onnx"));
        let mut child = Command::new(support::mxrewrite())
            .arg(&input)
            .arg("-o")
            .arg(&output)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(delay * 2));
        let _ = child.kill();
        child.wait().unwrap();
        if output.exists() {
            Model::open(&output).unwrap_or_else(|error| panic!("{error}"));
        }
    }
    let names = || {
        let entries = std::fs::read_dir(dir.path()).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap())
    };
    let whole = |name: &str| name.ends_with(".onnx") || name.ends_with(".onnx.data");
    for name in names().filter(|name| !whole(name)) {
        let output = name.strip_suffix(".data.partial").or(name.strip_suffix(".data.journal"));
        let output = output.unwrap_or_else(|| panic!("{name} is left"));
        let again = Command::new(support::mxrewrite())
            .arg(&input)
            .arg("-o")
            .arg(dir.path().join(output))
            .arg("--force")
            .output()
            .unwrap();
        assert!(again.status.success(), "{}", String::from_utf8_lossy(&again.stderr));
    }
    assert_eq!(names().find(|name| !whole(name)), None, "is left after another run");
}
