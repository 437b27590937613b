//! Files that lie, and weights found whatever way the graph holds them.

use std::path::Path;

use mx_kernels::ElementFormat;
use safetensors::{Dtype, tensor::TensorView};

use super::{Checkpoint, CheckpointError, Found, Names, matrix::FloatKind, tensors};
use crate::{
    onnx::{DataType, Model, testing::ModelBuilder},
    rewrite::{
        Filter, PathSource, Role, Rule, Select, Site, SiteFormat, find_sites,
        scan::find_named_sites,
    },
};

type Tensor = (&'static str, Dtype, Vec<usize>, Vec<u8>);

fn write(path: &Path, tensors: &[Tensor]) {
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        (*name, TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    std::fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

fn open(tensors: &[Tensor]) -> Result<Checkpoint, CheckpointError> {
    let folder = tempfile::tempdir().unwrap();
    write(&folder.path().join("model.safetensors"), tensors);
    Checkpoint::open(folder.path())
}

/// Numbers that bfloat16 holds, and that differ between rows, columns and seeds.
fn numbers(count: usize, seed: usize) -> Vec<f32> {
    let value = |i: usize| ((i * i * 31 + i * 7 + seed * 1237) % 251) as f32 / 64.0 - 1.5;
    (0..count).map(value).collect()
}

fn f32s(name: &'static str, shape: &[usize], values: &[f32]) -> Tensor {
    let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    (name, Dtype::F32, shape.to_vec(), bytes)
}

fn bf16s(name: &'static str, shape: &[usize], values: &[f32]) -> Tensor {
    let bytes = values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect();
    (name, Dtype::BF16, shape.to_vec(), bytes)
}

fn transposed(values: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    (0..cols).flat_map(|c| (0..rows).map(move |r| values[r * cols + c])).collect()
}

/// x -> MatMul with each weight [k, n] -> outputs; nothing has a name that says anything.
fn graph(weights: &[(&str, usize, usize, Vec<f32>)]) -> Model {
    let mut builder = ModelBuilder::new(18);
    for (name, k, n, values) in weights {
        let (x, y, k_text, n_text) =
            (format!("x_{name}"), format!("y_{name}"), k.to_string(), n.to_string());
        builder = builder
            .input(&x, DataType::Float, &["m", &k_text])
            .floats(name, &[*k as i64, *n as i64], values)
            .node("MatMul", &[&x, name], &[&y])
            .output(&y, DataType::Float, &["m", &n_text]);
    }
    builder.model()
}

fn everything() -> Filter {
    let rule = Rule { select: Select::everything(), format: Some(SiteFormat::Bf16) };
    Filter::new("everything", &[rule], &[]).unwrap()
}

fn find(checkpoint: &Checkpoint, model: &Model) -> (Names, Vec<Site>) {
    let sites = find_sites(model, &everything()).unwrap().sites;
    let names = checkpoint.find(model, &sites, Some(2)).unwrap();
    let sites = find_named_sites(model, &everything(), &names).unwrap().sites;
    (names, sites)
}

fn paths(sites: &[Site]) -> Vec<(&str, PathSource)> {
    let path = |site: &Site| site.module_path.clone().unwrap_or_default();
    sites.iter().map(|s| (&*Box::leak(path(s).into_boxed_str()), s.path_source)).collect()
}

const BY_CONTENT: PathSource = PathSource::Checkpoint;

#[test]
fn square_weights_are_found_in_both_orientations() {
    let (a, b) = (numbers(48 * 48, 1), numbers(48 * 48, 2));
    let checkpoint =
        open(&[bf16s("h.0.mlp.c_fc.weight", &[48, 48], &a), f32s("h.0.fc2.weight", &[48, 48], &b)]);
    // The graph holds [k, n]: as a Conv1D stores it, and a Linear transposed.
    let model = graph(&[("v0", 48, 48, a), ("v1", 48, 48, transposed(&b, 48, 48))]);
    let (names, sites) = find(&checkpoint.unwrap(), &model);
    assert_eq!(paths(&sites), [("h.0.mlp.c_fc", BY_CONTENT), ("h.0.fc2", BY_CONTENT)]);
    assert_eq!(sites[0].role, Role::Mlp);
    let summary = names.summary.unwrap();
    assert_eq!((summary.layers, summary.matched, summary.ambiguous, summary.packed), (2, 2, 0, 0));
}

#[test]
fn one_number_that_differs_is_no_match() {
    let mut values = numbers(40 * 24, 3);
    let checkpoint = open(&[f32s("fc1.weight", &[24, 40], &values)]).unwrap();
    for place in [0, 500, 959] {
        let before = std::mem::replace(&mut values[place], 7.5);
        let model = graph(&[("v0", 40, 24, transposed(&values, 24, 40))]);
        assert_eq!(paths(&find(&checkpoint, &model).1), [("", PathSource::None)], "{place}");
        values[place] = before;
    }
    let model = graph(&[("v0", 40, 24, transposed(&values, 24, 40))]);
    assert_eq!(paths(&find(&checkpoint, &model).1), [("fc1", BY_CONTENT)]);
}

#[test]
fn equal_tensors_are_not_told_apart_silently() {
    let (same, twice) = (numbers(24 * 40, 4), numbers(24 * 40, 9));
    let checkpoint = open(&[
        f32s("layers.0.mlp.up_proj.weight", &[24, 40], &same),
        f32s("layers.1.mlp.up_proj.weight", &[24, 40], &same),
        f32s("layers.0.mlp.gate_proj.weight", &[24, 40], &twice),
        f32s("layers.0.self_attn.q_proj.weight", &[24, 40], &twice),
    ])
    .unwrap();
    let model = graph(&[
        ("v0", 40, 24, transposed(&same, 24, 40)),
        ("v1", 40, 24, transposed(&twice, 24, 40)),
    ]);
    let (names, sites) = find(&checkpoint, &model);
    // The same role both times: the first name, with little confidence. Two roles: none.
    assert_eq!(
        paths(&sites),
        [("layers.0.mlp.up_proj", PathSource::CheckpointAmbiguous), ("", PathSource::None)]
    );
    assert_eq!(PathSource::CheckpointAmbiguous.confidence(), "low");
    assert!(sites[0].note.as_ref().unwrap().contains("layers.1.mlp.up_proj"), "{sites:?}");
    let note = sites[1].note.as_ref().unwrap();
    assert!(note.contains("gate_proj") && note.contains("q_proj"), "{note}");
    assert_eq!(names.summary.unwrap().ambiguous, 2);
}

#[test]
fn zeros_and_repeated_rows_name_nothing() {
    let (mut embedding, k) = (numbers(64 * 40, 5), numbers(24 * 40, 6));
    embedding[..40].fill(0.0);
    let checkpoint = open(&[
        f32s("m.embed_tokens.weight", &[64, 40], &embedding),
        f32s("l.0.k_proj.weight", &[24, 40], &k),
        f32s("l.0.mlp.up_proj.weight", &[24, 40], &[0.0; 24 * 40]),
        f32s("twins.q_proj.weight", &[8, 40], &numbers(8 * 40, 7)),
        f32s("twins.v_proj.weight", &[8, 40], &numbers(8 * 40, 7)),
    ])
    .unwrap();
    let half = &k[..12 * 40];
    let repeated = [half, half].concat();
    let interleaved: Vec<f32> = (0..24).flat_map(|row| k[row / 2 * 40..][..40].to_vec()).collect();
    let twice = numbers(8 * 40, 7).repeat(2);
    let model = graph(&[
        ("v0", 40, 24, vec![0.0; 24 * 40]),
        ("v1", 40, 24, transposed(&repeated, 24, 40)),
        ("v2", 40, 24, transposed(&interleaved, 24, 40)),
        // Rows of zeros among others are rows of the parameter.
        ("v3", 40, 64, transposed(&embedding, 64, 40)),
        // Two parameters that are equal may both be in it, and in which order is not known.
        ("v4", 40, 16, transposed(&twice, 16, 40)),
    ]);
    let (_, sites) = find(&checkpoint, &model);
    let nothing = ("", PathSource::None);
    let found = paths(&sites);
    assert_eq!(found[..4], [nothing, nothing, nothing, ("m.embed_tokens", BY_CONTENT)]);
    let note = sites[4].note.as_deref().unwrap_or_default();
    assert!(found[4] == nothing && note.contains("twins.{q_proj,v_proj}"), "{:?}", sites[4]);
}

#[test]
fn fused_weights_are_found_in_their_parts_and_parts_in_fused_weights() {
    let (q, k, v) = (numbers(32 * 64, 1), numbers(16 * 64, 2), numbers(16 * 64, 3));
    let gate_up = numbers(96 * 64, 4);
    let packed = numbers(72 * 64, 5);
    let checkpoint = open(&[
        f32s("m.layers.0.self_attn.q_proj.weight", &[32, 64], &q),
        f32s("m.layers.0.self_attn.k_proj.weight", &[16, 64], &k),
        f32s("m.layers.0.self_attn.v_proj.weight", &[16, 64], &v),
        f32s("m.layers.0.mlp.gate_up_proj.weight", &[96, 64], &gate_up),
        f32s("m.layers.1.self_attn.qkv_proj.weight", &[72, 64], &packed),
    ])
    .unwrap();
    let of = |values: &[f32]| transposed(values, values.len() / 64, 64);
    let rows =
        |values: &[f32], rows: std::ops::Range<usize>| of(&values[rows.start * 64..rows.end * 64]);
    let model = graph(&[
        ("v0", 64, 64, of(&[&q[..], &k, &v].concat())),
        ("v1", 64, 48, rows(&gate_up, 0..48)),
        ("v2", 64, 48, rows(&gate_up, 48..96)),
        // No boundary that can be guessed.
        ("v3", 64, 40, rows(&packed, 19..59)),
        ("v4", 64, 64, of(&[&q[..], &gate_up[..32 * 64]].concat())),
    ]);
    let (_, sites) = find(&checkpoint, &model);
    let found: Vec<_> = paths(&sites).into_iter().map(|(path, _)| path).collect();
    assert_eq!(
        found,
        [
            "m.layers.0.self_attn.qkv_proj",
            "m.layers.0.mlp.gate_proj",
            "m.layers.0.mlp.up_proj",
            "m.layers.1.self_attn.qkv_proj",
            "m.layers.0.{self_attn.q_proj,mlp.gate_up_proj}",
        ]
    );
    let roles: Vec<_> = sites.iter().map(|site| site.role).collect();
    use Role::{Attention, Mlp, Packed};
    assert_eq!(roles, [Attention, Mlp, Mlp, Attention, Packed]);
    assert!(sites[0].note.as_ref().unwrap().contains("m.layers.0.self_attn.v_proj"));
    assert!(sites[3].note.as_ref().unwrap().contains("rows 19..59"), "{:?}", sites[3].note);
    // A tier takes a mixture when it takes all of it.
    let rule = |select| Rule { select, format: Some(SiteFormat::Int8) };
    let all = find_sites(&model, &everything()).unwrap().sites;
    let names = checkpoint.find(&model, &all, None).unwrap();
    for (rules, taken) in [
        (vec![rule(Select::mlp()), rule(Select::attention())], true),
        (vec![rule(Select::mlp())], false),
    ] {
        let filter = Filter::new("r", &rules, &[]).unwrap();
        let scan = find_named_sites(&model, &filter, &names).unwrap();
        let is_taken = scan.sites.iter().any(|site| site.weight.initializer == "v4");
        assert_eq!(is_taken, taken, "{:?}", scan.skipped);
    }
}

#[test]
fn stacks_of_experts_have_a_matrix_each() {
    let stack = numbers(3 * 64 * 48, 6);
    let name = "m.layers.0.mlp.experts.gate_up_proj";
    let checkpoint = open(&[bf16s(name, &[3, 64, 48], &stack)]).unwrap();
    let expert = &stack[64 * 48..2 * 64 * 48];
    let even: Vec<f32> = expert.iter().step_by(2).copied().collect();
    let odd: Vec<f32> = expert.iter().skip(1).step_by(2).copied().collect();
    let model = graph(&[
        ("v0", 64, 48, stack[2 * 64 * 48..].to_vec()),
        ("v1", 64, 24, even),
        ("v2", 64, 24, odd),
    ]);
    let (_, sites) = find(&checkpoint, &model);
    let found: Vec<_> = paths(&sites).into_iter().map(|(path, _)| path).collect();
    assert_eq!(
        found,
        [
            "m.layers.0.mlp.experts.2.gate_up_proj",
            "m.layers.0.mlp.experts.1.gate_proj",
            "m.layers.0.mlp.experts.1.up_proj"
        ]
    );
    assert!(sites.iter().all(|site| site.role == Role::Expert));
}

#[test]
fn what_the_graph_says_is_weighed() {
    let values = numbers(24 * 40, 7);
    let found = |names: &[&'static str]| -> Found {
        let tensors: Vec<Tensor> =
            names.iter().map(|name| f32s(name, &[24, 40], &values)).collect();
        let model = graph(&[("v0", 40, 24, transposed(&values, 24, 40))]);
        let names = find(&open(&tensors).unwrap(), &model).0;
        names.get(0, find_sites(&model, &everything()).unwrap().sites[0].node).unwrap().clone()
    };
    let one = found(&["model.layers.0.mlp.up_proj.weight"]);
    let settle = |found: &Found, path: &str, source, head, tied| {
        let path = (!path.is_empty()).then(|| path.to_owned());
        let settled = found.settle(path, source, head, tied);
        (settled.path.unwrap_or_default(), settled.source, settled.note.unwrap_or_default())
    };
    let metadata = PathSource::Metadata;
    let own = "model.layers.0.mlp.up_proj".to_owned();
    // Agreement keeps what the graph says, a wrapper's prefix and what lies below included.
    for path in [&*own, "m.model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj.base_layer"] {
        assert_eq!(settle(&one, path, metadata, false, false), (path.into(), metadata, "".into()));
    }
    // Content wins over a name of another layer, and says so.
    let (path, source, note) = settle(&one, "model.layers.1.mlp.up_proj", metadata, false, false);
    assert_eq!((path, source), (own.clone(), BY_CONTENT));
    assert!(note.contains("model.layers.1.mlp.up_proj") && note.contains("metadata"), "{note}");
    // A name that says nothing of the layer's kind does not win over one that does.
    let strange = found(&["blk.0.ffn_in.weight"]);
    let (path, source, note) = settle(&strange, &own, metadata, false, false);
    assert_eq!((path, source), (own.clone(), metadata));
    assert!(note.contains("blk.0.ffn_in"), "{note}");
    assert_eq!(settle(&strange, "", PathSource::None, false, false).0, "blk.0.ffn_in");
    // Mistral's own names are known.
    let mistral = found(&["layers.0.attention.wq.weight"]);
    let q = "model.layers.0.self_attn.q_proj";
    assert_eq!(settle(&mistral, q, metadata, false, false).0, "layers.0.attention.wq");
    // A stack is less than its expert.
    let (path, source, _) = settle(&one, "model.layers.0.mlp", metadata, false, false);
    assert_eq!((path, source), (own.clone(), BY_CONTENT));
    assert_eq!(settle(&one, "", PathSource::None, false, false).0, own);
    // The head stays the head, whatever else has its content.
    let tied = found(&["model.embed_tokens.weight"]);
    assert_eq!(settle(&tied, "lm_head", PathSource::Structure, true, true).0, "lm_head");
    let both = found(&["lm_head.weight", "model.embed_tokens.weight"]);
    assert_eq!(settle(&both, "lm_head", metadata, true, false).1, metadata);
    // One of several equal ones is what the graph says it is, if it says so.
    let twins = found(&["a.k_proj.weight", "a.v_proj.weight"]);
    assert_eq!(
        settle(&twins, "a.v_proj", metadata, false, false),
        ("a.v_proj".into(), metadata, "".into())
    );
    let (path, _, note) = settle(&twins, "a.q_proj", metadata, false, false);
    assert!(path == "a.q_proj" && note.contains("a.k_proj, a.v_proj"), "{path} {note}");
}

#[test]
fn a_stack_that_no_layer_is_of_costs_nothing() {
    let values = numbers(24 * 40, 8);
    let checkpoint = open(&[
        f32s("conv.weight", &[1000, 1, 1], &[0.5; 1000]),
        f32s("l.experts.up_proj", &[2, 40, 12], &values),
    ])
    .unwrap();
    assert_eq!(checkpoint.stacks.len(), 2);
    let of = |lengths: &[usize]| {
        let lengths = lengths.iter().copied().collect();
        let stacks = checkpoint.stacks.iter().filter(|stack| stack.has_lines_of(&lengths));
        stacks.flat_map(tensors::Stack::matrices).collect::<Vec<_>>()
    };
    assert_eq!((of(&[24]).len(), of(&[40]).len(), of(&[12]).len()), (0, 2, 2));
    let second = &of(&[40])[1];
    assert_eq!((second.expert, second.at(1, 0, FloatKind::F32)), (Some(1), values[41 * 12]));
    // A row that is more than one comparison takes by itself is one all the same.
    let long = numbers(3 << 19, 8);
    let checkpoint = open(&[f32s("l.up_proj.weight", &[3, 1 << 19], &long)]).unwrap();
    let model = graph(&[("v0", 1 << 19, 3, transposed(&long, 3, 1 << 19))]);
    assert_eq!(paths(&find(&checkpoint, &model).1), [("l.up_proj", BY_CONTENT)]);
}

fn message(result: Result<Checkpoint, CheckpointError>) -> String {
    result.expect_err("a bad checkpoint").to_string()
}

#[test]
fn scales_have_to_fit_their_codes() {
    let bytes = |name, shape: &[usize]| -> Tensor {
        (name, Dtype::U8, shape.to_vec(), vec![0x7f; shape.iter().product()])
    };
    for (tensors, expected) in [
        (vec![bytes("e.up_blocks", &[2, 4, 3, 16])], "'e.up_scales' is not in the checkpoint"),
        (vec![bytes("e.up_blocks", &[2, 4, 3, 16]), bytes("e.up_scales", &[2, 4, 4])], "[2, 4, 4]"),
        (
            vec![bytes("e.up_blocks", &[2, 4, 3, 8]), bytes("e.up_scales", &[2, 4, 3])],
            "rows, k / 32, 16",
        ),
        (vec![bytes("a.weight_packed", &[4, 32]), bytes("a.weight_scale", &[4, 4])], "[4, 4]"),
        (vec![bytes("a.weight_packed", &[4, 24]), bytes("a.weight_scale", &[4, 1])], "[4, 24]"),
        (vec![bytes("a.weight_packed", &[4, 32])], "'a.weight_scale' is not"),
        (
            vec![bytes("e.up_blocks", &[4, 1, 16]), f32s("e.up_scales", &[4, 1], &[1.0; 4])],
            "F32; the scales of MX codes",
        ),
        (
            vec![
                ("a.weight", Dtype::F8_E4M3, vec![4, 64], vec![1; 256]),
                ("a.weight_scale", Dtype::F8_E8M0, vec![4, 1], vec![1; 4]),
            ],
            "take scales [n, k / 32]",
        ),
    ] {
        let message = message(open(&tensors));
        let names = message.contains(expected) && message.contains("model.safetensors");
        assert!(names && !message.contains('\n'), "{expected}: {message}");
    }
    // Scales of another kind are another format's, and no business of this one.
    let nvfp4 = [
        bytes("a.weight_packed", &[4, 32]),
        ("a.weight_scale", Dtype::F8_E4M3, vec![4, 4], vec![1; 16]),
        ("b.weight", Dtype::F8_E4M3, vec![4, 64], vec![1; 256]),
    ];
    assert!(open(&nvfp4).unwrap().stacks.is_empty());
    // Neither is what merely has such a name.
    assert!(open(&[bytes("attn.mask_blocks", &[4, 4])]).unwrap().stacks.is_empty());
}

#[test]
fn a_nan_scale_is_refused_when_the_weight_could_be_meant() {
    let codes: Vec<u8> = (0..96).map(|i| (i * 29 + 8) as u8).collect();
    let tensors = |scale: u8| -> [Tensor; 2] {
        let mut scales = vec![127; 2 * 3];
        scales[4] = scale;
        [
            ("e.up_blocks", Dtype::U8, vec![3, 2, 16], codes.clone()),
            ("e.up_scales", Dtype::U8, vec![3, 2], scales),
        ]
    };
    let checkpoint = open(&tensors(0xff)).unwrap();
    let sites = |model: &Model| find_sites(model, &everything()).unwrap().sites;
    // An exporter that widened the codes has NaN in the graph.
    let spec = mx_kernels::QuantSpec::mx(ElementFormat::Fp4E2M1).unwrap();
    let mut values = vec![0.0; 192];
    mx_kernels::dequantize_rows(
        &spec,
        &codes,
        &[127, 127, 127, 127, 0xff, 127],
        3,
        64,
        &mut values,
    )
    .unwrap();
    assert!(values[2 * 64].is_nan());
    let model = graph(&[("v0", 64, 3, transposed(&values, 3, 64))]);
    let message = checkpoint.find(&model, &sites(&model), None).unwrap_err().to_string();
    let parts = ["'e.up_blocks'", "model.safetensors", "block 0 of row 2", "0xff"];
    assert!(parts.iter().all(|part| message.contains(part)), "{message}");
    // A weight that is another one has nothing to do with the damage, be its k the same.
    for k in [32, 64] {
        let other = graph(&[("v0", k, 3, numbers(3 * k, 1))]);
        assert!(checkpoint.find(&other, &sites(&other), None).is_ok());
    }
}

#[test]
fn packed_rows_are_found_by_the_values_that_they_stand_for() {
    let spec = mx_kernels::QuantSpec::mx(ElementFormat::Fp4E2M1).unwrap();
    let codes: Vec<u8> = (0..2 * 4 * 32).map(|i| (i * 29 + i / 7 + 8) as u8).collect();
    let scales: Vec<u8> = (0..2 * 4 * 2).map(|i| 120 + (i % 9) as u8).collect();
    let mut values = vec![0.0; 2 * 4 * 64];
    mx_kernels::dequantize_rows(&spec, &codes, &scales, 8, 64, &mut values).unwrap();
    let checkpoint = open(&[
        ("m.experts.gate_up_proj_blocks", Dtype::U8, vec![2, 4, 2, 16], codes),
        ("m.experts.gate_up_proj_scales", Dtype::U8, vec![2, 4, 2], scales),
    ])
    .unwrap();
    let second = &values[256..];
    let row = |row: usize| &second[row * 64..(row + 1) * 64];
    let model = graph(&[
        ("v0", 64, 4, transposed(second, 4, 64)),
        ("v1", 64, 2, transposed(&[row(1), row(3)].concat(), 2, 64)),
        // De-interleaved into one: the gate's rows, then up's.
        ("v2", 64, 4, transposed(&[row(0), row(2), row(1), row(3)].concat(), 4, 64)),
        // The same values along the other axis have no blocks there.
        ("v3", 4, 64, second.to_vec()),
    ]);
    let (_, sites) = find(&checkpoint, &model);
    let found: Vec<_> = sites
        .iter()
        .map(|site| (site.module_path.as_deref().unwrap_or(""), site.packed.is_some()))
        .collect();
    let own = "m.experts.1.gate_up_proj";
    assert_eq!(found, [(own, true), ("m.experts.1.up_proj", true), (own, true), ("", false)]);
}
