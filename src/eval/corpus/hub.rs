//! Evaluation text from the Hugging Face hub, through its own cache.

use crate::eval::error::{Error, Result};
use std::path::PathBuf;

/// A data set that mxeval knows by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dataset {
    /// The Pile's test split, `monology/pile-uncopyrighted`.
    Pile,
    /// WikiText-2 raw test, `Salesforce/wikitext`, `wikitext-2-raw-v1`.
    Wikitext,
}

/// A fetched data set.
#[derive(Clone, Debug)]
pub struct Fetched {
    /// What was fetched, which after a fallback is not what was asked for.
    pub dataset: Dataset,
    /// The file in the hub's cache.
    pub path: PathBuf,
    /// Why another data set was used instead of the one asked for.
    pub warning: Option<String>,
}

impl Dataset {
    /// The data set's owner, repository and file on the hub.
    fn location(self) -> (&'static str, &'static str, &'static str) {
        match self {
            Self::Pile => ("monology", "pile-uncopyrighted", "test.jsonl.zst"),
            Self::Wikitext => {
                ("Salesforce", "wikitext", "wikitext-2-raw-v1/test-00000-of-00001.parquet")
            }
        }
    }

    /// Fetches the test split into the hub's cache, or finds it there. The Pile falls back to
    /// WikiText, with a warning in the result.
    ///
    /// # Errors
    /// Neither can be had; the message says what to pass instead.
    pub fn fetch(self) -> Result<Fetched> {
        let first = match self.download() {
            Ok(path) => return Ok(Fetched { dataset: self, path, warning: None }),
            Err(reason) => reason,
        };
        if self == Self::Pile
            && let Ok(path) = Self::Wikitext.download()
        {
            let warning = format!(
                "The Pile could not be fetched ({first}); measuring on WikiText-2 instead, whose \
                 figures are not comparable with The Pile's"
            );
            return Ok(Fetched { dataset: Self::Wikitext, path, warning: Some(warning) });
        }
        let (owner, name, file) = self.location();
        Err(Error::Dataset(format!(
            "cannot fetch {owner}/{name} ({file}) from the Hugging Face hub: {first}; without a \
             network pass a local file: --data FILE.parquet, .jsonl, .jsonl.zst or .txt"
        )))
    }

    fn download(self) -> std::result::Result<PathBuf, String> {
        let (owner, name, file) = self.location();
        let api = hf_hub::api::sync::ApiBuilder::from_env().build().map_err(|e| chain(&e))?;
        api.dataset(format!("{owner}/{name}")).get(file).map_err(|e| chain(&e))
    }
}

/// An error with its causes, which hold the useful half ("connection refused").
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}

impl std::str::FromStr for Dataset {
    type Err = String;

    fn from_str(name: &str) -> std::result::Result<Self, String> {
        match name {
            "pile" => Ok(Self::Pile),
            "wikitext" => Ok(Self::Wikitext),
            _ => Err(format!("unknown data set {name:?}; known are pile, wikitext")),
        }
    }
}

impl std::fmt::Display for Dataset {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Pile => "pile",
            Self::Wikitext => "wikitext",
        })
    }
}
