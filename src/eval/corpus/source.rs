//! What text is read from: files, globs, addresses.

use super::http::{Blocks, Client, Opened, Ranges, Remote, Retry};
use super::jsonl;
use super::parquet::{Input, Table};
use super::{Document, Documents};
use crate::eval::error::{Error, Result};
use crate::eval::observer::Observer;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek as _};
use std::path::{Path, PathBuf};

const KINDS: &str = ".parquet, .jsonl, .jsonl.zst or .txt";

/// How a source is decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Parquet,
    Lines { compressed: bool },
    Text,
}

impl Kind {
    /// By extension; `None` for what is no evaluation text.
    pub(super) fn of(name: &str) -> Option<Self> {
        let name = name.to_lowercase();
        let (stem, compressed) = match name.strip_suffix(".zst") {
            Some(stem) => (stem, true),
            None => (name.as_str(), false),
        };
        let (_, extension) = stem.rsplit_once('.')?;
        match (extension, compressed) {
            ("parquet", false) => Some(Self::Parquet),
            ("jsonl" | "ndjson" | "json", compressed) => Some(Self::Lines { compressed }),
            ("txt", false) => Some(Self::Text),
            _ => None,
        }
    }
}

/// Where a source lies.
#[derive(Clone, Debug)]
enum Place {
    File(PathBuf),
    Remote(Remote),
}

/// One file of evaluation text, on disk or on a web server.
#[derive(Clone, Debug)]
pub struct Source {
    place: Place,
    kind: Kind,
}

/// The sources that `--data` names, in the order given: files, `http://` and `https://` addresses,
/// and globs, whose matches are sorted by path. Nothing is read but the folders of globs.
///
/// # Errors
/// A file that is missing, unreadable, a directory or of an unknown kind; a glob that is malformed
/// or matches nothing.
pub fn resolve(names: &[PathBuf]) -> Result<Vec<Source>> {
    let client = Client::new(Retry::default());
    let mut sources = Vec::new();
    for name in names {
        match name.to_str() {
            Some(url) if url.starts_with("http://") || url.starts_with("https://") => {
                sources.push(Source::remote(client.remote(url, super::hub::token_for(url)))?);
            }
            Some(pattern) if pattern.contains(['*', '?', '[']) && !name.exists() => {
                for path in matches(pattern)? {
                    sources.push(Source::file(&path)?);
                }
            }
            _ => sources.push(Source::file(name)?),
        }
    }
    Ok(sources)
}

/// The files that a glob matches, sorted.
fn matches(pattern: &str) -> Result<Vec<PathBuf>> {
    let error = |reason: String| Error::Corpus { path: pattern.into(), reason };
    let paths = glob::glob(pattern).map_err(|e| error(format!("not a glob: {e}")))?;
    let mut files = Vec::new();
    for path in paths {
        let path = path.map_err(|e| error(format!("{}: {}", e.path().display(), e.error())))?;
        if !path.is_dir() {
            files.push(path);
        }
    }
    if files.is_empty() {
        return Err(error("the glob matches no file".into()));
    }
    files.sort();
    Ok(files)
}

impl Source {
    /// A local file.
    ///
    /// # Errors
    /// As for [`resolve`].
    pub fn file(path: &Path) -> Result<Self> {
        let error = |reason: String| Error::Corpus { path: path.into(), reason };
        if std::fs::metadata(path).map_err(Error::io(path))?.is_dir() {
            return Err(error(format!(
                "is a directory; pass {KINDS} files, or a quoted glob: --data '{}'",
                path.join("*.parquet").display()
            )));
        }
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let kind = Kind::of(&name).ok_or_else(|| unknown(path))?;
        // A file that cannot be opened is found now, not after hours.
        File::open(path).map_err(Error::io(path))?;
        Ok(Self { place: Place::File(path.into()), kind })
    }

    /// A file on a web server; nothing is transferred yet.
    pub(super) fn remote(remote: Remote) -> Result<Self> {
        let name = remote.name();
        let kind = Kind::of(name).ok_or_else(|| unknown(Path::new(name)))?;
        Ok(Self { place: Place::Remote(remote), kind })
    }

    /// Path or address, without what may be secret in an address.
    pub fn name(&self) -> PathBuf {
        match &self.place {
            Place::File(path) => path.clone(),
            Place::Remote(remote) => remote.name().into(),
        }
    }

    /// The path of a local file.
    pub fn path(&self) -> Option<&Path> {
        match &self.place {
            Place::File(path) => Some(path),
            Place::Remote(_) => None,
        }
    }

    fn error(&self, reason: impl Into<String>) -> Error {
        Error::Corpus { path: self.name(), reason: reason.into() }
    }

    /// Whether documents can be counted, and picked by number, without reading the others.
    pub(super) fn is_table(&self) -> bool {
        matches!(self.kind, Kind::Parquet | Kind::Text)
    }

    /// Streams the documents.
    pub(super) fn open(&self, observer: &dyn Observer) -> Result<Documents> {
        match self.kind {
            Kind::Parquet => Ok(self.table(false, observer)?.documents()),
            Kind::Lines { compressed: false } => {
                Ok(jsonl::read(&self.name(), BufReader::new(self.reader()?)))
            }
            Kind::Lines { compressed: true } => {
                let decoder = zstd::stream::read::Decoder::new(self.reader()?);
                let decoder = decoder.map_err(Error::io(self.name()))?;
                Ok(jsonl::read(&self.name(), BufReader::new(decoder)))
            }
            Kind::Text => Ok(Box::new(std::iter::once(self.text()))),
        }
    }

    /// How many documents there are, of a table.
    pub(super) fn count(&self, observer: &dyn Observer) -> Result<u64> {
        if self.kind == Kind::Parquet { Ok(self.table(false, observer)?.rows()) } else { Ok(1) }
    }

    /// The documents with these numbers, which ascend, of a table.
    pub(super) fn pick(&self, rows: Vec<u64>, observer: &dyn Observer) -> Result<Documents> {
        if self.kind == Kind::Parquet {
            Ok(self.table(true, observer)?.pick(rows))
        } else {
            Ok(Box::new(std::iter::once(self.text())))
        }
    }

    fn table(&self, pages: bool, observer: &dyn Observer) -> Result<Table> {
        let input = match &self.place {
            Place::File(path) => Input::file(path)?,
            Place::Remote(remote) => match remote.open()? {
                Opened::Ranged(file) => Input::Remote(Blocks::new(file)),
                Opened::Whole(mut whole) => {
                    observer.note(&format!(
                        "{}: the server serves no ranges; fetching the whole file",
                        remote.name()
                    ));
                    let mut spool = || -> io::Result<File> {
                        let mut file = tempfile::tempfile()?;
                        io::copy(&mut whole, &mut file)?;
                        file.rewind()?;
                        Ok(file)
                    };
                    let file = spool().map_err(|e| self.error(format!("cannot fetch: {e}")))?;
                    Input::File(file.into())
                }
            },
        };
        Table::open(&self.name(), input, pages)
    }

    /// The bytes from first to last.
    fn reader(&self) -> Result<Box<dyn Read + Send>> {
        match &self.place {
            Place::File(path) => Ok(Box::new(File::open(path).map_err(Error::io(path))?)),
            Place::Remote(remote) => match remote.open()? {
                Opened::Ranged(file) => Ok(Box::new(Ranges::new(file))),
                Opened::Whole(whole) => Ok(Box::new(whole)),
            },
        }
    }

    /// The whole file as one document.
    fn text(&self) -> Result<Document> {
        let mut bytes = Vec::new();
        self.reader()?.read_to_end(&mut bytes).map_err(Error::io(self.name()))?;
        let text = String::from_utf8(bytes).map_err(|e| {
            self.error(format!("not UTF-8 at byte {}", e.utf8_error().valid_up_to()))
        })?;
        Ok(Document { text, subset: None })
    }
}

fn unknown(path: &Path) -> Error {
    let reason = format!("unknown kind of evaluation text; expected {KINDS}");
    Error::Corpus { path: path.into(), reason }
}
