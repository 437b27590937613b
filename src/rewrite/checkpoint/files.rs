//! The tensors of a checkpoint: one safetensors file, a folder of them, or what an index lists.
//!
//! Files are mapped; a header is read, and nothing of a tensor before it is asked for.
//!
//! Source of the format: <https://huggingface.co/docs/safetensors> (8 bytes of header length,
//! little-endian; JSON of name, type, shape and byte range; the bytes). The crate checks header
//! length, shapes against ranges, and that ranges follow each other to the end of the file.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Component, Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use safetensors::{Dtype, SafeTensorError, SafeTensors};

use super::CheckpointError;
use crate::onnx::{self, map};

/// More than the index of any checkpoint takes.
const LARGEST_INDEX: u64 = 256 << 20;

/// More than the header of any file takes: names, types and shapes, some hundred bytes a tensor.
const LARGEST_HEADER: u64 = 32 << 20;

/// A tensor as stored.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    /// Its file.
    pub path: Arc<PathBuf>,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// Exactly as many as type and shape say.
    pub bytes: Bytes,
}

/// Every tensor by name.
pub(super) type Entries = BTreeMap<String, Entry>;

/// Reads the headers of a checkpoint.
pub(super) fn open(path: &Path) -> Result<Entries, CheckpointError> {
    let metadata = fs::metadata(path).map_err(|error| io("open", path, error))?;
    if !metadata.is_dir() {
        let mut entries = Entries::new();
        read(path, &mut entries)?;
        return Ok(entries);
    }
    let names = names_in(path)?;
    let index = names.iter().find(|name| *name == "model.safetensors.index.json");
    let index = index.or_else(|| names.iter().find(|n| n.ends_with(".safetensors.index.json")));
    if let Some(index) = index {
        return read_index(path, &path.join(index));
    }
    let mut entries = Entries::new();
    for name in names.iter().filter(|name| name.ends_with(".safetensors")) {
        read(&path.join(name), &mut entries)?;
    }
    match entries.is_empty() {
        true => Err(CheckpointError::Empty { path: path.to_owned() }),
        false => Ok(entries),
    }
}

fn io(action: &'static str, path: &Path, source: std::io::Error) -> CheckpointError {
    CheckpointError::Io(onnx::Error::Io { action, path: path.to_owned(), source })
}

/// File names of a folder, in order.
fn names_in(folder: &Path) -> Result<BTreeSet<String>, CheckpointError> {
    let listed = fs::read_dir(folder).map_err(|error| io("list", folder, error))?;
    let mut names = BTreeSet::new();
    for item in listed {
        let item = item.map_err(|error| io("list", folder, error))?;
        // A name that is no text is none of a checkpoint's.
        names.extend(item.file_name().into_string().ok());
    }
    Ok(names)
}

/// Adds the tensors of one file.
fn read(path: &Path, entries: &mut Entries) -> Result<(), CheckpointError> {
    let bytes = map(path).map_err(CheckpointError::Io)?;
    let file = |what: String| CheckpointError::File { path: path.to_owned(), what };
    if let Some((length, _)) = bytes.split_first_chunk::<8>() {
        let length = u64::from_le_bytes(*length);
        // Parsed, a header takes several times its size.
        if length > LARGEST_HEADER && length <= bytes.len() as u64 {
            return Err(file(format!(
                "has a header of {length} bytes, more than the {LARGEST_HEADER} that are read"
            )));
        }
    }
    let tensors = SafeTensors::deserialize(&bytes).map_err(|error| {
        use SafeTensorError as E;
        file(match error {
            // The header is whole and does not fit what follows.
            E::MetadataIncompleteBuffer
            | E::InvalidOffset(_)
            | E::TensorInvalidInfo
            | E::ValidationOverflow => {
                format!("is cut off or damaged ({error}); download it again")
            }
            error => format!("is no safetensors file, or is cut off in its header ({error})"),
        })
    })?;
    let shared = Arc::new(path.to_owned());
    for (name, view) in tensors.iter() {
        let entry = Entry {
            path: shared.clone(),
            dtype: view.dtype(),
            shape: view.shape().to_vec(),
            bytes: bytes.slice_ref(view.data()),
        };
        if let Some(first) = entries.insert(name.to_owned(), entry) {
            let other = first.path.display();
            return Err(file(format!("tensor '{name}' is also in '{other}'")));
        }
    }
    Ok(())
}

#[derive(serde::Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// Follows an index: every tensor has to be in the file that it says.
fn read_index(folder: &Path, path: &Path) -> Result<Entries, CheckpointError> {
    let wrong = |what: String| CheckpointError::Index { path: path.to_owned(), what };
    let length = fs::metadata(path).map_err(|error| io("open", path, error))?.len();
    if length > LARGEST_INDEX {
        return Err(wrong(format!("{length} bytes are no index of a checkpoint")));
    }
    let text = fs::read(path).map_err(|error| io("read", path, error))?;
    let index: Index = serde_json::from_slice(&text)
        .map_err(|error| wrong(format!("is no JSON with a 'weight_map' of names ({error})")))?;
    let mut shards: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (tensor, shard) in &index.weight_map {
        shards.entry(shard).or_default().push(tensor);
    }
    let mut entries = Entries::new();
    for (shard, tensors) in shards {
        let mut parts = Path::new(shard).components();
        if !matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None)) {
            return Err(wrong(format!("names the shard '{shard}', which is no file beside it")));
        }
        let file = folder.join(shard);
        if !file.exists() {
            let count = tensors.len();
            let what = format!("names the shard '{shard}' ({count} tensors), which is missing");
            return Err(wrong(what));
        }
        let mut found = Entries::new();
        read(&file, &mut found)?;
        for tensor in tensors {
            let entry = found.remove(tensor).ok_or_else(|| {
                wrong(format!("says that '{tensor}' is in '{shard}', which has no such tensor"))
            })?;
            entries.insert(tensor.to_owned(), entry);
        }
    }
    match entries.is_empty() {
        true => Err(CheckpointError::Empty { path: folder.to_owned() }),
        false => Ok(entries),
    }
}
