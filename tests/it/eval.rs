//! `mxeval`: figures against a naive evaluation in Python, independence of batches and order, every
//! stage, resumption, and errors that say what to do.

use super::support::{python, root, shared, skip};
use mxrewrite::eval::windows::{Definition, Tokenizer};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// ONNX Runtime's library, or a skip with the reason. Python's is found as mxeval finds it.
fn ready() -> bool {
    let named = std::env::var_os("ORT_DYLIB_PATH").is_some_and(|path| !path.is_empty());
    if !named && python().is_none() {
        skip("ort", "no ORT_DYLIB_PATH and no Python with onnxruntime (set MX_PYTHON)");
        return false;
    }
    true
}

fn model() -> PathBuf {
    root().join("fixtures/tinylm/dynamo/model.onnx")
}

fn tokenizer() -> PathBuf {
    root().join("fixtures/tinylm/tokenizer.json")
}

fn pile() -> PathBuf {
    root().join("fixtures/mini_pile.parquet")
}

/// mxeval with the fixture's tokenizer unless the arguments name another.
fn mxeval<S: AsRef<std::ffi::OsStr>>(args: impl IntoIterator<Item = S>) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mxeval"));
    command.current_dir(root()).args(args).output().expect("mxeval starts")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Runs mxeval on `what` and returns exit code, records and stderr.
fn records(what: &[&Path], data: &Path, out: &Path, more: &[&str]) -> (i32, Vec<Value>, String) {
    let mut args: Vec<PathBuf> = what.iter().map(PathBuf::from).collect();
    args.extend(["--tokenizer".into(), tokenizer(), "--data".into(), data.into()]);
    args.extend(["--out".into(), out.into(), "--json".into()]);
    args.extend(more.iter().map(PathBuf::from));
    let output = mxeval(args);
    let lines = text(&output.stdout);
    let records = lines.lines().map(|line| serde_json::from_str(line).expect("a record")).collect();
    (output.status.code().unwrap_or(-1), records, text(&output.stderr))
}

fn number(record: &Value, field: &str) -> f64 {
    record[field].as_f64().unwrap_or_else(|| panic!("{field} of {record}"))
}

fn close(a: f64, b: f64, bound: f64) {
    assert!((a - b).abs() <= bound * b.abs(), "{a} and {b} differ by more than {bound}");
}

/// The documents of mini_pile as JSON Lines.
fn documents(count: usize) -> Vec<String> {
    mxrewrite::eval::corpus::open(&pile())
        .expect("mini_pile")
        .take(count)
        .map(|document| json!({"text": document.expect("a document").text}).to_string())
        .collect()
}

fn jsonl(folder: &Path, lines: &[String]) -> PathBuf {
    let path = folder.join("data.jsonl");
    std::fs::write(&path, lines.join("\n")).expect("data.jsonl");
    path
}

/// Scores every window by itself, unpadded, in float64: reads a model and JSON windows, prints sums.
const NAIVE: &str = r#"
import json, sys, numpy as np, onnxruntime as ort
session = ort.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
nll = entropy = tokens = 0.0
for ids in json.load(open(sys.argv[2])):
    row = np.array([ids], dtype=np.int64)
    feeds = {"input_ids": row, "attention_mask": np.ones_like(row)}
    logits = session.run(["logits"], feeds)[0][0, :-1].astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nll -= log_p[np.arange(len(ids) - 1), ids[1:]].sum()
    entropy -= (np.exp(log_p) * log_p).sum()
    tokens += len(ids) - 1
print(json.dumps({"xent": nll / tokens, "entropy": entropy / tokens, "tokens": tokens}))
"#;

#[test]
fn figures_agree_with_a_naive_evaluation_in_python() {
    let Some(python) = python().filter(|_| ready()) else { return };
    let dir = tempfile::tempdir().unwrap();
    let corpus = Tokenizer::open(&tokenizer())
        .and_then(|t| {
            t.tokenize(mxrewrite::eval::corpus::open(&pile())?, &Definition::per_document(128), 10)
        })
        .unwrap();
    let windows: Vec<_> = corpus.windows.iter().map(|window| &window.ids[..]).collect();
    let path = dir.path().join("windows.json");
    std::fs::write(&path, serde_json::to_string(&windows).unwrap()).unwrap();
    let naive = Command::new(python).args(["-c", NAIVE]).arg(model()).arg(&path).output().unwrap();
    assert!(naive.status.success(), "{}", text(&naive.stderr));
    let naive: Value = serde_json::from_slice(&naive.stdout).unwrap();

    let more = ["--max-samples", "10", "--seq-len", "128", "--batch-size", "4"];
    let (code, records, stderr) = records(&[&model()], &pile(), &dir.path().join("out"), &more);
    assert_eq!(code, 0, "{stderr}");
    let record = &records[0];
    assert_eq!((record["docs"].as_u64(), &record["stage"]), (Some(10), &json!("model")));
    assert_eq!(number(record, "tokens"), number(&naive, "tokens"));
    close(number(record, "xent"), number(&naive, "xent"), 1e-6);
    close(number(record, "entropy"), number(&naive, "entropy"), 1e-6);
    close(number(record, "ppl"), number(&naive, "xent").exp(), 1e-5);
    let bits = number(&naive, "xent") * number(&naive, "tokens") / std::f64::consts::LN_2;
    close(number(record, "bits_per_byte") * number(record, "bytes"), bits, 1e-6);
}

#[test]
fn batches_and_the_order_of_documents_do_not_matter() {
    if !ready() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut lines = documents(9);
    // Lengths that differ, so that rows are padded, and documents that score nothing.
    lines.extend([r#"{"text": ""}"#, r#"{"text": "Two words"}"#].map(str::to_owned));
    let path = jsonl(dir.path(), &lines);
    let run = |path: &Path, out: &str, batch: &str| {
        let more = ["--seq-len", "200", "--batch-size", batch];
        let (code, records, stderr) = records(&[&model()], path, &dir.path().join(out), &more);
        assert_eq!(code, 0, "{stderr}");
        records[0].clone()
    };
    let one = run(&path, "one", "1");
    let eight = run(&path, "eight", "8");
    lines.reverse();
    let reversed = run(&jsonl(dir.path(), &lines), "reversed", "8");
    for other in [&eight, &reversed] {
        assert_eq!((&one["docs"], &one["tokens"]), (&json!(10), &other["tokens"]));
        assert_eq!(one["bytes"], other["bytes"]);
        close(number(other, "xent"), number(&one, "xent"), 1e-6);
        close(number(other, "entropy"), number(&one, "entropy"), 1e-6);
    }
}

#[test]
fn a_sweep_ranks_formats_and_resumes() {
    if !ready() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let sweep = |more: &[&str]| {
        let stages = "baseline,mx-fp8_e4m3,mx-fp4_e2m1,int8,nvfp8";
        let common = ["--max-samples", "6", "--seq-len", "64", "--stages", stages];
        let what = [Path::new("--sweep"), &model()];
        records(&what, &pile(), &out, &[&common[..], more].concat())
    };
    let (code, first, stderr) = sweep(&[]);
    assert_eq!(code, 0, "{stderr}");
    let names: Vec<_> = first.iter().map(|record| record["stage"].as_str().unwrap()).collect();
    assert_eq!(names, ["baseline", "mx-fp8_e4m3", "mx-fp4_e2m1", "int8", "nvfp8"]);
    let [baseline, fp8, fp4, int8, nvfp8] = &first[..] else { panic!("{first:?}") };
    let xent = |record| number(record, "xent");
    assert!(xent(fp4) > xent(fp8) + 0.01, "{} {}", xent(fp4), xent(fp8));
    close(xent(fp8), xent(baseline), 0.02);
    close(xent(int8), xent(baseline), 0.005);
    assert!(number(fp4, "model_bytes") < number(fp8, "model_bytes"));
    assert!(number(fp8, "model_bytes") < number(baseline, "model_bytes"));
    assert!(number(fp8, "sites_replaced") > 0.0 && number(baseline, "sites_replaced") == 0.0);
    assert_eq!((&fp4["tier"], &fp4["weight_format"]), (&json!("full"), &json!("fp4_e2m1")));
    assert_eq!(
        (&int8["weight_format"], &int8["activation_format"]),
        (&json!("int8"), &json!("none"))
    );
    assert_eq!(nvfp8["status"], "skipped");
    assert!(nvfp8["reason"].as_str().unwrap().contains("CUDA"), "{nvfp8}");

    for name in ["report.md", "report.html"] {
        let report = std::fs::read_to_string(out.join(name)).unwrap();
        assert!(report.contains("mx-fp4_e2m1") && report.contains("per-document"), "{name}");
    }
    let run: Value = serde_json::from_slice(&std::fs::read(out.join("run.json")).unwrap()).unwrap();
    assert_eq!(run["data"]["sha256"].as_str().unwrap().len(), 64);
    assert!(!out.join(".work").exists());

    // Resumed, what is ok is kept as it is; with another option nothing is.
    let lines = std::fs::read_to_string(out.join("results.jsonl")).unwrap();
    let (code, again, stderr) = sweep(&["--resume"]);
    assert_eq!((code, again.len()), (0, first.len()), "{stderr}");
    assert!(stderr.contains("int8: kept from an earlier run"), "{stderr}");
    let run: Value = serde_json::from_slice(&std::fs::read(out.join("run.json")).unwrap()).unwrap();
    assert_eq!(run["models"][0]["sha256"].as_str().unwrap().len(), 64);
    let details = &run["stages"][format!("{} int8", model().display())];
    assert!(details["outside_run_share"].as_f64().is_some_and(|share| share < 1.0), "{details}");
    assert_eq!(std::fs::read_to_string(out.join("results.jsonl")).unwrap(), lines);
    let (_, _, stderr) = sweep(&["--resume", "--batch-size", "3"]);
    assert!(!stderr.contains("kept from"), "{stderr}");
}

#[test]
fn every_documents_loss_is_kept_on_request() {
    if !ready() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let sweep = |more: &[&str]| {
        let common = ["--max-samples", "5", "--seq-len", "32", "--stages", "baseline,int8"];
        let what = [Path::new("--sweep"), &model()];
        let (code, found, stderr) = records(&what, &pile(), &out, &[&common[..], more].concat());
        assert_eq!(code, 0, "{stderr}");
        let run = std::fs::read(out.join("run.json")).unwrap();
        let run: Value = serde_json::from_slice(&run).unwrap();
        (found, run, stderr)
    };
    let (found, run, _) = sweep(&[]);
    let details = |run: &Value, record: &Value| {
        run["stages"][format!("{} {}", model().display(), record["stage"].as_str().unwrap())]
            .clone()
    };
    assert!(details(&run, &found[0])["documents"].is_null());
    // What has no documents is measured again, what has them is kept with them.
    for kept in [false, true] {
        let (found, run, stderr) = sweep(&["--documents", "--resume"]);
        assert_eq!(stderr.contains("int8: kept from an earlier run"), kept, "{stderr}");
        for record in &found {
            let documents = &details(&run, record)["documents"];
            let sum = |field: &str| {
                let values = documents[field].as_array().unwrap();
                assert_eq!(values.len(), 5);
                values.iter().map(|value| value.as_f64().unwrap()).sum::<f64>()
            };
            assert_eq!(sum("tokens"), number(record, "tokens"));
            close(sum("nll") / sum("tokens"), number(record, "xent"), 1e-12);
        }
    }
}

/// `tests/python/gpu_eval.py`: the same figures on GPUs, whatever the division of labour.
#[test]
fn gpus_agree_with_the_cpu() {
    let Some(python) = python().filter(|_| ready()) else { return };
    let library = mxrewrite::eval::runtime::load(None).expect("ONNX Runtime").library;
    let mut command = Command::new(python);
    command.current_dir(root()).arg("tests/python/gpu_eval.py");
    command.args(["--mxeval", env!("CARGO_BIN_EXE_mxeval"), "--ort-lib"]).arg(library);
    let output = command.output().expect("Python starts");
    let report = text(&output.stdout);
    match output.status.code() {
        Some(0) => println!("{report}"),
        Some(77) => skip("cuda", report.trim().trim_start_matches("skipped: ")),
        code => panic!("{code:?}\n{report}\n{}", text(&output.stderr)),
    }
}

#[test]
fn one_bad_graph_does_not_stop_the_others() {
    if !ready() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let bad = dir.path().join("bad.onnx");
    std::fs::write(&bad, "not a model").unwrap();
    let out = dir.path().join("out");
    let more = ["--max-samples", "2", "--seq-len", "16"];
    let (code, records, stderr) = records(&[&bad, &model()], &pile(), &out, &more);
    assert_eq!(code, 1, "{stderr}");
    let status: Vec<_> =
        records.iter().map(|r| (r["stage"].as_str(), r["status"].as_str())).collect();
    assert_eq!(status, [(Some("bad"), Some("failed")), (Some("model"), Some("ok"))]);
    assert!(records[0]["reason"].as_str().unwrap().contains("bad.onnx"), "{}", records[0]);
}

#[cfg(unix)]
#[test]
fn an_interrupted_sweep_keeps_what_it_finished() {
    use std::io::BufRead as _;
    if !ready() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let (model, tokenizer, pile) = (model(), tokenizer(), pile());
    let arguments: [&std::ffi::OsStr; 12] = [
        "--sweep".as_ref(),
        model.as_ref(),
        "--tokenizer".as_ref(),
        tokenizer.as_ref(),
        "--data".as_ref(),
        pile.as_ref(),
        "--stages".as_ref(),
        "baseline,mx-fp8_e4m3,int8".as_ref(),
        "--batch-size".as_ref(),
        "1".as_ref(),
        "--out".as_ref(),
        out.as_ref(),
    ];
    let mut child = Command::new(env!("CARGO_BIN_EXE_mxeval"))
        .args(arguments)
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = std::io::BufReader::new(child.stderr.take().unwrap()).lines();
    let second =
        |line: &std::io::Result<String>| line.as_ref().unwrap().contains("mx-fp8_e4m3 ...");
    assert!(lines.any(|line| second(&line)), "the second stage never began");
    // Ctrl-C is heard the same way, but stays ignored where the tests run in a shell's background.
    let kill = Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap();
    assert!(kill.success());
    let rest: Vec<_> = lines.map(|line| line.unwrap()).collect();
    assert_eq!(child.wait().unwrap().code(), Some(130), "{rest:?}");
    assert!(rest.last().unwrap().contains("--resume"), "{rest:?}");
    let results = std::fs::read_to_string(out.join("results.jsonl")).unwrap();
    let stages: Vec<_> = results.lines().filter(|line| line.contains("\"ok\"")).collect();
    assert!(stages.len() == 1 && stages[0].contains("\"baseline\""), "{results}");
    assert!(!out.join(".work").exists());
}

/// Arguments, exit code, and what stderr has to say.
fn refused(args: &[&str], code: i32, says: &[&str]) {
    let output = mxeval(args);
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{args:?}: {stderr}");
    for words in says {
        assert!(stderr.contains(words), "{args:?}: {stderr}");
    }
    assert!(!stderr.contains("panicked"), "{stderr}");
    assert_eq!(text(&output.stdout), "");
}

#[test]
fn usage_errors_exit_with_2() {
    let (model, tokenizer) =
        ("fixtures/tinylm/dynamo/model.onnx", "fixtures/tinylm/tokenizer.json");
    let rest = ["--tokenizer", tokenizer, "--data", "fixtures/mini_pile.parquet"];
    let with = |args: &[&str], says: &[&str]| refused(&[args, &rest[..]].concat(), 2, says);
    with(&[], &["--sweep"]);
    with(&["--sweep", model, "--stages", "mx-fp5"], &["unknown stage", "mx-fp8_e4m3"]);
    with(&["--sweep", model, "--tier", "c", "--mx-format", "fp4_e2m1"], &["--tier c"]);
    with(&["--sweep", model, "--stages", "int8", "--skip-int8"], &["no stage"]);
    with(&["--sweep", model, "--batch-size", "0"], &["at least 1"]);
    with(&["--sweep", model, "--workers-per-device", "0"], &["at least 1"]);
    with(&["--sweep", model, "--min-free-ratio", "1.5"], &["between 0 and 1"]);
    with(&["--sweep", model, "--device", "cuda:0,0"], &["device 0 is named twice"]);
    with(&["--sweep", model, "--dataset", "pile"], &["cannot be used with"]);
    refused(&["--sweep", model, "--tokenizer", tokenizer], 2, &["--data"]);
}

#[test]
fn faults_of_a_run_are_one_clear_line() {
    if !ready() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, content: &str| {
        std::fs::write(dir.path().join(name), content).unwrap();
        dir.path().join(name).display().to_string()
    };
    let column = file("column.jsonl", "{\"content\": \"a\", \"id\": 1}\n");
    let broken = file("broken.jsonl", "{\"text\": \"enough words to score\"}\n{\"text\":\n");
    let empty = file("empty.jsonl", "");
    let short = file("short.jsonl", "{\"text\": \"\"}\n{\"text\": \"a\"}\n");
    let out = dir.path().join("out").display().to_string();
    let (model, tokenizer) = (model().display().to_string(), tokenizer().display().to_string());
    let pile = pile().display().to_string();
    let check = |data: &str, tokenizer: &str, more: &[&str], says: &[&str]| {
        let args = ["--sweep", &model, "--tokenizer", tokenizer, "--data", data, "--out", &out];
        refused(&[&args[..], more].concat(), 1, says);
    };
    check(&column, &tokenizer, &[], &["line 1: no `text` key; found content, id"]);
    check(&broken, &tokenizer, &[], &["broken.jsonl: line 2: invalid JSON"]);
    // What an earlier run measured survives a run that has nothing to measure.
    let results = dir.path().join("out/results.jsonl");
    std::fs::create_dir_all(dir.path().join("out")).unwrap();
    std::fs::write(&results, "{\"model\":\"m\",\"stage\":\"s\"}\n").unwrap();
    let earlier = std::fs::read(&results).unwrap();
    check(&empty, &tokenizer, &[], &["holds no document"]);
    assert_eq!(std::fs::read(&results).unwrap(), earlier, "results.jsonl was emptied");
    std::fs::remove_file(&results).unwrap();
    check(&short, &tokenizer, &[], &["no scored token"]);
    check("missing.parquet", &tokenizer, &[], &["missing.parquet"]);
    check(&pile, &column, &[], &["column.jsonl", "not a Hugging Face tokenizer.json"]);
    check(&pile, &tokenizer, &["--device", "cuda:99"], &["--device cuda: ", "--device cpu"]);
    check(&pile, &tokenizer, &["--ort-lib", "/nowhere.so"], &["--ort-lib /nowhere.so"]);
    let lock = std::fs::File::create(dir.path().join("out/.lock")).unwrap();
    lock.lock().unwrap();
    check(&pile, &tokenizer, &[], &["another mxeval is writing", "choose another --out"]);
    lock.unlock().unwrap();
    // A tokenizer with ids that the model does not have.
    let foreign = foreign_tokenizer();
    let foreign = file("foreign.json", &foreign.to_string());
    check(
        &pile,
        &foreign,
        &[],
        &["outside its vocabulary of", "tokenizer has", "belongs to the model"],
    );
}

/// Whole words, every unknown one being token 100,000.
fn foreign_tokenizer() -> Value {
    json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": null, "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null,
        "decoder": null,
        "model": {"type": "WordLevel", "vocab": {"the": 0, "<unk>": 100_000}, "unk_token": "<unk>"}})
}

/// Byte-level BPE without merges: 256 tokens, which the zoo's vocabulary of 640 covers.
fn byte_tokenizer() -> Value {
    let mut alphabet: Vec<char> =
        tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet().into_iter().collect();
    alphabet.sort_unstable();
    let vocab: serde_json::Map<_, _> =
        alphabet.iter().enumerate().map(|(id, c)| (c.to_string(), id.into())).collect();
    json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": null, "post_processor": null, "decoder": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false,
                          "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null,
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false,
            "byte_fallback": false, "vocab": vocab, "merges": []}})
}

/// Every input convention of the exporters: position ids, caches in four spellings, fp16 logits.
#[test]
fn exports_of_one_model_agree_whatever_they_want_to_be_fed() {
    if !ready() {
        return;
    }
    let Some(zoo) = shared().map(|shared| shared.join("zoo")).filter(|zoo| zoo.is_dir()) else {
        println!("skipped: no ../shared/zoo (MX_SHARED)");
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = dir.path().join("bytes.json");
    std::fs::write(&tokenizer, byte_tokenizer().to_string()).unwrap();
    let groups: [(&[&str], f64); 3] = [
        (
            &[
                "llama31-dynamo/model",
                "llama31-ts/model",
                "llama31-dynamo-kv/model",
                "llama31-genai/model",
            ],
            1e-5,
        ),
        (
            &[
                "llama31-optimum-merged/model",
                "llama31-optimum-merged/decoder_model",
                "llama31-optimum-merged/decoder_with_past_model",
            ],
            1e-5,
        ),
        (&["gpt2-dynamo/model", "gpt2-ts/model", "gpt2-dynamo-fp16/model"], 1e-3),
    ];
    for (names, bound) in groups {
        let mut args: Vec<PathBuf> =
            names.iter().map(|name| zoo.join(name).with_extension("onnx")).collect();
        let options = ["--max-samples", "3", "--seq-len", "40", "--batch-size", "2", "--json"];
        args.extend(options.map(PathBuf::from));
        args.extend(["--tokenizer".into(), tokenizer.clone(), "--data".into(), pile()]);
        args.extend(["--out".into(), dir.path().join("out")]);
        let output = mxeval(args);
        assert!(output.status.success(), "{}", text(&output.stderr));
        let lines = text(&output.stdout);
        let xents: Vec<_> = lines
            .lines()
            .map(|line| number(&serde_json::from_str(line).unwrap(), "xent"))
            .collect();
        assert_eq!(xents.len(), names.len());
        xents.iter().for_each(|&xent| close(xent, xents[0], bound));
    }
}
