//! `mxrewrite --checkpoint`: names by content, packed weights as they are, files that lie.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use mxrewrite::onnx::{DataType, Model};
use prost::Message as _;
use safetensors::{Dtype, tensor::TensorView};
use serde_json::Value;

use crate::models::{GraphProto, ModelProto, model, node, value, with_int};
use crate::support;

pub(crate) type Tensor = (String, Dtype, Vec<usize>, Vec<u8>);

pub(crate) fn safetensors(path: &Path, tensors: &[Tensor]) {
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        (name.as_str(), TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

pub(crate) fn run(folder: &Path, arguments: &[&str]) -> Output {
    Command::new(support::mxrewrite()).current_dir(folder).args(arguments).output().unwrap()
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

pub(crate) fn json(folder: &Path, arguments: &[&str]) -> Value {
    let done = run(folder, arguments);
    assert_eq!(done.status.code(), Some(0), "{}", text(&done.stderr));
    serde_json::from_slice(&done.stdout).unwrap()
}

/// Module path, role, formats and size of every site of a plan.
fn layers(plan: &Value) -> Vec<Vec<String>> {
    let keys = ["module_path", "role", "weight_format", "activation_format", "n", "k"];
    let sites = plan["sites"].as_array().unwrap().iter();
    sites.map(|site| keys.iter().map(|key| site[key].to_string()).collect()).collect()
}

/// The model without any name that says something.
fn nameless(model: &mut ModelProto) {
    let graph = model.graph.as_mut().unwrap();
    let mut names = HashMap::new();
    for (index, tensor) in graph.initializer.iter_mut().enumerate() {
        let name = format!("anonymous_{index}");
        names.insert(tensor.name.replace(name.clone()).unwrap(), name);
    }
    for node in &mut graph.node {
        (node.name, node.doc_string) = (None, None);
        node.metadata_props.clear();
        for input in &mut node.input {
            if let Some(name) = names.get(input) {
                input.clone_from(name);
            }
        }
    }
    graph.value_info.clear();
}

#[test]
fn a_model_without_names_gets_the_plan_of_the_named_one() {
    for export in ["torchscript", "dynamo"] {
        let source = support::root().join("fixtures/tinylm").join(export);
        let folder = tempfile::tempdir().unwrap();
        let named = source.join("model.onnx");
        let tier = ["--plan", "--json", "--no-sqnr", "--tier", "d"];
        let plan = |path: &Path, more: &[&str]| {
            json(folder.path(), &[&[path.to_str().unwrap()], &tier[..], more].concat())
        };
        let expected = plan(&named, &[]);
        let opened = Model::open(&named).unwrap();
        let tensors: Vec<Tensor> = expected["sites"]
            .as_array()
            .unwrap()
            .iter()
            .map(|site| {
                let (n, k) =
                    (site["n"].as_u64().unwrap() as usize, site["k"].as_u64().unwrap() as usize);
                let info =
                    opened.graph().initializer(site["initializer"].as_str().unwrap()).unwrap();
                let values = opened.tensor(info).unwrap().to_f32().unwrap();
                // As a Linear stores it, from the exporters' [k, n].
                let rows = (0..n).flat_map(|n_| (0..k).map(move |k_| k_ * n + n_));
                let bytes = rows.flat_map(|i| values[i].to_le_bytes()).collect();
                let name = format!("{}.weight", site["module_path"].as_str().unwrap());
                (name, Dtype::F32, vec![n, k], bytes)
            })
            .collect();
        assert!(tensors.len() > 20, "{}", tensors.len());
        safetensors(&folder.path().join("model.safetensors"), &tensors);

        let mut stripped = ModelProto::decode(&*fs::read(&named).unwrap()).unwrap();
        nameless(&mut stripped);
        let path = folder.path().join("m.onnx");
        fs::write(&path, stripped.encode_to_vec()).unwrap();
        if source.join("model.onnx.data").exists() {
            fs::copy(source.join("model.onnx.data"), folder.path().join("model.onnx.data"))
                .unwrap();
        }
        let without = run(folder.path(), &[&["m.onnx"], &tier[..]].concat());
        assert_eq!(without.status.code(), Some(1), "nothing is known without a checkpoint");
        let found = plan(&path, &["--checkpoint", "."]);
        assert_eq!(layers(&found), layers(&expected), "{export}");
        for site in found["sites"].as_array().unwrap() {
            assert_eq!(
                (&site["path_source"], &site["path_confidence"]),
                (&"checkpoint".into(), &"high".into())
            );
            assert_eq!(site["weight_source"], "quantised");
        }
        let count = found["sites"].as_array().unwrap().len();
        // The head's weight is not in this checkpoint.
        assert_eq!(found["checkpoint"]["matched"], count);
        assert_eq!(found["checkpoint"]["layers"], count + 1);
        // The names that the model has already are those of the content.
        let both = plan(&named, &["--checkpoint", "model.safetensors"]);
        assert_eq!(layers(&both), layers(&expected));
        assert!(both["sites"].as_array().unwrap().iter().all(|site| site["note"].is_null()));
        let shown = run(folder.path(), &["m.onnx", "--plan", "--checkpoint", "."]);
        let line = format!("checkpoint .: {count} of {} weights found", count + 1);
        assert!(text(&shown.stdout).contains(&line), "{}", text(&shown.stdout));
    }
}

pub(crate) fn floats(
    name: &str,
    dims: &[usize],
    dtype: DataType,
    values: &[f32],
) -> mxrewrite::onnx::proto::Tensor {
    let bytes: Vec<u8> = match dtype {
        DataType::Bfloat16 => {
            values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect()
        }
        DataType::Float16 => {
            values.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect()
        }
        _ => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
    };
    mxrewrite::onnx::proto::Tensor {
        name: Some(name.into()),
        dims: dims.iter().map(|&dim| dim as i64).collect(),
        data_type: Some(dtype as i32),
        raw_data: Some(bytes.into()),
        ..Default::default()
    }
}

/// x -> MatMul(weight [k, n]), one a weight, cast where the weight is no float32.
pub(crate) fn products(weights: Vec<mxrewrite::onnx::proto::Tensor>) -> GraphProto {
    let mut graph = GraphProto::default();
    for weight in weights {
        let name = weight.name.clone().unwrap();
        let (x, y, wide) = (format!("x_{name}"), format!("y_{name}"), format!("wide_{name}"));
        let cast = node("Cast", "", &[&name], &[&wide]);
        graph.node.push(with_int(cast, "to", 1));
        graph.node.push(node("MatMul", "", &[&x, &wide], &[&y]));
        graph.input.push(value(&x, 2));
        graph.output.push(value(&y, 2));
        graph.initializer.push(weight);
    }
    graph
}

pub(crate) fn write(folder: &Path, name: &str, graph: GraphProto) -> PathBuf {
    let path = folder.join(name);
    fs::write(&path, model(graph).encode_to_vec()).unwrap();
    path
}

#[test]
fn shards_are_followed_and_files_that_lie_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let values: Vec<f32> = (0..40 * 24).map(|i| (i * 37 % 251) as f32 / 16.0).collect();
    let turned: Vec<f32> =
        (0..40).flat_map(|k| (0..24).map(move |n| n * 40 + k)).map(|i| values[i]).collect();
    write(
        folder.path(),
        "m.onnx",
        products(vec![floats("v0", &[40, 24], DataType::Float, &turned)]),
    );
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    let tensor: Tensor = ("l.0.mlp.up_proj.weight".into(), Dtype::F32, vec![24, 40], bytes);
    let other: Tensor = ("l.0.norm.weight".into(), Dtype::F32, vec![4], vec![0; 16]);
    let ckpt = folder.path().join("ckpt");
    fs::create_dir(&ckpt).unwrap();
    safetensors(&ckpt.join("a.safetensors"), &[tensor]);
    safetensors(&ckpt.join("b.safetensors"), &[other]);
    let index = |map: &str| {
        fs::write(ckpt.join("model.safetensors.index.json"), format!("{{\"weight_map\": {map}}}"))
            .unwrap();
    };
    index(r#"{"l.0.mlp.up_proj.weight": "a.safetensors", "l.0.norm.weight": "b.safetensors"}"#);
    let arguments = ["m.onnx", "-o", "out.onnx", "--tier-a", "--checkpoint", "ckpt"];
    let plan = json(folder.path(), &[&arguments[..], &["--plan", "--json"]].concat());
    assert_eq!(plan["sites"][0]["module_path"], "l.0.mlp.up_proj");
    // It has no packed weight, and is needed for the names.
    assert_eq!(plan["recipe"]["checkpoint"], "required");
    assert!(plan["recipe"]["packed_weights"].is_null());

    let fails = |expected: &[&str]| {
        let done = run(folder.path(), &arguments);
        let message = text(&done.stderr);
        assert_eq!(done.status.code(), Some(1), "{expected:?}: {message}");
        assert!(expected.iter().all(|part| message.contains(part)), "{expected:?}: {message}");
        assert_eq!(message.lines().count(), 1, "{message}");
        assert!(!folder.path().join("out.onnx").exists());
    };
    index(r#"{"l.0.mlp.up_proj.weight": "c.safetensors"}"#);
    fails(&["model.safetensors.index.json", "'c.safetensors'", "missing"]);
    index(r#"{"l.0.mlp.up_proj.weight": "b.safetensors"}"#);
    fails(&["'l.0.mlp.up_proj.weight'", "'b.safetensors'"]);
    index(r#"{"l.0.mlp.up_proj.weight": "../ckpt/a.safetensors"}"#);
    fails(&["no file beside it"]);
    index("[1]");
    fails(&["weight_map"]);
    fs::remove_file(ckpt.join("model.safetensors.index.json")).unwrap();
    fs::copy(ckpt.join("a.safetensors"), ckpt.join("c.safetensors")).unwrap();
    fails(&["c.safetensors", "a.safetensors", "'l.0.mlp.up_proj.weight'"]);
    fs::remove_file(ckpt.join("c.safetensors")).unwrap();

    let whole = fs::read(ckpt.join("a.safetensors")).unwrap();
    let header = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let with_header = |json: &str, data: &[u8]| {
        [&(json.len() as u64).to_le_bytes()[..], json.as_bytes(), data].concat()
    };
    let huge = [&u64::MAX.to_le_bytes()[..], &whole[8..]].concat();
    let overlap = r#"{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"b":{"dtype":"F32","shape":[4],"data_offsets":[8,24]}}"#;
    let wrong_shape = r#"{"a":{"dtype":"F32","shape":[5],"data_offsets":[0,16]}}"#;
    let overflow = r#"{"a":{"dtype":"F32","shape":[4611686018427387904,8],"data_offsets":[0,16]}}"#;
    for (what, bytes) in [
        ("truncated", whole[..whole.len() - 5].to_vec()),
        ("no data", whole[..8 + header].to_vec()),
        ("cut in the header", whole[..20].to_vec()),
        ("empty", Vec::new()),
        ("huge header", huge),
        ("no JSON", with_header("{\"a\"", &[])),
        ("overlap", with_header(overlap, &[0; 24])),
        ("wrong shape", with_header(wrong_shape, &[0; 16])),
        ("overflow", with_header(overflow, &[0; 16])),
    ] {
        fs::write(ckpt.join("a.safetensors"), bytes).unwrap();
        println!("{what}");
        fails(&["a.safetensors"]);
    }
    let spaces = format!("{{}}{}", " ".repeat(33 << 20));
    fs::write(ckpt.join("a.safetensors"), with_header(&spaces, &[])).unwrap();
    fails(&["a.safetensors", "header of 34603010 bytes"]);
    fs::write(ckpt.join("a.safetensors"), "a text that is something else").unwrap();
    fails(&["a.safetensors", "is no safetensors file"]);
    fs::remove_dir_all(&ckpt).unwrap();
    fails(&["ckpt"]);
    fs::create_dir(&ckpt).unwrap();
    fails(&["no *.safetensors there"]);
}
