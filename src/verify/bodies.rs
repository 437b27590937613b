//! A copy of a model whose graphs, bodies of If included, are edited to show what goes on inside.

use std::collections::{BTreeSet, HashMap};

use bytes::Bytes;

use crate::{
    graph::{Branch, tree},
    onnx::{
        self, DataType, Graph, Model, NodeId,
        proto::{Attribute, AttributeType, Node, Tensor, TensorType, Type, ValueInfo},
    },
};

/// The copy.
pub(super) struct Bodies {
    model: Model,
    /// The main graph and the bodies, each behind the one around it.
    pub branches: Vec<Branch>,
    edited: BTreeSet<usize>,
    /// By graph, which node of the model as it was makes a value.
    makers: Vec<HashMap<String, NodeId>>,
}

impl Bodies {
    pub fn new(model: &Model) -> onnx::Result<Self> {
        let branches = tree(model)?;
        let makers = branches.iter().map(|branch| makers(&branch.graph)).collect();
        Ok(Self { model: model.clone(), branches, edited: BTreeSet::new(), makers })
    }

    pub fn model(&self) -> &Model {
        &self.model
    }

    pub fn graph(&self, index: usize) -> &Graph {
        &self.branches[index].graph
    }

    pub fn graph_mut(&mut self, index: usize) -> &mut Graph {
        self.edited.insert(index);
        &mut self.branches[index].graph
    }

    /// Makes a value that `graph` sees an output of the model, called `name`. Of a value in the body of
    /// an If that is not taken there comes an empty tensor.
    ///
    /// # Errors
    /// A sentence: the value is inside a Loop or Scan, whose runs cannot be told apart.
    pub fn expose(
        &mut self,
        graph: usize,
        value: &str,
        element: DataType,
        name: &str,
    ) -> Result<(), String> {
        // Checked before anything is changed.
        let mut at = graph;
        while let Some(owner) = self.branches[at].owner {
            let op = self.graph(owner.graph).node(owner.node).op_type.as_deref();
            if op != Some("If") {
                let op = op.unwrap_or_default();
                return Err(format!("it is inside a {op}, whose iterations are not told apart"));
            }
            at = owner.graph;
        }
        let inner = |level: usize| match level {
            0 => name.to_owned(),
            level => format!("{name}.{level}"),
        };
        let level = |at: usize| self.branches[at].graph.depth() as usize;
        let mut shown = inner(level(graph));
        let mut at = graph;
        self.graph_mut(at).push_node(simple("Identity", &[value], &shown));
        while let Some(owner) = self.branches[at].owner {
            let others: Vec<usize> = (0..self.branches.len())
                .filter(|&other| {
                    let same =
                        |o: crate::graph::Owner| (o.graph, o.node) == (owner.graph, owner.node);
                    other != at && self.branches[other].owner.is_some_and(same)
                })
                .collect();
            self.graph_mut(at).add_output(untyped(&shown));
            for other in others {
                let absent = format!("{shown}.absent");
                let body = self.graph_mut(other);
                body.push_node(empty(element, &absent));
                body.add_output(untyped(&absent));
            }
            shown = inner(self.branches[owner.graph].graph.depth() as usize);
            let around = self.graph_mut(owner.graph);
            let mut node = around.node(owner.node).clone();
            node.output.push(shown.clone());
            around.replace_node(owner.node, node);
            at = owner.graph;
        }
        self.graph_mut(0).add_output(untyped(&shown));
        Ok(())
    }

    /// Puts the bodies back into their nodes and gives the edited model.
    pub fn finish(mut self) -> onnx::Result<Model> {
        // Bodies come behind the graphs around them, so the innermost are put back first.
        for index in (1..self.branches.len()).rev() {
            if !self.edited.contains(&index) {
                continue;
            }
            let Some(owner) = self.branches[index].owner else { continue };
            let message = self.branches[index].graph.to_bytes()?;
            let around = self.graph_mut(owner.graph);
            owner.put_back(around, message);
        }
        *self.model.graph_mut() = self.branches.swap_remove(0).graph;
        Ok(self.model)
    }

    /// The graph, `graph` or one around it, that holds a constant tensor of this name.
    pub fn home(&self, graph: usize, tensor: &str) -> Option<usize> {
        self.around(graph).find(|&at| self.graph(at).initializer(tensor).is_some())
    }

    /// The node that makes a value, in `graph` or in one around it.
    pub fn maker(&self, graph: usize, value: &str) -> Option<(usize, NodeId)> {
        self.around(graph).find_map(|at| Some((at, *self.makers[at].get(value)?)))
    }

    /// A graph and those around it, from the inside out.
    pub fn around(&self, graph: usize) -> impl Iterator<Item = usize> {
        let next = |&at: &usize| self.branches[at].owner.map(|owner| owner.graph);
        std::iter::successors(Some(graph), next)
    }
}

fn makers(graph: &Graph) -> HashMap<String, NodeId> {
    let outputs = |(id, node): (NodeId, &Node)| {
        node.output.iter().map(move |output| (output.clone(), id)).collect::<Vec<_>>()
    };
    graph.nodes().flat_map(outputs).collect()
}

/// A node of the standard domain without attributes.
pub(super) fn simple(op: &str, inputs: &[&str], output: &str) -> Node {
    Node {
        op_type: Some(op.to_owned()),
        name: Some(format!("{output}/{op}")),
        input: inputs.iter().map(|&input| input.to_owned()).collect(),
        output: vec![output.to_owned()],
        ..Node::default()
    }
}

/// A Constant without elements.
fn empty(element: DataType, output: &str) -> Node {
    let tensor = Tensor {
        dims: vec![0],
        data_type: Some(element as i32),
        raw_data: Some(Bytes::new()),
        ..Tensor::default()
    };
    let value = Attribute {
        name: Some("value".to_owned()),
        t: Some(tensor),
        r#type: Some(AttributeType::Tensor as i32),
        ..Attribute::default()
    };
    Node { attribute: vec![value], ..simple("Constant", &[], output) }
}

/// A value whose type ONNX Runtime infers.
pub(super) fn untyped(name: &str) -> ValueInfo {
    ValueInfo { name: Some(name.to_owned()), ..ValueInfo::default() }
}

/// A tensor of unknown rank.
pub(super) fn tensor(name: &str, element: DataType) -> ValueInfo {
    let tensor = TensorType { elem_type: Some(element as i32), shape: None };
    let r#type = Type { tensor_type: Some(tensor), ..Type::default() };
    ValueInfo { r#type: Some(r#type), ..untyped(name) }
}
