//! Layers of small models, replaced: nodes, names, sizes, sharing.

mod bodies;
mod experts;
mod qdq;

use std::collections::BTreeMap;

use mx_kernels::{ElementFormat, QuantSpec, ScaleKind};
use prost::Message as _;

use crate::{
    onnx::{
        DataType, Model,
        proto::{Attribute, AttributeType, Node, StringStringEntry},
        testing::{ModelBuilder, tensor},
    },
    rewrite::{
        Filter, Lowering, MODULE_PATH_KEY, PLAN_KEY, Recipe, RewriteOptions, RewritePlan, Tier,
        execute, find_sites,
    },
};

fn rewrite_with(model: &Model, options: &RewriteOptions) -> Model {
    let recipe = Recipe::new(options).unwrap();
    let filter: Filter = recipe.filter().unwrap();
    let plan = RewritePlan::new(find_sites(model, &filter).unwrap(), recipe);
    let out = execute(model, &plan, Some(2)).unwrap();
    // What is written is what is read.
    Model::from_bytes(out.to_bytes().unwrap(), None).unwrap()
}

fn options(lowering: Lowering) -> RewriteOptions {
    RewriteOptions {
        tier: Tier::AllLinears,
        lowering,
        include: vec![".*".into()],
        ..Default::default()
    }
}

fn mx(format: ElementFormat) -> RewriteOptions {
    RewriteOptions { format: Some(format), ..options(Lowering::Mx) }
}

fn ops(model: &Model) -> Vec<String> {
    model.graph().nodes().map(|(_, node)| node.op_type.clone().unwrap()).collect()
}

fn named<'a>(model: &'a Model, op: &str) -> Vec<&'a Node> {
    let nodes = model.graph().nodes().map(|(_, node)| node);
    nodes.filter(|node| node.op_type.as_deref() == Some(op)).collect()
}

fn initializers(model: &Model) -> BTreeMap<String, usize> {
    let tensors = model.graph().initializers();
    tensors.map(|t| (t.name.clone(), model.tensor(t).unwrap().bytes.len())).collect()
}

fn values(name: &str, model: &Model) -> Vec<f32> {
    model.tensor(model.graph().initializer(name).unwrap()).unwrap().to_f32().unwrap()
}

fn ramp(count: usize) -> Vec<f32> {
    (0..count).map(|i| ((i * 37 % 101) as f32 - 50.0) / 17.0).collect()
}

fn float_attribute(name: &str, f: f32) -> Attribute {
    super::float(name, f)
}

/// x [m, 40] -> MatMul(w [40, 6]) -> Add(b) -> y.
fn biased() -> ModelBuilder {
    ModelBuilder::new(18)
        .input("x", DataType::Float, &["m", "40"])
        .floats("layers.0.fc1.weight", &[40, 6], &ramp(240))
        .floats("b", &[6], &ramp(6))
        .node("MatMul", &["x", "layers.0.fc1.weight"], &["h"])
        .with(|node| {
            node.doc_string = Some("why".into());
            let (key, value) = (Some("pkg.key".into()), Some("kept".into()));
            node.metadata_props.push(StringStringEntry { key, value });
        })
        .node("Add", &["h", "b"], &["y"])
        .output("y", DataType::Float, &["m", "6"])
}

#[test]
fn a_biased_linear_becomes_one_node() {
    let mut builder = biased();
    builder.value_infos.push(crate::onnx::testing::value("h", DataType::Float, &["m", "6"]));
    let out = rewrite_with(&builder.model(), &mx(ElementFormat::Fp8E4M3));
    assert_eq!(ops(&out), ["MxMatMul"]);
    let node = named(&out, "MxMatMul")[0];
    let w = "layers.0.fc1.weight";
    assert_eq!(node.input, ["x", &format!("{w}.mx_codes"), &format!("{w}.mx_scales"), "b"]);
    assert_eq!((node.output[0].as_str(), node.domain.as_deref()), ("y", Some("mx")));
    assert_eq!((node.name.as_deref(), node.doc_string.as_deref()), (Some("node_h"), Some("why")));
    let metadata: Vec<_> = node
        .metadata_props
        .iter()
        .map(|e| (e.key.as_deref().unwrap(), e.value.as_deref().unwrap()))
        .collect();
    assert_eq!(metadata, [("pkg.key", "kept"), (MODULE_PATH_KEY, "layers.0.fc1")]);
    assert_eq!(out.graph().value_infos().count(), 0);
    assert_eq!((out.opset("mx"), out.opset("")), (Some(1), Some(18)));
    let plan = out.metadata().find(|(key, _)| *key == PLAN_KEY).unwrap().1;
    let plan: serde_json::Value = serde_json::from_str(plan).unwrap();
    assert_eq!(plan["sites"][0]["initializer"], w);
}

#[test]
fn weights_take_the_bytes_of_the_format() {
    for (format, bytes) in [
        (ElementFormat::Fp8E4M3, 33),
        (ElementFormat::Fp8E5M2, 33),
        (ElementFormat::Fp6E3M2, 25),
        (ElementFormat::Fp6E2M3, 25),
        (ElementFormat::Fp4E2M1, 17),
    ] {
        let out = rewrite_with(&biased().model(), &mx(format));
        let sizes = initializers(&out);
        assert_eq!(sizes.len(), 3, "{sizes:?}");
        assert_eq!(sizes.values().sum::<usize>() - sizes["b"], 6 * 2 * bytes, "{format:?}");
    }
}

#[test]
fn codes_are_those_of_the_rows_along_k() {
    let weight = ramp(240);
    let transposed: Vec<f32> =
        (0..6).flat_map(|n| (0..40).map(move |k| (k, n))).map(|(k, n)| weight[k * 6 + n]).collect();
    let spec = QuantSpec::mx(ElementFormat::Fp6E2M3).unwrap();
    let (mut codes, mut scales) = (vec![0; spec.codes_len(6, 40)], vec![0; spec.scales_len(6, 40)]);
    mx_kernels::quantize_rows(&spec, &transposed, 6, 40, &mut codes, &mut scales).unwrap();
    let out = rewrite_with(&biased().model(), &mx(ElementFormat::Fp6E2M3));
    let bytes = |name: &str| out.tensor(out.graph().initializer(name).unwrap()).unwrap().bytes;
    assert_eq!(bytes("layers.0.fc1.weight.mx_codes"), codes);
    assert_eq!(bytes("layers.0.fc1.weight.mx_scales"), scales);
    // The same weight stored [n, k] behind a Transpose gives the same bytes.
    let turned = ModelBuilder::new(18)
        .input("x", DataType::Float, &["m", "40"])
        .floats("w", &[6, 40], &transposed)
        .node("Transpose", &["w"], &["t"])
        .node("MatMul", &["x", "t"], &["y"])
        .output("y", DataType::Float, &["m", "6"]);
    let out = rewrite_with(&turned.model(), &mx(ElementFormat::Fp6E2M3));
    assert_eq!(ops(&out), ["MxMatMul"]);
    assert_eq!(out.tensor(out.graph().initializer("w.mx_codes").unwrap()).unwrap().bytes, codes);
}

#[test]
fn a_shared_weight_is_packed_once_and_an_embedding_stays() {
    let builder = ModelBuilder::new(18)
        .input("ids", DataType::Int64, &["s"])
        .floats("embed", &[32, 32], &ramp(1024))
        .floats("unused", &[2], &[1.0, 2.0])
        .node("Gather", &["embed", "ids"], &["x"])
        .node("Transpose", &["embed"], &["t"])
        .with(|node| node.attribute.push(super::ints("perm", &[1, 0])))
        .node("MatMul", &["x", "t"], &["a"])
        .node("MatMul", &["a", "t"], &["b"])
        .node("Relu", &["b"], &["y"])
        .output("y", DataType::Float, &["s", "32"]);
    let out = rewrite_with(&builder.model(), &mx(ElementFormat::Fp4E2M1));
    assert_eq!(ops(&out), ["Gather", "MxMatMul", "MxMatMul", "Relu"]);
    let names: Vec<_> = initializers(&out).into_keys().collect();
    assert_eq!(names, ["embed", "embed.mx_codes", "embed.mx_scales", "unused"]);

    // A Transpose that something else reads stays.
    let builder = builder.node("Neg", &["t"], &["z"]).output("z", DataType::Float, &["32", "32"]);
    let out = rewrite_with(&builder.model(), &mx(ElementFormat::Fp4E2M1));
    assert_eq!(ops(&out), ["Gather", "Transpose", "MxMatMul", "MxMatMul", "Relu", "Neg"]);
}

#[test]
fn names_that_are_taken_are_avoided() {
    let mut builder = biased();
    let name = "layers.0.fc1.weight.mx_codes";
    builder = builder.floats(name, &[6], &ramp(6)).node("Mul", &["y", name], &["z"]);
    builder = builder.output("z", DataType::Float, &["m", "6"]);
    let out = rewrite_with(&builder.model(), &mx(ElementFormat::Fp8E4M3));
    let node = named(&out, "MxMatMul")[0];
    assert_eq!(node.input[1], format!("{name}_1"));
    assert_eq!(values(name, &out), ramp(6));
}

#[test]
fn gemms_keep_their_factors() {
    let gemm = |c_dims: &[i64], trans_a: i64, beta: f32| {
        let count = c_dims.iter().product::<i64>() as usize;
        ModelBuilder::new(18)
            .input("x", DataType::Float, if trans_a == 1 { &["32", "4"] } else { &["4", "32"] })
            .floats("w", &[3, 32], &ramp(96))
            .floats("c", c_dims, &ramp(count))
            .node("Gemm", &["x", "w", "c"], &["y"])
            .with(|node| {
                node.attribute.push(super::int("transA", trans_a));
                node.attribute.push(super::int("transB", 1));
                node.attribute.push(float_attribute("alpha", 0.5));
                node.attribute.push(float_attribute("beta", beta));
            })
            .output("y", DataType::Float, &["4", "3"])
            .model()
    };
    let factor = |node: &Node, name: &str| {
        node.attribute.iter().find(|a| a.name.as_deref() == Some(name)).unwrap().f.unwrap()
    };
    let out = rewrite_with(&gemm(&[3], 0, 2.0), &mx(ElementFormat::Fp8E4M3));
    assert_eq!(ops(&out), ["MxMatMul"]);
    let node = named(&out, "MxMatMul")[0];
    assert_eq!((factor(node, "alpha"), factor(node, "beta")), (0.5, 2.0));
    assert_eq!(node.input[3], "c");

    let out = rewrite_with(&gemm(&[1, 1], 1, 2.0), &mx(ElementFormat::Fp8E4M3));
    assert_eq!(ops(&out), ["Transpose", "MxMatMul"]);
    let bias = &named(&out, "MxMatMul")[0].input[3];
    assert_eq!(values(bias, &out), [ramp(1)[0]; 3]);
    assert!(out.graph().initializer("c").is_none());

    let out = rewrite_with(&gemm(&[4, 3], 0, 1.0), &mx(ElementFormat::Fp8E4M3));
    assert_eq!(ops(&out), ["MxMatMul", "Add"]);
    assert_eq!(named(&out, "Add")[0].input[1], "c");
    assert_eq!(named(&out, "Add")[0].output, ["y"]);
}

#[test]
fn unscaled_lowerings_have_no_scales() {
    for (lowering, format, bytes) in [
        (Lowering::Bfp16, "bf16", 2),
        (Lowering::NvFp8EmuE4m3, "fp8_e4m3", 1),
        (Lowering::NvFp8EmuE5m2, "fp8_e5m2", 1),
    ] {
        let out = rewrite_with(&biased().model(), &options(lowering));
        let node = named(&out, "MxMatMul")[0];
        assert_eq!(node.input[1..], ["layers.0.fc1.weight.mx_codes", "", "b"]);
        let text = |name: &str| {
            let found = node.attribute.iter().find(|a| a.name.as_deref() == Some(name)).unwrap();
            String::from_utf8(found.s.clone().unwrap().to_vec()).unwrap()
        };
        assert_eq!(
            (text("weight_format"), text("activation_format")),
            (format.into(), format.into())
        );
        assert_eq!(text("scale"), "none");
        assert_eq!(initializers(&out)["layers.0.fc1.weight.mx_codes"], 6 * 64 * bytes);
    }
}

#[test]
fn nvfp8_has_one_scale_a_tensor() {
    let out = rewrite_with(&biased().model(), &options(Lowering::NvFp8));
    assert_eq!(ops(&out), ["MxMatMul"]);
    let w = "layers.0.fc1.weight";
    let inputs = &named(&out, "MxMatMul")[0].input;
    assert_eq!(inputs[1..], [format!("{w}.mx_codes"), format!("{w}.mx_scale"), "b".to_owned()]);
    let weight = ramp(240);
    let rows: Vec<f32> = (0..240).map(|i| weight[(i % 40) * 6 + i / 40]).collect();
    let (format, rounding) = (ElementFormat::Fp8E4M3, mx_kernels::Rounding::Even);
    let spec =
        QuantSpec::new(format, ScaleKind::Tensor, 32, rounding, mx_kernels::ScaleRule::Floor);
    let spec = spec.unwrap();
    let (mut codes, mut scale) = (vec![0; 6 * 64], [0; 4]);
    mx_kernels::quantize_rows(&spec, &rows, 6, 40, &mut codes, &mut scale).unwrap();
    let bytes = |name: &str| out.tensor(out.graph().initializer(name).unwrap()).unwrap().bytes;
    assert_eq!(bytes(&inputs[1]), codes);
    assert_eq!(bytes(&inputs[2]), scale[..]);
    assert_eq!(values(&inputs[2], &out), [50.0 / 17.0 / 448.0]);
}

#[test]
fn int8_keeps_the_node_and_halves_no_step() {
    let out = rewrite_with(&biased().model(), &options(Lowering::Int8));
    assert_eq!(ops(&out), ["DequantizeLinear", "MatMul", "Add"]);
    let node = named(&out, "DequantizeLinear")[0];
    assert_eq!(node.attribute, [super::int("axis", 1)]);
    assert_eq!(named(&out, "MatMul")[0].input[1], node.output[0]);
    let (codes, scales) = (values(&node.input[0], &out), values(&node.input[1], &out));
    assert_eq!((codes.len(), scales.len()), (240, 6));
    for (index, (code, weight)) in codes.iter().zip(ramp(240)).enumerate() {
        let scale = scales[index % 6];
        assert!((code * scale - weight).abs() <= scale * 0.5001, "{index}");
    }
    let column = |n: usize| (0..40).map(|k| ramp(240)[k * 6 + n].abs()).fold(0.0, f32::max);
    assert_eq!(scales[2], column(2) / 127.0);
    assert!(out.graph().initializer("layers.0.fc1.weight").is_none());
}

#[test]
fn int8_keeps_both_readings_of_a_square_weight() {
    let model = ModelBuilder::new(18)
        .input("x", DataType::Float, &["m", "32"])
        .floats("w", &[32, 32], &ramp(1024))
        .node("MatMul", &["x", "w"], &["y"])
        .node("Transpose", &["w"], &["t"])
        .node("MatMul", &["x", "t"], &["z"])
        .output("y", DataType::Float, &["m", "32"])
        .output("z", DataType::Float, &["m", "32"])
        .model();
    let out = rewrite_with(&model, &options(Lowering::Int8));
    let operands: Vec<_> = named(&out, "MatMul").iter().map(|n| n.input[1].clone()).collect();
    assert_ne!(operands[0], operands[1], "one of the two would read the other's transpose");
    assert_eq!(named(&out, "DequantizeLinear").len(), 2);
}

#[test]
fn int8_in_half_precision_casts_behind_the_scale() {
    let halves = |count: usize| -> Vec<u8> {
        ramp(count).iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect()
    };
    let mut builder = ModelBuilder::new(18)
        .input("x", DataType::Float16, &["m", "40"])
        .node("Gemm", &["x", "w"], &["y"])
        .with(|node| node.attribute.push(super::int("transB", 1)))
        .output("y", DataType::Float16, &["m", "6"]);
    builder.initializers.push(tensor("w", DataType::Float16, &[6, 40], halves(240)));
    let out = rewrite_with(&builder.model(), &options(Lowering::Int8));
    assert_eq!(ops(&out), ["DequantizeLinear", "Cast", "Gemm"]);
    assert_eq!(named(&out, "DequantizeLinear")[0].attribute, [super::int("axis", 0)]);
    assert_eq!(named(&out, "Gemm")[0].input[1], named(&out, "Cast")[0].output[0]);

    builder.opset = 12;
    let model = builder.model();
    let recipe = Recipe::new(&options(Lowering::Int8)).unwrap();
    let scan = find_sites(&model, &recipe.filter().unwrap()).unwrap();
    let error = execute(&model, &RewritePlan::new(scan, recipe), None).unwrap_err().to_string();
    assert!(
        error.contains("int8") && error.contains("opset 13") && error.contains("12"),
        "{error}"
    );
}

#[test]
fn nothing_to_replace_changes_nothing() {
    let model = biased().model();
    let options =
        RewriteOptions { tier: Tier::A, exclude: vec!["fc1".into()], ..Default::default() };
    let recipe = Recipe::new(&options).unwrap();
    let scan = find_sites(&model, &recipe.filter().unwrap()).unwrap();
    let out = execute(&model, &RewritePlan::new(scan, recipe), None).unwrap();
    assert_eq!(out.to_bytes().unwrap(), biased().bytes());
}

#[test]
fn a_weight_in_a_constant_node_is_taken_from_there() {
    let builder = ModelBuilder::new(18)
        .input("x", DataType::Float, &["m", "40"])
        .node("Constant", &[], &["w"])
        .with(|node| {
            let t = tensor(
                "",
                DataType::Float,
                &[40, 6],
                ramp(240).iter().flat_map(|v| v.to_le_bytes()).collect(),
            );
            node.attribute.push(Attribute {
                name: Some("value".into()),
                t: Some(t),
                r#type: Some(AttributeType::Tensor as i32),
                ..Attribute::default()
            });
        })
        .node("MatMul", &["x", "w"], &["y"])
        .output("y", DataType::Float, &["m", "6"]);
    let out = rewrite_with(&builder.model(), &mx(ElementFormat::Fp8E4M3));
    assert_eq!(ops(&out), ["MxMatMul"]);
    let same = rewrite_with(&biased().model(), &mx(ElementFormat::Fp8E4M3));
    let bytes = |model: &Model, name: &str| {
        model.tensor(model.graph().initializer(name).unwrap()).unwrap().bytes
    };
    assert_eq!(bytes(&out, "w.mx_codes"), bytes(&same, "layers.0.fc1.weight.mx_codes"));
    assert!(!named(&out, "MxMatMul")[0].encode_to_vec().is_empty());
}
