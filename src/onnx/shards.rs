//! Which tensor goes where in the data files of an output.

use super::encode::Chunks;
use super::error::{Error, Result};
use super::tensor::{ExternalRef, Payload};
use std::path::{Path, PathBuf};

/// Alignment in a data file: a page, so that readers can map tensors.
const ALIGNMENT: u64 = 4096;

/// Content of one data file.
pub(crate) struct Data {
    pub chunks: Chunks,
    /// Its name, as tensors refer to it.
    pub location: String,
    pub path: PathBuf,
}

/// The data files of a model.
pub(crate) struct Shards<'a> {
    /// The model.
    pub path: &'a Path,
    /// Largest size of a file.
    pub size: Option<u64>,
    pub files: Vec<Data>,
}

impl Shards<'_> {
    /// Starts the next file.
    pub(crate) fn start(&mut self) -> Result<()> {
        let mut path = data_path(self.path).into_os_string();
        if self.size.is_some() {
            path.push(format!("-{}", self.files.len() + 1));
        }
        let path = PathBuf::from(path);
        let location = path.file_name().and_then(|name| name.to_str()).ok_or_else(|| {
            let what = "the name of a model with external data has to be UTF-8".to_owned();
            Error::Output { path: path.clone(), what }
        })?;
        self.files.push(Data { chunks: Chunks::default(), location: location.to_owned(), path });
        Ok(())
    }

    /// Gives a tensor its place.
    pub(crate) fn append(&mut self, name: &str, payload: Payload) -> Result<ExternalRef> {
        let used = self.files.last().map_or(0, |file| file.chunks.len);
        let end = used.next_multiple_of(ALIGNMENT).saturating_add(payload.len());
        if self.files.is_empty() || used > 0 && self.size.is_some_and(|size| end > size) {
            self.start()?;
        }
        let last = self.files.len() - 1;
        let Data { chunks, location, .. } = &mut self.files[last];
        let padding = chunks.len.next_multiple_of(ALIGNMENT) - chunks.len;
        if padding > 0 {
            chunks.push(vec![0u8; padding as usize]);
        }
        let (location, offset) = (location.clone(), chunks.len);
        chunks.push_payload(name, &payload);
        Ok(ExternalRef { location, offset, length: Some(payload.len()) })
    }
}

/// `model.onnx` -> `model.onnx.data`.
fn data_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".data");
    name.into()
}
