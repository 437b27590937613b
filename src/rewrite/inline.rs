//! Calls of local functions that hold Linear layers, replaced by what the functions do: the weight of
//! such a layer is an argument, another one in every call, so only a call can be rewritten.

use std::{
    borrow::Borrow,
    collections::{HashMap, HashSet},
};

use super::{
    patch::{collect_names, fresh_name},
    patterns::is_candidate,
};
use crate::{
    graph::{domain, tree},
    onnx::{
        self, Function, Graph, Model, NodeId,
        proto::{Attribute, Node},
    },
};

/// Deepest calls of functions in functions that are followed; exporters nest as modules do.
const MAX_DEPTH: usize = 32;
/// Most nodes that calls may become, and how many times those of the file.
const MAX_NODES: usize = 1 << 17;
const MAX_GROWTH: usize = 256;

/// The model with the calls in its main graph inlined; `None` when there is nothing to inline.
///
/// # Errors
/// A function or body that cannot be decoded.
pub(super) fn inline(model: &Model) -> Result<Option<Model>, onnx::Error> {
    let functions = wanted(model, model.functions()?);
    let by_name = by_name(&functions);
    let main = model.graph().nodes().map(|(_, node)| node);
    let mut sizes = HashMap::new();
    let nodes = functions.iter().map(|function| function.nodes.len()).sum::<usize>();
    let most = (nodes + model.graph().nodes().count()).saturating_mul(MAX_GROWTH).min(MAX_NODES);
    let total = size(main, &by_name, &mut sizes, 0).filter(|&total| total <= most);
    // None of the calls is written out when all of them would be too much.
    let Some(1..) = total else { return Ok(None) };
    let mut names = HashSet::new();
    collect_names(model.graph(), &mut names)?;
    let mut out = model.clone();
    loop {
        let graph = out.graph();
        let calls: Vec<(NodeId, &Function)> =
            graph.nodes().filter_map(|(id, node)| Some((id, called(node, &by_name)?))).collect();
        if calls.is_empty() {
            break;
        }
        for (id, function) in calls {
            replace_call(out.graph_mut(), id, function, &mut names);
        }
    }
    for (domain, version) in functions.iter().flat_map(|f| &f.opsets) {
        out.import_opset(domain, *version);
    }
    // A function that only a removed one called goes in the next round.
    let mut left = usize::MAX;
    while out.functions()?.len() < left {
        left = out.functions()?.len();
        let still = still_called(&out)?;
        out.remove_functions(|domain, name| {
            let inlined = functions.iter().any(|f| f.domain == domain && f.name == name);
            inlined && !still.contains(&(domain.to_owned(), name.to_owned()))
        });
    }
    Ok(Some(out))
}

/// The functions that hold a Linear, or call one that does, and can be written out in the main graph.
fn wanted(model: &Model, functions: Vec<Function>) -> Vec<Function> {
    let versions = |function: &Function| {
        let same = |(domain, version): &(String, i64)| {
            model.opset(domain).is_none_or(|imported| imported == *version)
        };
        function.opsets.iter().all(same)
    };
    // A body's values would have to be renamed too.
    let has_bodies = |function: &Function| {
        let attributes = function.nodes.iter().flat_map(|node| &node.attribute);
        attributes.into_iter().any(|a| a.g.is_some() || !a.graphs.is_empty())
    };
    let mut open: Vec<Function> =
        functions.into_iter().filter(|f| versions(f) && !has_bodies(f) && !f.overloaded).collect();
    let mut found: Vec<Function> = Vec::new();
    for _ in 0..=MAX_DEPTH {
        let known = by_name(&found);
        let (more, rest): (Vec<_>, Vec<_>) = open.into_iter().partition(|function| {
            function.nodes.iter().any(|n| is_candidate(n) || called(n, &known).is_some())
        });
        drop(known);
        open = rest;
        if more.is_empty() {
            break;
        }
        found.extend(more);
    }
    found
}

/// Functions by domain and name.
type ByName<'f> = HashMap<(&'f str, &'f str), &'f Function>;

fn by_name(functions: &[Function]) -> ByName<'_> {
    // Of two with one name the first counts.
    functions.iter().rev().map(|f| ((&*f.domain, &*f.name), f)).collect()
}

fn called<'f>(node: &Node, functions: &ByName<'f>) -> Option<&'f Function> {
    functions.get(&(domain(node), node.op_type.as_deref()?)).copied()
}

/// Nodes that the calls among `nodes` become when they are written out, calls in functions included;
/// `None` = more than [`MAX_NODES`], or deeper than [`MAX_DEPTH`]: functions that call functions twice
/// grow without bound, and one that calls itself has no end.
fn size<'f>(
    nodes: impl Iterator<Item = impl Borrow<Node>>,
    functions: &ByName<'f>,
    known: &mut HashMap<(&'f str, &'f str), Option<usize>>,
    depth: usize,
) -> Option<usize> {
    let mut total = 0_usize;
    for node in nodes {
        let Some(function) = called(node.borrow(), functions) else { continue };
        let key = (&*function.domain, &*function.name);
        let inside = match known.get(&key) {
            Some(size) => *size,
            None if depth == MAX_DEPTH => None,
            None => {
                let size = size(function.nodes.iter(), functions, known, depth + 1);
                known.insert(key, size);
                size
            }
        };
        total = total.checked_add(inside?.checked_add(function.nodes.len())?)?;
        if total > MAX_NODES {
            return None;
        }
    }
    Some(total)
}

/// Domains and names of every operator that a graph or a function uses.
fn still_called(model: &Model) -> Result<HashSet<(String, String)>, onnx::Error> {
    let name = |node: &Node| (domain(node).to_owned(), node.op_type.clone().unwrap_or_default());
    let mut used = HashSet::new();
    for branch in tree(model)? {
        used.extend(branch.graph.nodes().map(|(_, node)| name(node)));
    }
    for function in model.functions()? {
        // A function that calls itself is not in use by that.
        let own = (function.domain.clone(), function.name.clone());
        used.extend(function.nodes.iter().map(name).filter(|called| *called != own));
    }
    Ok(used)
}

fn replace_call(graph: &mut Graph, id: NodeId, function: &Function, names: &mut HashSet<String>) {
    let call = graph.node(id).clone();
    let prefix = match call.name.as_deref() {
        Some(name) if !name.is_empty() => name.to_owned(),
        _ => format!("{}_{}", function.name, id.0),
    };
    let mut values: HashMap<&str, String> = HashMap::new();
    for (slot, input) in function.inputs.iter().enumerate() {
        values.insert(input, call.input.get(slot).cloned().unwrap_or_default());
    }
    for (slot, output) in function.outputs.iter().enumerate() {
        let Some(result) = call.output.get(slot).filter(|name| !name.is_empty()) else { continue };
        if let Some(passed) = values.get(output.as_str()) {
            // An argument, or a result under a second name: renaming cannot serve both.
            let node = super::lower::node("Identity", "", &[passed], &[result]);
            graph.insert_after(id, node);
        } else {
            values.insert(output, result.clone());
        }
    }
    for node in &function.nodes {
        let mut copy = node.clone();
        for output in node.output.iter().filter(|name| !name.is_empty()) {
            let fresh = || fresh_name(names, &format!("{prefix}/{output}"));
            values.entry(output).or_insert_with(fresh);
        }
        let renamed = |name: &String| values.get(name.as_str()).cloned().unwrap_or_default();
        copy.input = node.input.iter().map(renamed).collect();
        copy.output = node.output.iter().map(renamed).collect();
        let own = node.name.as_deref().filter(|name| !name.is_empty());
        let own = own.or(node.op_type.as_deref()).unwrap_or_default();
        copy.name = Some(fresh_name(names, &format!("{prefix}/{own}")));
        copy.attribute = node.attribute.iter().filter_map(|a| bound(a, &call, function)).collect();
        graph.insert_before(id, copy);
    }
    graph.remove_node(id);
}

/// An attribute of a function's node with the call's value in place of a reference.
fn bound(attribute: &Attribute, call: &Node, function: &Function) -> Option<Attribute> {
    let Some(reference) = attribute.ref_attr_name.as_deref().filter(|name| !name.is_empty()) else {
        return Some(attribute.clone());
    };
    let named = |a: &&Attribute| a.name.as_deref() == Some(reference);
    let given = call.attribute.iter().find(named);
    let value = given.or_else(|| function.defaults.iter().find(named))?;
    Some(Attribute { name: attribute.name.clone(), ..value.clone() })
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;
    use crate::onnx::{DataType, proto::OperatorSetId, testing::ModelBuilder, wire::len_field};

    /// An encoded function of the domain `local` over opset `opset`.
    fn function(name: &str, body: &ModelBuilder, opset: i64, more: &[u8]) -> Vec<u8> {
        let mut function = len_field(1, name.as_bytes()).to_vec();
        ["a", "b"].iter().for_each(|input| function.extend(len_field(4, input.as_bytes())));
        function.extend(len_field(5, b"r"));
        body.nodes.iter().for_each(|node| function.extend(len_field(7, &node.encode_to_vec())));
        let import = OperatorSetId { domain: None, version: Some(opset) };
        function.extend(len_field(9, &import.encode_to_vec()));
        function.extend(len_field(10, b"local"));
        function.extend(more);
        len_field(25, &function).to_vec()
    }

    fn call(builder: ModelBuilder, op: &str, inputs: &[&str], output: &str) -> ModelBuilder {
        builder.node(op, inputs, &[output]).with(|node| node.domain = Some("local".into()))
    }

    fn model(functions: &[Vec<u8>]) -> Model {
        let mut builder = ModelBuilder::new(18)
            .input("x", DataType::Float, &["m", "4"])
            .floats("w1", &[4, 4], &[0.5; 16])
            .floats("w2", &[4, 4], &[0.25; 16]);
        builder = call(builder, "Block", &["x", "w1"], "h");
        builder = call(builder, "Block", &["h", "w2"], "y");
        let builder = builder.output("y", DataType::Float, &["m", "4"]);
        let bytes = [builder.bytes(), functions.concat()].concat();
        Model::from_bytes(bytes.into(), None).unwrap()
    }

    fn linear() -> ModelBuilder {
        ModelBuilder::new(18).node("MatMul", &["a", "b"], &["t"]).node("Relu", &["t"], &["r"])
    }

    #[test]
    fn calls_become_what_the_functions_do() {
        let block = call(ModelBuilder::new(18), "Linear", &["a", "b"], "r");
        let functions =
            [function("Block", &block, 18, &[]), function("Linear", &linear(), 18, &[])];
        let out = inline(&model(&functions)).unwrap().unwrap();
        let nodes: Vec<_> = out.graph().nodes().map(|(_, node)| node.clone()).collect();
        let ops: Vec<_> = nodes.iter().map(|node| node.op_type.as_deref().unwrap()).collect();
        assert_eq!(ops, ["MatMul", "Relu", "MatMul", "Relu"]);
        assert_eq!(nodes[0].input, ["x", "w1"]);
        assert_eq!((nodes[2].input[0].as_str(), nodes[2].input[1].as_str()), ("h", "w2"));
        assert_eq!((nodes[1].output[0].as_str(), nodes[3].output[0].as_str()), ("h", "y"));
        assert_ne!(nodes[0].output, nodes[2].output);
        assert_eq!(out.functions().unwrap().len(), 0);
    }

    #[test]
    fn attributes_come_from_the_call_or_the_default() {
        let gemm = ModelBuilder::new(18).node("Gemm", &["a", "b"], &["r"]).with(|node| {
            let refers = |name: &str, to: &str| Attribute {
                name: Some(name.into()),
                ref_attr_name: Some(to.into()),
                ..Attribute::default()
            };
            node.attribute = vec![refers("alpha", "factor"), refers("transB", "absent")];
        });
        let default = len_field(11, &crate::rewrite::lower::float("factor", 0.5).encode_to_vec());
        let functions = function("Block", &gemm, 18, &default);
        let out = inline(&model(&[functions])).unwrap().unwrap();
        let (_, node) = out.graph().nodes().next().unwrap();
        assert_eq!(node.attribute, [crate::rewrite::lower::float("alpha", 0.5)]);
    }

    #[test]
    fn what_cannot_be_written_out_stays() {
        let relu = ModelBuilder::new(18).node("Relu", &["a"], &["r"]);
        assert!(inline(&model(&[function("Block", &relu, 18, &[])])).unwrap().is_none());
        let other = function("Block", &linear(), 17, &[]);
        assert!(inline(&model(&[other])).unwrap().is_none(), "another version of the operators");
        let circle = call(linear(), "Block", &["a", "b"], "z");
        let circle = inline(&model(&[function("Block", &circle, 18, &[])])).unwrap();
        assert!(circle.is_none(), "a function that calls itself has no end");
    }
}
