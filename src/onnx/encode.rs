//! From a model to bytes, as a list of chunks so that no weight is copied on the way.

use super::error::{Error, Result};
use super::graph::{Entry, Graph, NodeId, Slot, number};
use super::model::{self, Model, TopField};
use super::proto::{StringStringEntry, Tensor};
use super::tensor::{ExternalRef, Payload, Storage, TensorInfo};
use super::wire;
use bytes::Bytes;
use prost::Message as _;
use std::collections::HashMap;
use std::io::Write;

/// A piece of the output.
#[derive(Clone, Debug)]
pub(crate) enum Chunk {
    Bytes(Bytes),
    /// Payload of the named tensor.
    Payload(String, Payload),
}

/// Where chunks go.
pub(crate) trait Out: Write + Send {
    /// Takes bytes that are not to be copied where it can be helped.
    fn put(&mut self, bytes: Bytes) -> std::io::Result<()> {
        self.write_all(&bytes)
    }
}

impl Out for Vec<u8> {}
impl<W: Write + Send> Out for std::io::BufWriter<W> {}

/// Pieces of the output and their total length.
#[derive(Clone, Debug, Default)]
pub(crate) struct Chunks {
    pub list: Vec<Chunk>,
    pub len: u64,
}

impl Chunks {
    pub(crate) fn push(&mut self, bytes: impl Into<Bytes>) {
        let bytes = bytes.into();
        self.len += bytes.len() as u64;
        self.list.push(Chunk::Bytes(bytes));
    }

    pub(crate) fn push_payload(&mut self, name: &str, payload: &Payload) {
        self.len += payload.len();
        self.list.push(Chunk::Payload(name.to_owned(), payload.clone()));
    }

    fn append(&mut self, other: Self) {
        self.len += other.len;
        self.list.extend(other.list);
    }

    /// Everything in memory.
    fn to_bytes(&self) -> Result<Bytes> {
        if self.len > MAX_MESSAGE {
            let source = std::io::Error::other(format!(
                "{} bytes exceed protobuf's limit of 2 GiB",
                self.len
            ));
            return Err(Error::Io { action: "encode into", path: "memory".into(), source });
        }
        let mut out = Vec::with_capacity(self.len as usize);
        let failed = |source| Error::Io { action: "write", path: "memory".into(), source };
        self.write(&mut out, &failed)?;
        Ok(out.into())
    }

    /// Writes everything; payloads are made one at a time, large ones in pieces.
    pub(crate) fn write(
        &self,
        out: &mut dyn Out,
        failed: &(dyn Fn(std::io::Error) -> Error + Sync),
    ) -> Result<()> {
        self.list.iter().try_for_each(|chunk| chunk.write(out, failed))
    }
}

/// Bytes of a mapped file that are written before their pages are released.
const PIECE: usize = 8 << 20;

impl Chunk {
    pub(crate) fn len(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::Payload(_, payload) => payload.len(),
        }
    }

    pub(crate) fn write(
        &self,
        out: &mut dyn Out,
        failed: &(dyn Fn(std::io::Error) -> Error + Sync),
    ) -> Result<()> {
        match self {
            Self::Bytes(bytes) | Self::Payload(_, Payload::Bytes(bytes)) => {
                for piece in bytes.chunks(PIECE) {
                    out.write_all(piece).map_err(failed)?;
                    super::release(piece);
                }
                Ok(())
            }
            Self::Payload(name, payload) => {
                payload.write(name, &mut |bytes| out.put(bytes).map_err(failed))
            }
        }
    }
}

/// What to write in place of messages whose elements move to another data file; the rest is written
/// as it stands.
#[derive(Debug, Default)]
pub(crate) struct Placement {
    /// New places of initialisers of the main graph, by index.
    pub initializers: HashMap<usize, ExternalRef>,
    /// Fields of nodes that hold external tensors.
    pub nodes: HashMap<NodeId, Bytes>,
    /// Fields of functions that hold external tensors, by index of the top-level field.
    pub functions: HashMap<usize, Bytes>,
}

impl Graph {
    /// The encoded `GraphProto`: for a sub-graph that goes back into its attribute.
    ///
    /// # Errors
    /// A tensor that cannot be made.
    pub fn to_bytes(&self) -> Result<Bytes> {
        self.encode(&Placement::default()).to_bytes()
    }

    fn encode(&self, place: &Placement) -> Chunks {
        let mut out = Chunks::default();
        for slot in &self.order {
            match *slot {
                Slot::Node(index) => {
                    for id in self.with_neighbours(NodeId(index)) {
                        match place.nodes.get(&id) {
                            Some(field) => out.push(field.clone()),
                            None => encode_entry(&self.nodes[id.0], number::NODE, &mut out),
                        }
                    }
                }
                Slot::Initializer(index) => {
                    let entry = &self.initializers[index];
                    if !entry.removed {
                        encode_initializer(entry, place.initializers.get(&index), &mut out);
                    }
                }
                Slot::Input(index) => encode_entry(&self.inputs[index], number::INPUT, &mut out),
                Slot::Output(index) => encode_entry(&self.outputs[index], number::OUTPUT, &mut out),
                Slot::ValueInfo(index) => {
                    encode_entry(&self.value_infos[index], number::VALUE_INFO, &mut out);
                }
                Slot::Other(index) => out.push(self.other[index].clone()),
            }
        }
        out
    }
}

fn encode_entry<T: prost::Message>(entry: &Entry<T>, number: u32, out: &mut Chunks) {
    match &entry.raw {
        _ if entry.removed => {}
        Some(raw) => out.push(raw.clone()),
        None => out.push(wire::len_field(number, &entry.value.encode_to_vec())),
    }
}

/// Field number of `raw_data` in `TensorProto`.
const RAW_DATA: u32 = 9;

fn encode_initializer(entry: &Entry<TensorInfo>, moved: Option<&ExternalRef>, out: &mut Chunks) {
    let info = &entry.value;
    if let Some(reference) = moved {
        out.push(wire::len_field(number::INITIALIZER, &external_tensor(info, reference)));
        return;
    }
    let Storage::New(payload) = &info.storage else {
        match &entry.raw {
            Some(raw) => out.push(raw.clone()),
            None => out.push(wire::len_field(number::INITIALIZER, &info.message)),
        }
        return;
    };
    let mut message = new_tensor_head(info).encode_to_vec();
    wire::put_header(&mut message, RAW_DATA, payload.len());
    let mut field = Vec::with_capacity(message.len() + 12);
    wire::put_header(&mut field, number::INITIALIZER, message.len() as u64 + payload.len());
    field.append(&mut message);
    out.push(field);
    out.push_payload(&info.name, payload);
}

fn new_tensor_head(info: &TensorInfo) -> Tensor {
    Tensor {
        name: Some(info.name.clone()),
        dims: info.dims.clone(),
        data_type: Some(info.raw_type),
        ..Tensor::default()
    }
}

/// The message of a tensor whose elements lie at `reference`: everything else it says is kept, unknown
/// fields included.
pub(crate) fn external_tensor(info: &TensorInfo, reference: &ExternalRef) -> Vec<u8> {
    let mut message = Vec::new();
    if let Storage::New(_) = info.storage {
        message = new_tensor_head(info).encode_to_vec();
    }
    // The head was parsed from these bytes, so every field reads well.
    for field in wire::fields(&info.message, 0).map_while(Result::ok) {
        // Element data (4-7, 9-11) and the old place (13, 14) give way.
        if !matches!(field.number, 4..=7 | 9..=11 | 13 | 14) {
            message.extend_from_slice(&info.message[field.whole]);
        }
    }
    let entry =
        |key: &str, value: String| StringStringEntry { key: Some(key.into()), value: Some(value) };
    let place = Tensor {
        external_data: vec![
            entry("location", reference.location.clone()),
            entry("offset", reference.offset.to_string()),
            entry("length", reference.length.unwrap_or(0).to_string()),
        ],
        data_location: Some(1),
        ..Tensor::default()
    };
    message.extend_from_slice(&place.encode_to_vec());
    message
}

impl Model {
    /// The whole model as chunks.
    pub(crate) fn encode(&self, place: &Placement) -> Chunks {
        let mut out = Chunks::default();
        for (index, field) in self.fields.iter().enumerate() {
            match field {
                TopField::Raw { raw, .. } => {
                    out.push(place.functions.get(&index).unwrap_or(raw).clone());
                }
                TopField::Graph { head, len } => {
                    let graph = self.graph.encode(place);
                    // An unchanged length keeps the original header, however its varint was written.
                    if graph.len == *len {
                        out.push(head.clone());
                    } else {
                        let mut head = Vec::new();
                        wire::put_header(&mut head, model::number::GRAPH, graph.len);
                        out.push(head);
                    }
                    out.append(graph);
                }
            }
        }
        out
    }

    /// Length of the model file if everything is written as it stands.
    pub fn encoded_len(&self) -> u64 {
        self.encode(&Placement::default()).len
    }

    /// The encoded model. External data of the input stays external (relative to [`Model::dir`]); added
    /// tensors are inline. An unmodified model gives the bytes it was read from.
    ///
    /// # Errors
    /// A tensor that cannot be made; a model above protobuf's limit of 2 GiB.
    pub fn to_bytes(&self) -> Result<Bytes> {
        self.encode(&Placement::default()).to_bytes()
    }
}

/// Largest protobuf message that every reader accepts.
pub(crate) const MAX_MESSAGE: u64 = i32::MAX as u64;
