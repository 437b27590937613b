//! Values that a bfloat16 run keeps in float32: the insides of what PyTorch computes as one operation
//! (or in float32 on purpose), where the exporter wrote several nodes.
//!
//! | what | float32 inside |
//! |---|---|
//! | RMSNorm | x^2, its mean, + eps, the root and its reciprocal |
//! | LayerNorm in parts | also x - mean, the quotient, and the product with the weight before the bias |
//! | Linear with a bias | the product before the Add of a constant vector |
//! | SiLU | sigmoid(x) in x * sigmoid(x) |
//! | GELU (erf) | everything between x and the last product |

use std::collections::{HashMap, HashSet};

use crate::onnx::{Graph, NodeId, proto::Node};

/// Who reads what in one graph.
pub(in crate::rewrite::lower) struct Readers<'a> {
    graph: &'a Graph,
    readers: HashMap<&'a str, Vec<NodeId>>,
    producers: HashMap<&'a str, NodeId>,
    /// Element counts and ranks of constants.
    constants: &'a HashMap<String, ConstantShape>,
}

/// Shape of a constant, as far as it decides its treatment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::rewrite::lower) struct ConstantShape {
    pub rank: usize,
    pub elements: u64,
    /// Extent of the first axis.
    pub first: u64,
}

impl ConstantShape {
    /// A number of the formula (eps, a factor), not a parameter: PyTorch keeps it in full precision.
    pub(in crate::rewrite::lower) fn is_scalar(self) -> bool {
        self.elements <= 1
    }
}

impl<'a> Readers<'a> {
    /// `captured` are values that sub-graphs read.
    pub(in crate::rewrite::lower) fn new(
        graph: &'a Graph,
        constants: &'a HashMap<String, ConstantShape>,
        captured: &'a [(NodeId, String)],
    ) -> Self {
        let mut readers: HashMap<&str, Vec<NodeId>> = HashMap::new();
        let mut producers = HashMap::new();
        for (id, node) in graph.nodes() {
            for input in &node.input {
                readers.entry(input).or_default().push(id);
            }
            for output in &node.output {
                producers.insert(output.as_str(), id);
            }
        }
        for (id, name) in captured {
            readers.entry(name).or_default().push(*id);
        }
        for output in graph.outputs() {
            // An output has a reader that no pattern matches.
            let name = output.name.as_deref().unwrap_or("");
            readers.entry(name).or_default().push(NodeId(usize::MAX));
        }
        Self { graph, readers, producers, constants }
    }

    fn op(&self, id: NodeId) -> &'a str {
        match id.0 {
            usize::MAX => "",
            _ => self.graph.node(id).op_type.as_deref().unwrap_or(""),
        }
    }

    fn output(&self, id: NodeId) -> &'a str {
        self.graph.node(id).output.first().map_or("", String::as_str)
    }

    fn readers(&self, value: &str) -> &[NodeId] {
        self.readers.get(value).map_or(&[], Vec::as_slice)
    }

    /// The only node that reads `value`, though it may read it twice.
    fn only_reader(&self, value: &str) -> Option<NodeId> {
        let readers = self.readers(value);
        let first = *readers.first()?;
        (first.0 != usize::MAX && readers.iter().all(|&id| id == first)).then_some(first)
    }

    fn producer(&self, value: &str) -> Option<NodeId> {
        self.producers.get(value).copied()
    }

    fn is_scalar(&self, value: &str) -> bool {
        self.constants.get(value).is_some_and(|shape| shape.is_scalar())
    }

    fn is_vector(&self, value: &str) -> bool {
        self.constants.get(value).is_some_and(|shape| shape.rank == 1 && !shape.is_scalar())
    }

    /// The input that is not `value`, of a node with two inputs.
    fn other(&self, id: NodeId, value: &str) -> Option<&'a str> {
        let [a, b] = &self.graph.node(id).input[..] else { return None };
        Some(if a == value { b } else { a })
    }

    /// A node that applies one operator to `value` alone, or to it and a scalar constant.
    fn is_simple(&self, id: NodeId, value: &str) -> bool {
        match self.op(id) {
            "Sqrt" | "Reciprocal" | "Identity" => true,
            "Add" | "Pow" | "Div" | "Mul" | "Max" => {
                self.other(id, value).is_some_and(|other| self.is_scalar(other))
            }
            "Clip" => {
                self.graph.node(id).input[1..].iter().all(|v| v.is_empty() || self.is_scalar(v))
            }
            _ => false,
        }
    }
}

/// Those of norms, SiLU and GELU: what a graph in another type keeps in float32.
pub(in crate::rewrite::lower) fn norms_and_activations<'a>(
    readers: &Readers<'a>,
) -> HashSet<&'a str> {
    let mut keep = HashSet::new();
    for (id, node) in readers.graph.nodes() {
        match node.op_type.as_deref().unwrap_or("") {
            "Sigmoid" => silu(readers, id, node, &mut keep),
            "Erf" => gelu(readers, id, &mut keep),
            "ReduceMean" => norm(readers, id, node, &mut keep),
            _ => {}
        }
    }
    keep
}

/// The values of one graph that stay in float32.
pub(in crate::rewrite::lower) fn find<'a>(readers: &Readers<'a>) -> HashSet<&'a str> {
    let mut keep = HashSet::new();
    for (id, node) in readers.graph.nodes() {
        match node.op_type.as_deref().unwrap_or("") {
            "MatMul" => linear_with_bias(readers, id, &mut keep),
            "Sigmoid" => silu(readers, id, node, &mut keep),
            "Erf" => gelu(readers, id, &mut keep),
            "ReduceMean" => norm(readers, id, node, &mut keep),
            _ => {}
        }
    }
    keep
}

fn linear_with_bias<'a>(readers: &Readers<'a>, id: NodeId, keep: &mut HashSet<&'a str>) {
    let product = readers.output(id);
    let Some(add) = readers.only_reader(product).filter(|&r| readers.op(r) == "Add") else {
        return;
    };
    if readers.other(add, product).is_some_and(|bias| readers.is_vector(bias)) {
        keep.insert(product);
    }
}

fn silu<'a>(readers: &Readers<'a>, id: NodeId, node: &Node, keep: &mut HashSet<&'a str>) {
    let gate = readers.output(id);
    let Some(mul) = readers.only_reader(gate).filter(|&r| readers.op(r) == "Mul") else { return };
    if readers.other(mul, gate) == node.input.first().map(String::as_str) {
        keep.insert(gate);
    }
}

/// x / sqrt 2 -> Erf -> + 1 -> * x -> * 0.5, the last two in either order.
fn gelu<'a>(readers: &Readers<'a>, erf: NodeId, keep: &mut HashSet<&'a str>) {
    let mut value = readers.output(erf);
    let mut inside = vec![value];
    let scaled = readers.graph.node(erf).input.first().map_or("", String::as_str);
    let scaling = readers.producer(scaled).filter(|&id| matches!(readers.op(id), "Div" | "Mul"));
    let x = match scaling {
        Some(id) if readers.only_reader(scaled) == Some(erf) => {
            inside.push(readers.output(id));
            readers.graph.node(id).input.iter().find(|input| !readers.is_scalar(input))
        }
        _ => None,
    };
    let Some(x) = x else { return };
    let mut products = 0;
    // The chain ends with the second of the two products, whose result is rounded.
    while let Some(reader) = readers.only_reader(value) {
        let Some(other) = readers.other(reader, value) else { return };
        match readers.op(reader) {
            "Add" if readers.is_scalar(other) => {}
            "Mul" if other == x || readers.is_scalar(other) => products += 1,
            // 0.5 * x may be computed beside the chain.
            "Mul" if is_half(readers, other, x) => products = 2,
            _ => return,
        }
        if products == 2 {
            keep.extend(inside);
            return;
        }
        value = readers.output(reader);
        inside.push(value);
    }
}

fn is_half(readers: &Readers<'_>, value: &str, x: &str) -> bool {
    let Some(id) = readers.producer(value).filter(|&id| readers.op(id) == "Mul") else {
        return false;
    };
    readers.other(id, x).is_some_and(|other| readers.is_scalar(other))
}

/// Follows a mean to the normalisation that it is part of.
fn norm<'a>(readers: &Readers<'a>, mean: NodeId, node: &'a Node, keep: &mut HashSet<&'a str>) {
    let input = node.input.first().map_or("", String::as_str);
    let value = readers.output(mean);
    if let Some(square) = squared(readers, input) {
        keep.insert(input);
        let centred = readers
            .producer(square)
            .is_some_and(|id| readers.op(id) == "Sub" && keep.contains(square));
        keep_statistic(readers, value, centred, keep);
        return;
    }
    // The mean that is taken off x, for a variance: LayerNorm.
    let centrings = readers.readers(value);
    let centres = |&id: &NodeId| readers.op(id) == "Sub" && readers.other(id, value) == Some(input);
    if centrings.iter().all(centres) {
        keep.extend(centrings.iter().map(|&id| readers.output(id)));
        keep.insert(value);
    }
}

/// The base of a square: the input of Pow(x, 2) or Mul(x, x).
fn squared<'a>(readers: &Readers<'a>, value: &str) -> Option<&'a str> {
    let id = readers.producer(value)?;
    let [a, b] = &readers.graph.node(id).input[..] else { return None };
    match readers.op(id) {
        "Pow" if readers.is_scalar(b) => Some(a),
        "Mul" if a == b => Some(a),
        _ => None,
    }
}

/// Keeps a mean of squares and what is computed from it alone, up to the node that normalises.
fn keep_statistic<'a>(
    readers: &Readers<'a>,
    mean: &'a str,
    centred: bool,
    keep: &mut HashSet<&'a str>,
) {
    let mut pending = vec![mean];
    while let Some(value) = pending.pop() {
        keep.insert(value);
        for &id in readers.readers(value).iter().filter(|id| id.0 != usize::MAX) {
            if readers.is_simple(id, value) {
                pending.push(readers.output(id));
            } else if centred && matches!(readers.op(id), "Mul" | "Div") {
                keep_affine(readers, readers.output(id), keep);
            }
        }
    }
}

/// Of LayerNorm's weight and bias only the last result is rounded.
fn keep_affine<'a>(readers: &Readers<'a>, normed: &'a str, keep: &mut HashSet<&'a str>) {
    let vector_op = |value: &str, op: &str| {
        let id = readers.only_reader(value).filter(|&id| readers.op(id) == op)?;
        readers.other(id, value).filter(|other| readers.is_vector(other)).map(|_| id)
    };
    let Some(mul) = vector_op(normed, "Mul") else { return };
    keep.insert(normed);
    let scaled = readers.output(mul);
    if vector_op(scaled, "Add").is_some() {
        keep.insert(scaled);
    }
}
