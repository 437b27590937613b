//! A `GraphProto` as a list of untouched fields, with nodes, tensors and values decoded beside them.

use super::error::{Error, Result};
use super::proto::{Node, StringStringEntry, ValueInfo};
use super::tensor::TensorInfo;
use super::wire;
use bytes::Bytes;
use std::collections::HashMap;

/// How deeply sub-graphs may nest; real models use two or three levels.
pub const MAX_DEPTH: u32 = 32;

/// A node of one graph. Stays valid while the graph is edited; original nodes are numbered in file
/// order from 0, added ones follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(pub usize);

/// One message of a graph: its decoded form and, while untouched, its original field.
#[derive(Clone, Debug)]
pub(crate) struct Entry<T> {
    /// The field as it stands in the file; `None` once changed.
    pub raw: Option<Bytes>,
    pub value: T,
    pub removed: bool,
    /// Offset of the message in the file.
    pub offset: u64,
}

impl<T> Entry<T> {
    pub(crate) fn new(value: T) -> Self {
        Self { raw: None, value, removed: false, offset: 0 }
    }
}

/// A place in the original order of fields.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Slot {
    Node(usize),
    Initializer(usize),
    Input(usize),
    Output(usize),
    ValueInfo(usize),
    Other(usize),
}

/// Field numbers of `GraphProto`.
pub(crate) mod number {
    pub const NODE: u32 = 1;
    pub const NAME: u32 = 2;
    pub const INITIALIZER: u32 = 5;
    pub const INPUT: u32 = 11;
    pub const OUTPUT: u32 = 12;
    pub const VALUE_INFO: u32 = 13;
    pub const SPARSE_INITIALIZER: u32 = 15;
    pub const METADATA: u32 = 16;
}

/// A graph or sub-graph.
///
/// Cheap to clone: tensors and raw fields are shared.
#[derive(Clone, Debug, Default)]
pub struct Graph {
    pub(crate) order: Vec<Slot>,
    pub(crate) nodes: Vec<Entry<Node>>,
    /// Nodes that were inserted directly before and after a node.
    pub(crate) before: HashMap<NodeId, Vec<NodeId>>,
    pub(crate) after: HashMap<NodeId, Vec<NodeId>>,
    pub(crate) initializers: Vec<Entry<TensorInfo>>,
    pub(crate) inputs: Vec<Entry<ValueInfo>>,
    pub(crate) outputs: Vec<Entry<ValueInfo>>,
    pub(crate) value_infos: Vec<Entry<ValueInfo>>,
    /// Fields that are only carried: name, documentation, annotations, unknown fields.
    pub(crate) other: Vec<Bytes>,
    name: String,
    metadata: Vec<StringStringEntry>,
    by_name: HashMap<String, usize>,
    depth: u32,
}

impl Graph {
    /// Reads an encoded `GraphProto` that lies at `offset` in its file.
    ///
    /// # Errors
    /// [`Error::Malformed`] with the byte: wire format, a name that is not UTF-8, nesting deeper than
    /// [`MAX_DEPTH`].
    pub fn parse(message: &Bytes, offset: u64) -> Result<Self> {
        Self::parse_at_depth(message, offset, 0)
    }

    fn parse_at_depth(message: &Bytes, offset: u64, depth: u32) -> Result<Self> {
        if depth > MAX_DEPTH {
            return Err(Error::malformed(
                format!("sub-graphs nest deeper than {MAX_DEPTH}"),
                offset,
            ));
        }
        let mut graph = Self { depth, ..Self::default() };
        for field in wire::fields(message, offset) {
            graph.add_field(message, &field?, offset)?;
        }
        Ok(graph)
    }

    fn add_field(&mut self, message: &Bytes, field: &wire::Field<'_>, base: u64) -> Result<()> {
        let raw = message.slice(field.whole.clone());
        let at = base + field.payload.start as u64;
        let slot = match field.number {
            number::NODE => {
                let value = decode::<Node>("node", message, field, base)?;
                self.nodes.push(Entry { raw: Some(raw), value, removed: false, offset: at });
                Slot::Node(self.nodes.len() - 1)
            }
            number::INITIALIZER => {
                field.expect_len("initializer", base)?;
                let value = TensorInfo::parse(message.slice(field.payload.clone()), at)?;
                // As in ONNX Runtime, the last of two initialisers with one name counts.
                self.by_name.insert(value.name.clone(), self.initializers.len());
                self.initializers.push(Entry { raw: Some(raw), value, removed: false, offset: at });
                Slot::Initializer(self.initializers.len() - 1)
            }
            number::INPUT | number::OUTPUT | number::VALUE_INFO => {
                let value = decode::<ValueInfo>("value info", message, field, base)?;
                let (list, slot): (_, fn(usize) -> Slot) = match field.number {
                    number::INPUT => (&mut self.inputs, Slot::Input),
                    number::OUTPUT => (&mut self.outputs, Slot::Output),
                    _ => (&mut self.value_infos, Slot::ValueInfo),
                };
                list.push(Entry { raw: Some(raw), value, removed: false, offset: at });
                slot(list.len() - 1)
            }
            _ => {
                match field.number {
                    number::NAME => self.name = field.expect_str("graph name", base)?.to_owned(),
                    number::METADATA => {
                        let entry = decode::<StringStringEntry>("metadata", message, field, base)?;
                        self.metadata.push(entry);
                    }
                    _ => {}
                }
                self.other.push(raw);
                Slot::Other(self.other.len() - 1)
            }
        };
        self.order.push(slot);
        Ok(())
    }

    /// Name of the graph.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Metadata of the graph (`pkg.torch.export...`).
    pub fn metadata(&self) -> impl Iterator<Item = (&str, &str)> {
        self.metadata
            .iter()
            .map(|e| (e.key.as_deref().unwrap_or(""), e.value.as_deref().unwrap_or("")))
    }

    /// Nesting depth: 0 for the main graph.
    pub fn depth(&self) -> u32 {
        self.depth
    }

    /// The nodes, in the order in which they are written (a valid file has them topologically sorted).
    pub fn nodes(&self) -> impl Iterator<Item = (NodeId, &Node)> {
        self.node_order().into_iter().map(|id| (id, &self.nodes[id.0].value))
    }

    /// The ids of the nodes, in written order.
    pub fn node_order(&self) -> Vec<NodeId> {
        let mut out = Vec::with_capacity(self.nodes.len());
        for slot in &self.order {
            if let Slot::Node(index) = *slot {
                self.push_with_neighbours(NodeId(index), &mut out);
            }
        }
        out
    }

    /// A node of the file (unless removed) among those inserted beside it.
    pub(crate) fn with_neighbours(&self, id: NodeId) -> Vec<NodeId> {
        let mut out = Vec::new();
        self.push_with_neighbours(id, &mut out);
        out
    }

    /// Inserted nodes may have neighbours of their own; the chain is as long as the edits, not as the
    /// file is deep.
    fn push_with_neighbours(&self, id: NodeId, out: &mut Vec<NodeId>) {
        for &before in self.before.get(&id).into_iter().flatten() {
            self.push_with_neighbours(before, out);
        }
        if !self.nodes[id.0].removed {
            out.push(id);
        }
        for &after in self.after.get(&id).into_iter().flatten() {
            self.push_with_neighbours(after, out);
        }
    }

    /// A node.
    ///
    /// # Panics
    /// On an id of another graph.
    pub fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.0].value
    }

    /// True unless the node was removed.
    pub fn contains(&self, id: NodeId) -> bool {
        self.nodes.get(id.0).is_some_and(|entry| !entry.removed)
    }

    /// The initialisers.
    pub fn initializers(&self) -> impl Iterator<Item = &TensorInfo> {
        live(&self.initializers)
    }

    /// The initialiser of this name.
    pub fn initializer(&self, name: &str) -> Option<&TensorInfo> {
        let entry = &self.initializers[*self.by_name.get(name)?];
        (!entry.removed).then_some(&entry.value)
    }

    pub(crate) fn initializer_index(&self, name: &str) -> Option<usize> {
        self.by_name.get(name).copied()
    }

    pub(crate) fn index_initializer(&mut self, name: String, index: usize) {
        self.by_name.insert(name, index);
    }

    /// The graph inputs (in old files they repeat the initialisers).
    pub fn inputs(&self) -> impl Iterator<Item = &ValueInfo> {
        live(&self.inputs)
    }

    /// The graph outputs.
    pub fn outputs(&self) -> impl Iterator<Item = &ValueInfo> {
        live(&self.outputs)
    }

    /// Types of intermediate values.
    pub fn value_infos(&self) -> impl Iterator<Item = &ValueInfo> {
        live(&self.value_infos)
    }

    /// True when the graph holds sparse initialisers, which are carried but not read.
    pub fn has_sparse_initializers(&self) -> bool {
        self.other.iter().any(|raw| {
            matches!(wire::read_varint(raw), Some((tag, _)) if tag >> 3 == u64::from(number::SPARSE_INITIALIZER))
        })
    }

    /// The sub-graphs of a node (`If`, `Loop`, `Scan`), with the attribute they stand in.
    ///
    /// # Errors
    /// As [`Self::parse`].
    pub fn subgraphs(&self, id: NodeId) -> Result<Vec<(String, Self)>> {
        let entry = &self.nodes[id.0];
        let mut out = Vec::new();
        for attribute in &entry.value.attribute {
            for bytes in attribute.g.iter().chain(&attribute.graphs) {
                let within = entry.raw.as_ref().map_or(0, |raw| {
                    // The entry's offset is that of the payload; the raw field starts earlier.
                    let head = raw.len() as u64 - payload_len(raw);
                    wire::offset_within(raw, bytes).saturating_sub(head)
                });
                let graph = Self::parse_at_depth(bytes, entry.offset + within, self.depth + 1)?;
                out.push((attribute.name.clone().unwrap_or_default(), graph));
            }
        }
        Ok(out)
    }
}

fn payload_len(raw: &[u8]) -> u64 {
    let Some((_, tag)) = wire::read_varint(raw) else { return 0 };
    wire::read_varint(&raw[tag..]).map_or(0, |(len, _)| len)
}

fn live<T>(entries: &[Entry<T>]) -> impl Iterator<Item = &T> {
    entries.iter().filter(|entry| !entry.removed).map(|entry| &entry.value)
}

/// Decodes a message with prost; payloads stay slices of `message`.
pub(crate) fn decode<T: prost::Message + Default>(
    what: &str,
    message: &Bytes,
    field: &wire::Field<'_>,
    base: u64,
) -> Result<T> {
    field.expect_len(what, base)?;
    T::decode(message.slice(field.payload.clone())).map_err(|error| {
        Error::malformed(format!("{what}: {error}"), base + field.payload.start as u64)
    })
}
