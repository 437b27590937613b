//! The programs in `examples/`: the logits that Python gets, bit by bit, and the layers that were rewritten.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support;

const IDS: &str = "1,15,27,3";
/// MLP layers of tinylm: what tier a rewrites.
const LAYERS: usize = 15;

/// The standard output of a program that has to succeed.
fn output(command: &mut Command) -> String {
    let out = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let stdout = String::from_utf8_lossy(&out.stdout).into_owned();
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{command:?}: {}\n{stdout}{stderr}", out.status);
    stdout
}

/// Five tokens and their logits, from lines `token logit`.
fn tokens<'a>(lines: impl Iterator<Item = &'a str>) -> Vec<(u32, f32)> {
    let token = |line: &str| {
        let (token, logit) = line.split_once(' ').unwrap_or_else(|| panic!("no token: {line}"));
        (token.parse().unwrap(), logit.parse().unwrap())
    };
    lines.take(5).map(token).collect()
}

/// A rewritten tinylm in `folder`, and what Python says of it.
fn rewritten(folder: &Path, python: &Path, library: &Path) -> (PathBuf, Vec<(u32, f32)>) {
    let model = folder.join("a.onnx");
    let source = support::root().join("fixtures/tinylm/dynamo/model.onnx");
    output(Command::new(support::mxrewrite()).arg(source).args(["--tier-a", "-o"]).arg(&model));
    let script = support::root().join("tests/python/top_tokens.py");
    let said = output(Command::new(python).arg(script).arg(&model).arg(library).arg(IDS));
    let expected = tokens(said.lines());
    assert_eq!(expected.len(), 5, "{said}");
    (model, expected)
}

/// ONNX Runtime's library, or a skip with the reason.
fn onnxruntime() -> Option<PathBuf> {
    let path = std::env::var_os("ORT_DYLIB_PATH").map(PathBuf::from).filter(|path| path.is_file());
    if path.is_none() {
        support::skip("ort", "no ONNX Runtime library: ORT_DYLIB_PATH names none");
    }
    path
}

#[test]
fn rust_with_the_operators_built_in() {
    let Some((python, library)) = support::python_and_library() else { return };
    let Some(runtime) = onnxruntime() else { return };
    let program = support::mxrewrite().with_file_name("mx-example");
    if !program.is_file() {
        support::skip("ort", "no mx-example beside the binaries (cargo build --workspace)");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (model, expected) = rewritten(folder.path(), &python, &library);
    let mut command = Command::new(&program);
    let said = output(command.arg(&model).args(["--ids", IDS, "--ort"]).arg(&runtime));
    let mut lines = said.lines();
    assert_eq!(lines.next(), Some("token logit"));
    assert_eq!(tokens(lines.by_ref()), expected);
    assert_eq!(lines.next(), Some("node op provider kernel runs"));
    let kernels: Vec<_> = lines.collect();
    assert_eq!(kernels.len(), LAYERS, "{said}");
    assert!(kernels.iter().all(|line| line.contains(" MxMatMul cpu ")), "{said}");

    let mut refused = Command::new(&program);
    refused.args(["none.onnx", "--ids", IDS, "--ort"]).arg(&runtime);
    let refused = refused.output().unwrap();
    let stderr = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success() && stderr.contains("none.onnx"), "{stderr}");
}

/// A folder with ONNX Runtime as a release has it: `include/` of the headers, `lib/` of the library at hand.
fn release(folder: &Path, headers: &Path, runtime: &Path) -> PathBuf {
    let root = folder.join("onnxruntime");
    std::fs::create_dir_all(root.join("lib")).unwrap();
    std::os::unix::fs::symlink(headers, root.join("include")).unwrap();
    let runtime = runtime.canonicalize().unwrap();
    // A wheel has the file alone, without the names that the linker and the loader look for.
    for name in ["libonnxruntime.so", "libonnxruntime.so.1"] {
        std::os::unix::fs::symlink(&runtime, root.join("lib").join(name)).unwrap();
    }
    root
}

/// ONNX Runtime's headers: `ORT_HEADERS`, else where a distribution's package puts them. No wheel, crate or npm
/// package has them.
fn headers() -> Option<PathBuf> {
    let folder = std::env::var_os("ORT_HEADERS")
        .map_or_else(|| "/usr/include/onnxruntime".into(), PathBuf::from);
    folder.join("onnxruntime_cxx_api.h").is_file().then_some(folder)
}

#[test]
fn c_and_cpp_with_cmake() {
    let Some((python, library)) = support::python_and_library() else { return };
    let Some(runtime) = onnxruntime() else { return };
    let Some(headers) = headers() else {
        support::skip(
            "cpp",
            "no ONNX Runtime headers: set ORT_HEADERS to the include folder of a release, or \
             install libonnxruntime-dev (recent Debian and Ubuntu)",
        );
        return;
    };
    let cmake = std::env::var_os("CMAKE").unwrap_or_else(|| "cmake".into());
    if Command::new(&cmake).arg("--version").output().is_err() {
        support::skip("cpp", "no cmake (set CMAKE, or install it)");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let root = release(folder.path(), &headers, &runtime);
    let build = folder.path().join("build");
    let define = |name: &str, path: &Path| format!("-D{name}={}", path.display());
    output(
        Command::new(&cmake)
            .arg("-S")
            .arg(support::root().join("examples/cpp"))
            .arg("-B")
            .arg(&build)
            .arg("-DCMAKE_COMPILE_WARNING_AS_ERROR=ON")
            .arg(define("ONNXRUNTIME_ROOT", &root))
            .arg(define("MX_CUSTOM_OPS_LIBRARY", &library)),
    );
    output(Command::new(&cmake).arg("--build").arg(&build));

    let (model, expected) = rewritten(folder.path(), &python, &library);
    for program in ["run", "run_c"] {
        let mut command = Command::new(build.join(program));
        command.arg(&model).args(["--ids", IDS]);
        if program == "run" {
            command.arg("--library").arg(&library);
        }
        let said = output(&mut command);
        let mut lines = said.lines();
        assert_eq!(lines.next(), Some("token logit"), "{program}");
        assert_eq!(tokens(lines.by_ref()), expected, "{program}");
        let kernels: serde_json::Value = serde_json::from_str(lines.next().unwrap()).unwrap();
        let kernels = kernels.as_array().unwrap();
        assert_eq!(kernels.len(), LAYERS, "{program}: {said}");
        assert!(kernels.iter().all(|kernel| kernel["provider"] == "CPU"), "{program}: {said}");
    }
}
