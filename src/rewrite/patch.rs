//! A model under edit: fresh names, added tensors, and the bodies of If, Loop and Scan.
//!
//! The source model is never changed; lowerings read it and write into [`Patch::out`].

use std::collections::{BTreeMap, HashSet};

use prost::Message as _;

use super::{
    execute::ExecuteError,
    sites::{Layout, Region, Site, Weight},
    sweep::Sweep,
    weights::{Rows, Threads},
};
use crate::{
    graph::{Branch, tree},
    onnx::{
        self, DataType, Graph, Model, Payload, TensorInfo,
        proto::{Node, StringStringEntry},
    },
};

/// Metadata key of the module path on a replaced node.
pub const MODULE_PATH_KEY: &str = "mx.module_path";

/// A rewrite in progress.
pub(crate) struct Patch<'a> {
    /// The model as it was.
    pub model: &'a Model,
    /// The model as it becomes; bodies are put back by [`Self::finish`].
    pub out: Model,
    /// Where weights are quantised.
    pub threads: Threads,
    names: HashSet<String>,
    /// The graphs of the model as it was; sites name them by index.
    branches: Vec<Branch>,
    /// Bodies that were edited.
    bodies: BTreeMap<usize, Graph>,
    /// Values that lost a reader, and the graph that read them.
    dropped: Vec<(usize, String)>,
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
            branches: tree(model)?,
            bodies: BTreeMap::new(),
            dropped: Vec::new(),
        })
    }

    /// A graph of the model as it was.
    pub(crate) fn original(&self, graph: usize) -> &Graph {
        &self.branches[graph].graph
    }

    /// The same graph as it becomes, to be edited.
    pub(crate) fn graph_mut(&mut self, graph: usize) -> &mut Graph {
        match graph {
            0 => self.out.graph_mut(),
            _ => self.bodies.entry(graph).or_insert_with(|| self.branches[graph].graph.clone()),
        }
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

    /// The graph, `graph` or one around it, that holds the constant `name`, and its tensor.
    pub(crate) fn constant(
        &self,
        graph: usize,
        name: &str,
    ) -> Result<(usize, TensorInfo), ExecuteError> {
        let mut at = Some(graph);
        while let Some(index) = at {
            let branch = &self.branches[index];
            if let Some(info) = branch.graph.initializer(name) {
                return Ok((index, info.clone()));
            }
            let maker =
                branch.graph.nodes().find(|(_, node)| node.output.iter().any(|o| o == name));
            if let Some(value) =
                maker.and_then(|(_, node)| node.attribute.iter().find_map(|a| a.t.as_ref()))
            {
                let mut info = TensorInfo::parse(value.encode_to_vec().into(), 0)?;
                name.clone_into(&mut info.name);
                return Ok((index, info));
            }
            at = branch.owner.map(|owner| owner.graph);
        }
        Err(onnx::Error::Tensor {
            tensor: name.to_owned(),
            what: "is not in the model that the plan was made from".to_owned(),
        }
        .into())
    }

    /// The rows of a site's weight, and the graph that holds it.
    pub(crate) fn rows(&self, site: &Site) -> Result<(usize, Rows), ExecuteError> {
        let (home, info) = self.constant(site.graph, &site.weight.initializer)?;
        let rows = Rows::new(self.model.tensor(&info)?, &site.weight, site.n, site.k)?;
        Ok((home, rows))
    }

    /// The same of all experts, where the site chooses from a stack: one behind the other, as few parts
    /// as their storage allows.
    pub(crate) fn stack(&self, site: &Site) -> Result<(usize, Vec<Rows>), ExecuteError> {
        let Some(experts) = &site.experts else {
            return self.rows(site).map(|(home, rows)| (home, vec![rows]));
        };
        let (home, info) = self.constant(site.graph, &site.weight.initializer)?;
        let view = self.model.tensor(&info)?;
        // Rows along k follow one another through the whole stack; columns do so in each expert.
        let (parts, n) = match site.weight.layout {
            Layout::NK => (1, site.rows()),
            Layout::KN => (experts.count, site.n),
        };
        let part = |index: usize| {
            let start = site.n.saturating_mul(site.k).saturating_mul(index);
            let region = Region { start, ..site.weight.region };
            Rows::new(view.clone(), &Weight { region, ..site.weight.clone() }, n, site.k)
        };
        Ok((home, (0..parts).map(part).collect::<Result<_, _>>()?))
    }

    /// Notes that a node of `graph` no longer reads `value`.
    pub(crate) fn drop_value(&mut self, graph: usize, value: &str) {
        self.dropped.push((graph, value.to_owned()));
    }

    /// Removes what the edits left without a reader, and puts the bodies back into their nodes.
    pub(crate) fn finish(mut self) -> Result<Model, ExecuteError> {
        let current = |index: usize, branch: &Branch| match index {
            0 => self.out.graph().clone(),
            _ => self.bodies.get(&index).unwrap_or(&branch.graph).clone(),
        };
        let graphs = self.branches.iter().enumerate().map(|(i, b)| current(i, b)).collect();
        let parents = self.branches.iter().map(|b| b.owner.map(|owner| owner.graph)).collect();
        for (index, graph) in Sweep::new(graphs, parents).run(std::mem::take(&mut self.dropped)) {
            let before = produced(self.original(index));
            let out = self.graph_mut(index);
            *out = graph;
            let after = produced(out);
            out.remove_value_infos(|name| before.contains(name) && !after.contains(name));
        }
        // Bodies come behind the graphs around them, so the innermost are put back first.
        for index in (1..self.branches.len()).rev() {
            let Some(body) = self.bodies.remove(&index) else { continue };
            let Some(owner) = self.branches[index].owner else { continue };
            let message = body.to_bytes()?;
            let around = self.graph_mut(owner.graph);
            owner.put_back(around, message);
        }
        Ok(self.out)
    }
}

/// Notes on a replacement where in the module tree it is.
pub(crate) fn add_module_path(node: &mut Node, path: Option<&str>) {
    let Some(path) = path else { return };
    node.metadata_props.retain(|entry| entry.key.as_deref() != Some(MODULE_PATH_KEY));
    node.metadata_props.push(StringStringEntry {
        key: Some(MODULE_PATH_KEY.to_owned()),
        value: Some(path.to_owned()),
    });
}

/// Every value that a graph defines.
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
