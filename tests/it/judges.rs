//! The independent NumPy emulation (`scripts/mx_emulation.py`) against the built command and library,
//! through onnxruntime from Python: golden vectors, and the fixtures' models site by site.

use std::process::Command;

use crate::support;

/// Runs a check script on the built artifacts; its output is printed, its exit status asserted.
fn judge(script: &str, args: &[&str]) {
    let Some((python, library)) = support::python_and_library() else { return };
    let out = Command::new(python)
        .arg(support::root().join("scripts").join(script))
        .args(args)
        .arg("--mxrewrite")
        .arg(support::mxrewrite())
        .arg("--library")
        .arg(library)
        .current_dir(support::root())
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .output()
        .expect("the Python interpreter was probed before");
    let (stdout, stderr) =
        (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    println!("{stdout}");
    assert!(out.status.success(), "{script} {args:?} found differences\n{stdout}\n{stderr}");
}

#[test]
fn golden_vectors_through_the_operator() {
    judge("check_golden.py", &["fixtures/golden/mx_golden_subset.safetensors"]);
}

#[test]
fn tinylm_sites_and_logits_match_the_emulation() {
    let models = ["fixtures/tinylm/dynamo", "fixtures/tinylm/torchscript"];
    let formats = ["--formats", "fp8_e4m3,fp6_e2m3,fp4_e2m1", "--require-end-to-end"];
    judge("check_zoo.py", &[&models[..], &formats[..]].concat());
}

#[test]
fn tinylm_between_standard_operators_matches_the_emulation() {
    let formats = ["--lower", "qdq", "--formats", "fp4_e2m1", "--require-end-to-end"];
    judge("check_zoo.py", &[&["fixtures/tinylm/dynamo"][..], &formats[..]].concat());
}

/// The workplace's exports of twelve architectures; the fixtures above stand for them elsewhere.
#[test]
fn zoo_plans_sites_and_logits_match_the_emulation() {
    let Some(zoo) = support::shared().map(|shared| shared.join("zoo")).filter(|zoo| zoo.is_dir())
    else {
        return support::skip("zoo", "no ../shared/zoo beside the checkout (MX_SHARED)");
    };
    let zoo = zoo.to_str().expect("the workplace's path is UTF-8");
    judge("check_zoo.py", &["--zoo", zoo, "--barred", "--formats", "fp8_e4m3,fp4_e2m1"]);
}

#[test]
fn the_emulation_matches_the_golden_vectors() {
    let Some(python) = support::python() else {
        return support::skip("ort", "no Python with numpy, onnx and onnxruntime (set MX_PYTHON)");
    };
    let out = Command::new(python)
        .args(["scripts/mx_emulation.py", "fixtures/golden/mx_golden_subset.safetensors"])
        .current_dir(support::root())
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .output()
        .expect("the Python interpreter was probed before");
    assert!(
        out.status.success(),
        "{}{}",
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    );
}
