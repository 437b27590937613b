//! Machine code kept between runs.
//!
//! Three places, in this order:
//! 1. `MX_CUBIN_DIR`, built ahead of time by `scripts/build_cubins.sh`: `STEM.ARCH.cubin` as the
//!    compiler wrote it and `STEM.ARCH.key`, a line of two words: [`Unit::key`] and the SHA-256 of
//!    the cubin. A file made from another source is passed over. The compiler's version is not in
//!    the key: who names this folder has chosen it.
//! 2. The cache, `MX_CACHE_DIR` or the user's cache folder under `mxrewrite/cubin`:
//!    `STEM.ARCH.KEY.nvrtc-13.0.bin`, a mark, the SHA-256 of the cubin, the cubin. Files appear by
//!    renaming, so that a reader sees a whole one or none; a damaged one is made again; a cache
//!    that cannot be written is done without. Without NVRTC, code of any version of it will do.
//! 3. NVRTC, whose result goes into 2.

use std::{
    io::Write,
    path::{Path, PathBuf},
};

use sha2::{Digest, Sha256};

use super::{
    CudaError, compile,
    units::{Arch, Unit, hex},
};

const MARK: &[u8; 8] = b"MXCUBIN1";
const DIGEST: usize = 32;

/// The folders that machine code is looked for in.
pub(super) struct Store {
    ahead: Option<PathBuf>,
    cache: Option<PathBuf>,
}

type Compile<'a> = dyn Fn(&Unit, Arch) -> Result<Vec<u8>, CudaError> + 'a;

/// What compiles, and what its results are filed under.
struct Compiler<'a> {
    version: (u32, u32),
    compile: &'a Compile<'a>,
}

impl Store {
    /// The folders that the environment names.
    pub(super) fn from_env() -> Self {
        let named = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        Self {
            ahead: named("MX_CUBIN_DIR"),
            cache: named("MX_CACHE_DIR")
                .or_else(|| dirs::cache_dir().map(|d| d.join("mxrewrite").join("cubin"))),
        }
    }

    /// Machine code of `unit` for devices of `arch`, from wherever it is.
    pub(super) fn cubin(&self, unit: &Unit, arch: Arch) -> Result<Vec<u8>, CudaError> {
        self.find(unit, arch, || {
            compile::nvrtc()
                .map(|nvrtc| (nvrtc.version, move |u: &Unit, a| nvrtc.compile_unit(u, a)))
        })
    }

    fn find<F>(
        &self,
        unit: &Unit,
        arch: Arch,
        compiler: impl FnOnce() -> Result<((u32, u32), F), CudaError>,
    ) -> Result<Vec<u8>, CudaError>
    where
        F: Fn(&Unit, Arch) -> Result<Vec<u8>, CudaError>,
    {
        if let Some(cubin) = self.ahead.as_deref().and_then(|dir| read_ahead(dir, unit, arch)) {
            return Ok(cubin);
        }
        match compiler() {
            Ok((version, compile)) => {
                self.compiled(unit, arch, &Compiler { version, compile: &compile })
            }
            Err(absent) => self
                .cache
                .as_deref()
                .and_then(|dir| read_any_version(dir, unit, arch))
                .ok_or_else(|| self.explain(absent, unit, arch)),
        }
    }

    fn compiled(
        &self,
        unit: &Unit,
        arch: Arch,
        compiler: &Compiler<'_>,
    ) -> Result<Vec<u8>, CudaError> {
        let (major, minor) = compiler.version;
        let file = format!("{}nvrtc-{major}.{minor}.bin", prefix(unit, arch));
        let path = self.cache.as_ref().map(|dir| dir.join(file));
        if let Some(cubin) = path.as_deref().and_then(read_cached) {
            return Ok(cubin);
        }
        let cubin = (compiler.compile)(unit, arch)?;
        if let Some(path) = path {
            // A cache that cannot be written costs time, nothing else.
            let _ = write_cached(&path, &cubin);
        }
        Ok(cubin)
    }

    /// The reason why there is no NVRTC, and what was found instead of it.
    fn explain(&self, error: CudaError, unit: &Unit, arch: Arch) -> CudaError {
        match (error, &self.ahead) {
            (CudaError::Library { library, reason }, Some(dir)) => CudaError::Library {
                library,
                reason: format!(
                    "{reason}; MX_CUBIN_DIR ({}) has no {} for {arch} of these sources",
                    dir.display(),
                    unit.stem(),
                ),
            },
            (error, _) => error,
        }
    }
}

/// How the names of a unit's files in the cache begin, whatever NVRTC's version.
fn prefix(unit: &Unit, arch: Arch) -> String {
    format!("{}.{arch}.{}.", unit.stem(), &unit.key(arch)[..32])
}

/// A cubin built ahead of time from these very sources, for this or a compatible architecture.
fn read_ahead(dir: &Path, unit: &Unit, arch: Arch) -> Option<Vec<u8>> {
    arch.compatible().into_iter().find_map(|arch| {
        let file = |ext| dir.join(format!("{}.{arch}.{ext}", unit.stem()));
        let key = std::fs::read_to_string(file("key")).ok()?;
        let mut words = key.split_whitespace();
        if words.next()? != unit.key(arch) {
            return None;
        }
        let cubin = std::fs::read(file("cubin")).ok()?;
        (words.next()? == hex(&Sha256::digest(&cubin)) && is_cubin(&cubin)).then_some(cubin)
    })
}

/// The newest whole entry of the cache for these sources.
fn read_any_version(dir: &Path, unit: &Unit, arch: Arch) -> Option<Vec<u8>> {
    let prefix = prefix(unit, arch);
    let mut found: Vec<((u32, u32), PathBuf)> = std::fs::read_dir(dir)
        .ok()?
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name();
            let version = name.to_str()?.strip_prefix(&prefix)?.strip_prefix("nvrtc-")?;
            let (major, minor) = version.strip_suffix(".bin")?.split_once('.')?;
            Some(((major.parse().ok()?, minor.parse().ok()?), entry.path()))
        })
        .collect();
    found.sort();
    found.iter().rev().find_map(|(_, path)| read_cached(path))
}

fn read_cached(path: &Path) -> Option<Vec<u8>> {
    let bytes = std::fs::read(path).ok()?;
    let rest = bytes.strip_prefix(MARK)?;
    let (digest, cubin) = rest.split_at_checked(DIGEST)?;
    (Sha256::digest(cubin).as_slice() == digest && is_cubin(cubin)).then(|| cubin.to_vec())
}

fn write_cached(path: &Path, cubin: &[u8]) -> std::io::Result<()> {
    let dir = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(dir)?;
    let mut file = tempfile::NamedTempFile::new_in(dir)?;
    file.write_all(MARK)?;
    file.write_all(&Sha256::digest(cubin))?;
    file.write_all(cubin)?;
    // No sync: what a crash damages, the digest finds.
    file.persist(path)?;
    Ok(())
}

fn is_cubin(bytes: &[u8]) -> bool {
    bytes.starts_with(b"\x7fELF")
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    const UNIT: Unit = Unit { name: "scores", defines: &[("TEST", 1)] };
    const ARCH: Arch = Arch::of_device(9, 0);
    const CODE: &[u8] = b"\x7fELF machine code";

    fn absent() -> CudaError {
        CudaError::Library { library: "NVRTC", reason: "nowhere".into() }
    }

    /// Asks the store, with a compiler of this version that counts its runs.
    fn ask(store: &Store, version: (u32, u32), runs: &Cell<u32>) -> Vec<u8> {
        let compile = |_: &Unit, _: Arch| {
            runs.set(runs.get() + 1);
            Ok(CODE.to_vec())
        };
        store.find(&UNIT, ARCH, || Ok((version, compile))).unwrap()
    }

    type NoCompiler = fn(&Unit, Arch) -> Result<Vec<u8>, CudaError>;

    fn ask_without(store: &Store) -> Result<Vec<u8>, CudaError> {
        store.find::<NoCompiler>(&UNIT, ARCH, || Err(absent()))
    }

    fn only_file(dir: &Path) -> PathBuf {
        let files: Vec<_> = std::fs::read_dir(dir).unwrap().flatten().collect();
        assert_eq!(files.len(), 1);
        files[0].path()
    }

    #[test]
    fn compiles_once_and_again_when_damaged_or_of_another_version() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store { ahead: None, cache: Some(dir.path().join("a/b")) };
        let runs = Cell::new(0);
        for _ in 0..3 {
            assert_eq!(ask(&store, (13, 0), &runs), CODE);
        }
        assert_eq!(runs.get(), 1);
        let file = only_file(&dir.path().join("a/b"));
        let whole = std::fs::read(&file).unwrap();
        let mut flipped = whole.clone();
        *flipped.last_mut().unwrap() ^= 1;
        for (i, damaged) in
            [&whole[..whole.len() - 1], &whole[..20], &[], &flipped, CODE].iter().enumerate()
        {
            std::fs::write(&file, damaged).unwrap();
            assert_eq!(ask(&store, (13, 0), &runs), CODE);
            assert_eq!(runs.get(), 2 + i as u32);
            assert_eq!(std::fs::read(&file).unwrap(), whole, "written again");
        }
        let before = runs.get();
        ask(&store, (12, 8), &runs);
        assert_eq!(runs.get(), before + 1, "another version is another entry");
    }

    #[test]
    fn without_a_compiler_any_version_will_do() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store { ahead: None, cache: Some(dir.path().into()) };
        assert_eq!(ask_without(&store), Err(absent()));
        ask(&store, (12, 8), &Cell::new(0));
        assert_eq!(ask_without(&store).unwrap(), CODE);
    }

    #[test]
    fn an_unwritable_cache_is_done_without() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "not a folder").unwrap();
        for cache in [None, Some(file.join("below"))] {
            let runs = Cell::new(0);
            let store = Store { ahead: None, cache };
            ask(&store, (13, 0), &runs);
            ask(&store, (13, 0), &runs);
            assert_eq!(runs.get(), 2);
        }
    }

    #[test]
    fn code_built_ahead_is_used_when_its_key_and_digest_fit() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store { ahead: Some(dir.path().into()), cache: None };
        let plain = Arch { specific: false, ..ARCH };
        let file = |ext: &str| dir.path().join(format!("scores-TEST=1.{plain}.{ext}"));
        std::fs::write(file("cubin"), CODE).unwrap();
        let digest = hex(&Sha256::digest(CODE));
        let key = UNIT.key(plain);
        std::fs::write(file("key"), format!("{key} {digest}\n")).unwrap();
        assert_eq!(ask_without(&store).unwrap(), CODE, "sm_90 code serves sm_90a");
        for bad in [format!("0{key} {digest}"), format!("{key} 0{digest}"), key, String::new()] {
            std::fs::write(file("key"), bad).unwrap();
            let error = ask_without(&store).unwrap_err().to_string();
            assert!(error.contains("MX_CUBIN_DIR"), "{error}");
        }
    }
}
