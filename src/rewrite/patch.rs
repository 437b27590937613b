//! A model under edit: fresh names, added tensors, and the sweep of what the edits left unused.
//!
//! The source model is never changed; lowerings read it and write into [`Patch::out`].

use std::collections::{BTreeSet, HashMap, HashSet};

use prost::Message as _;

use super::{
    execute::ExecuteError,
    plan::PlannedSite,
    sites::{Origin, Site, Weight},
    weights::{Rows, Threads},
};
use crate::onnx::{
    self, DataType, Graph, Model, NodeId, Payload, TensorInfo,
    proto::{Node, StringStringEntry},
};

/// Metadata key of the module path on a replaced node.
pub const MODULE_PATH_KEY: &str = "mx.module_path";

/// A rewrite in progress.
pub(crate) struct Patch<'a> {
    /// The model as it was.
    pub model: &'a Model,
    /// The model as it becomes.
    pub out: Model,
    /// Where weights are quantised.
    pub threads: Threads,
    names: HashSet<String>,
    /// Nodes that may have lost their last reader.
    suspects: BTreeSet<NodeId>,
    /// Initialisers that may have lost their last reader.
    orphans: BTreeSet<String>,
}

impl<'a> Patch<'a> {
    pub(crate) fn new(model: &'a Model, threads: Threads) -> Result<Self, ExecuteError> {
        let mut names = HashSet::new();
        collect_names(model.graph(), &mut names)?;
        Ok(Self {
            model,
            out: model.clone(),
            threads,
            names,
            suspects: BTreeSet::new(),
            orphans: BTreeSet::new(),
        })
    }

    /// A name that no value and no node has, as close to `base` as possible.
    pub(crate) fn fresh(&mut self, base: &str) -> String {
        fresh_name(&mut self.names, base)
    }

    /// Adds an initialiser under a fresh name, which is returned.
    pub(crate) fn add_tensor(
        &mut self,
        base: &str,
        dims: &[usize],
        data_type: DataType,
        payload: Payload,
    ) -> String {
        let name = self.fresh(base);
        let dims = dims.iter().map(|&d| d as i64).collect();
        self.out.graph_mut().add_initializer(TensorInfo::new(&name, dims, data_type, payload));
        name
    }

    /// The tensor of a constant.
    pub(crate) fn constant(&self, name: &str, origin: Origin) -> Result<TensorInfo, ExecuteError> {
        let missing = || onnx::Error::Tensor {
            tensor: name.to_owned(),
            what: "is not in the model that the plan was made from".to_owned(),
        };
        Ok(match origin {
            Origin::Initializer => {
                self.model.graph().initializer(name).ok_or_else(missing)?.clone()
            }
            Origin::Constant(index) => {
                let id = NodeId(index);
                if !self.model.graph().contains(id) {
                    return Err(missing().into());
                }
                let node = self.model.graph().node(id);
                let value = node.attribute.iter().find_map(|a| a.t.as_ref()).ok_or_else(missing)?;
                let mut info = TensorInfo::parse(value.encode_to_vec().into(), 0)?;
                name.clone_into(&mut info.name);
                info
            }
        })
    }

    /// The rows of a site's weight.
    pub(crate) fn rows(&self, site: &Site) -> Result<Rows, ExecuteError> {
        let Weight { initializer, origin, .. } = &site.weight;
        let view = self.model.tensor(&self.constant(initializer, *origin)?)?;
        Ok(Rows::new(view, &site.weight, site.n, site.k)?)
    }

    /// Notes that a site no longer reads its weight.
    pub(crate) fn drop_weight(&mut self, weight: &Weight) {
        self.suspects.extend(weight.via.iter().map(|&index| NodeId(index)));
        self.drop_constant(&weight.initializer, weight.origin);
    }

    /// Notes that a constant lost a reader.
    pub(crate) fn drop_constant(&mut self, name: &str, origin: Origin) {
        match origin {
            Origin::Initializer => drop(self.orphans.insert(name.to_owned())),
            Origin::Constant(index) => drop(self.suspects.insert(NodeId(index))),
        }
    }

    /// Removes the nodes, initialisers and value types that the edits left without a reader. Only
    /// what an edit stopped reading is looked at: a constant that the exporter left unused stays.
    pub(crate) fn sweep(&mut self) -> Result<(), ExecuteError> {
        let mut uses = count_uses(self.out.graph())?;
        let before: HashSet<String> = produced(self.model.graph());
        let graph = self.out.graph_mut();
        // Readers come after producers, so a chain unravels from its end.
        for &id in self.suspects.iter().rev() {
            let node = graph.node(id);
            let dead = node.output.iter().all(|value| uses.get(value).copied().unwrap_or(0) == 0);
            if !graph.contains(id) || !dead {
                continue;
            }
            for input in node.input.iter().filter(|input| !input.is_empty()) {
                if let Some(count) = uses.get_mut(input) {
                    *count -= 1;
                }
            }
            graph.remove_node(id);
        }
        for name in &self.orphans {
            if uses.get(name).copied().unwrap_or(0) == 0 {
                graph.remove_initializer(name);
            }
        }
        let after = produced(graph);
        graph.remove_value_infos(|name| before.contains(name) && !after.contains(name));
        Ok(())
    }
}

/// Notes on the node that replaces `planned`.
pub(crate) fn add_module_path(node: &mut Node, planned: &PlannedSite) {
    let Some(path) = &planned.site.module_path else { return };
    node.metadata_props.retain(|entry| entry.key.as_deref() != Some(MODULE_PATH_KEY));
    node.metadata_props.push(StringStringEntry {
        key: Some(MODULE_PATH_KEY.to_owned()),
        value: Some(path.clone()),
    });
}

/// Every value that the main graph defines.
fn produced(graph: &Graph) -> HashSet<String> {
    let nodes = graph.nodes().flat_map(|(_, node)| node.output.iter().cloned());
    nodes.chain(graph.initializers().map(|tensor| tensor.name.clone())).collect()
}

/// Takes a name that is not in `names` yet, as close to `base` as possible.
pub(crate) fn fresh_name(names: &mut HashSet<String>, base: &str) -> String {
    let mut name = base.to_owned();
    let mut count = 1;
    while !names.insert(name.clone()) {
        name = format!("{base}_{count}");
        count += 1;
    }
    name
}

/// Names of values and nodes, of sub-graphs too: their values may not shadow outer ones.
pub(crate) fn collect_names(graph: &Graph, names: &mut HashSet<String>) -> Result<(), onnx::Error> {
    for value in graph.inputs().chain(graph.outputs()).chain(graph.value_infos()) {
        names.extend(value.name.clone());
    }
    names.extend(graph.initializers().map(|tensor| tensor.name.clone()));
    for (id, node) in graph.nodes() {
        names.extend(node.name.clone());
        names.extend(node.input.iter().chain(&node.output).cloned());
        for (_, body) in graph.subgraphs(id)? {
            collect_names(&body, names)?;
        }
    }
    Ok(())
}

/// How often each value is read: by nodes, by nodes of sub-graphs, and as a graph output.
pub(crate) fn count_uses(graph: &Graph) -> Result<HashMap<String, usize>, onnx::Error> {
    fn count(graph: &Graph, uses: &mut HashMap<String, usize>) -> Result<(), onnx::Error> {
        for output in graph.outputs().filter_map(|value| value.name.clone()) {
            *uses.entry(output).or_default() += 1;
        }
        for (id, node) in graph.nodes() {
            for input in node.input.iter().filter(|input| !input.is_empty()) {
                *uses.entry(input.clone()).or_default() += 1;
            }
            for (_, body) in graph.subgraphs(id)? {
                count(&body, uses)?;
            }
        }
        Ok(())
    }
    let mut uses = HashMap::new();
    count(graph, &mut uses)?;
    Ok(uses)
}
