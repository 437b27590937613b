//! Output files that exist whole or not at all.
//!
//! On Linux the bytes go to a file without a name (`O_TMPFILE`), so that nothing is left behind
//! however the process ends; it gets its name when it is complete. Where the file system cannot do
//! that, a temporary file is used that is removed on every error.

use super::error::{Error, Result};
use std::fs::File;
use std::path::{Path, PathBuf};
use tempfile::TempPath;

/// An output that is being written.
pub(crate) struct Output {
    pub file: File,
    /// The temporary name, when it has one.
    temporary: Option<TempPath>,
    target: PathBuf,
}

impl Output {
    /// Starts a file that will become `target`.
    pub(crate) fn create(target: &Path) -> Result<Self> {
        let target = target.to_owned();
        let folder = folder(&target);
        if let Some(file) = nameless::create(folder) {
            return Ok(Self { file, temporary: None, target });
        }
        let temporary = temporary_name().tempfile_in(folder).map_err(|source| Error::Io {
            action: "create a file in",
            path: folder.to_owned(),
            source,
        })?;
        let (file, path) = temporary.into_parts();
        Ok(Self { file, temporary: Some(path), target })
    }

    /// Gives the complete file its name, in place of any file of that name.
    pub(crate) fn persist(self) -> Result<()> {
        let failed = |source| Error::Io { action: "write", path: self.target.clone(), source };
        let temporary = match self.temporary {
            Some(path) => path,
            None => nameless::name(&self.file, &self.target).map_err(failed)?,
        };
        temporary.persist(&self.target).map_err(|error| failed(error.error))
    }
}

/// The folder of a file; a bare name is in the current one.
pub(crate) fn folder(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

fn temporary_name() -> tempfile::Builder<'static, 'static> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(".mxrewrite-").suffix(".tmp");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt as _;
        // As for any file a user makes; the umask takes away what it takes away.
        builder.permissions(std::fs::Permissions::from_mode(0o666));
    }
    builder
}

#[cfg(target_os = "linux")]
mod nameless {
    use super::{File, Path, TempPath, folder, temporary_name};
    use rustix::fs::{AtFlags, CWD, Mode, OFlags};
    use std::os::fd::AsRawFd as _;

    pub(super) fn create(folder: &Path) -> Option<File> {
        if !Path::new("/proc/self/fd").exists() {
            return None;
        }
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(CWD, folder, flags, Mode::from_raw_mode(0o666)).ok()?;
        Some(fd.into())
    }

    /// Links the file under a temporary name beside its target: a link cannot take the place of a
    /// file, a rename can.
    pub(super) fn name(file: &File, target: &Path) -> std::io::Result<TempPath> {
        let source = format!("/proc/self/fd/{}", file.as_raw_fd());
        let named = temporary_name().make_in(folder(target), |path| {
            rustix::fs::linkat(CWD, &source, CWD, path, AtFlags::SYMLINK_FOLLOW).map_err(Into::into)
        })?;
        Ok(named.into_temp_path())
    }
}

#[cfg(not(target_os = "linux"))]
mod nameless {
    use super::{File, Path, TempPath};

    pub(super) fn create(_folder: &Path) -> Option<File> {
        None
    }

    pub(super) fn name(_file: &File, _target: &Path) -> std::io::Result<TempPath> {
        Err(std::io::ErrorKind::Unsupported.into())
    }
}

/// Fails early when the file system of `folder` has less than `needed` bytes left.
pub(crate) fn check_space(target: &Path, needed: u64) -> Result<()> {
    #[cfg(target_os = "linux")]
    if let Ok(stat) = rustix::fs::statvfs(folder(target)) {
        let free = stat.f_bavail.saturating_mul(stat.f_frsize);
        if free < needed {
            return Err(Error::Output {
                path: target.to_owned(),
                what: format!("{needed} bytes are needed, {free} are free on its file system"),
            });
        }
    }
    let _ = (target, needed);
    Ok(())
}
