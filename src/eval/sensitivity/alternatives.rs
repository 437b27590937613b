//! What a site becomes in a format, as nodes that can stand beside the original ones.

use crate::onnx::proto::Node;
use crate::onnx::{Graph, Model, NodeId, TensorInfo};
use std::collections::{HashMap, HashSet};

/// The rewritten form of every site in one format.
pub(super) struct Alternatives {
    /// Of each site, the nodes that make its result, in order.
    pub nodes: Vec<Vec<Node>>,
    /// Packed weights, scales and reshaped biases that the nodes read.
    pub tensors: Vec<TensorInfo>,
}

/// Name of the value that a site's alternative makes in place of `y`.
pub(super) fn made(y: &str, format: &str) -> String {
    format!("{y}.mx.{format}")
}

/// Takes the replacements of the sites that make `ys` out of `rewritten`, which is `base` with every
/// site replaced. Values that `base` does not have get names of this format.
///
/// # Errors
/// A sentence: a replacement reads what is not there.
pub(super) fn take(
    base: &Model,
    rewritten: &Model,
    ys: &[&str],
    format: &str,
) -> Result<Alternatives, String> {
    let known = values(base.graph());
    let graph = rewritten.graph();
    let makers = makers(graph);
    let place: HashMap<NodeId, usize> =
        graph.node_order().into_iter().enumerate().map(|(place, id)| (id, place)).collect();
    let mut tensors: HashMap<String, TensorInfo> = HashMap::new();
    let mut all = Vec::with_capacity(ys.len());
    for &y in ys {
        let is_new = |value: &str| value == y || !(value.is_empty() || known.contains(value));
        let renamed = |value: &String| match is_new(value) {
            true => made(value, format),
            false => value.clone(),
        };
        let mut found: Vec<NodeId> = Vec::new();
        let mut open = vec![y.to_owned()];
        while let Some(value) = open.pop() {
            if let Some(&id) = makers.get(value.as_str()) {
                if !found.contains(&id) {
                    found.push(id);
                    let inputs = graph.node(id).input.iter();
                    open.extend(inputs.filter(|input| *input != y && is_new(input)).cloned());
                }
            } else if let Some(tensor) = graph.initializer(&value) {
                let name = made(&value, format);
                tensors.entry(name.clone()).or_insert(TensorInfo { name, ..tensor.clone() });
            } else {
                return Err(format!(
                    "the replacement of `{y}` reads `{value}`, which nothing makes"
                ));
            }
        }
        found.sort_by_key(|id| place.get(id).copied());
        let copy = |id: &NodeId| {
            let node = graph.node(*id).clone();
            Node {
                name: node.name.as_ref().map(|name| made(name, format)),
                input: node.input.iter().map(renamed).collect(),
                output: node.output.iter().map(renamed).collect(),
                ..node
            }
        };
        all.push(found.iter().map(copy).collect());
    }
    let mut tensors: Vec<TensorInfo> = tensors.into_values().collect();
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(Alternatives { nodes: all, tensors })
}

/// Every value of a graph.
fn values(graph: &Graph) -> HashSet<String> {
    let inputs = graph.inputs().filter_map(|value| value.name.clone());
    let tensors = graph.initializers().map(|tensor| tensor.name.clone());
    let made = graph.nodes().flat_map(|(_, node)| node.output.clone());
    inputs.chain(tensors).chain(made).collect()
}

fn makers(graph: &Graph) -> HashMap<&str, NodeId> {
    let outputs =
        |(id, node): (NodeId, &'_ Node)| node.output.iter().map(|_| id).collect::<Vec<_>>();
    let ids = graph.nodes().flat_map(outputs);
    let names = graph.nodes().flat_map(|(_, node)| node.output.iter().map(String::as_str));
    names.zip(ids).filter(|(name, _)| !name.is_empty()).collect()
}
