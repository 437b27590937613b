//! Data files that survive the end of their process: written under a temporary name, beside a journal
//! of the tensors that are complete, so that a later run can go on.
//!
//! The journal's first line says what is being written; every further one is the offset behind a
//! complete tensor and the hash of all bytes before it. Nothing in either file is believed: what is
//! there is read and hashed again, and whatever does not agree is written anew.

use super::encode::{Chunk, Chunks};
use super::error::{Error, Result};
use super::pipe::{Pipe, PipeError};
use super::progress::Meter;
use sha2::{Digest as _, Sha256};
use std::fs::{File, OpenOptions};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};

/// A data file on its way to its name.
pub(crate) struct Partial {
    target: PathBuf,
    /// Of the complete content, in hexadecimal.
    pub sha256: String,
}

/// `<target>.partial`
pub(crate) fn partial_path(target: &Path) -> PathBuf {
    with_suffix(target, ".partial")
}

/// `<target>.journal`
pub(crate) fn journal_path(target: &Path) -> PathBuf {
    with_suffix(target, ".journal")
}

fn with_suffix(target: &Path, suffix: &str) -> PathBuf {
    let mut name = target.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// Bytes of a file that is there, else 0.
pub(crate) fn present(path: &Path) -> u64 {
    std::fs::metadata(path).map_or(0, |metadata| metadata.len())
}

impl Partial {
    /// Writes the content of a data file. With `resume`, what a killed run of the same `job` has left
    /// is kept as far as it is sound. After an error nothing is left.
    pub(crate) fn write(
        target: &Path,
        chunks: &Chunks,
        job: &str,
        resume: bool,
        meter: &Meter<'_>,
    ) -> Result<Self> {
        let this = Self { target: target.to_owned(), sha256: String::new() };
        let written = this.write_chunks(chunks, job, resume, meter);
        match written {
            Ok(sha256) => Ok(Self { sha256, ..this }),
            // Another run's files are not ours to remove.
            Err(Failure::Busy(error)) => Err(error),
            Err(Failure::Other(error)) => {
                this.discard();
                Err(error)
            }
        }
    }

    fn write_chunks(
        &self,
        chunks: &Chunks,
        job: &str,
        resume: bool,
        meter: &Meter<'_>,
    ) -> Result<String, Failure> {
        let path = partial_path(&self.target);
        let failed = |source: std::io::Error| match source.kind() {
            std::io::ErrorKind::StorageFull => Error::Output {
                path: path.clone(),
                what: format!("no space left on its file system; {} bytes are needed", chunks.len),
            },
            _ => Error::Io { action: "write", path: path.clone(), source },
        };
        if resume && !path.exists() && self.target.exists() {
            // Killed between giving the data and the model their names.
            std::fs::rename(&self.target, &path).map_err(failed)?;
        }
        let mut options = OpenOptions::new();
        let mut file = options
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(failed)?;
        lock(&file, &path)?;
        let header = format!("mxrewrite-journal 1 {job}\n");
        let journal_path = journal_path(&self.target);
        let (start, hash) = match resume {
            true => sound(&mut file, &journal_path, &header).map_err(failed)?,
            false => (0, Sha256::new()),
        };
        file.set_len(start).and_then(|()| file.seek(SeekFrom::Start(start))).map_err(failed)?;
        let journal = |source| Error::Io { action: "write", path: journal_path.clone(), source };
        let mut notes = File::create(&journal_path).map_err(journal)?;
        notes.write_all(header.as_bytes()).map_err(journal)?;
        let note =
            |at: u64, hash: Sha256| notes.write_all(format!("{at} {}\n", hex(hash)).as_bytes());
        let hash = Pipe::run(&mut file, hash, note, |pipe| {
            let mut at = 0;
            for chunk in &chunks.list {
                at += chunk.len();
                // The journal only names ends of chunks, unless it is not ours: `sound` checked the job.
                if at > start {
                    chunk.write(pipe, &failed)?;
                }
                if at >= start && matches!(chunk, Chunk::Payload(..)) {
                    pipe.mark(at).map_err(failed)?;
                }
                meter.add(chunk.len())?;
            }
            Ok(())
        });
        let hash = hash.map_err(|error| match error {
            PipeError::Made(error) => error,
            PipeError::File(source) => failed(source),
            PipeError::Note(source) => journal(source),
        })?;
        Ok(hex(hash))
    }

    /// Gives the complete file its name.
    pub(crate) fn persist(&self) -> Result<()> {
        std::fs::rename(partial_path(&self.target), &self.target).map_err(|source| Error::Io {
            action: "write",
            path: self.target.clone(),
            source,
        })
    }

    /// Removes what is left beside the file.
    pub(crate) fn discard(&self) {
        let _ = std::fs::remove_file(partial_path(&self.target));
        let _ = std::fs::remove_file(journal_path(&self.target));
    }
}

enum Failure {
    Busy(Error),
    Other(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Other(error)
    }
}

/// Keeps two runs from writing one file. The lock goes with the process, however it ends.
fn lock(file: &File, path: &Path) -> Result<(), Failure> {
    #[cfg(unix)]
    if rustix::fs::flock(file, rustix::fs::FlockOperation::NonBlockingLockExclusive).is_err() {
        let what = "another run is writing it; wait for its end or choose another output";
        return Err(Failure::Busy(Error::Output { path: path.to_owned(), what: what.to_owned() }));
    }
    let _ = (file, path);
    Ok(())
}

/// How much of a partial file is as its journal says, and the hash of that.
fn sound(file: &mut File, journal: &Path, header: &str) -> std::io::Result<(u64, Sha256)> {
    let fresh = || Ok((0, Sha256::new()));
    let Ok(text) = std::fs::read_to_string(journal) else { return fresh() };
    let Some(notes) = text.strip_prefix(header) else { return fresh() };
    // A line that the kill cut off has no end.
    let complete = notes.rfind('\n').map_or("", |end| &notes[..end]);
    let length = file.metadata()?.len();
    let parse = |line: &str| {
        let (end, hash) = line.split_once(' ')?;
        Some((end.parse::<u64>().ok()?, hash.to_owned()))
    };
    let notes = complete.lines().map_while(parse).filter(|(end, _)| *end <= length);
    let mut best = (0, Sha256::new());
    let mut hash = Sha256::new();
    let (mut at, mut buffer) = (0, vec![0; 1 << 20]);
    for (end, expected) in notes {
        while at < end {
            let piece = &mut buffer[..(end - at).min(1 << 20) as usize];
            file.read_exact(piece)?;
            hash.update(&*piece);
            at += piece.len() as u64;
        }
        if at != end || hex(hash.clone()) != expected {
            break;
        }
        best = (end, hash.clone());
    }
    Ok(best)
}

/// The hash so far as text.
pub(crate) fn hex(hash: Sha256) -> String {
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}
