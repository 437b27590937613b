//! What the edits of a rewrite left without a reader.
//!
//! Only what an edit stopped reading is looked at, and what feeds that alone: a constant that the
//! exporter left unused stays.

use std::collections::{BTreeMap, HashMap, HashSet};

use crate::onnx::{Graph, NodeId, proto::Node};

/// What defines a value.
#[derive(Clone, Copy)]
enum Maker {
    Node(NodeId),
    Initializer,
    Input,
}

/// The graphs of a model, each behind the one around it, with what defines and who reads their values.
pub(super) struct Sweep {
    graphs: Vec<Graph>,
    parents: Vec<Option<usize>>,
    makers: Vec<HashMap<String, Maker>>,
    /// Readers of a value, by the graph that defines it: both branches of an If may use one name.
    uses: HashMap<(usize, String), usize>,
    changed: HashSet<usize>,
}

impl Sweep {
    pub(super) fn new(graphs: Vec<Graph>, parents: Vec<Option<usize>>) -> Self {
        let makers = graphs.iter().map(makers).collect();
        let mut sweep =
            Self { graphs, parents, makers, uses: HashMap::new(), changed: HashSet::new() };
        for index in 0..sweep.graphs.len() {
            let graph = &sweep.graphs[index];
            let outputs = graph.outputs().filter_map(|value| value.name.as_ref());
            let inputs = graph.nodes().flat_map(|(_, node)| &node.input);
            let reads: Vec<String> = outputs.chain(inputs).cloned().collect();
            for name in reads.into_iter().filter(|name| !name.is_empty()) {
                *sweep.uses.entry((sweep.home(index, &name), name)).or_default() += 1;
            }
        }
        sweep
    }

    /// Removes what only `dropped` kept alive: values, and the graphs that read them. Gives the graphs
    /// that changed.
    pub(super) fn run(mut self, dropped: Vec<(usize, String)>) -> BTreeMap<usize, Graph> {
        let mut suspects: Vec<(usize, String)> = dropped;
        while let Some((reader, name)) = suspects.pop() {
            let home = self.home(reader, &name);
            if self.count(home, &name) > 0 {
                continue;
            }
            match self.makers[home].get(&name).copied() {
                Some(Maker::Initializer) => {
                    self.makers[home].remove(&name);
                    self.graphs[home].remove_initializer(&name);
                    self.changed.insert(home);
                }
                Some(Maker::Node(id)) => suspects.extend(self.remove(home, id)),
                Some(Maker::Input) | None => {}
            }
        }
        let graphs = self.graphs.into_iter().enumerate();
        graphs.filter(|(index, _)| self.changed.contains(index)).collect()
    }

    /// Removes a node none of whose results is read; gives what it read.
    fn remove(&mut self, home: usize, id: NodeId) -> Vec<(usize, String)> {
        let node = self.graphs[home].node(id).clone();
        let read = node.output.iter().any(|name| self.count(home, name) > 0);
        if read || has_body(&node) || !self.graphs[home].contains(id) {
            return Vec::new();
        }
        self.graphs[home].remove_node(id);
        self.changed.insert(home);
        for name in node.input.iter().filter(|name| !name.is_empty()) {
            let key = (self.home(home, name), name.clone());
            if let Some(count) = self.uses.get_mut(&key) {
                *count -= 1;
            }
        }
        node.input.into_iter().filter(|name| !name.is_empty()).map(|name| (home, name)).collect()
    }

    fn count(&self, home: usize, name: &str) -> usize {
        self.uses.get(&(home, name.to_owned())).copied().unwrap_or(0)
    }

    /// The graph, `reader` or one around it, that defines a value.
    fn home(&self, reader: usize, name: &str) -> usize {
        let mut at = Some(reader);
        while let Some(index) = at {
            if self.makers[index].contains_key(name) {
                return index;
            }
            at = self.parents[index];
        }
        reader
    }
}

fn makers(graph: &Graph) -> HashMap<String, Maker> {
    let mut makers = HashMap::new();
    for value in graph.inputs().filter_map(|value| value.name.clone()) {
        makers.insert(value, Maker::Input);
    }
    for tensor in graph.initializers() {
        makers.insert(tensor.name.clone(), Maker::Initializer);
    }
    for (id, node) in graph.nodes() {
        let outputs = node.output.iter().filter(|name| !name.is_empty()).cloned();
        makers.extend(outputs.map(|name| (name, Maker::Node(id))));
    }
    makers
}

fn has_body(node: &Node) -> bool {
    node.attribute.iter().any(|attribute| attribute.g.is_some() || !attribute.graphs.is_empty())
}
