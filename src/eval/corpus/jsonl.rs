//! JSON Lines: one object a line, blank lines ignored.

use super::{Document, Documents, subset_of};
use crate::eval::error::{Error, Result};
use serde::de::IgnoredAny;
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;
use std::collections::BTreeMap;
use std::io::{BufRead, Read as _};
use std::path::{Path, PathBuf};

/// Bytes of the longest line. Real documents have a few megabytes; a line without an end, such as a
/// few kilobytes of zstd can hold, must not fill the memory.
const LONGEST: u64 = 64 << 20;

/// Streams the documents of `reader`; `path` is for messages.
pub(super) fn read(path: &Path, reader: impl BufRead + Send + 'static) -> Documents {
    Box::new(Lines { path: path.into(), reader, line: 0, failed: false })
}

struct Lines<R> {
    path: PathBuf,
    reader: R,
    line: u64,
    failed: bool,
}

/// What a line says, without what else it says: that may be much larger.
#[derive(Deserialize)]
struct Line<'a> {
    #[serde(borrow, default, deserialize_with = "present")]
    text: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "present")]
    meta: Option<&'a RawValue>,
}

/// A value that is there, `null` included.
fn present<'de, D: Deserializer<'de>>(
    value: D,
) -> std::result::Result<Option<&'de RawValue>, D::Error> {
    <&RawValue>::deserialize(value).map(Some)
}

impl<R: BufRead> Lines<R> {
    fn next_document(&mut self) -> Result<Option<Document>> {
        let mut bytes = Vec::new();
        loop {
            bytes.clear();
            self.line += 1;
            let read = (&mut self.reader).take(LONGEST + 1).read_until(b'\n', &mut bytes);
            if read.map_err(|e| self.error(format!("cannot read: {e}")))? == 0 {
                return Ok(None);
            }
            if bytes.len() as u64 > LONGEST {
                let limit = LONGEST >> 20;
                return Err(self.error(format!("longer than {limit} MiB: not one document a line")));
            }
            // Windows editors start a UTF-8 file with a byte order mark, which JSON does not allow.
            let bom: &[u8] = if self.line == 1 { b"\xef\xbb\xbf" } else { b"" };
            let line = bytes.strip_prefix(bom).unwrap_or(&bytes).trim_ascii();
            if !line.is_empty() {
                return self.document(line).map(Some);
            }
        }
    }

    fn document(&self, bytes: &[u8]) -> Result<Document> {
        let line = std::str::from_utf8(bytes)
            .map_err(|e| self.error(format!("not UTF-8 at byte {}", e.valid_up_to())))?;
        if !line.starts_with('{') {
            serde_json::from_str::<IgnoredAny>(line)
                .map_err(|e| self.error(format!("invalid JSON: {e}")))?;
            return Err(self.error("expected a JSON object with a `text` key".into()));
        }
        let Line { text, meta } =
            serde_json::from_str(line).map_err(|e| self.error(format!("invalid JSON: {e}")))?;
        let Some(text) = text else {
            let keys: BTreeMap<&str, IgnoredAny> = serde_json::from_str(line).unwrap_or_default();
            let keys: Vec<_> = keys.into_keys().take(20).collect();
            return Err(self.error(format!("no `text` key; found {}", list(&keys))));
        };
        if !text.get().starts_with('"') {
            return Err(self.error("`text` is not a string".into()));
        }
        let text = serde_json::from_str(text.get())
            .map_err(|e| self.error(format!("`text` is no valid string: {e}")))?;
        let meta = meta.and_then(|meta| serde_json::from_str(meta.get()).ok());
        Ok(Document { text, subset: meta.as_ref().and_then(subset_of) })
    }

    fn error(&self, reason: String) -> Error {
        Error::Corpus { path: self.path.clone(), reason: format!("line {}: {reason}", self.line) }
    }
}

impl<R: BufRead> Iterator for Lines<R> {
    type Item = Result<Document>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        let item = self.next_document().transpose();
        self.failed = matches!(item, Some(Err(_)));
        item
    }
}

/// A list of names for a message; "none" when empty.
pub(super) fn list(names: &[&str]) -> String {
    if names.is_empty() { "none".into() } else { names.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::super::tests::all;

    #[test]
    fn a_byte_order_mark_is_no_part_of_the_first_line() {
        let text = &b"\xef\xbb\xbf{\"text\": \"one\"}\n{\"text\": \"two\"}\n"[..];
        let documents: Vec<_> =
            super::read(std::path::Path::new("bom.jsonl"), text).map(|d| d.unwrap().text).collect();
        assert_eq!(documents, ["one", "two"]);
    }

    #[test]
    fn lines_with_and_without_meta_plain_and_compressed() {
        let dir = tempfile::tempdir().unwrap();
        let lines = concat!(
            "{\"text\": \"a\", \"meta\": {\"pile_set_name\": \"Github\"}}\n\n",
            "{\"text\": \"b\\n\", \"meta\": \"{\\\"pile_set_name\\\": \\\"PhilPapers\\\"}\"}\n",
            "{\"text\": \"\"}",
        );
        let plain = dir.path().join("a.jsonl");
        std::fs::write(&plain, lines).unwrap();
        // Two frames: The Pile's shards are concatenations.
        let mut packed = zstd::encode_all(lines.as_bytes(), 1).unwrap();
        packed.extend(zstd::encode_all("\n{\"text\":\"c\"}\n".as_bytes(), 1).unwrap());
        let compressed = dir.path().join("a.jsonl.zst");
        std::fs::write(&compressed, packed).unwrap();

        let docs = all(&plain).unwrap();
        let texts: Vec<_> = docs.iter().map(|d| d.text.as_str()).collect();
        let subsets: Vec<_> = docs.iter().map(|d| d.subset.as_deref()).collect();
        assert_eq!(texts, ["a", "b\n", ""]);
        assert_eq!(subsets, [Some("Github"), Some("PhilPapers"), None]);
        let again = all(&compressed).unwrap();
        assert_eq!(again[..3], docs[..]);
        assert_eq!(again[3].text, "c");
    }

    #[test]
    fn faults_name_the_line_and_what_was_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.jsonl");
        for (lines, expected) in [
            ("{\"text\":\"a\"}\n{\"text\":\n", "line 2: invalid JSON"),
            ("\n\n{\"content\":\"a\",\"id\":1}\n", "line 3: no `text` key; found content, id"),
            ("[1]\n", "line 1: expected a JSON object"),
            ("{\"text\":7}\n", "line 1: `text` is not a string"),
        ] {
            std::fs::write(&path, lines).unwrap();
            let message = all(&path).unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        }
        std::fs::write(dir.path().join("a.jsonl.zst"), b"not zstd at all").unwrap();
        assert!(all(&dir.path().join("a.jsonl.zst")).is_err());
    }
}
