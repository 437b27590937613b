//! Which layers are found: on real exports (`../shared/zoo`, when it is there) and on graphs of our own
//! that no exporter of the zoo produces.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use mxrewrite::rewrite::{PathSource, RewriteOptions, RewritePlan, Role, Tier, plan_file};
use serde_json::Value;

use crate::models::{
    FunctionProto, GraphProto, model, node, value, weight, with_int, with_metadata, write,
};
use crate::support;

/// Layers of a plan by node name.
fn nodes(plan: &RewritePlan) -> BTreeSet<String> {
    plan.sites.iter().map(|planned| planned.site.node_name.clone()).collect()
}

fn plan(path: &Path, tier: Tier, include: &[&str]) -> RewritePlan {
    let include = include.iter().map(|&pattern| pattern.to_owned()).collect();
    let options = RewriteOptions { tier, include, ..RewriteOptions::default() };
    plan_file(path, &options).unwrap_or_else(|error| panic!("{}: {error}", path.display())).1
}

/// What the checkpoint's own parameter name says of a layer.
fn kind(parameter: &str) -> Role {
    let parts: Vec<&str> = parameter.split('.').collect();
    let has = |names: &[&str]| parts.iter().any(|part| names.contains(part));
    if has(&["lm_head", "embed_out", "embed_tokens", "wte"]) {
        Role::Head
    } else if has(&["gate"]) {
        Role::Router
    } else if has(&["mlp", "ffn", "experts", "fc1", "fc2"]) {
        Role::Mlp
    } else {
        Role::Attention
    }
}

/// Folder and truth of every zoo model, or a skip.
fn zoo() -> Option<BTreeMap<String, (PathBuf, Value)>> {
    let Some(folder) = support::shared().map(|shared| shared.join("zoo")) else {
        support::skip("zoo", "no ../shared/zoo beside the checkout (set MX_SHARED)");
        return None;
    };
    let text = std::fs::read_to_string(folder.join("truth.json")).unwrap();
    let Value::Object(truth) = serde_json::from_str(&text).unwrap() else { panic!("truth.json") };
    let model = |(name, truth): (String, Value)| {
        let path = folder.join(&name).join("model.onnx");
        (name, (path, truth))
    };
    Some(truth.into_iter().map(model).collect())
}

/// Node and role of every linear that is a product of its own.
fn linears(truth: &Value) -> Vec<(String, Role)> {
    let linears = truth["linears"].as_array().unwrap().iter();
    let own = linears.filter(|linear| {
        matches!(linear["op"].as_str().unwrap(), "MatMul" | "Gemm" | "com.microsoft::FusedMatMul")
    });
    own.map(|linear| {
        let role = kind(linear["parameter"].as_str().unwrap());
        (linear["node"].as_str().unwrap().to_owned(), role)
    })
    .collect()
}

#[test]
fn linears_of_the_zoo_are_found_exactly() {
    let Some(zoo) = zoo() else { return };
    let mut checked = 0;
    for (name, (path, truth)) in &zoo {
        let linears = linears(truth);
        let expected = |roles: &[Role]| -> BTreeSet<String> {
            let of = linears.iter().filter(|(_, role)| roles.contains(role));
            of.map(|(node, _)| node.clone()).collect()
        };
        let (mlp, attention, head) = (Role::Mlp, Role::Attention, Role::Head);
        let all = expected(&[mlp, attention]);
        assert!(!all.is_empty() && !expected(&[head]).is_empty(), "{name}");
        let found = plan(path, Tier::AllLinears, &[]);
        assert_eq!(nodes(&found), all, "{name} --all-linears");
        // Both branches of a merged decoder have the same names.
        let count = linears.iter().filter(|(_, role)| [mlp, attention].contains(role)).count();
        assert_eq!(found.sites.len(), count, "{name} --all-linears");
        let with_head = plan(path, Tier::AllLinears, &["lm_head"]);
        assert_eq!(nodes(&with_head), expected(&[mlp, attention, head]), "{name} with the head");
        assert_eq!(nodes(&plan(path, Tier::A, &[])), expected(&[mlp]), "{name} --tier-a");
        assert_eq!(nodes(&plan(path, Tier::Full, &[])), all, "{name} --tier full");
        for planned in &with_head.sites {
            assert_ne!(planned.site.path_source, PathSource::None, "{name} {planned:?}");
        }
        checked += 1;
    }
    assert!(checked >= 31, "only {checked} models");
    println!("{checked} models");
}

#[test]
fn every_candidate_of_the_zoo_ends_in_one_list() {
    let Some(zoo) = zoo() else { return };
    for (name, (path, truth)) in &zoo {
        let plan = plan(path, Tier::AllLinears, &[]);
        let sites = nodes(&plan);
        let skipped: BTreeSet<String> = plan.skipped.iter().map(|s| s.node.clone()).collect();
        for (node, _) in linears(truth) {
            assert!(sites.contains(&node) || skipped.contains(&node), "{name}: {node}");
        }
        assert!(plan.skipped.iter().all(|skipped| !skipped.reason.is_empty()), "{name}");
        let dynamic = plan.skipped.iter().filter(|s| s.reason.contains("two dynamic")).count();
        println!("{name}: {} sites, {} skipped, {dynamic} dynamic", sites.len(), skipped.len());
    }
}

#[test]
fn layers_in_branches_and_packed_ones_are_told_apart() {
    let Some(zoo) = zoo() else { return };
    let merged = plan(&zoo["llama31-optimum-merged"].0, Tier::AllLinears, &[]);
    let graphs: BTreeSet<usize> = merged.sites.iter().map(|planned| planned.site.graph).collect();
    assert_eq!(graphs, BTreeSet::from([1, 2]));
    assert!(merged.skipped.iter().all(|s| s.reason.contains("_branch of If")), "{merged:?}");
    // Packed by ONNX Runtime's fusions: layers of both tiers under one made-up name.
    let packed = &zoo["phi-hfexp-ort"].0;
    for tier in [Tier::AllLinears, Tier::Full] {
        let found = plan(packed, tier, &[]);
        let nameless = found.skipped.iter().filter(|s| s.reason.contains("packed")).count();
        assert_eq!((found.sites.len(), nameless), (4, 2), "{:?}", found.skipped);
    }
    assert_eq!(plan(packed, Tier::AllLinears, &["packed_matmul"]).sites.len(), 6);
}

/// A chain of named layers: `(node name, weight name, bias name)`, every weight [64, 64].
fn chain(layers: &[(&str, &str, Option<&str>)]) -> GraphProto {
    let mut graph = GraphProto { input: vec![value("x", 2)], ..GraphProto::default() };
    let mut from = "x".to_owned();
    for (index, (name, initializer, bias)) in layers.iter().enumerate() {
        let product = format!("product_{index}");
        graph.node.push(node("MatMul", name, &[&from, initializer], &[&product]));
        if !graph.initializer.iter().any(|tensor| tensor.name.as_deref() == Some(initializer)) {
            graph.initializer.push(weight(initializer, &[64, 64]));
        }
        from = product;
        if let Some(bias) = bias {
            let sum = format!("sum_{index}");
            // The bias first: exporters put it on either side.
            graph.node.push(node("Add", &format!("add_{index}"), &[bias, &from], &[&sum]));
            graph.initializer.push(weight(bias, &[64]));
            from = sum;
        }
    }
    graph.output = vec![value(&from, 2)];
    graph
}

fn plan_graph(graph: GraphProto, tier: Tier, include: &[&str]) -> RewritePlan {
    let folder = tempfile::tempdir().unwrap();
    let path = write(folder.path(), "model.onnx", &model(graph));
    plan(&path, tier, include)
}

#[test]
fn paths_come_from_whatever_is_left() {
    let graph = chain(&[
        ("/model/layers.0/self_attn/q_proj/MatMul", "onnx::MatMul_1", None),
        ("node_MatMul_7", "model.layers.0.mlp.up_proj.weight", None),
        ("node_MatMul_8", "val_8", Some("model.layers.0.mlp.down_proj.bias")),
        ("node_MatMul_9", "val_9", None),
    ]);
    let found = plan_graph(graph, Tier::AllLinears, &[]);
    let paths: Vec<_> = found
        .sites
        .iter()
        .map(|planned| (planned.site.module_path.as_deref(), planned.site.path_source))
        .collect();
    assert_eq!(
        paths,
        [
            (Some("model.layers.0.self_attn.q_proj"), PathSource::Node),
            (Some("model.layers.0.mlp.up_proj"), PathSource::Initializer),
            (Some("model.layers.0.mlp.down_proj"), PathSource::Bias),
            (None, PathSource::None),
        ]
    );
    assert!(found.sites[2].site.bias.is_some());
}

#[test]
fn a_tier_says_of_nameless_layers_that_it_cannot_place_them() {
    let graph = || chain(&[("node_MatMul_9", "val_9", None)]);
    let found = plan_graph(graph(), Tier::Full, &[]);
    assert!(found.sites.is_empty());
    assert!(found.skipped[0].reason.contains("--include"), "{:?}", found.skipped);
    assert_eq!(plan_graph(graph(), Tier::Full, &["MatMul_9"]).sites.len(), 1);
    assert_eq!(plan_graph(graph(), Tier::Full, &["val_9"]).sites.len(), 1);
}

#[test]
fn every_name_of_the_tiers_is_placed() {
    let mlp = [
        "gate_proj",
        "up_proj",
        "down_proj",
        "gate_up_proj",
        "fc1",
        "fc2",
        "w1",
        "w2",
        "w3",
        "dense_h_to_4h",
        "dense_4h_to_h",
        "c_fc",
        "c_proj",
    ];
    let attention = [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "qkv_proj",
        "c_attn",
        "c_proj",
        "query",
        "key",
        "value",
        "dense",
        "query_key_value",
        "Wqkv",
        "out_proj",
    ];
    for (block, names) in [("mlp", &mlp[..]), ("attn", &attention)] {
        for name in names {
            let path = format!("/net/blocks.3/{block}/{name}/MatMul");
            let graph = chain(&[(&path, "onnx::MatMul_1", None)]);
            let in_a = usize::from(block == "mlp");
            assert_eq!(plan_graph(graph.clone(), Tier::A, &[]).sites.len(), in_a, "{path}");
            assert_eq!(plan_graph(graph, Tier::B, &[]).sites.len(), 1, "{path}");
        }
    }
}

#[test]
fn tiers_c_and_d_mix_formats() {
    let layers = [("/l/mlp/fc1/MatMul", "a", None), ("/l/attn/q_proj/MatMul", "b", None)];
    for (tier, expected) in
        [(Tier::C, ["fp6_e3m2", "fp8_e4m3"]), (Tier::D, ["fp4_e2m1", "fp6_e3m2"])]
    {
        let found = plan_graph(chain(&layers), tier, &[]);
        let formats: Vec<_> = found.sites.iter().map(|s| s.format.weight_name()).collect();
        assert_eq!(formats, expected);
    }
}

#[test]
fn a_tied_head_is_found_by_structure_and_keeps_quiet_until_named() {
    let head = |output: &str| GraphProto {
        node: vec![
            node("Gather", "lookup", &["emb", "ids"], &["h"]),
            node("Transpose", "t", &["emb"], &["emb_t"]),
            node("MatMul", "node_1", &["h", "emb_t"], &["raw"]),
            node("Cast", "cast", &["raw"], &[output]),
        ],
        initializer: vec![weight("emb", &[40, 64])],
        input: vec![value("ids", 2)],
        output: vec![value(output, 3)],
        ..GraphProto::default()
    };
    let cast = |mut graph: GraphProto| {
        graph.node[3] = with_int(graph.node[3].clone(), "to", 1);
        graph
    };
    let quiet = plan_graph(cast(head("logits")), Tier::AllLinears, &[]);
    assert!(quiet.sites.is_empty());
    assert!(quiet.skipped[0].reason.contains("head"), "{:?}", quiet.skipped);
    let named = plan_graph(cast(head("logits")), Tier::AllLinears, &["lm_head"]);
    let site = &named.sites[0].site;
    assert_eq!(
        (site.role, site.path_source, site.weight.tied),
        (Role::Head, PathSource::Structure, true)
    );
    assert_eq!((site.n, site.k), (40, 64));
    // Another output is no head.
    assert_eq!(plan_graph(cast(head("hidden")), Tier::AllLinears, &[]).sites.len(), 1);
}

#[test]
fn routers_are_never_taken_by_a_tier() {
    let router = "/m/layers.0/block_sparse_moe/gate/MatMul";
    let layers = [(router, "a", None), ("/m/layers.0/mlp/gate_proj/MatMul", "b", None)];
    for tier in [Tier::A, Tier::Full, Tier::AllLinears] {
        let found = plan_graph(chain(&layers), tier, &[]);
        assert_eq!(found.sites.len(), 1, "{tier}");
        assert!(found.skipped.iter().any(|s| s.node == router && s.reason.contains("router")));
    }
    assert_eq!(plan_graph(chain(&layers), Tier::A, &[r"\.gate$"]).sites.len(), 2);
}

#[test]
fn a_weight_of_two_layers_serves_both() {
    let layers = [("/l/mlp/fc1/MatMul", "shared", None), ("/l/mlp/fc2/MatMul", "shared", None)];
    let found = plan_graph(chain(&layers), Tier::A, &[]);
    let paths: Vec<_> = found.sites.iter().filter_map(|s| s.site.module_path.as_deref()).collect();
    assert_eq!(paths, ["l.mlp.fc1", "l.mlp.fc2"]);
}

#[test]
fn metadata_wins_over_names() {
    let mut graph = chain(&[("/wrong/fc2/MatMul", "also.wrong.weight", None)]);
    let scopes = "['', 'model', 'model.mlp', 'model.mlp.up_proj', 'linear_3']";
    let named = with_metadata(graph.node[0].clone(), "pkg.torch.onnx.name_scopes", scopes);
    graph.node[0] = named;
    let found = plan_graph(graph, Tier::A, &[]);
    let site = &found.sites[0].site;
    assert_eq!(site.module_path.as_deref(), Some("model.mlp.up_proj"));
    assert_eq!(site.path_source, PathSource::Metadata);
}

#[test]
fn layers_in_bodies_are_found_and_those_in_functions_listed() {
    let body = GraphProto {
        node: vec![node("MatMul", "inner", &["x", "w"], &["b"])],
        output: vec![value("b", 2)],
        ..GraphProto::default()
    };
    let mut branch = node("If", "choose", &["flag"], &["y"]);
    for name in ["then_branch", "else_branch"] {
        branch.attribute.push(mxrewrite::onnx::proto::Attribute {
            name: Some(name.into()),
            g: Some(prost::Message::encode_to_vec(&body).into()),
            r#type: Some(5),
            ..Default::default()
        });
    }
    let mut model = model(GraphProto {
        node: vec![branch],
        initializer: vec![weight("w", &[64, 64])],
        input: vec![value("x", 2), value("flag", 0)],
        output: vec![value("y", 2)],
        ..GraphProto::default()
    });
    model.functions.push(FunctionProto {
        name: Some("Block".into()),
        domain: Some("local".into()),
        node: vec![node("MatMul", "in_function", &["a", "b"], &["c"])],
        ..FunctionProto::default()
    });
    let folder = tempfile::tempdir().unwrap();
    let path = write(folder.path(), "model.onnx", &model);
    let found = plan(&path, Tier::AllLinears, &[]);
    assert_eq!(found.sites.len(), 2);
    assert_eq!(nodes(&found), BTreeSet::from(["inner".to_owned()]));
    let reasons: Vec<_> =
        found.skipped.iter().map(|s| (s.node.as_str(), s.reason.as_str())).collect();
    let [(node, reason)] = reasons[..] else { panic!("{reasons:?}") };
    assert_eq!(node, "in_function");
    assert!(reason.starts_with("in a local function (local.Block): "), "{reason}");
}
