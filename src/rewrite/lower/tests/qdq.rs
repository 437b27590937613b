//! Layers between standard operators, and models raised to the opset of the element types.

use super::*;
use crate::{
    onnx::{Graph, wire},
    rewrite::{Notes, execute_noting},
};

fn qdq(format: ElementFormat) -> RewriteOptions {
    RewriteOptions { format: Some(format), ..options(Lowering::Qdq) }
}

fn plan(model: &Model, options: &RewriteOptions) -> RewritePlan {
    let recipe = Recipe::new(options).unwrap();
    let filter = recipe.filter().unwrap();
    RewritePlan::new(find_sites(model, &filter).unwrap(), recipe)
}

fn refusal(model: &Model, options: &RewriteOptions) -> String {
    let plan = plan(model, options);
    assert!(!plan.sites.is_empty());
    execute(model, &plan, None).map(|_| ()).unwrap_err().to_string()
}

fn attribute(node: &Node, name: &str) -> Option<i64> {
    node.attribute.iter().find(|a| a.name.as_deref() == Some(name))?.i
}

#[test]
fn the_node_stays_between_quantised_operands() {
    let out = rewrite_with(&biased().model(), &qdq(ElementFormat::Fp8E4M3));
    assert_eq!(
        ops(&out),
        [
            "DequantizeLinear",
            "Transpose",
            "Abs",
            "Pad",
            "Shape",
            "Concat",
            "Reshape",
            "ReduceMax",
            "Max",
            "Mul",
            "ReduceSum",
            "Add",
            "Cast",
            "Cast",
            "Mul",
            "Cast",
            "QuantizeLinear",
            "DequantizeLinear",
            "MatMul",
            "Add",
        ]
    );
    let matmul = named(&out, "MatMul")[0];
    assert_eq!((matmul.name.as_deref(), matmul.output[0].as_str()), (Some("node_h"), "h"));
    assert_eq!(matmul.doc_string.as_deref(), Some("why"));
    assert!(matmul.metadata_props.iter().any(|e| e.value.as_deref() == Some("layers.0.fc1")));
    assert_eq!((out.opset(""), out.opset("mx"), out.ir_version()), (Some(24), None, 12));
    // [6, 40]: scales of two blocks a row, codes without the rest of the second.
    let codes = out.graph().initializer("layers.0.fc1.weight.qdq_codes").unwrap();
    assert_eq!((codes.dims.as_slice(), codes.raw_type), (&[6, 40][..], 17));
    let scales = out.graph().initializer("layers.0.fc1.weight.qdq_scales").unwrap();
    assert_eq!((scales.dims.as_slice(), scales.raw_type), (&[6, 2][..], 24));
    let quantize = named(&out, "QuantizeLinear")[0];
    for (name, expected) in
        [("axis", -1), ("block_size", 32), ("output_dtype", 17), ("precision", 1)]
    {
        assert_eq!(attribute(quantize, name), Some(expected), "{name}");
    }
    assert!(out.graph().initializer("layers.0.fc1.weight").is_none());
}

#[test]
fn codes_and_scales_are_those_of_mx() {
    for format in ElementFormat::ALL.into_iter().filter(|f| f.bits() < 16 && f.emax() > 0) {
        let (mx, qdq) = (
            rewrite_with(&biased().model(), &mx(format)),
            rewrite_with(&biased().model(), &qdq(format)),
        );
        let bytes = |model: &Model, name: &str| {
            let info = model.graph().initializer(&format!("layers.0.fc1.weight.{name}")).unwrap();
            model.tensor(info).unwrap().bytes
        };
        assert_eq!(bytes(&mx, "mx_scales"), bytes(&qdq, "qdq_scales"));
        let unpack = |bytes: &[u8]| {
            let mut codes = vec![0; bytes.len() * 8 / format.bits() as usize];
            mx_kernels::pack::unpack(format, bytes, &mut codes);
            codes
        };
        let rows: Vec<u16> =
            unpack(&bytes(&mx, "mx_codes")).chunks(64).flat_map(|row| row[..40].to_vec()).collect();
        assert_eq!(unpack(&bytes(&qdq, "qdq_codes")), rows, "{format:?}");
        let opset = if format.bits() == 6 { (Some(28), 14) } else { (Some(24), 12) };
        assert_eq!((qdq.opset(""), qdq.ir_version()), opset);
    }
}

#[test]
fn weight_only_is_one_dequantisation() {
    let options = RewriteOptions {
        activation: crate::rewrite::Activation::None,
        ..qdq(ElementFormat::Fp4E2M1)
    };
    let out = rewrite_with(&biased().model(), &options);
    assert_eq!(ops(&out), ["DequantizeLinear", "Transpose", "MatMul", "Add"]);
}

#[test]
fn layers_share_activations_and_weights() {
    let model = ModelBuilder::new(20)
        .input("x", DataType::Float, &["m", "32"])
        .floats("q", &[32, 4], &ramp(128))
        .node("MatMul", &["x", "q"], &["a"])
        .node("MatMul", &["x", "q"], &["b"])
        .output("a", DataType::Float, &["m", "4"])
        .output("b", DataType::Float, &["m", "4"])
        .model();
    let out = rewrite_with(&model, &qdq(ElementFormat::Fp8E5M2));
    assert_eq!(named(&out, "QuantizeLinear").len(), 1);
    assert_eq!(named(&out, "DequantizeLinear").len(), 2);
    let products = named(&out, "MatMul");
    assert_eq!(products[0].input, products[1].input);
}

#[test]
fn half_precision_layers_compute_in_float32() {
    let half: Vec<u8> =
        ramp(128).iter().flat_map(|&v| half::f16::from_f32(v).to_le_bytes()).collect();
    let mut builder = ModelBuilder::new(20)
        .input("x", DataType::Float16, &["32", "m"])
        .node("Gemm", &["x", "w", "c"], &["y"])
        .with(|node| node.attribute.push(crate::rewrite::lower::int("transA", 1)))
        .output("y", DataType::Float16, &["m", "4"]);
    builder.initializers.push(tensor("w", DataType::Float16, &[32, 4], half.clone()));
    builder.initializers.push(tensor("c", DataType::Float16, &[4], half[..8].to_vec()));
    let out = rewrite_with(&builder.model(), &qdq(ElementFormat::Fp8E4M3));
    let gemm = named(&out, "Gemm")[0];
    assert_eq!((attribute(gemm, "transA"), attribute(gemm, "transB")), (Some(0), Some(1)));
    assert_eq!(gemm.output, ["y.qdq_fp32"]);
    let back = out.graph().nodes().find(|(_, n)| n.output == ["y"]).unwrap().1;
    assert_eq!((back.op_type.as_deref(), attribute(back, "to")), (Some("Cast"), Some(10)));
}

#[test]
fn fused_products_read_the_weight_transposed() {
    let mut builder = ModelBuilder::new(20)
        .input("x", DataType::Float, &["a", "m", "32"])
        .floats("w", &[32, 4], &ramp(128))
        .node("FusedMatMul", &["x", "w"], &["y"])
        .output("y", DataType::Float, &["a", "m", "4"]);
    builder.nodes[0].domain = Some("com.microsoft".into());
    builder.nodes[0].attribute.push(float_attribute("alpha", 0.5));
    let out = rewrite_with(&builder.model(), &qdq(ElementFormat::Fp8E4M3));
    let fused = named(&out, "FusedMatMul")[0];
    assert_eq!((attribute(fused, "transB"), fused.attribute.len()), (Some(1), 2));
    assert!(named(&out, "Transpose").is_empty());
    assert_eq!(fused.input[1], "w.qdq");
}

#[test]
fn older_nodes_get_the_form_of_the_new_opset() {
    let ints = |name: &str, values: &[i64]| crate::rewrite::lower::ints(name, values);
    let model = biased()
        .node("ReduceMean", &["y"], &["mean"])
        .with(|node| node.attribute.push(ints("axes", &[-1])))
        .node("ReduceMax", &["y"], &["all"])
        .node("Split", &["y"], &["left", "right"])
        .with(|node| node.attribute.push(crate::rewrite::lower::int("axis", 1)))
        .output("mean", DataType::Float, &["m", "1"]);
    let model = ModelBuilder { opset: 17, ..model }.model();
    let out = rewrite_with(&model, &qdq(ElementFormat::Fp8E4M3));
    let mean = named(&out, "ReduceMean")[0];
    assert_eq!((mean.input.len(), mean.attribute.len()), (2, 0));
    let constant = out.graph().nodes().find(|(_, n)| n.output == mean.input[1..]).unwrap().1;
    assert_eq!(constant.attribute[0].ints, [-1]);
    let all = named(&out, "ReduceMax").into_iter().find(|n| n.output == ["all"]).unwrap();
    assert_eq!(all.input, ["y"]);
    assert_eq!(attribute(named(&out, "Split")[0], "num_outputs"), Some(2));
}

#[test]
fn what_would_mean_something_else_is_refused_by_name() {
    let options = qdq(ElementFormat::Fp8E4M3);
    let norm = biased().node("GroupNormalization", &["y", "b", "b"], &["z"]);
    let message = refusal(&norm.model(), &options);
    assert!(message.contains("node_z") && message.contains("opset 21"), "{message}");
    let newer = ModelBuilder { opset: 21, ..norm };
    assert_eq!(rewrite_with(&newer.model(), &options).opset(""), Some(24));
    let old = ModelBuilder { opset: 12, ..biased() };
    assert!(refusal(&old.model(), &options).contains("opset 13"));
    // A newer model keeps its opset.
    let newest = ModelBuilder { opset: 25, ..biased() };
    assert_eq!(rewrite_with(&newest.model(), &options).opset(""), Some(25));
}

#[test]
fn bodies_and_functions_are_raised_too() {
    let body = ModelBuilder::new(17)
        .node("ReduceMean", &["x"], &["r"])
        .with(|node| node.attribute.push(crate::rewrite::lower::ints("axes", &[0])))
        .node("MatMul", &["x", "w"], &["t"])
        .output("t", DataType::Float, &["m", "4"])
        .output("r", DataType::Float, &["m"]);
    let branch = |name: &str| Attribute {
        name: Some(name.into()),
        g: Some(body.graph().into()),
        r#type: Some(AttributeType::Graph as i32),
        ..Attribute::default()
    };
    let builder = ModelBuilder::new(17)
        .input("x", DataType::Float, &["m", "32"])
        .input("c", DataType::Bool, &[])
        .floats("w", &[32, 4], &ramp(128))
        .node("If", &["c"], &["y", "mean"])
        .with(|node| {
            node.attribute.push(branch("then_branch"));
            node.attribute.push(branch("else_branch"));
        })
        .output("y", DataType::Float, &["m", "4"]);
    let function = |nodes: &[Node]| {
        let mut body = Vec::new();
        body.extend(wire::len_field(1, b"f"));
        nodes.iter().for_each(|node| body.extend(wire::len_field(7, &node.encode_to_vec())));
        let import = crate::onnx::proto::OperatorSetId { domain: None, version: Some(17) };
        body.extend(wire::len_field(9, &import.encode_to_vec()));
        body.extend(wire::len_field(10, b"local"));
        let mut bytes = builder.bytes();
        bytes.extend(wire::len_field(25, &body));
        Model::from_bytes(bytes.into(), None).unwrap()
    };
    let relu = crate::rewrite::lower::node("Relu", "r", &["a"], &["b"]);
    let out = rewrite_with(&function(std::slice::from_ref(&relu)), &qdq(ElementFormat::Fp8E4M3));
    assert_eq!(out.functions().unwrap()[0].opsets, [(String::new(), 24)]);
    let (id, _) = out.graph().nodes().find(|(_, n)| n.op_type.as_deref() == Some("If")).unwrap();
    let bodies: Vec<(String, Graph)> = out.graph().subgraphs(id).unwrap();
    for (name, body) in bodies {
        let ops: Vec<_> = body.nodes().map(|(_, n)| n.op_type.clone().unwrap()).collect();
        assert!(
            ops.contains(&"QuantizeLinear".into()) && ops.contains(&"Constant".into()),
            "{name}"
        );
    }
    // The weight of both is dequantised once, in front of the If.
    assert_eq!(named(&out, "DequantizeLinear").len(), 1);
    let split = crate::rewrite::lower::node("Split", "halves", &["a"], &["b", "c"]);
    let message = refusal(&function(&[split]), &qdq(ElementFormat::Fp8E4M3));
    assert!(message.contains("halves"), "{message}");
}

#[test]
fn fp16_converts_the_graph_and_notes_what_it_limits() {
    let mut values = ramp(240);
    (values[3], values[77]) = (1e6, -7e4);
    let model = ModelBuilder::new(18)
        .input("x", DataType::Float, &["m", "40"])
        .floats("w", &[40, 6], &values)
        .node("MatMul", &["x", "w"], &["y"])
        .output("y", DataType::Float, &["m", "6"])
        .model();
    let plan = plan(&model, &options(Lowering::Fp16));
    let notes = Notes::default();
    let out = execute_noting(&model, &plan, None, &notes).unwrap();
    let out = Model::from_bytes(out.to_bytes().unwrap(), None).unwrap();
    let weight = out.graph().initializer("w").unwrap();
    assert_eq!(weight.data_type(), Some(DataType::Float16));
    assert_eq!(ops(&out), ["Cast", "MatMul", "Cast"]);
    assert_eq!(super::values("w", &out)[3], 65504.0);
    let lines = notes.lines(&plan);
    assert_eq!(lines.len(), 1);
    assert!(lines[0].contains("'w': 2 finite numbers"), "{lines:?}");
    let recipe = out.metadata().find(|(key, _)| *key == PLAN_KEY).unwrap().1;
    assert!(recipe.contains("\"lowering\":\"fp16\""), "{recipe}");
}

#[test]
fn the_note_names_what_onnx_runtime_lacks() {
    let model = biased().model();
    let lines = |format| Notes::default().lines(&plan(&model, &qdq(format)));
    assert!(lines(ElementFormat::Fp8E4M3)[0].contains("FLOAT8E8M0"));
    assert!(lines(ElementFormat::Fp6E2M3)[0].contains("opset 28"));
    assert!(Notes::default().lines(&plan(&model, &mx(ElementFormat::Fp8E4M3))).is_empty());
}
