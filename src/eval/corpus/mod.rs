//! Evaluation text: a stream of documents out of parquet, JSON Lines or plain text, on disk or on a
//! web server.
//!
//! A document is one row of a parquet file, one line of a JSON Lines file (optionally compressed
//! with zstd), or one whole `.txt` file. Its text is the column or key `text`. The Pile's subset is
//! read from `meta.pile_set_name`, where `meta` is a struct, a JSON string, or absent.
//!
//! [`resolve`] turns what the user named into a list of [`Source`]s, [`Text`] reads them in their
//! order or draws a sample. Readers stream: only the documents asked for are ever decoded, and of
//! remote files only the parts that hold them are transferred.

mod http;
mod hub;
mod jsonl;
mod parquet;
mod shuffle;
mod source;
mod text;

pub use http::Remote;
pub use hub::{Dataset, Fetched};
pub use source::{Source, resolve};
pub use text::{Text, TextDigest};

use super::error::Result;
use super::observer::Silent;
use std::path::Path;

/// One document of the corpus.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// The text, exactly as stored.
    pub text: String,
    /// The subset the document belongs to (`meta.pile_set_name`), when the file says.
    pub subset: Option<String>,
}

/// Documents in the order of the file.
pub type Documents = Box<dyn Iterator<Item = Result<Document>> + Send>;

/// Opens one local file of evaluation text by its extension: `.parquet`, `.jsonl` (also `.ndjson`,
/// `.json` with one object a line), these with `.zst`, or `.txt` (the whole file is one document).
///
/// # Errors
/// A directory, an unknown extension, an unreadable file, a parquet file without a `text` column.
/// Faults further in (a bad line, a bad row) come out of the iterator.
pub fn open(path: &Path) -> Result<Documents> {
    Source::file(path)?.open(&Silent)
}

/// The subset named by a decoded `meta` value: an object, or a string that holds one.
fn subset_of(meta: &serde_json::Value) -> Option<String> {
    match meta {
        serde_json::Value::Object(map) => Some(map.get("pile_set_name")?.as_str()?.to_owned()),
        serde_json::Value::String(text) => subset_of_json(text),
        _ => None,
    }
}

/// The subset named by `meta` stored as JSON text. A string that is no JSON object names none.
fn subset_of_json(text: &str) -> Option<String> {
    match serde_json::from_str(text).ok()? {
        value @ serde_json::Value::Object(_) => subset_of(&value),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
