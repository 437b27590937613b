//! Output that is written and hashed by threads of their own, while the next bytes are made.

use super::encode::Out;
use bytes::Bytes;
use sha2::{Digest as _, Sha256};
use std::fs::File;
use std::io::{self, Write};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::Builder;

/// Bytes that go from thread to thread at a time.
const PIECE: usize = 1 << 20;
/// Pieces on their way to either thread.
const AHEAD: usize = 8;

/// The end of the pipe that bytes go into.
pub(crate) struct Pipe {
    piece: Vec<u8>,
    to_file: SyncSender<Bytes>,
    to_hash: SyncSender<Message>,
}

enum Message {
    Bytes(Bytes),
    /// A place to note the hash of.
    Mark(u64),
}

/// Why a file was not written.
#[derive(Debug)]
pub(crate) enum PipeError<E> {
    /// What makes the bytes failed.
    Made(E),
    /// Writing the file did.
    File(io::Error),
    /// Noting a hash did.
    Note(io::Error),
}

impl Pipe {
    /// Runs `make`, writes what it puts into the pipe behind the file's cursor and hashes it on from
    /// `hash`. At every mark `note` gets the place and the hash of everything before it, which may
    /// be sooner than the bytes are in the file.
    pub(crate) fn run<E: Send>(
        file: &mut File,
        hash: Sha256,
        note: impl FnMut(u64, Sha256) -> io::Result<()> + Send,
        make: impl FnOnce(&mut Self) -> Result<(), E>,
    ) -> Result<Sha256, PipeError<E>> {
        let (to_file, from_file) = sync_channel::<Bytes>(AHEAD);
        let (to_hash, from_hash) = sync_channel(AHEAD);
        std::thread::scope(|scope| {
            let thread = || Builder::new().name("output".to_owned());
            let write = move || from_file.iter().try_for_each(|piece| file.write_all(&piece));
            let writer = thread().spawn_scoped(scope, write).map_err(PipeError::File)?;
            let hash = move || hash_all(hash, &from_hash, note);
            let hasher = thread().spawn_scoped(scope, hash).map_err(PipeError::File)?;
            let mut pipe = Self { piece: Vec::new(), to_file, to_hash };
            let made = make(&mut pipe);
            // A thread that failed has closed its end; its own error says more than that.
            let flushed = pipe.flush();
            drop(pipe);
            let panicked = |_| io::Error::other("a thread of the output panicked");
            let written = writer.join().map_err(panicked).flatten();
            let hashed = hasher.join().map_err(panicked).flatten();
            written.map_err(PipeError::File)?;
            let hash = hashed.map_err(PipeError::Note)?;
            made.map_err(PipeError::Made)?;
            flushed.map_err(PipeError::File)?;
            Ok(hash)
        })
    }

    fn send(&self, piece: Bytes) -> io::Result<()> {
        self.to_file.send(piece.clone()).map_err(|_| closed())?;
        self.to_hash.send(Message::Bytes(piece)).map_err(|_| closed())
    }

    /// Asks for a note of the place `at`, behind everything that went in so far.
    pub(crate) fn mark(&mut self, at: u64) -> io::Result<()> {
        self.flush()?;
        self.to_hash.send(Message::Mark(at)).map_err(|_| closed())
    }
}

impl Out for Pipe {
    fn put(&mut self, mut bytes: Bytes) -> io::Result<()> {
        if bytes.len() < PIECE / 4 {
            return self.write_all(&bytes);
        }
        self.flush()?;
        while !bytes.is_empty() {
            let piece = bytes.split_to(PIECE.min(bytes.len()));
            self.send(piece)?;
        }
        Ok(())
    }
}

impl Write for Pipe {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.piece.capacity() == 0 {
            self.piece.reserve_exact(PIECE);
        }
        let taken = bytes.len().min(PIECE - self.piece.len());
        self.piece.extend_from_slice(&bytes[..taken]);
        if self.piece.len() == PIECE {
            self.flush()?;
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.piece.is_empty() {
            return Ok(());
        }
        let piece = Bytes::from(std::mem::take(&mut self.piece));
        self.send(piece)
    }
}

fn closed() -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, "the output has failed")
}

fn hash_all(
    mut hash: Sha256,
    messages: &Receiver<Message>,
    mut note: impl FnMut(u64, Sha256) -> io::Result<()>,
) -> io::Result<Sha256> {
    for message in messages {
        match message {
            Message::Bytes(piece) => hash.update(&piece),
            Message::Mark(at) => note(at, hash.clone())?,
        }
    }
    Ok(hash)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read as _, Seek as _};

    #[test]
    fn what_goes_in_is_in_the_file_and_in_the_hash() {
        let mut file = tempfile::tempfile().unwrap();
        let content: Vec<u8> = (0..3 * PIECE + 17).map(|i| (i % 251) as u8).collect();
        let mut notes = Vec::new();
        let note = |at: u64, hash: Sha256| {
            notes.push((at, hash.finalize()));
            Ok(())
        };
        let hash = Pipe::run(&mut file, Sha256::new(), note, |pipe| {
            pipe.write_all(&content[..PIECE + 5])?;
            pipe.mark(PIECE as u64 + 5)?;
            pipe.write_all(&content[PIECE + 5..PIECE + 9])?;
            // A few bytes that are copied, then some that go on as they are.
            pipe.put(Bytes::copy_from_slice(&content[PIECE + 9..PIECE + 20]))?;
            pipe.put(Bytes::copy_from_slice(&content[PIECE + 20..]))
        });
        assert_eq!(hash.unwrap().finalize(), Sha256::digest(&content));
        assert_eq!(notes, [(PIECE as u64 + 5, Sha256::digest(&content[..PIECE + 5]))]);
        let mut read = Vec::new();
        file.rewind().unwrap();
        file.read_to_end(&mut read).unwrap();
        assert_eq!(read, content);
    }

    #[test]
    fn the_error_is_that_of_whoever_failed() {
        let endless = |pipe: &mut Pipe| loop {
            pipe.write_all(&[0; 4096])?;
        };
        // A file that was opened for reading only.
        let mut file = File::open(file!()).or_else(|_| File::open("/dev/null")).unwrap();
        let result = Pipe::run::<io::Error>(&mut file, Sha256::new(), |_, _| Ok(()), endless);
        assert!(matches!(result, Err(PipeError::File(e)) if e.kind() != io::ErrorKind::BrokenPipe));

        let mut file = tempfile::tempfile().unwrap();
        let full = |_, _| Err(io::Error::from(io::ErrorKind::StorageFull));
        let result = Pipe::run(&mut file, Sha256::new(), full, |pipe| {
            pipe.mark(0)?;
            endless(pipe)
        });
        assert!(
            matches!(result, Err(PipeError::Note(e)) if e.kind() == io::ErrorKind::StorageFull)
        );

        let result = Pipe::run(&mut file, Sha256::new(), |_, _| Ok(()), |_| Err("a bad tensor"));
        assert!(matches!(result, Err(PipeError::Made("a bad tensor"))));
    }
}
