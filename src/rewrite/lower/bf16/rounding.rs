//! The walk over a graph that puts the roundings in.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::{
    classify::{Scope, Value, is_exact, is_source, moves_constant},
    constants,
    islands::{self, ConstantShape, Readers},
    types,
};
use crate::{
    onnx::{
        self, DataType, Graph, Model, NodeId,
        proto::{Node, ValueInfo},
    },
    rewrite::{
        lower::{float, int, node},
        patch::fresh_name,
    },
};

/// Who reads a constant of more than one element.
#[derive(Clone, Copy, Debug, Default)]
struct Marks {
    model: bool,
    fixed: bool,
}

/// A rounding in progress, over the main graph and its sub-graphs.
pub(super) struct Rounding<'a> {
    model: &'a Model,
    names: HashSet<String>,
    /// Constants that fixed values are computed from too: they keep their bits, and model operations
    /// read a rounded copy.
    shared: HashSet<String>,
    marks: BTreeMap<String, Marks>,
}

impl<'a> Rounding<'a> {
    pub(super) fn new(model: &'a Model, names: HashSet<String>, shared: HashSet<String>) -> Self {
        Self { model, names, shared, marks: BTreeMap::new() }
    }

    /// After a first pass: the constants that both kinds of values are computed from.
    pub(super) fn shared_constants(&self) -> HashSet<String> {
        let both = self.marks.iter().filter(|(_, marks)| marks.model && marks.fixed);
        both.map(|(name, _)| name.clone()).collect()
    }

    fn fresh(&mut self, base: &str) -> String {
        fresh_name(&mut self.names, base)
    }

    /// Rounds one graph; `outer` are the values around it. Returns what its outputs are.
    pub(super) fn graph(
        &mut self,
        graph: &mut Graph,
        outer: &Scope,
    ) -> Result<Vec<Value>, onnx::Error> {
        let mut walk = Walk::start(self, graph, outer)?;
        for id in walk.source.node_order() {
            walk.node(id)?;
        }
        let outputs = walk.outputs();
        let own = walk.own;
        self.change_constants(graph, &own)?;
        Ok(outputs)
    }

    /// Rounds the weights of one graph in place and brings all other constants into range.
    fn change_constants(
        &self,
        graph: &mut Graph,
        own: &HashMap<String, (ConstantShape, DataType)>,
    ) -> Result<(), onnx::Error> {
        let is_weight = |name: &str| {
            self.marks.get(name).is_some_and(|marks| marks.model) && !self.shared.contains(name)
        };
        let initializers: Vec<_> = graph.initializers().cloned().collect();
        for info in initializers {
            if !info.data_type().is_some_and(types::is_rounded_type) {
                continue;
            }
            if is_weight(&info.name) {
                graph.add_initializer(constants::rounded(self.model, &info)?);
            } else if let Some(clamped) = constants::clamped(self.model, &info)? {
                graph.add_initializer(clamped);
            }
        }
        for id in constants::constant_nodes(graph) {
            let node = graph.node(id);
            let name = node.output.first().map_or("", String::as_str);
            let round = own.contains_key(name) && is_weight(name);
            if let Some(changed) = constants::changed_node(self.model, node, round)? {
                graph.replace_node(id, changed);
            }
        }
        Ok(())
    }
}

/// The walk over one graph.
struct Walk<'r, 'a, 'g> {
    rounding: &'r mut Rounding<'a>,
    /// As it was.
    source: Graph,
    /// As it becomes.
    graph: &'g mut Graph,
    scope: Scope,
    declared: HashMap<String, DataType>,
    /// Constants that this graph defines.
    own: HashMap<String, (ConstantShape, DataType)>,
    keep: HashSet<String>,
    /// Rounded copies of fixed values, by name.
    copies: HashMap<String, String>,
    /// The first node, before which inputs are rounded.
    first: Option<NodeId>,
}

impl<'r, 'a, 'g> Walk<'r, 'a, 'g> {
    fn start(
        rounding: &'r mut Rounding<'a>,
        graph: &'g mut Graph,
        outer: &Scope,
    ) -> Result<Self, onnx::Error> {
        let source = graph.clone();
        let own = constants::shapes(&source);
        let mut shapes: HashMap<String, ConstantShape> =
            own.iter().map(|(name, (shape, _))| (name.clone(), *shape)).collect();
        for (name, value) in &outer.values {
            if let Some((_, shape)) = &value.constant {
                shapes.insert(name.clone(), *shape);
            }
        }
        let captured = captured(&source)?;
        let keep = islands::find(&Readers::new(&source, &shapes, &captured));
        let keep = keep.into_iter().map(str::to_owned).collect();
        let mut walk = Self {
            declared: types::declarations(&source),
            first: source.node_order().first().copied(),
            source,
            graph,
            scope: outer.clone(),
            own,
            keep,
            copies: HashMap::new(),
            rounding,
        };
        walk.inputs();
        Ok(walk)
    }

    /// Constants and graph inputs.
    fn inputs(&mut self) {
        for (name, (shape, data_type)) in &self.own {
            let value = Value {
                data_type: Some(*data_type),
                constant: Some((name.clone(), *shape)),
                ..Value::default()
            };
            self.scope.values.insert(name.clone(), value);
        }
        let inputs: Vec<_> = self.source.inputs().filter_map(types::declared).collect();
        for (name, data_type) in inputs {
            if self.own.contains_key(&name) {
                continue;
            }
            let model = types::is_float(data_type);
            let rounded = data_type == DataType::Bfloat16;
            let value = Value { data_type: Some(data_type), model, rounded, constant: None };
            self.scope.values.insert(name.clone(), value);
            if types::is_rounded_type(data_type) && self.source.depth() == 0 {
                self.round_input(&name, data_type);
            }
        }
    }

    /// A float graph input (a cache, embeddings) is read through a rounding that keeps finite what is.
    fn round_input(&mut self, name: &str, data_type: DataType) {
        let Some(first) = self.first else { return };
        let limited = self.rounding.fresh(&format!("{name}.bf16_range"));
        let bound = constants::LARGEST;
        let lower = self.constant_node(first, &format!("{name}.bf16_min"), -bound, data_type);
        let upper = self.constant_node(first, &format!("{name}.bf16_max"), bound, data_type);
        let clip_name = self.rounding.fresh(&format!("{limited}_node"));
        let clip = node("Clip", &clip_name, &[name, &lower, &upper], &[&limited]);
        self.graph.insert_before(first, clip);
        let copy = self.rounding.fresh(&format!("{name}.bf16_rounded"));
        for cast in self.casts(&limited, &copy, data_type) {
            self.graph.insert_before(first, cast);
        }
        self.copies.insert(name.to_owned(), copy);
    }

    /// A scalar of the given float type, as a value.
    fn constant_node(&mut self, at: NodeId, base: &str, value: f32, to: DataType) -> String {
        let out = self.rounding.fresh(base);
        let name = self.rounding.fresh(&format!("{out}_node"));
        let mut constant = node("Constant", &name, &[], &[&out]);
        constant.attribute.push(float("value_float", value));
        self.graph.insert_before(at, constant);
        if to == DataType::Float {
            return out;
        }
        let typed = self.rounding.fresh(&format!("{out}_typed"));
        let name = self.rounding.fresh(&format!("{typed}_node"));
        let mut cast = node("Cast", &name, &[&out], &[&typed]);
        cast.attribute.push(int("to", to as i64));
        self.graph.insert_before(at, cast);
        typed
    }

    /// `from` -> bfloat16 -> `to`, of `data_type`.
    fn casts(&mut self, from: &str, to: &str, data_type: DataType) -> [Node; 2] {
        let narrow = self.rounding.fresh(&format!("{to}.bf16"));
        let name = self.rounding.fresh(&format!("{to}.bf16_round"));
        let mut down = node("Cast", &name, &[from], &[&narrow]);
        down.attribute.push(int("to", DataType::Bfloat16 as i64));
        let name = self.rounding.fresh(&format!("{to}.bf16_widen"));
        let mut up = node("Cast", &name, &[&narrow], &[to]);
        up.attribute.push(int("to", data_type as i64));
        [down, up]
    }

    fn node(&mut self, id: NodeId) -> Result<(), onnx::Error> {
        let original = self.source.node(id).clone();
        if constants::of_node(&original).is_some()
            || (original.op_type.as_deref() == Some("Constant")
                && original.output.first().is_some_and(|name| self.own.contains_key(name)))
        {
            return Ok(());
        }
        let branches = self.subgraphs(id)?;
        let inputs: Vec<Value> = original
            .input
            .iter()
            .map(|name| self.scope.values.get(name).cloned().unwrap_or_default())
            .collect();
        let float = |value: &Value| value.data_type.is_some_and(types::is_float);
        let entered = inputs.iter().any(|value| value.model && float(value))
            || branches.iter().flatten().any(|value| value.model);
        let constant =
            |name: &str| self.scope.values.get(name)?.constant.as_ref().map(|(_, shape)| *shape);
        if entered || is_source(&original, &constant) {
            self.model_node(id, &original, &inputs, &branches);
        } else {
            self.fixed_node(&original, &inputs);
        }
        Ok(())
    }

    /// Rounds the sub-graphs of a node; returns what the outputs of each are.
    fn subgraphs(&mut self, id: NodeId) -> Result<Vec<Vec<Value>>, onnx::Error> {
        let mut bodies = self.source.subgraphs(id)?.into_iter();
        if bodies.len() == 0 {
            return Ok(Vec::new());
        }
        let mut branches = Vec::new();
        let mut changed = self.source.node(id).clone();
        let scope = self.scope.clone();
        for attribute in &mut changed.attribute {
            for bytes in attribute.g.iter_mut().chain(&mut attribute.graphs) {
                // Parsed from these very attributes, in this order.
                let Some((_, mut body)) = bodies.next() else { break };
                branches.push(self.rounding.graph(&mut body, &scope)?);
                *bytes = body.to_bytes()?;
            }
        }
        self.graph.replace_node(id, changed);
        Ok(branches)
    }

    fn output_type(&self, node: &Node, index: usize, inputs: &[Value]) -> Option<DataType> {
        let types: Vec<_> = inputs.iter().map(|value| value.data_type).collect();
        let name = &node.output[index];
        self.declared.get(name).copied().or_else(|| types::inferred(node, index, &types))
    }

    /// A node that computes from integers and constants alone.
    fn fixed_node(&mut self, node: &Node, inputs: &[Value]) {
        let op = node.op_type.as_deref().unwrap_or("");
        let first = inputs.first().filter(|_| moves_constant(op));
        let moved = first.and_then(|value| value.constant.clone());
        if moved.is_none() {
            for (name, _) in inputs.iter().filter_map(|value| value.constant.as_ref()) {
                self.rounding.marks.entry(name.clone()).or_default().fixed = true;
            }
        }
        for index in 0..node.output.len() {
            let data_type = self.output_type(node, index, inputs);
            let value = Value { data_type, constant: moved.clone(), ..Value::default() };
            self.scope.values.insert(node.output[index].clone(), value);
        }
    }

    fn model_node(
        &mut self,
        id: NodeId,
        original: &Node,
        inputs: &[Value],
        branches: &[Vec<Value>],
    ) {
        let mut changed = self.graph.node(id).clone();
        // True while everything that enters is a bfloat16 value.
        let mut exact = is_exact(original.op_type.as_deref().unwrap_or(""));
        for (slot, value) in inputs.iter().enumerate() {
            if !value.data_type.is_some_and(types::is_float) {
                continue;
            }
            let name = &original.input[slot];
            exact &= self.enter(id, name, value, &mut changed.input[slot]);
        }
        exact &= branches.iter().flatten().all(|value| value.rounded || !value.model);
        for (index, name) in original.output.iter().enumerate() {
            let data_type = self.output_type(original, index, inputs);
            let float = data_type.filter(|&t| types::is_float(t));
            let value = Value { data_type, model: float.is_some(), ..Value::default() };
            let rounds = float.filter(|&t| types::is_rounded_type(t));
            let kept = self.keep.contains(name);
            let rounded = match rounds {
                Some(data_type) if !exact && !kept && !name.is_empty() => {
                    let wide = self.rounding.fresh(&format!("{name}.bf16_exact"));
                    let [down, up] = self.casts(&wide, name, data_type);
                    self.declare_like(name, &wide);
                    changed.output[index] = wide;
                    self.graph.insert_after(id, down);
                    self.graph.insert_after(id, up);
                    true
                }
                Some(_) => exact,
                None => true,
            };
            self.scope.values.insert(name.clone(), Value { rounded, ..value });
        }
        if changed != *self.graph.node(id) {
            self.graph.replace_node(id, changed);
        }
    }

    /// Gives the value in the place of an output of the graph that one's type and shape. ONNX Runtime
    /// infers another where an operator returns a longer cache than it takes, and then has both share
    /// memory.
    fn declare_like(&mut self, output: &str, value: &str) {
        let declared = self.graph.outputs().find(|known| known.name.as_deref() == Some(output));
        if let Some(declared) = declared.cloned() {
            let name = Some(value.to_owned());
            self.graph.add_value_info(ValueInfo { name, ..declared });
        }
    }

    /// Prepares one float input of a model operation; true when it is a bfloat16 value.
    fn enter(&mut self, id: NodeId, name: &str, value: &Value, input: &mut String) -> bool {
        if let Some(copy) = self.copies.get(name) {
            copy.clone_into(input);
            return true;
        }
        if value.model {
            return value.rounded;
        }
        if let Some((root, shape)) = &value.constant {
            if shape.is_scalar() {
                return false;
            }
            self.rounding.marks.entry(root.clone()).or_default().model = true;
            if !self.rounding.shared.contains(root) {
                return true;
            }
        }
        let Some(data_type) = value.data_type.filter(|&t| types::is_rounded_type(t)) else {
            return true;
        };
        let copy = self.rounding.fresh(&format!("{name}.bf16_rounded"));
        for cast in self.casts(name, &copy, data_type) {
            self.graph.insert_before(id, cast);
        }
        self.copies.insert(name.to_owned(), copy.clone());
        *input = copy;
        true
    }

    fn outputs(&self) -> Vec<Value> {
        let name = |value: &onnx::proto::ValueInfo| value.name.clone().unwrap_or_default();
        let value = |name: String| self.scope.values.get(&name).cloned().unwrap_or_default();
        self.source.outputs().map(name).map(value).collect()
    }
}

/// Values that the sub-graphs of each node read; some are their own and match nothing outside.
pub(in crate::rewrite::lower) fn captured(
    graph: &Graph,
) -> Result<Vec<(NodeId, String)>, onnx::Error> {
    fn read(graph: &Graph, id: NodeId, out: &mut Vec<(NodeId, String)>) -> Result<(), onnx::Error> {
        for (inner, node) in graph.nodes() {
            out.extend(node.input.iter().map(|name| (id, name.clone())));
            for (_, body) in graph.subgraphs(inner)? {
                read(&body, id, out)?;
            }
        }
        Ok(())
    }
    let mut out = Vec::new();
    for (id, _) in graph.nodes() {
        for (_, body) in graph.subgraphs(id)? {
            read(&body, id, &mut out)?;
        }
    }
    Ok(out)
}
