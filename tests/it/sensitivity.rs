//! `mxeval sensitivity` and `mxeval search`: short passes against full ones and against NumPy, what they
//! cost, resumption, and recipes that do what was chosen.

use super::support::{mxrewrite, python, python_and_library, root, skip};
use serde_json::{Value, json};
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn ready() -> bool {
    let named = std::env::var_os("ORT_DYLIB_PATH").is_some_and(|path| !path.is_empty());
    if !named && python().is_none() {
        skip("ort", "no ORT_DYLIB_PATH and no Python with onnxruntime (set MX_PYTHON)");
        return false;
    }
    true
}

fn model(exporter: &str) -> PathBuf {
    root().join("fixtures/tinylm").join(exporter).join("model.onnx")
}

fn pile() -> PathBuf {
    root().join("fixtures/mini_pile.parquet")
}

fn mxeval(command: &str, exporter: &str, out: &Path, more: &[&str]) -> Output {
    let mut run = Command::new(env!("CARGO_BIN_EXE_mxeval"));
    run.current_dir(root()).arg(command).arg(model(exporter));
    run.arg("--tokenizer").arg(root().join("fixtures/tinylm/tokenizer.json"));
    run.arg("--data").arg(pile()).arg("--out").arg(out).args(["--device", "cpu", "--json"]);
    run.args(more).output().expect("mxeval starts")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn result(command: &str, exporter: &str, out: &Path, more: &[&str]) -> Value {
    let output = mxeval(command, exporter, out, more);
    assert!(output.status.success(), "{}", text(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

fn number(value: &Value, field: &str) -> f64 {
    value[field].as_f64().unwrap_or_else(|| panic!("{field} of {value}"))
}

fn list<'a>(value: &'a Value, field: &str) -> &'a Vec<Value> {
    value[field].as_array().unwrap_or_else(|| panic!("{field} of {value}"))
}

/// KL and delta of every layer and format, by node and format.
fn figures(result: &Value) -> Vec<(String, f64, f64)> {
    let of = |site: &Value| -> Vec<(String, f64, f64)> {
        let format = |(format, one): (&String, &Value)| {
            (format!("{} {format}", site["node"]), number(one, "kl"), number(one, "delta_xent"))
        };
        site["formats"].as_object().expect("formats").iter().map(format).collect()
    };
    list(result, "sites").iter().flat_map(of).collect()
}

const SMALL: [&str; 8] =
    ["--samples", "3", "--seq-len", "48", "--batch-size", "2", "--threads", "1"];

#[test]
fn short_passes_give_the_figures_of_full_ones() {
    if !ready() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for exporter in ["dynamo", "torchscript"] {
        let two = ["--mx-format", "fp4_e2m1,fp8_e4m3"];
        let more = [&SMALL[..], &two].concat();
        let short = result("sensitivity", exporter, &dir.path().join(exporter), &more);
        let more = [&more[..], &["--full-passes"]].concat();
        let out = dir.path().join(format!("{exporter}-full"));
        let full = result("sensitivity", exporter, &out, &more);
        let (short, full) = (figures(&short), figures(&full));
        assert_eq!((short.len(), full.len()), (70, 70));
        for ((name, kl, delta), (other, full_kl, full_delta)) in short.iter().zip(&full) {
            assert_eq!(name, other);
            assert!(*full_kl > 0.0, "{name}: {full_kl}");
            // Sums run in another order in either graph, and an activation on the border of two codes may
            // fall on either side.
            let near = (kl - full_kl).abs() <= 2e-3 * full_kl + 1e-7;
            assert!(near, "{exporter} {name}: KL {kl}, full {full_kl}");
            let near = (delta - full_delta).abs() <= 2e-2 * full_kl.sqrt();
            assert!(near, "{exporter} {name}: delta {delta}, full {full_delta}");
        }
    }
}

#[test]
fn passes_cost_what_the_bar_allows() {
    if !ready() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let result = result("sensitivity", "dynamo", dir.path(), &SMALL);
    let cost = &result["cost"];
    assert_eq!((cost["choices"].as_u64(), list(&result, "sites").len()), (Some(105), 35));
    // Two batches: the baseline and every layer in every format, each once.
    assert_eq!(cost["runs"].as_u64(), Some(2 * (1 + 105)));
    let share = number(cost, "evaluations_per_choice");
    assert!(share <= 0.6, "{share}");
    assert!((number(cost, "evaluations") / 105.0 - share).abs() < 1e-12);
    let of_200 = number(cost, "evaluations") * 3.0 / 200.0;
    assert!((number(cost, "evaluations_of_200_documents") - of_200).abs() < 1e-9);
    // Begun at the start, with every position scored, a pass is an evaluation.
    assert_eq!((result["every"].as_u64(), list(&result, "notes").len()), (Some(2), 0));
}

/// KL and difference of loss at every second position from logits, in float64.
const NUMPY: &str = r#"
import json, sys, numpy as np, onnxruntime as ort
library, windows = sys.argv[1], json.load(open(sys.argv[2]))
def log_p(path, ids):
    options = ort.SessionOptions()
    options.register_custom_ops_library(library)
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    row = np.array([ids], dtype=np.int64)
    x = session.run(["logits"], {"input_ids": row, "attention_mask": np.ones_like(row)})[0][0]
    x = x.astype(np.float64) - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))
kl = delta = tokens = 0
for ids in windows:
    base, other = log_p(sys.argv[3], ids), log_p(sys.argv[4], ids)
    at = np.arange(1, len(ids) - 1, 2)
    kl += (np.exp(base) * (base - other)).sum(-1)[at].sum()
    target = np.array(ids)[at + 1]
    delta += (base[at, target] - other[at, target]).sum()
    tokens += len(at)
print(json.dumps({"kl": kl / tokens, "delta_xent": delta / tokens, "tokens": tokens}))
"#;

#[test]
fn figures_agree_with_numpy() {
    let Some((python, library)) = python_and_library() else { return };
    let dir = tempfile::tempdir().unwrap();
    let more = [&SMALL[..], &["--mx-format", "fp4_e2m1"]].concat();
    let result = result("sensitivity", "dynamo", dir.path(), &more);
    let tokenizer = root().join("fixtures/tinylm/tokenizer.json");
    let definition = mxrewrite::eval::windows::Definition::per_document(48);
    let corpus = mxrewrite::eval::windows::Tokenizer::open(&tokenizer)
        .and_then(|t| t.tokenize(mxrewrite::eval::corpus::open(&pile())?, &definition, 1000))
        .unwrap();
    let windows: Vec<_> = list(&result, "documents")
        .iter()
        .map(|document| corpus.windows[document.as_u64().unwrap() as usize].ids.to_vec())
        .collect();
    let json = dir.path().join("windows.json");
    std::fs::write(&json, serde_json::to_string(&windows).unwrap()).unwrap();
    for path in ["model.layers.0.mlp.down_proj", "model.layers.3.self_attn.v_proj"] {
        let one = dir.path().join("one.onnx");
        let only = format!("^{}$", path.replace('.', "\\."));
        let recipe = dir.path().join("one.toml");
        let rule = format!("[[rules]]\ninclude = ['{only}']\nweight_format = \"fp4_e2m1\"\n");
        std::fs::write(&recipe, rule).unwrap();
        let mut rewrite = Command::new(mxrewrite());
        rewrite
            .arg(model("dynamo"))
            .arg("--recipe")
            .arg(&recipe)
            .arg("-o")
            .arg(&one)
            .arg("--force");
        let rewritten = rewrite.output().unwrap();
        assert!(rewritten.status.success(), "{}", text(&rewritten.stderr));
        let mut naive = Command::new(&python);
        naive.args(["-c", NUMPY]).arg(&library).arg(&json).arg(model("dynamo")).arg(&one);
        let naive = naive.output().unwrap();
        assert!(naive.status.success(), "{}", text(&naive.stderr));
        let naive: Value = serde_json::from_slice(&naive.stdout).unwrap();
        let sites = list(&result, "sites");
        let site = sites.iter().find(|site| site["module_path"] == *path).expect("the layer");
        let own = &site["formats"]["fp4_e2m1"];
        assert_eq!(result["tokens"].as_f64(), naive["tokens"].as_f64());
        let (kl, expected) = (number(own, "kl"), number(&naive, "kl"));
        assert!((kl - expected).abs() <= 1e-3 * expected, "{path}: KL {kl}, NumPy {expected}");
        let (delta, expected) = (number(own, "delta_xent"), number(&naive, "delta_xent"));
        assert!((delta - expected).abs() <= 1e-4, "{path}: delta {delta}, NumPy {expected}");
    }
}

#[test]
fn a_measurement_that_was_cut_off_goes_on_to_the_same_figures() {
    if !ready() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let more = [&SMALL[..], &["--mx-format", "fp4_e2m1"]].concat();
    let whole = result("sensitivity", "dynamo", dir.path(), &more);
    let journal = dir.path().join("sensitivity.journal.jsonl");
    let lines = std::fs::read_to_string(&journal).unwrap();
    // Half of it, and half a line.
    std::fs::write(&journal, &lines[..lines.len() / 2]).unwrap();
    let more = [&more[..], &["--resume"]].concat();
    let output = mxeval("sensitivity", "dynamo", dir.path(), &more);
    let stderr = text(&output.stderr);
    assert!(output.status.success() && stderr.contains("kept from an earlier run"), "{stderr}");
    let resumed: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&resumed["sites"], &resumed["tokens"]), (&whole["sites"], &whole["tokens"]));
    assert_eq!(resumed["cost"]["runs"], whole["cost"]["runs"]);
    // Of other options nothing is kept.
    let more = [&more[..], &["--positions", "3"]].concat();
    let output = mxeval("sensitivity", "dynamo", dir.path(), &more);
    assert!(!text(&output.stderr).contains("kept from"), "{}", text(&output.stderr));
}

/// What `mxrewrite --plan` says a recipe does: format by module path.
fn planned(recipe: &Path) -> Vec<(Value, Value)> {
    let mut plan = Command::new(mxrewrite());
    plan.arg(model("dynamo")).args(["--plan", "--no-sqnr", "--json", "--recipe"]).arg(recipe);
    let plan: Value = serde_json::from_slice(&plan.output().unwrap().stdout).unwrap();
    let of = |site: &Value| (site["module_path"].clone(), site["weight_format"].clone());
    list(&plan, "sites").iter().map(of).collect()
}

#[test]
fn a_recipe_does_what_was_chosen_and_is_measured_on_other_documents() {
    if !ready() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let formats = ["--mx-format", "fp4_e2m1,fp6_e2m3"];
    let measured = [&SMALL[..], &formats].concat();
    let layers = result("sensitivity", "dynamo", &out, &measured);
    let file = out.join("sensitivity.json");
    let common = ["--sensitivity", file.to_str().unwrap(), "--seq-len", "48"];
    let more =
        ["--budget-bits", "5.5", "--heldout-samples", "9", "--formats", "fp4_e2m1,fp6_e2m3,none"];
    let found = result("search", "dynamo", &out, &[&common[..], &more].concat());
    assert!(number(&found["found"], "bits_per_weight") <= 5.5, "{}", found["found"]);
    assert!(number(&found["bound"], "gap_percent") < 25.0, "{}", found["bound"]);
    let chosen: Vec<(Value, Value)> = list(&found, "assignment")
        .iter()
        .map(|pair| (pair[0].clone(), pair[1].clone()))
        .filter(|(_, format)| *format != "none")
        .collect();
    assert_eq!(planned(&out.join("recipe.toml")), chosen);
    let seen: HashSet<&Value> = list(&layers, "documents").iter().collect();
    let heldout = list(&found, "heldout_documents");
    assert!(heldout.len() == 9 && heldout.iter().all(|document| !seen.contains(document)));
    let front: Value =
        serde_json::from_slice(&std::fs::read(out.join("front.json")).unwrap()).unwrap();
    let front = front.as_array().unwrap();
    let losses: Vec<f64> = front.iter().map(|point| number(point, "predicted_kl")).collect();
    assert!(losses.is_sorted_by(|a, b| a >= b), "{losses:?}");
    assert_eq!(front.iter().filter(|point| point["chosen"] == true).count(), 1);
    same_as_mxeval(dir.path(), &out, &found);

    // By perplexity: the finest point keeps to it, the one found too, on documents of its own.
    let more = ["--max-delta-ppl", "30%", "--heldout-samples", "6", "--validation-samples", "8"];
    let by_ppl = result("search", "dynamo", &out, &[&common[..], &more].concat());
    let tried = list(&by_ppl, "tried");
    let bits = number(&by_ppl["found"], "bits_per_weight");
    let accepted = tried.iter().find(|one| number(one, "bits_per_weight") == bits).unwrap();
    assert!(tried.len() > 2 && number(accepted, "delta_ppl_percent") <= 30.0, "{accepted}");
    let validation = list(&by_ppl, "validation_documents");
    let heldout = list(&by_ppl, "heldout_documents");
    assert!(validation.len() == 8 && heldout.iter().all(|one| !validation.contains(one)));
}

/// The recipe's loss on the held-out documents is what mxeval says of the rewritten model on them.
fn same_as_mxeval(dir: &Path, out: &Path, found: &Value) {
    let texts: Vec<String> = mxrewrite::eval::corpus::open(&pile())
        .unwrap()
        .map(|document| document.unwrap().text)
        .collect();
    let lines: Vec<String> = list(found, "heldout_documents")
        .iter()
        .map(|one| json!({"text": texts[one.as_u64().unwrap() as usize]}).to_string())
        .collect();
    let data = dir.join("heldout.jsonl");
    std::fs::write(&data, lines.join("\n")).unwrap();
    let graph = dir.join("found.onnx");
    let mut rewrite = Command::new(mxrewrite());
    rewrite.arg(model("dynamo")).arg("--recipe").arg(out.join("recipe.toml")).arg("-o").arg(&graph);
    assert!(rewrite.output().unwrap().status.success());
    let mut run = Command::new(env!("CARGO_BIN_EXE_mxeval"));
    run.arg(&graph).arg("--tokenizer").arg(root().join("fixtures/tinylm/tokenizer.json"));
    run.arg("--data").arg(&data).args(["--seq-len", "48", "--device", "cpu", "--json", "--out"]);
    let output = run.arg(dir.join("check")).output().unwrap();
    let record: Value = serde_json::from_slice(&output.stdout).unwrap();
    let (own, expected) = (number(&found["measured"][0], "xent"), number(&record, "xent"));
    assert!((own - expected).abs() <= 1e-6 * expected, "{own}, mxeval {expected}");
}

#[test]
fn what_does_not_belong_together_is_said() {
    if !ready() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let more = [&SMALL[..], &["--mx-format", "fp4_e2m1", "--include", "lm_head"]].concat();
    result("sensitivity", "dynamo", dir.path(), &more);
    let file = dir.path().join("sensitivity.json");
    let common = ["--sensitivity", file.to_str().unwrap(), "--seq-len", "48"];
    let refused = |exporter: &str, more: &[&str], says: &str| {
        let output = mxeval("search", exporter, dir.path(), &[&common[..], more].concat());
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{stderr}");
        assert!(stderr.contains(says), "{stderr}");
    };
    refused("torchscript", &["--budget-bits", "5"], "is not the model that was measured");
    refused("dynamo", &["--budget-bits", "4"], "the cheapest of these formats takes");
    refused("dynamo", &["--budget-bits", "5", "--formats", "fp6_e2m3"], "not measured");
    refused("dynamo", &[], "--budget-bits");
    let output = mxeval("sensitivity", "dynamo", dir.path(), &["--positions", "0"]);
    assert_eq!(output.status.code(), Some(2), "{}", text(&output.stderr));
}
