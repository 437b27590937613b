//! Edits of a graph and of a model. What is not named in an edit keeps its bytes.

use super::error::Result;
use super::graph::{Entry, Graph, NodeId, Slot};
use super::model::{Model, TopField, number};
use super::proto::{DataType, Node, OperatorSetId, StringStringEntry, ValueInfo};
use super::tensor::TensorInfo;
use super::wire;
use prost::Message as _;

impl Graph {
    /// Puts another node in the place of `id`.
    pub fn replace_node(&mut self, id: NodeId, node: Node) {
        let entry = &mut self.nodes[id.0];
        entry.value = node;
        entry.raw = None;
        entry.removed = false;
    }

    /// Removes a node; nodes inserted beside it stay.
    pub fn remove_node(&mut self, id: NodeId) {
        self.nodes[id.0].removed = true;
    }

    /// Inserts a node directly before `id` (after nodes inserted there earlier).
    pub fn insert_before(&mut self, id: NodeId, node: Node) -> NodeId {
        let new = self.new_node(node);
        self.before.entry(id).or_default().push(new);
        new
    }

    /// Inserts a node after `id` (after nodes inserted there earlier).
    pub fn insert_after(&mut self, id: NodeId, node: Node) -> NodeId {
        let new = self.new_node(node);
        self.after.entry(id).or_default().push(new);
        new
    }

    /// Inserts a node in front of all others.
    pub fn push_front(&mut self, node: Node) -> NodeId {
        let new = self.new_node(node);
        self.order.insert(0, Slot::Node(new.0));
        new
    }

    /// Appends a node behind all others.
    pub fn push_node(&mut self, node: Node) -> NodeId {
        let new = self.new_node(node);
        self.order.push(Slot::Node(new.0));
        new
    }

    fn new_node(&mut self, node: Node) -> NodeId {
        self.nodes.push(Entry::new(node));
        NodeId(self.nodes.len() - 1)
    }

    /// Adds an initialiser; one of the same name is replaced.
    pub fn add_initializer(&mut self, tensor: TensorInfo) {
        let name = tensor.name.clone();
        if let Some(index) = self.initializer_index(&name) {
            self.initializers[index] = Entry::new(tensor);
            return;
        }
        self.initializers.push(Entry::new(tensor));
        let index = self.initializers.len() - 1;
        self.order.push(Slot::Initializer(index));
        self.index_initializer(name, index);
    }

    /// Removes every initialiser of this name and, in old files, the graph input that repeats it.
    pub fn remove_initializer(&mut self, name: &str) {
        for entry in self.initializers.iter_mut().filter(|e| e.value.name == name) {
            entry.removed = true;
        }
        remove_named(&mut self.inputs, name);
    }

    /// Adds a graph input.
    pub fn add_input(&mut self, value: ValueInfo) {
        self.inputs.push(Entry::new(value));
        self.order.push(Slot::Input(self.inputs.len() - 1));
    }

    /// Adds a graph output.
    pub fn add_output(&mut self, value: ValueInfo) {
        self.outputs.push(Entry::new(value));
        self.order.push(Slot::Output(self.outputs.len() - 1));
    }

    /// Removes the graph output of this name.
    pub fn remove_output(&mut self, name: &str) {
        remove_named(&mut self.outputs, name);
    }

    /// Gives a graph input or output another element type.
    pub fn retype(&mut self, name: &str, data_type: DataType) {
        for entry in self.inputs.iter_mut().chain(&mut self.outputs) {
            let value = &mut entry.value;
            if value.name.as_deref() == Some(name)
                && let Some(tensor) = value.r#type.as_mut().and_then(|t| t.tensor_type.as_mut())
            {
                tensor.elem_type = Some(data_type as i32);
                entry.raw = None;
            }
        }
    }

    /// Adds the type of an intermediate value.
    pub fn add_value_info(&mut self, value: ValueInfo) {
        self.value_infos.push(Entry::new(value));
        self.order.push(Slot::ValueInfo(self.value_infos.len() - 1));
    }

    /// Drops the types of the intermediate values for which `gone` holds.
    pub fn remove_value_infos(&mut self, gone: impl Fn(&str) -> bool) {
        for entry in &mut self.value_infos {
            if gone(entry.value.name.as_deref().unwrap_or("")) {
                entry.removed = true;
            }
        }
    }
}

fn remove_named(entries: &mut [Entry<ValueInfo>], name: &str) {
    for entry in entries.iter_mut().filter(|e| e.value.name.as_deref() == Some(name)) {
        entry.removed = true;
    }
}

impl Model {
    /// Imports `version` of an operator domain unless the model imports the domain already.
    pub fn import_opset(&mut self, domain: &str, version: i64) {
        if self.opset(domain).is_some() {
            return;
        }
        let import = OperatorSetId { domain: Some(domain.to_owned()), version: Some(version) };
        let raw = wire::len_field(number::OPSET_IMPORT, &import.encode_to_vec());
        self.fields.push(TopField::Raw { number: number::OPSET_IMPORT, raw });
        self.opsets.push(import);
    }

    /// Imports `version` of an operator domain in place of whatever version the model imports.
    pub fn set_opset(&mut self, domain: &str, version: i64) {
        let plain = |d: &str| if d == "ai.onnx" { String::new() } else { d.to_owned() };
        let same = |o: &OperatorSetId| plain(o.domain.as_deref().unwrap_or("")) == plain(domain);
        // Raw import fields and decoded entries are in the same order.
        let mut index = 0;
        let opsets = &self.opsets;
        self.fields.retain(|field| {
            let TopField::Raw { number: number::OPSET_IMPORT, .. } = field else { return true };
            index += 1;
            !same(&opsets[index - 1])
        });
        self.opsets.retain(|o| !same(o));
        self.import_opset(domain, version);
    }

    /// Has the model and the local functions that import an older version of the standard domain
    /// import `version`.
    ///
    /// # Errors
    /// A function that cannot be read.
    pub fn raise_opset(&mut self, version: i64) -> Result<()> {
        if self.opset("").is_some_and(|found| found < version) {
            self.set_opset("", version);
        }
        for field in &mut self.fields {
            if let TopField::Raw { number: number::FUNCTIONS, raw } = field {
                *raw = super::model::raise_function(raw, version)?;
            }
        }
        Ok(())
    }

    /// Raises the IR version to at least `version`.
    pub fn raise_ir_version(&mut self, version: i64) {
        if self.ir_version() >= version {
            return;
        }
        self.note_ir_version(version);
        let raw = wire::varint_field(number::IR_VERSION, version as u64);
        self.fields.retain(|f| !matches!(f, TopField::Raw { number: number::IR_VERSION, .. }));
        self.fields.insert(0, TopField::Raw { number: number::IR_VERSION, raw });
    }

    /// Sets one entry of the model's metadata; an entry of the same key is replaced.
    pub fn set_metadata(&mut self, key: &str, value: &str) {
        let entry = StringStringEntry { key: Some(key.to_owned()), value: Some(value.to_owned()) };
        let raw = wire::len_field(number::METADATA, &entry.encode_to_vec());
        self.remove_metadata(key);
        self.metadata.push(entry);
        self.fields.push(TopField::Raw { number: number::METADATA, raw });
    }

    /// Removes the entries of this key from the model's metadata.
    pub fn remove_metadata(&mut self, key: &str) {
        let same = |e: &StringStringEntry| e.key.as_deref() == Some(key);
        // Raw metadata fields and decoded entries are in the same order.
        let mut index = 0;
        let metadata = &self.metadata;
        self.fields.retain(|field| {
            let TopField::Raw { number: number::METADATA, .. } = field else { return true };
            index += 1;
            !same(&metadata[index - 1])
        });
        self.metadata.retain(|e| !same(e));
    }
}
