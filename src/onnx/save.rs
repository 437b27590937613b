//! Models to files: whole or not at all, never over their own input.

use super::encode::{Chunks, MAX_MESSAGE, Placement};
use super::error::{Error, Result};
use super::graph::{NodeId, number};
use super::model::{self, Model, TopField};
use super::output::{self, Output, folder};
use super::relocate::{Kind, relocate};
use super::tensor::{ExternalRef, Payload, Storage, TensorInfo};
use super::wire;
use bytes::Bytes;
use prost::Message as _;
use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::{Path, PathBuf};

/// How to write a model.
#[derive(Clone, Debug)]
pub struct SaveOptions {
    /// An existing file may be replaced.
    pub overwrite: bool,
    /// Largest model file in bytes with its weights inside; above it they go to a data file beside
    /// it. Protobuf ends at 2 GiB.
    pub inline_limit: u64,
}

impl Default for SaveOptions {
    fn default() -> Self {
        Self { overwrite: false, inline_limit: 1_800_000_000 }
    }
}

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Saved {
    /// The model.
    pub path: PathBuf,
    /// The data file beside it, if the weights are external.
    pub data_path: Option<PathBuf>,
    /// Bytes of both.
    pub bytes: u64,
}

/// Tensors of at least this many bytes go to the data file.
const EXTERNAL_FROM: u64 = 1024;
/// Alignment in the data file: a page, so that readers can map tensors.
const ALIGNMENT: u64 = 4096;

impl Model {
    /// True when any tensor of the model, in a sub-graph too, lies in another file.
    ///
    /// # Errors
    /// A malformed sub-graph.
    pub fn has_external_data(&self) -> Result<bool> {
        if self.graph.initializers().any(TensorInfo::is_external) {
            return Ok(true);
        }
        let mut found = false;
        self.visit_nested(&mut |_| {
            found = true;
            Ok(ExternalRef::default())
        })?;
        Ok(found)
    }

    /// Writes the model to `path`. A model whose input has external data, or that is larger than
    /// [`SaveOptions::inline_limit`], gets one data file `<path>.data` of its own that holds every
    /// large tensor, so that the two can be moved together. Both are written under temporary names
    /// and renamed, the model last; after an error none of them is there.
    ///
    /// # Errors
    /// A `path` that is the input or one of its data files, exists already, or cannot be written;
    /// tensors that cannot be read or made.
    pub fn save(&self, path: impl AsRef<Path>, options: &SaveOptions) -> Result<Saved> {
        let path = path.as_ref();
        self.check_target(path, options)?;
        let inline = self.encode(&Placement::default());
        if inline.len <= options.inline_limit.min(MAX_MESSAGE) && !self.has_external_data()? {
            output::check_space(path, inline.len)?;
            let model = write(path, &inline)?;
            model.persist()?;
            return Ok(Saved { path: path.to_owned(), data_path: None, bytes: inline.len });
        }
        self.save_with_data(path, options)
    }

    fn save_with_data(&self, path: &Path, options: &SaveOptions) -> Result<Saved> {
        let data_path = data_path(path);
        self.check_target(&data_path, options)?;
        let (data, place) = self.place_in(&data_path)?;
        let model = self.encode(&place);
        if model.len > MAX_MESSAGE {
            return Err(Error::Output {
                path: path.to_owned(),
                what: format!(
                    "{} bytes remain besides the weights; a model file ends at 2 GiB",
                    model.len
                ),
            });
        }
        output::check_space(path, model.len.saturating_add(data.len))?;
        let written = write(&data_path, &data)?;
        let model_file = write(path, &model)?;
        written.persist()?;
        if let Err(error) = model_file.persist() {
            // Without its model the data file is of no use to anyone.
            let _ = std::fs::remove_file(&data_path);
            return Err(error);
        }
        let bytes = model.len + data.len;
        Ok(Saved { path: path.to_owned(), data_path: Some(data_path), bytes })
    }

    /// Where every tensor goes in the data file at `data_path`, and the file's content.
    fn place_in(&self, data_path: &Path) -> Result<(Chunks, Placement)> {
        let location = data_path.file_name().and_then(|name| name.to_str()).ok_or_else(|| {
            let what = "the name of a model with external data has to be UTF-8".to_owned();
            Error::Output { path: data_path.to_owned(), what }
        })?;
        let mut data = Data { chunks: Chunks::default(), location: location.to_owned() };
        let mut place = Placement::default();
        for (index, entry) in self.graph.initializers.iter().enumerate() {
            let info = &entry.value;
            if !entry.removed && belongs_in_data(info) {
                place.initializers.insert(index, self.move_to(&mut data, info)?);
            }
        }
        let (nodes, functions) = self.visit_nested(&mut |info| self.move_to(&mut data, info))?;
        place.nodes = nodes;
        place.functions = functions;
        Ok((data.chunks, place))
    }

    fn move_to(&self, data: &mut Data, info: &TensorInfo) -> Result<ExternalRef> {
        let payload = match &info.storage {
            Storage::New(payload) => payload.clone(),
            _ => Payload::Bytes(self.tensor(info)?.bytes),
        };
        Ok(data.append(&info.name, payload))
    }

    /// The external data files that initialisers, node attributes, sub-graphs and functions name.
    ///
    /// A nested message that cannot be read ends the search: saving such a model fails by itself.
    pub(super) fn external_locations(&self) -> BTreeSet<String> {
        let mut locations: BTreeSet<String> = self
            .graph
            .initializers()
            .filter_map(|info| match &info.storage {
                Storage::External(reference) => Some(reference.location.clone()),
                _ => None,
            })
            .collect();
        let _ = self.visit_nested(&mut |info| {
            if let Storage::External(reference) = &info.storage {
                locations.insert(reference.location.clone());
            }
            Ok(ExternalRef::default())
        });
        locations
    }

    /// Moves the external tensors of nodes and functions; gives the fields to write in their place.
    fn visit_nested(
        &self,
        mover: &mut super::relocate::Mover<'_>,
    ) -> Result<(HashMap<NodeId, Bytes>, HashMap<usize, Bytes>)> {
        let (mut nodes, mut functions) = (HashMap::new(), HashMap::new());
        for (id, node) in self.graph.nodes() {
            // Most nodes hold no tensor at all.
            if !node.attribute.iter().any(|a| {
                a.t.is_some() || a.g.is_some() || !a.tensors.is_empty() || !a.graphs.is_empty()
            }) {
                continue;
            }
            let message = match &self.graph.nodes[id.0].raw {
                Some(raw) => payload(raw),
                None => node.encode_to_vec().into(),
            };
            if let Some(moved) = relocate(Kind::Node, &message, mover, 0)? {
                nodes.insert(id, wire::len_field(number::NODE, &moved));
            }
        }
        for (index, field) in self.fields.iter().enumerate() {
            if let TopField::Raw { number: model::number::FUNCTIONS, raw } = field
                && let Some(moved) = relocate(Kind::Function, &payload(raw), mover, 0)?
            {
                functions.insert(index, wire::len_field(model::number::FUNCTIONS, &moved));
            }
        }
        Ok((nodes, functions))
    }

    /// Refuses targets that are folders, exist, or are files that the model is read from.
    fn check_target(&self, target: &Path, options: &SaveOptions) -> Result<()> {
        let refuse =
            |what: &str| Err(Error::Output { path: target.to_owned(), what: what.to_owned() });
        if target.file_name().is_none() {
            return refuse("it is not the name of a file");
        }
        if !folder(target).is_dir() {
            return refuse("its folder does not exist; create it first");
        }
        if self.path().is_some_and(|input| same_file(input, target)) {
            return refuse("it is the input; choose another output");
        }
        let dir = self.dir().unwrap_or(Path::new("."));
        let mut locations = self.files.locations.iter();
        if locations.any(|location| same_file(&dir.join(location), target)) {
            return refuse("it holds the input's weights; choose another output");
        }
        match std::fs::symlink_metadata(target) {
            Ok(metadata) if metadata.is_dir() => refuse("it is a folder; name a file"),
            Ok(_) if !options.overwrite => refuse("it exists already; --force replaces it"),
            _ => Ok(()),
        }
    }
}

/// Content of the data file.
struct Data {
    chunks: Chunks,
    location: String,
}

impl Data {
    fn append(&mut self, name: &str, payload: Payload) -> ExternalRef {
        let padding = self.chunks.len.next_multiple_of(ALIGNMENT) - self.chunks.len;
        if padding > 0 {
            self.chunks.push(vec![0u8; padding as usize]);
        }
        let place = ExternalRef {
            location: self.location.clone(),
            offset: self.chunks.len,
            length: Some(payload.len()),
        };
        self.chunks.push_payload(name, &payload);
        place
    }
}

fn belongs_in_data(info: &TensorInfo) -> bool {
    // Strings have no bytes of fixed width and stay in the model.
    info.is_external() || info.byte_len().is_ok_and(|len| len >= EXTERNAL_FROM)
}

/// `model.onnx` -> `model.onnx.data`.
fn data_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".data");
    name.into()
}

/// The payload of a whole length-delimited field.
fn payload(raw: &Bytes) -> Bytes {
    match wire::fields(raw, 0).next() {
        Some(Ok(field)) => raw.slice(field.payload),
        _ => Bytes::new(),
    }
}

fn write(target: &Path, chunks: &Chunks) -> Result<Output> {
    let failed = |source: std::io::Error| match source.kind() {
        std::io::ErrorKind::StorageFull => Error::Output {
            path: target.to_owned(),
            what: format!("no space left on its file system; {} bytes are needed", chunks.len),
        },
        _ => Error::Io { action: "write", path: target.to_owned(), source },
    };
    let output = Output::create(target)?;
    let mut writer: BufWriter<&File> = BufWriter::with_capacity(1 << 20, &output.file);
    chunks.write(&mut writer, &failed)?;
    writer.flush().map_err(failed)?;
    drop(writer);
    Ok(output)
}

/// True when both names lead to one file: by path, link or hard link.
fn same_file(a: &Path, b: &Path) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt as _;
        if let (Ok(a), Ok(b)) = (std::fs::metadata(a), std::fs::metadata(b)) {
            return (a.dev(), a.ino()) == (b.dev(), b.ino());
        }
    }
    matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b)
}
