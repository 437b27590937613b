//! Finding and loading libonnxruntime: nothing is linked at build time.

use super::error::{Error, Result};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

/// Minimum version of ONNX Runtime, the operator library's: older ones lack parts of the API.
const MINIMUM: &str = "1.22";

/// The one that the process has loaded. It is kept: ONNX Runtime allows one environment a process, also
/// after that one is gone.
static LOADED: Mutex<Option<Runtime>> = Mutex::new(None);

/// A loaded ONNX Runtime.
#[derive(Clone, Debug)]
pub struct Runtime {
    /// The environment that sessions are made in.
    pub environment: ort::environment::Environment,
    /// The library.
    pub library: PathBuf,
    /// Its version, such as `1.31.1`.
    pub version: String,
}

impl Runtime {
    /// Whether the library was built with the CUDA provider.
    pub fn has_cuda(&self) -> bool {
        use ort::ep::ExecutionProvider as _;
        ort::ep::CUDA::is_available().unwrap_or(false)
    }

    /// Loads the CUDA provider's library without touching a device.
    ///
    /// # Errors
    /// ONNX Runtime's reason: a library of CUDA or cuDNN that is missing, mostly.
    pub fn probe_cuda(&self) -> std::result::Result<(), String> {
        preload_wheels(&self.library);
        let builder = ort::session::Session::builder(&self.environment);
        let added = builder.map_err(|e| e.to_string())?.with_execution_providers([cuda(0)]);
        added.map(drop).map_err(|e| plain(&e.to_string()))
    }
}

/// An error of ONNX Runtime without the place in its sources.
fn plain(text: &str) -> String {
    let reason = text.rsplit_once("FAIL : ").map_or(text, |(_, reason)| reason);
    reason.trim().to_owned()
}

/// Loads CUDA and cuDNN from the wheels that lie beside the `onnxruntime-gpu` package, where the
/// library comes from one; what is on the loader's path is found without.
fn preload_wheels(library: &Path) {
    let library = library.canonicalize().unwrap_or_else(|_| library.into());
    // .../site-packages/onnxruntime/capi/libonnxruntime.so
    let Some(packages) = library.ancestors().nth(3) else { return };
    let (cuda, cudnn) = (packages.join("nvidia/cu13/lib"), packages.join("nvidia/cudnn/lib"));
    for (cuda, cudnn) in [(Some(cuda), None), (None, Some(cudnn))] {
        let found = cuda.as_deref().or(cudnn.as_deref()).is_some_and(Path::is_dir);
        // A library that does not load is missed by the provider, which says so.
        let _ = found.then(|| ort::ep::cuda::preload_dylibs(cuda.as_deref(), cudnn.as_deref()));
    }
}

/// Environment variable: most bytes that a session may take of a GPU's memory. For tests of what
/// happens when it runs out.
const MEMORY_LIMIT: &str = "MX_GPU_MEM_LIMIT";

/// The CUDA provider on a device. TF32 is off, so that float32 means float32; memory is asked for in
/// the sizes needed, so that weights take what they are; convolutions are not chosen by timing them,
/// so that two runs compute the same.
pub(super) fn cuda(ordinal: u32) -> ort::ep::ExecutionProviderDispatch {
    use ort::ep::{
        ArbitrarilyConfigurableExecutionProvider as _, ArenaExtendStrategy,
        cuda::ConvAlgorithmSearch,
    };
    let limit = std::env::var(MEMORY_LIMIT).ok().and_then(|bytes| bytes.parse().ok());
    let provider = match limit {
        Some(bytes) => ort::ep::CUDA::default().with_memory_limit(bytes),
        None => ort::ep::CUDA::default(),
    };
    provider
        .with_device_id(ordinal.cast_signed())
        .with_tf32(false)
        .with_arena_extend_strategy(ArenaExtendStrategy::SameAsRequested)
        .with_conv_algorithm_search(ConvAlgorithmSearch::Heuristic)
        // One stream a session. Otherwise each body of an If has its own, with its own cuBLAS and a
        // workspace of some 100 MB: hundreds of them exhaust a GPU.
        .with_arbitrary_config("use_ep_level_unified_stream", "1")
        .build()
        .error_on_failure()
}

/// Loads ONNX Runtime: `library` (`--ort-lib`), else `ORT_DYLIB_PATH`, else the library beside the
/// executable, else that of the `onnxruntime` Python package of `MX_PYTHON`, `.venv` or `python3`.
///
/// The process holds one ONNX Runtime: a second call with another library gets the first one.
///
/// # Errors
/// None is found, or the one found cannot be loaded or is too old; the message says what to do.
pub fn load(library: Option<&Path>) -> Result<Runtime> {
    let library = find(library)?;
    // `ort` takes a relative path from the executable's folder.
    let library = std::path::absolute(&library).unwrap_or(library);
    let failed = |reason: String| {
        Error::Runtime(format!(
            "cannot load ONNX Runtime from {}: {reason}; version {MINIMUM} or later is needed \
             (pip install onnxruntime, then --ort-lib or ORT_DYLIB_PATH = its \
             capi/libonnxruntime.so.*)",
            library.display()
        ))
    };
    if let Some(old) = file_version(&library).filter(|version| too_old(version)) {
        return Err(failed(format!("it is version {old}")));
    }
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(runtime) = &*loaded {
        return Ok(runtime.clone());
    }
    let builder = ort::init_from(&library).map_err(|e| failed(e.to_string()))?;
    mx_custom_ops::bind(&library).map_err(failed)?;
    let environment = builder
        .with_name("mxeval")
        .with_telemetry(false)
        .build()
        .map_err(|e| failed(e.to_string()))?;
    let version = file_version(&library).unwrap_or_else(|| ort::info().to_owned());
    Ok(loaded.insert(Runtime { environment, library, version }).clone())
}

fn find(given: Option<&Path>) -> Result<PathBuf> {
    let checked = |path: &Path, origin: &str| {
        if path.is_file() {
            return Ok(path.to_path_buf());
        }
        let inside = if path.is_dir() { newest_in(path) } else { None };
        inside.ok_or_else(|| {
            Error::Runtime(format!(
                "{origin} {}: no such library; pass the path of libonnxruntime.so",
                path.display()
            ))
        })
    };
    if let Some(path) = given {
        return checked(path, "--ort-lib");
    }
    if let Some(path) = std::env::var_os("ORT_DYLIB_PATH").filter(|path| !path.is_empty()) {
        return checked(Path::new(&path), "ORT_DYLIB_PATH");
    }
    let executable = std::env::current_exe().ok();
    let beside = executable.as_deref().and_then(Path::parent).and_then(newest_in);
    beside.or_else(in_python).ok_or_else(|| {
        Error::Runtime(
            "no libonnxruntime found: pass --ort-lib PATH, set ORT_DYLIB_PATH, put \
             libonnxruntime.so beside mxeval, or install it for Python: \
             python3 -m venv .venv && .venv/bin/pip install onnxruntime"
                .into(),
        )
    })
}

/// The library of the `onnxruntime` package, found without importing it.
fn in_python() -> Option<PathBuf> {
    const SCRIPT: &str = "import importlib.util as u, os; s = u.find_spec('onnxruntime'); \
                          print(os.path.dirname(s.origin) if s and s.origin else '')";
    let named = std::env::var_os("MX_PYTHON").map(PathBuf::from);
    let pythons = named.into_iter().chain([".venv/bin/python".into(), "python3".into()]);
    pythons.into_iter().find_map(|python| {
        let output = Command::new(python).args(["-c", SCRIPT]).output().ok()?;
        let root = String::from_utf8(output.stdout).ok()?;
        let root = root.trim();
        (!root.is_empty()).then(|| newest_in(&Path::new(root).join("capi"))).flatten()
    })
}

/// The libonnxruntime of a folder; of several the last by name, which is the versioned one.
fn newest_in(folder: &Path) -> Option<PathBuf> {
    let entries = std::fs::read_dir(folder).ok()?;
    let names = entries.filter_map(|entry| {
        let path = entry.ok()?.path();
        let name = path.file_name()?.to_str()?;
        let library =
            name.starts_with("libonnxruntime.so") || name.starts_with("libonnxruntime.dylib");
        (library || name == "onnxruntime.dll").then_some(path)
    });
    names.max()
}

/// The version in the library's file name, links followed.
fn file_version(library: &Path) -> Option<String> {
    let file = library.canonicalize().ok()?;
    let version = file.file_name()?.to_str()?.strip_prefix("libonnxruntime.so.")?;
    version.contains('.').then(|| version.to_owned())
}

fn too_old(version: &str) -> bool {
    let numbers = |text: &str| {
        let parts: Vec<u32> = text.split('.').map_while(|part| part.parse().ok()).collect();
        (parts.first().copied().unwrap_or(0), parts.get(1).copied().unwrap_or(0))
    };
    numbers(version) < numbers(MINIMUM)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_that_is_not_there_is_named_with_its_origin() {
        let error = find(Some(Path::new("/nowhere/libonnxruntime.so"))).unwrap_err().to_string();
        assert!(error.contains("--ort-lib /nowhere/libonnxruntime.so"), "{error}");
    }

    #[test]
    fn errors_lose_the_place_in_the_sources() {
        let text = "/src/provider_bridge_ort.cc:2043 Get() [ONNXRuntimeError] : 1 : FAIL : Failed to \
                    load library x.so with error: libcublasLt.so.13: no such file\n";
        assert!(plain(text).starts_with("Failed to load") && plain(text).ends_with("such file"));
        assert_eq!(plain("other"), "other");
    }

    #[test]
    fn a_folder_gives_its_versioned_library() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["libonnxruntime.so", "libonnxruntime.so.1.31.1", "libonnxruntime_providers.so"]
        {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        let found = find(Some(dir.path())).unwrap();
        assert_eq!(found.file_name().unwrap(), "libonnxruntime.so.1.31.1");
        assert_eq!(file_version(&found).as_deref(), Some("1.31.1"));
        assert_eq!(file_version(&dir.path().join("libonnxruntime.so")), None);
        assert!(too_old("1.21.1") && !too_old("1.22.0") && !too_old("1.31.1") && !too_old("2.0.0"));
    }

    #[test]
    fn a_file_that_is_no_library_is_an_error_not_a_panic() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("libonnxruntime.so");
        std::fs::write(&path, "text").unwrap();
        let error = load(Some(&path)).unwrap_err().to_string();
        assert!(error.contains("cannot load ONNX Runtime") && error.contains("1.22"), "{error}");
    }
}
