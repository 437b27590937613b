//! Every graph of a model: the main one and the bodies of If, Loop and Scan.

use bytes::Bytes;

use super::op_name;
use crate::onnx::{Error, Graph, Model, NodeId};

/// The main graph or a body.
#[derive(Clone, Debug)]
pub struct Branch {
    /// The graph.
    pub graph: Graph,
    /// The node that a body belongs to; `None` for the main graph.
    pub owner: Option<Owner>,
    /// What messages call it: `else_branch of If optimum::if`; empty for the main graph.
    pub title: String,
}

/// Where a body stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Index of the graph around it.
    pub graph: usize,
    /// Its node there.
    pub node: NodeId,
    /// Which of the node's bodies it is.
    pub position: usize,
}

impl Owner {
    /// Writes the body's message into its place in the node; `around` is the graph of the node.
    pub fn put_back(&self, around: &mut Graph, body: Bytes) {
        let mut node = around.node(self.node).clone();
        let mut places =
            node.attribute.iter_mut().flat_map(|a| a.g.iter_mut().chain(&mut a.graphs));
        if let Some(place) = places.nth(self.position) {
            *place = body;
        }
        around.replace_node(self.node, node);
    }
}

/// The graphs of a model, each behind the one around it; the main graph is the first.
///
/// # Errors
/// A body that cannot be decoded, or nesting that no exporter produces.
pub fn tree(model: &Model) -> Result<Vec<Branch>, Error> {
    let main = Branch { graph: model.graph().clone(), owner: None, title: String::new() };
    let mut found = vec![main];
    let mut next = 0;
    while next < found.len() {
        let Branch { graph, title: around, .. } = &found[next];
        let mut bodies = Vec::new();
        for (node, content) in graph.nodes() {
            for (position, (attribute, body)) in graph.subgraphs(node)?.into_iter().enumerate() {
                let name = content.name.as_deref().filter(|name| !name.is_empty());
                let name = name.map_or_else(|| format!("#{}", node.0), str::to_owned);
                let mut title = format!("{attribute} of {} {name}", op_name(content));
                if !around.is_empty() {
                    title = format!("{title}, in {around}");
                }
                let owner = Some(Owner { graph: next, node, position });
                bodies.push(Branch { graph: body, owner, title });
            }
        }
        found.extend(bodies);
        next += 1;
    }
    Ok(found)
}
