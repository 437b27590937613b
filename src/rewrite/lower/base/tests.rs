//! Which values change their type, on small graphs.

use std::collections::BTreeMap;

use super::convert;
use crate::onnx::{
    DataType, Model,
    proto::{Attribute, AttributeType, Node},
    testing::{ModelBuilder, float_tensor, tensor},
};
use crate::rewrite::{BaseDtype, Notes, base::uncast, lower::int};

fn converted(builder: &ModelBuilder, base: BaseDtype) -> Model {
    let model = builder.model();
    let out = convert(&model, &model, base, &Notes::default()).unwrap();
    let out = Model::from_bytes(out.to_bytes().unwrap(), None).unwrap();
    // Every value is made before it is read, and only once.
    let graph = out.graph();
    let mut known: Vec<&str> = graph.initializers().map(|t| t.name.as_str()).collect();
    known.extend(graph.inputs().map(|v| v.name.as_deref().unwrap()));
    for (_, node) in graph.nodes() {
        for input in node.input.iter().filter(|i| !i.is_empty()) {
            assert!(known.contains(&input.as_str()), "{input} is read too early");
        }
        for output in node.output.iter().filter(|o| !o.is_empty()) {
            assert!(!known.contains(&output.as_str()), "{output} is made twice");
            known.push(output);
        }
    }
    assert!(graph.outputs().all(|v| known.contains(&v.name.as_deref().unwrap())));
    out
}

fn named<'a>(model: &'a Model, op: &str) -> Vec<&'a Node> {
    let nodes = model.graph().nodes().map(|(_, node)| node);
    nodes.filter(|node| node.op_type.as_deref() == Some(op)).collect()
}

/// Operators with their inputs, Casts as `value>type`.
fn lines(model: &Model) -> Vec<String> {
    let line = |node: &Node| match node.op_type.as_deref().unwrap() {
        "Cast" => format!("{}>{}={}", node.input[0], node.attribute[0].i.unwrap(), node.output[0]),
        op => format!("{op}({})={}", node.input.join(","), node.output.join(",")),
    };
    model.graph().nodes().map(|(_, node)| line(node)).collect()
}

fn stored(model: &Model) -> BTreeMap<&str, DataType> {
    let tensors = model.graph().initializers();
    tensors.map(|t| (t.name.as_str(), t.data_type().unwrap())).collect()
}

fn values(model: &Model, name: &str) -> Vec<f32> {
    model.tensor(model.graph().initializer(name).unwrap()).unwrap().to_f32().unwrap()
}

/// ids -> rows of `embed` [4, 2] -> `x`.
fn embedding(opset: i64) -> ModelBuilder {
    ModelBuilder::new(opset)
        .input("ids", DataType::Int64, &["b", "s"])
        .floats("embed", &[4, 2], &[1.001_953_1; 8])
        .node("Gather", &["embed", "ids"], &["x"])
}

fn output(builder: ModelBuilder, name: &str) -> ModelBuilder {
    builder.output(name, DataType::Float, &["b", "s", "2"])
}

#[test]
fn weights_are_stored_and_the_output_keeps_its_type() {
    let builder = output(
        embedding(18).floats("w", &[2, 2], &[1e-3; 4]).node("MatMul", &["x", "w"], &["logits"]),
        "logits",
    );
    let mut builder = builder;
    builder.value_infos.push(crate::onnx::testing::value("x", DataType::Float, &["b", "s", "2"]));
    let out = converted(&builder, BaseDtype::Bf16);
    let expected = ["Gather(embed,ids)=x", "MatMul(x,w)=logits.bf16", "logits.bf16>1=logits"];
    assert_eq!(lines(&out), expected);
    assert!(stored(&out).values().all(|&t| t == DataType::Bfloat16));
    assert_eq!(values(&out, "embed"), [1.0; 8]);
    assert_eq!(out.graph().value_infos().count(), 0);
    assert_eq!(uncast(out.graph(), "logits"), Some(("logits.bf16".into(), DataType::Bfloat16)));
    assert_eq!(uncast(builder.model().graph(), "logits"), None);
    assert_eq!(converted(&builder, BaseDtype::F32).to_bytes().unwrap(), builder.bytes());
}

#[test]
fn what_has_no_kernel_computes_in_float32() {
    let builder = output(embedding(18).node("Reciprocal", &["x"], &["r"]), "y");
    let builder = builder.node("Relu", &["r"], &["y"]);
    let out = converted(&builder, BaseDtype::Bf16);
    let expected = [
        "Gather(embed,ids)=x",
        "x>1=x.fp32",
        "Reciprocal(x.fp32)=r",
        "r>16=r.bf16",
        "Relu(r.bf16)=y.bf16",
        "y.bf16>1=y",
    ];
    assert_eq!(lines(&out), expected);
    let out = converted(&builder, BaseDtype::F16);
    assert_eq!(named(&out, "Cast").len(), 1, "{:?}", lines(&out));
}

#[test]
fn a_norm_computes_in_float32() {
    let builder = output(
        embedding(18)
            .floats("two", &[], &[2.0])
            .floats("eps", &[], &[1e-5])
            .floats("w", &[2], &[0.5; 2])
            .node("Pow", &["x", "two"], &["p"])
            .node("ReduceMean", &["p"], &["m"])
            .node("Add", &["m", "eps"], &["e"])
            .node("Sqrt", &["e"], &["s"])
            .node("Reciprocal", &["s"], &["r"])
            .node("Mul", &["x", "r"], &["n"])
            .node("Mul", &["w", "n"], &["y"]),
        "y",
    );
    let out = converted(&builder, BaseDtype::F16);
    let lines = lines(&out);
    assert!(lines.contains(&"Mul(x.fp32,r)=n".into()), "{lines:?}");
    assert!(lines.contains(&"Mul(w,n.fp16)=y.fp16".into()), "{lines:?}");
    let types = stored(&out);
    assert_eq!((types["eps"], types["w"]), (DataType::Float, DataType::Float16));
}

#[test]
fn angles_stay_and_masks_stay_finite() {
    let builder = output(
        embedding(18)
            .floats("lowest", &[], &[f32::MIN])
            .floats("zero", &[], &[0.0])
            .floats("rates", &[1, 2], &[1.0, 1e-3])
            .node("Cast", &["ids"], &["positions"])
            .with(|node| node.attribute.push(int("to", 1)))
            .node("Mul", &["positions", "rates"], &["angles"])
            .node("Cos", &["angles"], &["cos"])
            .node("Cast", &["ids"], &["seen"])
            .with(|node| node.attribute.push(int("to", 9)))
            .node("Where", &["seen", "zero", "lowest"], &["mask"])
            .node("Mul", &["x", "cos"], &["turned"])
            .node("Add", &["turned", "mask"], &["y"]),
        "y",
    );
    let out = converted(&builder, BaseDtype::F16);
    let lines = lines(&out);
    assert!(lines.contains(&"cos>10=cos.fp16".into()), "{lines:?}");
    assert!(lines.contains(&"Mul(positions,rates)=angles".into()), "{lines:?}");
    let clip = named(&out, "Clip")[0];
    assert_eq!(clip.input[0], "mask");
    let bounds: Vec<f32> =
        named(&out, "Constant").iter().map(|n| n.attribute[0].f.unwrap()).collect();
    assert_eq!(bounds, [-65504.0, 65504.0]);
    assert_eq!(stored(&out)["lowest"], DataType::Float);
    // A constant that only the model reads is limited where it is stored.
    let direct = output(
        embedding(18).floats("lowest", &[], &[f32::MIN]).node("Add", &["x", "lowest"], &["y"]),
        "y",
    );
    let out = converted(&direct, BaseDtype::Bf16);
    assert_eq!(values(&out, "lowest"), [-3.389_531_4e38]);
    assert!(named(&out, "Clip").is_empty());
}

#[test]
fn a_factor_that_the_type_cannot_hold_is_applied_in_float32() {
    let scaled = |factor: f32| {
        output(embedding(18).floats("f", &[], &[factor]).node("Mul", &["x", "f"], &["y"]), "y")
    };
    let out = converted(&scaled(0.102_062_07), BaseDtype::Bf16);
    assert_eq!(lines(&out)[1..], ["x>1=x.fp32", "Mul(x.fp32,f)=y"]);
    let out = converted(&scaled(0.125), BaseDtype::Bf16);
    assert_eq!(lines(&out)[1..], ["Mul(x,f)=y.bf16", "y.bf16>1=y"]);
}

#[test]
fn a_bfloat16_model_is_widened_but_for_its_interface() {
    let ones = [0x80u8, 0x3f].repeat(8);
    let mut builder = ModelBuilder::new(18)
        .input("ids", DataType::Int64, &["s"])
        .node("Gather", &["embed", "ids"], &["x"])
        .node("Cast", &["x"], &["wide"])
        .with(|node| node.attribute.push(int("to", 1)))
        .node("Exp", &["wide"], &["e"])
        .node("Cast", &["e"], &["narrow"])
        .with(|node| node.attribute.push(int("to", 16)))
        .node("Relu", &["narrow"], &["y"])
        .output("y", DataType::Bfloat16, &["s", "2"]);
    builder.initializers.push(tensor("embed", DataType::Bfloat16, &[4, 2], ones));
    let out = converted(&builder, BaseDtype::F32);
    let expected = [
        "Gather(embed,ids)=x",
        "x>1=wide",
        "Exp(wide)=e",
        "e>1=narrow",
        "Relu(narrow)=y.fp32",
        "y.fp32>16=y",
    ];
    assert_eq!(lines(&out), expected);
    assert_eq!(values(&out, "embed"), [1.0; 8]);
    let out = converted(&builder, BaseDtype::F16);
    assert!(lines(&out).contains(&"e>10=narrow".into()));
    // In its own type nothing changes.
    assert_eq!(converted(&builder, BaseDtype::Bf16).to_bytes().unwrap(), builder.bytes());
}

#[test]
fn constants_of_nodes_and_of_both_kinds_of_readers() {
    let builder = output(
        embedding(18)
            .node("Constant", &[], &["c"])
            .with(|node| {
                node.attribute.push(Attribute {
                    name: Some("value".into()),
                    t: Some(float_tensor("", &[2], &[0.5, 3.0])),
                    r#type: Some(AttributeType::Tensor as i32),
                    ..Attribute::default()
                });
            })
            .floats("both", &[2], &[0.25; 2])
            .node("Mul", &["x", "c"], &["a"])
            .node("Mul", &["a", "both"], &["y"])
            .node("Exp", &["both"], &["z"])
            .output("z", DataType::Float, &["2"]),
        "y",
    );
    let out = converted(&builder, BaseDtype::Bf16);
    let constant = named(&out, "Constant")[0].attribute[0].t.as_ref().unwrap();
    assert_eq!(constant.data_type, Some(16));
    assert_eq!(stored(&out)["both"], DataType::Float);
    assert!(lines(&out).contains(&"both>16=both.bf16".into()));
    assert!(lines(&out).contains(&"Exp(both)=z".into()));
}

#[test]
fn old_opsets_are_refused() {
    let builder = output(embedding(12).node("Relu", &["x"], &["y"]), "y").model();
    let error = convert(&builder, &builder, BaseDtype::Bf16, &Notes::default());
    let error = error.unwrap_err().to_string();
    assert!(error.contains("bf16") && error.contains("opset 13"), "{error}");
}
