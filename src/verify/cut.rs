//! What a model computes between two values, cut out so that it can be fed something else.

use std::collections::{BTreeMap, HashMap};

use super::bodies::{Bodies, simple, tensor};
use crate::onnx::{DataType, NodeId, Payload, TensorInfo, proto::Node};

/// Most nodes of one layer; MX takes one, int8 and QDQ a few.
const MOST: usize = 64;

/// The nodes between X and Y, and the constants they read.
pub(super) struct Cut {
    /// In an order in which they can run.
    nodes: Vec<(usize, NodeId)>,
    /// Constants in bodies, which the main graph does not see: their graph, by name.
    inner: BTreeMap<String, usize>,
}

impl Cut {
    /// Finds what makes `y` of `x` in `graph`.
    ///
    /// # Errors
    /// A sentence: `y` is not made of `x` and constants alone.
    pub fn new(bodies: &Bodies, graph: usize, x: &str, y: &str) -> Result<Self, String> {
        let mut cut = Self { nodes: Vec::new(), inner: BTreeMap::new() };
        let mut reads_x = false;
        let mut open = vec![y.to_owned()];
        while let Some(value) = open.pop() {
            if value == x {
                reads_x = true;
                continue;
            }
            let home = bodies.home(graph, &value);
            let maker = bodies.maker(graph, &value);
            match (maker, home) {
                (Some(node), _) if cut.nodes.contains(&node) => {}
                (Some((at, id)), _) => {
                    let node = bodies.graph(at).node(id);
                    let has_body =
                        node.attribute.iter().any(|a| a.g.is_some() || !a.graphs.is_empty());
                    if has_body || cut.nodes.len() == MOST {
                        return Err(format!("`{y}` is not made of `{x}` by a few nodes"));
                    }
                    cut.nodes.push((at, id));
                    open.extend(node.input.iter().filter(|input| !input.is_empty()).cloned());
                }
                (None, Some(0)) => {}
                (None, Some(at)) => {
                    cut.inner.insert(value, at);
                }
                (None, None) => {
                    return Err(format!("`{y}` depends on `{value}`, not on `{x}` alone"));
                }
            }
        }
        if !reads_x {
            return Err(format!("`{y}` is not made of `{x}`"));
        }
        cut.sort(bodies);
        Ok(cut)
    }

    /// Outer graphs first, each in its order.
    fn sort(&mut self, bodies: &Bodies) {
        let mut orders: HashMap<usize, HashMap<NodeId, usize>> = HashMap::new();
        for &(at, _) in &self.nodes {
            orders.entry(at).or_insert_with(|| {
                let order = bodies.graph(at).node_order();
                order.into_iter().enumerate().map(|(place, id)| (id, place)).collect()
            });
        }
        self.nodes.sort_by_key(|(at, id)| (bodies.graph(*at).depth(), orders[at].get(id).copied()));
    }

    /// Adds a copy to the main graph that reads an input `x_name` in place of X and makes the output
    /// `y_name`. Constants are shared, but for those of bodies.
    ///
    /// # Errors
    /// A sentence: a constant that cannot be read.
    pub fn paste(
        &self,
        bodies: &mut Bodies,
        (x, x_name, element): (&str, &str, DataType),
        (y, y_name): (&str, &str),
    ) -> Result<(), String> {
        let mut names: HashMap<String, String> = HashMap::new();
        names.insert(x.to_owned(), x_name.to_owned());
        for (number, (name, &at)) in self.inner.iter().enumerate() {
            let Some(info) = bodies.graph(at).initializer(name) else { continue };
            let view = bodies.model().tensor(info).map_err(|error| error.to_string())?;
            let fresh = format!("{y_name}.c{number}");
            let element = info.data_type().unwrap_or(DataType::Undefined);
            let payload = Payload::Bytes(view.bytes.clone());
            let copy = TensorInfo::new(&fresh, info.dims.clone(), element, payload);
            bodies.graph_mut(0).add_initializer(copy);
            names.insert(name.clone(), fresh);
        }
        for (number, &(at, id)) in self.nodes.iter().enumerate() {
            let node = bodies.graph(at).node(id).clone();
            for (place, output) in node.output.iter().enumerate() {
                names.insert(output.clone(), format!("{y_name}.v{number}.{place}"));
            }
            let renamed = |list: &[String]| -> Vec<String> {
                list.iter().map(|name| names.get(name).unwrap_or(name).clone()).collect()
            };
            let copy = Node {
                name: Some(format!("{y_name}.n{number}")),
                input: renamed(&node.input),
                output: renamed(&node.output),
                ..node
            };
            bodies.graph_mut(0).push_node(copy);
        }
        let made = names.get(y).cloned().unwrap_or_default();
        let main = bodies.graph_mut(0);
        main.add_input(tensor(x_name, element));
        main.push_node(simple("Identity", &[&made], y_name));
        main.add_output(super::bodies::untyped(y_name));
        Ok(())
    }
}
