//! Attention's own products: of queries with keys, and of probabilities with values. Both operands are
//! activations, so nothing is stored differently; both are quantised along k in every run.
//!
//! Not every product of two activations is one (rotary embeddings are spelled so too): its result
//! becomes a Softmax's input, or its operand is what a Softmax made.

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
    onnx::proto::Node,
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
    let node = &view.nodes()[index];
    let op = node.op_type.as_deref().unwrap_or_default();
    let fused = match (domain(node), op) {
        ("", "MatMul") => false,
        ("com.microsoft", "FusedMatMul") => true,
        _ => return None,
    };
    let [a, b] = &node.input[..] else { return None };
    let dynamic = |value: &str| {
        !value.is_empty()
            && !patterns::is_constant(view, value)
            && matches!(patterns::trace(view, value), Traced::Dynamic)
    };
    let turned = ["transA", "transBatchA", "transBatchB"];
    if !dynamic(a) || !dynamic(b) || turned.iter().any(|name| int_attribute(node, name, 0) != 0) {
        return None;
    }
    let y = node.output.first().filter(|y| !y.is_empty())?;
    if !becomes_softmax(view, y) && !is_softmax(view, a) && !is_softmax(view, b) {
        return None;
    }
    let node_name = view.node_name(index);
    let evidence = Evidence {
        metadata: &node.metadata_props,
        node: node.name.as_deref().unwrap_or_default(),
        op,
        ..Evidence::default()
    };
    let (module_path, path_source) = module_path(&evidence, signature);
    // Experts' results are summed by a product with a router's Softmax in some models.
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
        a: a.clone(),
        b: b.clone(),
        y: y.clone(),
        transpose_b: fused && int_attribute(node, "transB", 0) != 0,
        alpha: if fused { float_attribute(node, "alpha", 1.0) } else { 1.0 },
        rule: 0,
    })
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

/// True when `value`, scaled and masked, is what a Softmax takes.
fn becomes_softmax(view: &GraphView, value: &str) -> bool {
    let (mut seen, mut values) = (HashSet::new(), vec![value]);
    while let Some(value) = values.pop() {
        for reader in view.uses(value) {
            let Use::Node { index, slot: Some(slot) } = *reader else { continue };
            let node = &view.nodes()[index];
            if has_softmax(node) && slot == 0 {
                return true;
            }
            if passes(node, slot) && seen.insert(index) {
                values.extend(node.output.first().map(String::as_str));
            }
        }
    }
    false
}

/// True when `value` is what a Softmax made, cast, masked or with a part cut off.
fn is_softmax(view: &GraphView, value: &str) -> bool {
    let (mut seen, mut values) = (HashSet::new(), vec![value]);
    while let Some(value) = values.pop() {
        let Some(Source::Node { index, .. }) = view.source(value) else { continue };
        let node = &view.nodes()[index];
        if has_softmax(node) {
            return true;
        }
        if seen.insert(index) {
            let inputs = node.input.iter().enumerate().filter(|(slot, _)| passes(node, *slot));
            values.extend(inputs.map(|(_, input)| input.as_str()));
        }
    }
    false
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
        graph::{ConstTensor, Scope},
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
        let products = found(&["com.microsoft::FusedMatMul q k -> s", "Softmax s -> y"]);
        assert_eq!((products[0].transpose_b, products[0].alpha), (true, 0.125));
        // Turned otherwise it is left alone.
        let mut lines = view(&["com.microsoft::FusedMatMul q k -> s", "Softmax s -> y"]);
        assert!(find(&lines, 0, &Signature::new()).is_some());
        lines = {
            let mut nodes = lines.nodes().to_vec();
            nodes[0].attribute[0].name = Some("transA".into());
            let scope = Scope {
                nodes,
                inputs: ["q", "k"].map(str::to_owned).to_vec(),
                outputs: vec!["y".to_owned()],
                ..Scope::default()
            };
            GraphView::new(scope, None).unwrap()
        };
        assert_eq!(find(&lines, 0, &Signature::new()), None);
    }

    #[test]
    fn other_products_are_not() {
        for lines in [
            // Rotary angles.
            &["MatMul q k -> f", "Concat f f -> e", "Cos e -> y"][..],
            // A Linear before a Softmax: a router.
            &["MatMul q w -> g", "Softmax g -> y"],
            // The Softmax is behind another product.
            &["MatMul q k -> a", "MatMul a w -> b", "Softmax b -> y"],
            // Scores as a Softmax's axis would be no scores.
            &["MatMul q k -> a", "Gather v a -> b", "Softmax b -> y"],
        ] {
            assert_eq!(found(lines), [], "{lines:?}");
        }
    }

    #[test]
    fn a_router_that_sums_experts_is_none() {
        let lines = ["Softmax q -> p", "MatMul p v -> y"];
        assert_eq!(found(&lines).len(), 1);
        let mut nodes = view(&lines).nodes().to_vec();
        nodes[1].name = Some("/model/layers.0/mlp/MatMul".into());
        let inputs = ["q", "v"].map(str::to_owned).to_vec();
        let scope = Scope { nodes, inputs, outputs: vec!["y".into()], ..Scope::default() };
        let view = GraphView::new(scope, None).unwrap();
        assert_eq!(find(&view, 1, &Signature::new()), None);
    }
}
