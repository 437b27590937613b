//! Models on disk: external data in and out, and outputs that are whole or not there.

use super::shell::linear;
use crate::onnx::proto::{Attribute, StringStringEntry, Tensor};
use crate::onnx::testing::ModelBuilder;
use crate::onnx::{DataType, Error, Model, Payload, SaveOptions, Sink, Storage, TensorInfo};
use sha2::Digest as _;
use std::path::{Path, PathBuf};

const FORCE: SaveOptions = SaveOptions { overwrite: true, ..SaveOptions::DEFAULT };

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

fn external(tensor: &mut Tensor, entries: &[(&str, &str)]) {
    tensor.raw_data = None;
    tensor.data_location = Some(1);
    tensor.external_data = entries
        .iter()
        .map(|(key, value)| StringStringEntry {
            key: Some((*key).into()),
            value: Some((*value).into()),
        })
        .collect();
}

fn with_external(entries: &[(&str, &str)]) -> ModelBuilder {
    let mut builder = linear();
    external(&mut builder.initializers[0], entries);
    builder
}

fn weights() -> Vec<u8> {
    (1..=6).flat_map(|v| (v as f32).to_le_bytes()).collect()
}

fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut names: Vec<_> =
        entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn read_w(path: &Path) -> Result<Vec<f32>, Error> {
    let model = Model::open(path)?;
    let view = model.tensor(model.graph().initializer("w").unwrap())?;
    view.to_f32()
}

fn write(path: PathBuf, builder: &ModelBuilder) -> PathBuf {
    std::fs::write(&path, builder.bytes()).unwrap();
    path
}

#[test]
fn external_data_is_read_where_it_lies() {
    let dir = folder();
    let mut data = vec![9u8; 5];
    data.extend(weights());
    std::fs::create_dir(dir.path().join("sub")).unwrap();
    std::fs::write(dir.path().join("sub/w.bin"), data).unwrap();
    std::fs::write(dir.path().join("whole"), weights()).unwrap();
    // Offsets are not aligned; an entry may name the file alone.
    let cases: [&[(&str, &str)]; 3] = [
        &[("location", "sub/w.bin"), ("offset", "5"), ("length", "24"), ("checksum", "x")],
        &[("location", "./sub/w.bin"), ("offset", "5")],
        &[("location", "whole")],
    ];
    for entries in cases {
        let path = write(dir.path().join("m.onnx"), &with_external(entries));
        assert_eq!(read_w(&path).unwrap(), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    }
}

#[test]
fn external_data_that_lies_is_refused() {
    let outer = folder();
    let dir = outer.path().join("model");
    std::fs::create_dir(&dir).unwrap();
    std::fs::write(outer.path().join("secret"), weights()).unwrap();
    std::fs::write(dir.join("w"), weights()).unwrap();
    std::os::unix::fs::symlink(outer.path().join("secret"), dir.join("link")).unwrap();
    std::os::unix::fs::symlink(outer.path(), dir.join("up")).unwrap();
    std::os::unix::fs::symlink("w", dir.join("inside")).unwrap();
    let secret = outer.path().join("secret").to_str().unwrap().to_owned();
    let cases: [(&[(&str, &str)], &str); 13] = [
        (&[("location", "../secret")], "'..'"),
        (&[("location", "sub/../../secret")], "'..'"),
        (&[("location", &secret)], "absolute"),
        (&[("location", "link")], "symbolic link"),
        (&[("location", "up/secret")], "symbolic link"),
        (&[("location", "missing.data")], "missing"),
        (&[("location", "")], "no location"),
        (&[], "no location"),
        (&[("location", ".")], "directory"),
        (&[("location", "w"), ("offset", "25")], "has 24 bytes"),
        (&[("location", "w"), ("offset", "4")], "holds 20 bytes"),
        (&[("location", "w"), ("offset", "8"), ("length", "24")], "cut off"),
        (&[("location", "w"), ("offset", "8"), ("length", "18446744073709551615")], "cut off"),
    ];
    for (entries, text) in cases {
        let path = write(dir.join("m.onnx"), &with_external(entries));
        let error = read_w(&path).unwrap_err().to_string();
        assert!(error.contains("tensor 'w'") && error.contains(text), "{entries:?}: {error}");
        assert!(!error.contains('\n'), "{error}");
        // Nor does it get into an output.
        assert!(Model::open(&path).unwrap().save(dir.join("out.onnx"), &FORCE).is_err());
        assert!(!dir.join("out.onnx").exists() && !dir.join("out.onnx.data").exists());
    }
    let path = write(dir.join("m.onnx"), &with_external(&[("location", "inside")]));
    assert!(read_w(&path).is_ok());
    for bad in ["-1", "x", "99999999999999999999"] {
        let path = write(dir.join("m.onnx"), &with_external(&[("location", "w"), ("offset", bad)]));
        let error = Model::open(&path).unwrap_err().to_string();
        assert!(error.contains("not a length in bytes at byte"), "{error}");
    }
    let mut memory = with_external(&[("location", "w")]);
    memory.opset = 18;
    let model = memory.model();
    let error = model.tensor(model.graph().initializer("w").unwrap()).unwrap_err().to_string();
    assert!(error.contains("loaded from memory"), "{error}");
}

#[test]
fn what_is_no_file_is_refused() {
    let dir = folder();
    let error = Model::open(dir.path()).unwrap_err().to_string();
    assert!(error.contains("directory"), "{error}");
    let error = Model::open(dir.path().join("missing.onnx")).unwrap_err().to_string();
    assert!(error.contains("cannot open") && error.contains("missing.onnx"), "{error}");
    std::fs::write(dir.path().join("empty.onnx"), b"").unwrap();
    let error = Model::open(dir.path().join("empty.onnx")).unwrap_err().to_string();
    assert!(error.contains("empty.onnx': not a valid ONNX model: the file is empty"), "{error}");
}

#[test]
fn inline_models_stay_inline_and_external_ones_move_together() {
    let dir = folder();
    let path = write(dir.path().join("m.onnx"), &linear());
    let saved =
        Model::open(&path).unwrap().save(dir.path().join("o.onnx"), &SaveOptions::default());
    assert_eq!(saved.unwrap().data_path, None);
    assert_eq!(std::fs::read(dir.path().join("o.onnx")).unwrap(), linear().bytes());

    std::fs::write(dir.path().join("w"), weights()).unwrap();
    let mut builder = with_external(&[("location", "w")]).floats("big", &[400], &[0.5; 400]);
    // A constant in a node's attribute may be external, too.
    let mut constant = builder.initializers[0].clone();
    constant.name = Some("c".into());
    builder = builder.node("Constant", &[], &["c"]).with(|node| {
        node.attribute.push(Attribute {
            name: Some("value".into()),
            t: Some(constant),
            ..Attribute::default()
        });
    });
    let path = write(dir.path().join("e.onnx"), &builder);
    let away = folder();
    let output = away.path().join("o.onnx");
    let saved = Model::open(&path).unwrap().save(&output, &SaveOptions::default()).unwrap();
    assert_eq!(saved.data_path, Some(away.path().join("o.onnx.data")));
    assert_eq!(names(away.path()), ["o.onnx", "o.onnx.data"]);
    let total: u64 = ["o.onnx", "o.onnx.data"]
        .map(|name| away.path().join(name).metadata().unwrap().len())
        .iter()
        .sum();
    assert_eq!(saved.bytes, total);
    assert_eq!(read_w(&output).unwrap(), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    let model = Model::open(&output).unwrap();
    let big = model.graph().initializer("big").unwrap();
    assert!(big.is_external());
    assert_eq!(model.tensor(big).unwrap().to_f32().unwrap(), [0.5; 400]);
    let node = model.graph().nodes().last().unwrap().1;
    let constant = node.attribute[0].t.as_ref().unwrap();
    let entry = |key: &str| {
        let found = constant.external_data.iter().find(|e| e.key.as_deref() == Some(key));
        found.unwrap().value.clone().unwrap()
    };
    assert_eq!(entry("location"), "o.onnx.data");
    assert_eq!(entry("offset").parse::<u64>().unwrap() % 4096, 0);
    // Untouched parts are the input's.
    let again =
        Model::open(&output).unwrap().save(away.path().join("p.onnx"), &SaveOptions::default());
    let (o, p) = (std::fs::read(&output).unwrap(), std::fs::read(again.unwrap().path).unwrap());
    assert_eq!(o.len(), p.len());
}

#[test]
fn large_models_get_a_data_file() {
    let dir = folder();
    let model = linear().floats("big", &[400], &[0.25; 400]).model();
    let output = dir.path().join("o.onnx");
    let options = SaveOptions { inline_limit: 1000, ..SaveOptions::default() };
    let saved = model.save(&output, &options).unwrap();
    assert!(saved.data_path.is_some());
    let model = Model::open(&output).unwrap();
    assert!(!model.graph().initializer("w").unwrap().is_external());
    let big = model.graph().initializer("big").unwrap();
    assert_eq!(model.tensor(big).unwrap().to_f32().unwrap(), [0.25; 400]);
}

#[test]
fn outputs_never_replace_their_input() {
    let dir = folder();
    std::fs::write(dir.path().join("w"), weights()).unwrap();
    let path = write(dir.path().join("m.onnx"), &with_external(&[("location", "w")]));
    let original = std::fs::read(&path).unwrap();
    std::fs::hard_link(&path, dir.path().join("hard.onnx")).unwrap();
    std::os::unix::fs::symlink("m.onnx", dir.path().join("soft.onnx")).unwrap();
    std::fs::hard_link(dir.path().join("w"), dir.path().join("x.onnx.data")).unwrap();
    let before = names(dir.path());
    let model = Model::open(&path).unwrap();
    for (target, text) in [
        ("m.onnx", "is the input"),
        ("./m.onnx", "is the input"),
        ("hard.onnx", "is the input"),
        ("soft.onnx", "is the input"),
        ("w", "input's weights"),
        ("x.onnx", "input's weights"),
        ("missing/o.onnx", "does not exist"),
        (".", "folder"),
        ("..", "not the name of a file"),
    ] {
        let error = model.save(dir.path().join(target), &FORCE).unwrap_err().to_string();
        assert!(error.contains(text), "{target}: {error}");
    }
    assert_eq!(names(dir.path()), before);
    assert_eq!(std::fs::read(&path).unwrap(), original);
}

#[test]
fn existing_outputs_need_force() {
    let dir = folder();
    let output = dir.path().join("o.onnx");
    std::fs::write(&output, b"mine").unwrap();
    let model = linear().model();
    let error = model.save(&output, &SaveOptions::default()).unwrap_err().to_string();
    assert!(error.contains("exists already"), "{error}");
    assert_eq!(std::fs::read(&output).unwrap(), b"mine");
    model.save(&output, &FORCE).unwrap();
    assert_eq!(std::fs::read(&output).unwrap(), linear().bytes());
    assert_eq!(names(dir.path()), ["o.onnx"]);
}

#[test]
fn a_failure_leaves_nothing_behind() {
    let dir = folder();
    let fail = || Err(Error::Payload { tensor: "codes".into(), what: "no luck".into() });
    let payload = Payload::Lazy { len: 5000, make: std::sync::Arc::new(fail) };
    let mut model = linear().model();
    model.graph_mut().add_initializer(TensorInfo::new(
        "codes",
        vec![5000],
        DataType::Uint8,
        payload,
    ));
    for inline_limit in [1_800_000_000, 100] {
        let options = SaveOptions { inline_limit, ..SaveOptions::DEFAULT };
        let error = model.save(dir.path().join("o.onnx"), &options).unwrap_err().to_string();
        assert!(error.contains("no luck"), "{error}");
        assert_eq!(names(dir.path()), Vec::<String>::new());
    }
}

/// A model with three made tensors; `broken` names one that stops the process's run half-way.
fn streamed(broken: Option<usize>) -> Model {
    let mut model = linear().model();
    for index in 0..3usize {
        let write = move |sink: &mut Sink<'_>| {
            for piece in 0..5u8 {
                sink(vec![piece + index as u8 * 16; 1000].into())?;
                assert!(broken != Some(index) || piece < 3, "killed");
            }
            Ok(())
        };
        let payload = Payload::Stream { len: 5000, write: std::sync::Arc::new(write) };
        let info = TensorInfo::new(format!("t{index}"), vec![5000], DataType::Uint8, payload);
        model.graph_mut().add_initializer(info);
    }
    model
}

/// Copies the model to a file first, since only what is made from files is taken up again.
fn saved_from_file(dir: &Path, broken: Option<usize>, options: &SaveOptions) -> crate::onnx::Saved {
    let path = dir.join("in.onnx");
    if !path.exists() {
        write(path.clone(), &linear());
    }
    let mut model = streamed(broken);
    model.path = Some(path);
    model.save(dir.join("o.onnx"), options).unwrap()
}

const SMALL: SaveOptions =
    SaveOptions { inline_limit: 1000, hash_key: Some("sha"), ..SaveOptions::DEFAULT };

#[test]
fn a_killed_run_is_taken_up_and_ends_with_the_same_bytes() {
    let whole = folder();
    saved_from_file(whole.path(), None, &SMALL);
    let read = |dir: &Path, name: &str| std::fs::read(dir.join(name)).unwrap();
    let hash = {
        let model = Model::open(whole.path().join("o.onnx")).unwrap();
        model.metadata().find(|(key, _)| *key == "sha").unwrap().1.to_owned()
    };
    let file = whole.path().join("o.onnx.data");
    let digest = sha2::Sha256::digest(std::fs::read(file).unwrap());
    let expected: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(hash, format!("{{\"o.onnx.data\":\"{expected}\"}}"));
    for broken in 0..3 {
        for damage in ["none", "cut journal", "cut data", "other bytes", "other job"] {
            let dir = folder();
            let path = dir.path().to_owned();
            // A panic unwinds past the removal of partial files, as a kill does.
            let run = move || saved_from_file(&path, Some(broken), &SMALL);
            assert!(std::panic::catch_unwind(run).is_err());
            let [partial, journal] =
                ["partial", "journal"].map(|end| dir.path().join(format!("o.onnx.data.{end}")));
            assert_eq!(
                names(dir.path()),
                ["in.onnx", "o.onnx.data.journal", "o.onnx.data.partial"]
            );
            let notes = std::fs::read_to_string(&journal).unwrap();
            assert_eq!(notes.lines().count(), 1 + broken, "{notes}");
            let mut data = std::fs::read(&partial).unwrap();
            match damage {
                "cut journal" => std::fs::write(&journal, &notes[..notes.len() - 9]).unwrap(),
                "cut data" => std::fs::write(&partial, &data[..data.len() / 2]).unwrap(),
                "other bytes" if !data.is_empty() => {
                    data[0] ^= 1;
                    std::fs::write(&partial, data).unwrap();
                }
                "other job" => {
                    std::fs::write(&journal, notes.replace("journal 1 ", "journal 1 0")).unwrap();
                }
                _ => {}
            }
            let resume = SaveOptions { resume: true, ..SMALL };
            saved_from_file(dir.path(), None, &resume);
            assert_eq!(names(dir.path()), ["in.onnx", "o.onnx", "o.onnx.data"]);
            for name in ["o.onnx", "o.onnx.data"] {
                assert_eq!(read(dir.path(), name), read(whole.path(), name), "{broken} {damage}");
            }
        }
    }
}

#[test]
fn a_run_killed_between_its_two_names_is_taken_up() {
    let dir = folder();
    saved_from_file(dir.path(), None, &SMALL);
    let whole = std::fs::read(dir.path().join("o.onnx")).unwrap();
    std::fs::remove_file(dir.path().join("o.onnx")).unwrap();
    let refused = streamed(None).save(dir.path().join("o.onnx"), &SMALL).unwrap_err().to_string();
    assert!(refused.contains("exists already"), "{refused}");
    std::fs::write(dir.path().join("o.onnx.data.journal"), "mxrewrite-journal 1 x\n").unwrap();
    saved_from_file(dir.path(), None, &SaveOptions { resume: true, ..SMALL });
    assert_eq!(std::fs::read(dir.path().join("o.onnx")).unwrap(), whole);
    assert_eq!(names(dir.path()), ["in.onnx", "o.onnx", "o.onnx.data"]);
}

#[test]
fn two_runs_do_not_write_one_file() {
    let dir = folder();
    let partial = std::fs::File::create(dir.path().join("o.onnx.data.partial")).unwrap();
    rustix::fs::flock(&partial, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let error = streamed(None).save(dir.path().join("o.onnx"), &SMALL).unwrap_err().to_string();
    assert!(error.contains("another run"), "{error}");
    assert_eq!(names(dir.path()), ["o.onnx.data.partial"], "which is the other run's");
}

#[test]
fn shards_hold_whole_tensors_and_stay_below_their_size() {
    let dir = folder();
    let options = SaveOptions { shard_size: Some(14_000), ..SMALL };
    let saved = saved_from_file(dir.path(), None, &options);
    let files = ["o.onnx.data-1", "o.onnx.data-2"];
    assert_eq!(saved.data_paths, files.map(|name| dir.path().join(name)));
    assert_eq!(names(dir.path()), ["in.onnx", "o.onnx", files[0], files[1]]);
    let model = Model::open(dir.path().join("o.onnx")).unwrap();
    for index in 0..3 {
        let info = model.graph().initializer(&format!("t{index}")).unwrap();
        let Storage::External(place) = &info.storage else { panic!("inline") };
        assert_eq!((place.offset % 4096, place.location.as_str()), (0, files[index / 2]));
        let bytes = model.tensor(info).unwrap().bytes;
        assert!(bytes.iter().enumerate().all(|(i, &b)| usize::from(b) == index * 16 + i / 1000));
    }
    assert!(files.iter().all(|file| dir.path().join(file).metadata().unwrap().len() <= 14_000));
}
