//! The search for Linear layers: patterns, then module path and role, then the filter.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use super::{
    Bias, Filter, Role, Site, SiteScan, Skipped, Weight,
    checkpoint::{Found, Names, PackedWeight, Settled},
    filter::{Decision, Subject},
    paths::{Evidence, SIGNATURE_KEY, Signature, module_path, parse_signature},
    patterns::{self, Linear, Match, Traced},
    products::{self, Product},
    roles,
    sites::PathSource,
};
use crate::{
    graph::{Branch, GraphError, GraphView, Scope, Use, domain, is_op, op_name, sub_scopes, tree},
    onnx::{Model, NodeId, proto::Node},
};

/// Path that a head without any name goes by.
const HEAD: &str = "lm_head";

/// Finds the Linear layers of a model that `filter` takes. Every candidate ends in one of the two
/// lists: of the main graph first, then those in bodies of If, Loop and Scan; those of local functions
/// are only listed.
///
/// # Errors
/// [`GraphError`] for a graph that ONNX does not allow, or that cannot be decoded.
pub fn find_sites(model: &Model, filter: &Filter) -> Result<SiteScan, GraphError> {
    find_named_sites(model, filter, &Names::default())
}

/// The same, with what a checkpoint says of the weights.
pub(super) fn find_named_sites(
    model: &Model,
    filter: &Filter,
    names: &Names,
) -> Result<SiteScan, GraphError> {
    let signature = model.graph().metadata().find(|(key, _)| *key == SIGNATURE_KEY);
    let signature = signature.map(|(_, text)| parse_signature(text)).unwrap_or_default();
    let branches = tree(model)?;
    let views = views(model, &branches)?;
    let mut all = SiteScan { checkpoint: names.summary.clone(), ..SiteScan::default() };
    for (graph, (view, branch)) in views.iter().zip(&branches).enumerate() {
        // The view counts nodes as they are written; sites carry the graph's own ids.
        let ids = branch.graph.node_order();
        let search = Search { view, signature: &signature, filter };
        let mut found = search.scan(|node| names.get(graph, ids[node].0));
        for site in &mut found.sites {
            renumber(site, &ids);
            site.graph = graph;
        }
        for product in &mut found.products {
            product.node = ids[product.node].0;
            product.graph = graph;
        }
        for skipped in found.skipped.iter_mut().filter(|_| graph > 0) {
            skipped.reason = format!("{} (in {})", skipped.reason, branch.title);
        }
        all.sites.append(&mut found.sites);
        all.products.append(&mut found.products);
        all.skipped.append(&mut found.skipped);
    }
    all.skipped.extend(in_functions(&crate::graph::functions(model)?)?);
    Ok(all)
}

/// A view of each graph; bodies see the graphs around them.
fn views(model: &Model, branches: &[Branch]) -> Result<Vec<Arc<GraphView>>, GraphError> {
    let mut views: Vec<Arc<GraphView>> = Vec::with_capacity(branches.len());
    for branch in branches {
        let outer = branch.owner.map(|owner| {
            let ids = branches[owner.graph].graph.node_order();
            let node = ids.iter().position(|&id| id == owner.node).unwrap_or_default();
            (views[owner.graph].clone(), node)
        });
        let scope = Scope::of_graph(model, &branch.graph)?;
        views.push(Arc::new(GraphView::new(scope, outer)?));
    }
    Ok(views)
}

fn renumber(site: &mut Site, ids: &[NodeId]) {
    let id = |index: &mut usize| *index = ids[*index].0;
    id(&mut site.node);
    site.replaces.iter_mut().for_each(id);
}

/// What decides in one graph.
struct Search<'a> {
    view: &'a GraphView,
    signature: &'a Signature,
    filter: &'a Filter,
}

impl Search<'_> {
    /// Searches the graph; `content` says what a checkpoint knows of a node's weight.
    fn scan<'a>(&self, content: impl Fn(usize) -> Option<&'a Found>) -> SiteScan {
        let view = self.view;
        let matches: Vec<(usize, Match)> = (0..view.nodes().len())
            .filter_map(|index| Some((index, patterns::match_node(view, index)?)))
            .collect();
        let mut readers: HashMap<String, usize> = HashMap::new();
        for (_, found) in &matches {
            if let Match::Linear(linear) = found {
                *readers.entry(linear.weight.root.clone()).or_default() += 1;
            }
        }
        let mut found = SiteScan::default();
        for (index, outcome) in matches {
            let outcome = match outcome {
                Match::Linear(linear) => {
                    let shared = readers.get(&linear.weight.root).is_some_and(|&count| count > 1);
                    let content = content(linear.node);
                    self.judge(*linear, shared, content)
                }
                Match::Not(reason) => match products::find(view, index, self.signature) {
                    Some(product) => match judge_product(product, self.filter) {
                        Ok(product) => {
                            found.products.push(product);
                            continue;
                        }
                        Err(skipped) => Err(skipped),
                    },
                    None => Err(skipped(view, index, reason, None)),
                },
            };
            match outcome {
                Ok(site) => found.sites.push(site),
                Err(skipped) => found.skipped.push(skipped),
            }
        }
        found
    }

    /// Names a Linear, and takes or leaves it.
    fn judge(
        &self,
        linear: Linear,
        shared: bool,
        content: Option<&Found>,
    ) -> Result<Site, Skipped> {
        let Self { view, signature, filter } = *self;
        let node = &view.nodes()[linear.node];
        let op = op_name(node);
        // A Gather of experts is no embedding's.
        let tied = linear.experts.is_none() && is_embedding(view, &linear.weight.root);
        let head = produces_logits(view, &linear.y);
        let own_name = parameter_name(view, &linear);
        let bias = linear.bias.as_ref().and_then(bias_name);
        let (mut path, mut path_source) = module_path(
            &Evidence {
                metadata: &node.metadata_props,
                node: node.name.as_deref().unwrap_or_default(),
                op: &op,
                initializer: own_name.unwrap_or(&linear.weight.root),
                tied: tied && own_name.is_none(),
                shared: shared && own_name.is_none(),
                bias,
            },
            signature,
        );
        if path.is_none() && head {
            (path, path_source) = (Some(HEAD.to_owned()), PathSource::Structure);
        }
        let node_name = view.node_name(linear.node);
        let Settled { path, source: path_source, role, mixture, note } = match content {
            Some(found) => found.settle(path, path_source, head, tied),
            None => {
                Settled { path, source: path_source, role: None, mixture: Vec::new(), note: None }
            }
        };
        let packed = path.is_none() && !head && is_packed(view, &linear);
        let of_path = match roles::role(path.as_deref(), head) {
            _ if packed => Role::Packed,
            Role::Mlp if linear.experts.is_some() => Role::Expert,
            role => role,
        };
        let role = role.filter(|_| !head).unwrap_or(of_path);
        let subject = Subject {
            path: path.as_deref(),
            role,
            node: &node_name,
            initializer: &linear.weight.root,
        };
        let part =
            |path| Subject { path: Some(path), role: roles::role(Some(path), false), ..subject };
        let decision = if mixture.is_empty() || head {
            filter.decide(&subject)
        } else {
            let parts: Vec<Subject<'_>> = mixture.iter().map(|path| part(path)).collect();
            filter.decide_joined(&subject, &parts)
        };
        match decision {
            Decision::Leave(reason) => {
                let reason = note.map_or(reason.clone(), |note| format!("{reason}; {note}"));
                Err(Skipped { node: node_name, op, reason, module_path: path })
            }
            Decision::Take(rule) => {
                let packed = content.and_then(|found| found.packed.clone());
                let name =
                    Name { node_name, op, path, path_source, role, tied, rule, note, packed };
                Ok(site(linear, name))
            }
        }
    }
}

fn skipped(view: &GraphView, index: usize, reason: String, module_path: Option<String>) -> Skipped {
    let op = op_name(&view.nodes()[index]);
    Skipped { node: view.node_name(index), op, reason, module_path }
}

/// Takes or leaves a product of activations.
fn judge_product(product: Product, filter: &Filter) -> Result<Product, Skipped> {
    let subject = Subject {
        path: product.module_path.as_deref(),
        role: Role::Product,
        node: &product.node_name,
        initializer: "",
    };
    match filter.decide(&subject) {
        Decision::Take(rule) => Ok(Product { rule, ..product }),
        Decision::Leave(reason) => {
            let Product { node_name: node, op, module_path, .. } = product;
            Err(Skipped { node, op, reason, module_path })
        }
    }
}

/// The layer's own name for a weight that the exporter merged with an equal one: the two are then
/// joined by an Identity whose output keeps the parameter's name.
fn parameter_name<'a>(view: &'a GraphView, linear: &Linear) -> Option<&'a str> {
    let identities = linear.weight.via.iter().rev().map(|&index| &view.nodes()[index]);
    let mut outputs =
        identities.filter(|node| is_op(node, "Identity")).filter_map(|n| n.output.first());
    outputs.find(|name| name.ends_with(".weight")).map(String::as_str)
}

/// The most telling name of a constant bias: the value read, when that is named like one, else the
/// constant behind it.
fn bias_name(bias: &Bias) -> Option<&str> {
    let constant = bias.constant.as_deref()?;
    Some(if bias.value.ends_with(".bias") { &bias.value } else { constant })
}

struct Name {
    node_name: String,
    op: String,
    path: Option<String>,
    path_source: PathSource,
    role: Role,
    tied: bool,
    rule: usize,
    note: Option<String>,
    packed: Option<PackedWeight>,
}

fn site(linear: Linear, name: Name) -> Site {
    Site {
        graph: 0,
        node: linear.node,
        node_name: name.node_name,
        op: name.op,
        replaces: linear.replaces,
        module_path: name.path,
        path_source: name.path_source,
        role: name.role,
        x: linear.x,
        transpose_x: linear.transpose_x,
        y: linear.y,
        weight: Weight {
            initializer: linear.weight.root,
            layout: linear.layout,
            region: linear.region,
            dtype: linear.weight.dtype,
            operand_dtype: linear.weight.operand_dtype,
            operand: linear.operand,
            tied: name.tied,
        },
        n: linear.n,
        k: linear.k,
        alpha: linear.alpha,
        bias: linear.bias,
        residual: linear.residual,
        rule: name.rule,
        experts: linear.experts,
        note: name.note,
        packed: name.packed,
    }
}

/// True for a product that an exporter's fusion made of several layers with one input, attention's and
/// the feed-forward block's alike: torch.onnx names the weight `packed_matmul_*` and splits the result.
fn is_packed(view: &GraphView, linear: &Linear) -> bool {
    let split = view.only_reader(&linear.y).map(|(index, _)| &view.nodes()[index]);
    linear.weight.root.starts_with("packed_matmul") && split.is_some_and(|n| is_op(n, "Split"))
}

/// True when a Gather (an embedding lookup) reads the weight, be it through an Identity.
fn is_embedding(view: &GraphView, root: &str) -> bool {
    if let Some(outer) = view.beyond(root)
        && is_embedding(outer, root)
    {
        return true;
    }
    let mut names = vec![root];
    let mut seen = HashSet::new();
    while let Some(name) = names.pop() {
        for reader in view.uses(name) {
            let Use::Node { index, slot: Some(_) } = *reader else { continue };
            let node = &view.nodes()[index];
            let op = node.op_type.as_deref().unwrap_or_default();
            if matches!(op, "Gather" | "GatherND" | "EmbedLayerNormalization") {
                return true;
            }
            if is_op(node, "Identity") && seen.insert(index) {
                names.extend(node.output.iter().map(String::as_str));
            }
        }
    }
    false
}

/// True when `value` becomes the graph output `logits` through operators that only reshape, pick or
/// rescale.
fn produces_logits(view: &GraphView, value: &str) -> bool {
    let mut seen = HashSet::new();
    let mut values = vec![value];
    while let Some(value) = values.pop() {
        if is_logits(view, value) {
            return true;
        }
        for reader in view.uses(value) {
            let Use::Node { index, slot: Some(slot) } = *reader else { continue };
            if seen.insert(index) && keeps_logits(view, index, slot) {
                values.extend(view.nodes()[index].output.first().map(String::as_str));
            }
        }
    }
    false
}

/// True for the output `logits`, and for an output of a body that becomes it.
fn is_logits(view: &GraphView, value: &str) -> bool {
    let Some((outer, index)) = view.owner() else {
        return value.to_ascii_lowercase().ends_with("logits")
            && view.outputs().iter().any(|output| output == value);
    };
    let owner = &outer.nodes()[index];
    // The first output of a Loop's body is its condition.
    let first = usize::from(is_op(owner, "Loop"));
    let mut places = view.outputs().iter().skip(first).zip(&owner.output);
    places.any(|(output, result)| output == value && produces_logits(outer, result))
}

fn keeps_logits(view: &GraphView, index: usize, slot: usize) -> bool {
    let node = &view.nodes()[index];
    if !domain(node).is_empty() {
        return false;
    }
    match node.op_type.as_deref().unwrap_or_default() {
        "Identity" | "Cast" | "Reshape" | "Squeeze" | "Unsqueeze" | "Slice" | "Gather"
        | "Transpose" | "Tanh" | "Clip" | "Flatten" => slot == 0,
        // Logit scaling, soft-capping and a bias: the other operand is constant.
        "Mul" | "Div" | "Add" | "Sub" => node
            .input
            .get(1 - slot.min(1))
            .is_some_and(|other| !matches!(patterns::trace(view, other), Traced::Dynamic)),
        _ => false,
    }
}

/// What keeps the calls of a function from being written out in the main graph.
const WHY_NOT_INLINED: &str = ": it is called from a body, or its calls are not written out because it has a \
     body itself, imports another opset, or they come to too many nodes (131072, or 256 times the file's)";

/// Candidates in local functions: they are listed, and left alone.
fn in_functions(functions: &[(String, Vec<Node>)]) -> Result<Vec<Skipped>, GraphError> {
    let mut skipped = Vec::new();
    let mut list = |nodes: &[Node], whence: String| {
        for (index, node) in nodes.iter().enumerate().filter(|(_, n)| patterns::is_candidate(n)) {
            let name = node.name.clone().filter(|name| !name.is_empty());
            skipped.push(Skipped {
                node: name.unwrap_or_else(|| format!("#{index}")),
                op: op_name(node),
                reason: whence.clone(),
                module_path: None,
            });
        }
    };
    for (title, nodes) in functions {
        list(nodes, format!("in a local function ({title}){WHY_NOT_INLINED}"));
        for (index, node) in nodes.iter().enumerate() {
            let name = node.name.clone().unwrap_or_else(|| format!("#{index}"));
            for scope in sub_scopes(node, &name)? {
                list(
                    &scope.nodes,
                    format!("in a sub-graph of a local function ({title}){WHY_NOT_INLINED}"),
                );
            }
        }
    }
    Ok(skipped)
}
