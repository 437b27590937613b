//! Models to files: whole or not at all, never over their own input.

use super::encode::{Chunks, MAX_MESSAGE, Out, Placement};
use super::error::{Error, Result};
use super::graph::{NodeId, number};
use super::model::{self, Model, TopField};
use super::output::{self, Output, folder};
use super::partial::{self, Partial};
use super::progress::{Meter, Progress};
use super::proto::StringStringEntry;
use super::relocate::{Kind, relocate};
use super::shards::{Data, Shards};
use super::tensor::{ExternalRef, Payload, Storage, TensorInfo};
use super::wire;
use bytes::Bytes;
use prost::Message as _;
use sha2::{Digest as _, Sha256};
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
    /// External data is cut into files of at most so many bytes, between tensors; a larger tensor gets
    /// a file of its own. `None` = one file.
    pub shard_size: Option<u64>,
    /// Goes on with what a killed run of the same job has left of its data files.
    pub resume: bool,
    /// Key of a metadata entry that gets the SHA-256 of every data file, as JSON.
    pub hash_key: Option<&'static str>,
    /// Who is told how far the writing has come.
    pub progress: Progress,
}

impl SaveOptions {
    /// As [`Default`]: no overwriting, one data file from 1.8 GB on.
    pub const DEFAULT: Self = Self {
        progress: Progress::NOBODY,
        overwrite: false,
        inline_limit: 1_800_000_000,
        shard_size: None,
        resume: false,
        hash_key: None,
    };
}

impl Default for SaveOptions {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Saved {
    /// The model.
    pub path: PathBuf,
    /// The (first) data file beside it, if the weights are external.
    pub data_path: Option<PathBuf>,
    /// All data files.
    pub data_paths: Vec<PathBuf>,
    /// Bytes of all of them.
    pub bytes: u64,
}

/// Tensors of at least this many bytes go to the data file.
const EXTERNAL_FROM: u64 = 1024;

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
    /// large tensor (shards `<path>.data-1`, ... with [`SaveOptions::shard_size`]), so that they can
    /// be moved together. All are written under temporary names and renamed, the model last; after
    /// an error none of them is there. A killed process leaves `.partial` and `.journal` files of
    /// its data, which [`SaveOptions::resume`] goes on with.
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
            let model = write(path, &inline, &options.progress.meter(inline.len)?)?;
            model.persist()?;
            let (path, data_paths) = (path.to_owned(), Vec::new());
            return Ok(Saved { path, data_path: None, data_paths, bytes: inline.len });
        }
        self.save_with_data(path, options)
    }

    fn save_with_data(&self, path: &Path, options: &SaveOptions) -> Result<Saved> {
        let (files, place) = self.place_in(path, options.shard_size)?;
        for file in &files {
            // A killed run may have renamed its data already; then its journal is still there.
            let ours = options.resume && partial::journal_path(&file.path).exists();
            let overwrite = options.overwrite || ours;
            self.check_target(&file.path, &SaveOptions { overwrite, ..options.clone() })?;
        }
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
        let data_len: u64 = files.iter().map(|file| file.chunks.len).sum();
        let there = |file: &Data| partial::present(&partial::partial_path(&file.path));
        let there: u64 = files.iter().map(there).sum();
        output::check_space(path, (model.len + data_len).saturating_sub(there))?;
        let bytes = self.write_all(path, model, &files, options)? + data_len;
        let data_paths: Vec<PathBuf> = files.into_iter().map(|file| file.path).collect();
        let data_path = data_paths.first().cloned();
        Ok(Saved { path: path.to_owned(), data_path, data_paths, bytes })
    }

    /// Writes data files and model; returns the bytes of the model. After an error none is left.
    fn write_all(
        &self,
        path: &Path,
        mut model: Chunks,
        files: &[Data],
        options: &SaveOptions,
    ) -> Result<u64> {
        let job = self.job(&model)?;
        let data_len: u64 = files.iter().map(|file| file.chunks.len).sum();
        let meter = options.progress.meter(model.len + data_len)?;
        let (mut partials, mut hashes) = (Vec::new(), serde_json::Map::new());
        let mut finish = || {
            for file in files {
                let resume = options.resume && self.path().is_some();
                let partial = Partial::write(&file.path, &file.chunks, &job, resume, &meter)?;
                hashes.insert(file.location.clone(), partial.sha256.clone().into());
                partials.push(partial);
            }
            if let Some(key) = options.hash_key {
                let value = serde_json::Value::Object(std::mem::take(&mut hashes)).to_string();
                let entry = StringStringEntry { key: Some(key.to_owned()), value: Some(value) };
                model.push(wire::len_field(model::number::METADATA, &entry.encode_to_vec()));
            }
            let model_file = write(path, &model, &meter)?;
            // An old model must not be found beside new data.
            if path.symlink_metadata().is_ok() {
                std::fs::remove_file(path).map_err(|source| Error::Io {
                    action: "replace",
                    path: path.to_owned(),
                    source,
                })?;
            }
            partials.iter().try_for_each(Partial::persist)?;
            model_file.persist().inspect_err(|_| {
                // Without their model the data files are of no use to anyone.
                files.iter().for_each(|file| drop(std::fs::remove_file(&file.path)));
            })
        };
        let done = finish();
        // The journals go last: until then a killed run can be taken up.
        partials.iter().for_each(Partial::discard);
        done.map(|()| model.len)
    }

    /// What is written, in a hash: the model with its plan, and which state of which files it is made
    /// from. Nothing of another job is gone on with.
    fn job(&self, model: &Chunks) -> Result<String> {
        let mut hash = Hashing(Sha256::new());
        let failed = |source| Error::Io { action: "hash", path: "the model".into(), source };
        model.write(&mut hash, &failed)?;
        let dir = self.dir().unwrap_or(Path::new("."));
        let external = self.files.locations.iter().map(|location| dir.join(location));
        for file in self.path().map(Path::to_owned).into_iter().chain(external) {
            let metadata = std::fs::metadata(&file).ok();
            let state = metadata.map(|m| (m.len(), m.modified().ok()));
            hash.0.update(format!("{}\0{state:?}\0", file.display()));
        }
        hash.0.update(env!("CARGO_PKG_VERSION"));
        Ok(partial::hex(hash.0))
    }

    /// Where every tensor goes in the data files beside `path`, and their content.
    fn place_in(&self, path: &Path, shard_size: Option<u64>) -> Result<(Vec<Data>, Placement)> {
        let mut data = Shards { path, size: shard_size, files: Vec::new() };
        data.start()?;
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
        Ok((data.files, place))
    }

    fn move_to(&self, data: &mut Shards<'_>, info: &TensorInfo) -> Result<ExternalRef> {
        let payload = match &info.storage {
            Storage::New(payload) => payload.clone(),
            _ => Payload::Bytes(self.tensor(info)?.bytes),
        };
        data.append(&info.name, payload)
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

impl Out for Hashing {}

/// Hashes what is written.
struct Hashing(Sha256);

impl std::io::Write for Hashing {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn belongs_in_data(info: &TensorInfo) -> bool {
    // Strings have no bytes of fixed width and stay in the model.
    info.is_external() || info.byte_len().is_ok_and(|len| len >= EXTERNAL_FROM)
}

/// The payload of a whole length-delimited field.
fn payload(raw: &Bytes) -> Bytes {
    match wire::fields(raw, 0).next() {
        Some(Ok(field)) => raw.slice(field.payload),
        _ => Bytes::new(),
    }
}

fn write(target: &Path, chunks: &Chunks, meter: &Meter<'_>) -> Result<Output> {
    let failed = |source: std::io::Error| match source.kind() {
        std::io::ErrorKind::StorageFull => Error::Output {
            path: target.to_owned(),
            what: format!("no space left on its file system; {} bytes are needed", chunks.len),
        },
        _ => Error::Io { action: "write", path: target.to_owned(), source },
    };
    let output = Output::create(target)?;
    let mut writer: BufWriter<&File> = BufWriter::with_capacity(1 << 20, &output.file);
    for chunk in &chunks.list {
        chunk.write(&mut writer, &failed)?;
        meter.add(chunk.len())?;
    }
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
