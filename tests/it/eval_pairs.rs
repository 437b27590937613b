//! Baseline and variant side by side: figures against float64 in NumPy, and runs that were cut off.

use super::support::{mxrewrite, python_and_library, root, skip};
use mxrewrite::eval::windows::{Definition, Tokenizer, Window};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn model() -> PathBuf {
    root().join("fixtures/tinylm/dynamo/model.onnx")
}

fn tokenizer() -> PathBuf {
    root().join("fixtures/tinylm/tokenizer.json")
}

fn pile() -> PathBuf {
    root().join("fixtures/mini_pile.parquet")
}

fn ready() -> bool {
    let found = mxrewrite::eval::runtime::load(None).is_ok();
    if !found {
        skip("ort", "no libonnxruntime (set ORT_DYLIB_PATH or MX_PYTHON)");
    }
    found
}

fn mxeval(what: &[&str], out: &Path, more: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mxeval"));
    command.current_dir(root()).args(what).arg("--tokenizer").arg(tokenizer());
    command.arg("--data").arg(pile()).arg("--out").arg(out).args(["--device", "cpu"]).args(more);
    command.output().expect("mxeval starts")
}

fn records(output: &Output) -> Vec<Value> {
    let lines = String::from_utf8_lossy(&output.stdout).into_owned();
    lines.lines().map(|line| serde_json::from_str(line).expect("a record")).collect()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn number(value: &Value, pointer: &str) -> f64 {
    let found = value.pointer(pointer).and_then(Value::as_f64);
    found.unwrap_or_else(|| panic!("{pointer} of {value}"))
}

/// Everything of a record but what a clock or the kernel's memory says.
fn figures(record: &Value) -> Value {
    let mut record = record.clone();
    for field in [
        "seconds",
        "tokens_per_second",
        "load_seconds",
        "peak_memory_bytes",
        "peak_resident_bytes",
        "peak_device_bytes",
        "speed_ratio",
        "reason",
        "status",
    ] {
        record[field] = Value::Null;
    }
    record
}

#[test]
fn divergence_agreement_and_p_correct_are_numpys_in_float64() {
    let Some((python, library)) = python_and_library() else { return };
    let dir = tempfile::tempdir().unwrap();
    let definition = Definition::per_document(128);
    let corpus = Tokenizer::open(&tokenizer())
        .and_then(|t| t.tokenize(mxrewrite::eval::corpus::open(&pile())?, &definition, 12))
        .unwrap();
    let window =
        |w: &Window| json!({"ids": w.ids[..], "first_scored": w.first_scored, "bytes": w.bytes});
    let windows: Vec<_> = corpus.windows.iter().map(window).collect();
    let path = dir.path().join("windows.json");
    std::fs::write(&path, serde_json::to_string(&windows).unwrap()).unwrap();
    for format in ["fp8_e4m3", "fp4_e2m1"] {
        let variant = dir.path().join(format!("{format}.onnx"));
        let mut rewrite = Command::new(mxrewrite());
        rewrite.arg(model()).args(["--format", format, "-o"]).arg(&variant);
        assert!(rewrite.output().unwrap().status.success());
        let numpy = Command::new(&python)
            .arg(root().join("tests/python/check_scores.py"))
            .args([&model(), &variant, &path])
            .arg("--library")
            .arg(&library)
            .output()
            .unwrap();
        assert!(numpy.status.success(), "{}", stderr(&numpy));
        let numpy: Value = serde_json::from_slice(&numpy.stdout).unwrap();
        // One row at a time, as NumPy's run: a sum in another order may round to another code.
        let (base, variant) = (model().display().to_string(), variant.display().to_string());
        let options = ["--max-samples", "12", "--seq-len", "128", "--batch-size", "1", "--json"];
        let output = mxeval(&[&base, &variant], &dir.path().join(format), &options);
        assert!(output.status.success(), "{}", stderr(&output));
        let records = records(&output);
        assert!(records[0]["statistics"]["all"]["versus"].is_null());
        let all = &records[1]["statistics"]["all"];
        assert_eq!(number(all, "/tokens"), number(&numpy, "/tokens"));
        for (ours, theirs) in [
            ("/versus/kl/mean/value", "/kl/mean"),
            ("/versus/kl/median", "/kl/median"),
            ("/versus/kl/p90", "/kl/p90"),
            ("/versus/kl/p99", "/kl/p99"),
            ("/versus/kl/p999", "/kl/p999"),
            ("/versus/kl/max", "/kl/max"),
            ("/versus/agreement/value", "/agreement"),
            ("/versus/delta_p_rms/value", "/delta_p_rms"),
            ("/xent/value", "/xent"),
        ] {
            let (ours_is, theirs_is) = (number(all, ours), number(&numpy, theirs));
            let relative = (ours_is - theirs_is).abs() / theirs_is.abs();
            println!("{format} {ours}: {ours_is} against {theirs_is}, {relative:.1e}");
            assert!(relative <= 1e-6, "{format} {ours}: {ours_is} against {theirs_is}");
        }
        // Differences of nearly equal sums: within 1e-6 of what is subtracted.
        for (ours, theirs, of) in [
            ("/versus/delta_xent/value", "/delta_xent", number(&numpy, "/xent")),
            ("/versus/delta_bits_per_byte/value", "/delta_bits_per_byte", 2.0),
            ("/versus/delta_p_mean/value", "/delta_p_mean", 1.0),
        ] {
            let error = (number(all, ours) - number(&numpy, theirs)).abs();
            assert!(error <= 1e-6 * of, "{format} {ours}: {error}");
        }
    }
}

const SWEEP: [&str; 7] = [
    "--stages",
    "baseline,mx-fp6_e2m3,mx-fp4_e2m1",
    "--max-samples",
    "20",
    "--seq-len",
    "48",
    "--json",
];

fn sweep(out: &Path, batch: &str, more: &[&str]) -> Output {
    let model = model().display().to_string();
    mxeval(&["--sweep", &model], out, &[&SWEEP[..], &["--batch-size", batch], more].concat())
}

#[test]
fn scores_cut_off_by_a_kill_go_on_to_the_same_figures() {
    if !ready() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let whole = records(&sweep(&out, "2", &[]));
    assert_eq!(whole.len(), 3);
    // What kill -9 leaves in the middle of the last stage: two records, and half a score file.
    let results = std::fs::read_to_string(out.join("results.jsonl")).unwrap();
    let kept: String = results.lines().take(2).map(|line| format!("{line}\n")).collect();
    std::fs::write(out.join("results.jsonl"), kept).unwrap();
    let scores = std::fs::read_dir(out.join("scores")).unwrap().map(|entry| entry.unwrap().path());
    let last = scores.into_iter().find(|path| path.to_string_lossy().contains("fp4")).unwrap();
    let text = std::fs::read(&last).unwrap();
    std::fs::write(&last, &text[..text.len() / 2]).unwrap();
    let again = sweep(&out, "2", &["--resume"]);
    assert!(again.status.success(), "{}", stderr(&again));
    let said = stderr(&again);
    assert!(said.contains("mx-fp6_e2m3: kept from an earlier run"), "{said}");
    assert!(said.contains("mx-fp4_e2m1: ") && said.contains("of 10 batches kept"), "{said}");
    let resumed = records(&again);
    for (one, other) in whole.iter().zip(&resumed) {
        assert_eq!(figures(one), figures(other));
    }
}

#[cfg(unix)]
#[test]
fn an_interruption_leaves_partial_figures_and_goes_on_to_the_same() {
    use std::io::BufRead as _;
    if !ready() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let whole = records(&sweep(&dir.path().join("whole"), "1", &[]));
    let out = dir.path().join("out");
    let mut child = Command::new(env!("CARGO_BIN_EXE_mxeval"))
        .current_dir(root())
        .args(["--sweep"])
        .arg(model())
        .arg("--tokenizer")
        .arg(tokenizer())
        .arg("--data")
        .arg(pile())
        .args(SWEEP)
        .args(["--batch-size", "1", "--device", "cpu", "--out"])
        .arg(&out)
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = std::io::BufReader::new(child.stderr.take().unwrap()).lines();
    assert!(lines.any(|line| line.as_ref().unwrap().contains("mx-fp6_e2m3 ...")));
    // At least one batch of the stage is there.
    let scores = |out: &Path| {
        let files = std::fs::read_dir(out.join("scores")).into_iter().flatten();
        let mut files = files.map(|entry| entry.unwrap().path());
        files.find(|path| path.to_string_lossy().contains("fp6"))
    };
    while scores(&out).is_none_or(|p| std::fs::read_to_string(p).unwrap().lines().count() < 3) {
        assert!(child.try_wait().unwrap().is_none(), "mxeval ended before it could be stopped");
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    // Ctrl-C is heard the same way, but stays ignored where the tests run in a shell's background.
    assert!(
        Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap().success()
    );
    let rest: Vec<_> = lines.map(|line| line.unwrap()).collect();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{rest:?}");
    assert!(rest.iter().any(|line| line.contains("--resume")), "{rest:?}");
    let partial = records(&output);
    assert_eq!(partial.len(), 2, "{partial:?}");
    assert_eq!(partial[1]["status"], "partial", "{}", partial[1]);
    let reason = partial[1]["reason"].as_str().unwrap();
    assert!(reason.contains("interrupted after") && reason.contains("of 20 windows"), "{reason}");
    assert!(number(&partial[1], "/docs") < 20.0 && number(&partial[1], "/xent") > 0.0);
    let report = std::fs::read_to_string(out.join("report.md")).unwrap();
    assert!(report.contains("Partial results: mx-fp6_e2m3 was interrupted"), "{report}");
    assert!(!out.join(".work").exists());
    let resumed = sweep(&out, "1", &["--resume"]);
    assert!(resumed.status.success(), "{}", stderr(&resumed));
    let resumed = records(&resumed);
    assert_eq!(resumed.len(), 3);
    for (one, other) in whole.iter().zip(&resumed) {
        assert_eq!(figures(one), figures(other));
    }
}

#[test]
fn without_the_baseline_beside_it_a_stage_scores_the_same() {
    if !ready() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let beside = records(&sweep(&dir.path().join("a"), "2", &[]));
    let alone = records(&sweep(&dir.path().join("b"), "2", &["--no-kl"]));
    for (beside, alone) in beside.iter().zip(&alone) {
        assert_eq!(beside["xent"], alone["xent"]);
        assert_eq!(beside["entropy"], alone["entropy"]);
        let versus =
            |record: &Value, field: &str| record["statistics"]["all"]["versus"][field].clone();
        assert!(versus(alone, "kl").is_null());
        // The difference is there all the same, from the two stages' documents.
        let (one, other) = (versus(beside, "delta_xent"), versus(alone, "delta_xent"));
        assert_eq!(one["value"].is_null(), other["value"].is_null());
        if let (Some(one), Some(other)) = (one["value"].as_f64(), other["value"].as_f64()) {
            assert!((one - other).abs() < 1e-6, "{one} {other}");
        }
    }
}

#[test]
fn two_runs_are_compared_document_by_document_and_other_intervals_take_no_new_scores() {
    if !ready() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    let first = records(&sweep(&a, "4", &[]));
    assert!(sweep(&b, "4", &["--rounding", "nearest"]).status.success());
    let compared = Command::new(env!("CARGO_BIN_EXE_mxeval"))
        .arg("compare")
        .args([&a, &b])
        .arg("--json")
        .output()
        .unwrap();
    assert!(compared.status.success(), "{}", stderr(&compared));
    let compared: Value = serde_json::from_slice(&compared.stdout).unwrap();
    let text = compared.to_string();
    // Out of scores/: an interval, not a bare difference.
    assert!(text.contains("\"low\":-") || text.contains("\"low\":0."), "{text}");

    let again = sweep(&a, "4", &["--resume", "--resamples", "500"]);
    assert!(again.status.success(), "{}", stderr(&again));
    assert!(stderr(&again).contains("mx-fp4_e2m1: 5 of 5 batches kept"), "{}", stderr(&again));
    for (one, other) in first.iter().zip(records(&again)) {
        assert_eq!(one["xent"], other["xent"]);
        assert_eq!(other["statistics"]["resamples"], 500);
    }
}
