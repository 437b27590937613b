//! Which values are rounded, on small graphs.

use std::collections::BTreeSet;

use super::{constants::to_bf16, round};
use crate::onnx::{
    DataType, Graph, Model, NodeId,
    proto::{Attribute, AttributeType},
    testing::{ModelBuilder, float_tensor},
};
use crate::rewrite::lower::{float, int};

/// 1 + 2^-9: no bfloat16 value.
const ODD: f32 = 1.001_953_1;

fn rounded(model: &ModelBuilder) -> Model {
    let out = round(&model.model()).unwrap();
    Model::from_bytes(out.to_bytes().unwrap(), None).unwrap()
}

/// Names of the values that a pair of Casts makes.
fn roundings(graph: &Graph) -> BTreeSet<String> {
    let casts: Vec<_> =
        graph.nodes().map(|(_, n)| n).filter(|n| n.op_type.as_deref() == Some("Cast")).collect();
    let to = |node: &crate::onnx::proto::Node| node.attribute[0].i.unwrap();
    let narrow: BTreeSet<&str> =
        casts.iter().filter(|n| to(n) == 16).map(|n| n.output[0].as_str()).collect();
    let wide = casts.iter().filter(|n| to(n) != 16 && narrow.contains(n.input[0].as_str()));
    wide.map(|n| n.output[0].clone()).collect()
}

fn expect(model: &Model, names: &[&str]) {
    let expected: BTreeSet<String> = names.iter().map(|&s| s.to_owned()).collect();
    assert_eq!(roundings(model.graph()), expected);
    // Every value is made before it is read.
    let graph = model.graph();
    let mut known: BTreeSet<&str> = graph.initializers().map(|t| t.name.as_str()).collect();
    known.extend(graph.inputs().map(|v| v.name.as_deref().unwrap()));
    for (_, node) in graph.nodes() {
        for input in node.input.iter().filter(|i| !i.is_empty()) {
            assert!(known.contains(input.as_str()), "{input} is read too early");
        }
        known.extend(node.output.iter().map(String::as_str));
    }
    assert!(graph.outputs().all(|v| known.contains(v.name.as_deref().unwrap())));
}

fn values(model: &Model, name: &str) -> Vec<f32> {
    model.tensor(model.graph().initializer(name).unwrap()).unwrap().to_f32().unwrap()
}

/// ids -> rows of `embed` [4, 2] -> `x`.
fn embedding() -> ModelBuilder {
    ModelBuilder::new(18)
        .input("ids", DataType::Int64, &["b", "s"])
        .floats("embed", &[4, 2], &[ODD; 8])
        .node("Gather", &["embed", "ids"], &["x"])
}

fn output(builder: ModelBuilder, name: &str) -> ModelBuilder {
    builder.output(name, DataType::Float, &["b", "s", "2"])
}

#[test]
fn values_round_half_to_even_and_stay_finite() {
    assert_eq!(to_bf16(ODD), 1.0);
    assert_eq!(to_bf16(1.0 + 3.0 / 256.0), 1.0 + 4.0 / 256.0);
    assert_eq!(to_bf16(f32::MIN), -3.389_531_4e38);
    assert_eq!(to_bf16(f32::NEG_INFINITY), f32::NEG_INFINITY);
    assert!(to_bf16(f32::NAN).is_nan());
}

#[test]
fn weights_are_rounded_in_place_and_moves_need_no_rounding() {
    let model = rounded(&output(
        embedding()
            .floats("w", &[2, 2], &[ODD; 4])
            .node("Transpose", &["x"], &["t"])
            .node("MatMul", &["t", "w"], &["h"])
            .node("Relu", &["h"], &["y"]),
        "y",
    ));
    expect(&model, &["h"]);
    assert_eq!(values(&model, "embed"), [1.0; 8]);
    assert_eq!(values(&model, "w"), [1.0; 4]);
}

#[test]
fn outputs_keep_name_and_type() {
    let model = rounded(&output(embedding().node("Exp", &["x"], &["logits"]), "logits"));
    expect(&model, &["logits"]);
    let output = model.graph().outputs().next().unwrap().clone();
    assert_eq!(output.r#type.unwrap().tensor_type.unwrap().elem_type, Some(1));
}

#[test]
fn rms_norm_is_one_rounding_and_the_weight_another() {
    let builder = embedding()
        .floats("two", &[], &[2.0])
        .floats("eps", &[], &[1e-5])
        .floats("w", &[2], &[ODD; 2])
        .node("Pow", &["x", "two"], &["p"])
        .node("ReduceMean", &["p"], &["mean"])
        .node("Add", &["mean", "eps"], &["e"])
        .node("Sqrt", &["e"], &["s"])
        .node("Reciprocal", &["s"], &["r"])
        .node("Mul", &["x", "r"], &["n"])
        .node("Mul", &["w", "n"], &["y"]);
    let model = rounded(&output(builder, "y"));
    expect(&model, &["n", "y"]);
    assert_eq!(values(&model, "w"), [1.0; 2]);
    // eps is a number of the formula.
    assert_eq!(values(&model, "eps"), [1e-5]);
}

#[test]
fn layer_norm_in_parts_rounds_once() {
    let builder = embedding()
        .floats("two", &[], &[2.0])
        .floats("eps", &[], &[1e-5])
        .floats("w", &[2], &[ODD; 2])
        .floats("b", &[2], &[ODD; 2])
        .node("ReduceMean", &["x"], &["mean"])
        .node("Sub", &["x", "mean"], &["c"])
        .node("Pow", &["c", "two"], &["p"])
        .node("ReduceMean", &["p"], &["var"])
        .node("Add", &["var", "eps"], &["e"])
        .node("Sqrt", &["e"], &["s"])
        .node("Div", &["c", "s"], &["n"])
        .node("Mul", &["n", "w"], &["g"])
        .node("Add", &["g", "b"], &["y"]);
    expect(&rounded(&output(builder, "y")), &["y"]);
}

#[test]
fn a_mean_of_something_else_is_rounded() {
    let builder = embedding().node("ReduceMean", &["x"], &["m"]).node("Mul", &["x", "m"], &["y"]);
    expect(&rounded(&output(builder, "y")), &["m", "y"]);
}

#[test]
fn bias_silu_and_gelu_are_one_operation() {
    let builder = embedding()
        .floats("w", &[2, 2], &[ODD; 4])
        .floats("b", &[2], &[ODD; 2])
        .floats("root", &[], &[std::f32::consts::SQRT_2])
        .floats("one", &[], &[1.0])
        .floats("half", &[], &[0.5])
        .node("MatMul", &["x", "w"], &["h"])
        .node("Add", &["h", "b"], &["a"])
        .node("Sigmoid", &["a"], &["g"])
        .node("Mul", &["a", "g"], &["silu"])
        .node("Div", &["silu", "root"], &["d"])
        .node("Erf", &["d"], &["e"])
        .node("Add", &["e", "one"], &["e1"])
        .node("Mul", &["silu", "e1"], &["xe"])
        .node("Mul", &["xe", "half"], &["y"]);
    let model = rounded(&output(builder, "y"));
    expect(&model, &["a", "silu", "y"]);
    assert_eq!(values(&model, "root"), [std::f32::consts::SQRT_2]);

    // A residual is no bias: the product is rounded first.
    let builder = embedding()
        .floats("w", &[2, 2], &[1.0; 4])
        .node("MatMul", &["x", "w"], &["h"])
        .node("Add", &["h", "x"], &["y"]);
    expect(&rounded(&output(builder, "y")), &["h", "y"]);
}

#[test]
fn positions_stay_exact_until_they_meet_activations() {
    let builder = embedding()
        .floats("inv_freq", &[2], &[ODD, 0.1])
        .node("Cast", &["ids"], &["pos"])
        .with(|node| node.attribute.push(int("to", 1)))
        .node("Unsqueeze", &["pos", "axis"], &["pos3"])
        .ints("axis", &[1], &[2])
        .node("Mul", &["pos3", "inv_freq"], &["angle"])
        .node("Cos", &["angle"], &["cos"])
        .node("Mul", &["x", "cos"], &["y"])
        .node("Mul", &["cos", "y"], &["z"]);
    let model = rounded(&output(builder, "z"));
    expect(&model, &["cos.bf16_rounded", "y", "z"]);
    assert_eq!(values(&model, "inv_freq"), [ODD, 0.1]);
    // An outer product with positions is no Linear either.
    let builder = embedding()
        .floats("inv_freq", &[1, 2], &[ODD, 0.1])
        .node("Cast", &["ids"], &["pos"])
        .with(|node| node.attribute.push(int("to", 1)))
        .node("MatMul", &["pos", "inv_freq"], &["angle"])
        .node("Add", &["x", "angle"], &["y"]);
    expect(&rounded(&output(builder, "y")), &["angle.bf16_rounded", "y"]);
}

#[test]
fn masks_stay_finite() {
    let lowest = f32::MIN;
    let builder = embedding()
        .floats("zero", &[], &[0.0])
        .floats("lowest", &[], &[lowest])
        .node("Cast", &["ids"], &["seen"])
        .with(|node| node.attribute.push(int("to", 9)))
        .node("Where", &["seen", "zero", "lowest"], &["mask"])
        .node("Add", &["x", "mask"], &["y"]);
    let model = rounded(&output(builder, "y"));
    expect(&model, &["mask.bf16_rounded", "y"]);
    assert_eq!(values(&model, "lowest"), [to_bf16(lowest)]);
    assert!(values(&model, "lowest")[0].is_finite());
    // The same in Constant nodes, whichever way they hold it.
    let builder = embedding()
        .node("Constant", &[], &["low"])
        .with(|node| node.attribute.push(float("value_float", lowest)))
        .node("Constant", &[], &["lower"])
        .with(|node| {
            node.attribute.push(Attribute {
                name: Some("value".into()),
                t: Some(float_tensor("", &[1, 2], &[lowest, ODD])),
                r#type: Some(AttributeType::Tensor as i32),
                ..Attribute::default()
            });
        })
        .node("Max", &["x", "low"], &["h"])
        .node("Add", &["h", "lower"], &["y"]);
    let model = rounded(&output(builder, "y"));
    let node = |id| model.graph().node(NodeId(id)).attribute[0].clone();
    assert_eq!(node(1).f, Some(to_bf16(lowest)));
    let tensor = node(2).t.unwrap().raw_data.unwrap();
    let expected: Vec<u8> = [to_bf16(lowest), 1.0].iter().flat_map(|v| v.to_le_bytes()).collect();
    assert_eq!(tensor, expected);
    // A selection among rounded values and a plain number is not exact.
    expect(&model, &["h", "y"]);
}

#[test]
fn float_inputs_are_rounded_on_entry_within_range() {
    let builder = ModelBuilder::new(18)
        .input("x", DataType::Float, &["s", "2"])
        .node("Transpose", &["x"], &["y"])
        .output("y", DataType::Float, &["2", "s"]);
    let model = rounded(&builder);
    expect(&model, &["x.bf16_rounded"]);
    let clip = model.graph().nodes().find(|(_, n)| n.op_type.as_deref() == Some("Clip"));
    assert_eq!(clip.unwrap().1.input[0], "x");
}

#[test]
fn a_constant_with_two_lives_is_copied() {
    let builder = embedding()
        .floats("table", &[2], &[ODD, 0.1])
        .node("Cos", &["table"], &["cos"])
        .node("Mul", &["x", "table"], &["h"])
        .node("Add", &["h", "cos"], &["y"]);
    let model = rounded(&output(builder, "y"));
    expect(&model, &["table.bf16_rounded", "cos.bf16_rounded", "h", "y"]);
    assert_eq!(values(&model, "table"), [ODD, 0.1]);
}

#[test]
fn sub_graphs_are_rounded_too() {
    let body = |op: &str, out: &str| {
        ModelBuilder::new(18)
            .node(op, &["x"], &[out])
            .output(out, DataType::Float, &["b", "s", "2"])
            .graph()
    };
    let branch = |name: &str, graph: Vec<u8>| Attribute {
        name: Some(name.into()),
        g: Some(graph.into()),
        r#type: Some(AttributeType::Graph as i32),
        ..Attribute::default()
    };
    let builder = embedding()
        .input("flag", DataType::Bool, &[])
        .node("If", &["flag"], &["h"])
        .with(|node| {
            node.attribute.push(branch("then_branch", body("Exp", "a")));
            node.attribute.push(branch("else_branch", body("Neg", "c")));
        })
        .node("Transpose", &["h"], &["y"]);
    let model = rounded(&output(builder, "y"));
    expect(&model, &[]);
    let (id, _) = model.graph().nodes().find(|(_, n)| n.op_type.as_deref() == Some("If")).unwrap();
    let bodies = model.graph().subgraphs(id).unwrap();
    assert_eq!(roundings(&bodies[0].1), ["a".to_owned()].into());
    assert_eq!(roundings(&bodies[1].1), BTreeSet::new());
}

#[test]
fn half_precision_casts_back_to_its_type_and_old_opsets_are_refused() {
    let mut builder = ModelBuilder::new(18)
        .input("x", DataType::Float16, &["s", "2"])
        .node("Exp", &["x"], &["y"])
        .output("y", DataType::Float16, &["s", "2"]);
    let model = rounded(&builder);
    expect(&model, &["x.bf16_rounded", "y"]);
    let last = model.graph().nodes().last().unwrap().1.clone();
    assert_eq!(last.attribute[0].i, Some(10));
    builder.opset = 12;
    let error = round(&builder.model()).unwrap_err().to_string();
    assert!(error.contains("bf16") && error.contains("opset 13"), "{error}");
}

#[test]
fn what_takes_the_place_of_an_output_is_declared_like_it() {
    let model = rounded(&output(embedding().node("Exp", &["x"], &["y"]), "y"));
    let graph = model.graph();
    let exact = graph.value_infos().find(|v| v.name.as_deref() == Some("y.bf16_exact"));
    let output = graph.outputs().find(|v| v.name.as_deref() == Some("y"));
    assert_eq!(exact.expect("declared").r#type, output.expect("it stays").r#type);
}
