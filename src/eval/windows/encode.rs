//! Text to tokens.

use super::stitch;
use crate::eval::error::{Error, Result};
use std::path::Path;

/// Tokens of a text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Tokens {
    pub ids: Vec<u32>,
    /// Bytes of the text that each token covers; empty for special tokens.
    pub offsets: Vec<(usize, usize)>,
    /// UTF-8 bytes of the text.
    pub text_bytes: usize,
}

impl Tokens {
    /// Puts a special token in front.
    pub(super) fn put_in_front(&mut self, id: u32) {
        self.ids.insert(0, id);
        self.offsets.insert(0, (0, 0));
    }
}

/// Special tokens that the post-processor puts around a text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Around {
    pub before: Vec<u32>,
    pub after: Vec<u32>,
}

/// A tokenizer, ready to encode whole documents.
#[derive(Debug)]
pub(super) struct Encoder {
    inner: tokenizers::Tokenizer,
    around: Around,
    /// Whether a long text may be encoded in pieces with the same result.
    stitchable: bool,
    /// Of which size.
    pub(super) pieces: stitch::Sizes,
}

impl Encoder {
    /// Reads a `tokenizer.json`. Truncation and padding that the file asks for are switched off:
    /// the window decides what is cut.
    pub(super) fn new(path: &Path, bytes: &[u8]) -> Result<Self> {
        let error = |e: tokenizers::Error| Error::Tokenizer {
            path: path.into(),
            reason: format!("not a Hugging Face tokenizer.json: {e}"),
        };
        let mut inner = tokenizers::Tokenizer::from_bytes(bytes).map_err(error)?;
        inner.with_truncation(None).map_err(error)?;
        inner.with_padding(None);
        let file = serde_json::from_slice(bytes).unwrap_or_default();
        let pieces = stitch::Sizes::default();
        // A vocabulary without the letter that is tried, and without an unknown token.
        let (around, known) =
            around(&inner).map_or_else(|_| (Around::default(), false), |a| (a, true));
        Ok(Self { inner, around, stitchable: known && stitch::is_exact(&file), pieces })
    }

    pub(super) fn len(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    pub(super) fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    pub(super) fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    pub(super) fn around(&self) -> &Around {
        &self.around
    }

    /// Encodes a text, with the special tokens that the post-processor adds where `special` is set.
    pub(super) fn encode(&self, text: &str, special: bool) -> tokenizers::Result<Tokens> {
        let plain = match self.stitchable.then(|| self.pieces.encode(&self.inner, text)) {
            Some(Some(stitched)) => stitched?,
            _ => return Ok(tokens(&self.inner.encode(text, special)?, text)),
        };
        if !special {
            return Ok(plain);
        }
        let Around { before, after } = &self.around;
        let ids = before.iter().chain(&plain.ids).chain(after).copied().collect();
        let none = |ids: &[u32]| std::iter::repeat_n((0, 0), ids.len());
        let offsets = none(before).chain(plain.offsets).chain(none(after)).collect();
        Ok(Tokens { ids, offsets, text_bytes: text.len() })
    }
}

/// The tokens of an encoding of `text`.
pub(super) fn tokens(encoding: &tokenizers::Encoding, text: &str) -> Tokens {
    Tokens {
        ids: encoding.get_ids().to_vec(),
        offsets: encoding.get_offsets().to_vec(),
        text_bytes: text.len(),
    }
}

/// What the post-processor puts around a text of one letter: an empty text would not tell what is
/// in front from what is behind.
fn around(tokenizer: &tokenizers::Tokenizer) -> tokenizers::Result<Around> {
    let encoding = tokenizer.encode("a", true)?;
    let special = encoding.get_special_tokens_mask();
    let ids = encoding.get_ids();
    let before = special.iter().take_while(|&&mask| mask == 1).count();
    let after = special[before..].iter().rev().take_while(|&&mask| mask == 1).count();
    Ok(Around { before: ids[..before].to_vec(), after: ids[ids.len() - after..].to_vec() })
}
