//! Long texts encoded in pieces, with the result of encoding them whole.
//!
//! An encoding of tens of megabytes takes gigabytes and one core. Pieces that overlap are encoded in
//! parallel instead and joined where both begin the same word (pre-token): a pre-tokenizer that
//! scans from left to right and looks ahead one character goes on from there in the same way,
//! whatever came before, and the model sees one word at a time. Tokenizers of another kind encode
//! the text as a whole.

use super::encode::{Tokens, tokens};
use rayon::prelude::*;
use serde_json::Value;

/// Sizes in bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    /// From the beginning of a piece to that of the next.
    pub piece: usize,
    /// How far a piece reaches into the next one.
    pub overlap: usize,
    /// Of that, the end, which is not trusted: words are cut off there.
    pub margin: usize,
}

impl Default for Sizes {
    fn default() -> Self {
        Self { piece: 1 << 20, overlap: 16 << 10, margin: 4 << 10 }
    }
}

/// Words that have to follow in the earlier piece, so that the scan is known to have gone on.
const FOLLOWING: usize = 8;

/// An encoded piece; its offsets are those of the whole text.
struct Piece {
    tokens: Tokens,
    /// Whether a token begins a word.
    begins: Vec<bool>,
    end: usize,
}

impl Sizes {
    /// The tokens of `text` without special tokens; `None` where it is short, or pieces do not meet.
    pub(super) fn encode(
        &self,
        tokenizer: &tokenizers::Tokenizer,
        text: &str,
    ) -> Option<tokenizers::Result<Tokens>> {
        if text.len() < 2 * self.piece {
            return None;
        }
        let starts = self.starts(text)?;
        let pieces: tokenizers::Result<Vec<Piece>> = (0..starts.len())
            .into_par_iter()
            .map(|number| {
                let end = starts.get(number + 1).map_or(text.len(), |next| next + self.overlap);
                piece(tokenizer, text, starts[number], end)
            })
            .collect();
        match pieces {
            Ok(pieces) => self.join(text, pieces).map(Ok),
            Err(error) => Some(Err(error)),
        }
    }

    /// Where pieces begin: at ASCII, which no character before composes with.
    fn starts(&self, text: &str) -> Option<Vec<usize>> {
        let bytes = text.as_bytes();
        let mut starts = vec![0];
        let mut next = self.piece;
        while next + self.overlap < bytes.len() {
            let reach = &bytes[next..next + self.margin];
            next += reach.iter().position(u8::is_ascii)?;
            starts.push(next);
            next += self.piece;
        }
        Some(starts)
    }

    fn join(&self, text: &str, pieces: Vec<Piece>) -> Option<Tokens> {
        let mut joined = Tokens { text_bytes: text.len(), ..Tokens::default() };
        let mut pieces = pieces.into_iter();
        let mut current = pieces.next()?;
        let mut from = 0;
        for next in pieces {
            let (end, begin) = self.meet(text, &current, &next)?;
            if end < from {
                return None;
            }
            joined.ids.extend_from_slice(&current.tokens.ids[from..end]);
            joined.offsets.extend_from_slice(&current.tokens.offsets[from..end]);
            (current, from) = (next, begin);
        }
        joined.ids.extend_from_slice(&current.tokens.ids[from..]);
        joined.offsets.extend_from_slice(&current.tokens.offsets[from..]);
        Some(joined)
    }

    /// Indices of the tokens at which both pieces begin the same word.
    fn meet(&self, text: &str, earlier: &Piece, later: &Piece) -> Option<(usize, usize)> {
        let ascii = |place: usize| text.as_bytes().get(place).is_some_and(u8::is_ascii);
        let trusted = earlier.end.checked_sub(self.margin)?;
        let (own, theirs) = (&earlier.tokens, &later.tokens);
        // A piece's first word may be the rest of one.
        let mut begin = later.begins.iter().skip(1).position(|&begins| begins)? + 1;
        let mut end = own.offsets.partition_point(|offset| offset.0 < theirs.offsets[begin].0);
        while let (Some(&(here, _)), Some(&(there, _))) =
            (own.offsets.get(end), theirs.offsets.get(begin))
        {
            if here > trusted {
                break;
            }
            let same =
                earlier.begins[end] && later.begins[begin] && own.ids[end] == theirs.ids[begin];
            if here == there && same && ascii(here) && here > 0 && ascii(here - 1) {
                let following = earlier.begins[end + 1..].iter().filter(|&&begins| begins);
                return (following.take(FOLLOWING).count() == FOLLOWING).then_some((end, begin));
            }
            if here <= there {
                end += 1;
            }
            if there <= here {
                begin += 1;
            }
        }
        None
    }
}

fn piece(
    tokenizer: &tokenizers::Tokenizer,
    text: &str,
    start: usize,
    end: usize,
) -> tokenizers::Result<Piece> {
    let end = (end.min(text.len())..text.len()).find(|&e| text.is_char_boundary(e));
    let end = end.unwrap_or(text.len());
    let part = &text[start..end];
    let encoding = tokenizer.encode(part, false)?;
    let words = encoding.get_word_ids();
    let begins = (0..words.len()).map(|i| i == 0 || words[i] != words[i - 1]).collect();
    let mut tokens = tokens(&encoding, part);
    for offset in &mut tokens.offsets {
        *offset = (offset.0 + start, offset.1 + start);
    }
    Ok(Piece { tokens, begins, end })
}

/// Whether pieces of a text joined at a word give what the whole text gives, by the
/// `tokenizer.json`.
pub(super) fn is_exact(file: &Value) -> bool {
    let normalizer = &file["normalizer"];
    let normalizes = !(normalizer.is_null() || normalizer["type"] == "NFC");
    let sticky =
        |token: &Value| ["lstrip", "rstrip", "single_word"].iter().any(|&flag| token[flag] == true);
    let added = file["added_tokens"].as_array().is_some_and(|tokens| tokens.iter().any(sticky));
    let random = file["model"]["dropout"].as_f64().is_some_and(|dropout| dropout > 0.0);
    !normalizes && !added && !random && scans(&file["pre_tokenizer"])
}

/// What one pre-tokenizer does to words.
#[derive(PartialEq, Eq)]
enum Splits {
    /// Nothing.
    Not,
    /// It splits by the characters on both sides of a place.
    Locally,
    /// It scans from left to right.
    Scanning,
    /// It may depend on more than that.
    Otherwise,
}

/// Whether the steps are any number of local ones and one scan after them: where two scans of the
/// same words meet, they go on together.
fn scans(value: &Value) -> bool {
    let single = std::slice::from_ref(value);
    let steps = match value["type"].as_str() {
        Some("Sequence") => value["pretokenizers"].as_array().map_or(&[][..], Vec::as_slice),
        _ => single,
    };
    let mut steps: Vec<_> = steps.iter().map(splits).filter(|step| *step != Splits::Not).collect();
    let last = steps.pop();
    matches!(last, Some(Splits::Locally | Splits::Scanning))
        && steps.iter().all(|step| *step == Splits::Locally)
}

fn splits(step: &Value) -> Splits {
    match step["type"].as_str() {
        Some("Digits" | "WhitespaceSplit" | "Whitespace" | "BertPreTokenizer") => Splits::Locally,
        Some("ByteLevel") if step["add_prefix_space"] == false => match step["use_regex"] {
            Value::Bool(false) => Splits::Not,
            _ => Splits::Scanning,
        },
        Some("Split") => {
            let alone = matches!(step["behavior"].as_str(), Some("Isolated" | "Removed"));
            let pattern = step["pattern"]["Regex"].as_str();
            match pattern.filter(|pattern| alone && looks_ahead_only(pattern)) {
                Some(_) => Splits::Scanning,
                None => Splits::Otherwise,
            }
        }
        _ => Splits::Otherwise,
    }
}

/// Whether a pattern looks at nothing before its match, and after it at one character at most.
fn looks_ahead_only(pattern: &str) -> bool {
    let rest = pattern.replace("(?!\\S)", "").replace("[^", "[");
    let elsewhere =
        ["(?<", "(?=", "(?!", "\\b", "\\B", "\\A", "\\G", "\\K", "\\z", "\\Z", "^", "$"];
    !elsewhere.iter().any(|mark| rest.contains(mark))
}
