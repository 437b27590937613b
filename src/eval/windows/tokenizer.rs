//! Documents to windows.

use super::cut::cut;
use super::definition::{Bos, Definition, Mode, SEPARATOR};
use super::encode::{Encoder, Tokens};
use super::{Corpus, Source, Window, beside};
use crate::eval::corpus::Document;
use crate::eval::error::{Error, Result};
use rayon::prelude::*;
use std::path::{Path, PathBuf};

/// Documents tokenised at a time, in parallel; bounds the text held in memory.
const CHUNK: usize = 64;

/// A Hugging Face `tokenizer.json`, set to encode whole documents.
#[derive(Debug)]
pub struct Tokenizer {
    pub(super) encoder: Encoder,
    path: PathBuf,
}

/// The token in front, as a definition asks for it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Front {
    /// The tokenizer adds its special tokens itself.
    special: bool,
    /// In front of a document or of the stream.
    first: Option<u32>,
    /// In place of the first token of every further window.
    each: Option<u32>,
    described: Option<String>,
}

impl Tokenizer {
    /// Reads a `tokenizer.json`. Truncation and padding that the file asks for are switched off:
    /// the window decides what is cut.
    ///
    /// # Errors
    /// The file is missing, a directory, or no tokenizer.
    pub fn open(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(Error::io(path))?;
        Self::from_bytes(path, &bytes)
    }

    pub(super) fn from_bytes(path: &Path, bytes: &[u8]) -> Result<Self> {
        Ok(Self { encoder: Encoder::new(path, bytes)?, path: path.into() })
    }

    /// The files on which windows depend, beside the text: `tokenizer.json`, and those that name
    /// BOS, where the definition asks for one.
    pub fn files(path: &Path, definition: &Definition) -> Vec<PathBuf> {
        let mut files = vec![path.to_path_buf()];
        if matches!(definition.bos, Bos::First | Bos::Each) {
            files.extend(beside::bos_files(path));
        }
        files
    }

    /// Number of tokens, added tokens included.
    pub fn len(&self) -> usize {
        self.encoder.len()
    }

    /// Whether the vocabulary is empty.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Tokenises the first `max_samples` documents and divides them as `definition` says.
    ///
    /// # Errors
    /// A fault of the definition, of the corpus or of the tokenizer; no BOS where one is needed; no
    /// document at all; nothing to score.
    pub fn tokenize(
        &self,
        documents: impl Iterator<Item = Result<Document>>,
        definition: &Definition,
        max_samples: usize,
    ) -> Result<Corpus> {
        definition.check()?;
        let front = self.front(definition)?;
        let documents = documents.take(max_samples);
        let mut corpus = match definition.mode.is_stream() {
            true => self.stream(documents, definition, &front)?,
            false => self.documents(documents, definition, &front)?,
        };
        corpus.bos = front.described;
        Ok(corpus)
    }

    fn front(&self, definition: &Definition) -> Result<Front> {
        let own = self.encoder.around().before.first().copied();
        match (definition.bos, definition.mode) {
            (Bos::None, _) => Ok(Front::default()),
            // llama.cpp: a model whose tokenizer adds BOS has it in front of every window.
            (Bos::Tokenizer, Mode::SecondHalf) => Ok(Front {
                first: own,
                each: own,
                described: own.map(|id| {
                    beside::described(&self.encoder, id, "the tokenizer's post-processor")
                }),
                ..Front::default()
            }),
            (Bos::Tokenizer, _) => Ok(Front { special: true, ..Front::default() }),
            (Bos::First | Bos::Each, mode) => {
                let or_eos = mode == Mode::Rolling;
                let (id, described) = beside::find_bos(&self.path, &self.encoder, or_eos)?;
                let each = Some(id).filter(|_| definition.bos == Bos::Each);
                let described = Some(described);
                Ok(Front { special: false, first: Some(id), each, described })
            }
        }
    }

    /// Tokens of a text, with what stands in front of it.
    fn encode(&self, text: &str, front: &Front) -> Result<Tokens> {
        let mut tokens =
            self.encoder.encode(text, front.special).map_err(|e| Error::Tokenizer {
                path: self.path.clone(),
                reason: format!("cannot encode a text of {} bytes: {e}", text.len()),
            })?;
        if let Some(id) = front.first {
            tokens.put_in_front(id);
        }
        Ok(tokens)
    }

    /// Every document by itself.
    fn documents(
        &self,
        mut documents: impl Iterator<Item = Result<Document>>,
        definition: &Definition,
        front: &Front,
    ) -> Result<Corpus> {
        let mut corpus = Corpus::default();
        loop {
            let chunk: Vec<_> = documents.by_ref().take(CHUNK).collect::<Result<_>>()?;
            if chunk.is_empty() {
                break;
            }
            let windows = |document: &Document| {
                Ok(cut(definition, self.encode(&document.text, front)?, front.each))
            };
            let windows: Vec<_> = chunk.par_iter().map(windows).collect::<Result<_>>()?;
            corpus.read += chunk.len();
            for (document, windows) in chunk.into_iter().zip(windows) {
                if !windows.is_empty() {
                    let subset = document.subset.map(|name| corpus.subset(name));
                    let number = corpus.documents.len();
                    let own = |window| Window { document: number, ..window };
                    corpus.windows.extend(windows.into_iter().map(own));
                    corpus.documents.push(Source { subset });
                }
            }
        }
        match (corpus.read, corpus.windows.len()) {
            (0, _) => Err(nothing("the corpus holds no document".into())),
            (read, 0) => {
                let least =
                    if front.first.is_some() { "no token" } else { "fewer than two tokens" };
                Err(nothing(format!(
                    "no scored token: each of the {read} documents read has {least}"
                )))
            }
            _ => Ok(corpus),
        }
    }

    /// All documents as one stream; every window is a unit by itself.
    fn stream(
        &self,
        documents: impl Iterator<Item = Result<Document>>,
        definition: &Definition,
        front: &Front,
    ) -> Result<Corpus> {
        let mut text = String::new();
        let mut read = 0;
        for document in documents {
            if read > 0 {
                text.push_str(SEPARATOR);
            }
            text.push_str(&document?.text);
            read += 1;
        }
        if read == 0 {
            return Err(nothing("the corpus holds no document".into()));
        }
        let tokens = self.encode(&text, front)?;
        drop(text);
        let (count, seq_len) = (tokens.ids.len(), definition.seq_len);
        let windows = cut(definition, tokens, front.each);
        if windows.is_empty() {
            return Err(nothing(format!(
                "no scored token: the {read} documents read are {count} tokens together, and mode \
                 {} needs at least --seq-len {seq_len}; pass more text or a smaller --seq-len",
                definition.mode
            )));
        }
        let own = |(document, window)| Window { document, ..window };
        Ok(Corpus {
            documents: vec![Source::default(); windows.len()],
            dropped: count - windows.len() * seq_len,
            windows: windows.into_iter().enumerate().map(own).collect(),
            read,
            ..Corpus::default()
        })
    }
}

fn nothing(reason: String) -> Error {
    Error::NothingToScore(reason)
}
