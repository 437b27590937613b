//! Files that are made to hurt: `mxrewrite` ends with an error that says why, within a second of CPU time
//! and 100 MB, and leaves nothing behind. `MX_HOSTILE_DIR=DIR` keeps the files, as seeds for the fuzzer.

use std::path::Path;
use std::process::{Command, Output};

use crate::support;

/// A message under construction.
#[derive(Clone, Default)]
struct Message(Vec<u8>);

fn varint(mut value: u64) -> Vec<u8> {
    let mut out = Vec::new();
    while value > 0x7f {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
    out
}

impl Message {
    fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }

    fn int(self, number: u64, value: i64) -> Self {
        self.raw(&varint(number << 3)).raw(&varint(value as u64))
    }

    fn bytes(self, number: u64, bytes: &[u8]) -> Self {
        self.raw(&varint(number << 3 | 2)).raw(&varint(bytes.len() as u64)).raw(bytes)
    }

    fn text(self, number: u64, text: &str) -> Self {
        self.bytes(number, text.as_bytes())
    }

    fn message(self, number: u64, message: Self) -> Self {
        self.bytes(number, &message.0)
    }
}

fn message() -> Message {
    Message::default()
}

fn node(op: &str, inputs: &[&str], outputs: &[&str]) -> Message {
    let with_inputs = inputs.iter().fold(message(), |node, input| node.text(1, input));
    let node = outputs.iter().fold(with_inputs, |node, output| node.text(2, output));
    node.text(3, &format!("/layers.0/mlp/up_proj/{op}")).text(4, op)
}

/// A float tensor without its content.
fn tensor(name: &str, dims: &[i64]) -> Message {
    dims.iter().fold(message(), |tensor, &dim| tensor.int(1, dim)).int(2, 1).text(8, name)
}

fn weight(name: &str, dims: [i64; 2]) -> Message {
    tensor(name, &dims).bytes(9, &vec![0; (dims[0] * dims[1] * 4) as usize])
}

fn external(name: &str, dims: &[i64], entries: &[(&str, &str)]) -> Message {
    let tensor = tensor(name, dims).int(14, 1);
    entries.iter().fold(tensor, |tensor, (key, value)| {
        tensor.message(13, message().text(1, key).text(2, value))
    })
}

fn value(name: &str) -> Message {
    let shape = message().message(1, message().text(2, "rows")).message(1, message().int(1, 4));
    let float = message().message(1, message().int(1, 1).message(2, shape));
    message().text(1, name).message(2, float)
}

/// The body of a graph from `x` to `y`: nodes and initialisers.
fn graph(nodes: &[Message], initializers: &[Message]) -> Message {
    let graph = nodes.iter().fold(message(), |graph, node| graph.message(1, node.clone()));
    let graph = graph.text(2, "g");
    let graph = initializers.iter().fold(graph, |graph, tensor| graph.message(5, tensor.clone()));
    graph.message(11, value("x")).message(12, value("y"))
}

fn opset(version: i64) -> Message {
    message().text(1, "").int(2, version)
}

fn model(graph: Message) -> Message {
    message().int(1, 8).message(7, graph).message(8, opset(18))
}

/// A Linear of 4 x 4 whose weight is this.
fn linear(weight: Message) -> Vec<u8> {
    model(graph(&[node("MatMul", &["x", "w"], &["y"])], &[weight])).0
}

fn at(entries: &[(&str, &str)]) -> Vec<u8> {
    linear(external("w", &[4, 4], entries))
}

/// If in If in If ...
fn nested(depth: usize) -> Vec<u8> {
    let mut body = graph(&[node("MatMul", &["x", "w"], &["y"])], &[weight("w", [4, 4])]);
    for _ in 0..depth {
        let attribute = message().text(1, "then_branch").message(6, body).int(20, 5);
        body = graph(&[node("If", &["x"], &["y"]).message(5, attribute)], &[]);
    }
    model(body).0
}

/// `f0` is two Linears; `f<i>` calls `f<i - 1>` so often.
fn functions(depth: usize, calls: usize) -> Vec<u8> {
    let call = |name: &str, x: &str, y: &str| node(name, &[x, "w"], &[y]).text(7, "local");
    let function = |name: &str, nodes: &[Message]| {
        let function = message().text(1, name).text(4, "x").text(4, "w").text(5, "y");
        let function = nodes.iter().fold(function, |all, node| all.message(7, node.clone()));
        let local = message().text(1, "local").int(2, 1);
        function.message(9, opset(18)).message(9, local).text(10, "local")
    };
    let linears = [node("MatMul", &["x", "w"], &["m"]), node("MatMul", &["m", "w"], &["y"])];
    let main = graph(&[call(&format!("f{depth}"), "x", "y")], &[weight("w", [4, 4])]);
    let mut out = model(main).message(8, message().text(1, "local").int(2, 1));
    out = out.message(25, function("f0", &linears));
    for i in 1..=depth {
        let below = format!("f{}", i - 1);
        let inner: Vec<Message> = match calls {
            1 => vec![call(&below, "x", "y")],
            _ => vec![call(&below, "x", "m"), call(&below, "m", "y")],
        };
        out = out.message(25, function(&format!("f{i}"), &inner));
    }
    out.0
}

fn calls_itself() -> Vec<u8> {
    let call = node("f", &["x", "w"], &["y"]).text(7, "local");
    let function = message().text(1, "f").text(4, "x").text(4, "w").text(5, "y");
    let product = node("MatMul", &["x", "w"], &["m"]);
    let function =
        function.message(7, product).message(7, node("f", &["m", "w"], &["y"]).text(7, "local"));
    let function = function.message(9, opset(18)).text(10, "local");
    model(graph(&[call], &[weight("w", [4, 4])])).message(25, function).0
}

/// A weight behind, or a result before, a chain of nodes.
fn chain(length: usize, of_weight: bool) -> Vec<u8> {
    let mut nodes = Vec::new();
    let name = |i: usize| format!("v{i}");
    let (first, last) = if of_weight { ("w", "x2") } else { ("p", "y") };
    for i in 0..length {
        let from = if i == 0 { first.to_owned() } else { name(i - 1) };
        let to = if i + 1 == length { last.to_owned() } else { name(i) };
        nodes.push(node("Identity", &[&from], &[&to]));
    }
    match of_weight {
        true => nodes.push(node("MatMul", &["x", "x2"], &["y"])),
        false => nodes.insert(0, node("MatMul", &["x", "w"], &["p"])),
    }
    model(graph(&nodes, &[weight("w", [4, 4])])).0
}

/// Products of two activations, each of the last one's result, or all of them of what a long chain makes.
fn products(count: usize, of_results: bool) -> Vec<u8> {
    let name = |i: usize| if i == 0 { "x".to_owned() } else { format!("v{i}") };
    let mut nodes = Vec::new();
    for i in 0..count {
        let to = if i + 1 == count { "y".to_owned() } else { name(i + 1) };
        let (op, from) = if of_results { ("MatMul", name(i)) } else { ("Add", name(i)) };
        nodes.push(node(op, &[&from, &from], &[&to]));
        if !of_results {
            nodes.push(node("MatMul", &[&from, &to], &[&format!("p{i}")]));
        }
    }
    model(graph(&nodes, &[])).0
}

/// An index that every Add above it doubles the ways to, read by many products with experts.
fn ranks() -> Vec<u8> {
    let mut nodes = vec![node("Shape", &["x"], &["i0"])];
    for i in 0..24 {
        let (from, to) = (format!("i{i}"), format!("i{}", i + 1));
        nodes.push(node("Add", &[&from, &from], &[&to]));
    }
    for i in 0..2_000 {
        let to = if i == 0 { "y".to_owned() } else { format!("y{i}") };
        nodes.push(node("Gather", &["w", "i24"], &[&format!("g{i}")]));
        nodes.push(node("MatMul", &["x", &format!("g{i}")], &[&to]));
    }
    model(graph(&nodes, &[tensor("w", &[2, 4, 4]).bytes(9, &[0; 128])])).0
}

/// Name, content, and a word of the error; `None` where it may as well work.
fn cases() -> Vec<(&'static str, Vec<u8>, Option<&'static str>)> {
    let product = || node("MatMul", &["x", "w"], &["y"]);
    let w = || weight("w", [4, 4]);
    let whole = || message().int(1, 8).message(8, opset(18));
    let max = "9223372036854775807";
    vec![
        ("length_beyond_the_file", whole().raw(&[0x3a]).raw(&varint(1 << 62)).0, Some("byte")),
        ("length_of_all_bits", whole().raw(&[0x3a]).raw(&varint(u64::MAX)).0, Some("byte")),
        ("varint_without_end", vec![0x08; 1].into_iter().chain([0xff; 64]).collect(), Some("byte")),
        ("varint_too_long", [&[0x08][..], &[0x80; 10], &[0x01]].concat(), Some("byte")),
        ("groups", whole().raw(&[0x0b; 4096]).0, Some("byte")),
        ("field_zero", whole().raw(&[0x02, 0x00]).0, Some("byte")),
        ("nested_bodies", nested(2_000), Some("nest deeper")),
        ("nested_bodies_deep", nested(6_000), Some("nest deeper")),
        ("functions_that_double", functions(40, 2), None),
        ("function_that_calls_itself", calls_itself(), None),
        ("functions_in_a_long_chain", functions(2_000, 1), None),
        ("negative_dims", linear(tensor("w", &[-4, 4]).bytes(9, &[0; 64])), Some("'w'")),
        (
            "overflowing_dims",
            linear(tensor("w", &[1 << 62, 4]).bytes(9, &[0; 64])),
            Some("4611686018427387904"),
        ),
        (
            "wrapping_dims",
            linear(tensor("w", &[1 << 32, 1 << 32]).bytes(9, &[0; 64])),
            Some("4294967296"),
        ),
        ("raw_data_too_short", linear(tensor("w", &[4, 4]).bytes(9, &[0; 63])), Some("'w'")),
        ("raw_data_too_long", linear(tensor("w", &[4, 4]).bytes(9, &[0; 65])), Some("'w'")),
        ("no_data", linear(tensor("w", &[1 << 20, 1 << 20])), Some("'w'")),
        (
            "unknown_type",
            linear(message().int(1, 4).int(1, 4).int(2, 77).text(8, "w")),
            Some("'w'"),
        ),
        ("same_initialiser_twice", model(graph(&[product()], &[w(), w()])).0, Some("'w'")),
        (
            "same_value_twice",
            model(graph(&[product(), product()], &[w()])).0,
            Some("'y' is defined twice"),
        ),
        (
            "cycle",
            model(graph(
                &[node("Add", &["x", "b"], &["a"]), node("MatMul", &["a", "w"], &["b"]), product()],
                &[w()],
            ))
            .0,
            Some("has a cycle"),
        ),
        (
            "value_from_nowhere",
            model(graph(&[node("MatMul", &["q", "w"], &["y"])], &[w()])).0,
            Some("'q', which nothing"),
        ),
        ("external_above", at(&[("location", "../hostile.data")]), Some("../hostile.data")),
        ("external_absolute", at(&[("location", "/etc/hostname")]), Some("/etc/hostname")),
        ("external_missing", at(&[("location", "missing.data")]), Some("missing.data")),
        ("external_nowhere", at(&[("offset", "0")]), Some("location")),
        ("external_folder", at(&[("location", ".")]), Some("'w'")),
        ("external_offset", at(&[("location", "small.data"), ("offset", max)]), Some("'w'")),
        (
            "external_offset_2_63",
            at(&[("location", "small.data"), ("offset", "9223372036854775808")]),
            Some("'w'"),
        ),
        (
            "external_offset_negative",
            at(&[("location", "small.data"), ("offset", "-1")]),
            Some("-1"),
        ),
        ("external_length", at(&[("location", "small.data"), ("length", max)]), Some("'w'")),
        (
            "external_both",
            at(&[("location", "small.data"), ("offset", max), ("length", max)]),
            Some("'w'"),
        ),
        (
            "external_too_short",
            at(&[("location", "small.data"), ("offset", "4")]),
            Some("small.data"),
        ),
        (
            "external_huge",
            linear(external("w", &[1 << 24, 1 << 24], &[("location", "small.data")])),
            Some("small.data"),
        ),
        (
            "external_overlapping",
            model(graph(
                &[node("MatMul", &["x", "w"], &["m"]), node("MatMul", &["m", "v"], &["y"])],
                &[
                    external("w", &[4, 4], &[("location", "small.data"), ("length", "64")]),
                    external(
                        "v",
                        &[4, 3],
                        &[("location", "small.data"), ("offset", "12"), ("length", "48")],
                    ),
                ],
            ))
            .0,
            None,
        ),
        ("long_chain_of_a_weight", chain(20_000, true), None),
        ("products_in_a_long_chain", products(4_000, true), None),
        ("products_before_a_long_chain", products(4_000, false), None),
        ("ranks_by_many_ways", ranks(), None),
        ("long_chain_of_a_result", chain(20_000, false), None),
        (
            "opset_of_all_bits",
            message().int(1, 8).message(7, graph(&[product()], &[w()])).message(8, opset(-1)).0,
            None,
        ),
    ]
}

/// Runs it with a second of CPU time and 100 MB of private memory.
fn rewrite(folder: &Path, name: &str) -> Output {
    Command::new("sh")
        .args(["-c", "ulimit -t 1; ulimit -d 102400; exec \"$0\" \"$@\""])
        .arg(support::mxrewrite())
        .args([name, "-o", "out/out.onnx", "--all-linears", "--threads", "1"])
        .current_dir(folder)
        .output()
        .expect("sh exists")
}

#[test]
fn hostile_files_end_with_an_error_that_says_why() {
    let temporary = tempfile::tempdir().unwrap();
    let folder = temporary.path().join("inner");
    std::fs::create_dir_all(folder.join("out")).unwrap();
    std::fs::write(temporary.path().join("hostile.data"), [0; 64]).unwrap();
    std::fs::write(folder.join("small.data"), [0; 64]).unwrap();
    let keep = std::env::var_os("MX_HOSTILE_DIR");
    let mut wrong = Vec::new();
    for (number, (name, bytes, word)) in cases().into_iter().enumerate() {
        // A name that says nothing: messages hold it.
        let file = format!("{number}.onnx");
        std::fs::write(folder.join(&file), &bytes).unwrap();
        if let Some(dir) = &keep {
            std::fs::write(Path::new(dir).join(format!("{name}.onnx")), &bytes).unwrap();
        }
        let out = rewrite(&folder, &file);
        let (code, stderr) = (out.status.code(), String::from_utf8_lossy(&out.stderr));
        let expected = match word {
            Some(word) => code == Some(1) && stderr.contains(word) && stderr.contains("error"),
            None => matches!(code, Some(0 | 1)),
        };
        let left: Vec<_> = std::fs::read_dir(folder.join("out")).unwrap().flatten().collect();
        if !expected || code != Some(0) && !left.is_empty() || stderr.contains("panicked") {
            let shown: String = stderr.chars().take(400).collect();
            wrong.push(format!("{name}: {} ({} files left)\n{shown}", out.status, left.len()));
        }
        for file in left {
            std::fs::remove_file(file.path()).unwrap();
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
