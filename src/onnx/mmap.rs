//! Files mapped into memory.
#![allow(unsafe_code)]

use super::error::{Error, Result};
use bytes::Bytes;
use std::fs::File;
use std::path::Path;

/// Maps a file read-only. An empty file gives empty bytes.
///
/// The mapping keeps the file's pages, not a copy: as with every memory-mapped reader, the file must
/// not be truncated by another process while it is in use.
pub(crate) fn map(path: &Path) -> Result<Bytes> {
    let io = |action| move |source| Error::Io { action, path: path.to_owned(), source };
    // Before opening: to open a named pipe waits for a writer.
    let metadata = std::fs::metadata(path).map_err(io("open"))?;
    if metadata.is_dir() {
        return Err(io("read")(std::io::Error::other("is a directory, expected a file")));
    }
    if !metadata.is_file() {
        return Err(io("read")(std::io::Error::other("is not a regular file")));
    }
    let file = File::open(path).map_err(io("open"))?;
    if file.metadata().map_err(io("read"))?.len() == 0 {
        return Ok(Bytes::new());
    }
    // SAFETY: the mapping is private and read-only, and lives as long as the `Bytes` that own it. Rust
    // code never writes through it; that no other process shortens the file is the documented condition
    // of use (a violation raises SIGBUS, it does not corrupt memory).
    let mapping = unsafe { memmap2::Mmap::map(&file) }.map_err(io("map"))?;
    Ok(Bytes::from_owner(mapping))
}
