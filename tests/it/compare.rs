//! `mxeval compare`: folders in, a table out. Needs no ONNX Runtime.

use mxrewrite::eval::record::{Record, Status};
use serde_json::{Value, json};
use std::path::Path;
use std::process::{Command, Output};

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn compare(args: &[&std::ffi::OsStr]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_mxeval"))
        .arg("compare")
        .args(args)
        .output()
        .expect("mxeval starts")
}

/// An output folder with a baseline and one stage.
fn folder(path: &Path, xent: f64, data: &str) {
    std::fs::create_dir_all(path).unwrap();
    let line = |stage: &str, xent: f64| {
        let mut record = Record::new("m.onnx", stage, "cpu", Status::Ok);
        (record.xent, record.ppl, record.tokens) = (Some(xent), Some(xent.exp()), Some(1000));
        serde_json::to_string(&record).unwrap() + "\n"
    };
    std::fs::write(path.join("results.jsonl"), line("baseline", 3.0) + &line("int8", xent))
        .unwrap();
    let run = json!({"data": {"sha256": data}});
    std::fs::write(path.join("run.json"), run.to_string()).unwrap();
}

#[test]
fn folders_are_laid_side_by_side() {
    let dir = tempfile::tempdir().unwrap();
    let [a, b, page] = ["a", "b", "page.html"].map(|name| dir.path().join(name));
    folder(&a, 3.01, "x");
    folder(&b, 3.03, "x");
    let output = compare(&[a.as_ref(), b.as_ref(), "--out".as_ref(), page.as_ref()]);
    let stdout = text(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert!(stdout.contains("+0.02000") && stdout.contains("+2.02"), "{stdout}");
    assert!(std::fs::read_to_string(&page).unwrap().contains("+0.02000"));

    folder(&b, 3.03, "y");
    let output = compare(&[a.as_ref(), b.as_ref()]);
    assert!(text(&output.stdout).contains("NOT COMPARABLE"), "{}", text(&output.stdout));
    assert!(!text(&output.stdout).contains("+0.02000"));
    let output = compare(&[a.as_ref(), b.as_ref(), "--json".as_ref()]);
    let compared: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(compared["remarks"][0]["kind"], "not_comparable");
    assert_eq!(compared["rows"][1]["sides"][1]["delta"], Value::Null);
    assert!(text(&output.stderr).contains("warning: "), "{}", text(&output.stderr));
}

#[test]
fn what_cannot_be_compared_is_one_clear_line() {
    let dir = tempfile::tempdir().unwrap();
    let (a, nothing) = (dir.path().join("a"), dir.path().join("nothing"));
    folder(&a, 3.01, "x");
    assert_eq!(compare(&[a.as_ref()]).status.code(), Some(2));
    let output = compare(&[a.as_ref(), nothing.as_ref()]);
    let stderr = text(&output.stderr);
    assert_eq!((output.status.code(), text(&output.stdout).as_str()), (Some(1), ""));
    assert!(stderr.starts_with("error: ") && stderr.contains("nothing"), "{stderr}");
    assert!(stderr.contains("mxeval --out") && stderr.lines().count() == 1, "{stderr}");
    let page = nothing.join("page.html");
    let output = compare(&[a.as_ref(), a.as_ref(), "--out".as_ref(), page.as_ref()]);
    assert_eq!(output.status.code(), Some(1));
    let stderr = text(&output.stderr);
    assert!(stderr.contains("page.html: No such file"), "{stderr}");
}
