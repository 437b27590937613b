use super::*;
use crate::onnx::proto::{Attribute, DataType};

fn node(op: &str, name: &str, input: &[&str], output: &[&str]) -> Node {
    Node {
        op_type: Some(op.into()),
        name: Some(name.into()),
        input: input.iter().map(|&v| v.into()).collect(),
        output: output.iter().map(|&v| v.into()).collect(),
        ..Node::default()
    }
}

fn scope(nodes: Vec<Node>) -> Scope {
    let weight = ConstTensor { dtype: Some(DataType::Float), dims: vec![4, 8], ints: None };
    Scope {
        nodes,
        inputs: vec!["x".into()],
        outputs: vec!["y".into()],
        initializers: vec![("w".into(), weight)],
        ..Scope::default()
    }
}

fn view(nodes: Vec<Node>) -> Result<GraphView, GraphError> {
    GraphView::new(scope(nodes), None)
}

/// A field of a protobuf message: length-delimited `payload` under `number`.
fn field(number: u8, payload: &[u8]) -> Vec<u8> {
    assert!(payload.len() < 128);
    [&[number << 3 | 2, payload.len() as u8], payload].concat()
}

/// An If whose branch holds `node`.
fn branching(node: &Node, name: &str, input: &[&str], output: &[&str]) -> Node {
    let body = field(1, &prost::Message::encode_to_vec(node));
    let mut outer = self::node("If", name, input, output);
    outer.attribute = vec![Attribute {
        name: Some("then_branch".into()),
        g: Some(body.into()),
        ..Attribute::default()
    }];
    outer
}

#[test]
fn sources_readers_and_constants() {
    let view = view(vec![
        node("MatMul", "mm", &["x", "w"], &["a"]),
        node("Add", "add", &["a", "a"], &["b"]),
        node("Relu", "", &["b"], &["y"]),
    ])
    .unwrap();
    assert_eq!(view.source("a"), Some(Source::Node { index: 0, slot: 0 }));
    assert_eq!(view.source("w"), Some(Source::Initializer));
    assert_eq!(view.source("x"), Some(Source::Input));
    assert_eq!(view.only_reader("a"), None, "one node, but two inputs");
    assert_eq!(view.only_reader("b"), Some((2, 0)));
    assert_eq!(view.only_reader("y"), None, "a graph output is a reader");
    assert_eq!(view.constant("w").unwrap().dims, [4, 8]);
    assert_eq!(view.node_name(2), "#2");
    assert_eq!(view.readers(0), [1]);
}

#[test]
fn invalid_graphs_are_errors() {
    let text = |nodes| view(nodes).unwrap_err().to_string();
    let two = text(vec![node("A", "one", &["x"], &["y"]), node("B", "two", &["x"], &["y"])]);
    assert!(two.contains("'y'") && two.contains("one") && two.contains("two"), "{two}");
    let over = text(vec![node("A", "one", &["x"], &["w", "y"])]);
    assert!(over.contains("'w'") && over.contains("initializer"), "{over}");
    let missing = text(vec![node("A", "one", &["nowhere"], &["y"])]);
    assert!(missing.contains("'nowhere'") && missing.contains("one"), "{missing}");
    assert!(text(vec![]).contains("output list"));
    let cycle = text(vec![node("A", "one", &["b"], &["y"]), node("B", "two", &["y"], &["b"])]);
    assert!(cycle.contains("cycle"), "{cycle}");
    assert!(text(vec![node("A", "self", &["y"], &["y"])]).contains("cycle"));
}

#[test]
fn absent_inputs_and_outputs_are_no_values() {
    view(vec![node("A", "a", &["x", "", ""], &["y", ""]), node("B", "b", &[""], &["", ""])])
        .unwrap();
}

#[test]
fn sub_graphs_read_outer_values() {
    let inner = node("Add", "inner", &["a", "w"], &["c"]);
    let nodes = vec![node("Relu", "r", &["x"], &["a"]), branching(&inner, "if", &["x"], &["y"])];
    let view = view(nodes).unwrap();
    assert_eq!(view.uses("a"), [Use::Node { index: 1, slot: None }]);
    assert_eq!(view.only_reader("a"), None, "it is read inside a sub-graph");
    let scopes = sub_scopes(&view.nodes()[1], "if").unwrap();
    assert_eq!(scopes.len(), 1);
    assert!(scopes[0].title.contains("then_branch"), "{}", scopes[0].title);
    // What the branch reads has to exist somewhere.
    let inner = node("Add", "inner", &["a", "w"], &["c"]);
    let error = self::view(vec![branching(&inner, "if", &["x"], &["y"])]).unwrap_err();
    assert!(matches!(error, GraphError::Undefined { value, .. } if value == "a"));
}

#[test]
fn nonsense_in_a_sub_graph_is_an_error() {
    let mut outer = branching(&node("A", "a", &[], &["c"]), "if", &["x"], &["y"]);
    outer.attribute[0].g = Some(vec![0xff; 9].into());
    let error = view(vec![outer]).unwrap_err().to_string();
    assert!(error.contains("then_branch") && error.contains("'if'"), "{error}");
}

#[test]
fn constant_nodes_are_constants() {
    let mut constant = node("Constant", "c", &[], &["axes"]);
    constant.attribute = vec![Attribute {
        name: Some("value_ints".into()),
        ints: vec![1, -1],
        ..Attribute::default()
    }];
    let view = view(vec![constant, node("Squeeze", "s", &["x", "axes"], &["y"])]).unwrap();
    assert_eq!(view.constant("axes").unwrap().ints.as_deref(), Some(&[1, -1][..]));
}
