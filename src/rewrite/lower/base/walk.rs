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
        execute::ExecuteError,
        lower::{
            bf16::{
                classify::{is_source, moves_constant},
                constants::shapes,
                islands::{self, ConstantShape, Readers},
                rounding::captured,
                types,
            },
            float, int, node,
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
struct Value {
    /// What it is called now.
    name: String,
    /// Type in the model as it was, when it is known.
    original: Option<DataType>,
    /// Type now.
    now: Option<DataType>,
    /// Computed from activations.
    model: bool,
    /// Inside a norm, SiLU or GELU: what is computed from it is computed in float32.
    kept: bool,
    /// A constant, or one that was only moved: its name and shape as stored.
    constant: Option<(String, ConstantShape)>,
    content: Content,
}

/// The values that a graph and the graphs around it define.
#[derive(Clone, Debug, Default)]
pub(super) struct Scope {
    values: HashMap<String, Value>,
    /// Copies of values in other types.
    copies: HashMap<(String, DataType), String>,
}

/// How a constant is read.
#[derive(Clone, Copy, Debug, Default)]
struct Marks {
    converted: bool,
    original: bool,
}

/// A conversion in progress, over the main graph and its sub-graphs.
pub(super) struct Conversion<'a> {
    model: &'a Model,
    types: Types,
    names: HashSet<String>,
    /// Constants that are stored in the new type.
    converted: HashSet<String>,
    marks: BTreeMap<String, Marks>,
}

impl<'a> Conversion<'a> {
    pub(super) fn new(
        model: &'a Model,
        types: Types,
        names: HashSet<String>,
        converted: HashSet<String>,
    ) -> Self {
        Self { model, types, names, converted, marks: BTreeMap::new() }
    }

    /// After a first pass: the constants that are read in the new type only.
    pub(super) fn converted(&self) -> HashSet<String> {
        let only = self.marks.iter().filter(|(_, marks)| marks.converted && !marks.original);
        only.map(|(name, _)| name.clone()).collect()
    }

    fn fresh(&mut self, base: &str) -> String {
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
struct Walk<'c, 'a, 'g> {
    conversion: &'c mut Conversion<'a>,
    types: Types,
    /// As it was.
    source: Graph,
    /// As it becomes.
    graph: &'g mut Graph,
    scope: Scope,
    declared: HashMap<String, DataType>,
    outputs: Vec<String>,
    keep: HashSet<String>,
    /// Graph inputs and outputs that change their type.
    caches: HashSet<String>,
    /// Values whose declared type no longer holds.
    stale: HashSet<String>,
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
        let mut contents = HashMap::new();
        let initializers: Vec<_> = self.graph.initializers().cloned().collect();
        for info in initializers {
            if self.conversion.converted.contains(&info.name) {
                self.graph.add_initializer(constants::converted(model, &info, to)?);
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
                && let Some(changed) = constants::converted_node(model, node, to)?
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

    fn mark(&mut self, name: &str, converted: bool) {
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

    /// A node that keeps all its types; with `exact`, its inputs are given as they were.
    fn keep_types(
        &mut self,
        id: NodeId,
        original: &Node,
        inputs: &[Value],
        exact: bool,
        model: bool,
    ) {
        let mut changed = original.clone();
        let moved = self.moved(original, inputs);
        for (slot, value) in inputs.iter().enumerate().filter(|(_, v)| !v.name.is_empty()) {
            changed.input[slot] = match value.original.filter(|&t| exact && types::is_float(t)) {
                // Who reads the moved constant decides.
                Some(_) if moved.is_some() && slot == 0 => value.name.clone(),
                Some(data_type) => self.typed(id, value, data_type),
                None => value.name.clone(),
            };
        }
        let mut content = Content {
            wide: inputs.iter().any(|value| value.content.wide),
            inexact: moved.is_some() && inputs[0].content.inexact,
        };
        if original.op_type.as_deref() == Some("ConstantOfShape") {
            let looked = constants::look_node(self.conversion.model, original, self.types.to);
            content.wide |= looked.is_ok_and(|looked| looked.wide);
        }
        for (index, name) in original.output.iter().enumerate() {
            let data_type = self.output_type(original, index, inputs);
            let float = data_type.is_some_and(types::is_float);
            let value = Value {
                name: name.clone(),
                original: data_type,
                now: data_type,
                model: model && float,
                constant: moved.clone(),
                content,
                kept: self.keep.contains(name) && model,
            };
            self.scope.values.insert(name.clone(), value);
        }
        self.put(id, changed);
    }

    /// The constant whose elements, in their own type, are the node's result.
    fn moved(&self, node: &Node, inputs: &[Value]) -> Option<(String, ConstantShape)> {
        let first =
            inputs.first().filter(|_| moves_constant(node.op_type.as_deref().unwrap_or("")))?;
        let same = first.original.is_some() && first.original == self.output_type(node, 0, inputs);
        first.constant.clone().filter(|_| same)
    }

    fn put(&mut self, id: NodeId, changed: Node) {
        if changed != *self.graph.node(id) {
            self.graph.replace_node(id, changed);
        }
    }

    fn output_type(&self, node: &Node, index: usize, inputs: &[Value]) -> Option<DataType> {
        let types: Vec<_> = inputs.iter().map(|value| value.original).collect();
        let declared = self.declared.get(&node.output[index]).copied();
        declared.or_else(|| types::inferred(node, index, &types))
    }

    /// A node in the new type, or in float32 where it cannot be.
    fn compute(
        &mut self,
        id: NodeId,
        original: &Node,
        inputs: &[Value],
        kernel: Option<Kernel>,
    ) -> Result<(), ExecuteError> {
        let Types { own, to, opset, label } = self.types;
        let Some(kernel) = kernel.or_else(|| self.fallback(original)) else {
            self.keep_types(id, original, inputs, true, true);
            return Ok(());
        };
        for (slot, value) in inputs.iter().enumerate() {
            if kernel.takes_input(slot) && value.original.is_none() && !value.name.is_empty() {
                let reason = format!(
                    "the type of value '{}', which node '{}' reads, is not known; run ONNX's shape \
                     inference on the model first",
                    value.name,
                    original.name.as_deref().unwrap_or("")
                );
                return Err(ExecuteError::Unsupported { lowering: label, reason });
            }
        }
        let group =
            |slot: usize, value: &Value| kernel.takes_input(slot) && value.original == Some(own);
        let kept = |name: &String| self.keep.contains(name);
        let widened = own == DataType::Float && scales(original);
        let exact_in = |value: &Value| !(value.content.inexact && widened);
        let fits = kernel.computes_in(to, opset)
            && !original.output.iter().any(kept)
            && inputs
                .iter()
                .enumerate()
                .all(|(slot, value)| !group(slot, value) || (!value.kept && exact_in(value)));
        let data_type = if fits { to } else { DataType::Float };
        let mut changed = original.clone();
        for (slot, value) in inputs.iter().enumerate().filter(|(_, v)| !v.name.is_empty()) {
            let float = value.original.filter(|&t| types::is_float(t));
            changed.input[slot] = match float {
                Some(_) if group(slot, value) => self.typed(id, value, data_type),
                Some(other) => self.typed(id, value, other),
                None => value.name.clone(),
            };
        }
        let moved = self.moved(original, inputs);
        for (index, name) in original.output.iter().enumerate().filter(|(_, n)| !n.is_empty()) {
            let was = self.output_type(original, index, inputs);
            let grouped = kernel.takes_output(index) && was == Some(own);
            let now = if grouped { Some(data_type) } else { was };
            let kept = self.keep.contains(name) && now == Some(DataType::Float);
            let constant = moved.clone();
            let mut value = Value {
                original: was,
                now,
                model: constant.is_none(),
                kept,
                constant,
                ..Value::default()
            };
            value.name = self.output_name(name, now, was);
            changed.output[index].clone_from(&value.name);
            self.scope.values.insert(name.clone(), value);
        }
        self.put(id, changed);
        Ok(())
    }

    /// A standard operator without a kernel in 16 bits computes in float32; of others nothing is known.
    fn fallback(&self, node: &Node) -> Option<Kernel> {
        let known = domain(node).is_empty() && !holds_type(node);
        (known && self.types.own != DataType::Float).then(kernels::float_only)
    }

    /// What a result is called: a graph output keeps its name for the value of its declared type.
    fn output_name(&mut self, name: &str, now: Option<DataType>, was: Option<DataType>) -> String {
        if now == was {
            return name.to_owned();
        }
        if let Some(now) = now.filter(|_| self.caches.contains(name)) {
            self.graph.retype(name, now);
            return name.to_owned();
        }
        if !self.outputs.iter().any(|output| output == name) {
            self.stale.insert(name.to_owned());
            return name.to_owned();
        }
        let base = now.map_or_else(|| name.to_owned(), |now| super::cast_output_name(name, now));
        self.conversion.fresh(&base)
    }

    fn cast(&mut self, id: NodeId, original: &Node, inputs: &[Value]) {
        let Types { own, to, .. } = self.types;
        let target = self.output_type(original, 0, inputs);
        let Some(value) = inputs.first() else { return };
        let float = value.original.is_some_and(types::is_float);
        // In a float32 model only what comes from activations changes; Casts from other types are
        // positions and masks.
        let moves = own != DataType::Float || (float && value.model);
        let constant = value.constant.clone().filter(|_| float && target == Some(own));
        let settled = constant.is_some() && own == DataType::Float;
        let ours = target == Some(own)
            && ((moves && constant.is_none()) || settled && value.now == Some(to));
        if !ours {
            self.keep_types(id, original, inputs, false, value.model);
            return;
        }
        let name = &original.output[0];
        let kept = self.keep.contains(name);
        let now = if kept { DataType::Float } else { to };
        let mut changed = node("Cast", original.name.as_deref().unwrap_or(""), &[&value.name], &[]);
        changed.attribute.push(int("to", now as i64));
        changed.metadata_props.clone_from(&original.metadata_props);
        changed.doc_string.clone_from(&original.doc_string);
        if value.content.wide && now != DataType::Float {
            changed.input[0] = self.limited(id, value, now);
        }
        let result = Value {
            name: self.output_name(name, Some(now), target),
            original: target,
            now: Some(now),
            model: constant.is_none(),
            kept,
            constant,
            content: Content::default(),
        };
        changed.output = vec![result.name.clone()];
        self.scope.values.insert(name.clone(), result);
        self.put(id, changed);
    }

    /// The name under which `value` is read in type `want`.
    fn typed(&mut self, id: NodeId, value: &Value, want: DataType) -> String {
        if let Some((root, _)) = &value.constant
            && value.original == Some(self.types.own)
        {
            self.mark(&root.clone(), want == self.types.to && want != self.types.own);
        }
        if value.now == Some(want) || value.now.is_none() {
            return value.name.clone();
        }
        let key = (value.name.clone(), want);
        if let Some(copy) = self.scope.copies.get(&key) {
            return copy.clone();
        }
        let from = match value.content.wide && want != DataType::Float {
            true => self.limited(id, value, want),
            false => value.name.clone(),
        };
        let copy = self.insert_cast(id, &from, &value.name, want);
        self.scope.copies.insert(key, copy.clone());
        copy
    }

    fn insert_cast(&mut self, at: NodeId, from: &str, base: &str, want: DataType) -> String {
        let copy = self.conversion.fresh(&format!("{base}.{}", type_label(Some(want))));
        let name = self.conversion.fresh(&format!("{copy}_cast"));
        let mut cast = node("Cast", &name, &[from], &[&copy]);
        cast.attribute.push(int("to", want as i64));
        self.graph.insert_before(at, cast);
        copy
    }

    /// The value limited to the range of `want`, in float32.
    fn limited(&mut self, at: NodeId, value: &Value, want: DataType) -> String {
        let mut from = value.name.clone();
        if value.now != Some(DataType::Float) {
            from = self.insert_cast(at, &from, &value.name, DataType::Float);
        }
        let largest = constants::largest(want);
        let mut bound = |which: &str, number: f32| {
            let out = self.conversion.fresh(&format!("{}.{which}", value.name));
            let name = self.conversion.fresh(&format!("{out}_constant"));
            let mut constant = node("Constant", &name, &[], &[&out]);
            constant.attribute.push(float("value_float", number));
            self.graph.insert_before(at, constant);
            out
        };
        let (lower, upper) = (bound("lowest", -largest), bound("largest", largest));
        let out = self.conversion.fresh(&format!("{}.in_range", value.name));
        let name = self.conversion.fresh(&format!("{out}_clip"));
        self.graph.insert_before(at, node("Clip", &name, &[&from, &lower, &upper], &[&out]));
        out
    }

    /// If, Loop, Scan: types stay at their borders.
    fn control_flow(
        &mut self,
        id: NodeId,
        original: &Node,
        inputs: &[Value],
    ) -> Result<(), ExecuteError> {
        let mut bodies = self.source.subgraphs(id)?.into_iter();
        let mut bodied = original.clone();
        let mut model = inputs.iter().any(|value| value.model);
        for attribute in &mut bodied.attribute {
            for bytes in attribute.g.iter_mut().chain(&mut attribute.graphs) {
                // Parsed from these very attributes, in this order.
                let Some((_, mut body)) = bodies.next() else { break };
                model |= self.conversion.graph(&mut body, &self.scope)?;
                *bytes = body.to_bytes()?;
            }
        }
        self.keep_types(id, &bodied, inputs, true, model);
        Ok(())
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

/// Operators that multiply by, or add, a number of the formula.
fn scales(node: &Node) -> bool {
    matches!(node.op_type.as_deref(), Some("Mul" | "Div" | "Add" | "Sub" | "Pow"))
}

/// Operators whose attributes name the type of the result.
fn holds_type(node: &Node) -> bool {
    let names = ["dtype", "to", "value", "output_dtype"];
    node.attribute.iter().any(|a| a.name.as_deref().is_some_and(|name| names.contains(&name)))
}

pub(super) fn type_label(data_type: Option<DataType>) -> &'static str {
    match data_type {
        Some(DataType::Bfloat16) => "bf16",
        Some(DataType::Float16) => "fp16",
        _ => "fp32",
    }
}
