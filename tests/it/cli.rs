//! The `mxrewrite` command: exit codes, what goes to which stream, what is left on disk.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

use crate::models::{GraphProto, ModelProto, external, model, node, value, weight, write};
use crate::support;

fn mxrewrite(folder: &Path, arguments: &[&str]) -> Output {
    Command::new(support::mxrewrite()).current_dir(folder).args(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// Two layers, [48, 32] up and [32, 48] down, and an attention product.
fn graph() -> GraphProto {
    GraphProto {
        node: vec![
            node("MatMul", "/l/mlp/up_proj/MatMul", &["x", "up"], &["a"]),
            node("MatMul", "/l/attn/o_proj/MatMul", &["a", "down"], &["b"]),
            node("MatMul", "scores", &["b", "x"], &["y"]),
        ],
        initializer: vec![weight("up", &[32, 48]), weight("down", &[48, 32])],
        input: vec![value("x", 2)],
        output: vec![value("y", 2)],
        ..GraphProto::default()
    }
}

fn files(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_rewrite_says_what_it_did_and_keeps_its_promises() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), "m.onnx", &model(graph()));
    let done = mxrewrite(folder.path(), &["m.onnx", "--tier-a", "--format", "fp4_e2m1", "--json"]);
    assert_eq!(done.status.code(), Some(0), "{}", text(&done.stderr));
    let report: Value = serde_json::from_slice(&done.stdout).unwrap();
    assert_eq!(report["sites"], 1);
    assert_eq!(report["weight_bytes_before"], 32 * 48 * 4);
    assert_eq!(report["weight_bytes_after"], 48 * 17);
    assert_eq!(files(folder.path()), ["m.a-fp4_e2m1.onnx", "m.onnx"]);
    // An existing output stays unless forced, and the input is never an output.
    let again = mxrewrite(folder.path(), &["m.onnx", "--tier-a", "--format", "fp4_e2m1"]);
    assert_eq!(again.status.code(), Some(1));
    assert!(text(&again.stderr).contains("--force"));
    let forced = mxrewrite(folder.path(), &["m.onnx", "-o", "m.a-fp4_e2m1.onnx", "--force"]);
    assert_eq!(forced.status.code(), Some(0), "{}", text(&forced.stderr));
    assert!(text(&forced.stdout).contains("2 of 3 candidates"), "{}", text(&forced.stdout));
    assert_eq!(text(&forced.stderr), "", "progress is for terminals");
    let over = mxrewrite(folder.path(), &["m.onnx", "-o", "./m.onnx", "--force"]);
    assert_eq!(over.status.code(), Some(1));
    let back: ModelProto =
        prost::Message::decode(&*fs::read(folder.path().join("m.onnx")).unwrap()).unwrap();
    assert_eq!(back, model(graph()), "the input is untouched");
}

#[test]
fn a_plan_is_shown_and_nothing_is_written() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), "m.onnx", &model(graph()));
    let plan = mxrewrite(folder.path(), &["m.onnx", "--plan", "--json", "--tier", "d"]);
    assert_eq!(plan.status.code(), Some(0), "{}", text(&plan.stderr));
    let plan: Value = serde_json::from_slice(&plan.stdout).unwrap();
    let expected = serde_json::json!({
        "node": "/l/mlp/up_proj/MatMul", "op": "MatMul", "module_path": "l.mlp.up_proj",
        "path_source": "node", "role": "mlp", "initializer": "up", "n": 48, "k": 32,
        "weight_format": "fp4_e2m1", "activation_format": "fp4_e2m1", "block_size": 32,
        "path_confidence": "medium", "bytes_before": 6144, "bytes_after": 816
    });
    let mut site = plan["sites"][0].clone();
    site.as_object_mut().unwrap().remove("expected_sqnr_db").expect("a shown plan is measured");
    assert_eq!(site, expected);
    assert_eq!(plan["sites"][1]["weight_format"], "fp6_e3m2");
    let skipped = plan["skipped"][0].as_object().unwrap();
    assert_eq!(skipped.keys().collect::<Vec<_>>(), ["node", "op", "reason"]);
    assert_eq!(plan["recipe"]["name"], "tier d");
    let table = mxrewrite(folder.path(), &["m.onnx", "--plan"]);
    assert_eq!(table.status.code(), Some(0));
    let table = text(&table.stdout);
    for part in ["l.mlp.up_proj", "node", "MatMul", "48", "fp8_e4m3", "two dynamic operands"] {
        assert!(table.contains(part), "{part} in\n{table}");
    }
    assert_eq!(files(folder.path()), ["m.onnx"]);
}

#[test]
fn nothing_to_replace_is_a_failure_with_the_candidates() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), "m.onnx", &model(graph()));
    let arguments = ["m.onnx", "-o", "out.onnx", "--exclude", "."];
    let none = mxrewrite(folder.path(), &arguments);
    assert_eq!(none.status.code(), Some(1));
    let message = text(&none.stderr);
    assert!(
        message.contains("--allow-empty") && message.contains("/l/mlp/up_proj/MatMul"),
        "{message}"
    );
    assert_eq!(files(folder.path()), ["m.onnx"]);
    let allowed = mxrewrite(folder.path(), &[&arguments[..], &["--allow-empty"]].concat());
    assert_eq!(allowed.status.code(), Some(0), "{}", text(&allowed.stderr));
    // Nothing was replaced, so nothing is changed, not even metadata.
    let read = |name: &str| fs::read(folder.path().join(name)).unwrap();
    assert_eq!(read("out.onnx"), read("m.onnx"));
}

#[test]
fn usage_errors_end_with_two_and_name_the_choices() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), "m.onnx", &model(graph()));
    for (arguments, part) in [
        (&["--format", "fp9"][..], "fp6_e3m2"),
        (&["--activation-format", "bf16"], "none"),
        (&["--block-size", "24"], "128"),
        (&["--rounding", "up"], "nearest"),
        (&["--scale-rule", "x"], "rceil"),
        (&["--tier", "e"], "full"),
        (&["--include", "("], "'('"),
        (&["--exclude", "[z-a]"], "'[z-a]'"),
        (&["--tier", "c", "--format", "fp4_e2m1"], "fixed"),
        (&["--tier", "d", "--activation-format", "fp4_e2m1"], "fixed"),
        (&["--tier", "a", "--all-linears"], "cannot be used with"),
        (&["--lower", "int4"], "nvfp8-emu-e4m3"),
        (&["--lower", "qdq", "--rounding", "floor"], "half to even"),
        (&["--lower", "qdq", "--format", "mxint8"], "--lower mx"),
        (&["--lower", "qdq", "--base-dtype", "bf16"], "--base-dtype"),
        (&["--lower", "fp16", "--base-dtype", "bf16"], "float16"),
        (&["--lower", "fp16", "--format", "fp4_e2m1"], "--lower fp16"),
        (&["--lower", "int8", "--format", "fp4_e2m1"], "--lower int8"),
        (&["--attention", "--activation-format", "none"], "--attention"),
        (&["--attention", "--lower", "int8"], "--attention"),
        (&["--recipe", "r.toml"], "--recipe"),
        (&["--threads", "0"], "--threads"),
        (&["--no-such-flag"], "--no-such-flag"),
    ] {
        let refused = mxrewrite(folder.path(), &[&["m.onnx"], arguments].concat());
        assert_eq!(refused.status.code(), Some(2), "{arguments:?}: {}", text(&refused.stderr));
        let message = text(&refused.stderr);
        assert!(message.contains(part), "{arguments:?}: {message}");
        assert!(refused.stdout.is_empty());
    }
    assert_eq!(mxrewrite(folder.path(), &[]).status.code(), Some(2));
    assert_eq!(files(folder.path()), ["m.onnx"]);
    let help = mxrewrite(folder.path(), &["--help"]);
    assert_eq!(help.status.code(), Some(0));
    assert!(text(&help.stdout).contains("Examples:"));
    assert!(text(&help.stdout).contains("--attention"), "what is there is offered");
}

/// The command fails with one line that contains `part` and leaves no file behind.
/// What the kernels are chosen by and what they are, as text and as JSON.
#[test]
fn cpu_info_names_the_variant_in_use() {
    let folder = tempfile::tempdir().unwrap();
    let out = mxrewrite(folder.path(), &["--cpu-info"]);
    assert!(out.status.success(), "{}", text(&out.stderr));
    let shown = text(&out.stdout);
    let out = mxrewrite(folder.path(), &["--cpu-info", "--json"]);
    let value: Value = serde_json::from_slice(&out.stdout).unwrap();
    let chosen = value["variant"].as_str().unwrap();
    assert!(shown.contains(&format!("variant in use: {chosen}\n")), "{shown}");
    let variants = value["variants"].as_array().unwrap();
    let runs = |v: &&Value| v["runs"] == true;
    assert_eq!(
        variants.iter().find(runs).unwrap()["name"],
        chosen,
        "the first that runs is in use"
    );
    assert_eq!(variants.last().unwrap()["name"], "scalar");
    let products = value["products"].as_array().unwrap();
    assert_eq!(products.len(), 12, "six formats, quantised and weight-only");
    assert!(products.iter().all(|p| p["kernels"][0]["from_m"] == 1));

    let forced = Command::new(support::mxrewrite())
        .current_dir(folder.path())
        .args(["--cpu-info", "--json"])
        .env("MX_CPU_VARIANT", "scalar")
        .output()
        .unwrap();
    let value: Value = serde_json::from_slice(&forced.stdout).unwrap();
    assert_eq!(value["variant"], "scalar");
    assert_eq!(mxrewrite(folder.path(), &["--cpu-info", "model.onnx"]).status.code(), Some(2));
    assert_eq!(mxrewrite(folder.path(), &["--cpu-info", "--plan"]).status.code(), Some(2));
}

fn refused(folder: &Path, input: &str, part: &str) {
    let before = files(folder);
    let done = mxrewrite(folder, &[input, "-o", "out.onnx"]);
    let message = text(&done.stderr);
    assert_eq!(done.status.code(), Some(1), "{input}: {message}");
    assert_eq!(message.trim_end().lines().count(), 1, "{input}: {message}");
    assert!(message.contains(part), "{input}: '{part}' in {message}");
    assert!(done.stdout.is_empty(), "{input}");
    assert_eq!(files(folder), before, "{input}");
}

#[test]
fn bad_files_fail_with_one_line_and_no_output() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let whole = fs::read(write(path, "m.onnx", &model(graph()))).unwrap();
    for cut in [1, 7, whole.len() / 3, whole.len() / 2, whole.len() - 1] {
        fs::write(path.join("cut.onnx"), &whole[..cut]).unwrap();
        refused(path, "cut.onnx", "cut.onnx");
    }
    fs::write(path.join("text.onnx"), "This is a letter, not a model.\n".repeat(40)).unwrap();
    refused(path, "text.onnx", "text.onnx");
    fs::write(path.join("empty.onnx"), "").unwrap();
    refused(path, "empty.onnx", "empty.onnx");
    fs::create_dir(path.join("folder.onnx")).unwrap();
    refused(path, "folder.onnx", "folder.onnx");
    refused(path, "absent.onnx", "absent.onnx");
}

#[test]
fn external_data_has_to_lie_beside_the_model() {
    let outside = tempfile::tempdir().unwrap();
    let inside = outside.path().join("models");
    fs::create_dir(&inside).unwrap();
    let data = weight("up", &[32, 48]).raw_data.unwrap();
    fs::write(outside.path().join("secret.bin"), &data).unwrap();
    fs::write(inside.join("short.bin"), &data[..100]).unwrap();
    fs::write(inside.join("good.bin"), &data).unwrap();
    #[cfg(unix)]
    std::os::unix::fs::symlink(outside.path().join("secret.bin"), inside.join("link.bin")).unwrap();
    let with = |location: &str| {
        let mut graph = graph();
        graph.initializer[0] = external(weight("up", &[32, 48]), location);
        write(&inside, "m.onnx", &model(graph));
    };
    let absolute = outside.path().join("secret.bin");
    for location in
        ["absent.bin", "../secret.bin", absolute.to_str().unwrap(), "short.bin", "", "."]
    {
        with(location);
        refused(&inside, "m.onnx", "'up'");
    }
    #[cfg(unix)]
    {
        with("link.bin");
        refused(&inside, "m.onnx", "link.bin");
    }
    with("good.bin");
    let done = mxrewrite(&inside, &["m.onnx", "-o", "out.onnx"]);
    assert_eq!(done.status.code(), Some(0), "{}", text(&done.stderr));
}

#[test]
fn the_inputs_weights_are_never_written_over() {
    let folder = tempfile::tempdir().unwrap();
    let mut external_graph = graph();
    // Both layers are replaced, so that nothing of the result refers to the file any more.
    external_graph.initializer =
        external_graph.initializer.into_iter().map(|w| external(w, "weights.bin")).collect();
    write(folder.path(), "m.onnx", &model(external_graph));
    let weights = vec![0_u8; 32 * 48 * 4];
    fs::write(folder.path().join("weights.bin"), &weights).unwrap();
    for output in ["weights.bin", "m.onnx"] {
        let done = mxrewrite(folder.path(), &["m.onnx", "--all-linears", "-o", output, "--force"]);
        assert_eq!(done.status.code(), Some(1), "{output}: {}", text(&done.stderr));
        assert!(text(&done.stderr).contains("choose another output"), "{}", text(&done.stderr));
    }
    assert_eq!(fs::read(folder.path().join("weights.bin")).unwrap(), weights);
}

#[test]
#[cfg(unix)]
fn a_named_pipe_is_refused_instead_of_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    let made = Command::new("mkfifo").arg(folder.path().join("pipe.onnx")).status().unwrap();
    assert!(made.success());
    refused(folder.path(), "pipe.onnx", "not a regular file");
}

#[test]
fn invalid_graphs_fail_with_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let mut cases: Vec<(&str, GraphProto)> = Vec::new();
    let mut twice = graph();
    twice.node[1].output = vec!["a".into()];
    cases.push(("'a'", twice));
    let mut cycle = graph();
    cycle.node[0].input[0] = "b".into();
    cases.push(("cycle", cycle));
    let mut undefined = graph();
    undefined.node[0].input[0] = "nowhere".into();
    cases.push(("'nowhere'", undefined));
    let mut short = graph();
    short.initializer[0].raw_data = Some(vec![0; 12].into());
    cases.push(("'up'", short));
    let mut huge = graph();
    huge.initializer[0].dims = vec![i64::MAX, i64::MAX];
    cases.push(("up_proj", huge));
    for (part, graph) in cases {
        write(folder.path(), "m.onnx", &model(graph));
        refused(folder.path(), "m.onnx", part);
    }
}
