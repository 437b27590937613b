//! What a figure means: `--mode`, `--seq-len`, `--stride`, `--bos`.

use crate::eval::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// What documents are joined with where they become one stream: as GPTQ's evaluation joins the rows
/// of WikiText-2.
pub const SEPARATOR: &str = "\n\n";

/// How text is divided into windows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// The first `seq_len` tokens of each document.
    #[default]
    PerDocument,
    /// Every token of each document, in windows that do not overlap: lm-eval's
    /// `loglikelihood_rolling`.
    Rolling,
    /// Every token of each document, in windows that overlap: Hugging Face's "Perplexity of
    /// fixed-length models".
    Stride,
    /// All documents joined to one stream, in windows that do not overlap: GPTQ's WikiText-2.
    Concat,
    /// The same stream; of each window the second half is scored: llama.cpp's `llama-perplexity`.
    SecondHalf,
}

impl Mode {
    /// All modes.
    pub const ALL: [Self; 5] =
        [Self::PerDocument, Self::Rolling, Self::Stride, Self::Concat, Self::SecondHalf];

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::PerDocument => "per-document",
            Self::Rolling => "rolling",
            Self::Stride => "stride",
            Self::Concat => "concat",
            Self::SecondHalf => "second-half",
        }
    }

    /// Whether documents are joined to one stream.
    pub fn is_stream(self) -> bool {
        matches!(self, Self::Concat | Self::SecondHalf)
    }

    /// The least `--seq-len` with which a window scores anything.
    fn least_seq_len(self) -> usize {
        if self == Self::SecondHalf { 3 } else { 2 }
    }

    fn default_bos(self) -> Bos {
        if self == Self::Rolling { Bos::First } else { Bos::Tokenizer }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Mode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|mode| mode.name() == text).ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            format!("unknown mode `{text}`; one of {names}")
        })
    }
}

/// Where a token that begins the text (BOS) stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Bos {
    /// As the tokenizer's post-processor has it; in mode `second-half` a BOS that it adds begins
    /// every window.
    #[default]
    Tokenizer,
    /// Nowhere, nor any other special token that the tokenizer would add.
    None,
    /// In front of each document, or of the stream.
    First,
    /// As `First`, and in every further window in place of that window's first token, which is
    /// context only.
    Each,
}

impl FromStr for Bos {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "none" => Ok(Self::None),
            "first" => Ok(Self::First),
            "each" => Ok(Self::Each),
            _ => Err(format!("unknown place of BOS `{text}`; one of none, first, each")),
        }
    }
}

/// What is scored, and from which context.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Definition {
    /// How text is divided into windows.
    pub mode: Mode,
    /// Tokens fed in the longest window.
    pub seq_len: usize,
    /// Tokens from the beginning of a window to that of the next; `None` unless mode `stride`.
    pub stride: Option<usize>,
    /// Where BOS stands.
    pub bos: Bos,
}

impl Definition {
    /// A definition; `stride` and `bos` are the mode's where they are not given: half of `seq_len`,
    /// and what the mode's reference does.
    ///
    /// # Errors
    /// A usage error: too few tokens in a window, a stride without its mode, or one that would leave
    /// tokens out.
    pub fn new(
        mode: Mode,
        seq_len: usize,
        stride: Option<usize>,
        bos: Option<Bos>,
    ) -> Result<Self> {
        let stride = match mode {
            Mode::Stride => Some(stride.unwrap_or((seq_len / 2).max(1))),
            _ => stride,
        };
        let bos = bos.unwrap_or(mode.default_bos());
        let definition = Self { mode, seq_len, stride, bos };
        definition.check()?;
        Ok(definition)
    }

    /// Mode `per-document` with the tokenizer's own BOS.
    pub fn per_document(seq_len: usize) -> Self {
        Self { mode: Mode::PerDocument, seq_len, stride: None, bos: Bos::Tokenizer }
    }

    /// Checks that the parts go together.
    pub(super) fn check(&self) -> Result<()> {
        let Self { mode, seq_len, stride, .. } = *self;
        let least = mode.least_seq_len();
        if seq_len < least {
            return Err(Error::Usage(format!(
                "--seq-len {seq_len}: mode {mode} needs at least {least} tokens"
            )));
        }
        match (mode, stride) {
            (Mode::Stride, Some(stride)) if stride < 1 || stride >= seq_len => {
                Err(Error::Usage(format!(
                    "--stride {stride}: must be at least 1 and less than --seq-len {seq_len}, or \
                     tokens would have no context or be left out"
                )))
            }
            (Mode::Stride, None) => Err(Error::Usage("mode stride needs a stride".into())),
            (Mode::Stride, Some(_)) | (_, None) => Ok(()),
            (mode, Some(_)) => Err(Error::Usage(format!(
                "--stride goes with --mode stride; the windows of mode {mode} have none"
            ))),
        }
    }

    /// One line for a record: `rolling, seq-len 2048, bos first`.
    pub fn short(&self) -> String {
        self.to_string()
    }

    /// What sums are kept and resampled by: `document`, or `window` where documents are joined.
    pub fn unit(&self) -> &'static str {
        if self.mode.is_stream() { "window" } else { "document" }
    }

    /// The definition in full, printed with every result.
    pub fn text(&self) -> String {
        let Self { mode, seq_len, .. } = *self;
        let scored = match mode {
            Mode::PerDocument => format!(
                "each document is tokenised by itself and its first {seq_len} tokens (seq-len) are \
                 scored by next-token cross-entropy, all but the first from those before them; \
                 documents of fewer than two tokens score nothing"
            ),
            Mode::Rolling => format!(
                "each document is tokenised by itself and every token of it that has one before it is \
                 scored once, in windows of {seq_len} predictions (seq-len) that do not overlap: a \
                 window begins with the token before its first scored one; the last window of a \
                 longer document is filled up with earlier tokens as context (lm-eval's \
                 loglikelihood_rolling)"
            ),
            Mode::Stride => format!(
                "each document is tokenised by itself and every token of it that has one before it is \
                 scored once, in windows of {seq_len} tokens (seq-len) that begin every {} tokens \
                 (stride): a window scores the tokens that no earlier one has scored, with all \
                 before them in the window as context (Hugging Face, Perplexity of fixed-length \
                 models)",
                self.stride.unwrap_or_default()
            ),
            Mode::Concat => format!(
                "all documents are joined by two line feeds to one stream, which is tokenised as a \
                 whole and cut into windows of {seq_len} tokens (seq-len) that do not overlap; all \
                 tokens of a window but its first are scored; what fills no window at the end is \
                 dropped (as GPTQ evaluates WikiText-2)"
            ),
            Mode::SecondHalf => format!(
                "all documents are joined by two line feeds to one stream, which is tokenised as a \
                 whole and cut into windows of {seq_len} tokens (seq-len) that do not overlap; of \
                 each window the last {} tokens are scored, from all before them in the window; \
                 what fills no window at the end is dropped (llama.cpp's llama-perplexity)",
                seq_len - seq_len / 2 - 1
            ),
        };
        format!(
            "{mode}: {scored}. {} Padding is masked out of everything. xent = sum of nll / scored \
             tokens over all {unit}s (nats); ppl = exp(xent); entropy = mean entropy of the \
             predicted distribution (nats); bits/byte = sum of nll / ln 2 / {}. {}",
            self.bos_text(),
            self.bytes_text(),
            self.unit_text(),
            unit = self.unit(),
        )
    }

    fn bos_text(&self) -> String {
        let whole = if self.mode.is_stream() { "the stream" } else { "each document" };
        match (self.bos, self.mode) {
            (Bos::Tokenizer, Mode::SecondHalf) => {
                "BOS: where the tokenizer adds one, it begins the stream and takes the place of the \
                 first token of every window, else there is none."
                    .into()
            }
            (Bos::Tokenizer, _) => {
                format!("BOS: special tokens such as BOS only where the tokenizer adds them to {whole}.")
            }
            (Bos::None, _) => {
                format!("BOS: none, and no other special token; the first token of {whole} is not scored.")
            }
            (Bos::First, Mode::Rolling) => {
                "BOS: in front of each document (EOS where the tokenizer has no BOS), so that its \
                 first token is scored too; no other special token."
                    .into()
            }
            (Bos::First, _) => format!("BOS: in front of {whole}; no other special token."),
            (Bos::Each, _) => format!(
                "BOS: in front of {whole}, and in every further window in place of its first token, \
                 which is context only; no other special token."
            ),
        }
    }

    fn bytes_text(&self) -> &'static str {
        if self.counts_whole_text() {
            "UTF-8 bytes of the whole text"
        } else {
            "UTF-8 bytes of the text that the scored tokens cover"
        }
    }

    fn unit_text(&self) -> &'static str {
        if self.mode.is_stream() {
            "Intervals resample windows: pieces of the stream that may be parts of one document or \
             hold several; there are no subsets."
        } else {
            "Intervals resample documents."
        }
    }

    /// Whether a document's bytes are all those of its text: every token of it is scored.
    pub(super) fn counts_whole_text(&self) -> bool {
        self.mode == Mode::Rolling && matches!(self.bos, Bos::First | Bos::Each)
    }
}

impl fmt::Display for Definition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, seq-len {}", self.mode, self.seq_len)?;
        if let Some(stride) = self.stride {
            write!(f, ", stride {stride}")?;
        }
        f.write_str(match self.bos {
            Bos::Tokenizer => ", bos as the tokenizer adds it",
            Bos::None => ", bos none",
            Bos::First => ", bos first",
            Bos::Each => ", bos each",
        })
    }
}
