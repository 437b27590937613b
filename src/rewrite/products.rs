//! Attention's own products: of queries with keys, and of probabilities with values. Both operands are
//! activations, so nothing is stored differently; both are quantised along k in every run.
//!
//! Not every product of two activations is one (rotary embeddings are spelled so too): it is one of two
//! products with a Softmax between them.

use std::collections::HashSet;

use serde::{Serialize, Serializer};

use super::{
    PathSource, Role,
    paths::{Evidence, Signature, module_path},
    patterns::{self, Traced},
    recipe::SiteFormat,
    roles,
};
use crate::{
    graph::{GraphView, Source, Use, domain, float_attribute, int_attribute, op_name},
    onnx::proto::{DataType, Node},
};

/// One product of two activations: `Y[.., m, n] = alpha * A[.., m, k] * B[.., k, n]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Product {
    /// Which graph of the model's [tree](crate::graph::tree) it is in; 0 is the main graph.
    pub graph: usize,
    /// The node, as the number in its [`NodeId`](crate::onnx::NodeId).
    pub node: usize,
    /// Its name, which the replacement keeps. `#<index>` when it has none.
    pub node_name: String,
    /// Its operator: `MatMul` or `com.microsoft.FusedMatMul`.
    pub op: String,
    /// The attention module (`model.layers.0.self_attn`), when the model says one.
    pub module_path: Option<String>,
    /// Where the path was found.
    pub path_source: PathSource,
    /// Name of the value A.
    pub a: String,
    /// Name of the value B.
    pub b: String,
    /// Name of the result.
    pub y: String,
    /// B is [.., n, k].
    pub transpose_b: bool,
    /// Factor of the product.
    pub alpha: f32,
    /// Index of the [`Filter`](super::Filter) rule that chose it.
    pub rule: usize,
}

/// A product and what it becomes.
#[derive(Clone, Debug, PartialEq)]
pub struct PlannedProduct {
    /// The product.
    pub product: Product,
    /// Its format; the activation's is that of both operands.
    pub format: SiteFormat,
}

/// Finds the product that a node is, if it is attention's; `rule` and `graph` are 0.
pub(super) fn find(view: &GraphView, index: usize, signature: &Signature) -> Option<Product> {
    if !is_product(view, index) || !(before_softmax(view, index) || behind_softmax(view, index)) {
        return None;
    }
    let node = &view.nodes()[index];
    let op = node.op_type.as_deref().unwrap_or_default();
    let fused = op == "FusedMatMul";
    let node_name = view.node_name(index);
    let evidence = Evidence {
        metadata: &node.metadata_props,
        node: node.name.as_deref().unwrap_or_default(),
        op,
        ..Evidence::default()
    };
    let (module_path, path_source) = module_path(&evidence, signature);
    if module_path.as_deref().is_some_and(roles::in_feed_forward) {
        return None;
    }
    Some(Product {
        graph: 0,
        node: index,
        node_name,
        op: op_name(node),
        module_path,
        path_source,
        a: node.input[0].clone(),
        b: node.input[1].clone(),
        y: node.output[0].clone(),
        transpose_b: fused && int_attribute(node, "transB", 0) != 0,
        alpha: if fused { float_attribute(node, "alpha", 1.0) } else { 1.0 },
        rule: 0,
    })
}

/// True for a product of two activations that the operator can compute.
fn is_product(view: &GraphView, index: usize) -> bool {
    let node = &view.nodes()[index];
    let fused = match (domain(node), node.op_type.as_deref()) {
        ("", Some("MatMul")) => false,
        ("com.microsoft", Some("FusedMatMul")) => true,
        _ => return false,
    };
    let ([a, b], Some(y)) = (&node.input[..], node.output.first()) else { return false };
    let turned = ["transA", "transBatchA", "transBatchB"];
    let turned = turned.iter().any(|name| int_attribute(node, name, 0) != 0);
    let alpha = if fused { float_attribute(node, "alpha", 1.0) } else { 1.0 };
    let float = |value: &str| match view.value_type(value).map(|known| known.dtype) {
        Some(Some(dtype)) => {
            matches!(dtype, DataType::Float | DataType::Float16 | DataType::Bfloat16)
        }
        _ => true,
    };
    let dynamic = |value: &str| {
        !value.is_empty()
            && !view.is_constant(value)
            && matches!(patterns::trace(view, value), Traced::Dynamic)
    };
    !y.is_empty()
        && !turned
        && alpha.is_finite()
        && [a, b, y].into_iter().all(|value| float(value))
        && dynamic(a)
        && dynamic(b)
}

fn has_softmax(node: &Node) -> bool {
    // Also com.microsoft's BiasSoftmax.
    matches!(domain(node), "" | "com.microsoft")
        && node.op_type.as_deref().is_some_and(|op| op == "Softmax" || op == "BiasSoftmax")
}

/// Operators that scale, mask, cast or reshape, and whose operands that may hold the scores.
fn passes(node: &Node, slot: usize) -> bool {
    if !domain(node).is_empty() {
        return false;
    }
    match node.op_type.as_deref().unwrap_or_default() {
        "Identity" | "Cast" | "Reshape" | "Squeeze" | "Unsqueeze" | "Slice" | "Transpose"
        | "Tanh" | "Clip" | "Dropout" | "Expand" => slot == 0,
        "Mul" | "Div" | "Add" | "Sub" | "Max" | "Min" | "Where" | "Concat" => true,
        _ => false,
    }
}

/// Most nodes between a product and a Softmax that are looked at: what scales and masks is a few.
const REACH: usize = 128;

/// True for the product of queries and keys: a Softmax takes its result, and another product that one's.
fn before_softmax(view: &GraphView, index: usize) -> bool {
    let softmax = |node: usize, slot| slot == 0 && has_softmax(&view.nodes()[node]);
    followed(view, index, softmax)
        .is_some_and(|softmax| followed(view, softmax, |node, _| is_product(view, node)).is_some())
}

/// True for the product of probabilities and values: an operand is what a Softmax made of a product.
/// A router's Softmax, by whose result experts are summed, is of a Linear.
fn behind_softmax(view: &GraphView, index: usize) -> bool {
    let softmax = |node: usize| has_softmax(&view.nodes()[node]);
    preceded(view, index, softmax)
        .is_some_and(|softmax| preceded(view, softmax, |node| is_product(view, node)).is_some())
}

/// The first node that `wanted` takes among those that read the result of `from`, scaled and masked.
fn followed(view: &GraphView, from: usize, wanted: impl Fn(usize, usize) -> bool) -> Option<usize> {
    let (mut seen, mut pending) = (HashSet::new(), vec![from]);
    while let Some(index) = pending.pop() {
        let value = view.nodes()[index].output.first()?;
        for reader in view.uses(value).iter().take(REACH) {
            let Use::Node { index, slot: Some(slot) } = *reader else { continue };
            if wanted(index, slot) {
                return Some(index);
            }
            let more = seen.len() < REACH && passes(&view.nodes()[index], slot);
            if more && seen.insert(index) {
                pending.push(index);
            }
        }
    }
    None
}

/// The same of those that made the operands of `from`. A Softmax has one.
fn preceded(view: &GraphView, from: usize, wanted: impl Fn(usize) -> bool) -> Option<usize> {
    let (mut seen, mut pending) = (HashSet::new(), vec![(from, true)]);
    while let Some((index, first)) = pending.pop() {
        let node = &view.nodes()[index];
        for (slot, value) in node.input.iter().enumerate().take(REACH) {
            let Some(Source::Node { index, .. }) = view.source(value) else { continue };
            if !first && !passes(node, slot) {
                continue;
            }
            if wanted(index) {
                return Some(index);
            }
            if seen.len() < REACH && seen.insert(index) {
                pending.push((index, false));
            }
        }
    }
    None
}

/// The JSON of one product.
#[derive(Serialize)]
struct Record<'a> {
    node: &'a str,
    op: &'a str,
    module_path: Option<&'a str>,
    path_source: PathSource,
    role: Role,
    a_format: &'a str,
    b_format: &'a str,
    block_size: Option<usize>,
}

impl Serialize for PlannedProduct {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Product { node_name, op, module_path, path_source, .. } = &self.product;
        let format = self.format.activation_name();
        Record {
            node: node_name,
            op,
            module_path: module_path.as_deref(),
            path_source: *path_source,
            role: Role::Product,
            a_format: format,
            b_format: format,
            block_size: self.format.block_size(),
        }
        .serialize(serializer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        graph::{ConstTensor, Scope, ValueType},
        onnx::proto::{Attribute, DataType},
    };

    /// One line a node, `op a b -> y`; `w` is a constant, `q`, `k`, `v`, `mask` are inputs.
    fn view(lines: &[&str]) -> GraphView {
        let nodes = lines.iter().enumerate().map(|(index, line)| {
            let (left, output) = line.split_once(" -> ").unwrap();
            let mut words = left.split(' ');
            let (domain, op) =
                words.next().map(|op| op.split_once("::").unwrap_or(("", op))).unwrap();
            Node {
                op_type: Some(op.to_owned()),
                domain: Some(domain.to_owned()),
                name: Some(format!("/model/layers.0/self_attn/{op}_{index}")),
                input: words.map(str::to_owned).collect(),
                output: vec![output.to_owned()],
                ..Node::default()
            }
        });
        let mut nodes: Vec<Node> = nodes.collect();
        for node in nodes.iter_mut().filter(|n| n.domain.as_deref() == Some("com.microsoft")) {
            node.attribute = vec![
                Attribute { name: Some("transB".into()), i: Some(1), ..Default::default() },
                Attribute { name: Some("alpha".into()), f: Some(0.125), ..Default::default() },
            ];
        }
        let w = ConstTensor { dtype: Some(DataType::Float), dims: vec![4, 4], ints: None };
        let scope = Scope {
            nodes,
            initializers: vec![("w".to_owned(), w)],
            inputs: ["q", "k", "v", "mask"].map(str::to_owned).to_vec(),
            outputs: vec!["y".to_owned()],
            ..Scope::default()
        };
        GraphView::new(scope, None).unwrap()
    }

    fn found(lines: &[&str]) -> Vec<Product> {
        let view = view(lines);
        (0..lines.len()).filter_map(|i| find(&view, i, &Signature::new())).collect()
    }

    #[test]
    fn both_products_of_attention_are_found() {
        let products = found(&[
            "Transpose k -> kt",
            "MatMul q kt -> s",
            "Mul s w -> scaled",
            "Add scaled mask -> masked",
            "Softmax masked -> p32",
            "Cast p32 -> p",
            "MatMul p v -> o",
            "MatMul o w -> y",
        ]);
        let values: Vec<_> = products.iter().map(|p| (&*p.a, &*p.b, &*p.y)).collect();
        assert_eq!(values, [("q", "kt", "s"), ("p", "v", "o")]);
        let path = products[0].module_path.as_deref();
        assert_eq!((path, products[0].op.as_str()), (Some("model.layers.0.self_attn"), "MatMul"));
    }

    #[test]
    fn factor_and_transposition_of_a_fused_product_are_kept() {
        let lines = ["com.microsoft::FusedMatMul q k -> s", "Softmax s -> p", "MatMul p v -> y"];
        let products = found(&lines);
        assert_eq!((products[0].transpose_b, products[0].alpha), (true, 0.125));
        // Turned otherwise, or by a factor that the operator refuses, it is left alone.
        for (attribute, name, f) in [(0, "transA", 1.0), (1, "alpha", f32::INFINITY)] {
            let mut nodes = view(&lines).nodes().to_vec();
            nodes[0].attribute[attribute].name = Some(name.into());
            nodes[0].attribute[attribute].f = Some(f);
            assert_eq!(find(&again(nodes), 0, &Signature::new()), None, "{name}");
        }
    }

    /// The same graph with other nodes.
    fn again(nodes: Vec<Node>) -> GraphView {
        let inputs = ["q", "k", "v", "mask"].map(str::to_owned).to_vec();
        let scope = Scope { nodes, inputs, outputs: vec!["y".into()], ..Scope::default() };
        GraphView::new(scope, None).unwrap()
    }

    #[test]
    fn other_products_are_not() {
        for lines in [
            // Rotary angles.
            &["MatMul q k -> f", "Concat f f -> e", "Cos e -> y"][..],
            // A Linear before a Softmax, by whose result experts are summed: a router.
            &["MatMul q w -> g", "Softmax g -> p", "MatMul p v -> y"],
            // Similarities of two things, of which nothing is summed.
            &["MatMul q k -> s", "Softmax s -> y"],
            // The Softmax is behind another product.
            &["MatMul q k -> a", "MatMul a w -> b", "Softmax b -> p", "MatMul p v -> y"],
            // A Gather is no scaling.
            &["MatMul q k -> a", "Gather v a -> b", "Softmax b -> p", "MatMul p v -> y"],
        ] {
            assert_eq!(found(lines), [], "{lines:?}");
        }
    }

    #[test]
    fn products_of_other_types_and_of_experts_are_left_alone() {
        let lines = ["MatMul q k -> s", "Softmax s -> p", "MatMul p v -> y"];
        assert_eq!(found(&lines).len(), 2);
        let mut nodes = view(&lines).nodes().to_vec();
        nodes[2].name = Some("/model/layers.0/mlp/MatMul".into());
        assert_eq!(find(&again(nodes.clone()), 2, &Signature::new()), None);
        let double = ValueType { dtype: Some(DataType::Double), dims: None };
        let scope = Scope {
            nodes,
            inputs: ["q", "k", "v"].map(str::to_owned).to_vec(),
            outputs: vec!["y".into()],
            types: [("q".to_owned(), double)].into(),
            ..Scope::default()
        };
        let view = GraphView::new(scope, None).unwrap();
        assert_eq!(find(&view, 0, &Signature::new()), None);
    }
}
