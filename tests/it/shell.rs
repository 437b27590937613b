//! Models of real exporters, through the reader and the writer.

use std::path::{Path, PathBuf};

use mxrewrite::onnx::Model;

use crate::support;

/// Every .onnx file under `folder`.
fn models(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        let Ok(entries) = std::fs::read_dir(&folder) else { continue };
        for entry in entries.flatten() {
            let path = entry.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|ext| ext == "onnx") {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

fn round_trips(folder: &Path) -> usize {
    let paths = models(folder);
    for path in &paths {
        let name = path.display();
        let model = Model::open(path).unwrap_or_else(|error| panic!("{error}"));
        let original = std::fs::read(path).unwrap();
        assert!(model.to_bytes().unwrap() == original, "{name} is not written back as it was read");
        for tensor in model.graph().initializers() {
            let view = model.tensor(tensor).unwrap_or_else(|error| panic!("{name}: {error}"));
            assert_eq!(view.bytes.len() as u64, tensor.byte_len().unwrap(), "{name}");
        }
    }
    paths.len()
}

#[test]
fn fixtures_are_written_back_byte_for_byte() {
    println!("{} models", round_trips(&support::root().join("fixtures")));
}

#[test]
fn zoo_models_are_written_back_byte_for_byte() {
    match support::shared() {
        Some(shared) => {
            let count = round_trips(&shared.join("zoo"));
            assert!(count >= 31, "only {count} models in the zoo");
        }
        None => support::skip("shared", "no shared/zoo beside the checkout"),
    }
}
