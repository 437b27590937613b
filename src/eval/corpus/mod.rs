//! Evaluation text: a stream of documents out of parquet, JSON Lines or plain text.
//!
//! A document is one row of a parquet file, one line of a JSON Lines file (optionally compressed
//! with zstd), or one whole `.txt` file. Its text is the column or key `text`. The Pile's subset is
//! read from `meta.pile_set_name`, where `meta` is a struct, a JSON string, or absent.
//!
//! Readers stream: only the documents asked for are ever decoded.

mod hub;
mod jsonl;
mod parquet;

pub use hub::{Dataset, Fetched};

use super::error::{Error, Result};
use std::fs::File;
use std::io::{BufReader, Read};
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

/// Opens a file of evaluation text by its extension: `.parquet`, `.jsonl` (also `.ndjson`, `.json`
/// with one object a line), any of these with `.zst`, or `.txt` (the whole file is one document).
///
/// # Errors
/// A directory, an unknown extension, an unreadable file, a parquet file without a `text` column.
/// Faults further in (a bad line, a bad row) come out of the iterator.
pub fn open(path: &Path) -> Result<Documents> {
    let corpus_error = |reason: String| Error::Corpus { path: path.into(), reason };
    let meta = std::fs::metadata(path).map_err(Error::io(path))?;
    if meta.is_dir() {
        return Err(corpus_error(
            "is a directory; pass one .parquet, .jsonl, .jsonl.zst or .txt file".into(),
        ));
    }
    let file = File::open(path).map_err(Error::io(path))?;
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    let (stem, compressed) = match name.strip_suffix(".zst") {
        Some(stem) => (stem, true),
        None => (name.as_str(), false),
    };
    let extension = stem.rsplit_once('.').map_or("", |(_, extension)| extension);
    match (extension, compressed) {
        ("parquet", false) => parquet::open(path, file),
        ("jsonl" | "ndjson" | "json", false) => Ok(jsonl::read(path, BufReader::new(file))),
        ("jsonl" | "ndjson" | "json", true) => {
            let decoder = zstd::stream::read::Decoder::new(file).map_err(Error::io(path))?;
            Ok(jsonl::read(path, BufReader::new(decoder)))
        }
        ("txt", false) => text(path, file),
        _ => Err(corpus_error(
            "unknown kind of evaluation text; expected .parquet, .jsonl, .jsonl.zst or .txt".into(),
        )),
    }
}

/// The whole file as one document.
fn text(path: &Path, mut file: File) -> Result<Documents> {
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).map_err(Error::io(path))?;
    let text = String::from_utf8(bytes).map_err(|e| Error::Corpus {
        path: path.into(),
        reason: format!("not UTF-8 at byte {}", e.utf8_error().valid_up_to()),
    })?;
    Ok(Box::new(std::iter::once(Ok(Document { text, subset: None }))))
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
mod tests {
    use super::*;

    pub(super) fn all(path: &Path) -> Result<Vec<Document>> {
        open(path)?.collect()
    }

    fn message(path: &Path) -> String {
        all(path).expect_err("an error").to_string()
    }

    #[test]
    fn a_text_file_is_one_document() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.txt");
        std::fs::write(&path, "one\n\ntwo\n").unwrap();
        let docs = all(&path).unwrap();
        assert_eq!(docs, [Document { text: "one\n\ntwo\n".into(), subset: None }]);
        std::fs::write(&path, b"ab\xff").unwrap();
        assert!(message(&path).contains("not UTF-8 at byte 2"));
    }

    #[test]
    fn directories_unknown_and_missing_files_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert!(message(dir.path()).contains("is a directory"));
        let path = dir.path().join("a.csv");
        std::fs::write(&path, "text\n").unwrap();
        assert!(message(&path).contains("unknown kind"));
        assert!(message(&dir.path().join("none.jsonl")).contains("none.jsonl"));
    }

    #[test]
    fn meta_is_an_object_or_a_string_of_one() {
        let object = serde_json::json!({"pile_set_name": "Github"});
        assert_eq!(subset_of(&object).as_deref(), Some("Github"));
        assert_eq!(subset_of(&object.to_string().into()).as_deref(), Some("Github"));
        assert_eq!(subset_of(&serde_json::json!({"source": "x"})), None);
        assert_eq!(subset_of_json("\"{}\""), None);
        assert_eq!(subset_of_json("not json"), None);
    }
}
