//! Documents to token windows: what is scored, from which context, and how many bytes of text that
//! is.
//!
//! A [`Definition`] says how (`--mode`, `--seq-len`, `--stride`, `--bos`); `docs/definitions.md` has
//! the formulas and what each is comparable with. `cut` divides the tokens of a document, or of the
//! stream that documents are joined to, into windows; `encode` makes the tokens; `beside` reads
//! what the files beside the tokenizer and the model state.

use sha2::{Digest as _, Sha256};

mod beside;
mod cut;
mod definition;
mod encode;
mod ids;
mod stitch;
mod tokenizer;

pub use beside::stated_context;
pub use definition::{Bos, Definition, Mode, SEPARATOR};
pub use ids::Ids;
pub use tokenizer::Tokenizer;

/// One run of tokens through the model.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Window {
    /// Token ids, the last scored one included. At least two.
    pub ids: Ids,
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
        Self { inputs: ids.len(), first_scored: 1, ids: ids.into(), bytes, document }
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
    /// Tokens at the end of the stream that fill no window (modes of one stream only).
    pub dropped: usize,
    /// The token put in front, where `--bos` asks for one, and where its id is from.
    pub bos: Option<String>,
}

impl Corpus {
    /// Scored tokens of all windows.
    pub fn tokens(&self) -> u64 {
        self.windows.iter().map(|w| w.scored() as u64).sum()
    }

    /// Digest of what is scored: tokens, contexts, bytes and the documents they belong to.
    pub fn sha256(&self) -> String {
        let mut hasher = Sha256::new();
        for window in &self.windows {
            let numbers = [window.inputs, window.first_scored, window.document, window.ids.len()];
            numbers.iter().for_each(|&n| hasher.update((n as u64).to_le_bytes()));
            hasher.update(window.bytes.to_le_bytes());
            window.ids.iter().for_each(|id| hasher.update(id.to_le_bytes()));
        }
        super::process::hex(&hasher.finalize())
    }

    /// The largest token id.
    pub fn largest_id(&self) -> Option<u32> {
        self.windows.iter().flat_map(|w| w.ids.iter().copied()).max()
    }

    /// Tokens fed in the longest window.
    pub fn longest(&self) -> usize {
        self.windows.iter().map(|w| w.inputs).max().unwrap_or(0)
    }

    /// One line that says what was read and is scored.
    pub fn summary(&self, definition: &Definition) -> String {
        let (read, windows, tokens) = (self.read, self.windows.len(), self.tokens());
        let mut text = if definition.mode.is_stream() {
            format!(
                "{read} documents read and joined: {windows} windows with {tokens} scored tokens; \
                 the last {} tokens fill no window and are dropped",
                self.dropped
            )
        } else {
            let documents = self.documents.len();
            let in_windows =
                if windows == documents { String::new() } else { format!(" in {windows} windows") };
            format!("{read} documents read, {documents} with {tokens} scored tokens{in_windows}")
        };
        if let Some(bos) = &self.bos {
            text.push_str("; BOS is ");
            text.push_str(bos);
        }
        text
    }

    fn subset(&mut self, name: String) -> usize {
        self.subsets.iter().position(|known| *known == name).unwrap_or_else(|| {
            self.subsets.push(name);
            self.subsets.len() - 1
        })
    }
}

#[cfg(test)]
mod tests;
