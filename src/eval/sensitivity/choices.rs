//! One graph that holds the model and every site in every format, with inputs that choose.
//!
//! Segments become bodies of `If` nodes, which a run that begins behind them skips; a site becomes an
//! `If` of its own between the original nodes and the packed ones. Weights stay in the main graph,
//! once, so a session loads everything once and each run computes only what it is about.
//!
//! ```text
//! common nodes -> If(skip.0) {hidden or nothing} else {segment 0} -> If(skip.1) ... -> last segment
//!              -> TokenScores against the baseline's logits
//! in a segment:   If(site.j) {If(format.0) {fp4} else {If(format.1) {fp6} else {fp8}}} else {original}
//! ```

use super::alternatives::{Alternatives, made};
use super::head::Head;
use super::names;
use super::nodes::{body, bool_scalar, conditional, named_graph, simple, tensor, untyped};
use super::segments::{Segment, Segments};
use crate::eval::feeds::{LABELS, name};
use crate::graph::GraphView;
use crate::onnx::proto::{Attribute, AttributeType, DataType, Node, Tensor, ValueInfo};
use crate::onnx::{Graph, Model};
use bytes::Bytes;
use mx_custom_ops::contract;
use std::collections::{HashMap, HashSet};

/// A site in the graph that is edited.
pub(super) struct SiteForms<'a> {
    /// Nodes that it consists of, ascending.
    pub nodes: &'a [usize],
    /// The value it makes.
    pub y: &'a str,
}

/// What the graph is made of.
pub(super) struct Parts<'a> {
    pub model: &'a Model,
    pub view: &'a GraphView,
    pub segments: &'a Segments,
    pub sites: &'a [SiteForms<'a>],
    /// By format: its name, and what the sites become in it.
    pub formats: &'a [(String, Alternatives)],
    /// Name and element type of the logits.
    pub logits: (&'a str, DataType),
    /// The head, where only some positions are to be computed.
    pub head: Option<&'a Head>,
}

/// Puts the graph together.
///
/// # Errors
/// A sentence: a body cannot be encoded.
pub(super) fn graft(parts: &Parts<'_>) -> Result<Model, String> {
    let mut model = parts.model.clone();
    let editor = Editor::new(parts);
    let graph = model.graph_mut();
    let types = clear(graph, parts);
    for format in parts.formats {
        format.1.tensors.iter().for_each(|tensor| graph.add_initializer(tensor.clone()));
    }
    for (number, segment) in parts.segments.segments.iter().enumerate() {
        match &segment.output {
            Some(output) => {
                let shown = types.get(output).cloned().unwrap_or_else(|| untyped(output));
                graph.push_node(editor.body(number, segment, output, &shown, &types)?);
                graph.add_output(shown);
                graph.add_input(bool_scalar(&names::skip(number)));
                graph.add_input(bool_scalar(&names::start(number + 1)));
            }
            None => editor.nodes(segment, None)?.into_iter().for_each(|node| {
                graph.push_node(node);
            }),
        }
    }
    add_choosing(graph, parts);
    add_scores(graph, parts.logits)?;
    model.import_opset(contract::DOMAIN, contract::DOMAIN_VERSION);
    Ok(model)
}

/// Removes all but what is common; gives the types of what is gone.
fn clear(graph: &mut Graph, parts: &Parts<'_>) -> HashMap<String, ValueInfo> {
    let kept: HashSet<usize> = parts.segments.common.iter().copied().collect();
    for (index, id) in graph.node_order().into_iter().enumerate() {
        if !kept.contains(&index) {
            graph.remove_node(id);
        }
    }
    let types = graph
        .value_infos()
        .chain(graph.outputs())
        .map(|value| (name(value).to_owned(), value.clone()))
        .collect();
    let outputs: Vec<String> = graph.outputs().map(|output| name(output).to_owned()).collect();
    outputs.iter().for_each(|output| graph.remove_output(output));
    let common: HashSet<&str> = kept
        .iter()
        .flat_map(|&index| parts.view.nodes()[index].output.iter().map(String::as_str))
        .collect();
    graph.remove_value_infos(|value| !common.contains(value));
    types
}

/// The inputs that say what is computed.
fn add_choosing(graph: &mut Graph, parts: &Parts<'_>) {
    if let Some(element) = parts.segments.element.filter(|_| parts.segments.segments.len() > 1) {
        graph.add_input(tensor(names::HIDDEN, element, None));
    }
    for site in 0..parts.sites.len() {
        graph.add_input(bool_scalar(&names::site(site)));
    }
    for format in 0..parts.formats.len().saturating_sub(1) {
        graph.add_input(bool_scalar(&names::format(format)));
    }
    if parts.head.is_some() {
        graph.add_input(tensor(names::POSITIONS, DataType::Int64, Some(&["mx.positions"])));
    }
}

/// The scoring nodes, and the logits as an output.
fn add_scores(graph: &mut Graph, (logits, element): (&str, DataType)) -> Result<(), String> {
    graph.add_input(tensor(LABELS, DataType::Int64, Some(&["mx.rows", "mx.scored"])));
    graph.add_input(tensor(names::BASELINE, element, Some(&["mx.b0", "mx.b1", "mx.b2"])));
    graph.add_input(bool_scalar(names::COMPARE));
    graph.add_output(untyped(logits));
    let branch = |title: &str, baseline: &str| -> Result<Bytes, String> {
        let outputs = names::SCORES.map(|score| format!("{score}.{title}"));
        let node = Node {
            input: vec![logits.to_owned(), LABELS.to_owned(), baseline.to_owned()],
            output: outputs.to_vec(),
            name: Some(format!("mx.token_scores.{title}")),
            op_type: Some(contract::op::TOKEN_SCORES.into()),
            domain: Some(contract::DOMAIN.into()),
            ..Node::default()
        };
        // The baseline's own run is compared with itself.
        let mut body = named_graph(&format!("mx.scores.{title}"))?;
        body.push_node(node);
        outputs.iter().for_each(|output| body.add_output(untyped(output)));
        body.to_bytes().map_err(|error| error.to_string())
    };
    let (then, otherwise) = (branch("against", names::BASELINE)?, branch("alone", logits)?);
    let outputs = names::SCORES.map(str::to_owned).to_vec();
    graph.push_node(conditional("mx.scores", names::COMPARE, outputs, then, otherwise));
    names::SCORES.iter().for_each(|score| graph.add_output(untyped(score)));
    Ok(())
}

struct Editor<'a> {
    parts: &'a Parts<'a>,
    /// Site that a node belongs to.
    site_of: HashMap<usize, usize>,
}

impl<'a> Editor<'a> {
    fn new(parts: &'a Parts<'a>) -> Self {
        let mut site_of = HashMap::new();
        for (number, site) in parts.sites.iter().enumerate() {
            site_of.extend(site.nodes.iter().map(|&node| (node, number)));
        }
        Self { parts, site_of }
    }

    /// The `If` of a segment that may be skipped.
    fn body(
        &self,
        number: usize,
        segment: &Segment,
        output: &str,
        shown: &ValueInfo,
        types: &HashMap<String, ValueInfo>,
    ) -> Result<Node, String> {
        let inner = format!("{output}.mx.segment");
        let mut body = named_graph(&format!("mx.segment.{number}"))?;
        let nodes = self.nodes(segment, Some((output, &inner)))?;
        let made = nodes.iter().flat_map(|node| &node.output);
        let known: Vec<ValueInfo> = made.filter_map(|value| types.get(value)).cloned().collect();
        known.into_iter().for_each(|value| body.add_value_info(value));
        nodes.into_iter().for_each(|node| {
            body.push_node(node);
        });
        body.add_output(ValueInfo { name: Some(inner.clone()), ..shown.clone() });
        let encoded = |graph: &Graph| graph.to_bytes().map_err(|error| error.to_string());
        let skipped = encoded(&self.skipped(number, output)?)?;
        let condition = names::skip(number);
        let title = format!("mx.segment.{number}");
        Ok(conditional(&title, &condition, vec![output.to_owned()], skipped, encoded(&body)?))
    }

    /// What a skipped segment gives: the value that the run begins with, where the next segment is
    /// the first one that runs; else nothing, which nothing reads.
    fn skipped(&self, number: usize, output: &str) -> Result<Graph, String> {
        let branch = |title: &str, node: Node| -> Result<Bytes, String> {
            let mut graph = named_graph(&format!("mx.skipped.{number}.{title}"))?;
            node.output.iter().for_each(|value| graph.add_output(untyped(value)));
            graph.push_node(node);
            graph.to_bytes().map_err(|error| error.to_string())
        };
        let given = format!("{output}.mx.given");
        let pass = simple("Identity", &[names::HIDDEN], &given);
        let none = format!("{output}.mx.none");
        let rank = self.parts.view.value_type(output).and_then(|t| Some(t.dims.as_ref()?.len()));
        let element = self.parts.segments.element.unwrap_or(DataType::Float);
        let empty = Tensor {
            dims: vec![0; rank.unwrap_or(1)],
            data_type: Some(element as i32),
            raw_data: Some(Bytes::new()),
            ..Tensor::default()
        };
        let value = Attribute {
            name: Some("value".to_owned()),
            t: Some(empty),
            r#type: Some(AttributeType::Tensor as i32),
            ..Attribute::default()
        };
        let nothing = Node { attribute: vec![value], ..simple("Constant", &[], &none) };
        let result = format!("{output}.mx.skipped");
        let node = conditional(
            &format!("mx.skipped.{number}"),
            &names::start(number + 1),
            vec![result.clone()],
            branch("given", pass)?,
            branch("none", nothing)?,
        );
        let mut graph = named_graph(&format!("mx.skipped.{number}"))?;
        graph.push_node(node);
        graph.add_output(untyped(&result));
        Ok(graph)
    }

    /// The nodes of a segment with its sites made choices. `rename` gives the segment's result
    /// another name.
    fn nodes(&self, segment: &Segment, rename: Option<(&str, &str)>) -> Result<Vec<Node>, String> {
        let mut nodes = Vec::with_capacity(segment.nodes.len());
        let renamed = |value: &String| match rename {
            Some((from, to)) if value == from => to.to_owned(),
            _ => value.clone(),
        };
        for &index in &segment.nodes {
            let head = self.parts.head.filter(|head| head.node == index);
            if let Some(head) = head {
                nodes.push(gather(&head.x));
            }
            let node = match self.site_of.get(&index) {
                Some(&site) => match self.parts.sites[site].nodes.last() == Some(&index) {
                    true => self.choice(site)?,
                    false => continue,
                },
                None => self.original(index),
            };
            let output = node.output.iter().map(renamed).collect();
            nodes.push(Node { output, ..node });
        }
        Ok(nodes)
    }

    /// A node as it is; the head reads the chosen positions.
    fn original(&self, index: usize) -> Node {
        let node = self.parts.view.nodes()[index].clone();
        match self.parts.head.filter(|head| head.node == index) {
            Some(head) => reading(node, &head.x, &gathered(&head.x)),
            None => node,
        }
    }

    /// The `If` of a site.
    fn choice(&self, number: usize) -> Result<Node, String> {
        let site = &self.parts.sites[number];
        let base = format!("{}.mx.base", site.y);
        let rename = |node: Node| {
            let output = node.output.iter().map(|value| match value == site.y {
                true => base.clone(),
                false => value.clone(),
            });
            Node { output: output.collect(), ..node }
        };
        let originals = site.nodes.iter().map(|&index| rename(self.original(index))).collect();
        let otherwise = body(&format!("mx.site.{number}.base"), originals, &base)?;
        let head = self.parts.head.filter(|head| site.nodes.contains(&head.node));
        let mut chosen: Option<Bytes> = None;
        for (index, (format, alternatives)) in self.parts.formats.iter().enumerate().rev() {
            let title = format!("mx.site.{number}.{format}");
            let nodes = alternatives.nodes[number].iter().cloned();
            let nodes = nodes.map(|node| match head {
                Some(head) => reading(node, &head.x, &gathered(&head.x)),
                None => node,
            });
            let own = body(&title, nodes.collect(), &made(site.y, format))?;
            chosen = Some(match chosen {
                None => own,
                Some(rest) => {
                    let result = format!("{}.mx.choice.{index}", site.y);
                    let outputs = vec![result.clone()];
                    let node = conditional(
                        &format!("{title}.if"),
                        &names::format(index),
                        outputs,
                        own,
                        rest,
                    );
                    body(&format!("{title}.or"), vec![node], &result)?
                }
            });
        }
        let title = format!("mx.site.{number}");
        let then = chosen.ok_or("there is no format")?;
        Ok(conditional(&title, &names::site(number), vec![site.y.to_owned()], then, otherwise))
    }
}

fn gathered(x: &str) -> String {
    format!("{x}.mx.positions")
}

fn gather(x: &str) -> Node {
    let axis = Attribute {
        name: Some("axis".to_owned()),
        i: Some(1),
        r#type: Some(AttributeType::Int as i32),
        ..Attribute::default()
    };
    Node { attribute: vec![axis], ..simple("Gather", &[x, names::POSITIONS], &gathered(x)) }
}

/// The node with `to` in place of `from` among its inputs.
fn reading(node: Node, from: &str, to: &str) -> Node {
    let input = node.input.iter().map(|value| match value == from {
        true => to.to_owned(),
        false => value.clone(),
    });
    Node { input: input.collect(), ..node }
}
