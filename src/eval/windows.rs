//! Documents to token windows: what is scored, and how many bytes of text that is.
//!
//! Mode `per-document`: a document is tokenised by itself, special tokens added exactly when the
//! tokenizer's own post-processor adds them; its window is its first `seq_len` tokens, of which all
//! but the first are predicted from those before them.

use super::corpus::Document;
use super::error::{Error, Result};
use rayon::prelude::*;
use std::path::{Path, PathBuf};

/// Documents tokenised at a time, in parallel; bounds the text held in memory.
const CHUNK: usize = 64;

/// The definition printed with every result.
pub const DEFINITION: &str = "per-document: each document is tokenised by itself and its first \
seq_len tokens are scored by next-token cross-entropy; special tokens such as BOS only where the \
tokenizer adds them; padding is masked out of everything; documents of fewer than two tokens score \
nothing. xent = sum of nll / scored tokens over all documents (nats); ppl = exp(xent); entropy = \
mean entropy of the predicted distribution (nats); bits/byte = sum of nll / ln 2 / UTF-8 bytes of \
the text that the scored tokens cover.";

/// One run of tokens through the model.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Window {
    /// Token ids, the last scored one included. At least two.
    pub ids: Vec<u32>,
    /// How many of `ids` are fed, from the first: all, or all but the last where that one is only
    /// predicted.
    pub inputs: usize,
    /// Index into `ids` of the first scored token, at least 1; it and all after it are scored.
    pub first_scored: usize,
    /// UTF-8 bytes of text that this window's scored tokens cover.
    pub bytes: u64,
    /// Index into [`Corpus::documents`].
    pub document: usize,
}

impl Window {
    /// A window that is fed as a whole and scored from its second token on.
    pub fn whole(ids: Vec<u32>, bytes: u64, document: usize) -> Self {
        Self { inputs: ids.len(), first_scored: 1, ids, bytes, document }
    }

    /// Tokens that are predicted.
    pub fn scored(&self) -> usize {
        self.ids.len().saturating_sub(self.first_scored.max(1))
    }
}

/// What a window belongs to: a document, or a piece of the stream that documents are joined to.
/// Sums are kept, and resampled, by it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Source {
    /// Index into [`Corpus::subsets`].
    pub subset: Option<usize>,
}

/// A tokenised corpus. Every document listed has at least one window; the windows of a document
/// follow each other, and documents are in the order of the text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Corpus {
    /// The windows.
    pub windows: Vec<Window>,
    /// The documents that score anything.
    pub documents: Vec<Source>,
    /// Names of the subsets, in order of appearance.
    pub subsets: Vec<String>,
    /// Documents read, including those too short to score.
    pub read: usize,
}

impl Corpus {
    /// Scored tokens of all windows.
    pub fn tokens(&self) -> u64 {
        self.windows.iter().map(|w| w.scored() as u64).sum()
    }

    /// The largest token id.
    pub fn largest_id(&self) -> Option<u32> {
        self.windows.iter().flat_map(|w| w.ids.iter().copied()).max()
    }
}

/// A Hugging Face `tokenizer.json`, set to encode whole documents.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    path: PathBuf,
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

    fn from_bytes(path: &Path, bytes: &[u8]) -> Result<Self> {
        let error = |e: tokenizers::Error| Error::Tokenizer {
            path: path.into(),
            reason: format!("not a Hugging Face tokenizer.json: {e}"),
        };
        let mut inner = tokenizers::Tokenizer::from_bytes(bytes).map_err(error)?;
        inner.with_truncation(None).map_err(error)?;
        inner.with_padding(None);
        Ok(Self { inner, path: path.into() })
    }

    /// Number of tokens, added tokens included.
    pub fn len(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// Whether the vocabulary is empty.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The window of one text, or `None` when fewer than two tokens leave nothing to predict.
    ///
    /// # Errors
    /// The tokenizer fails on the text.
    pub fn window(&self, text: &str, seq_len: usize) -> Result<Option<Window>> {
        let encoding = self.inner.encode(text, true).map_err(|e| Error::Tokenizer {
            path: self.path.clone(),
            reason: format!("cannot encode a document of {} bytes: {e}", text.len()),
        })?;
        let length = encoding.len().min(seq_len);
        if length < 2 {
            return Ok(None);
        }
        let bytes = covered_bytes(&encoding.get_offsets()[..length]);
        Ok(Some(Window::whole(encoding.get_ids()[..length].to_vec(), bytes, 0)))
    }

    /// Tokenises the first `max_samples` documents.
    ///
    /// # Errors
    /// A fault of the corpus or of the tokenizer; no document at all; no document of two tokens.
    pub fn tokenize(
        &self,
        documents: impl Iterator<Item = Result<Document>>,
        seq_len: usize,
        max_samples: usize,
    ) -> Result<Corpus> {
        if seq_len < 2 {
            return Err(Error::Usage(format!("--seq-len {seq_len}: at least 2 tokens are needed")));
        }
        let mut corpus = Corpus::default();
        let mut documents = documents.take(max_samples);
        loop {
            let chunk: Vec<_> = documents.by_ref().take(CHUNK).collect::<Result<_>>()?;
            if chunk.is_empty() {
                break;
            }
            let windows: Vec<_> =
                chunk.par_iter().map(|d| self.window(&d.text, seq_len)).collect::<Result<_>>()?;
            corpus.read += chunk.len();
            for (document, window) in chunk.into_iter().zip(windows) {
                if let Some(window) = window {
                    let subset = document.subset.map(|name| corpus.subset(name));
                    corpus.windows.push(Window { document: corpus.documents.len(), ..window });
                    corpus.documents.push(Source { subset });
                }
            }
        }
        match (corpus.read, corpus.windows.len()) {
            (0, _) => Err(Error::NothingToScore("the corpus holds no document".into())),
            (read, 0) => Err(Error::NothingToScore(format!(
                "no scored token: each of the {read} documents read has fewer than two tokens"
            ))),
            _ => Ok(corpus),
        }
    }
}

impl Corpus {
    fn subset(&mut self, name: String) -> usize {
        self.subsets.iter().position(|known| *known == name).unwrap_or_else(|| {
            self.subsets.push(name);
            self.subsets.len() - 1
        })
    }
}

/// UTF-8 bytes covered by `offsets[1..]`, each byte once.
///
/// Special tokens have empty offsets. The tokens of one character that a byte-level tokenizer
/// splits all carry the whole character, so lengths must not be added up: the span is taken. It
/// starts where the unscored first token ends, or earlier where a scored token reaches back into
/// that token's last character, so that white space which a tokenizer trims from its offsets
/// (`trim_offsets`) is counted for the token that holds it.
fn covered_bytes(offsets: &[(usize, usize)]) -> u64 {
    let Some((first, scored)) = offsets.split_first() else { return 0 };
    let covering = || scored.iter().filter(|(start, end)| end > start);
    let Some(end) = covering().map(|&(_, end)| end).max() else { return 0 };
    let start = covering().map(|&(start, _)| start).min().unwrap_or(end).min(first.1);
    end.saturating_sub(start) as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn tokenizer(value: &serde_json::Value) -> Tokenizer {
        Tokenizer::from_bytes(Path::new("test.json"), value.to_string().as_bytes()).unwrap()
    }

    /// Byte-level BPE without merges: one token a byte; `bos` adds token 256 in front.
    fn byte_level(bos: bool, trim: bool) -> serde_json::Value {
        let mut alphabet: Vec<char> =
            tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet().into_iter().collect();
        alphabet.sort_unstable();
        let mut vocab: serde_json::Map<_, _> =
            alphabet.iter().enumerate().map(|(i, c)| (c.to_string(), i.into())).collect();
        vocab.insert("Ġw".into(), 257.into());
        let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false,
            "trim_offsets": trim, "use_regex": true});
        let template = json!({"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                       {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}},
                     {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [256], "tokens": ["<s>"]}}});
        json!({"version": "1.0",
            "truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst",
                           "stride": 0},
            "padding": {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": null,
                        "pad_id": 0, "pad_type_id": 0, "pad_token": "!"},
            "added_tokens": [{"id": 256, "content": "<s>", "single_word": false, "lstrip": false,
                              "rstrip": false, "normalized": false, "special": true}],
            "normalizer": null, "pre_tokenizer": byte_level,
            "post_processor": if bos { template } else { byte_level.clone() },
            "decoder": null,
            "model": {"type": "BPE", "dropout": null, "unk_token": null,
                "continuing_subword_prefix": null, "end_of_word_suffix": null,
                "fuse_unk": false, "byte_fallback": false, "vocab": vocab,
                "merges": [["Ġ", "w"]]}})
    }

    fn metaspace() -> serde_json::Value {
        json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
            "normalizer": null,
            "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always",
                              "split": true},
            "post_processor": null, "decoder": null,
            "model": {"type": "Unigram", "unk_id": 0, "byte_fallback": false, "vocab":
                [["<unk>", 0.0], ["▁ab", -1.0], ["▁é", -1.0], ["▁", -2.0], ["c", -2.0]]}})
    }

    #[test]
    fn without_bos_the_first_token_is_not_scored() {
        let t = tokenizer(&byte_level(false, false));
        let window = t.window("héllo", 512).unwrap().unwrap();
        // Six bytes, six tokens; the first byte is only context.
        assert_eq!((window.ids.len(), window.scored(), window.bytes), (6, 5, 5));
        // The split character counts once, though both of its tokens carry both its bytes.
        assert_eq!(t.window("hé", 512).unwrap().unwrap().bytes, 2);
        assert_eq!(t.window("éh", 512).unwrap().unwrap().bytes, 3);
    }

    #[test]
    fn with_bos_every_byte_is_scored_up_to_the_window() {
        let t = tokenizer(&byte_level(true, false));
        let window = t.window("hello", 512).unwrap().unwrap();
        assert_eq!((window.ids[0], window.scored(), window.bytes), (256, 5, 5));
        let cut = t.window("hello", 4).unwrap().unwrap();
        assert_eq!((cut.ids.len(), cut.bytes), (4, 3));
        assert_eq!(cut.ids[..], window.ids[..4]);
        // BOS alone predicts nothing.
        assert_eq!(t.window("", 512).unwrap(), None);
        assert_eq!(t.window("a", 512).unwrap().unwrap().bytes, 1);
    }

    #[test]
    fn the_files_truncation_and_padding_do_not_apply() {
        // The file cuts to 3 tokens and pads to 64.
        let t = tokenizer(&byte_level(false, false));
        assert_eq!(t.window("hello there", 512).unwrap().unwrap().ids.len(), 11);
    }

    #[test]
    fn trimmed_white_space_is_counted() {
        for trim in [false, true] {
            let t = tokenizer(&byte_level(false, trim));
            // "a", " w", "b": the space belongs to the second token.
            let window = t.window("a wb", 512).unwrap().unwrap();
            assert_eq!((window.ids.len(), window.bytes), (3, 3), "trim {trim}");
        }
    }

    #[test]
    fn metaspace_offsets_refer_to_the_text() {
        let t = tokenizer(&metaspace());
        // "▁ab", "▁é": the first token's ▁ is not in the text; the second is " é", 3 bytes.
        let window = t.window("ab é", 512).unwrap().unwrap();
        assert_eq!((window.ids.as_slice(), window.bytes), (&[1, 2][..], 3));
    }

    #[test]
    fn corpora_keep_order_subsets_and_count_the_short() {
        let t = tokenizer(&byte_level(false, false));
        let doc = |text: &str, subset: Option<&str>| {
            Ok(Document { text: text.into(), subset: subset.map(str::to_owned) })
        };
        let docs = || {
            (0..200).map(move |i| match i % 4 {
                0 => doc("", None),
                1 => doc(&"a".repeat(i), Some("A")),
                2 => doc(&"b".repeat(i), Some("B")),
                _ => doc(&"c".repeat(i), None),
            })
        };
        let corpus = t.tokenize(docs(), 100, 150).unwrap();
        // i = 0, 4, ...: empty; i = 1: a single token.
        assert_eq!((corpus.read, corpus.windows.len()), (150, 150 - 38 - 1));
        assert_eq!(corpus.subsets, ["B", "A"]);
        assert_eq!(corpus.windows[0].ids.len(), 2);
        assert_eq!(corpus.windows.last().unwrap().ids.len(), 100);
        let naive: usize = (0..150).filter(|i| i % 4 != 0).map(|i: usize| i.min(100) - 1).sum();
        assert_eq!(corpus.tokens(), naive as u64);
        assert_eq!(corpus.largest_id(), corpus.windows.iter().flat_map(|w| w.ids.clone()).max());
    }

    #[test]
    fn nothing_to_score_is_an_error_that_says_why() {
        let t = tokenizer(&byte_level(false, false));
        let message = |texts: &[&str], seq_len| {
            let docs = texts.iter().map(|text| Ok(Document { text: (*text).into(), subset: None }));
            t.tokenize(docs, seq_len, 10).unwrap_err().to_string()
        };
        assert!(message(&[], 512).contains("no document"));
        assert!(message(&["", "a"], 512).contains("2 documents read has fewer than two"));
        assert!(message(&["abc"], 1).contains("--seq-len 1"));
    }

    #[test]
    fn a_file_that_is_no_tokenizer_is_named() {
        let error =
            Tokenizer::from_bytes(Path::new("x/config.json"), b"{\"model_type\": \"llama\"}");
        assert!(error.unwrap_err().to_string().contains("x/config.json"));
    }
}
