//! The text of a run: sources in their order, or a sample of them.

use super::{Document, Source, shuffle};
use crate::eval::error::{Error, Result};
use crate::eval::observer::Observer;
use sha2::{Digest as _, Sha256};

/// Sources and the order in which their documents are taken. The order is a function of the files,
/// the number of documents and the seed, of nothing else.
#[derive(Clone, Debug)]
pub struct Text {
    sources: Vec<Source>,
    seed: Option<u64>,
}

impl Text {
    /// The documents of `sources` in their order or, with a seed, a uniform random sample of all of
    /// them in random order.
    pub fn new(sources: Vec<Source>, seed: Option<u64>) -> Self {
        Self { sources, seed }
    }

    /// The sources, in order.
    pub fn sources(&self) -> &[Source] {
        &self.sources
    }

    /// Seed of the sample; `None` in the order of the sources.
    pub fn seed(&self) -> Option<u64> {
        self.seed
    }

    /// The sources in words, for a message.
    pub fn describe(&self) -> String {
        match self.sources.as_slice() {
            [] => "nothing".into(),
            [source] => source.name().display().to_string(),
            [first, rest @ ..] => {
                format!("{} and {} more files", first.name().display(), rest.len())
            }
        }
    }

    /// At most `max_samples` documents. In the order of the sources these are read as they are asked
    /// for; a sample is drawn first, which reads every JSON Lines file to its end, and is held in
    /// memory.
    ///
    /// # Errors
    /// As for [`super::open`], from drawing a sample. Everything else comes out of the iterator.
    pub fn documents<'a>(
        &'a self,
        max_samples: usize,
        observer: &'a dyn Observer,
    ) -> Result<Box<dyn Iterator<Item = Result<Document>> + Send + 'a>> {
        if let Some(seed) = self.seed {
            let sample = shuffle::sample(&self.sources, max_samples, seed, observer)?;
            return Ok(Box::new(sample.into_iter().map(Ok)));
        }
        let documents = self.sources.iter().flat_map(move |source| {
            let documents = source.open(observer);
            documents.unwrap_or_else(|error| Box::new(std::iter::once(Err(error))))
        });
        let watched = documents.map(move |document| match observer.interrupted() {
            true => Err(Error::Interrupted),
            false => document,
        });
        Ok(Box::new(watched.take(max_samples)))
    }
}

/// SHA-256 over documents, in order: of each the length of its text in bytes as a little-endian
/// 64-bit number, the text, and the same of its subset, with length 2^64 - 1 for none.
#[derive(Clone, Debug, Default)]
pub struct TextDigest(Sha256);

impl TextDigest {
    /// Adds a document.
    pub fn update(&mut self, document: &Document) {
        let parts = [Some(&document.text), document.subset.as_ref()];
        for part in parts {
            let length = part.map_or(u64::MAX, |text| text.len() as u64);
            self.0.update(length.to_le_bytes());
            self.0.update(part.map_or(&[][..], |text| text.as_bytes()));
        }
    }

    /// The digest in hexadecimal.
    pub fn finish(self) -> String {
        crate::eval::process::hex(&self.0.finalize())
    }
}
