//! The evaluation text of a run, tokenised once for every tokenizer.

use super::corpus::{self, Text, TextDigest};
use super::error::{Error, Result};
use super::instrument;
use super::job::Job;
use super::observer::Observer;
use super::run::{Data, Options};
use super::session::open_model;
use super::windows::{Corpus, Definition, Tokenizer, stated_context};
use std::cell::{OnceCell, RefCell};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

/// What a run reads.
pub(super) struct Texts<'a> {
    options: &'a Options,
    observer: &'a dyn Observer,
    data: Text,
    started: Instant,
    /// Digest of the documents read, once they are.
    documents: OnceCell<String>,
    /// The text as the last tokenizer saw it: graphs given side by side share one.
    tokenised: RefCell<Option<Tokenised>>,
}

#[derive(Clone)]
struct Tokenised {
    tokenizer: PathBuf,
    /// Tokens that the tokenizer knows.
    size: usize,
    corpus: Arc<Corpus>,
}

impl<'a> Texts<'a> {
    /// Finds the text; nothing of it is read yet. `started` is when the command began.
    ///
    /// # Errors
    /// A file or pattern that names nothing, or a data set that the hub does not give.
    pub fn new(options: &'a Options, observer: &'a dyn Observer, started: Instant) -> Result<Self> {
        let data = fetch(&options.data, options.shuffle, observer)?;
        let (documents, tokenised) = (OnceCell::new(), RefCell::new(None));
        Ok(Self { options, observer, data, started, documents, tokenised })
    }

    /// Where the text lies.
    pub fn data(&self) -> &Text {
        &self.data
    }

    /// Digest of the documents that were read.
    pub fn digest(&self) -> String {
        self.documents.get().cloned().unwrap_or_default()
    }

    /// Tokenises the text for a job and checks that its model can be fed with it.
    pub fn prepare(&self, job: &Job) -> Result<Arc<Corpus>> {
        let model = open_model(&job.path, &job.model)?;
        let inspection = instrument::inspect(&model, &job.model)?;
        let tokenised = self.tokenise(&job.tokenizer)?;
        let largest = tokenised.corpus.largest_id();
        inspection.check_ids(&job.model, largest, tokenised.size)?;
        self.check_context(job, tokenised.corpus.longest());
        Ok(tokenised.corpus)
    }

    /// Warns of windows longer than the context that the model's files state. Rotary positions can be
    /// stretched, so that it is no error.
    fn check_context(&self, job: &Job, longest: usize) {
        let folder = job.path.parent().unwrap_or(Path::new(""));
        if let Some(context) = stated_context(folder).filter(|&context| context < longest) {
            self.observer.warn(&format!(
                "{}: windows of {longest} tokens, but its files state a context of {context}: \
                 figures beyond it say little, and a model with learned positions fails; pass \
                 --seq-len {context} or less",
                job.model
            ));
        }
    }

    fn tokenise(&self, path: &Path) -> Result<Tokenised> {
        if let Some(tokenised) = self.tokenised.borrow().as_ref().filter(|t| t.tokenizer == path) {
            return Ok(tokenised.clone());
        }
        let options = self.options;
        let (corpus, size, digest) = tokenised(
            &self.data,
            path,
            &options.definition,
            (options.max_samples, options.loader_workers),
            self.observer,
        )?;
        if *self.documents.get_or_init(|| digest.clone()) != digest {
            let text = "the evaluation text has changed since the first model was prepared";
            return Err(Error::NothingToScore(text.into()));
        }
        let seconds = self.started.elapsed().as_secs_f64();
        self.observer.note(&format!("first batch ready after {seconds:.2} s"));
        let tokenised = Tokenised { tokenizer: path.into(), size, corpus: Arc::new(corpus) };
        *self.tokenised.borrow_mut() = Some(tokenised.clone());
        Ok(tokenised)
    }
}

/// Finds the evaluation text; nothing of it is read yet.
///
/// # Errors
/// A file or pattern that names nothing, or a data set that the hub does not give.
pub(super) fn fetch(data: &Data, shuffle: Option<u64>, observer: &dyn Observer) -> Result<Text> {
    let sources = match data {
        Data::Files(names) => corpus::resolve(names)?,
        Data::Dataset(dataset) => {
            observer.note(&format!("looking for {dataset} on the Hugging Face hub"));
            let fetched = dataset.fetch()?;
            if let Some(warning) = &fetched.warning {
                observer.warn(warning);
            }
            fetched.sources
        }
    };
    Ok(Text::new(sources, shuffle))
}

/// Reads and tokenises a text: its tokens, how many the tokenizer knows, and the digest of the
/// documents.
///
/// # Errors
/// A fault of the text or the tokenizer, or nothing to score.
pub(super) fn tokenised(
    text: &Text,
    tokenizer: &Path,
    definition: &Definition,
    (max_samples, workers): (usize, usize),
    observer: &dyn Observer,
) -> Result<(Corpus, usize, String)> {
    let tokenizer = Tokenizer::open(tokenizer)?;
    observer.note(&format!("tokenising {}", text.describe()));
    let mut digest = TextDigest::default();
    let documents = text.documents(max_samples, observer)?.inspect(|document| {
        if let Ok(document) = document {
            digest.update(document);
        }
    });
    let workers = rayon::ThreadPoolBuilder::new()
        .num_threads(workers)
        .build()
        .map_err(|e| Error::Usage(format!("--loader-workers: {e}")))?;
    let corpus = workers.install(|| tokenizer.tokenize(documents, definition, max_samples))?;
    observer.note(&corpus.summary(definition));
    Ok((corpus, tokenizer.len(), digest.finish()))
}
