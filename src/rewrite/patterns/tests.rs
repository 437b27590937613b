mod experts;
mod slices;

use std::collections::HashMap;

use super::*;
use crate::{
    graph::{ConstTensor, Scope, ValueType},
    onnx::proto::Attribute,
    rewrite::BiasShape,
};

/// A graph under construction: input `x`, output `y`.
#[derive(Default)]
struct Build {
    nodes: Vec<Node>,
    initializers: Vec<(String, ConstTensor)>,
    inputs: Vec<String>,
    outputs: Vec<String>,
    types: HashMap<String, ValueType>,
}

fn tensor(dtype: DataType, dims: &[i64]) -> ConstTensor {
    ConstTensor { dtype: Some(dtype), dims: dims.to_vec(), ints: None }
}

impl Build {
    fn new() -> Self {
        Self { inputs: vec!["x".into()], outputs: vec!["y".into()], ..Self::default() }
    }

    fn weight(self, name: &str, dims: &[i64]) -> Self {
        self.typed(name, DataType::Float, dims)
    }

    fn typed(mut self, name: &str, dtype: DataType, dims: &[i64]) -> Self {
        self.initializers.push((name.into(), tensor(dtype, dims)));
        self
    }

    /// Another input of the graph, of a known rank.
    fn input(mut self, name: &str, rank: usize) -> Self {
        self.inputs.push(name.into());
        self.types.insert(name.into(), ValueType { dtype: None, dims: Some(vec![None; rank]) });
        self
    }

    fn ints(mut self, name: &str, ints: &[i64]) -> Self {
        let dims = vec![ints.len() as i64];
        let dtype = Some(DataType::Int64);
        self.initializers.push((name.into(), ConstTensor { dtype, dims, ints: Some(ints.into()) }));
        self
    }

    fn node(mut self, op: &str, input: &[&str], output: &str) -> Self {
        let (domain, op) = op.split_once("::").unwrap_or(("", op));
        self.nodes.push(Node {
            op_type: Some(op.into()),
            domain: Some(domain.into()),
            name: Some(format!("node_{output}")),
            input: input.iter().map(|&v| v.into()).collect(),
            output: vec![output.into()],
            ..Node::default()
        });
        self
    }

    /// Sets an attribute of the last node: INT, INTS or FLOAT.
    fn int(self, name: &str, i: i64) -> Self {
        self.attribute(Attribute { name: Some(name.into()), i: Some(i), ..Default::default() })
    }

    fn list(self, name: &str, ints: &[i64]) -> Self {
        let ints = ints.to_vec();
        self.attribute(Attribute { name: Some(name.into()), ints, ..Default::default() })
    }

    fn float(self, name: &str, f: f32) -> Self {
        self.attribute(Attribute { name: Some(name.into()), f: Some(f), ..Default::default() })
    }

    fn attribute(mut self, attribute: Attribute) -> Self {
        self.nodes.last_mut().unwrap().attribute.push(attribute);
        self
    }

    fn view(self) -> GraphView {
        let Self { nodes, initializers, inputs, outputs, types } = self;
        let scope = Scope { nodes, inputs, outputs, initializers, types };
        GraphView::new(scope, None).unwrap()
    }

    /// The one Linear of the graph.
    fn linear(self) -> Linear {
        let mut found = self.matches();
        assert_eq!(found.len(), 1, "{found:?}");
        match found.remove(0) {
            Match::Linear(linear) => *linear,
            Match::Not(reason) => panic!("{reason}"),
        }
    }

    /// Why the one candidate of the graph is none.
    fn reason(self) -> String {
        let mut found = self.matches();
        assert_eq!(found.len(), 1, "{found:?}");
        match found.remove(0) {
            Match::Not(reason) => reason,
            Match::Linear(linear) => panic!("{linear:?}"),
        }
    }

    fn matches(self) -> Vec<Match> {
        let view = self.view();
        (0..view.nodes().len()).filter_map(|index| match_node(&view, index)).collect()
    }
}

#[test]
fn a_matmul_has_its_weight_as_k_by_n() {
    let linear = Build::new().weight("w", &[32, 48]).node("MatMul", &["x", "w"], "y").linear();
    assert_eq!((linear.n, linear.k, linear.layout), (48, 32, Layout::KN));
    assert_eq!((linear.x.as_str(), linear.y.as_str()), ("x", "y"));
    assert_eq!(linear.weight.root, "w");
    assert_eq!(linear.replaces, [0]);
}

#[test]
fn a_transposed_initializer_is_n_by_k() {
    for attribute in [true, false] {
        let mut build = Build::new().weight("w", &[48, 32]).node("Transpose", &["w"], "t");
        if attribute {
            build = build.list("perm", &[1, 0]);
        }
        let linear = build.node("MatMul", &["x", "t"], "y").linear();
        assert_eq!((linear.n, linear.k, linear.layout), (48, 32, Layout::NK));
        assert_eq!((linear.weight.root.as_str(), linear.operand.as_str()), ("w", "t"));
        assert_eq!(linear.weight.via, [0]);
        assert_eq!((linear.node, linear.replaces), (1, vec![1]));
    }
}

#[test]
fn the_orientation_of_a_square_weight_comes_from_the_operators() {
    let layouts = [
        Build::new().node("MatMul", &["x", "w"], "y"),
        Build::new().node("Transpose", &["w"], "t").node("MatMul", &["x", "t"], "y"),
        Build::new().node("Gemm", &["x", "w"], "y"),
        Build::new().node("Gemm", &["x", "w"], "y").int("transB", 1),
        Build::new().node("Transpose", &["w"], "t").node("Gemm", &["x", "t"], "y").int("transB", 1),
        Build::new().node("Transpose", &["w"], "s").node("Transpose", &["s"], "t").node(
            "MatMul",
            &["x", "t"],
            "y",
        ),
        Build::new().node("Transpose", &["w"], "t").list("perm", &[0, 1]).node(
            "MatMul",
            &["x", "t"],
            "y",
        ),
    ]
    .map(|build| build.weight("w", &[64, 64]).linear().layout);
    use Layout::{KN, NK};
    assert_eq!(layouts, [KN, NK, KN, NK, KN, KN, KN]);
}

#[test]
fn chains_that_keep_the_numbers_are_followed() {
    let linear = Build::new()
        .typed("w", DataType::Float16, &[1, 48, 32])
        .ints("axes", &[0])
        .ints("shape", &[0, -1])
        .node("Identity", &["w"], "a")
        .node("Cast", &["a"], "b")
        .int("to", DataType::Float as i64)
        .node("Squeeze", &["b", "axes"], "c")
        .node("Reshape", &["c", "shape"], "d")
        .node("Transpose", &["d"], "e")
        .node("MatMul", &["x", "e"], "y")
        .linear();
    assert_eq!((linear.n, linear.k, linear.layout), (48, 32, Layout::NK));
    let weight = linear.weight;
    assert_eq!((weight.dtype, weight.operand_dtype), (DataType::Float16, DataType::Float));
    assert_eq!(weight.via, [0, 1, 2, 3, 4]);
}

#[test]
fn chains_that_change_the_numbers_are_not() {
    let narrow = Build::new()
        .weight("w", &[32, 48])
        .node("Cast", &["w"], "a")
        .int("to", DataType::Float16 as i64)
        .node("MatMul", &["x", "a"], "y");
    assert!(narrow.reason().contains("Cast"));
    let regroup = Build::new()
        .weight("w", &[48, 32])
        .ints("shape", &[32, 48])
        .node("Reshape", &["w", "shape"], "a")
        .node("MatMul", &["x", "a"], "y");
    assert!(regroup.reason().contains("Reshape"));
    let scaled = Build::new()
        .weight("w", &[32, 48])
        .weight("s", &[1])
        .node("Mul", &["w", "s"], "a")
        .node("MatMul", &["x", "a"], "y");
    assert!(scaled.reason().contains("not folded"));
    let quantised = Build::new()
        .typed("w", DataType::Int8, &[32, 48])
        .weight("s", &[1])
        .node("DequantizeLinear", &["w", "s"], "a")
        .node("MatMul", &["x", "a"], "y");
    assert!(quantised.reason().contains("quantised already"));
}

#[test]
fn what_is_no_linear_says_why() {
    let attention = Build::new().node("Relu", &["x"], "a").node("MatMul", &["x", "a"], "y");
    assert!(attention.reason().contains("two dynamic operands"));
    let rotary = Build::new().weight("w", &[8, 8]).node("MatMul", &["w", "x"], "y");
    assert!(rotary.reason().contains("left operand"));
    let stacked = Build::new().weight("w", &[4, 8, 8]).node("MatMul", &["x", "w"], "y");
    assert!(stacked.reason().contains("rank 3"));
    let expert = Build::new()
        .weight("w", &[4, 8, 8])
        .node("Relu", &["x"], "i")
        .node("Gather", &["w", "i"], "b")
        .node("MatMul", &["x", "b"], "y");
    let reason = expert.reason();
    assert!(reason.contains("part") && reason.contains("rank 3"), "{reason}");
    let vector = Build::new().weight("w", &[8]).node("MatMul", &["x", "w"], "y");
    assert!(vector.reason().contains("rank 1"));
    let double =
        Build::new().typed("w", DataType::Double, &[8, 8]).node("MatMul", &["x", "w"], "y");
    assert!(double.reason().contains("Double"));
    let empty = Build::new().weight("w", &[8, 0]).node("MatMul", &["x", "w"], "y");
    assert!(empty.reason().contains("empty"));
    let negative = Build::new().weight("w", &[8, -8]).node("MatMul", &["x", "w"], "y");
    assert!(negative.reason().contains("empty"));
    let constant = Build::new().weight("w", &[8, 8]).node("MatMul", &["w", "w"], "y");
    assert!(constant.reason().contains("both operands"));
    let short = Build::new().weight("w", &[8, 8]).node("MatMul", &["x"], "y");
    assert!(short.reason().contains("1 inputs"));
    let fused =
        Build::new().weight("w", &[8, 24]).node("com.microsoft::Attention", &["x", "w"], "y");
    assert!(fused.reason().contains("com.microsoft.Attention"));
    let done = Build::new().weight("w", &[8, 24]).node("mx::MxMatMul", &["x", "w"], "y");
    assert!(done.reason().contains("already"));
}

#[test]
fn x_may_be_looked_up_in_a_constant() {
    let looked_up = Build::new()
        .weight("emb", &[100, 32])
        .weight("w", &[32, 48])
        .node("Gather", &["emb", "x"], "h")
        .node("MatMul", &["h", "w"], "y");
    assert_eq!(looked_up.linear().x, "h");
    let tied = Build::new()
        .weight("emb", &[100, 32])
        .node("Gather", &["emb", "x"], "h")
        .node("Transpose", &["emb"], "t")
        .node("MatMul", &["h", "t"], "y");
    assert_eq!(tied.linear().n, 100);
}

#[test]
fn an_overridable_weight_is_left_alone() {
    let mut build = Build::new().weight("w", &[32, 48]).node("MatMul", &["x", "w"], "y");
    build.inputs.push("w".into());
    assert!(build.reason().contains("graph input"));
}

#[test]
fn a_bias_is_found_on_either_side() {
    for inputs in [["a", "b"], ["b", "a"]] {
        let linear = Build::new()
            .weight("w", &[32, 48])
            .weight("b", &[48])
            .node("MatMul", &["x", "w"], "a")
            .node("Add", &inputs, "y")
            .linear();
        let bias = linear.bias.unwrap();
        assert_eq!((bias.value.as_str(), bias.shape, bias.beta), ("b", BiasShape::Vector, 1.0));
        assert_eq!(bias.constant, Some("b".into()));
        assert_eq!((linear.y.as_str(), linear.replaces), ("y", vec![0, 1]));
    }
}

#[test]
fn an_add_that_is_no_bias_stays() {
    let with = |dims: &[i64]| {
        Build::new().weight("w", &[32, 48]).weight("b", dims).node("MatMul", &["x", "w"], "a").node(
            "Add",
            &["a", "b"],
            "y",
        )
    };
    for dims in [&[1, 48][..], &[1], &[], &[48, 1], &[1, 1, 48]] {
        let linear = with(dims).linear();
        assert_eq!((linear.bias, linear.y.as_str()), (None, "a"), "{dims:?}");
    }
    let residual = Build::new().weight("w", &[32, 32]).node("MatMul", &["x", "w"], "a").node(
        "Add",
        &["a", "x"],
        "y",
    );
    assert_eq!(residual.linear().bias, None);
    let mut output = with(&[48]);
    output.outputs.push("a".into());
    assert_eq!(output.linear().bias, None, "the product is itself an output");
    let other_reader = with(&[48]).node("Relu", &["a"], "z");
    assert_eq!(other_reader.linear().bias, None);
    let twice = Build::new().weight("w", &[32, 48]).node("MatMul", &["x", "w"], "a").node(
        "Add",
        &["a", "a"],
        "y",
    );
    assert_eq!(twice.linear().bias, None);
    let half = Build::new()
        .weight("w", &[32, 48])
        .typed("b", DataType::Float16, &[48])
        .node("MatMul", &["x", "w"], "a")
        .node("Add", &["a", "b"], "y");
    assert_eq!(half.linear().bias, None, "not of X's type");
}

#[test]
fn gemm_variants() {
    let gemm = |c: &[i64]| {
        let inputs: &[&str] = if c == [-1] { &["x", "w"] } else { &["x", "w", "c"] };
        let build = Build::new().weight("w", &[48, 32]);
        let build = if c == [-1] { build } else { build.weight("c", c) };
        build.node("Gemm", inputs, "y").int("transB", 1)
    };
    let plain = gemm(&[-1]).float("alpha", 0.5).linear();
    assert_eq!((plain.n, plain.k, plain.layout), (48, 32, Layout::NK));
    assert_eq!((plain.alpha, plain.bias, plain.residual), (0.5, None, None));
    for (dims, shape) in [
        (&[48][..], BiasShape::Vector),
        (&[1, 48], BiasShape::Row),
        (&[], BiasShape::Scalar),
        (&[1], BiasShape::Scalar),
        (&[1, 1], BiasShape::Scalar),
    ] {
        let bias = gemm(dims).float("beta", 2.0).linear().bias.unwrap();
        assert_eq!((bias.shape, bias.beta), (shape, 2.0), "{dims:?}");
    }
    let full = gemm(&[7, 48]).linear();
    assert_eq!((full.bias, full.residual.as_deref()), (None, Some("c")));
    assert!(gemm(&[7, 48]).float("beta", 2.0).reason().contains("beta"));
    let ignored = gemm(&[7, 48]).float("beta", 0.0).linear();
    assert_eq!((ignored.bias, ignored.residual), (None, None));
    assert!(gemm(&[-1]).int("transA", 1).linear().transpose_x);
    assert!(!gemm(&[-1]).int("transA", 0).linear().transpose_x);
}

#[test]
fn a_dynamic_c_is_a_bias_only_when_its_shape_says_so() {
    let gemm = |dims: Option<Vec<Option<i64>>>| {
        let mut build = Build::new().weight("w", &[32, 48]).node("Relu", &["x"], "c");
        build.types.insert("c".into(), ValueType { dtype: Some(DataType::Float), dims });
        build.node("Gemm", &["x", "w", "c"], "y").linear()
    };
    let bias = gemm(Some(vec![Some(48)])).bias.unwrap();
    assert_eq!((bias.shape, bias.constant), (BiasShape::Vector, None));
    for dims in [None, Some(vec![None]), Some(vec![Some(1), Some(48)]), Some(vec![Some(1)])] {
        let linear = gemm(dims.clone());
        assert_eq!((linear.bias, linear.residual.as_deref()), (None, Some("c")), "{dims:?}");
    }
}

#[test]
fn fused_matmul_is_a_matmul_with_alpha() {
    let fused =
        || Build::new().weight("w", &[48, 32]).node("com.microsoft::FusedMatMul", &["x", "w"], "y");
    let linear = fused().int("transB", 1).float("alpha", 0.125).linear();
    assert_eq!((linear.n, linear.k, linear.layout, linear.alpha), (48, 32, Layout::NK, 0.125));
    assert!(fused().int("transA", 1).reason().contains("transA"));
}

#[test]
fn a_constant_node_can_hold_the_weight() {
    let value = crate::onnx::proto::Tensor {
        dims: vec![32, 48],
        data_type: Some(DataType::Float as i32),
        ..Default::default()
    };
    let linear = Build::new()
        .node("Constant", &[], "w")
        .attribute(Attribute { name: Some("value".into()), t: Some(value), ..Default::default() })
        .node("MatMul", &["x", "w"], "y")
        .linear();
    assert_eq!((linear.weight.root.as_str(), linear.n, linear.k), ("w", 48, 32));
}

#[test]
fn long_and_wide_chains_end() {
    // Longer than any chain that is followed, and a fan-in that doubles at every step.
    let mut long = Build::new().weight("w", &[32, 48]);
    let mut wide = Build::new().weight("w", &[32, 48]);
    let mut value = "w".to_owned();
    for step in 0..200 {
        let next = format!("v{step}");
        long = long.node("Identity", &[&value], &next);
        wide = wide.node("Add", &[&value, &value], &next);
        value = next;
    }
    assert_eq!(long.node("MatMul", &["x", &value], "y").matches().len(), 1);
    assert!(wide.node("MatMul", &["x", &value], "y").reason().contains("not folded"));
}
