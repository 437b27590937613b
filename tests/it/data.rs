//! Where `mxeval` reads from: files, globs, a web server, a hub; samples; what it says of the text.

use super::support::{python, root, skip};
use serde_json::{Value, json};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

#[path = "../../src/eval/corpus/http/testing.rs"]
mod server;

use server::Server;

/// What a run left: exit code, its record, run.json's `data`, stderr.
struct Ran {
    code: Option<i32>,
    record: Value,
    data: Value,
    stderr: String,
}

/// Measures tinylm; `None` without ONNX Runtime.
fn mxeval(out: &Path, endpoint: &str, more: &[OsString]) -> Option<Ran> {
    let named = std::env::var_os("ORT_DYLIB_PATH").is_some_and(|path| !path.is_empty());
    if !named && python().is_none() {
        skip("ort", "no ORT_DYLIB_PATH and no Python with onnxruntime (set MX_PYTHON)");
        return None;
    }
    let output = Command::new(env!("CARGO_BIN_EXE_mxeval"))
        .current_dir(root())
        .env("HF_ENDPOINT", endpoint)
        .env("HF_HOME", out.join("nothing"))
        .env("HF_TOKEN", "hf_secret")
        .env("NO_PROXY", "127.0.0.1")
        .args(["fixtures/tinylm/dynamo/model.onnx", "--device", "cpu", "--json", "--out"])
        .arg(out)
        .args(["--seq-len", "32", "--batch-size", "4"])
        .args(more)
        .output()
        .expect("mxeval starts");
    let run = std::fs::read(out.join("run.json")).unwrap_or_default();
    let run: Value = serde_json::from_slice(&run).unwrap_or_default();
    Some(Ran {
        code: output.status.code(),
        record: serde_json::from_slice(&output.stdout).unwrap_or_default(),
        data: run["data"].clone(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}

fn args<const N: usize>(list: [&str; N]) -> Vec<OsString> {
    list.map(OsString::from).to_vec()
}

fn lines(range: std::ops::Range<usize>) -> String {
    let line = |n| json!({"text": format!("Number {n}. {}", "and so on ".repeat(n % 7 + 1))});
    range.map(|n| line(n).to_string() + "\n").collect()
}

#[test]
fn the_same_documents_give_the_same_results_wherever_they_lie() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    std::fs::write(at("all.jsonl"), lines(0..40)).unwrap();
    std::fs::write(at("part-1.jsonl"), lines(0..25)).unwrap();
    let second = zstd::encode_all(lines(25..40).as_bytes(), 1).unwrap();
    std::fs::write(at("part-2.jsonl.zst"), &second).unwrap();
    let server = Server::new([
        ("all.jsonl", lines(0..40).into_bytes()),
        ("datasets/me/set/resolve/main/all.jsonl", lines(0..40).into_bytes()),
    ]);
    let measure = |out: &str, data: &[&str], more: &[&str]| {
        let all = data.iter().chain(more).map(OsString::from).collect::<Vec<_>>();
        mxeval(&at(out), &server.url, &all)
    };
    let text = |path: PathBuf| path.display().to_string();
    let (file, glob) = (text(at("all.jsonl")), text(at("part-*")));
    let url = server.at("all.jsonl?key=secret");
    let places: [&[&str]; 4] = [
        &["--data", &file],
        &["--data", &glob],
        &["--data", &url],
        &["--dataset", "me/set:all.jsonl"],
    ];
    for more in [&["--max-samples", "30"][..], &["--max-samples", "9", "--shuffle", "--seed", "5"]]
    {
        let Some(first) = measure("file", places[0], more) else { return };
        assert_eq!(first.code, Some(0), "{}", first.stderr);
        assert!(first.stderr.contains("first batch ready after "), "{}", first.stderr);
        for place in &places[1..] {
            let Some(ran) = measure("other", place, more) else { return };
            assert_eq!(ran.code, Some(0), "{}", ran.stderr);
            for field in ["docs", "tokens", "bytes", "xent", "entropy"] {
                assert_eq!(ran.record[field], first.record[field], "{field}, {place:?}");
            }
            assert_eq!(ran.data["documents_sha256"], first.data["documents_sha256"], "{place:?}");
            let said = format!("{}{}{}", ran.data, ran.record, ran.stderr);
            assert!(!said.contains("hf_secret") && !said.contains("key=secret"), "{said}");
        }
    }
    assert!(server.state().requests.iter().all(|request| request.range.is_some()));
}

#[test]
fn run_json_says_what_was_read_and_results_go_by_the_documents() {
    let dir = tempfile::tempdir().unwrap();
    let (out, path) = (dir.path().join("out"), dir.path().join("a.jsonl"));
    let copy = dir.path().join("b.jsonl");
    std::fs::write(&path, lines(0..20)).unwrap();
    // The same first documents in another file, with others after them.
    std::fs::write(&copy, lines(0..20) + &lines(50..60)).unwrap();
    let run = |path: &Path, more: &[&str]| {
        let mut all = args(["--max-samples", "12", "--resume", "--data"]);
        all.push(path.into());
        all.extend(more.iter().map(OsString::from));
        mxeval(&out, "http://127.0.0.1:1", &all)
    };
    let Some(first) = run(&path, &[]) else { return };
    assert_eq!(first.code, Some(0), "{}", first.stderr);
    let file = &first.data["files"][0];
    let length = std::fs::metadata(&path).unwrap().len();
    assert_eq!((&file["path"], &file["bytes"]), (&json!(path), &json!(length)));
    assert_eq!((&first.data["path"], &first.data["sha256"]), (&json!(path), &file["sha256"]));
    assert_eq!(first.data["sha256"].as_str().unwrap().len(), 64);
    assert_eq!(first.data["shuffle_seed"], Value::Null);

    let kept = "kept from an earlier run";
    let Some(again) = run(&copy, &[]) else { return };
    assert!(again.stderr.contains(kept), "{}", again.stderr);
    let Some(two) = run(&path, &["--data", copy.to_str().unwrap()]) else { return };
    assert!(two.stderr.contains(kept), "{}", two.stderr);
    assert_eq!((&two.data["path"], two.data["files"].as_array().unwrap().len()), (&Value::Null, 2));
    let Some(sampled) = run(&path, &["--shuffle"]) else { return };
    assert!(!sampled.stderr.contains(kept), "{}", sampled.stderr);
    assert!(sampled.stderr.contains("without reading all of it"), "{}", sampled.stderr);
    assert_eq!(sampled.data["shuffle_seed"], 0);
    let Some(other) = run(&path, &["--shuffle", "--seed", "1"]) else { return };
    assert!(!other.stderr.contains(kept), "{}", other.stderr);
    let Some(same) = run(&path, &["--shuffle", "--seed", "1"]) else { return };
    assert!(same.stderr.contains(kept), "{}", same.stderr);
}

#[test]
fn what_cannot_be_read_is_named_before_anything_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::new([]);
    let glob = dir.path().join("*.parquet").display().to_string();
    let missing = server.at("x/none.parquet");
    for (option, name, expected) in [
        ("--data", dir.path().to_str().unwrap(), "is a directory"),
        ("--data", &*glob, "*.parquet: the glob matches no file"),
        ("--data", &*missing, "/x/none.parquet: HTTP 404 Not Found: there is no such file"),
        ("--dataset", "me/none:a.parquet", "cannot fetch me/none from the Hugging Face hub"),
    ] {
        let out = dir.path().join("out");
        let Some(ran) = mxeval(&out, &server.url, &args([option, name])) else { return };
        assert_eq!(ran.code, Some(1), "{}", ran.stderr);
        assert!(ran.stderr.contains(expected), "{}", ran.stderr);
        assert!(!out.join("results.jsonl").exists());
    }
}
