//! Random access for parquet: blocks, read ahead where reading is sequential, kept for a while.

use super::Ranged;
use bytes::{Bytes, BytesMut};
use parquet::errors::ParquetError;
use parquet::file::reader::{ChunkReader, Length};
use std::collections::{HashMap, VecDeque};
use std::io::{self, Read};
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes of a block.
const BLOCK: u64 = 64 << 10;

/// Blocks of the first request of a stream, and the most that later ones grow to.
const AHEAD: (u64, u64) = (2, 64);

/// Blocks kept: 16 MiB.
const KEPT: usize = 256;

/// Streams that are told apart: the columns read, and the pages jumped between.
const STREAMS: usize = 8;

/// A remote file as parquet reads it.
#[derive(Clone)]
pub(in super::super) struct Blocks(Arc<Inner>);

struct Inner {
    file: Ranged,
    cache: Mutex<Cache>,
}

#[derive(Default)]
struct Cache {
    blocks: HashMap<u64, Bytes>,
    /// Oldest first.
    order: VecDeque<u64>,
    /// Where sequential readers will go on, and how many blocks they had last.
    streams: VecDeque<(u64, u64)>,
}

impl Cache {
    /// How many blocks to ask for at a miss of `block`: more where the reader goes on from where
    /// the last request ended.
    fn window(&mut self, block: u64, needed: u64) -> u64 {
        let known = self.streams.iter().position(|&(next, _)| next == block);
        let last = known.and_then(|at| self.streams.remove(at));
        let window = last.map_or(AHEAD.0, |(_, window)| (window * 2).min(AHEAD.1)).max(needed);
        self.streams.push_back((block + window, window));
        if self.streams.len() > STREAMS {
            self.streams.pop_front();
        }
        window
    }

    fn keep(&mut self, block: u64, bytes: Bytes) {
        if self.blocks.insert(block, bytes).is_none() {
            self.order.push_back(block);
        }
        while self.order.len() > KEPT {
            if let Some(oldest) = self.order.pop_front() {
                self.blocks.remove(&oldest);
            }
        }
    }
}

impl Blocks {
    pub(in super::super) fn new(file: Ranged) -> Self {
        Self(Arc::new(Inner { file, cache: Mutex::default() }))
    }

    /// The bytes from `start` to the end of its block, `wanted` at least being expected soon.
    fn piece(&self, start: u64, wanted: u64) -> Result<Bytes, String> {
        let Inner { file, cache } = &*self.0;
        if start >= file.length {
            return Ok(Bytes::new());
        }
        let block = start / BLOCK;
        let mut cache = cache.lock().unwrap_or_else(PoisonError::into_inner);
        if !cache.blocks.contains_key(&block) {
            let blocks = file.length.div_ceil(BLOCK);
            let end = (start + wanted.max(1)).min(file.length).div_ceil(BLOCK);
            let window = cache.window(block, (end - block).min(KEPT as u64 / 2));
            let limit = (block + window).min(blocks);
            // What is there already is not asked for again.
            let end = (block + 1..limit).find(|b| cache.blocks.contains_key(b)).unwrap_or(limit);
            let first = block * BLOCK;
            let bytes = file.fetch(first, (end * BLOCK).min(file.length) - first)?;
            for (at, number) in (block..end).enumerate() {
                let from = at * BLOCK as usize;
                let to = (from + BLOCK as usize).min(bytes.len());
                cache.keep(number, bytes.slice(from..to));
            }
        }
        let offset = (start % BLOCK) as usize;
        Ok(cache.blocks.get(&block).map(|bytes| bytes.slice(offset..)).unwrap_or_default())
    }
}

impl Length for Blocks {
    fn len(&self) -> u64 {
        self.0.file.length
    }
}

impl ChunkReader for Blocks {
    type T = BlockReader;

    fn get_read(&self, start: u64) -> Result<BlockReader, ParquetError> {
        Ok(BlockReader { blocks: self.clone(), position: start })
    }

    fn get_bytes(&self, start: u64, length: usize) -> Result<Bytes, ParquetError> {
        let end = start.checked_add(length as u64).filter(|&end| end <= self.len());
        let end = end.ok_or_else(|| ParquetError::EOF("a part lies past the end".into()))?;
        let mut bytes = BytesMut::new();
        let mut position = start;
        while position < end {
            let piece = self.piece(position, end - position).map_err(ParquetError::General)?;
            let piece = piece.slice(..piece.len().min((end - position) as usize));
            if piece.len() == length {
                return Ok(piece);
            }
            position += piece.len() as u64;
            bytes.extend_from_slice(&piece);
        }
        Ok(bytes.freeze())
    }
}

/// Reads a remote file from a position on.
pub(in super::super) struct BlockReader {
    blocks: Blocks,
    position: u64,
}

impl Read for BlockReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let piece = self.blocks.piece(self.position, 1).map_err(io::Error::other)?;
        let length = piece.len().min(buffer.len());
        buffer[..length].copy_from_slice(&piece[..length]);
        self.position += length as u64;
        Ok(length)
    }
}
