//! Large models: what a rewrite keeps in memory, what a kill leaves behind, what nothing changes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use mxrewrite::onnx::{Model, TensorInfo};
use prost::Message as _;

use crate::models::{GraphProto, external, model, node, value, weight, write};
use crate::support;

/// A chain of layers with their weights, `size` x `size`, in one external file.
fn layers(folder: &Path, count: usize, size: usize) -> PathBuf {
    let location = "m.onnx.weights";
    let mut data = Vec::with_capacity(count * size * size * 4);
    let mut graph = GraphProto {
        input: vec![value("x0", 2)],
        output: vec![value(&format!("x{count}"), 2)],
        ..GraphProto::default()
    };
    for index in 0..count {
        let name = format!("model.layers.{index}.mlp.up_proj.weight");
        let mut tensor = external(weight(&name, &[0, 0]), location);
        tensor.dims = vec![size as i64; 2];
        for (key, value) in [("offset", data.len()), ("length", size * size * 4)] {
            let mut entry = tensor.external_data[0].clone();
            (entry.key, entry.value) = (Some(key.into()), Some(value.to_string()));
            tensor.external_data.push(entry);
        }
        let values = (0..size * size).map(|i| (i * 7919 + index) as f32 % 1009.0 / 500.0 - 1.0);
        data.extend(values.flat_map(f32::to_le_bytes));
        graph.initializer.push(tensor);
        let (x, y) = (format!("x{index}"), format!("x{}", index + 1));
        graph.node.push(node("MatMul", &format!("/up{index}"), &[&x, &name], &[&y]));
    }
    fs::write(folder.join(location), data).unwrap();
    // Pages that wait to be written count as private dirty memory of whoever maps them.
    fs::File::open(folder.join(location)).unwrap().sync_all().unwrap();
    write(folder, "m.onnx", &model(graph))
}

fn start(input: &Path, output: &Path, more: &[&str]) -> Child {
    let mut command = Command::new(support::mxrewrite());
    command.arg(input).arg("-o").arg(output).args(["--threads", "2"]).args(more);
    command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}

fn finish(child: Child) {
    let done = child.wait_with_output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
}

/// Every tensor of a model can be read.
fn loads(path: &Path) {
    let model = Model::open(path).unwrap();
    let tensors: Vec<_> = model.graph().initializers().map(|t| model.tensor(t).unwrap()).collect();
    assert!(!tensors.is_empty());
}

#[test]
fn a_kill_at_any_moment_leaves_no_broken_model_and_can_be_taken_up() {
    let folder = tempfile::tempdir().unwrap();
    let input = layers(folder.path(), 24, 1024);
    let whole = folder.path().join("whole.onnx");
    let begun = Instant::now();
    // A layer that stays keeps its weight external, and so the output has a data file.
    let keep = ["--exclude", r"layers\.5\."];
    finish(start(&input, &whole, &keep));
    let took = begun.elapsed();
    let data_of = |path: &Path| PathBuf::from(format!("{}.data", path.display()));
    // Names of data files are in the model: the same name elsewhere gives the same bytes.
    let expected = [fs::read(&whole).unwrap(), fs::read(data_of(&whole)).unwrap()];
    let other = folder.path().join("other");
    fs::create_dir(&other).unwrap();
    let output = other.join("whole.onnx");
    let mut left = 0;
    for attempt in 0..10_u32 {
        for file in fs::read_dir(&other).unwrap() {
            fs::remove_file(file.unwrap().path()).unwrap();
        }
        let mut child = start(&input, &output, &keep);
        // Spread over the run by the golden ratio.
        let moment = f64::from(attempt + 1) * 0.618_034 % 1.0;
        std::thread::sleep(took.mul_f64(moment));
        child.kill().unwrap();
        child.wait().unwrap();
        left += usize::from(fs::read_dir(&other).unwrap().count() > 0 && !output.exists());
        if output.exists() {
            loads(&output);
            continue;
        }
        finish(start(&input, &output, &[keep[0], keep[1], "--resume"]));
        let got = [fs::read(&output).unwrap(), fs::read(data_of(&output)).unwrap()];
        assert!(got == expected, "attempt {attempt}: other bytes than an uninterrupted run");
        assert_eq!(fs::read_dir(&other).unwrap().count(), 2, "nothing else is left");
    }
    println!("{left} of 10 kills left something to take up; a run takes {took:?}");
}

/// Peak private dirty memory of a process in bytes, by sampling.
#[cfg(target_os = "linux")]
fn peak_private(child: &mut Child) -> u64 {
    let path = format!("/proc/{}/smaps_rollup", child.id());
    let mut peak = 0;
    while child.try_wait().unwrap().is_none() {
        let text = fs::read_to_string(&path).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("Private_Dirty:"));
        let kb = line.and_then(|l| l.trim().strip_suffix(" kB")?.parse::<u64>().ok());
        peak = peak.max(kb.unwrap_or(0) * 1024);
        std::thread::sleep(Duration::from_millis(5));
    }
    peak
}

#[cfg(target_os = "linux")]
#[test]
fn memory_does_not_grow_with_a_tensor() {
    let folder = tempfile::tempdir().unwrap();
    // 256 MiB in one tensor, 64 MiB of codes.
    let input = layers(folder.path(), 1, 8192);
    let mut child = start(&input, &folder.path().join("o.onnx"), &[]);
    let peak = peak_private(&mut child);
    finish(child);
    println!("peak private memory: {} MB", peak / 1_000_000);
    assert!(peak > 0, "not measured");
    assert!(peak < 328_000_000, "{peak} bytes");
}

fn unchanged(input: &Path, folder: &Path) {
    let output = folder.join("same.onnx");
    finish(start(input, &output, &["--exclude", ".*", "--allow-empty", "--force"]));
    let (a, b) = (Model::open(input).unwrap(), Model::open(&output).unwrap());
    if !a.has_external_data().unwrap() {
        assert!(fs::read(input).unwrap() == fs::read(&output).unwrap(), "{}", input.display());
        return;
    }
    let nodes = |m: &Model| m.graph().nodes().map(|(_, n)| n.encode_to_vec()).collect::<Vec<_>>();
    assert!(nodes(&a) == nodes(&b), "{}: nodes", input.display());
    let metadata =
        |m: &Model| m.metadata().map(|(k, v)| (k.to_owned(), v.to_owned())).collect::<Vec<_>>();
    assert_eq!(metadata(&a), metadata(&b), "{}", input.display());
    let list = |m: &Model| m.graph().initializers().cloned().collect::<Vec<TensorInfo>>();
    let (of_a, of_b) = (list(&a), list(&b));
    assert_eq!(of_a.len(), of_b.len());
    for (x, y) in of_a.iter().zip(&of_b) {
        assert_eq!((&x.name, &x.dims, x.raw_type), (&y.name, &y.dims, y.raw_type));
        let same = a.tensor(x).unwrap().bytes == b.tensor(y).unwrap().bytes;
        assert!(same, "{}: '{}'", input.display(), x.name);
    }
}

#[test]
fn zero_sites_leave_every_byte_as_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let plain = layers(folder.path(), 3, 64);
    // Metadata of others, and of an earlier rewrite, stay.
    let mut model = Model::open(&plain).unwrap();
    model.set_metadata("author", "someone");
    model.set_metadata(mxrewrite::rewrite::SHA256_KEY, "{}");
    let input = folder.path().join("with.onnx");
    fs::write(&input, model.to_bytes().unwrap()).unwrap();
    unchanged(&input, folder.path());
    let Some(zoo) = support::shared().map(|shared| shared.join("zoo")).filter(|zoo| zoo.is_dir())
    else {
        return support::skip("zoo", "no ../shared/zoo");
    };
    let mut seen = 0;
    for entry in fs::read_dir(zoo).unwrap() {
        let model = entry.unwrap().path().join("model.onnx");
        if model.is_file() {
            unchanged(&model, folder.path());
            seen += 1;
        }
    }
    println!("{seen} models of the zoo are unchanged");
    assert!(seen > 0);
}
