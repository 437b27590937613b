//! Files mapped into memory.
#![allow(unsafe_code)]

use super::error::{Error, Result};
use bytes::Bytes;
use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

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
    Ok(Bytes::from_owner(Mapped::new(mapping)))
}

/// First byte and end of every mapping that is alive.
static ALIVE: Mutex<BTreeMap<usize, usize>> = Mutex::new(BTreeMap::new());

fn alive() -> MutexGuard<'static, BTreeMap<usize, usize>> {
    ALIVE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A mapping that [`release`] knows of.
struct Mapped(memmap2::Mmap);

impl Mapped {
    fn new(mapping: memmap2::Mmap) -> Self {
        let range = mapping.as_ptr_range();
        alive().insert(range.start as usize, range.end as usize);
        Self(mapping)
    }
}

impl AsRef<[u8]> for Mapped {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        alive().remove(&(self.0.as_ptr() as usize));
    }
}

/// Takes the pages that lie wholly in `bytes` out of this process's memory, when they are pages of a
/// mapped file: a model that is larger than the memory is read once, piece by piece. They come
/// back from the file when they are read again. Anything else than a mapped file is left alone.
pub(crate) fn release(bytes: &[u8]) {
    #[cfg(target_os = "linux")]
    {
        let page = rustix::param::page_size();
        let range = bytes.as_ptr_range();
        let start = (range.start as usize).next_multiple_of(page);
        let end = range.end as usize / page * page;
        let alive = alive();
        let inside = alive.range(..=start).next_back().is_some_and(|(_, &to)| end <= to);
        if start < end && inside {
            let first = std::ptr::with_exposed_provenance_mut(start);
            // SAFETY: whole pages of one read-only file mapping, which lives while `bytes` is
            // borrowed; pages that are dropped read the same from the file again.
            let _ = unsafe {
                rustix::mm::madvise(first, end - start, rustix::mm::Advice::LinuxDontNeed)
            };
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = bytes;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn released_pages_come_back_and_memory_is_left_alone() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let content: Vec<u8> = (0..100_000_u32).map(|i| (i % 251) as u8).collect();
        std::fs::write(file.path(), &content).unwrap();
        let bytes = map(file.path()).unwrap();
        release(&bytes[100..90_000]);
        release(&bytes[1..2]);
        assert_eq!(bytes, content);
        // What is no mapping would lose its content for good.
        release(&content);
        assert_eq!(bytes, content);
        let start = bytes.as_ptr() as usize;
        assert!(alive().contains_key(&start));
        drop(bytes);
        assert!(!alive().contains_key(&start));
    }
}
