//! A uniform random sample without replacement, in random order, of documents in any number of
//! files.
//!
//! Every document of the whole text draws a random 64-bit key, in the order of the text; the sample
//! is those with the smallest keys, in the order of keys (Efraimidis and Spirakis, "Weighted random
//! sampling with a reservoir", 2006, with equal weights). So one pass suffices where the number of
//! documents is unknown, a sample of 100 is the beginning of a sample of 1,000, and it does not
//! matter how the same documents are stored.

use super::{Document, Source};
use crate::eval::error::{Error, Result};
use crate::eval::observer::Observer;
use rand_pcg::Pcg64;
use rand_pcg::rand_core::{Rng as _, SeedableRng as _};
use std::collections::{BTreeMap, BinaryHeap};

/// A document of the sample, or where it is.
enum Place {
    Read(Document),
    Row { source: usize, row: u64 },
}

/// A document with its key; ties go to the earlier one.
struct Drawn {
    key: (u64, u64),
    place: Place,
}

impl PartialEq for Drawn {
    fn eq(&self, other: &Self) -> bool {
        self.key == other.key
    }
}
impl Eq for Drawn {}
impl PartialOrd for Drawn {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Drawn {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.key.cmp(&other.key)
    }
}

/// The documents with the smallest keys so far.
struct Reservoir {
    size: usize,
    random: Pcg64,
    seen: u64,
    heap: BinaryHeap<Drawn>,
}

impl Reservoir {
    /// Draws the key of the next document; `None` where it is not among the smallest.
    fn draw(&mut self) -> Option<(u64, u64)> {
        let key = (self.random.next_u64(), self.seen);
        self.seen += 1;
        let full = self.heap.len() >= self.size;
        let taken = !full || self.heap.peek().is_some_and(|largest| key < largest.key);
        (taken && self.size > 0).then_some(key)
    }

    fn put(&mut self, key: (u64, u64), place: Place) {
        self.heap.push(Drawn { key, place });
        if self.heap.len() > self.size {
            self.heap.pop();
        }
    }
}

/// Draws `size` documents of all `sources`, or all of them where there are no more.
pub(super) fn sample(
    sources: &[Source],
    size: usize,
    seed: u64,
    observer: &dyn Observer,
) -> Result<Vec<Document>> {
    let random = Pcg64::seed_from_u64(seed);
    let mut reservoir = Reservoir { size, random, seen: 0, heap: BinaryHeap::new() };
    for (index, source) in sources.iter().enumerate() {
        if source.is_table() {
            for row in 0..source.count(observer)? {
                if row % (1 << 20) == 0 && observer.interrupted() {
                    return Err(Error::Interrupted);
                }
                if let Some(key) = reservoir.draw() {
                    reservoir.put(key, Place::Row { source: index, row });
                }
            }
            continue;
        }
        observer.note(&format!(
            "{}: JSON Lines cannot be sampled without reading all of it",
            source.name().display()
        ));
        for document in source.open(observer)? {
            if observer.interrupted() {
                return Err(Error::Interrupted);
            }
            let document = document?;
            if let Some(key) = reservoir.draw() {
                reservoir.put(key, Place::Read(document));
            }
        }
    }
    let drawn = reservoir.heap.into_sorted_vec();
    let places: Vec<_> = drawn.into_iter().map(|drawn| drawn.place).collect();
    fetch(sources, places, observer)
}

/// The documents at `places`, each source being read once and forwards.
fn fetch(sources: &[Source], places: Vec<Place>, observer: &dyn Observer) -> Result<Vec<Document>> {
    let mut documents: Vec<Option<Document>> = Vec::with_capacity(places.len());
    let mut wanted: BTreeMap<usize, Vec<(u64, usize)>> = BTreeMap::new();
    for (at, place) in places.into_iter().enumerate() {
        match place {
            Place::Read(document) => documents.push(Some(document)),
            Place::Row { source, row } => {
                wanted.entry(source).or_default().push((row, at));
                documents.push(None);
            }
        }
    }
    for (index, mut rows) in wanted {
        rows.sort_unstable();
        let source = &sources[index];
        let picked = source.pick(rows.iter().map(|&(row, _)| row).collect(), observer)?;
        for (document, (_, at)) in picked.zip(rows) {
            if observer.interrupted() {
                return Err(Error::Interrupted);
            }
            documents[at] = Some(document?);
        }
    }
    let changed = || Error::NothingToScore("the text lost documents while it was read".into());
    documents.into_iter().map(|document| document.ok_or_else(changed)).collect()
}
