//! `mxeval --mode`: every mode on tinylm against a computation in NumPy that takes the documents'
//! tokens alone and goes by each mode's definition, token by token.

use super::support::{python, root, skip};
use mxrewrite::eval::corpus;
use mxrewrite::eval::windows::{Bos, Definition, Mode, SEPARATOR, Tokenizer};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const SEQ_LEN: usize = 50;
const DOCUMENTS: usize = 3;

/// For every mode: from where each token is predicted; then the sums over all that are, every context
/// run by itself. Reads a model and the tokens, prints the figures by mode.
const NAIVE: &str = r#"
import json, sys, numpy as np, onnxruntime as ort
session = ort.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
text = json.load(open(sys.argv[2]))
L, S, bos = text["seq_len"], text["stride"], text["bos"]

def rolling(n, t):
    block, last = (t - 1) // L, (n - 2) // L
    return n - 1 - L if block == last and block > 0 else block * L

def stride(n, t):
    return next(k for k in range(0, n, S) if t < k + L)

def half(n, t):
    start = t // L * L
    return start if start + L <= n and t - start > L // 2 else None

def concat(n, t):
    start = t // L * L
    return start if start + L <= n and t > start else None

def figures(runs, context, replace):
    nll = tokens = 0
    for ids in runs:
        groups = {}
        for t in range(1, len(ids)):
            start = context(len(ids), t)
            if start is not None:
                groups.setdefault(start, []).append(t)
        for start, scored in groups.items():
            row = ids[start:max(scored) + 1]
            if replace and start > 0:
                row = [bos] + row[1:]
            row = np.array([row], dtype=np.int64)
            logits = session.run(["logits"], {"input_ids": row, "attention_mask": np.ones_like(row)})
            logits = logits[0][0].astype(np.float64)
            logits -= logits.max(-1, keepdims=True)
            log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            nll -= sum(log_p[t - start - 1, ids[t]] for t in scored)
            tokens += len(scored)
    return {"nll": nll, "tokens": tokens}

with_bos = [[bos] + ids for ids in text["documents"]]
print(json.dumps({
    "rolling": figures(with_bos, rolling, False),
    "stride": figures(text["documents"], stride, False),
    "concat": figures([text["stream"]], concat, False),
    "second-half": figures([[bos] + text["stream"]], half, True),
}))
"#;

/// tinylm's tokenizer in a folder of its own, with a file that names its BOS.
fn tokenizer(folder: &Path) -> PathBuf {
    let path = folder.join("tokenizer.json");
    std::fs::copy(root().join("fixtures/tinylm/tokenizer.json"), &path).unwrap();
    let config = json!({"bos_token": null, "eos_token": "<|endoftext|>"});
    std::fs::write(folder.join("tokenizer_config.json"), config.to_string()).unwrap();
    path
}

fn model() -> PathBuf {
    root().join("fixtures/tinylm/dynamo/model.onnx")
}

fn pile() -> PathBuf {
    root().join("fixtures/mini_pile.parquet")
}

fn mxeval(model: &Path, tokenizer: &Path, out: &Path, more: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mxeval"));
    command.arg(model).arg("--tokenizer").arg(tokenizer).arg("--data").arg(pile());
    command.arg("--out").arg(out).args(["--json", "--device", "cpu", "--max-samples"]);
    command.arg(DOCUMENTS.to_string()).arg("--seq-len").arg(SEQ_LEN.to_string()).args(more);
    command.output().expect("mxeval starts")
}

/// The tokens of a text, without special tokens.
fn ids(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
    let all = Definition::new(Mode::PerDocument, usize::MAX, None, Some(Bos::None)).unwrap();
    let document = corpus::Document { text: text.into(), subset: None };
    let corpus = tokenizer.tokenize(std::iter::once(Ok(document)), &all, 1).unwrap();
    corpus.windows[0].ids.to_vec()
}

#[test]
fn every_mode_agrees_with_its_definition_in_numpy() {
    let Some(python) = python() else {
        return skip("ort", "no Python with numpy, onnx and onnxruntime (set MX_PYTHON)");
    };
    let dir = tempfile::tempdir().unwrap();
    let path = tokenizer(dir.path());
    let tokenizer = Tokenizer::open(&path).unwrap();
    let texts: Vec<String> = corpus::open(&pile())
        .unwrap()
        .take(DOCUMENTS)
        .map(|document| document.unwrap().text)
        .collect();
    let documents: Vec<_> = texts.iter().map(|text| ids(&tokenizer, text)).collect();
    let input = json!({"seq_len": SEQ_LEN, "stride": 15, "bos": 0, "documents": documents,
        "stream": ids(&tokenizer, &texts.join(SEPARATOR))});
    let tokens = dir.path().join("tokens.json");
    std::fs::write(&tokens, input.to_string()).unwrap();
    let naive =
        Command::new(python).args(["-c", NAIVE]).arg(model()).arg(&tokens).output().unwrap();
    assert!(naive.status.success(), "{}", String::from_utf8_lossy(&naive.stderr));
    let naive: Value = serde_json::from_slice(&naive.stdout).unwrap();

    let config = json!({"bos_token": "<|endoftext|>"}).to_string();
    std::fs::write(dir.path().join("tokenizer_config.json"), config).unwrap();
    let modes: [(&str, &[&str]); 4] = [
        ("rolling", &[]),
        ("stride", &["--stride", "15"]),
        ("concat", &[]),
        ("second-half", &["--bos", "each"]),
    ];
    for (mode, more) in modes {
        let out = dir.path().join(mode);
        let output = mxeval(&model(), &path, &out, &[&["--mode", mode][..], more].concat());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let record: Value = serde_json::from_slice(&output.stdout).unwrap();
        let (tokens, nll) = (&naive[mode]["tokens"], naive[mode]["nll"].as_f64().unwrap());
        assert_eq!(&record["tokens"], tokens, "{mode}");
        let sum = record["xent"].as_f64().unwrap() * record["tokens"].as_f64().unwrap();
        assert!((sum - nll).abs() <= 1e-6 * nll, "{mode}: {sum} and {nll}");
        let short = record["definition"].as_str().unwrap();
        assert!(short.starts_with(&format!("{mode}, seq-len {SEQ_LEN}")), "{short}");
        let report = std::fs::read_to_string(out.join("report.md")).unwrap();
        assert!(report.contains(&format!("{mode}: ")) && report.contains("BOS: "), "{report}");
        if mode == "rolling" {
            let bytes: usize = texts.iter().map(String::len).sum();
            assert_eq!(record["bytes"].as_u64(), Some(bytes as u64));
        }
    }
}

#[test]
fn a_definition_is_part_of_what_a_result_is_kept_for() {
    if python().is_none() && std::env::var_os("ORT_DYLIB_PATH").is_none() {
        return skip("ort", "no ORT_DYLIB_PATH and no Python with onnxruntime (set MX_PYTHON)");
    }
    let dir = tempfile::tempdir().unwrap();
    let path = tokenizer(dir.path());
    let out = dir.path().join("out");
    let kept = |more: &[&str]| {
        let output = mxeval(&model(), &path, &out, &[&["--resume"][..], more].concat());
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{stderr}");
        stderr.contains("kept from an earlier run")
    };
    let rolling = ["--mode", "rolling"];
    assert!(!kept(&rolling));
    assert!(kept(&rolling));
    // Another BOS is another result, though no option has changed.
    let config = json!({"bos_token": "the", "eos_token": "<|endoftext|>"}).to_string();
    std::fs::write(dir.path().join("tokenizer_config.json"), config).unwrap();
    assert!(!kept(&rolling));
    assert!(!kept(&["--mode", "rolling", "--bos", "each"]));
    assert!(!kept(&[]));

    // Nothing to begin a text with is an error.
    std::fs::remove_file(dir.path().join("tokenizer_config.json")).unwrap();
    let output = mxeval(&model(), &path, &out, &rolling);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("tokenizer_config.json is missing"), "{stderr}");
    let output = mxeval(&model(), &path, &out, &["--mode", "concat", "--stride", "4"]);
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn windows_beyond_the_context_are_warned_of() {
    if python().is_none() && std::env::var_os("ORT_DYLIB_PATH").is_none() {
        return skip("ort", "no ORT_DYLIB_PATH and no Python with onnxruntime (set MX_PYTHON)");
    }
    let dir = tempfile::tempdir().unwrap();
    let path = tokenizer(dir.path());
    let folder = dir.path().join("model");
    std::fs::create_dir(&folder).unwrap();
    let model = folder.join("model.onnx");
    std::fs::copy(root().join("fixtures/tinylm/torchscript/model.onnx"), &model).unwrap();
    for (context, warned) in [(SEQ_LEN, false), (SEQ_LEN - 1, true)] {
        let config = json!({"max_position_embeddings": context}).to_string();
        std::fs::write(folder.join("config.json"), config).unwrap();
        let output = mxeval(&model, &path, &dir.path().join("out"), &[]);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{stderr}");
        assert_eq!(stderr.contains("windows of 50 tokens"), warned, "{stderr}");
        assert_eq!(stderr.contains("state a context of 49"), warned, "{stderr}");
    }
}
