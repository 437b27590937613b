//! A read-only view of one graph: who makes a value, who reads it, what is constant.
//!
//! The view never changes the model. It holds decoded nodes in file order, a map from value names to
//! their sources and readers, and a `petgraph` DAG of nodes that proves there is no cycle. Values that
//! sub-graphs (If, Loop, Scan) capture count as read by the node that owns the sub-graph.

mod error;
mod main_scope;
mod scopes;
mod tree;
mod value;

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, OnceLock},
};

use petgraph::{
    Direction,
    graph::{DiGraph, NodeIndex},
    visit::EdgeRef,
};

pub use error::GraphError;
pub use main_scope::functions;
pub use scopes::{Scope, SubScope, sub_scopes};
pub use tree::{Branch, Owner, tree};
pub use value::{ConstTensor, Source, Use, ValueType};

use crate::onnx::proto::{Attribute, Node};

/// The view of one scope.
#[derive(Debug)]
pub struct GraphView {
    nodes: Vec<Node>,
    sources: HashMap<String, Source>,
    uses: HashMap<String, Vec<Use>>,
    constants: HashMap<String, ConstTensor>,
    types: HashMap<String, ValueType>,
    inputs: HashSet<String>,
    outputs: Vec<String>,
    /// The graph around a body, and the body's node there.
    outer: Option<(Arc<GraphView>, usize)>,
    /// One vertex a node, one edge a value read, pointing from maker to reader.
    dag: DiGraph<usize, ()>,
    /// Of each node, whether its results are the same in every run; found when it is asked for.
    fixed: OnceLock<Vec<bool>>,
}

impl GraphView {
    /// Builds the view. `outer` is the graph around a body and the index of the body's node there.
    ///
    /// # Errors
    /// [`GraphError`] for a value that two things define, a value that nothing defines, a cycle, or a
    /// sub-graph that cannot be decoded.
    pub fn new(scope: Scope, outer: Option<(Arc<GraphView>, usize)>) -> Result<Self, GraphError> {
        let mut view = Self {
            nodes: scope.nodes,
            sources: HashMap::new(),
            uses: HashMap::new(),
            constants: HashMap::new(),
            types: scope.types,
            inputs: scope.inputs.iter().cloned().collect(),
            outputs: scope.outputs,
            outer,
            dag: DiGraph::new(),
            fixed: OnceLock::new(),
        };
        view.define_outside_values(scope.inputs, scope.initializers)?;
        view.define_outputs_of_nodes()?;
        view.connect()?;
        view.check_acyclic()?;
        Ok(view)
    }

    fn define_outside_values(
        &mut self,
        inputs: Vec<String>,
        initializers: Vec<(String, ConstTensor)>,
    ) -> Result<(), GraphError> {
        for input in inputs {
            if self.sources.insert(input.clone(), Source::Input).is_some() {
                return Err(GraphError::Duplicate { value: input, by: "two graph inputs".into() });
            }
        }
        for (name, tensor) in initializers {
            // An input with an initialiser of its name has a default: legal, but not constant.
            if self.constants.insert(name.clone(), tensor).is_some() {
                let by = "two initializers".to_owned();
                return Err(GraphError::Duplicate { value: name, by });
            }
            self.sources.insert(name, Source::Initializer);
        }
        Ok(())
    }

    fn define_outputs_of_nodes(&mut self) -> Result<(), GraphError> {
        for (index, node) in self.nodes.iter().enumerate() {
            for (slot, value) in node.output.iter().enumerate().filter(|(_, v)| !v.is_empty()) {
                let source = Source::Node { index, slot };
                if let Some(other) = self.sources.insert(value.clone(), source) {
                    let first = match other {
                        Source::Node { index: first, .. } => {
                            format!("node {}", label(first, &self.nodes[first]))
                        }
                        Source::Initializer => "an initializer".to_owned(),
                        Source::Input => "a graph input".to_owned(),
                    };
                    let by = format!("{first} and node {}", label(index, node));
                    return Err(GraphError::Duplicate { value: value.clone(), by });
                }
            }
            if let Some(tensor) = ConstTensor::of_constant_node(node)
                && let Some(output) = node.output.first()
            {
                self.constants.insert(output.clone(), tensor);
            }
        }
        Ok(())
    }

    /// Records every read, the captured values of sub-graphs included, as uses and as edges.
    fn connect(&mut self) -> Result<(), GraphError> {
        let vertices: Vec<NodeIndex> =
            (0..self.nodes.len()).map(|index| self.dag.add_node(index)).collect();
        for index in 0..self.nodes.len() {
            let node = &self.nodes[index];
            let captured = scopes::captured_values(node)?;
            let reads = node.input.iter().enumerate().map(|(slot, v)| (v.clone(), Some(slot)));
            let reads: Vec<_> = reads.chain(captured.into_iter().map(|v| (v, None))).collect();
            for (value, slot) in reads.into_iter().filter(|(value, _)| !value.is_empty()) {
                match self.sources.get(&value) {
                    Some(Source::Node { index: maker, .. }) => {
                        self.dag.add_edge(vertices[*maker], vertices[index], ());
                    }
                    Some(_) => {}
                    None if self.is_outer(&value) => {}
                    None => {
                        let node = label(index, &self.nodes[index]);
                        return Err(GraphError::Undefined {
                            reader: format!("node {node}"),
                            value,
                        });
                    }
                }
                self.uses.entry(value).or_default().push(Use::Node { index, slot });
            }
        }
        for output in self.outputs.clone() {
            if !self.sources.contains_key(&output) && !self.is_outer(&output) {
                let reader = "the graph's output list".to_owned();
                return Err(GraphError::Undefined { reader, value: output });
            }
            self.uses.entry(output).or_default().push(Use::GraphOutput);
        }
        Ok(())
    }

    fn check_acyclic(&self) -> Result<(), GraphError> {
        petgraph::algo::toposort(&self.dag, None).map(drop).map_err(|cycle| {
            let index = self.dag[cycle.node_id()];
            GraphError::Cycle { node: label(index, &self.nodes[index]) }
        })
    }

    /// The nodes, in file order.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// The name a node goes by: its own, or `#<index>`.
    pub fn node_name(&self, index: usize) -> String {
        label(index, &self.nodes[index])
    }

    /// Names of the graph's outputs, in order.
    pub fn outputs(&self) -> &[String] {
        &self.outputs
    }

    /// The graph around this one, and the index of this one's node there.
    pub fn owner(&self) -> Option<(&Self, usize)> {
        self.outer.as_ref().map(|(view, node)| (view.as_ref(), *node))
    }

    /// The graph around this one, if `value` is not one of this graph's own.
    pub fn beyond(&self, value: &str) -> Option<&Self> {
        self.owner().map(|(view, _)| view).filter(|_| !self.sources.contains_key(value))
    }

    /// True for a value that a graph around this one defines.
    fn is_outer(&self, value: &str) -> bool {
        let Some((outer, _)) = self.owner() else { return false };
        outer.sources.contains_key(value) || outer.is_outer(value)
    }

    /// What makes a value; `None` for one of an outer scope.
    pub fn source(&self, value: &str) -> Option<Source> {
        self.sources.get(value).copied()
    }

    /// Who reads a value.
    pub fn uses(&self, value: &str) -> &[Use] {
        self.uses.get(value).map_or(&[], Vec::as_slice)
    }

    /// The one place that reads a value, when it is input `slot` of a node and nothing else reads it.
    pub fn only_reader(&self, value: &str) -> Option<(usize, usize)> {
        match self.uses(value) {
            [Use::Node { index, slot: Some(slot) }] => Some((*index, *slot)),
            _ => None,
        }
    }

    /// True for an initialiser that a caller may override because it is also a graph input.
    pub fn is_overridable(&self, value: &str) -> bool {
        if let Some(outer) = self.beyond(value) {
            return outer.is_overridable(value);
        }
        self.inputs.contains(value)
    }

    /// True when no caller can change a value: it is an initialiser, or computed from such alone.
    pub fn is_constant(&self, value: &str) -> bool {
        self.is_constant_by(value, |index| self.is_fixed(index))
    }

    /// The same of a node's results.
    pub fn is_fixed(&self, node: usize) -> bool {
        self.fixed.get_or_init(|| self.find_fixed())[node]
    }

    fn is_constant_by(&self, value: &str, fixed: impl Fn(usize) -> bool) -> bool {
        match self.source(value) {
            Some(Source::Initializer) => !self.is_overridable(value),
            Some(Source::Node { index, .. }) => fixed(index),
            Some(Source::Input) => false,
            None => self.beyond(value).is_some_and(|outer| outer.is_constant(value)),
        }
    }

    /// One pass over the nodes, makers before readers.
    fn find_fixed(&self) -> Vec<bool> {
        let mut fixed = vec![false; self.nodes.len()];
        for vertex in petgraph::algo::toposort(&self.dag, None).unwrap_or_default() {
            let index = self.dag[vertex];
            let node = &self.nodes[index];
            // A body may read what is not an input, and what has no input may be random.
            let has_body = node.attribute.iter().any(|a| a.g.is_some() || !a.graphs.is_empty());
            let mut inputs = node.input.iter().filter(|value| !value.is_empty()).peekable();
            let reads = inputs.peek().is_some();
            let all = inputs.all(|value| self.is_constant_by(value, |maker| fixed[maker]));
            fixed[index] = is_op(node, "Constant") || reads && all && !has_body;
        }
        fixed
    }

    /// Shape, type and (when small) elements of an initialiser or of a `Constant` node's output.
    pub fn constant(&self, value: &str) -> Option<&ConstTensor> {
        match self.beyond(value) {
            Some(outer) => outer.constant(value),
            None => self.constants.get(value),
        }
    }

    /// What the model says about a value's type and shape.
    pub fn value_type(&self, value: &str) -> Option<&ValueType> {
        match self.beyond(value) {
            Some(outer) => outer.value_type(value),
            None => self.types.get(value),
        }
    }

    /// Indices of the nodes that read any output of `node`, each once, ascending.
    pub fn readers(&self, node: usize) -> Vec<usize> {
        let vertex = NodeIndex::new(node);
        let edges = self.dag.edges_directed(vertex, Direction::Outgoing);
        let mut readers: Vec<usize> = edges.map(|edge| self.dag[edge.target()]).collect();
        readers.sort_unstable();
        readers.dedup();
        readers
    }
}

fn label(index: usize, node: &Node) -> String {
    match node.name.as_deref() {
        Some(name) if !name.is_empty() => name.to_owned(),
        _ => format!("#{index}"),
    }
}

/// The operator of a node as messages call it: with its domain unless that is ai.onnx.
pub fn op_name(node: &Node) -> String {
    let op = node.op_type.as_deref().unwrap_or_default();
    match domain(node) {
        "" => op.to_owned(),
        domain => format!("{domain}.{op}"),
    }
}

/// A node's domain; `ai.onnx` is another spelling of the empty one.
pub fn domain(node: &Node) -> &str {
    match node.domain.as_deref() {
        None | Some("ai.onnx") => "",
        Some(domain) => domain,
    }
}

/// True for an operator of ai.onnx.
pub fn is_op(node: &Node, op: &str) -> bool {
    node.op_type.as_deref() == Some(op) && domain(node).is_empty()
}

/// An attribute by name.
pub fn attribute<'a>(node: &'a Node, name: &str) -> Option<&'a Attribute> {
    node.attribute.iter().find(|attribute| attribute.name.as_deref() == Some(name))
}

/// An INT attribute, or its default.
pub fn int_attribute(node: &Node, name: &str, default: i64) -> i64 {
    attribute(node, name).and_then(|attribute| attribute.i).unwrap_or(default)
}

/// A FLOAT attribute, or its default.
pub fn float_attribute(node: &Node, name: &str, default: f32) -> f32 {
    attribute(node, name).and_then(|attribute| attribute.f).unwrap_or(default)
}

#[cfg(test)]
mod tests;
