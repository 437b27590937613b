//! The score file of a stage: the sums of every window, batch by batch.
//!
//! JSON Lines: a header, a line a batch as it ends, a trailer when the stage is done. It is the
//! journal by which an interrupted stage goes on, what a shard of a stage leaves for `mxeval merge`,
//! and where the documents' sums of a finished stage lie for `mxeval compare`. Sums are written in
//! full, so that reading them changes no bit.

use super::error::{Error, Result};
use super::metrics::{Against, DocumentScore, WindowScore};
use super::windows::Corpus;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::io::{Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};

/// Version of the format.
const VERSION: u32 = 1;

/// What a score file is about.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Header {
    /// Version of the format, 1.
    pub mxeval_scores: u32,
    /// The model, as named on the command line.
    pub model: String,
    /// The stage.
    pub stage: String,
    /// The stage that ran beside it.
    pub baseline: Option<String>,
    /// What decides whether the scores hold: model, data, options, platform.
    pub key: String,
    /// How the figures are defined, in short.
    pub definition: String,
    /// Windows of the corpus.
    pub windows: usize,
    /// Batches that they are cut into.
    pub batches: usize,
    /// Names of the subsets.
    pub subsets: Vec<String>,
    /// Subset of every document.
    pub subset_of: Vec<Option<usize>>,
}

/// Scores read back.
#[derive(Clone, Debug, Default)]
pub struct Scores {
    /// The batches that are there.
    pub done: BTreeSet<usize>,
    /// Windows and seconds of every batch that is there.
    pub batches: BTreeMap<usize, (Vec<usize>, f64)>,
    /// Document and scores of every window that is there, by window.
    pub windows: BTreeMap<usize, (usize, WindowScore)>,
    /// Seconds that the batches took.
    pub seconds: f64,
    /// What the trailer says, if the stage came to its end.
    pub end: Option<serde_json::Value>,
    /// Bytes of the file up to the end of its last whole line.
    whole: u64,
}

/// A float64 that may be infinite or no number, which JSON cannot say.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Sum(f64);

impl Serialize for Sum {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        if self.0.is_finite() {
            serializer.serialize_f64(self.0)
        } else {
            serializer.serialize_str(&self.0.to_string())
        }
    }
}

impl<'de> Deserialize<'de> for Sum {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Either {
            Number(f64),
            Text(String),
        }
        match Either::deserialize(deserializer)? {
            Either::Number(value) => Ok(Self(value)),
            Either::Text(text) => text.parse().map(Self).map_err(serde::de::Error::custom),
        }
    }
}

#[derive(Serialize, Deserialize)]
struct Line {
    batch: usize,
    seconds: f64,
    windows: Vec<Row>,
}

#[derive(Serialize, Deserialize)]
struct Row {
    window: usize,
    document: usize,
    tokens: u64,
    bytes: u64,
    correct: u64,
    nll: Sum,
    entropy: Sum,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    against: Option<RowAgainst>,
}

#[derive(Serialize, Deserialize)]
struct RowAgainst {
    nll: Sum,
    correct: u64,
    kl: Sum,
    agree: u64,
    delta_p: Sum,
    delta_p_squared: Sum,
    /// The tokens' KL: float32, little-endian, in base64.
    tokens_kl: String,
}

#[derive(Serialize, Deserialize)]
struct End {
    end: serde_json::Value,
}

impl Header {
    /// The header of a stage over `corpus`.
    pub fn new(corpus: &Corpus, batches: usize, names: [&str; 4], baseline: Option<&str>) -> Self {
        let [model, stage, key, definition] = names.map(str::to_owned);
        Self {
            mxeval_scores: VERSION,
            model,
            stage,
            baseline: baseline.map(str::to_owned),
            key,
            definition,
            windows: corpus.windows.len(),
            batches,
            subsets: corpus.subsets.clone(),
            subset_of: corpus.documents.iter().map(|document| document.subset).collect(),
        }
    }
}

impl Scores {
    /// The sums of every document by number, and the divergence of its tokens: its windows added in
    /// their order. A document of which no window is there has scored nothing.
    pub fn documents(&self, count: usize) -> (Vec<DocumentScore>, Vec<Vec<f32>>) {
        let mut sums = vec![DocumentScore::default(); count];
        let mut divergence = vec![Vec::new(); count];
        for (document, window) in self.windows.values() {
            if let (Some(sum), Some(kl)) = (sums.get_mut(*document), divergence.get_mut(*document))
            {
                sum.add(&window.score);
                kl.extend_from_slice(&window.kl);
            }
        }
        (sums, divergence)
    }

    fn take(&mut self, line: Line, header: &Header) -> std::result::Result<(), String> {
        if line.batch >= header.batches {
            return Err(format!("batch {} is outside the corpus", line.batch));
        }
        if !self.done.insert(line.batch) {
            return Err(format!("batch {} is there twice", line.batch));
        }
        // A stage that goes on has not come to its end, whatever an earlier attempt left.
        self.end = None;
        self.seconds += line.seconds;
        let windows = line.windows.iter().map(|row| row.window).collect();
        self.batches.insert(line.batch, (windows, line.seconds));
        for row in line.windows {
            let (window, document) = (row.window, row.document);
            if window >= header.windows || document >= header.subset_of.len() {
                return Err(format!(
                    "window {window} of document {document} is outside the corpus"
                ));
            }
            if self.windows.insert(window, (document, row.score()?)).is_some() {
                return Err(format!("window {window} is there twice"));
            }
        }
        Ok(())
    }
}

impl Row {
    fn new(window: usize, document: usize, scored: &WindowScore) -> Self {
        let DocumentScore { nll, entropy, correct, tokens, bytes, against } = scored.score;
        let against = against.map(|against| RowAgainst {
            nll: Sum(against.nll),
            correct: against.correct,
            kl: Sum(against.kl),
            agree: against.agree,
            delta_p: Sum(against.delta_p),
            delta_p_squared: Sum(against.delta_p_squared),
            tokens_kl: STANDARD_NO_PAD
                .encode(scored.kl.iter().flat_map(|kl| kl.to_le_bytes()).collect::<Vec<u8>>()),
        });
        let (nll, entropy) = (Sum(nll), Sum(entropy));
        Self { window, document, tokens, bytes, correct, nll, entropy, against }
    }

    fn score(self) -> std::result::Result<WindowScore, String> {
        let mut kl = Vec::new();
        let against = match self.against {
            None => None,
            Some(against) => {
                let bytes = STANDARD_NO_PAD
                    .decode(&against.tokens_kl)
                    .map_err(|e| format!("tokens_kl of window {}: {e}", self.window))?;
                if bytes.len() as u64 != self.tokens.saturating_mul(4) {
                    return Err(format!(
                        "tokens_kl of window {} has {} bytes for {} tokens",
                        self.window,
                        bytes.len(),
                        self.tokens
                    ));
                }
                let values = bytes.as_chunks::<4>().0;
                kl.extend(values.iter().map(|&value| f32::from_le_bytes(value)));
                Some(Against {
                    nll: against.nll.0,
                    correct: against.correct,
                    kl: against.kl.0,
                    agree: against.agree,
                    delta_p: against.delta_p.0,
                    delta_p_squared: against.delta_p_squared.0,
                })
            }
        };
        let score = DocumentScore {
            nll: self.nll.0,
            entropy: self.entropy.0,
            correct: self.correct,
            tokens: self.tokens,
            bytes: self.bytes,
            against,
        };
        Ok(WindowScore { score, kl })
    }
}

/// Reads a score file as far as its lines are whole.
///
/// # Errors
/// It cannot be read, has no header of this version, or holds a whole line that makes no sense.
pub fn read(path: &Path) -> Result<(Header, Scores)> {
    let text = std::fs::read(path).map_err(Error::io(path))?;
    let error = |line: usize, reason: String| {
        Error::Output(format!("{}, line {line}: {reason}", path.display()))
    };
    let mut lines = text.split_inclusive(|&byte| byte == b'\n').enumerate();
    let (_, first) = lines.next().ok_or_else(|| error(1, "the file is empty".into()))?;
    let header: Header = serde_json::from_slice(first)
        .map_err(|e| error(1, format!("not the header of a score file of mxeval ({e})")))?;
    if header.mxeval_scores != VERSION {
        let text = format!("version {} of score files; this is {VERSION}", header.mxeval_scores);
        return Err(error(1, text));
    }
    let mut scores = Scores { whole: first.len() as u64, ..Scores::default() };
    for (index, line) in lines {
        if line.last() != Some(&b'\n') {
            break;
        }
        match serde_json::from_slice::<Line>(line) {
            Ok(parsed) => {
                scores.take(parsed, &header).map_err(|reason| error(index + 1, reason))?
            }
            Err(e) => match serde_json::from_slice::<End>(line) {
                Ok(End { end }) => scores.end = Some(end),
                Err(_) => return Err(error(index + 1, format!("not a line of scores ({e})"))),
            },
        }
        scores.whole += line.len() as u64;
    }
    Ok((header, scores))
}

/// A score file that is being written.
#[derive(Debug)]
pub struct Writer {
    path: PathBuf,
    file: File,
    header: Header,
}

impl Writer {
    /// Begins a file, or goes on with one that an interrupted run left: then what is in it comes back.
    /// A file of another key or corpus, or one that cannot be read, is begun anew.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn open(path: &Path, header: &Header, resume: bool) -> Result<(Self, Scores)> {
        let kept = if resume { read(path).ok() } else { None };
        let kept = kept.filter(|(earlier, _)| earlier == header).map(|(_, scores)| scores);
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(kept.is_none())
            .write(true)
            .open(path)
            .map_err(Error::io(path))?;
        let scores = match kept {
            Some(mut scores) => {
                // A line that was cut off is written over.
                file.set_len(scores.whole).map_err(Error::io(path))?;
                file.seek(SeekFrom::End(0)).map_err(Error::io(path))?;
                scores.end = None;
                scores
            }
            None => {
                file.write_all(line(header)?.as_bytes()).map_err(Error::io(path))?;
                Scores::default()
            }
        };
        Ok((Self { path: path.into(), file, header: header.clone() }, scores))
    }

    /// Adds a batch, in the file and in `scores`. `windows` gives number and document of each score.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn batch(
        &mut self,
        batch: usize,
        windows: &[(usize, usize)],
        scored: &[WindowScore],
        seconds: f64,
        scores: &mut Scores,
    ) -> Result<()> {
        let rows = windows.iter().zip(scored);
        let windows = rows.map(|(&(window, document), s)| Row::new(window, document, s)).collect();
        let parsed = Line { batch, seconds, windows };
        self.file.write_all(line(&parsed)?.as_bytes()).map_err(Error::io(&self.path))?;
        let error = |reason| Error::Output(format!("{}: {reason}", self.path.display()));
        scores.take(parsed, &self.header).map_err(error)
    }
}

/// Adds the trailer of a stage that came to its end, and sees everything to the disk.
///
/// # Errors
/// The file is not there or cannot be written.
pub fn end(path: &Path, end: serde_json::Value) -> Result<()> {
    let mut file = OpenOptions::new().read(true).write(true).open(path).map_err(Error::io(path))?;
    // A line that was cut off would swallow it.
    let text = std::fs::read(path).map_err(Error::io(path))?;
    let whole = text.iter().rposition(|&byte| byte == b'\n').map_or(0, |last| last + 1);
    file.set_len(whole as u64)
        .and_then(|()| file.seek(SeekFrom::End(0)))
        .map_err(Error::io(path))?;
    file.write_all(line(&End { end })?.as_bytes())
        .and_then(|()| file.sync_data())
        .map_err(Error::io(path))
}

fn line(value: &impl Serialize) -> Result<String> {
    let text = serde_json::to_string(value);
    text.map(|text| text + "\n").map_err(|e| Error::Output(format!("scores: {e}")))
}

/// Name of a stage's score file below the output folder.
pub fn file_name(model: &str, stage: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '_' };
    let stem: String = stage.chars().map(plain).take(80).collect();
    let digest = super::process::sha256_text(&format!("{model}\n{stage}"));
    format!("scores/{stem}-{}.jsonl", &digest[..8])
}

#[cfg(test)]
mod tests;
