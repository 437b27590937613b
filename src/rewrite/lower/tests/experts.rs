//! Products with experts that an index chooses at run time.

use super::*;
use crate::rewrite::Role;

const STACK: &str = "model.layers.0.mlp.experts.up_proj";

/// A stack [3, 6, 40] (`rows`) or [3, 40, 6] of experts with n = 6 and k = 40, and what a product reads.
fn stacked(rows: bool, index: &[&str]) -> ModelBuilder {
    let builder = ModelBuilder::new(18).input("x", DataType::Float, &["m", "40"]).input(
        "i",
        DataType::Int64,
        index,
    );
    let dims: [i64; 3] = if rows { [3, 6, 40] } else { [3, 40, 6] };
    builder.floats(STACK, &dims, &ramp(720)).node("Gather", &[STACK, "i"], &["e"])
}

fn perm(axes: &'static [i64]) -> impl Fn(&mut Node) {
    move |node| node.attribute.push(super::super::ints("perm", axes))
}

fn by_row(index: &[&str]) -> ModelBuilder {
    stacked(true, index)
        .node("Transpose", &["e"], &["t"])
        .with(perm(&[0, 2, 1]))
        .node("MatMul", &["x", "t"], &["y"])
        .output("y", DataType::Float, &["s", "m", "6"])
}

#[test]
fn the_stack_is_packed_and_the_choice_goes() {
    for format in [ElementFormat::Fp8E4M3, ElementFormat::Fp6E3M2, ElementFormat::Fp4E2M1] {
        let out = rewrite_with(&by_row(&["s"]).model(), &mx(format));
        assert_eq!(ops(&out), ["MxExpertMatMul"]);
        let node = named(&out, "MxExpertMatMul")[0];
        let (codes, scales) = (format!("{STACK}.mx_codes"), format!("{STACK}.mx_scales"));
        assert_eq!(node.input, ["x", "i", &codes, &scales]);
        assert_eq!((node.output[0].as_str(), node.name.as_deref()), ("y", Some("node_y")));
        let path = node.metadata_props.iter().find(|e| e.key.as_deref() == Some(MODULE_PATH_KEY));
        assert_eq!(path.and_then(|e| e.value.as_deref()), Some(STACK));
        let dims = |name: &str| out.graph().initializer(name).unwrap().dims.clone();
        let row = QuantSpec::mx(format).unwrap().row_bytes(40) as i64;
        assert_eq!((dims(&codes), dims(&scales)), (vec![3, 6, row], vec![3, 6, 2]));
        // Expert by expert the bytes of the expert alone.
        let sizes = initializers(&out);
        for expert in 0..3 {
            let alone = ModelBuilder::new(18)
                .input("x", DataType::Float, &["m", "40"])
                .floats("w", &[6, 40], &ramp(720)[expert * 240..][..240])
                .node("Transpose", &["w"], &["t"])
                .node("MatMul", &["x", "t"], &["y"])
                .output("y", DataType::Float, &["m", "6"]);
            let alone = rewrite_with(&alone.model(), &mx(format));
            for (stack, own) in [(&codes, "w.mx_codes"), (&scales, "w.mx_scales")] {
                let bytes = |model: &Model, name: &str| {
                    model.tensor(model.graph().initializer(name).unwrap()).unwrap().bytes
                };
                let len = sizes[stack] / 3;
                assert_eq!(bytes(&out, stack)[expert * len..][..len], bytes(&alone, own));
            }
        }
    }
}

#[test]
fn a_stack_that_is_stored_the_other_way_round_gets_the_same_bytes() {
    let rows = by_row(&[]);
    let by_rows = rewrite_with(
        &stacked(true, &[])
            .node("Transpose", &["e"], &["t"])
            .node("MatMul", &["x", "t"], &["y"])
            .output("y", DataType::Float, &["m", "6"])
            .model(),
        &mx(ElementFormat::Fp4E2M1),
    );
    let turned: Vec<f32> =
        (0..720).map(|at| ramp(720)[at / 240 * 240 + at % 240 % 6 * 40 + at % 240 / 6]).collect();
    let mut columns = stacked(false, &[]).node("MatMul", &["x", "e"], &["y"]).output(
        "y",
        DataType::Float,
        &["m", "6"],
    );
    columns = columns.floats("other", &[3, 40, 6], &turned);
    columns.nodes[0].input[0] = "other".into();
    let by_columns = rewrite_with(&columns.model(), &mx(ElementFormat::Fp4E2M1));
    assert_eq!(ops(&by_columns), ["MxExpertMatMul"]);
    for part in ["codes", "scales"] {
        let bytes = |model: &Model, name: &str| {
            let name = format!("{name}.mx_{part}");
            model.tensor(model.graph().initializer(&name).unwrap()).unwrap().bytes
        };
        assert_eq!(bytes(&by_rows, STACK), bytes(&by_columns, "other"));
    }
    // Its Transpose has three axes and its index none.
    assert!(
        find_sites(&rows.model(), &filter(&mx(ElementFormat::Fp4E2M1))).unwrap().sites.is_empty()
    );
}

fn filter(options: &RewriteOptions) -> Filter {
    Recipe::new(options).unwrap().filter().unwrap()
}

#[test]
fn a_stack_that_others_read_stays_and_is_packed_once() {
    let model = by_row(&["s"])
        .node("MatMul", &["x", "t"], &["again"])
        .node("Relu", &["t"], &["z"])
        .output("again", DataType::Float, &["s", "m", "6"])
        .output("z", DataType::Float, &["s", "40", "6"])
        .model();
    let out = rewrite_with(&model, &mx(ElementFormat::Fp8E4M3));
    assert_eq!(ops(&out), ["Gather", "Transpose", "MxExpertMatMul", "MxExpertMatMul", "Relu"]);
    assert_eq!(initializers(&out).len(), 3);
}

#[test]
fn a_weight_on_the_left_is_turned_with_x_and_y() {
    let model = ModelBuilder::new(18)
        .input("x", DataType::Float, &["s", "40", "1"])
        .input("i", DataType::Int64, &["s", "1"])
        .floats(STACK, &[3, 6, 40], &ramp(720))
        .node("GatherND", &[STACK, "i"], &["e"])
        .node("MatMul", &["e", "x"], &["y"])
        .output("y", DataType::Float, &["s", "6", "1"])
        .model();
    let out = rewrite_with(&model, &mx(ElementFormat::Fp8E4M3));
    assert_eq!(ops(&out), ["Squeeze", "Transpose", "MxExpertMatMul", "Transpose"]);
    let node = named(&out, "MxExpertMatMul")[0];
    let [before, after] = named(&out, "Transpose")[..] else { panic!() };
    let squeeze = named(&out, "Squeeze")[0];
    assert_eq!((&before.input[0], &before.output[0]), (&"x".to_owned(), &node.input[0]));
    assert_eq!((&after.input[0], after.output[0].as_str()), (&node.output[0], "y"));
    assert_eq!((squeeze.input[0].as_str(), &squeeze.output[0]), ("i", &node.input[1]));
    assert!([before, after].iter().all(|node| node.attribute[0].ints == [0, 2, 1]));
}

#[test]
fn plans_tell_experts_and_what_has_no_form_for_them() {
    let model = by_row(&["s"]).model();
    let plan = |options: &RewriteOptions| {
        let recipe = Recipe::new(options).unwrap();
        let filter = recipe.filter().unwrap();
        RewritePlan::new(find_sites(&model, &filter).unwrap(), recipe)
    };
    let tier_a = RewriteOptions { tier: Tier::A, ..Default::default() };
    let planned = plan(&tier_a);
    let site = &planned.sites[0];
    assert_eq!((site.site.role, site.site.n, site.site.k), (Role::Expert, 6, 40));
    assert_eq!((site.bytes_before, site.bytes_after), (3 * 6 * 40 * 4, 3 * 6 * 2 * 33));
    let json = serde_json::to_value(&planned).unwrap();
    assert_eq!(
        (&json["sites"][0]["experts"], &json["sites"][0]["role"]),
        (&3.into(), &"expert".into())
    );
    assert!(crate::rewrite::plan_table(&planned).contains("MatMul, 3 experts"));
    let mut measured = plan(&tier_a);
    crate::rewrite::measure_plan(&model, &mut measured, Some(1)).unwrap();
    assert!((20.0..50.0).contains(&measured.sites[0].expected_sqnr.unwrap()));
    for (lowering, word) in [
        (Lowering::Int8, "--lower int8"),
        (Lowering::NvFp8, "--lower nvfp8"),
        (Lowering::Qdq, "--lower qdq"),
    ] {
        let planned = plan(&options(lowering));
        assert!(planned.sites.is_empty());
        let reason = &planned.skipped[0].reason;
        assert!(reason.contains("3 experts") && reason.contains(word), "{reason}");
    }
    for lowering in [Lowering::Bfp16, Lowering::NvFp8EmuE4m3, Lowering::NvFp8EmuE5m2] {
        let out = rewrite_with(&model, &options(lowering));
        assert_eq!(named(&out, "MxExpertMatMul")[0].input.len(), 3, "no scales");
    }
}
