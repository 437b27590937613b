//! The search for Linear layers: patterns, then module path and role, then the filter.

use std::collections::{HashMap, HashSet};

use super::{
    Bias, Filter, Origin, Role, Site, SiteScan, Skipped, Weight,
    filter::{Decision, Subject},
    paths::{Evidence, SIGNATURE_KEY, Signature, module_path, parse_signature},
    patterns::{self, Linear, Match, Traced},
    roles,
    sites::PathSource,
};
use crate::{
    graph::{GraphError, GraphView, Scope, Use, domain, is_op, op_name, sub_scopes},
    onnx::{Model, NodeId, proto::Node},
};

/// Path that a head without any name goes by.
const HEAD: &str = "lm_head";

/// Finds the Linear layers of a model that `filter` takes. Every candidate ends in one of the two
/// lists: of the main graph first, then those in sub-graphs and local functions, which are only listed.
///
/// # Errors
/// [`GraphError`] for a graph that ONNX does not allow, or that cannot be decoded.
pub fn find_sites(model: &Model, filter: &Filter) -> Result<SiteScan, GraphError> {
    let view = GraphView::new(Scope::of_model(model)?, &HashSet::new())?;
    let signature = model.graph().metadata().find(|(key, _)| *key == SIGNATURE_KEY);
    let signature = signature.map(|(_, text)| parse_signature(text)).unwrap_or_default();
    let mut found = scan(&view, &crate::graph::functions(model)?, &signature, filter)?;
    // The view counts nodes as they are written; sites carry the graph's own ids.
    let ids = model.graph().node_order();
    found.sites.iter_mut().for_each(|site| renumber(site, &ids));
    Ok(found)
}

fn renumber(site: &mut Site, ids: &[NodeId]) {
    let id = |index: &mut usize| *index = ids[*index].0;
    id(&mut site.node);
    site.replaces.iter_mut().for_each(id);
    site.weight.via.iter_mut().for_each(id);
    let bias = site.bias.as_mut().and_then(|bias| bias.constant.as_mut()).map(|(_, origin)| origin);
    for origin in [Some(&mut site.weight.origin), bias].into_iter().flatten() {
        if let Origin::Constant(index) = origin {
            id(index);
        }
    }
}

/// Searches one graph. `functions` are the model's local functions: title and nodes.
///
/// # Errors
/// A sub-graph that cannot be decoded.
pub(crate) fn scan(
    view: &GraphView,
    functions: &[(String, Vec<Node>)],
    signature: &Signature,
    filter: &Filter,
) -> Result<SiteScan, GraphError> {
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
                judge(view, *linear, shared, signature, filter)
            }
            Match::Not(reason) => Err(skipped(view, index, reason, None)),
        };
        match outcome {
            Ok(site) => found.sites.push(site),
            Err(skipped) => found.skipped.push(skipped),
        }
    }
    found.skipped.extend(elsewhere(view, functions)?);
    Ok(found)
}

fn skipped(view: &GraphView, index: usize, reason: String, module_path: Option<String>) -> Skipped {
    let op = op_name(&view.nodes()[index]);
    Skipped { node: view.node_name(index), op, reason, module_path }
}

/// Names a Linear, and takes or leaves it.
fn judge(
    view: &GraphView,
    linear: Linear,
    shared: bool,
    signature: &Signature,
    filter: &Filter,
) -> Result<Site, Skipped> {
    let node = &view.nodes()[linear.node];
    let op = op_name(node);
    let tied = is_embedding(view, &linear.weight.root);
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
    let role = roles::role(path.as_deref(), head);
    let subject =
        Subject { path: path.as_deref(), role, node: &node_name, initializer: &linear.weight.root };
    match filter.decide(&subject) {
        Decision::Leave(reason) => Err(Skipped { node: node_name, op, reason, module_path: path }),
        Decision::Take(rule) => {
            let name = Name { node_name, op, path, path_source, role, tied, rule };
            Ok(site(linear, name))
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
    let (constant, _) = bias.constant.as_ref()?;
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
}

fn site(linear: Linear, name: Name) -> Site {
    Site {
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
            origin: linear.weight.origin,
            layout: linear.layout,
            dtype: linear.weight.dtype,
            operand_dtype: linear.weight.operand_dtype,
            operand: linear.operand,
            via: linear.weight.via,
            tied: name.tied,
        },
        n: linear.n,
        k: linear.k,
        alpha: linear.alpha,
        bias: linear.bias,
        residual: linear.residual,
        rule: name.rule,
    }
}

/// True when a Gather (an embedding lookup) reads the weight, be it through an Identity.
fn is_embedding(view: &GraphView, root: &str) -> bool {
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
    let is_logits = |name: &str| {
        view.outputs().iter().any(|output| output == name)
            && name.to_ascii_lowercase().ends_with("logits")
    };
    let mut seen = HashSet::new();
    let mut values = vec![value];
    while let Some(value) = values.pop() {
        if is_logits(value) {
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

/// Candidates outside the main graph: they are listed, and left alone.
fn elsewhere(
    view: &GraphView,
    functions: &[(String, Vec<Node>)],
) -> Result<Vec<Skipped>, GraphError> {
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
    for (index, node) in view.nodes().iter().enumerate() {
        for scope in sub_scopes(node, &view.node_name(index))? {
            list(&scope.nodes, format!("in a sub-graph ({})", scope.title));
        }
    }
    for (title, nodes) in functions {
        list(nodes, format!("in a local function ({title})"));
        for (index, node) in nodes.iter().enumerate() {
            let name = node.name.clone().unwrap_or_else(|| format!("#{index}"));
            for scope in sub_scopes(node, &name)? {
                list(&scope.nodes, format!("in a sub-graph of a local function ({title})"));
            }
        }
    }
    Ok(skipped)
}
