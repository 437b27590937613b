//! The walk over a graph that gives its values their new type.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::{
    constants::{self, Content},
    kernels::{self, Kernel},
};
use crate::{
    graph::domain,
    onnx::{self, DataType, Graph, Model, NodeId, proto::Node},
    rewrite::{
        Notes,
        execute::ExecuteError,
        lower::{
            bf16::{
                classify::is_source,
                constants::shapes,
                islands::{self, ConstantShape, Readers},
                rounding::captured,
                types,
            },
            int, node,
        },
        patch::fresh_name,
    },
};

/// From which type to which.
#[derive(Clone, Copy, Debug)]
pub(super) struct Types {
    /// The model's own type.
    pub own: DataType,
    /// The new type.
    pub to: DataType,
    /// Version of ai.onnx.
    pub opset: i64,
    /// Name of the new type, for new names and messages.
    pub label: &'static str,
}

/// A value.
#[derive(Clone, Debug, Default)]
pub(super) struct Value {
    /// What it is called now.
    pub name: String,
    /// Type in the model as it was, when it is known.
    pub original: Option<DataType>,
    /// Type now.
    pub now: Option<DataType>,
    /// Computed from activations.
    pub model: bool,
    /// Inside a norm, SiLU or GELU: what is computed from it is computed in float32.
    pub kept: bool,
    /// A constant, or one that was only moved: its name and shape as stored.
    pub constant: Option<(String, ConstantShape)>,
    pub content: Content,
}

/// The values that a graph and the graphs around it define.
#[derive(Clone, Debug, Default)]
pub(super) struct Scope {
    pub values: HashMap<String, Value>,
    /// Copies of values in other types.
    pub copies: HashMap<(String, DataType), String>,
}

/// How a constant is read.
#[derive(Clone, Copy, Debug, Default)]
struct Marks {
    converted: bool,
    original: bool,
}

/// A conversion in progress, over the main graph and its sub-graphs.
pub(super) struct Conversion<'a> {
    pub model: &'a Model,
    types: Types,
    names: HashSet<String>,
    /// Constants that are stored in the new type.
    converted: HashSet<String>,
    marks: BTreeMap<String, Marks>,
    notes: Notes,
}

impl<'a> Conversion<'a> {
    pub(super) fn new(
        model: &'a Model,
        types: Types,
        names: HashSet<String>,
        converted: HashSet<String>,
        notes: &Notes,
    ) -> Self {
        Self { model, types, names, converted, marks: BTreeMap::new(), notes: notes.clone() }
    }

    /// After a first pass: the constants that are read in the new type only.
    pub(super) fn converted(&self) -> HashSet<String> {
        let only = self.marks.iter().filter(|(_, marks)| marks.converted && !marks.original);
        only.map(|(name, _)| name.clone()).collect()
    }

    pub(super) fn fresh(&mut self, base: &str) -> String {
        fresh_name(&mut self.names, base)
    }

    /// Converts one graph; `outer` are the values around it. Returns whether any output is computed
    /// from activations.
    pub(super) fn graph(&mut self, graph: &mut Graph, outer: &Scope) -> Result<bool, ExecuteError> {
        let mut walk = Walk::start(self, graph, outer)?;
        for id in walk.source.node_order() {
            walk.node(id)?;
        }
        let model = walk.outputs()?;
        let stale = walk.stale;
        graph.remove_value_infos(|name| stale.contains(name));
        Ok(model)
    }
}

/// The walk over one graph.
pub(super) struct Walk<'c, 'a, 'g> {
    pub conversion: &'c mut Conversion<'a>,
    pub types: Types,
    /// As it was.
    pub source: Graph,
    /// As it becomes.
    pub graph: &'g mut Graph,
    pub scope: Scope,
    pub declared: HashMap<String, DataType>,
    pub outputs: Vec<String>,
    pub keep: HashSet<String>,
    /// Graph inputs and outputs that change their type.
    pub caches: HashSet<String>,
    /// Values whose declared type no longer holds.
    pub stale: HashSet<String>,
}

impl<'c, 'a, 'g> Walk<'c, 'a, 'g> {
    fn start(
        conversion: &'c mut Conversion<'a>,
        graph: &'g mut Graph,
        outer: &Scope,
    ) -> Result<Self, ExecuteError> {
        let source = graph.clone();
        let own = shapes(&source);
        let mut known: HashMap<String, ConstantShape> =
            own.iter().map(|(name, (shape, _))| (name.clone(), *shape)).collect();
        for (name, value) in &outer.values {
            if let Some((_, shape)) = &value.constant {
                known.insert(name.clone(), *shape);
            }
        }
        let captured = captured(&source)?;
        let readers = Readers::new(&source, &known, &captured);
        // A 16-bit model says itself what it computes in float32.
        let keep = match conversion.types.own {
            DataType::Float => islands::norms_and_activations(&readers),
            _ => HashSet::new(),
        };
        let keep = keep.into_iter().map(str::to_owned).collect();
        let name = |value: &onnx::proto::ValueInfo| value.name.clone().unwrap_or_default();
        let mut walk = Self {
            types: conversion.types,
            declared: types::declarations(&source),
            outputs: source.outputs().map(name).collect(),
            source,
            graph,
            scope: outer.clone(),
            keep,
            caches: HashSet::new(),
            stale: HashSet::new(),
            conversion,
        };
        if walk.source.depth() == 0 {
            walk.find_caches();
        }
        walk.inputs(&own);
        walk.constants(own)?;
        Ok(walk)
    }

    fn inputs(&mut self, constants: &HashMap<String, (ConstantShape, DataType)>) {
        let inputs: Vec<_> = self.source.inputs().filter_map(types::declared).collect();
        for (name, data_type) in inputs {
            if constants.contains_key(&name) {
                // An initialiser that a caller may replace keeps its type.
                self.mark(&name, false);
                continue;
            }
            let cache = self.caches.contains(&name) && data_type == self.types.own;
            if cache {
                self.graph.retype(&name, self.types.to);
            }
            let value = Value {
                name: name.clone(),
                original: Some(data_type),
                now: Some(if cache { self.types.to } else { data_type }),
                model: types::is_float(data_type),
                ..Value::default()
            };
            self.scope.values.insert(name, value);
        }
    }

    /// Inputs that GroupQueryAttention alone reads as its past, and the present that it makes of them.
    fn find_caches(&mut self) {
        let is_attention = |node: &Node| {
            node.op_type.as_deref() == Some("GroupQueryAttention")
                && domain(node) == "com.microsoft"
        };
        let inputs: HashSet<&str> =
            self.source.inputs().filter_map(|value| value.name.as_deref()).collect();
        let mut readers: HashMap<&str, usize> = HashMap::new();
        for (_, node) in self.source.nodes() {
            for input in &node.input {
                *readers.entry(input).or_default() += 1;
            }
        }
        let alone = |name: &str| inputs.contains(name) && readers.get(name) == Some(&1);
        for (_, node) in self.source.nodes().filter(|(_, node)| is_attention(node)) {
            let (Some(past), Some(present)) = (node.input.get(3..5), node.output.get(1..3)) else {
                continue;
            };
            if past.iter().all(|name| alone(name)) {
                self.caches.extend(past.iter().chain(present).cloned());
            }
        }
    }

    /// Stores the chosen constants in the new type; the others are looked into.
    fn constants(
        &mut self,
        own: HashMap<String, (ConstantShape, DataType)>,
    ) -> Result<(), ExecuteError> {
        let model = self.conversion.model;
        let to = self.types.to;
        let notes = &self.conversion.notes;
        let mut contents = HashMap::new();
        let initializers: Vec<_> = self.graph.initializers().cloned().collect();
        for info in initializers {
            if self.conversion.converted.contains(&info.name) {
                self.graph.add_initializer(constants::converted(model, &info, to, notes)?);
            }
            contents.insert(info.name.clone(), constants::look(model, &info, to)?);
        }
        for id in self.source.node_order() {
            let node = self.source.node(id);
            let Some(name) = node.output.first() else { continue };
            if node.op_type.as_deref() != Some("Constant") || !own.contains_key(name) {
                continue;
            }
            contents.insert(name.clone(), constants::look_node(model, node, to)?);
            if self.conversion.converted.contains(name)
                && let Some(changed) = constants::converted_node(model, node, to, notes)?
            {
                self.graph.replace_node(id, changed);
            }
        }
        for (name, (shape, data_type)) in own {
            let converted = self.conversion.converted.contains(&name);
            let mut content = contents.get(&name).copied().unwrap_or_default();
            // What is stored in the new type is in its range.
            content.wide &= !converted;
            if converted {
                self.stale.insert(name.clone());
            }
            let value = Value {
                name: name.clone(),
                original: Some(data_type),
                now: Some(if converted { to } else { data_type }),
                constant: Some((name.clone(), shape)),
                content,
                ..Value::default()
            };
            self.scope.values.insert(name, value);
        }
        Ok(())
    }

    pub(super) fn mark(&mut self, name: &str, converted: bool) {
        let marks = self.conversion.marks.entry(name.to_owned()).or_default();
        marks.converted |= converted;
        marks.original |= !converted;
    }

    fn value(&self, name: &str) -> Value {
        let unknown = || Value { name: name.to_owned(), ..Value::default() };
        self.scope.values.get(name).cloned().unwrap_or_else(unknown)
    }

    fn node(&mut self, id: NodeId) -> Result<(), ExecuteError> {
        let original = self.source.node(id).clone();
        let op = original.op_type.as_deref().unwrap_or("");
        let is_value = original.output.first().is_some_and(|o| self.scope.values.contains_key(o));
        if op == "Constant" && is_value {
            return Ok(());
        }
        let inputs: Vec<Value> = original.input.iter().map(|name| self.value(name)).collect();
        if !self.source.subgraphs(id)?.is_empty() {
            return self.control_flow(id, &original, &inputs);
        }
        match (domain(&original), op) {
            ("", "Cast" | "CastLike") => {
                self.cast(id, &original, &inputs);
                return Ok(());
            }
            ("", "Shape" | "Size") => {
                self.keep_types(id, &original, &inputs, false, false);
                return Ok(());
            }
            _ => {}
        }
        let kernel = kernels::of(&original);
        if self.is_ours(&original, &inputs, kernel) {
            self.compute(id, &original, &inputs, kernel)
        } else {
            let model = inputs.iter().any(|value| value.model);
            self.keep_types(id, &original, &inputs, true, model);
            Ok(())
        }
    }

    /// Whether the node computes on values that change their type.
    fn is_ours(&self, node: &Node, inputs: &[Value], kernel: Option<Kernel>) -> bool {
        let Types { own, to, .. } = self.types;
        // A constant that is only moved goes the way of its readers.
        if self.moved(node, inputs).is_some() {
            return inputs[0].original == Some(own) && inputs[0].now == Some(to) && own != to;
        }
        let in_group = |slot: usize| kernel.is_none_or(|kernel| kernel.takes_input(slot));
        let mut group = inputs.iter().enumerate().filter(|(slot, _)| in_group(*slot));
        if group.any(|(_, v)| v.original == Some(own) && (v.model || own != DataType::Float)) {
            return true;
        }
        let constant = |name: &str| {
            let value = self.scope.values.get(name)?;
            let (_, shape) = value.constant.as_ref()?;
            (value.original == Some(own)).then_some(*shape)
        };
        is_source(node, &constant)
    }

    /// Casts the graph's outputs back to their types; true when one comes from activations.
    fn outputs(&mut self) -> Result<bool, ExecuteError> {
        let mut model = false;
        for name in self.outputs.clone() {
            let value = self.value(&name);
            model |= value.model;
            if let Some(own) = value.original
                && value.name != name
            {
                let node_name = self.conversion.fresh(&format!("{}_cast", value.name));
                let mut cast = node("Cast", &node_name, &[&value.name], &[&name]);
                cast.attribute.push(int("to", own as i64));
                self.graph.push_node(cast);
            } else if let Some((root, _)) = &value.constant {
                // Stored as the graph declares it.
                self.mark(&root.clone(), false);
            } else if value.now != value.original && !self.caches.contains(&name) {
                let reason =
                    format!("the sub-graph output '{name}' is a value of the graph around it");
                return Err(ExecuteError::Unsupported { lowering: self.types.label, reason });
            }
        }
        Ok(model)
    }
}
