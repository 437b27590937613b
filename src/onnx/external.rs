//! External data files: found, checked, mapped once.
//!
//! A `location` comes from an untrusted file. It must be relative, must not leave the model's folder
//! (neither by `..` nor through a symbolic link), and the range it names must lie inside the file.

use super::error::{Error, Result};
use super::mmap;
use super::tensor::ExternalRef;
use bytes::Bytes;
use std::collections::{BTreeSet, HashMap};
use std::path::{Component, Path, PathBuf};
use std::sync::Mutex;

/// The external data files of one model.
#[derive(Debug, Default)]
pub(crate) struct ExternalFiles {
    dir: Option<PathBuf>,
    /// Every location that the model as opened refers to, wherever in it. A rewritten model may have
    /// dropped its last reference to a file that the input still needs.
    pub(super) locations: BTreeSet<String>,
    mapped: Mutex<HashMap<String, Bytes>>,
}

impl ExternalFiles {
    pub(crate) fn new(dir: Option<&Path>) -> Self {
        // A bare file name has the parent "".
        let dir = dir.map(|d| if d.as_os_str().is_empty() { Path::new(".") } else { d }.to_owned());
        Self { dir, locations: BTreeSet::new(), mapped: Mutex::default() }
    }

    pub(crate) fn dir(&self) -> Option<&Path> {
        self.dir.as_deref()
    }

    /// The `expected` bytes that `reference` names.
    pub(crate) fn read(
        &self,
        tensor: &str,
        reference: &ExternalRef,
        expected: u64,
    ) -> Result<Bytes> {
        let fail = |what: String| Error::External {
            tensor: tensor.to_owned(),
            location: reference.location.clone(),
            what,
        };
        let file = self.file(reference, &fail)?;
        let size = file.len() as u64;
        let offset = reference.offset;
        if offset > size {
            return Err(fail(format!("has {size} bytes, but the data starts at byte {offset}")));
        }
        let length = reference.length.unwrap_or(size - offset);
        let end = offset.checked_add(length).filter(|&end| end <= size).ok_or_else(|| {
            fail(format!(
                "has {size} bytes, but {length} are needed from byte {offset} on; is it cut off?"
            ))
        })?;
        if length != expected {
            return Err(fail(format!(
                "holds {length} bytes for it, but its shape takes {expected}"
            )));
        }
        Ok(file.slice(offset as usize..end as usize))
    }

    fn file(&self, reference: &ExternalRef, fail: &dyn Fn(String) -> Error) -> Result<Bytes> {
        let mut mapped = self.mapped.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(bytes) = mapped.get(&reference.location) {
            return Ok(bytes.clone());
        }
        let path = self.resolve(&reference.location, fail)?;
        let bytes = mmap::map(&path).map_err(|error| match error {
            Error::Io { action, source, .. } => fail(format!("cannot be used: {action}: {source}")),
            other => other,
        })?;
        mapped.insert(reference.location.clone(), bytes.clone());
        Ok(bytes)
    }

    /// The canonical path of `location`, which lies inside the model's folder.
    fn resolve(&self, location: &str, fail: &dyn Fn(String) -> Error) -> Result<PathBuf> {
        let Some(dir) = &self.dir else {
            return Err(fail(
                "cannot be found: the model was loaded from memory without a folder".into(),
            ));
        };
        check_location(location).map_err(|what| fail(what.into()))?;
        let canonical_dir = dir.canonicalize().map_err(|source| Error::Io {
            action: "open",
            path: dir.clone(),
            source,
        })?;
        let joined = dir.join(location);
        let path = joined.canonicalize().map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => {
                fail(format!("is missing from the model's folder '{}'", dir.display()))
            }
            _ => fail(format!("cannot be opened: {error}")),
        })?;
        if !path.starts_with(&canonical_dir) {
            return Err(fail("is a symbolic link that leaves the model's folder; refused".into()));
        }
        Ok(path)
    }
}

/// Refuses locations that are empty, absolute or climb out of the folder.
pub(crate) fn check_location(location: &str) -> Result<(), &'static str> {
    if location.is_empty() {
        return Err("has no location");
    }
    if location.contains('\0') {
        return Err("has a NUL in its name; refused");
    }
    // A Windows drive or UNC path must not become acceptable because the checker runs on Unix.
    let drive = location.as_bytes().get(1) == Some(&b':');
    if Path::new(location).is_absolute() || location.starts_with(['/', '\\']) || drive {
        return Err("is an absolute path; external data must lie in the model's folder");
    }
    let climbs = location.split(['/', '\\']).any(|part| part == "..");
    let odd = Path::new(location)
        .components()
        .any(|c| !matches!(c, Component::Normal(_) | Component::CurDir));
    if climbs || odd {
        return Err("leaves the model's folder by '..'; refused");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::check_location;

    #[test]
    fn locations_stay_inside() {
        for good in ["model.onnx.data", "./w", "sub/w.bin", "a..b", "..w"] {
            assert_eq!(check_location(good), Ok(()), "{good}");
        }
        for bad in [
            "",
            "/etc/passwd",
            "../w",
            "a/../../w",
            "a/..",
            "..",
            "C:\\w",
            "\\\\host\\w",
            "a\\..\\w",
            "a\0b",
        ] {
            assert!(check_location(bad).is_err(), "{bad}");
        }
    }
}
