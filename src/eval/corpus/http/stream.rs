//! A remote file from its first byte to its last, or as far as somebody reads.

use super::{Answer, Fault, Ranged, Remote, Version};
use bytes::{Buf as _, Bytes};
use std::io::{self, Read};

/// Largest request; the first ones are smaller, as the reader may stop early.
const LARGEST: u64 = 8 << 20;

/// Reads by ranges that grow, so that whoever stops early has caused little traffic.
pub(in super::super) struct Ranges {
    file: Ranged,
    /// Where the next request starts.
    position: u64,
    window: u64,
    bytes: Bytes,
}

impl Ranges {
    pub(in super::super) fn new(file: Ranged) -> Self {
        let bytes = file.head.clone();
        Self { position: bytes.len() as u64, window: 2 * super::HEAD, bytes, file }
    }
}

impl Read for Ranges {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.bytes.is_empty() {
            let length = self.window.min(self.file.length - self.position);
            if length == 0 {
                return Ok(0);
            }
            self.bytes = self.file.fetch(self.position, length).map_err(io::Error::other)?;
            self.position += length;
            self.window = (self.window * 2).min(LARGEST);
        }
        let length = buffer.len().min(self.bytes.len());
        self.bytes.copy_to_slice(&mut buffer[..length]);
        Ok(length)
    }
}

/// Reads one answer as it comes, from a server that serves no ranges. After a break the file is
/// asked for again and what has been read is passed over.
pub(in super::super) struct Whole {
    remote: Remote,
    version: Version,
    position: u64,
    body: ureq::BodyReader<'static>,
}

impl Whole {
    pub(super) fn new(remote: Remote, version: Version, body: ureq::BodyReader<'static>) -> Self {
        Self { remote, version, position: 0, body }
    }

    /// Reads once; an end before the announced length is a break.
    fn once(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.body.read(buffer)?;
        let missing = self.version.length.is_some_and(|length| self.position < length);
        if read == 0 && missing && !buffer.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.position += read as u64;
        Ok(read)
    }
}

impl Read for Whole {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut broken = match self.once(buffer) {
            Ok(read) => return Ok(read),
            Err(error) => Some(error),
        };
        let remote = self.remote.clone();
        let read = remote.retrying(|_| {
            if let Some(error) = broken.take() {
                return Err(Fault::broken(error));
            }
            // A range from the start: the same request as the first.
            match remote.request(0, None)? {
                Answer::Range(body, version) | Answer::Whole(body, version)
                    if version == self.version =>
                {
                    self.body = body.into_reader();
                }
                _ => return Err(Fault::fatal("changed on the server while it was being read")),
            }
            let passed = io::copy(&mut (&mut self.body).take(self.position), &mut io::sink());
            if passed.map_err(Fault::broken)? < self.position {
                return Err(Fault::broken("it ended early again"));
            }
            self.once(buffer).map_err(Fault::broken)
        });
        read.map_err(io::Error::other)
    }
}
