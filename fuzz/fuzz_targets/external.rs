//! External data: what the first bytes say is a model's length; the rest of the input is its data file `d`.
#![no_main]

use std::{path::PathBuf, sync::LazyLock};

use libfuzzer_sys::fuzz_target;
use mxrewrite::{
    onnx::Model,
    rewrite::{self, RewriteOptions, Tier},
};

static FOLDER: LazyLock<PathBuf> = LazyLock::new(|| {
    let folder = std::env::temp_dir().join(format!("mxrewrite-fuzz-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder for temporary files");
    folder
});

fuzz_target!(|bytes: &[u8]| {
    let Some((length, rest)) = bytes.split_first_chunk::<2>() else { return };
    let (model, data) = rest.split_at(usize::from(u16::from_le_bytes(*length)).min(rest.len()));
    let (input, output) = (FOLDER.join("m.onnx"), FOLDER.join("out.onnx"));
    if Model::from_bytes(bytes::Bytes::copy_from_slice(model), None).is_err() {
        return;
    }
    std::fs::write(FOLDER.join("d"), data).expect("space for the data file");
    std::fs::write(&input, model).expect("space for the model");
    let options = RewriteOptions {
        tier: Tier::AllLinears,
        threads: Some(1),
        overwrite: true,
        allow_empty: true,
        shard_size: data.first().map(|&size| u64::from(size) * 64 + 1),
        ..RewriteOptions::default()
    };
    match rewrite::rewrite_file(&input, &output, &options) {
        Ok(report) => {
            let model = Model::open(&report.output).expect("a written model is read again");
            for info in model.graph().initializers() {
                assert!(info.data_type().is_none() || model.tensor(info).is_ok() || !info.is_external());
            }
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
    assert_eq!(std::fs::read(FOLDER.join("d")).expect("the input is there"), data, "the input was touched");
});
