//! `mxrewrite --checkpoint` with weights that are MX codes: they are written byte by byte.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use mxrewrite::onnx::{DataType, Model};
use safetensors::Dtype;

use crate::checkpoint::{Tensor, floats, json, products, run, safetensors, text, write};
use crate::models::{GraphProto, node, value, with_int};

const FP4: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];

/// An fp4 matrix [rows, k], that quantising its values would not make again: every code, the zeros
/// with a sign, blocks of small codes under large scales, the smallest and large scales.
struct Fp4 {
    k: usize,
    codes: Vec<u8>,
    scales: Vec<u8>,
}

impl Fp4 {
    fn new(rows: usize, k: usize, seed: usize) -> Self {
        let code = |i: usize| {
            let block = i / 16;
            let byte = (i * 73 + i / 16 * 11 + seed * 41) as u8;
            // Every third block has codes 0, 1, 8 and 9 only.
            if block.is_multiple_of(3) { byte & 0x99 } else { byte }
        };
        let scale = |i: usize| match (i + seed) % 7 {
            0 => 0,
            1 => 0x8f,
            other => 118 + other as u8,
        };
        Self {
            k,
            codes: (0..rows * k / 2).map(code).collect(),
            scales: (0..rows * k / 32).map(scale).collect(),
        }
    }

    fn rows(&self) -> usize {
        self.codes.len() * 2 / self.k
    }

    fn row(&self, row: usize) -> Vec<f32> {
        let value = |i: usize| {
            let index = row * self.k + i;
            let code = self.codes[index / 2] >> (4 * (index % 2)) & 0xf;
            let sign = if code & 8 == 0 { 1.0 } else { -1.0 };
            let scale = f64::from(self.scales[index / 32]) - 127.0;
            (sign * f64::from(FP4[usize::from(code & 7)]) * scale.exp2()) as f32
        };
        (0..self.k).map(value).collect()
    }

    /// Values [k, n] of some rows, as an exporter stores a weight.
    fn turned(&self, rows: &[usize]) -> Vec<f32> {
        let rows: Vec<Vec<f32>> = rows.iter().map(|&row| self.row(row)).collect();
        (0..self.k).flat_map(|k| rows.iter().map(move |row| row[k])).collect()
    }

    /// Codes and scales of some rows.
    fn bytes(&self, rows: &[usize]) -> [Vec<u8>; 2] {
        let of = |bytes: &[u8], width: usize| -> Vec<u8> {
            rows.iter().flat_map(|row| bytes[row * width..(row + 1) * width].to_vec()).collect()
        };
        [of(&self.codes, self.k / 2), of(&self.scales, self.k / 32)]
    }
}

/// Codes and scales of every MxMatMul by the weight that it had.
fn packed(path: &Path) -> BTreeMap<String, [Vec<u8>; 2]> {
    let model = Model::open(path).unwrap();
    let tensor = |name: &str| {
        let info = model.graph().initializer(name).unwrap();
        model.tensor(info).unwrap().bytes.to_vec()
    };
    let nodes = model.graph().nodes().map(|(_, node)| node);
    nodes
        .filter(|node| node.op_type.as_deref() == Some("MxMatMul"))
        .map(|node| {
            let weight = node.input[1].trim_end_matches(".mx_codes").to_owned();
            (weight, [tensor(&node.input[1]), tensor(&node.input[2])])
        })
        .collect()
}

/// Two experts of gpt-oss, [2, 8, 2, 16] gate_up with alternating rows and [2, 64, 1, 16] down.
fn gpt_oss(folder: &Path) -> [[Fp4; 2]; 2] {
    let gate_up = [Fp4::new(8, 64, 1), Fp4::new(8, 64, 2)];
    let down = [Fp4::new(64, 32, 3), Fp4::new(64, 32, 4)];
    let mut tensors: Vec<Tensor> = Vec::new();
    for (name, experts) in [("gate_up_proj", &gate_up), ("down_proj", &down)] {
        let (rows, groups) = (experts[0].rows(), experts[0].k / 32);
        let name = format!("model.layers.0.mlp.experts.{name}");
        let codes = experts.iter().flat_map(|e| e.codes.clone()).collect();
        let scales = experts.iter().flat_map(|e| e.scales.clone()).collect();
        tensors.push((format!("{name}_blocks"), Dtype::U8, vec![2, rows, groups, 16], codes));
        tensors.push((format!("{name}_scales"), Dtype::U8, vec![2, rows, groups], scales));
        tensors.push((format!("{name}_bias"), Dtype::BF16, vec![2, rows], vec![0; 4 * rows]));
    }
    safetensors(&folder.join("model.safetensors"), &tensors);
    [gate_up, down]
}

/// The same experts as an exporter may hold them: a stack [experts, k, n] that a Split cuts, and one
/// weight each, gate and up told apart.
fn gpt_oss_graph([gate_up, down]: &[[Fp4; 2]; 2], dtype: DataType) -> GraphProto {
    let all: Vec<usize> = (0..8).collect();
    let stack: Vec<f32> = gate_up.iter().flat_map(|expert| expert.turned(&all)).collect();
    let single = |name: &str, of: &Fp4, rows: &[usize]| {
        floats(name, &[of.k, rows.len()], dtype, &of.turned(rows))
    };
    let every: Vec<usize> = (0..64).collect();
    let mut graph = products(vec![
        single("v0", &gate_up[1], &[0, 2, 4, 6]),
        single("v1", &gate_up[1], &[1, 3, 5, 7]),
        single("v2", &gate_up[0], &[0, 2, 4, 6, 1, 3, 5, 7]),
        single("v3", &down[0], &every),
        single("v4", &down[1], &every),
    ]);
    let split = node("Split", "", &["stack"], &["part_0", "part_1"]);
    graph.node.push(with_int(with_int(split, "axis", 0), "num_outputs", 2));
    graph.initializer.push(floats("stack", &[2, 64, 8], dtype, &stack));
    graph.initializer.push(mxrewrite::onnx::proto::Tensor {
        name: Some("zero".into()),
        dims: vec![1],
        data_type: Some(DataType::Int64 as i32),
        raw_data: Some(vec![0; 8].into()),
        ..Default::default()
    });
    for expert in ["0", "1"] {
        let name = |stem: &str| format!("{stem}_{expert}");
        let (part, flat, wide) = (name("part"), name("flat"), name("wide"));
        let (x, y) = (name("xs"), name("ys"));
        graph.node.push(node("Squeeze", "", &[&part, "zero"], &[&flat]));
        graph.node.push(with_int(node("Cast", "", &[&flat], &[&wide]), "to", 1));
        graph.node.push(node("MatMul", "", &[&x, &wide], &[&y]));
        graph.input.push(value(&x, 2));
        graph.output.push(value(&y, 2));
    }
    graph
}

#[test]
fn codes_of_gpt_oss_are_written_as_they_are() {
    let folder = tempfile::tempdir().unwrap();
    let experts = gpt_oss(folder.path());
    let [gate_up, down] = &experts;
    let (every, all): (Vec<usize>, Vec<usize>) = ((0..64).collect(), (0..8).collect());
    for (name, dtype) in
        [("f", DataType::Float), ("b", DataType::Bfloat16), ("h", DataType::Float16)]
    {
        let (input, out) = (format!("{name}.onnx"), format!("{name}.out.onnx"));
        write(folder.path(), &input, gpt_oss_graph(&experts, dtype));
        let report =
            json(folder.path(), &[&input, "-o", &out, "--tier-a", "--checkpoint", ".", "--json"]);
        let sites = report["plan"]["sites"].as_array().unwrap();
        assert_eq!(sites.len(), 7, "{name}");
        for site in sites {
            assert_eq!(site["weight_source"], "checkpoint");
            assert_eq!(
                (&site["weight_format"], &site["block_size"]),
                (&"fp4_e2m1".into(), &32.into())
            );
            assert_eq!(site["activation_format"], "fp8_e4m3", "the default is the options'");
            assert_eq!(site["role"], "expert");
        }
        let paths: Vec<&str> = sites.iter().map(|s| s["module_path"].as_str().unwrap()).collect();
        let own = |end: &str| format!("model.layers.0.mlp.experts.{end}");
        let ends = ["1.gate_proj", "1.up_proj", "0.gate_up_proj", "0.down_proj", "1.down_proj"];
        let ends = ends.iter().chain(&["0.gate_up_proj", "1.gate_up_proj"]);
        assert_eq!(paths, ends.map(|end| own(end)).collect::<Vec<_>>());
        let found = packed(&folder.path().join(&out));
        assert_eq!(found["v0"], gate_up[1].bytes(&[0, 2, 4, 6]), "{name}");
        assert_eq!(found["v1"], gate_up[1].bytes(&[1, 3, 5, 7]), "{name}");
        assert_eq!(found["v2"], gate_up[0].bytes(&[0, 2, 4, 6, 1, 3, 5, 7]), "{name}");
        assert_eq!(found["v3"], down[0].bytes(&every), "{name}");
        assert_eq!(found["v4"], down[1].bytes(&every), "{name}");
        assert_eq!(found["stack"], gate_up[0].bytes(&all), "{name}");
        assert_eq!(found["stack.mx_codes_1"], gate_up[1].bytes(&all), "{name}");
    }
    // They are not what quantising makes of the same values.
    let arguments = ["f.onnx", "-o", "q.onnx", "--all-linears", "--format", "fp4_e2m1"];
    json(folder.path(), &[&arguments[..], &["--json"]].concat());
    assert_ne!(packed(&folder.path().join("q.onnx"))["v3"], down[0].bytes(&every));
}

#[test]
fn a_format_that_is_asked_for_is_made_and_a_plan_makes_the_same_again() {
    let folder = tempfile::tempdir().unwrap();
    let experts = gpt_oss(folder.path());
    write(folder.path(), "m.onnx", gpt_oss_graph(&experts, DataType::Float));
    let plan = |more: &[&str]| {
        let arguments = ["m.onnx", "--plan", "--json", "--checkpoint", "."];
        json(folder.path(), &[&arguments[..], more].concat())
    };
    for (arguments, source, format) in [
        (&["--tier-a"][..], "checkpoint", "fp4_e2m1"),
        (&["--tier-a", "--format", "fp4_e2m1"], "checkpoint", "fp4_e2m1"),
        (&["--tier", "d"], "checkpoint", "fp4_e2m1"),
        (&["--tier-a", "--format", "fp8_e4m3"], "quantised", "fp8_e4m3"),
        (&["--tier", "c"], "quantised", "fp6_e3m2"),
        (&["--tier-a", "--block-size", "64"], "quantised", "fp8_e4m3"),
        (&["--tier-a", "--lower", "int8"], "quantised", "int8"),
    ] {
        let plan = plan(arguments);
        let site = &plan["sites"][0];
        assert_eq!(
            (&site["weight_source"], &site["weight_format"]),
            (&source.into(), &format.into()),
            "{arguments:?}"
        );
        let asks = source == "quantised" && format != "int8";
        let note = site["note"].to_string();
        assert_eq!(note.contains("quantised again: the checkpoint holds fp4_e2m1"), asks, "{note}");
    }
    // Blocks of X are those of the weight, under any lowering, and a rule that says another size is told.
    for lowering in ["mx", "qdq"] {
        let rule = format!(
            "lowering = \"{lowering}\"\npacked_weights = \"checkpoint\"\n[[rules]]\nrole = \"expert\"\n\
             weight_format = \"fp8_e4m3\"\nblock_size = 64\n"
        );
        fs::write(folder.path().join("r.toml"), rule).unwrap();
        let plan = plan(&["--recipe", "r.toml"]);
        let site = &plan["sites"][0];
        assert_eq!((&site["weight_format"], &site["block_size"]), (&"fp4_e2m1".into(), &32.into()));
        assert!(
            site["note"].to_string().contains("for the activation too, and not of 64"),
            "{site}"
        );
        let (output, input) = (format!("{lowering}.onnx"), "m.onnx");
        let arguments = [input, "-o", &output, "--recipe", "r.toml", "--checkpoint", ".", "--json"];
        json(folder.path(), &arguments);
        // k = 64 is two blocks: the qdq form reshapes X by the block.
        let made = Model::open(folder.path().join(&output)).unwrap();
        let has_64 = made.graph().nodes().any(|(_, node)| {
            node.attribute
                .iter()
                .any(|a| a.name.as_deref() == Some("block_size") && a.i == Some(64))
        });
        assert!(!has_64, "{lowering}");
    }
    let weight_only = plan(&["--tier-a", "--activation-format", "none"]);
    assert_eq!(weight_only["sites"][0]["activation_format"], "none");
    assert_eq!(weight_only["sites"][0]["weight_source"], "checkpoint");

    json(folder.path(), &["m.onnx", "-o", "a.onnx", "--tier-a", "--checkpoint", ".", "--json"]);
    let again = ["m.onnx", "-o", "b.onnx", "--recipe", "a.onnx"];
    let without = run(folder.path(), &again);
    assert_eq!(without.status.code(), Some(2), "{}", text(&without.stderr));
    assert!(text(&without.stderr).contains("--checkpoint"), "{}", text(&without.stderr));
    json(folder.path(), &[&again[..], &["--checkpoint", ".", "--json"]].concat());
    let read = |name: &str| fs::read(folder.path().join(name)).unwrap();
    assert_eq!(read("a.onnx"), read("b.onnx"), "the recipe in the metadata makes the same file");
    // Asked for by name, the format is imported all the same, and needs the checkpoint as well.
    let named = ["--tier-a", "--format", "fp4_e2m1", "--checkpoint", ".", "--json"];
    json(folder.path(), &[&["m.onnx", "-o", "c.onnx"], &named[..]].concat());
    let without = run(folder.path(), &["m.onnx", "-o", "d.onnx", "--recipe", "c.onnx"]);
    assert_eq!(without.status.code(), Some(2), "{}", text(&without.stderr));
    let again = ["m.onnx", "-o", "d.onnx", "--recipe", "c.onnx", "--checkpoint", ".", "--json"];
    let report = json(folder.path(), &again);
    assert!(report["plan"]["recipe"]["packed_weights"].is_null(), "{}", report["plan"]["recipe"]);
    assert_eq!(read("c.onnx"), read("d.onnx"));
    let shown = run(folder.path(), &["m.onnx", "--plan", "--tier-a", "--checkpoint", "."]);
    let shown = text(&shown.stdout);
    assert!(shown.contains("fp4_e2m1 (imported)") && shown.contains("7 imported"), "{shown}");
}

#[test]
fn names_of_openai_are_known() {
    let folder = tempfile::tempdir().unwrap();
    let experts = [Fp4::new(8, 64, 1), Fp4::new(8, 64, 2)];
    let codes = experts.iter().flat_map(|e| e.codes.clone()).collect();
    let scales = experts.iter().flat_map(|e| e.scales.clone()).collect();
    let own = |end: &str| format!("block.0.mlp.mlp1_weight.{end}");
    safetensors(
        &folder.path().join("model.safetensors"),
        &[
            (own("blocks"), Dtype::U8, vec![2, 8, 2, 16], codes),
            (own("scales"), Dtype::U8, vec![2, 8, 2], scales),
        ],
    );
    let all: Vec<usize> = (0..8).collect();
    let name = "model.layers.0.mlp.experts.1.gate_up_proj.weight";
    let weight = floats(name, &[64, 8], DataType::Float, &experts[1].turned(&all));
    write(folder.path(), "m.onnx", products(vec![weight]));
    let arguments = ["m.onnx", "-o", "o.onnx", "--tier-a", "--checkpoint", ".", "--json"];
    let report = json(folder.path(), &arguments);
    let site = &report["plan"]["sites"][0];
    assert_eq!(site["module_path"], "block.0.mlp.experts.1.mlp1");
    assert_eq!((&site["role"], &site["weight_source"]), (&"expert".into(), &"checkpoint".into()));
    assert_eq!(packed(&folder.path().join("o.onnx"))[name], experts[1].bytes(&all));
}

#[test]
fn codes_of_compressed_tensors_are_written_as_they_are() {
    let folder = tempfile::tempdir().unwrap();
    let fp4 = Fp4::new(24, 96, 5);
    let every: Vec<usize> = (0..24).collect();
    // Every E4M3 code but its NaNs, and scales that no rule would choose.
    let codes: Vec<u8> = (0..24 * 96_usize)
        .map(|i| (i * 57 + i / 96) as u8)
        .map(|code| if code & 0x7f == 0x7f { 0x80 } else { code })
        .collect();
    let scales: Vec<u8> = (0..24 * 3).map(|i| 110 + (i * 5 % 17) as u8).collect();
    let spec = mx_kernels::QuantSpec::mx(mx_kernels::ElementFormat::Fp8E4M3).unwrap();
    let mut values = vec![0.0; 24 * 96];
    mx_kernels::reference::dequantize_rows(&spec, &codes, &scales, 24, 96, &mut values).unwrap();
    let turned: Vec<f32> = (0..96)
        .flat_map(|k| (0..24).map(move |n| (n, k)))
        .map(|(n, k)| values[n * 96 + k])
        .collect();
    for scale in [Dtype::U8, Dtype::F8_E8M0] {
        let own = |end: &str| format!("model.layers.3.mlp.{end}");
        safetensors(
            &folder.path().join("model.safetensors"),
            &[
                (own("up_proj.weight_packed"), Dtype::U8, vec![24, 48], fp4.codes.clone()),
                (own("up_proj.weight_scale"), scale, vec![24, 3], fp4.scales.clone()),
                (own("down_proj.weight"), Dtype::F8_E4M3, vec![24, 96], codes.clone()),
                (own("down_proj.weight_scale"), scale, vec![24, 3], scales.clone()),
            ],
        );
        let weights = vec![
            floats("v0", &[96, 24], DataType::Float, &fp4.turned(&every)),
            floats("v1", &[96, 24], DataType::Float, &turned),
        ];
        write(folder.path(), "m.onnx", products(weights));
        let arguments =
            ["m.onnx", "-o", "o.onnx", "--tier-a", "--checkpoint", ".", "--force", "--json"];
        let report = json(folder.path(), &arguments);
        let sites = &report["plan"]["sites"];
        let format = |site: usize| sites[site]["weight_format"].as_str().unwrap();
        assert_eq!([format(0), format(1)], ["fp4_e2m1", "fp8_e4m3"]);
        assert_eq!(sites[1]["module_path"], "model.layers.3.mlp.down_proj");
        let found = packed(&folder.path().join("o.onnx"));
        assert_eq!(found["v0"], fp4.bytes(&every));
        assert_eq!(found["v1"], [codes.clone(), scales.clone()]);
    }
}
