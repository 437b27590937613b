//! A run cut into tasks: merged, they leave what one run leaves.

use super::support::{root, skip};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn ready() -> bool {
    // Once: libraries are not loaded by several threads at a time.
    static FOUND: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    let found = *FOUND.get_or_init(|| mxrewrite::eval::runtime::load(None).is_ok());
    if !found {
        skip("ort", "no libonnxruntime (set ORT_DYLIB_PATH or MX_PYTHON)");
    }
    found
}

fn mxeval(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mxeval"));
    command.current_dir(root()).args(arguments).output().expect("mxeval starts")
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn ok(output: Output) -> String {
    assert!(output.status.success(), "{}", stderr(&output));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Expects this exit code and these words on stderr.
fn refused(output: &Output, code: i32, words: &[&str]) {
    let said = stderr(output);
    assert_eq!(output.status.code(), Some(code), "{said}");
    for word in words {
        assert!(said.contains(word), "{word:?} is not in: {said}");
    }
}

const SWEEP: [&str; 4] =
    ["--sweep", "fixtures/tinylm/dynamo/model.onnx", "--stages", "baseline,mx-fp4_e2m1,int8,nvfp8"];

const COMMON: [&str; 14] = [
    "--tokenizer",
    "fixtures/tinylm/tokenizer.json",
    "--data",
    "fixtures/mini_pile.parquet",
    "--device",
    "cpu",
    "--max-samples",
    "12",
    "--seq-len",
    "32",
    "--batch-size",
    "2",
    "--resamples",
    "200",
];

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

fn run(what: &[&str], out: &Path, more: &[&str]) -> Output {
    mxeval(&[what, &COMMON, &["--out", text(out)], more].concat())
}

/// Makes a plan; its path, and the ids of its tasks.
fn plan(what: &[&str], out: &Path, shards: &str, more: &[&str]) -> (PathBuf, Vec<String>) {
    let arguments = [&["plan"], what, &COMMON, &["--out", text(out), "--shards", shards], more];
    let ids = ok(mxeval(&arguments.concat()));
    (out.join("plan.json"), ids.lines().map(str::to_owned).collect())
}

fn task(plan: &Path, id: &str) -> Output {
    mxeval(&["run-task", text(plan), id])
}

/// Records without what a clock or the kernel's memory says.
fn figures(out: &Path) -> Vec<Value> {
    let lines = std::fs::read_to_string(out.join("results.jsonl")).unwrap();
    let record = |line: &str| {
        let mut record: Value = serde_json::from_str(line).unwrap();
        for clock in [
            "seconds",
            "tokens_per_second",
            "load_seconds",
            "peak_memory_bytes",
            "peak_resident_bytes",
            "peak_device_bytes",
            "speed_ratio",
        ] {
            record[clock] = Value::Null;
        }
        record
    };
    lines.lines().map(record).collect()
}

/// Every batch of every score file, as text.
fn windows(out: &Path) -> Vec<(String, String, String)> {
    let mut all = Vec::new();
    for file in std::fs::read_dir(out.join("scores")).unwrap() {
        let file = file.unwrap();
        let name = file.file_name().to_string_lossy().into_owned();
        for line in std::fs::read_to_string(file.path()).unwrap().lines().skip(1) {
            let line: Value = serde_json::from_str(line).unwrap();
            if line["batch"].is_u64() {
                all.push((name.clone(), line["batch"].to_string(), line["windows"].to_string()));
            }
        }
    }
    all.sort();
    all
}

fn same(single: &Path, merged: &Path) {
    let (one, other) = (figures(single), figures(merged));
    assert!(!one.is_empty());
    assert_eq!(one, other);
    let (one, other) = (windows(single), windows(merged));
    assert!(!one.is_empty());
    assert_eq!(one, other);
}

#[test]
fn a_sweep_in_shards_is_the_single_run_to_the_last_bit() {
    if !ready() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (single, shared) = (dir.path().join("single"), dir.path().join("shared"));
    ok(run(&SWEEP, &single, &[]));
    let (plan, ids) = plan(&SWEEP, &shared, "3", &[]);
    assert_eq!(ids.len(), 12, "{ids:?}");
    std::fs::write(shared.join("results.jsonl"), "earlier\n").unwrap();
    for id in ids.iter().skip(1).rev() {
        ok(task(&plan, id));
    }
    let early = mxeval(&["merge", text(&plan)]);
    refused(&early, 1, &["1 of 12 tasks are not done", &ids[0]]);
    assert_eq!(std::fs::read_to_string(shared.join("results.jsonl")).unwrap(), "earlier\n");
    // A task that was cut off in the middle of a line goes on; one that is done stays.
    let file = shared.join("tasks").join(format!("{}.jsonl", ids[4]));
    let whole = std::fs::read(&file).unwrap();
    std::fs::write(&file, &whole[..whole.len() / 2]).unwrap();
    let again = task(&plan, &ids[4]);
    assert!(stderr(&again).contains("batches kept"), "{}", stderr(&again));
    ok(again);
    ok(mxeval(&["run-task", text(&plan), "--index", "0"]));
    assert!(stderr(&task(&plan, &ids[0])).contains("done already"));
    ok(mxeval(&["merge", text(&plan)]));
    same(&single, &shared);
    let records = figures(&shared);
    assert_eq!(records[3]["status"], "skipped", "{}", records[3]);
    assert!(records[1]["statistics"]["all"]["versus"]["kl"].is_object());
    // What a device that ran out of memory did is told of the whole.
    let text_of = std::fs::read_to_string(&file).unwrap();
    let cut = text_of.replace("\"details\":{", "\"details\":{\"batch_halved_to\":1,");
    std::fs::write(&file, cut).unwrap();
    ok(mxeval(&["merge", text(&plan)]));
    let reason = figures(&shared)[1]["reason"].to_string();
    assert!(reason.contains("cut to as few as 1"), "{reason}");
}

#[test]
fn graphs_rolling_windows_and_no_baseline_beside_merge_alike() {
    if !ready() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let graphs = ["fixtures/tinylm/dynamo/model.onnx", "fixtures/tinylm/torchscript/model.onnx"];
    for (name, what, more) in [
        ("rolling", &graphs[..], &["--mode", "rolling", "--bos", "none"][..]),
        ("alone", &SWEEP[..], &["--no-kl"]),
    ] {
        let (single, shared) = (dir.path().join(name), dir.path().join(format!("{name}-shared")));
        ok(run(what, &single, more));
        let planned = dir.path().join(format!("{name}-plan"));
        let (plan, ids) = plan(what, &planned, "2", more);
        for id in &ids {
            ok(mxeval(&["run-task", text(&plan), id, "--out", text(&shared)]));
        }
        ok(mxeval(&["merge", text(&plan), "--out", text(&shared)]));
        same(&single, &shared);
        assert!(figures(&shared)[1]["statistics"]["all"]["versus"].is_object());
    }
}

#[test]
fn what_does_not_belong_to_the_plan_is_refused() {
    if !ready() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model.onnx");
    std::fs::copy(root().join(SWEEP[1]), &model).unwrap();
    let data = root().join("fixtures/tinylm/dynamo/model.onnx.data");
    std::fs::copy(data, dir.path().join("model.onnx.data")).unwrap();
    let what = ["--sweep", text(&model), "--stages", "baseline"];
    let (plan, ids) = plan(&what, &dir.path().join("out"), "1", &[]);
    refused(&task(&plan, "nothing"), 2, &["no task \"nothing\"", &ids[0]]);
    refused(&mxeval(&["run-task", text(&plan), "--index", "7"]), 2, &["the plan has 1 tasks"]);
    let held = std::fs::File::create({
        std::fs::create_dir_all(dir.path().join("out/tasks")).unwrap();
        dir.path().join("out/tasks").join(format!("{}.lock", ids[0]))
    })
    .unwrap();
    held.lock().unwrap();
    refused(&task(&plan, &ids[0]), 1, &["another process is doing it"]);
    drop(held);
    // A corrupt file is begun anew.
    let file = dir.path().join("out/tasks").join(format!("{}.jsonl", ids[0]));
    std::fs::write(&file, "nonsense\n").unwrap();
    refused(&mxeval(&["merge", text(&plan)]), 1, &[&ids[0], "do it again"]);
    let again = task(&plan, &ids[0]);
    assert!(stderr(&again).contains("begins anew"), "{}", stderr(&again));
    ok(again);
    std::fs::remove_file(&file).unwrap();
    let mut bytes = std::fs::read(&model).unwrap();
    // Another producer's name: the graph stays whole.
    let place = bytes.windows(7).position(|seven| seven == b"pytorch").unwrap();
    bytes[place] = b'P';
    std::fs::write(&model, bytes).unwrap();
    refused(&task(&plan, &ids[0]), 2, &["model", "has changed", "make a new plan"]);
    let corrupt = std::fs::read_to_string(&plan).unwrap().replace("\"shard\": 0", "\"shard\": 5");
    std::fs::write(&plan, corrupt).unwrap();
    refused(&task(&plan, &ids[0]), 2, &["was changed"]);
}
