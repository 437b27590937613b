//! Weights that are parts of a larger constant.

use super::*;
use crate::rewrite::Region;

#[test]
fn one_expert_of_a_stack_is_read_where_it_lies() {
    // Transposed stacks as well as stacks that are turned round after the cut.
    let split = |perm: bool| {
        let mut build = Build::new()
            .weight("w", &[4, 32, 48])
            .ints("axes", &[0])
            .node("Split", &["w"], "s0")
            .int("num_outputs", 4);
        build.nodes.last_mut().unwrap().output.extend(["s1".into(), "s2".into(), "s3".into()]);
        build = build.node("Squeeze", &["s2", "axes"], "e");
        match perm {
            true => build.node("Transpose", &["e"], "t").node("MatMul", &["x", "t"], "y").linear(),
            false => build.node("MatMul", &["x", "e"], "y").linear(),
        }
    };
    let (plain, turned) = (split(false), split(true));
    assert_eq!((plain.n, plain.k, plain.layout), (48, 32, Layout::KN));
    assert_eq!((turned.n, turned.k, turned.layout), (32, 48, Layout::NK));
    let region = Region { start: 2 * 32 * 48, pitch: 48 };
    assert_eq!((plain.region, turned.region), (region, region));
    for (index, dims) in [(-1, vec![]), (3, vec![1])] {
        let scalar = dims.is_empty();
        let ints = Some(vec![index]);
        let mut build = Build::new().weight("w", &[4, 32, 48]).ints("axes", &[0]);
        let dtype = Some(DataType::Int64);
        build.initializers.push(("i".into(), ConstTensor { dtype, dims, ints }));
        build = build.node("Gather", &["w", "i"], "g");
        let linear = match scalar {
            true => build.node("MatMul", &["x", "g"], "y").linear(),
            false => {
                build.node("Squeeze", &["g", "axes"], "e").node("MatMul", &["x", "e"], "y").linear()
            }
        };
        assert_eq!(linear.region, Region { start: 3 * 32 * 48, pitch: 48 });
    }
}

#[test]
fn one_layer_of_a_packed_weight_is_read_where_it_lies() {
    let slice = |dims: &[i64], axis: i64| {
        Build::new()
            .weight("w", dims)
            .ints("from", &[16])
            .ints("to", &[i64::MAX])
            .ints("axes", &[axis])
            .node("Slice", &["w", "from", "to", "axes"], "s")
            .node("MatMul", &["x", "s"], "y")
    };
    let columns = slice(&[32, 48], -1).linear();
    assert_eq!((columns.n, columns.region), (32, Region { start: 16, pitch: 48 }));
    let rows = slice(&[48, 32], 0).linear();
    assert_eq!((rows.k, rows.region), (32, Region { start: 16 * 32, pitch: 32 }));
    let sizes = Build::new()
        .weight("w", &[32, 48])
        .ints("sizes", &[32, 16])
        .node("Split", &["w", "sizes"], "s")
        .int("axis", 1)
        .node("MatMul", &["x", "s"], "y")
        .linear();
    assert_eq!((sizes.n, sizes.region), (32, Region { start: 0, pitch: 48 }));
    // Neither rows nor columns of the middle axis's neighbours touch.
    let strided = Build::new()
        .weight("w", &[32, 48, 2])
        .ints("axes", &[2])
        .node("Split", &["w"], "s")
        .int("axis", 2)
        .int("num_outputs", 2)
        .node("Squeeze", &["s", "axes"], "e")
        .node("MatMul", &["x", "e"], "y");
    assert!(strided.reason().contains("contiguous"));
    let mut beyond = Build::new()
        .weight("w", &[32, 48])
        .ints("sizes", &[32, 64])
        .node("Split", &["w", "sizes"], "z")
        .int("axis", 1);
    beyond.nodes.last_mut().unwrap().output = vec!["z".into(), "s".into()];
    assert!(beyond.node("MatMul", &["x", "s"], "y").reason().contains("Split"));
}

#[test]
fn a_part_is_no_bias_in_another_shape() {
    // A Row's numbers are copied from the whole constant.
    let gemm = Build::new()
        .weight("w", &[32, 48])
        .weight("c", &[2, 48])
        .ints("i", &[1])
        .node("Gather", &["c", "i"], "row")
        .node("Gemm", &["x", "w", "row"], "y")
        .linear();
    assert_eq!((gemm.bias, gemm.residual.as_deref()), (None, Some("row")));
}

#[test]
fn experts_that_are_chosen_in_ways_not_understood_say_so() {
    let gathered = |inputs: &[&str]| {
        Build::new()
            .weight("w", &[4, 8, 8])
            .node("Relu", &["x"], "i")
            .node("Gather", &["w", "i"], "e")
            .node("Transpose", &["e"], "t")
            .node("MatMul", inputs, "y")
    };
    for inputs in [["x", "t"], ["t", "x"], ["i", "t"]] {
        let reason = gathered(&inputs).reason();
        assert!(reason.contains("stack 'w' [4, 8, 8]") && reason.contains("run time"), "{reason}");
    }
    // An embedding has rank 2, and a product of what it gives is attention's.
    let looked_up = Build::new()
        .weight("emb", &[100, 8])
        .node("Relu", &["x"], "i")
        .node("Gather", &["emb", "i"], "e")
        .node("MatMul", &["e", "i"], "y");
    assert!(looked_up.reason().contains("two dynamic operands"));
}
