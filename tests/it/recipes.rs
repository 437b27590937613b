//! Recipes through the command: tiers printed and fed back, the recipe of a rewritten model, mixtures
//! of formats, and what a plan expects of them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use mx_kernels::{QuantSpec, dequantize_rows, quantize_rows};
use serde_json::Value;

use crate::models::{GraphProto, model, node, value, weight, write};
use crate::support;

fn mxrewrite(arguments: &[&str]) -> Output {
    Command::new(support::mxrewrite()).args(arguments).output().unwrap()
}

/// What the command prints; it has to succeed.
fn stdout(arguments: &[&str]) -> String {
    let done = mxrewrite(arguments);
    let errors = String::from_utf8_lossy(&done.stderr);
    assert_eq!(done.status.code(), Some(0), "{arguments:?}: {errors}");
    String::from_utf8(done.stdout).unwrap()
}

fn plan(model: &Path, arguments: &[&str]) -> Value {
    let head = [model.to_str().unwrap(), "--plan", "--json", "--allow-empty", "--no-sqnr"];
    serde_json::from_str(&stdout(&[&head, arguments].concat())).unwrap()
}

/// The fixtures, and some of the zoo where it is there.
fn fixtures() -> Vec<PathBuf> {
    let mut folders: Vec<PathBuf> = ["dynamo", "torchscript"]
        .iter()
        .map(|form| support::root().join("fixtures/tinylm").join(form))
        .collect();
    for name in ["mixtral-ts28", "gpt2-dynamo", "phi3-ts"] {
        folders.extend(support::shared().map(|shared| shared.join("zoo").join(name)));
    }
    folders.into_iter().map(|folder| folder.join("model.onnx")).filter(|m| m.is_file()).collect()
}

fn tinylm() -> PathBuf {
    support::root().join("fixtures/tinylm/dynamo/model.onnx")
}

/// A recipe file in `folder`.
fn recipe(folder: &Path, text: &str) -> String {
    let path = folder.join("mine.toml");
    fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn printed_tiers_give_the_plan_of_their_flags() {
    let folder = tempfile::tempdir().unwrap();
    let more: &[&str] = &["--include", "lm_head", "--exclude", r"layers\.0\."];
    for (name, flags) in [
        ("tier-a", &["--tier-a"][..]),
        ("tier-b", &["--tier", "b"]),
        ("tier-c", &["--tier", "c"]),
        ("tier-d", &["--tier", "d"]),
        ("full", &[]),
        ("all-linears", &["--all-linears"]),
        ("mlp-only", &["--mlp-only"]),
    ] {
        for options in [&[][..], more] {
            let text = stdout(&[&["--print-recipe", name], options].concat());
            let file = recipe(folder.path(), &text);
            let json = folder.path().join("mine.json");
            let printed = stdout(&[&["--print-recipe", name, "--json"], options].concat());
            fs::write(&json, printed).unwrap();
            let by_json = plan(&tinylm(), &["--recipe", json.to_str().unwrap()]);
            assert_eq!(by_json, plan(&tinylm(), &[flags, options].concat()), "{name}");
            for model in fixtures() {
                let by_flags = plan(&model, &[flags, options].concat());
                let by_recipe = plan(&model, &["--recipe", &file]);
                assert_eq!(by_recipe, by_flags, "{name} {} {text}", model.display());
            }
        }
    }
}

/// Model and data file as written into a folder of their own.
fn rewrite(folder: &Path, arguments: &[&str]) -> Vec<(String, Vec<u8>)> {
    fs::create_dir(folder).unwrap();
    let output = folder.join("out.onnx");
    let model = tinylm();
    let head = [model.to_str().unwrap(), "-o", output.to_str().unwrap()];
    stdout(&[&head, arguments].concat());
    let mut files: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|e| (e.file_name().into_string().unwrap(), fs::read(e.path()).unwrap()))
        .collect();
    files.sort();
    files
}

#[test]
fn the_recipe_in_a_model_reproduces_the_model() {
    let folder = tempfile::tempdir().unwrap();
    let mixture = recipe(folder.path(), MIXTURE);
    for (index, arguments) in [
        &["--tier", "d", "--include", "lm_head", "--exclude", r"layers\.1\."][..],
        &["--format", "fp6_e2m3", "--activation-format", "none", "--block-size", "16"],
        &["--all-linears", "--rounding", "nearest", "--scale-rule", "rceil"],
        &["--lower", "int8"],
        &["--lower", "bf16"],
        &["--lower", "nvfp8", "--tier-a", "--base-dtype", "fp16"],
        &["--recipe", &mixture],
    ]
    .into_iter()
    .enumerate()
    {
        let path = |name: &str| folder.path().join(format!("{name}{index}"));
        let first = rewrite(&path("first"), arguments);
        let made = path("first").join("out.onnx");
        let again = rewrite(&path("again"), &["--recipe", made.to_str().unwrap()]);
        assert!(first == again, "{arguments:?}");
        // The plan that --json prints holds the same recipe.
        let json = path("plan").with_extension("json");
        let model = tinylm();
        fs::write(&json, plan(&model, arguments).to_string()).unwrap();
        let third = rewrite(&path("third"), &["--recipe", json.to_str().unwrap()]);
        assert!(first == third, "{arguments:?}");
    }
    // A model that mxrewrite did not make has no recipe.
    let none = mxrewrite(&["m.onnx", "--recipe", tinylm().to_str().unwrap()]);
    assert_eq!(none.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&none.stderr).contains("mx.plan"));
}

/// First and last layer finer, the head at fp8, attention W4A8, one projection kept, the rest
/// weight-only.
const MIXTURE: &str = r#"
name = "mixture"
exclude = 'layers\.1\..*down_proj'

[[rules]]
include = '\.v_proj$'
weight_format = "keep"

[[rules]]
layers = ["first 1", "last 1"]
weight_format = "fp8_e4m3"

[[rules]]
role = "head"
weight_format = "fp8_e4m3"
activation_format = "none"

[[rules]]
role = "attention"
weight_format = "fp4_e2m1"
activation_format = "fp8_e4m3"
block_size = 16

[[rules]]
weight_format = "fp6_e2m3"
activation_format = "none"
"#;

#[test]
fn the_first_rule_that_matches_decides() {
    let folder = tempfile::tempdir().unwrap();
    let file = recipe(folder.path(), MIXTURE);
    let plan = plan(&tinylm(), &["--recipe", &file, "--exclude", "k_proj"]);
    let sites = plan["sites"].as_array().unwrap();
    let layer = |path: &str| path.split('.').find_map(|part| part.parse::<usize>().ok());
    let path = |site: &Value| site["module_path"].as_str().unwrap().to_owned();
    let last = sites.iter().filter_map(|site| layer(&path(site))).max().unwrap();
    assert!(last >= 3, "the fixture has middle layers");
    let mut seen = std::collections::BTreeSet::new();
    for site in sites {
        let path = path(site);
        let ends = matches!(layer(&path), Some(n) if n == 0 || n == last);
        let expected = match site["role"].as_str().unwrap() {
            _ if ends => ("fp8_e4m3", "fp8_e4m3", 32),
            "head" => ("fp8_e4m3", "none", 32),
            "attention" => ("fp4_e2m1", "fp8_e4m3", 16),
            _ => ("fp6_e2m3", "none", 32),
        };
        let text = |key: &str| site[key].as_str().unwrap();
        let block = site["block_size"].as_u64().unwrap();
        assert_eq!((text("weight_format"), text("activation_format"), block), expected, "{path}");
        assert!(!path.ends_with("v_proj") && !path.ends_with("k_proj"), "{path}");
        seen.insert(expected);
    }
    assert_eq!(seen.len(), 4, "every rule but the first took something");
    let whole = fs::read_to_string(&file).unwrap();
    let unused = "[[rules]]\nlayers = \"90-\"\nweight_format = \"mxint8\"\n";
    let file = recipe(folder.path(), &(whole + unused));
    let table = stdout(&[tinylm().to_str().unwrap(), "--plan", "--recipe", &file]);
    assert!(table.contains("rule 6 of mixture takes no layer"), "{table}");
    assert_eq!(table.matches("takes no layer").count(), 1, "{table}");
    let reasons = plan["skipped"].to_string();
    for part in ["kept by rule 1 of mixture", "excluded by --exclude 'k_proj'", "down_proj'"] {
        assert!(reasons.contains(part), "{part} in {reasons}");
    }
    assert_eq!(plan["recipe"]["name"], "mixture");
}

#[test]
fn a_rewrite_by_recipe_names_its_output_after_it() {
    let folder = tempfile::tempdir().unwrap();
    let graph = GraphProto {
        node: vec![node("MatMul", "/l.0/mlp/up_proj/MatMul", &["x", "up"], &["y"])],
        initializer: vec![weight("up", &[32, 48])],
        input: vec![value("x", 2)],
        output: vec![value("y", 2)],
        ..GraphProto::default()
    };
    let path = write(folder.path(), "m.onnx", &model(graph));
    let file = recipe(folder.path(), "[[rules]]\nweight_format = \"fp4_e2m1\"\n");
    stdout(&[path.to_str().unwrap(), "--recipe", &file]);
    assert!(folder.path().join("m.mine.onnx").is_file());
    stdout(&[path.to_str().unwrap(), "--recipe", "w4a8"]);
    assert!(folder.path().join("m.w4a8.onnx").is_file());
}

#[test]
fn mistakes_in_a_recipe_are_usage_errors_with_their_line() {
    let folder = tempfile::tempdir().unwrap();
    let good = recipe(folder.path(), "[[rules]]\nweight_format = \"fp4_e2m1\"\n");
    for flags in [
        &["--tier", "a"][..],
        &["--all-linears"],
        &["--include", "x"],
        &["--format", "fp4_e2m1"],
        &["--activation-format", "none"],
        &["--block-size", "32"],
        &["--rounding", "even"],
        &["--scale-rule", "floor"],
        &["--lower", "mx"],
    ] {
        let refused = mxrewrite(&[&["m.onnx", "--recipe", &good], flags].concat());
        let message = String::from_utf8(refused.stderr).unwrap();
        assert_eq!(refused.status.code(), Some(2), "{flags:?} {message}");
        assert!(message.contains("cannot be used with") && message.contains(flags[0]), "{message}");
    }
    let bad = recipe(folder.path(), "[[rules]]\nwieght_format = \"fp4_e2m1\"\n");
    let refused = mxrewrite(&["m.onnx", "--recipe", &bad]);
    let message = String::from_utf8(refused.stderr).unwrap();
    assert_eq!(refused.status.code(), Some(2), "{message}");
    assert!(message.contains("mine.toml:2:") && message.contains("'weight_format'"), "{message}");
    let unknown = mxrewrite(&["--print-recipe", "tier-e"]);
    assert_eq!(unknown.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("tier-d"));
}

/// 10 log10(sum w^2 / sum (w - q)^2) of [n, k] rows, straight from the kernels.
fn sqnr(format: &str, rows: &[f32], n: usize, k: usize) -> f64 {
    let spec = QuantSpec::mx(format.parse().unwrap()).unwrap();
    let mut codes = vec![0; spec.codes_len(n, k)];
    let mut scales = vec![0; spec.scales_len(n, k)];
    quantize_rows(&spec, rows, n, k, &mut codes, &mut scales).unwrap();
    let mut back = vec![0.0; n * k];
    dequantize_rows(&spec, &codes, &scales, n, k, &mut back).unwrap();
    let noise = |(w, q): (&f32, &f32)| (f64::from(*w) - f64::from(*q)).powi(2);
    let signal: f64 = rows.iter().map(|w| f64::from(*w).powi(2)).sum();
    10.0 * (signal / rows.iter().zip(&back).map(noise).sum::<f64>()).log10()
}

#[test]
fn a_plan_tells_the_sqnr_to_expect() {
    let folder = tempfile::tempdir().unwrap();
    let (n, k) = (24, 80);
    // Stored [k, n], as MatMul reads it.
    let at = |i: usize, j: usize| ((i * 31 + j * 17) % 101) as f32 / 37.0 - 1.2;
    let stored: Vec<u8> =
        (0..k).flat_map(|i| (0..n).flat_map(move |j| at(i, j).to_le_bytes())).collect();
    let rows: Vec<f32> = (0..n).flat_map(|j| (0..k).map(move |i| at(i, j))).collect();
    let mut up = weight("up", &[k as i64, n as i64]);
    up.raw_data = Some(stored.into());
    let exact = weight("down", &[n as i64, k as i64]);
    let graph = GraphProto {
        node: vec![
            node("MatMul", "/l.0/mlp/up_proj/MatMul", &["x", "up"], &["a"]),
            node("MatMul", "/l.0/mlp/down_proj/MatMul", &["a", "down"], &["y"]),
        ],
        initializer: vec![up, exact],
        input: vec![value("x", 2)],
        output: vec![value("y", 2)],
        ..GraphProto::default()
    };
    let path = write(folder.path(), "m.onnx", &model(graph));
    let path = path.to_str().unwrap();
    for format in ["fp8_e4m3", "fp6_e3m2", "fp4_e2m1", "mxint8"] {
        let text = stdout(&[path, "--plan", "--json", "--format", format]);
        let plan: Value = serde_json::from_str(&text).unwrap();
        let expected = sqnr(format, &rows, n, k);
        let told = plan["sites"][0]["expected_sqnr_db"].as_f64().unwrap();
        assert!((told - expected).abs() < 1e-9, "{format}: {told}, not {expected}");
        assert!(told > 5.0 && told < 60.0, "{format}: {told}");
        let table = stdout(&[path, "--plan", "--format", format]);
        assert!(table.contains("SQNR") && table.contains(&format!("{expected:.2}")), "{table}");
    }
    let unmeasured = stdout(&[path, "--plan", "--no-sqnr"]);
    assert!(!unmeasured.contains("SQNR"), "{unmeasured}");
    for lowering in ["int8", "nvfp8", "bfp16", "nvfp8-emu-e5m2", "bf16"] {
        let text = stdout(&[path, "--plan", "--json", "--lower", lowering]);
        let plan: Value = serde_json::from_str(&text).unwrap();
        let told = plan["sites"][0]["expected_sqnr_db"].as_f64().unwrap();
        assert!(told > 15.0 && told < 70.0, "{lowering}: {told}");
    }
    let alone = mxrewrite(&[path, "--no-sqnr"]);
    assert_eq!(alone.status.code(), Some(2), "--no-sqnr is for plans");
}
