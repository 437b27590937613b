//! NVRTC: from source to machine code, at run time.
//!
//! NVRTC is looked for in this order: the file that `MX_NVRTC` names; a copy that the process has
//! mapped already; the loader's path; `CUDA_HOME` and `CUDA_PATH`; `/usr/local/cuda`; beside the
//! CUDA libraries that the process has mapped, as the wheels of Python packages lay them out.
#![allow(unsafe_code)]

use std::{
    ffi::{CStr, CString, c_char, c_int, c_void},
    path::{Path, PathBuf},
    sync::Mutex,
};

use libloading::Library;

use super::{
    CudaError,
    units::{Arch, HEADERS, Unit},
};

/// Sonames that are asked for, newest first.
const SONAMES: [&str; 3] = ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"];
/// A compiler recurses deeply; threads of a host program may have small stacks.
const STACK_BYTES: usize = 64 << 20;

/// A `nvrtcResult`.
type Status = c_int;
/// A `nvrtcProgram`.
type Program = *mut c_void;

/// The functions of one loaded NVRTC. Never unloaded.
pub(super) struct Nvrtc {
    /// Its version, major and minor.
    pub version: (u32, u32),
    /// Compute capabilities it compiles for, as 10 * major + minor.
    archs: Vec<u32>,
    error_string: unsafe extern "C" fn(Status) -> *const c_char,
    create: unsafe extern "C" fn(
        *mut Program,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> Status,
    compile: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> Status,
    destroy: unsafe extern "C" fn(*mut Program) -> Status,
    log_size: unsafe extern "C" fn(Program, *mut usize) -> Status,
    log: unsafe extern "C" fn(Program, *mut c_char) -> Status,
    cubin_size: unsafe extern "C" fn(Program, *mut usize) -> Status,
    cubin: unsafe extern "C" fn(Program, *mut c_char) -> Status,
}

/// Machine code of a unit, compiled now; no GPU is needed.
///
/// # Errors
/// No NVRTC, one too old for the architecture, or a source that it refuses (with its log).
pub fn cubin(unit: &Unit, arch: Arch) -> Result<Vec<u8>, CudaError> {
    nvrtc()?.compile_unit(unit, arch)
}

/// The version of the NVRTC that [`cubin`] uses.
///
/// # Errors
/// No NVRTC.
pub fn nvrtc_version() -> Result<(u32, u32), CudaError> {
    nvrtc().map(|nvrtc| nvrtc.version)
}

/// The process's NVRTC, found on first use. A failure is not kept.
pub(super) fn nvrtc() -> Result<&'static Nvrtc, CudaError> {
    static FOUND: Mutex<Option<&'static Nvrtc>> = Mutex::new(None);
    let mut found = FOUND.lock().unwrap_or_else(|e| e.into_inner());
    if let Some(nvrtc) = *found {
        return Ok(nvrtc);
    }
    let nvrtc: &'static Nvrtc = Box::leak(Box::new(find()?));
    *found = Some(nvrtc);
    Ok(nvrtc)
}

fn find() -> Result<Nvrtc, CudaError> {
    let missing = |reason: String| CudaError::Library { library: "NVRTC", reason };
    if let Some(path) = std::env::var_os("MX_NVRTC").filter(|v| !v.is_empty()) {
        let path = PathBuf::from(path);
        return Nvrtc::open(&path)
            .map_err(|e| missing(format!("MX_NVRTC names {}: {e}", path.display())));
    }
    let mut tried = Vec::new();
    for candidate in candidates() {
        // A path that does not exist is no news; a library that exists and fails is.
        if candidate.is_absolute() && !candidate.exists() {
            continue;
        }
        match Nvrtc::open(&candidate) {
            Ok(nvrtc) => return Ok(nvrtc),
            Err(e) => tried.push(format!("{}: {e}", candidate.display())),
        }
    }
    Err(missing(format!(
        "looked on the loader's path, in CUDA_HOME, CUDA_PATH and /usr/local/cuda ({}); install \
         the CUDA toolkit or the nvidia-cuda-nvrtc wheel and let MX_NVRTC name its libnvrtc.so, or \
         let MX_CUBIN_DIR name a folder of scripts/build_cubins.sh",
        tried.join("; ")
    )))
}

/// Where NVRTC may be, in the order that is tried.
fn candidates() -> Vec<PathBuf> {
    let mapped = mapped_libraries();
    let is_nvrtc = |path: &Path| {
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        name.starts_with("libnvrtc.so")
    };
    let mut all: Vec<PathBuf> = mapped.iter().filter(|p| is_nvrtc(p)).cloned().collect();
    all.extend(SONAMES.map(PathBuf::from));
    let mut folders = Vec::new();
    for variable in ["CUDA_HOME", "CUDA_PATH"] {
        if let Some(home) = std::env::var_os(variable).filter(|v| !v.is_empty()) {
            folders.extend(["lib64", "lib"].map(|lib| Path::new(&home).join(lib)));
        }
    }
    folders.push("/usr/local/cuda/lib64".into());
    for library in &mapped {
        let name = library.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        if !(name.starts_with("libcudart.so") || name.starts_with("libcublas")) {
            continue;
        }
        let Some(folder) = library.parent() else { continue };
        folders.push(folder.to_path_buf());
        // Wheels of CUDA 12 keep one folder a library: nvidia/cublas/lib, nvidia/cuda_nvrtc/lib.
        if let Some(root) = folder.parent().and_then(Path::parent) {
            folders.push(root.join("cuda_nvrtc/lib"));
        }
    }
    for folder in folders {
        all.extend(SONAMES.map(|name| folder.join(name)));
    }
    let mut seen = std::collections::HashSet::new();
    all.retain(|path| seen.insert(path.clone()));
    all
}

/// Files that this process has mapped.
fn mapped_libraries() -> Vec<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let mut paths: Vec<PathBuf> =
        maps.lines().filter_map(|l| l.find('/').map(|at| PathBuf::from(&l[at..]))).collect();
    paths.dedup();
    paths
}

/// The file that an address of this process is mapped from.
fn file_of(address: usize) -> Option<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    maps.lines().find_map(|line| {
        let (range, _) = line.split_once(' ')?;
        let (start, end) = range.split_once('-')?;
        let start = usize::from_str_radix(start, 16).ok()?;
        let end = usize::from_str_radix(end, 16).ok()?;
        let at = line.find('/')?;
        (start..end).contains(&address).then(|| PathBuf::from(&line[at..]))
    })
}

impl Nvrtc {
    fn open(path: &Path) -> Result<Self, String> {
        // SAFETY: a library that its user names or that lies where CUDA's do; its initialisers run,
        // and the signatures are those of NVRTC's header, the same since CUDA 11.
        unsafe {
            let library = Library::new(path).map_err(|e| detail(&e))?;
            let version_fn: unsafe extern "C" fn(*mut c_int, *mut c_int) -> Status =
                symbol(&library, "nvrtcVersion")?;
            let (mut major, mut minor) = (0, 0);
            if version_fn(&mut major, &mut minor) != 0 {
                return Err("nvrtcVersion failed".into());
            }
            open_builtins(version_fn as usize, major, minor);
            let nvrtc = Self {
                version: (major.unsigned_abs(), minor.unsigned_abs()),
                archs: supported(&library)?,
                error_string: symbol(&library, "nvrtcGetErrorString")?,
                create: symbol(&library, "nvrtcCreateProgram")?,
                compile: symbol(&library, "nvrtcCompileProgram")?,
                destroy: symbol(&library, "nvrtcDestroyProgram")?,
                log_size: symbol(&library, "nvrtcGetProgramLogSize")?,
                log: symbol(&library, "nvrtcGetProgramLog")?,
                cubin_size: symbol(&library, "nvrtcGetCUBINSize")?,
                cubin: symbol(&library, "nvrtcGetCUBIN")?,
            };
            // The functions outlive every caller.
            std::mem::forget(library);
            Ok(nvrtc)
        }
    }

    /// The architecture to compile for, so that the code runs on a device of `arch`.
    fn target(&self, arch: Arch) -> Option<Arch> {
        arch.compatible().into_iter().find(|a| self.archs.contains(&(a.major * 10 + a.minor)))
    }

    pub(super) fn compile_unit(&self, unit: &Unit, arch: Arch) -> Result<Vec<u8>, CudaError> {
        let fail = |log: String| CudaError::Compile {
            unit: unit.stem(),
            arch: arch.to_string(),
            log: log.trim_end().to_string(),
        };
        let Some(source) = unit.source() else {
            return Err(fail("there is no such source".into()));
        };
        let Some(target) = self.target(arch) else {
            let (major, minor) = self.version;
            return Err(fail(format!(
                "NVRTC {major}.{minor} does not know it (it knows {:?}): install a newer one, or \
                 let MX_NVRTC name it",
                self.archs
            )));
        };
        std::thread::scope(|scope| {
            std::thread::Builder::new()
                .name("nvrtc".into())
                .stack_size(STACK_BYTES)
                .spawn_scoped(scope, || self.compile_source(unit, source, target))
                .map_err(|e| fail(format!("no thread for the compiler: {e}")))?
                .join()
                .unwrap_or_else(|_| Err("the compiler's thread panicked".into()))
                .map_err(fail)
        })
    }

    fn compile_source(&self, unit: &Unit, source: &str, target: Arch) -> Result<Vec<u8>, String> {
        let text = |s: &str| CString::new(s).map_err(|_| "a zero byte in the source".to_string());
        let source = text(source)?;
        let name = text(&format!("{}.cu", unit.name))?;
        let mut headers = Vec::new();
        let mut names = Vec::new();
        for (name, content) in HEADERS {
            headers.push(text(content)?);
            names.push(text(name)?);
        }
        let options: Vec<CString> =
            unit.options(target).iter().map(|o| text(o)).collect::<Result<_, _>>()?;
        let pointers = |v: &[CString]| v.iter().map(|s| s.as_ptr()).collect::<Vec<_>>();
        let (headers_p, names_p) = (pointers(&headers), pointers(&names));
        let options_p = pointers(&options);
        let mut program = Owned { nvrtc: self, program: std::ptr::null_mut() };
        // SAFETY: every string is alive and zero-terminated, every array as long as stated.
        unsafe {
            self.check((self.create)(
                &mut program.program,
                source.as_ptr(),
                name.as_ptr(),
                headers_p.len() as c_int,
                headers_p.as_ptr(),
                names_p.as_ptr(),
            ))?;
            let code =
                (self.compile)(program.program, options_p.len() as c_int, options_p.as_ptr());
            if let Err(reason) = self.check(code) {
                let log = read(
                    |n| (self.log_size)(program.program, n),
                    |p| (self.log)(program.program, p),
                );
                let log = log.map(|b| String::from_utf8_lossy(&b).replace('\0', ""));
                return Err(format!("{reason}\n{}", log.unwrap_or_default()));
            }
            read(|n| (self.cubin_size)(program.program, n), |p| (self.cubin)(program.program, p))
                .filter(|bytes| bytes.starts_with(b"\x7fELF"))
                .ok_or_else(|| "NVRTC gives no machine code".into())
        }
    }

    fn check(&self, code: Status) -> Result<(), String> {
        if code == 0 {
            return Ok(());
        }
        // SAFETY: returns a static string for every code.
        let text = unsafe { (self.error_string)(code) };
        if text.is_null() {
            return Err(format!("NVRTC error {code}"));
        }
        // SAFETY: not null, static, zero-terminated.
        Err(unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
    }
}

/// A program that is destroyed whatever happens.
struct Owned<'a> {
    nvrtc: &'a Nvrtc,
    program: Program,
}

impl Drop for Owned<'_> {
    fn drop(&mut self) {
        if !self.program.is_null() {
            // SAFETY: made by nvrtcCreateProgram and destroyed once.
            let _ = unsafe { (self.nvrtc.destroy)(&mut self.program) };
        }
    }
}

/// Bytes that one function counts and another writes.
fn read(
    size: impl FnOnce(*mut usize) -> Status,
    write: impl FnOnce(*mut c_char) -> Status,
) -> Option<Vec<u8>> {
    let mut len = 0;
    if size(&mut len) != 0 {
        return None;
    }
    let mut bytes = vec![0u8; len];
    (write(bytes.as_mut_ptr().cast()) == 0).then_some(bytes)
}

/// The loader's own words, which the error keeps one level down.
fn detail(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), |e| e.to_string())
}

/// # Safety
/// `T` is the type of the library's function of that name.
unsafe fn symbol<T: Copy>(library: &Library, name: &str) -> Result<T, String> {
    // SAFETY: as the caller promises.
    unsafe { library.get::<T>(name).map(|s| *s).map_err(|e| e.to_string()) }
}

fn supported(library: &Library) -> Result<Vec<u32>, String> {
    // SAFETY: the signatures are those of NVRTC's header; the array is as long as the count says.
    unsafe {
        let count: unsafe extern "C" fn(*mut c_int) -> Status =
            symbol(library, "nvrtcGetNumSupportedArchs")?;
        let list: unsafe extern "C" fn(*mut c_int) -> Status =
            symbol(library, "nvrtcGetSupportedArchs")?;
        let mut n = 0;
        if count(&mut n) != 0 {
            return Err("nvrtcGetNumSupportedArchs failed".into());
        }
        let mut archs = vec![0; usize::try_from(n).unwrap_or(0)];
        if list(archs.as_mut_ptr()) != 0 {
            return Err("nvrtcGetSupportedArchs failed".into());
        }
        Ok(archs.into_iter().filter_map(|a| u32::try_from(a).ok()).collect())
    }
}

/// Opens libnvrtc-builtins beside libnvrtc. NVRTC asks the loader for it by name alone, which
/// fails where its folder is not on the loader's path (wheels); one that is open already is found.
fn open_builtins(nvrtc_function: usize, major: c_int, minor: c_int) {
    let Some(folder) = file_of(nvrtc_function).and_then(|p| p.parent().map(Path::to_path_buf))
    else {
        return;
    };
    let path = folder.join(format!("libnvrtc-builtins.so.{major}.{minor}"));
    // SAFETY: NVRTC itself would open this very library.
    if let Ok(library) = unsafe { Library::new(path) } {
        std::mem::forget(library);
    }
}
