//! `mxrewrite --genai`: whole folders, good and hostile, and generation from what it writes.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::{Value, json};

use crate::models::{GraphProto, external, model, node, value, weight, write};
use crate::support;

fn mxrewrite(folder: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(support::mxrewrite());
    command.current_dir(folder).args(arguments).env_remove("MX_OPS_LIBRARY").output().unwrap()
}

fn stderr(done: &Output) -> String {
    String::from_utf8(done.stderr.clone()).unwrap()
}

/// One layer; its weight lies in `data` when there is a name.
fn graph(op: &str, data: Option<&str>) -> GraphProto {
    let tensor = weight("up", &[32, 48]);
    GraphProto {
        node: vec![node(op, "/model/layers.0/mlp/up_proj/MatMul", &["x", "up"], &["y"])],
        initializer: vec![match data {
            Some(location) => external(tensor, location),
            None => tensor,
        }],
        input: vec![value("x", 2)],
        output: vec![value("y", 2)],
        ..GraphProto::default()
    }
}

fn config(decoder: Value) -> Value {
    json!({"model": {"type": "llama", "decoder": decoder, "eos_token_id": 2}, "search": {}})
}

/// A folder `in` with a decoder, its data, a tokenizer and a sub-folder, and a library beside it.
fn folder() -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("in");
    fs::create_dir_all(dir.join("extra")).unwrap();
    write(&dir, "model.onnx", &model(graph("MatMul", Some("old.data"))));
    fs::write(dir.join("old.data"), weight("up", &[32, 48]).raw_data.unwrap()).unwrap();
    fs::write(dir.join("tokenizer.json"), "{}").unwrap();
    fs::write(dir.join("extra/adapter.bin"), "a").unwrap();
    let options = json!({"log_id": "x", "provider_options": []});
    put(&dir, &config(json!({"session_options": options, "filename": "model.onnx"})));
    fs::write(root.path().join("lib.so"), "library").unwrap();
    root
}

fn put(dir: &Path, config: &Value) {
    fs::write(dir.join("genai_config.json"), config.to_string()).unwrap();
}

/// All files below, relative, sorted.
fn files(folder: &Path) -> Vec<String> {
    fn walk(at: &Path, root: &Path, out: &mut Vec<String>) {
        for entry in fs::read_dir(at).unwrap() {
            let path = entry.unwrap().path();
            if path.symlink_metadata().unwrap().is_dir() {
                walk(&path, root, out);
            } else {
                out.push(path.strip_prefix(root).unwrap().to_str().unwrap().to_owned());
            }
        }
    }
    let mut out = Vec::new();
    walk(folder, folder, &mut out);
    out.sort();
    out
}

fn read_config(folder: &Path) -> Value {
    serde_json::from_slice(&fs::read(folder.join("genai_config.json")).unwrap()).unwrap()
}

/// The arguments fail with exit code 1 and these words, and leave nothing behind.
fn refused(root: &Path, arguments: &[&str], words: &[&str]) {
    let before = files(root);
    let done = mxrewrite(root, arguments);
    let said = stderr(&done);
    assert_eq!(done.status.code(), Some(1), "{arguments:?}: {said}");
    for word in words {
        assert!(said.contains(word), "{arguments:?} does not say {word}: {said}");
    }
    assert_eq!(said.trim_end().lines().filter(|line| !line.starts_with(' ')).count(), 1, "{said}");
    assert_eq!(files(root), before);
}

#[test]
fn a_folder_is_rewritten_into_one_that_can_be_moved() {
    let root = folder();
    let input = fs::read(root.path().join("in/model.onnx")).unwrap();
    // What comes from a download cache is a link there, and a file here.
    #[cfg(unix)]
    std::os::unix::fs::symlink("../lib.so", root.path().join("in/linked.json")).unwrap();
    let args = ["--genai", "in", "--json", "--ops-library", "lib.so", "--format", "fp4_e2m1"];
    let done = mxrewrite(root.path(), &args);
    assert_eq!(done.status.code(), Some(0), "{}", stderr(&done));
    let report: Value = serde_json::from_slice(&done.stdout).unwrap();
    let out = root.path().join("in.full-fp4_e2m1");
    assert_eq!(report["output"], "in.full-fp4_e2m1");
    assert_eq!(report["library"], "in.full-fp4_e2m1/libmx_custom_ops.so");
    assert_eq!(report["models"][0]["output"], "in.full-fp4_e2m1/model.onnx");
    assert_eq!(report["models"][0]["sites"], 1);
    let mut want = vec!["extra/adapter.bin", "genai_config.json", "libmx_custom_ops.so"];
    #[cfg(unix)]
    want.push("linked.json");
    want.push("model.onnx");
    let data = report["models"][0]["data"].as_str().unwrap_or_default();
    if !data.is_empty() {
        assert_eq!(data, "in.full-fp4_e2m1/model.onnx.data");
        want.push("model.onnx.data");
    }
    want.push("tokenizer.json");
    assert_eq!(files(&out), want);
    let options = &read_config(&out)["model"]["decoder"]["session_options"];
    let wanted =
        json!({"log_id": "x", "provider_options": [], "custom_ops_library": "libmx_custom_ops.so"});
    assert_eq!(options, &wanted);
    assert_eq!(fs::read(root.path().join("in/model.onnx")).unwrap(), input);
    // The order of the fields is the input's.
    let text = fs::read_to_string(out.join("genai_config.json")).unwrap();
    assert!(text.find("session_options") < text.find("filename"), "{text}");
    #[cfg(unix)]
    {
        assert!(!out.join("linked.json").symlink_metadata().unwrap().is_symlink());
        use std::os::unix::fs::PermissionsExt as _;
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&out), mode(&root.path().join("in/extra")));
    }

    refused(root.path(), &args, &["in.full-fp4_e2m1", "--force"]);
    fs::write(out.join("stale"), "").unwrap();
    let done = mxrewrite(root.path(), &[&args[..], &["--force"]].concat());
    assert_eq!(done.status.code(), Some(0), "{}", stderr(&done));
    assert_eq!(files(&out), want);
    // Nothing temporary is left beside it.
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 3);
}

#[test]
fn a_plan_of_a_folder_writes_nothing() {
    let root = folder();
    let before = files(root.path());
    let done = mxrewrite(root.path(), &["--genai", "in", "--plan"]);
    assert_eq!(done.status.code(), Some(0), "{}", stderr(&done));
    assert!(String::from_utf8(done.stdout).unwrap().contains("model.layers.0.mlp.up_proj"));
    let done = mxrewrite(root.path(), &["--genai", "in", "--plan", "--json", "--no-sqnr"]);
    let plan: Value = serde_json::from_slice(&done.stdout).unwrap();
    assert_eq!(plan["models"][0]["file"], "model.onnx");
    assert_eq!(plan["models"][0]["plan"]["sites"].as_array().unwrap().len(), 1);
    assert_eq!(files(root.path()), before);
}

#[test]
fn targets_of_standard_operators_need_no_library() {
    let root = folder();
    let done = mxrewrite(root.path(), &["--genai", "in", "--lower", "int8", "-o", "out"]);
    assert_eq!(done.status.code(), Some(0), "{}", stderr(&done));
    let out = root.path().join("out");
    assert!(!out.join("libmx_custom_ops.so").exists());
    let input = read_config(&root.path().join("in"));
    assert_eq!(read_config(&out), input);
}

#[test]
fn other_models_come_along_with_the_data_that_they_need() {
    let root = folder();
    let dir = root.path().join("in");
    // The embedding's weights lie in the decoder's old data file.
    write(&dir, "embedding.onnx", &model(graph("MatMul", Some("old.data"))));
    let mut value = config(json!({"filename": "model.onnx"}));
    value["model"]["embedding"] = json!({"filename": "embedding.onnx"});
    put(&dir, &value);
    let args = ["--genai", "in", "--ops-library", "lib.so", "-o", "out"];
    let done = mxrewrite(root.path(), &args);
    assert_eq!(done.status.code(), Some(0), "{}", stderr(&done));
    assert!(stderr(&done).contains("embedding.onnx is copied unchanged"), "{}", stderr(&done));
    let out = root.path().join("out");
    for file in ["embedding.onnx", "old.data"] {
        assert_eq!(fs::read(out.join(file)).unwrap(), fs::read(dir.join(file)).unwrap());
    }
    // A file that is still needed and a rewritten model's cannot have one name.
    let data = weight("up", &[32, 48]).raw_data.unwrap();
    fs::write(dir.join("model.onnx.data"), data).unwrap();
    for name in ["model.onnx", "embedding.onnx"] {
        write(&dir, name, &model(graph("MatMul", Some("model.onnx.data"))));
    }
    let args = ["--genai", "in", "--ops-library", "lib.so", "-o", "two"];
    let done = mxrewrite(root.path(), &args);
    if done.status.success() {
        // Small weights may be inside the rewritten model; then nothing collides.
        assert!(root.path().join("two/model.onnx.data").exists());
    } else {
        assert!(stderr(&done).contains("'model.onnx.data' is needed"), "{}", stderr(&done));
    }
}

#[test]
fn stages_of_a_pipeline_are_rewritten_where_they_have_layers() {
    let root = folder();
    let dir = root.path().join("in");
    write(&dir, "embed.onnx", &model(graph("Add", None)));
    let pipeline = json!([
        {"embed": {"filename": "embed.onnx"}},
        {"body": {"filename": "model.onnx", "session_options": {}}},
    ]);
    put(&dir, &config(json!({"pipeline": pipeline})));
    let done = mxrewrite(root.path(), &["--genai", "in", "--ops-library", "lib.so", "-o", "out"]);
    assert_eq!(done.status.code(), Some(0), "{}", stderr(&done));
    let out = root.path().join("out");
    assert_eq!(
        fs::read(out.join("embed.onnx")).unwrap(),
        fs::read(dir.join("embed.onnx")).unwrap()
    );
    let decoder = &read_config(&out)["model"]["decoder"];
    let library = &decoder["pipeline"][1]["body"]["session_options"]["custom_ops_library"];
    assert_eq!(library, "libmx_custom_ops.so");
    assert_eq!(decoder["session_options"], Value::Null);
}

/// A stage that was quantised by others, and one that an earlier run rewrote.
#[test]
fn stages_with_operators_of_their_own_keep_what_they_need() {
    let root = folder();
    let dir = root.path().join("in");
    write(&dir, "int4.onnx", &model(graph("MatMulNBits", None)));
    let mx = json!({"custom_ops_library": "libmx_custom_ops.so"});
    let pipeline = json!([
        {"int4": {"filename": "int4.onnx", "session_options": mx}},
        {"body": {"filename": "model.onnx"}},
    ]);
    put(&dir, &config(json!({"pipeline": pipeline})));
    fs::write(dir.join("libmx_custom_ops.so"), "an earlier library").unwrap();
    let done = mxrewrite(root.path(), &["--genai", "in", "--plan", "--json"]);
    assert_eq!(done.status.code(), Some(0), "{}", stderr(&done));
    let plan: Value = serde_json::from_slice(&done.stdout).unwrap();
    let sites = |i: usize| plan["models"][i]["plan"]["sites"].as_array().map(Vec::len);
    assert_eq!((sites(0), sites(1)), (Some(0), Some(1)));
    let library =
        |out: &str| fs::read_to_string(root.path().join(out).join("libmx_custom_ops.so")).unwrap();
    let int8 = ["--genai", "in", "--lower", "int8", "-o", "int8"];
    let done = mxrewrite(root.path(), &int8);
    assert_eq!(done.status.code(), Some(0), "{}", stderr(&done));
    assert_eq!(library("int8"), "an earlier library");
    let mx = ["--genai", "in", "--ops-library", "lib.so", "-o", "mx"];
    let done = mxrewrite(root.path(), &mx);
    assert_eq!(done.status.code(), Some(0), "{}", stderr(&done));
    assert_eq!(library("mx"), "library");
}

/// A folder whose copy takes a while, and the command that rewrites it, wrapped in a shell's `before`.
#[cfg(unix)]
fn slow(before: &str) -> (tempfile::TempDir, Command) {
    let root = folder();
    // A text, which is copied and not linked, and long enough to be met on the way.
    let large = fs::File::create(root.path().join("in/large.txt")).unwrap();
    large.set_len(400 << 20).unwrap();
    let mut command = Command::new("sh");
    let script = format!("{before} exec \"$0\" --genai in --ops-library lib.so -o out");
    command.current_dir(root.path()).args(["-c", &script]).arg(support::mxrewrite());
    command.stderr(std::process::Stdio::piped()).stdout(std::process::Stdio::null());
    (root, command)
}

/// Sends a signal once the output is begun; the exit code and what was said.
#[cfg(unix)]
fn signalled(root: &Path, command: &mut Command, signal: &str) -> (Option<i32>, String) {
    use std::time::{Duration, Instant};
    let child = command.spawn().unwrap();
    let start = Instant::now();
    let begun = || {
        let mut entries = fs::read_dir(root).unwrap().map(|entry| entry.unwrap());
        entries.any(|e| e.file_name().to_string_lossy().starts_with(".mxrewrite-"))
            || root.join("out").exists()
    };
    while !begun() {
        assert!(start.elapsed() < Duration::from_secs(60), "no folder was begun");
        std::thread::sleep(Duration::from_millis(1));
    }
    let pid = child.id().to_string();
    // A process that has ended meanwhile is still there until it is waited for.
    assert!(Command::new("kill").args([signal, &pid]).status().unwrap().success());
    let done = child.wait_with_output().unwrap();
    (done.status.code(), stderr(&done))
}

/// Ctrl-C, SIGTERM and a closed terminal leave the input and nothing else, or the whole output.
#[cfg(unix)]
#[test]
fn an_interrupted_rewrite_leaves_nothing() {
    let mut met = 0;
    for signal in ["-TERM", "-HUP", "-TERM", "-HUP", "-TERM", "-HUP"] {
        let (root, mut command) = slow("");
        let before = files(root.path());
        let (code, said) = signalled(root.path(), &mut command, signal);
        if code == Some(0) {
            // It was faster than the signal.
            assert_eq!(files(&root.path().join("out")).len(), 6, "{signal}");
            continue;
        }
        assert_eq!(code, Some(130), "{signal}: {said}");
        assert_eq!(files(root.path()), before, "{signal}");
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 2);
        met += 1;
    }
    assert!(met > 0, "every signal came too late");
}

/// Under `nohup` a closed terminal ends nothing.
#[cfg(unix)]
#[test]
fn signals_that_the_parent_ignores_stay_ignored() {
    let (root, mut command) = slow("trap '' HUP;");
    let (code, said) = signalled(root.path(), &mut command, "-HUP");
    assert_eq!(code, Some(0), "{said}");
    assert!(root.path().join("out/large.txt").exists());
}

#[test]
fn hostile_folders_are_refused_by_name() {
    let args = ["--genai", "in", "--ops-library", "lib.so", "-o", "out"];
    let wrong = |config: &str, words: &[&str]| {
        let root = folder();
        fs::write(root.path().join("in/genai_config.json"), config).unwrap();
        refused(root.path(), &args, &[&["in/genai_config.json"], words].concat());
    };
    wrong("{", &["JSON"]);
    wrong("", &["JSON"]);
    wrong("[]", &["model.decoder"]);
    wrong(r#"{"model": {}}"#, &["model.decoder"]);
    wrong(r#"{"model": {"decoder": {}}}"#, &["model.decoder.filename"]);
    for name in ["../in/model.onnx", "/etc/passwd", "..", ""] {
        let config = config(json!({"filename": name}));
        wrong(&config.to_string(), &["model.decoder.filename"]);
    }
    let options = json!({"custom_ops_library": "theirs.so"});
    let theirs = config(json!({"filename": "model.onnx", "session_options": options}));
    wrong(&theirs.to_string(), &["session_options.custom_ops_library", "theirs.so"]);
    let listed = config(json!({"filename": "model.onnx", "session_options": []}));
    wrong(&listed.to_string(), &["model.decoder.session_options"]);

    let root = folder();
    put(&root.path().join("in"), &config(json!({"filename": "gone.onnx"})));
    refused(root.path(), &args, &["in/gone.onnx"]);
    write(&root.path().join("in"), "gone.onnx", &model(graph("MatMulNBits", None)));
    refused(root.path(), &args, &["in/gone.onnx", "MatMulNBits", "-p fp32"]);
    fs::remove_file(root.path().join("in/genai_config.json")).unwrap();
    refused(root.path(), &args, &["in/genai_config.json"]);
    refused(root.path(), &["--genai", "none", "--ops-library", "lib.so"], &["none"]);
}

#[test]
fn outputs_that_would_do_harm_are_refused() {
    let root = folder();
    let library = ["--ops-library", "lib.so"];
    for out in ["in", "in/out", ".", "in/../in"] {
        let args = [&["--genai", "in", "-o", out, "--force"], &library[..]].concat();
        refused(root.path(), &args, &["cannot write"]);
    }
    fs::create_dir(root.path().join("home")).unwrap();
    fs::write(root.path().join("home/letter"), "").unwrap();
    let args = [&["--genai", "in", "-o", "home", "--force"], &library[..]].concat();
    refused(root.path(), &args, &["home", "does not say that mxrewrite made it"]);
    // A folder of the builder's is somebody's only copy.
    fs::create_dir(root.path().join("theirs")).unwrap();
    for file in ["genai_config.json", "model.onnx", "tokenizer.json"] {
        fs::copy(root.path().join("in").join(file), root.path().join("theirs").join(file)).unwrap();
    }
    let args = [&["--genai", "in", "-o", "theirs", "--force"], &library[..]].concat();
    refused(root.path(), &args, &["theirs", "does not say that mxrewrite made it"]);
    let missing = ["--genai", "in", "-o", "out", "--ops-library", "none.so"];
    refused(root.path(), &missing, &["none.so", "MX_OPS_LIBRARY"]);
    let done = mxrewrite(root.path(), &["in/model.onnx", "--ops-library", "lib.so"]);
    assert_eq!(done.status.code(), Some(2), "{}", stderr(&done));
    let done = mxrewrite(root.path(), &["in/model.onnx", "--genai", "in"]);
    assert_eq!(done.status.code(), Some(2), "{}", stderr(&done));
}

/// examples/generate.py with a KV cache against the same weights without one, and GenAI's folder in it.
#[test]
fn generation_with_a_cache_is_generation_without_one() {
    let stdout = support::script("test_generate.py", |_| ());
    assert!(stdout.is_none_or(|text| text.contains("all checks passed")));
}
