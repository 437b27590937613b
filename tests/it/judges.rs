//! The independent NumPy emulation (`scripts/mx_emulation.py`) against the built command and library,
//! through onnxruntime from Python: golden vectors, and the fixtures' models site by site.

use std::process::Command;

use crate::support;

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
