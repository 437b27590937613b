//! A model raised to the opset of the new element types.
//!
//! Between opset 13 and 28 most operators gained types, optional inputs and attributes whose defaults
//! keep the meaning. Those that did not (from comparing all definitions of onnx 1.23): the reductions
//! moved `axes` from an attribute to an input and Split wants the number of its outputs, which are
//! rewritten here; the operators of [`CHANGED`] are refused.

use std::collections::HashSet;

use crate::{
    graph::domain,
    onnx::{Function, Graph, Model, NodeId, proto::Node},
    rewrite::{
        execute::ExecuteError,
        lower::{int, ints, node},
        patch::{collect_names, fresh_name},
    },
};

/// The oldest opset that is raised.
const OLDEST: i64 = 13;
/// The version that changed the reductions and Split.
const AXES: i64 = 18;

/// Operators whose nodes mean something else from a version on.
const CHANGED: &[(&str, i64)] =
    &[("DFT", 20), ("GridSample", 20), ("GroupNormalization", 21), ("RoiAlign", 16)];

/// ReduceSum takes its axes as an input from opset 13 on.
const REDUCTIONS: &[&str] = &[
    "ReduceL1",
    "ReduceL2",
    "ReduceLogSum",
    "ReduceLogSumExp",
    "ReduceMax",
    "ReduceMean",
    "ReduceMin",
    "ReduceProd",
    "ReduceSumSquare",
];

/// Has the model import at least `opset` of the standard domain, in a file of at least version `ir`.
///
/// # Errors
/// An opset before 13; a node that cannot be kept; a sub-graph or function that cannot be read.
pub(super) fn raise(model: &mut Model, opset: i64, ir: i64) -> Result<(), ExecuteError> {
    let found = model.opset("").unwrap_or(0);
    if found < OLDEST {
        return Err(ExecuteError::Opset { lowering: "qdq", needed: OLDEST, found });
    }
    let step = Step { found, opset };
    let mut names = HashSet::new();
    collect_names(model.graph(), &mut names)?;
    if found < opset {
        step.graph(model.graph_mut(), &mut names)?;
    }
    for function in model.functions()? {
        step.function(&function)?;
    }
    model.raise_opset(opset)?;
    model.raise_ir_version(ir);
    Ok(())
}

/// From which version to which.
struct Step {
    found: i64,
    opset: i64,
}

impl Step {
    /// Rewrites the nodes of a graph and of those in it.
    fn graph(&self, graph: &mut Graph, names: &mut HashSet<String>) -> Result<(), ExecuteError> {
        for id in graph.node_order() {
            let original = graph.node(id);
            self.check(original)?;
            if self.has_old_axes(original) {
                self.move_axes(graph, id, names);
            } else if self.is_old_split(original) {
                let mut changed = original.clone();
                changed.attribute.push(int("num_outputs", changed.output.len() as i64));
                graph.replace_node(id, changed);
            } else {
                self.bodies(graph, id, names)?;
            }
        }
        Ok(())
    }

    /// If, Loop, Scan.
    fn bodies(
        &self,
        graph: &mut Graph,
        id: NodeId,
        names: &mut HashSet<String>,
    ) -> Result<(), ExecuteError> {
        let mut bodies = graph.subgraphs(id)?.into_iter();
        if bodies.len() == 0 {
            return Ok(());
        }
        let mut changed = graph.node(id).clone();
        for attribute in &mut changed.attribute {
            for bytes in attribute.g.iter_mut().chain(&mut attribute.graphs) {
                // Parsed from these very attributes, in this order.
                let Some((_, mut body)) = bodies.next() else { break };
                self.graph(&mut body, names)?;
                *bytes = body.to_bytes()?;
            }
        }
        graph.replace_node(id, changed);
        Ok(())
    }

    /// A function is carried as it is, but for the version that it imports.
    fn function(&self, function: &Function) -> Result<(), ExecuteError> {
        let standard = |domain: &str| matches!(domain, "" | "ai.onnx");
        let import = function.opsets.iter().find(|(domain, _)| standard(domain));
        let Some(&(_, found)) = import.filter(|&&(_, found)| found < self.opset) else {
            return Ok(());
        };
        if found < OLDEST {
            let reason = format!(
                "the local function '{}' imports opset {found}, and qdq needs {OLDEST} or newer; export \
                 the model again",
                function.name
            );
            return Err(ExecuteError::Unsupported { lowering: "qdq", reason });
        }
        let step = Self { found, opset: self.opset };
        let mut pending = function.nodes.clone();
        while let Some(inner) = pending.pop() {
            step.check(&inner)?;
            if step.has_old_axes(&inner) || step.is_old_split(&inner) {
                return Err(step.refused(&inner, AXES));
            }
            for bytes in inner.attribute.iter().flat_map(|a| a.g.iter().chain(&a.graphs)) {
                let body = Graph::parse(bytes, 0)?;
                pending.extend(body.nodes().map(|(_, node)| node.clone()));
            }
        }
        Ok(())
    }

    /// Refuses what would mean something else.
    fn check(&self, node: &Node) -> Result<(), ExecuteError> {
        if !domain(node).is_empty() {
            return Ok(());
        }
        let op = node.op_type.as_deref().unwrap_or("");
        // In training it had other outputs.
        if op == "BatchNormalization" && node.output.len() > 1 && self.passes(14) {
            return Err(self.refused(node, 14));
        }
        match CHANGED.iter().find(|(name, version)| *name == op && self.passes(*version)) {
            Some(&(_, version)) => Err(self.refused(node, version)),
            None => Ok(()),
        }
    }

    fn refused(&self, node: &Node, version: i64) -> ExecuteError {
        let named = node.name.as_deref().filter(|name| !name.is_empty());
        let made = || node.output.first().map_or(String::new(), |o| format!("that makes '{o}'"));
        let name = named.map_or_else(made, |name| format!("'{name}'"));
        let op = node.op_type.as_deref();
        let reason = format!(
            "the node {name} ({}) of a model or function of opset {} has another form from opset \
             {version} on, and the new element types need opset {}; export the model with opset \
             {version} or newer",
            op.unwrap_or(""),
            self.found,
            self.opset
        );
        ExecuteError::Unsupported { lowering: "qdq", reason }
    }

    fn passes(&self, version: i64) -> bool {
        self.found < version && version <= self.opset
    }

    fn has_old_axes(&self, node: &Node) -> bool {
        let op = node.op_type.as_deref().unwrap_or("");
        let reduces = domain(node).is_empty() && REDUCTIONS.contains(&op);
        reduces && self.passes(AXES) && node.attribute.iter().any(|a| is_named(a, "axes"))
    }

    fn is_old_split(&self, node: &Node) -> bool {
        let splits = domain(node).is_empty() && node.op_type.as_deref() == Some("Split");
        let sizes = node.input.get(1).is_some_and(|sizes| !sizes.is_empty());
        let counted = node.attribute.iter().any(|a| is_named(a, "num_outputs"));
        splits && self.passes(AXES) && !sizes && !counted
    }

    fn move_axes(&self, graph: &mut Graph, id: NodeId, names: &mut HashSet<String>) {
        let mut changed = graph.node(id).clone();
        let axes: Vec<i64> = changed
            .attribute
            .iter()
            .filter(|a| is_named(a, "axes"))
            .flat_map(|a| a.ints.clone())
            .collect();
        changed.attribute.retain(|a| !is_named(a, "axes"));
        // No axes at all is what leaving them out means.
        if !axes.is_empty() {
            let base = changed.output.first().map_or("reduce", String::as_str).to_owned();
            let value = fresh_name(names, &format!("{base}.axes"));
            let name = fresh_name(names, &format!("{value}_constant"));
            let mut constant = node("Constant", &name, &[], &[&value]);
            constant.attribute.push(ints("value_ints", &axes));
            graph.insert_before(id, constant);
            changed.input.truncate(1);
            changed.input.push(value);
        }
        graph.replace_node(id, changed);
    }
}

fn is_named(attribute: &crate::onnx::proto::Attribute, name: &str) -> bool {
    attribute.name.as_deref() == Some(name)
}
