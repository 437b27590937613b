//! What is not touched keeps its bytes; what is touched says what it should.

use crate::onnx::proto::{Attribute, Node};
use crate::onnx::testing::{ModelBuilder, float_tensor, tensor, value};
use crate::onnx::{DataType, Model, NodeId, Payload, TensorInfo, wire};
use bytes::Bytes;
use prost::Message as _;

pub(super) fn linear() -> ModelBuilder {
    ModelBuilder::new(18)
        .input("x", DataType::Float, &["m", "3"])
        .floats("w", &[3, 2], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
        .node("MatMul", &["x", "w"], &["h"])
        .node("Relu", &["h"], &["y"])
        .output("y", DataType::Float, &["m", "2"])
}

/// The same model with fields that this program does not know, in odd places and with a length that
/// is longer than it need be.
fn odd() -> Vec<u8> {
    let builder = linear();
    let mut node = builder.nodes[0].encode_to_vec();
    node.extend([0xfa, 0x3f, 2, 7, 7]); // field 1023
    let mut graph = wire::len_field(1, &node).to_vec();
    graph.extend(wire::len_field(900, b"from the future"));
    // The second node with a length of two bytes where one would do.
    let relu = builder.nodes[1].encode_to_vec();
    graph.extend([0x0a, relu.len() as u8 | 0x80, 0]);
    graph.extend(relu);
    let mut weight = builder.initializers[0].encode_to_vec();
    weight.extend([0xf8, 0x3f, 42]);
    graph.extend(wire::len_field(5, &weight));
    graph.extend(wire::len_field(11, &builder.inputs[0].encode_to_vec()));
    graph.extend(wire::len_field(12, &builder.outputs[0].encode_to_vec()));
    let mut model = vec![0x08, 9];
    // The graph's own length, too, takes a byte too many.
    model.push(0x3a);
    wire::put_varint(&mut model, graph.len() as u64);
    *model.last_mut().unwrap() |= 0x80;
    model.push(0);
    model.extend(graph);
    model.extend(wire::len_field(8, &[0x10, 18]));
    model.extend(wire::len_field(777, b"unknown"));
    model.extend([0xfd, 0x3f, 1, 2, 3, 4]);
    model
}

fn open(bytes: &[u8]) -> Model {
    Model::from_bytes(Bytes::copy_from_slice(bytes), None).unwrap()
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|window| window == needle)
}

#[test]
fn untouched_models_are_written_back_byte_for_byte() {
    for bytes in [linear().bytes(), odd()] {
        assert_eq!(open(&bytes).to_bytes().unwrap(), bytes);
        assert_eq!(open(&bytes).encoded_len(), bytes.len() as u64);
    }
}

#[test]
fn an_edit_leaves_the_rest_alone() {
    let bytes = odd();
    let mut model = open(&bytes);
    let graph = model.graph_mut();
    let relu = NodeId(1);
    let mut node = graph.node(relu).clone();
    node.op_type = Some("Sigmoid".into());
    graph.replace_node(relu, node);
    let before = Node { op_type: Some("Neg".into()), output: vec!["n".into()], ..Node::default() };
    let first = graph.insert_before(relu, before.clone());
    graph.insert_before(first, Node { op_type: Some("Abs".into()), ..before.clone() });
    graph.insert_after(relu, Node { op_type: Some("Sqrt".into()), ..before.clone() });
    graph.push_front(Node { op_type: Some("First".into()), ..before.clone() });
    graph.push_node(Node { op_type: Some("Last".into()), ..before });
    model.set_metadata("mx.plan", "{}");
    model.import_opset("mx", 1);
    model.import_opset("", 99);
    let written = model.to_bytes().unwrap();
    assert_eq!(model.encoded_len(), written.len() as u64);
    for kept in [&b"from the future"[..], b"unknown", &[0xfa, 0x3f, 2, 7, 7], &[0xf8, 0x3f, 42]] {
        assert!(contains(&written, kept));
    }
    let again = open(&written);
    let ops: Vec<_> = again.graph().nodes().map(|(_, n)| n.op_type.clone().unwrap()).collect();
    assert_eq!(ops, ["First", "MatMul", "Abs", "Neg", "Sigmoid", "Sqrt", "Last"]);
    assert_eq!(again.opset("mx"), Some(1));
    assert_eq!(
        (again.opset(""), again.opset("ai.onnx"), again.opset("x")),
        (Some(18), Some(18), None)
    );
    assert_eq!(again.metadata().collect::<Vec<_>>(), [("mx.plan", "{}")]);
    assert_eq!(again.to_bytes().unwrap(), written);
}

#[test]
fn later_operators_are_refused_with_both_versions() {
    let mut model = open(&odd());
    model.import_opset("mx", 1);
    open(&model.to_bytes().unwrap());
    model.set_opset("mx", 7);
    let error = Model::from_bytes(model.to_bytes().unwrap(), None).unwrap_err().to_string();
    assert!(error.contains("domain mx is 7") && error.contains("domain mx 1 at most"), "{error}");
}

#[test]
fn metadata_of_one_key_is_replaced() {
    let mut model = linear().model();
    for (key, value) in [("a", "1"), ("b", "2"), ("a", "3")] {
        model.set_metadata(key, value);
    }
    let again = open(&model.to_bytes().unwrap());
    assert_eq!(again.metadata().collect::<Vec<_>>(), [("b", "2"), ("a", "3")]);
}

#[test]
fn tensors_values_and_nodes_come_and_go() {
    let mut builder = linear();
    builder.value_infos.push(value("h", DataType::Float, &["m", "2"]));
    let mut model = builder.model();
    let graph = model.graph_mut();
    let bytes = Payload::Bytes(Bytes::from_static(&[1, 2, 3]));
    graph.add_initializer(TensorInfo::new("codes", vec![3], DataType::Uint8, bytes));
    graph.remove_initializer("w");
    graph.remove_value_infos(|name| name == "h");
    graph.remove_node(NodeId(0));
    graph.add_input(value("labels", DataType::Int64, &["m"]));
    graph.remove_output("y");
    graph.add_output(value("nll", DataType::Float, &["m"]));
    let again = open(&model.to_bytes().unwrap());
    let graph = again.graph();
    let names: Vec<_> = graph.initializers().map(|t| t.name.as_str()).collect();
    assert_eq!(names, ["codes"]);
    let view = again.tensor(graph.initializer("codes").unwrap()).unwrap();
    assert_eq!((view.dims, view.bytes), (vec![3], Bytes::from_static(&[1, 2, 3])));
    assert_eq!(graph.value_infos().count(), 0);
    assert_eq!(graph.nodes().count(), 1);
    let names = |values: Vec<&crate::onnx::proto::ValueInfo>| -> Vec<_> {
        values.iter().map(|v| v.name.clone().unwrap()).collect()
    };
    assert_eq!(names(graph.inputs().collect()), ["x", "labels"]);
    assert_eq!(names(graph.outputs().collect()), ["nll"]);
}

#[test]
fn lazy_payloads_keep_their_promise() {
    let lazy = |len, bytes: &'static [u8]| Payload::Lazy {
        len,
        make: std::sync::Arc::new(move || Ok(Bytes::from_static(bytes))),
    };
    let mut model = linear().model();
    model.graph_mut().add_initializer(TensorInfo::new(
        "a",
        vec![2],
        DataType::Uint8,
        lazy(2, b"xy"),
    ));
    let again = open(&model.to_bytes().unwrap());
    assert_eq!(again.tensor(again.graph().initializer("a").unwrap()).unwrap().bytes, "xy");
    model.graph_mut().add_initializer(TensorInfo::new(
        "a",
        vec![2],
        DataType::Uint8,
        lazy(2, b"xyz"),
    ));
    let error = model.to_bytes().unwrap_err().to_string();
    assert!(error.contains("'a'") && error.contains("3 bytes were made, 2 promised"), "{error}");
}

#[test]
fn typed_fields_read_like_raw_data() {
    let named = |name: &str, data_type: DataType, dims: &[i64]| {
        let mut tensor = tensor(name, data_type, dims, Vec::new());
        tensor.raw_data = None;
        tensor
    };
    let mut builder = linear();
    let mut floats = named("floats", DataType::Float, &[3]);
    floats.float_data = vec![1.5, -2.0, 0.25];
    let mut halves = named("halves", DataType::Float16, &[2]);
    halves.int32_data = vec![0x3c00, 0xc000];
    let mut bf16 = named("bf16", DataType::Bfloat16, &[2]);
    bf16.int32_data = vec![0x3fc0, 0xbf80];
    let mut ints = named("ints", DataType::Int64, &[2]);
    ints.int64_data = vec![-1, 1 << 40];
    let mut doubles = named("doubles", DataType::Double, &[1]);
    doubles.double_data = vec![0.1];
    let mut short = named("short", DataType::Float, &[4]);
    short.float_data = vec![1.0];
    let negative = float_tensor("negative", &[-1, 3], &[]);
    let huge = float_tensor("huge", &[i64::MAX, 3], &[]);
    builder.initializers.extend([floats, halves, bf16, ints, doubles, short, negative, huge]);
    let model = builder.model();
    let read = |name: &str| model.tensor(model.graph().initializer(name).unwrap());
    assert_eq!(read("floats").unwrap().to_f32().unwrap(), [1.5, -2.0, 0.25]);
    assert_eq!(read("halves").unwrap().to_f32().unwrap(), [1.0, -2.0]);
    assert_eq!(read("bf16").unwrap().to_f32().unwrap(), [1.5, -1.0]);
    assert_eq!(read("ints").unwrap().to_i64().unwrap(), [-1, 1 << 40]);
    assert_eq!(read("doubles").unwrap().to_f32().unwrap(), [0.1]);
    assert!(read("w").unwrap().read_f32(5, &mut [0.0; 2]).is_err());
    for (name, text) in
        [("short", "holds 4 bytes"), ("negative", "negative extent"), ("huge", "overflows")]
    {
        let error = read(name).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains(text), "{error}");
    }
}

#[test]
fn sub_graphs_are_read_and_bounded() {
    let nested = |graph: Vec<u8>| {
        linear().with(|node| {
            node.attribute.push(Attribute {
                name: Some("body".into()),
                g: Some(graph.into()),
                r#type: Some(5),
                ..Attribute::default()
            });
        })
    };
    let model = nested(linear().graph()).model();
    let bodies = model.graph().subgraphs(NodeId(1)).unwrap();
    assert_eq!((bodies[0].0.as_str(), bodies[0].1.depth()), ("body", 1));
    assert_eq!(bodies[0].1.nodes().count(), 2);
    assert_eq!(bodies[0].1.to_bytes().unwrap(), linear().graph());
    // An error inside names the byte of the file.
    let mut broken = linear().graph();
    broken.extend([0x0a, 100, 1]);
    let bytes = nested(broken.clone()).bytes();
    let error = open(&bytes).graph().subgraphs(NodeId(1)).unwrap_err().to_string();
    let start = bytes.windows(broken.len()).position(|window| window == broken).unwrap();
    let at = start + broken.len() - 1;
    assert!(error.ends_with(&format!("at byte {at}")), "{error} != {at}");

    let mut graph = linear().graph();
    for _ in 0..40 {
        graph = nested(graph).graph();
    }
    let mut current = nested(graph).model().graph().clone();
    let error = loop {
        match current.subgraphs(NodeId(1)) {
            Ok(mut bodies) => current = bodies.remove(0).1,
            Err(error) => break error.to_string(),
        }
    };
    assert!(error.contains("nest deeper than 32"), "{error}");
}
