//! Layers in bodies of If, Loop and Scan, and layers that are parts of a larger weight.

use super::*;
use crate::onnx::Graph;

fn with_body(name: &str, body: &ModelBuilder) -> Attribute {
    Attribute {
        name: Some(name.into()),
        g: Some(body.graph().into()),
        r#type: Some(AttributeType::Graph as i32),
        ..Attribute::default()
    }
}

fn product(inputs: &[&str], output: &str) -> ModelBuilder {
    ModelBuilder::new(18).node("MatMul", inputs, &[output]).output(
        output,
        DataType::Float,
        &["m", "6"],
    )
}

/// A merged decoder: an If whose branches read one weight, `t`, a turned `w` of the graph around them.
fn merged(then_branch: &ModelBuilder, else_branch: &ModelBuilder) -> ModelBuilder {
    ModelBuilder::new(18)
        .input("flag", DataType::Bool, &[])
        .input("x", DataType::Float, &["m", "40"])
        .floats("w", &[6, 40], &ramp(240))
        .node("Transpose", &["w"], &["t"])
        .node("If", &["flag"], &["logits"])
        .with(|node| {
            node.attribute.push(with_body("then_branch", then_branch));
            node.attribute.push(with_body("else_branch", else_branch));
        })
        .output("logits", DataType::Float, &["m", "6"])
}

fn bodies(model: &Model) -> Vec<Graph> {
    let ids = model.graph().nodes().map(|(id, _)| id);
    ids.flat_map(|id| model.graph().subgraphs(id).unwrap()).map(|(_, body)| body).collect()
}

fn body_ops(graph: &Graph) -> Vec<&str> {
    graph.nodes().map(|(_, node)| node.op_type.as_deref().unwrap()).collect()
}

#[test]
fn branches_share_one_packed_weight() {
    // Both branches use the same names, as merged decoders do.
    let branch = product(&["x", "t"], "y");
    let model = merged(&branch, &branch).model();
    let out = rewrite_with(&model, &mx(ElementFormat::Fp8E4M3));
    let names: Vec<_> = initializers(&out).into_keys().collect();
    assert_eq!(names, ["w.mx_codes", "w.mx_scales"]);
    // The Transpose has lost its readers.
    assert_eq!(ops(&out), ["If"]);
    for body in bodies(&out) {
        assert_eq!(body_ops(&body), ["MxMatMul"]);
        let (_, node) = body.nodes().next().unwrap();
        assert_eq!(node.input, ["x", "w.mx_codes", "w.mx_scales"]);
        assert_eq!((node.name.as_deref(), node.output[0].as_str()), (Some("node_y"), "y"));
    }
    let out = rewrite_with(&model, &options(Lowering::Int8));
    let names: Vec<_> = initializers(&out).into_keys().collect();
    assert_eq!(names, ["w.int8_codes", "w.int8_scales"]);
    // Once for both, where its codes are.
    assert_eq!(ops(&out), ["DequantizeLinear", "If"]);
    for body in bodies(&out) {
        assert_eq!(body_ops(&body), ["MatMul"]);
        assert_eq!(body.nodes().next().unwrap().1.input, ["x", "w.int8"]);
    }
}

#[test]
fn a_weight_that_one_branch_still_reads_stays() {
    let other = ModelBuilder::new(18).node("Mul", &["x", "w"], &["y"]).output(
        "y",
        DataType::Float,
        &["m", "6"],
    );
    let out = rewrite_with(
        &merged(&product(&["x", "t"], "y"), &other).model(),
        &mx(ElementFormat::Fp4E2M1),
    );
    assert_eq!(initializers(&out).into_keys().next().as_deref(), Some("w"));
    assert_eq!(ops(&out), ["If"]);
}

#[test]
fn equal_names_in_two_branches_are_two_weights() {
    let branch = |scale: f32| {
        let numbers: Vec<f32> = ramp(240).iter().map(|v| v * scale).collect();
        product(&["x", "own"], "y").floats("own", &[40, 6], &numbers)
    };
    let out =
        rewrite_with(&merged(&branch(1.0), &branch(-1.0)).model(), &mx(ElementFormat::Fp8E4M3));
    let codes = |name: &str| out.tensor(out.graph().initializer(name).unwrap()).unwrap().bytes;
    assert_ne!(codes("own.mx_codes"), codes("own.mx_codes_1"));
    for body in bodies(&out) {
        assert_eq!(body.initializers().count(), 0);
    }
    // The exporter left this one unused, and it stays.
    assert_eq!(ops(&out), ["Transpose", "If"]);
}

#[test]
fn a_body_in_a_body_is_reached() {
    let inner = product(&["x", "t"], "y");
    let outer = ModelBuilder::new(18)
        .node("If", &["flag"], &["z"])
        .with(|node| {
            node.attribute.push(with_body("then_branch", &inner));
            node.attribute.push(with_body("else_branch", &inner));
        })
        .output("z", DataType::Float, &["m", "6"]);
    let out = rewrite_with(&merged(&outer, &inner).model(), &mx(ElementFormat::Fp8E4M3));
    let [outer, inner] = &bodies(&out)[..] else { panic!("two branches") };
    assert_eq!((body_ops(outer), body_ops(inner)), (vec!["If"], vec!["MxMatMul"]));
    let (id, _) = outer.nodes().next().unwrap();
    for (_, body) in outer.subgraphs(id).unwrap() {
        assert_eq!(body_ops(&body), ["MxMatMul"]);
    }
    assert_eq!(ops(&out), ["If"]);
}

#[test]
fn the_head_of_a_branch_is_the_head() {
    let branch = product(&["x", "t"], "y");
    let options = RewriteOptions { include: vec![], ..mx(ElementFormat::Fp8E4M3) };
    let recipe = Recipe::new(&options).unwrap();
    let found = find_sites(&merged(&branch, &branch).model(), &recipe.filter().unwrap()).unwrap();
    let reasons: Vec<_> = found.skipped.iter().map(|skipped| skipped.reason.as_str()).collect();
    assert!(found.sites.is_empty() && reasons.len() == 2, "{found:?}");
    assert!(reasons[0].starts_with("the head") && reasons[0].contains("then_branch of If"));
}

#[test]
fn experts_of_a_stack_get_codes_of_their_own() {
    let model = ModelBuilder::new(18)
        .input("x", DataType::Float, &["m", "40"])
        .floats("stack", &[2, 40, 6], &ramp(480))
        .ints("axis", &[1], &[0])
        .node("Split", &["stack"], &["s0", "s1"])
        .with(|node| node.attribute.push(super::super::int("num_outputs", 2)))
        .node("Squeeze", &["s0", "axis"], &["e0"])
        .node("Squeeze", &["s1", "axis"], &["e1"])
        .node("MatMul", &["x", "e0"], &["y0"])
        .node("MatMul", &["x", "e1"], &["y1"])
        .output("y0", DataType::Float, &["m", "6"])
        .output("y1", DataType::Float, &["m", "6"])
        .model();
    let out = rewrite_with(&model, &mx(ElementFormat::Fp8E4M3));
    // The stack, its cuts and their axis are gone.
    assert_eq!(ops(&out), ["MxMatMul", "MxMatMul"]);
    assert_eq!(initializers(&out).len(), 4);
    for (expert, name) in ["stack.mx_codes", "stack.mx_codes_1"].iter().enumerate() {
        let alone = ModelBuilder::new(18)
            .input("x", DataType::Float, &["m", "40"])
            .floats("w", &[40, 6], &ramp(480)[expert * 240..][..240])
            .node("MatMul", &["x", "w"], &["y"])
            .output("y", DataType::Float, &["m", "6"]);
        let alone = rewrite_with(&alone.model(), &mx(ElementFormat::Fp8E4M3));
        let codes = |model: &Model, name: &str| {
            model.tensor(model.graph().initializer(name).unwrap()).unwrap().bytes
        };
        assert_eq!(codes(&out, name), codes(&alone, "w.mx_codes"));
    }
}
