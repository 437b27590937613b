//! Weights that an index chooses from a stack at run time.

use super::*;
use crate::rewrite::{Experts, Region};

/// A graph with the stack `w` and the index `i` of so many dimensions.
fn chosen(stack: &[i64], index_rank: usize) -> Build {
    Build::new().weight("w", stack).input("i", index_rank)
}

fn experts(linear: &Linear) -> &Experts {
    linear.experts.as_ref().unwrap()
}

#[test]
fn one_expert_is_chosen_by_a_scalar() {
    let stored_by_columns =
        chosen(&[4, 32, 48], 0).node("Gather", &["w", "i"], "e").node("MatMul", &["x", "e"], "y");
    let linear = stored_by_columns.linear();
    assert_eq!((linear.n, linear.k, linear.layout), (48, 32, Layout::KN));
    assert_eq!(
        (linear.region, linear.replaces.as_slice()),
        (Region { start: 0, pitch: 48 }, &[1][..])
    );
    assert_eq!((linear.operand.as_str(), linear.weight.root.as_str()), ("e", "w"));
    let want = Experts { count: 4, index: "i".into(), index_rank: 0, points: false, turned: None };
    assert_eq!(experts(&linear), &want);
    for perm in [true, false] {
        let mut build = chosen(&[4, 48, 32], 0)
            .node("Gather", &["w", "i"], "e")
            .int("axis", -3)
            .node("Transpose", &["e"], "t");
        if perm {
            build = build.list("perm", &[1, 0]);
        }
        let linear = build.node("MatMul", &["x", "t"], "y").linear();
        assert_eq!((linear.n, linear.k, linear.layout), (48, 32, Layout::NK));
        assert_eq!((linear.region, linear.operand.as_str()), (Region { start: 0, pitch: 32 }, "t"));
        assert_eq!(experts(&linear), &want);
    }
}

#[test]
fn a_stack_may_be_turned_before_the_choice() {
    let linear = chosen(&[4, 48, 32], 0)
        .node("Transpose", &["w"], "t")
        .list("perm", &[0, 2, 1])
        .node("Gather", &["t", "i"], "e")
        .node("Identity", &["e"], "same")
        .node("MatMul", &["x", "same"], "y")
        .linear();
    assert_eq!((linear.n, linear.k, linear.layout), (48, 32, Layout::NK));
}

#[test]
fn many_are_chosen_by_an_index_of_any_rank() {
    for rank in 1..4 {
        let mut perm: Vec<i64> = (0..rank as i64 + 2).collect();
        perm.swap(rank, rank + 1);
        let linear = chosen(&[4, 48, 32], rank)
            .node("Gather", &["w", "i"], "e")
            .node("Transpose", &["e"], "t")
            .list("perm", &perm)
            .node("MatMul", &["x", "t"], "y")
            .linear();
        assert_eq!((linear.n, linear.k, linear.layout), (48, 32, Layout::NK));
        assert_eq!((experts(&linear).index_rank, experts(&linear).turned), (rank, None));
    }
    // The rank follows from the Transpose where the model says nothing.
    let mut build = Build::new().weight("w", &[4, 48, 32]);
    build = build.node("Opaque", &["x"], "i").node("Gather", &["w", "i"], "e");
    let linear = build
        .node("Transpose", &["e"], "t")
        .list("perm", &[0, 2, 1])
        .node("MatMul", &["x", "t"], "y")
        .linear();
    assert_eq!(experts(&linear).index_rank, 1);
}

#[test]
fn a_weight_on_the_left_turns_x_and_y() {
    let left = |x_rank: usize, index_rank: usize| {
        let build = chosen(&[4, 48, 32], index_rank).input("v", x_rank);
        build.node("Gather", &["w", "i"], "e").node("MatMul", &["e", "v"], "y")
    };
    let linear = left(3, 1).linear();
    assert_eq!((linear.n, linear.k, linear.layout, linear.x.as_str()), (48, 32, Layout::NK, "v"));
    assert_eq!(experts(&linear).turned, Some([3, 3]));
    assert_eq!(experts(&left(2, 2).linear()).turned, Some([2, 4]));
    assert_eq!(experts(&left(4, 0).linear()).turned, Some([4, 4]));
    assert_eq!(experts(&left(1, 2).linear()).turned, None, "a vector is a column");
    let unknown = chosen(&[4, 48, 32], 1).node("Opaque", &["x"], "v");
    let unknown = unknown.node("Gather", &["w", "i"], "e").node("MatMul", &["e", "v"], "y");
    assert!(unknown.reason().contains("rank of operand B 'v'"));
    // transformers' batched products, as torch's TorchScript exporter writes them without any shape.
    let mut found = Build::new()
        .weight("up", &[4, 64, 32])
        .weight("down", &[4, 32, 64])
        .ints("last", &[-1])
        .node("Flatten", &["x"], "rows")
        .node("Opaque", &["x"], "choice")
        .node("Reshape", &["choice", "last"], "i")
        .node("Gather", &["up", "i"], "e")
        .node("Unsqueeze", &["rows", "last"], "column")
        .node("MatMul", &["e", "column"], "h")
        .node("Squeeze", &["h", "last"], "hidden")
        .node("Sigmoid", &["hidden"], "gate")
        .node("Mul", &["hidden", "gate"], "act")
        .node("Gather", &["down", "i"], "d")
        .node("Unsqueeze", &["act", "last"], "again")
        .node("MatMul", &["d", "again"], "y")
        .matches();
    assert_eq!(found.len(), 2);
    for (n, k) in [(32, 64), (64, 32)] {
        let Some(Match::Linear(linear)) = found.pop() else { panic!("{found:?}") };
        assert_eq!((linear.n, linear.k, experts(&linear).turned), (n, k, Some([3, 3])));
    }
}

#[test]
fn points_of_gathernd_are_an_index_with_a_last_axis_of_one() {
    let nd = |build: Build| {
        build
            .node("GatherND", &["w", "p"], "e")
            .node("Transpose", &["e"], "t")
            .list("perm", &[0, 2, 1])
            .node("MatMul", &["x", "t"], "y")
    };
    for axis in [-1, 1] {
        let unsqueezed = chosen(&[4, 48, 32], 1).ints("a", &[axis]);
        let linear = nd(unsqueezed.node("Unsqueeze", &["i", "a"], "p")).linear();
        let experts = experts(&linear);
        assert_eq!((experts.index.as_str(), experts.points, experts.index_rank), ("i", false, 1));
    }
    let mut declared = Build::new().weight("w", &[4, 48, 32]).input("p", 2);
    declared.types.get_mut("p").unwrap().dims = Some(vec![None, Some(1)]);
    let linear = nd(declared).linear();
    assert_eq!((experts(&linear).points, experts(&linear).index_rank), (true, 1));
    let two = |last: Option<i64>| {
        let mut build = Build::new().weight("w", &[4, 48, 32]).input("p", 2);
        build.types.get_mut("p").unwrap().dims = Some(vec![None, last]);
        nd(build).reason()
    };
    assert!(two(Some(2)).contains("2 numbers"));
    assert!(two(None).contains("how many numbers"));
    let batches = chosen(&[4, 48, 32], 1)
        .ints("a", &[-1])
        .node("Unsqueeze", &["i", "a"], "p")
        .node("GatherND", &["w", "p"], "e")
        .int("batch_dims", 1)
        .node("MatMul", &["x", "e"], "y");
    assert!(batches.reason().contains("batch_dims"));
}

#[test]
fn a_fused_product_keeps_its_factor() {
    let fused = |name: &str| {
        let build = chosen(&[4, 48, 32], 1).node("Gather", &["w", "i"], "e");
        build.node("com.microsoft::FusedMatMul", &["x", "e"], "y").int(name, 1).float("alpha", 0.5)
    };
    let linear = fused("transB").linear();
    assert_eq!((linear.n, linear.k, linear.layout, linear.alpha), (48, 32, Layout::NK, 0.5));
    for name in ["transA", "transBatchA", "transBatchB"] {
        assert!(fused(name).reason().contains(name));
    }
}

#[test]
fn an_add_behind_it_stays() {
    let linear = chosen(&[4, 32, 48], 0)
        .weight("b", &[48])
        .node("Gather", &["w", "i"], "e")
        .node("MatMul", &["x", "e"], "h")
        .node("Add", &["h", "b"], "y")
        .linear();
    assert_eq!((linear.bias, linear.y.as_str(), linear.replaces), (None, "h", vec![1]));
}

#[test]
fn half_precision_stacks_may_be_widened_and_not_narrowed() {
    let cast = |from: DataType, to: DataType| {
        Build::new()
            .typed("w", from, &[4, 32, 48])
            .input("i", 0)
            .node("Gather", &["w", "i"], "e")
            .node("Cast", &["e"], "c")
            .int("to", to as i64)
            .node("MatMul", &["x", "c"], "y")
    };
    let linear = cast(DataType::Bfloat16, DataType::Float).linear();
    let types = (linear.weight.dtype, linear.weight.operand_dtype);
    assert_eq!(types, (DataType::Bfloat16, DataType::Float));
    assert!(cast(DataType::Float, DataType::Float16).reason().contains("loses precision"));
    assert!(cast(DataType::Int8, DataType::Float).reason().contains("can be quantised"));
}

#[test]
fn what_is_not_understood_says_why() {
    let gather = |build: Build| build.node("Gather", &["w", "i"], "e");
    let product = |build: Build, weight: &str| build.node("MatMul", &["x", weight], "y").reason();
    let turned = |perm: &[i64], rank| {
        product(
            gather(chosen(&[4, 8, 8], rank)).node("Transpose", &["e"], "t").list("perm", perm),
            "t",
        )
    };
    let cases = [
        (product(gather(chosen(&[4, 8, 8], 0)).int("axis", 1), "e"), "axis 1"),
        (turned(&[2, 1, 0], 1), "moves the index's axes"),
        (turned(&[1, 0, 2], 1), "moves the index's axes"),
        (turned(&[0, 2, 1], 0), "contradict"),
        (turned(&[0], 1), "too few axes"),
        (
            product(gather(chosen(&[4, 8, 8], 1)).node("Transpose", &["e"], "t"), "t"),
            "without perm",
        ),
        (product(gather(chosen(&[4, 2, 8, 8], 0)), "e"), "three axes"),
        (product(gather(chosen(&[0, 8, 8], 0)), "e"), "holds no expert"),
        (product(gather(chosen(&[4, 0, 8], 0)), "e"), "empty shape"),
        (
            product(gather(Build::new().weight("w", &[4, 8, 8]).node("Opaque", &["x"], "i")), "e"),
            "rank of its index 'i'",
        ),
        (
            product(
                gather(chosen(&[4, 8, 8], 1)).ints("a", &[0]).node("Squeeze", &["e", "a"], "s"),
                "s",
            ),
            "Squeeze node_s lies between",
        ),
        (
            gather(chosen(&[4, 8, 8], 0)).node("MatMul", &["e", "e"], "y").reason(),
            "both operands are chosen",
        ),
        (gather(chosen(&[4, 8, 8], 0)).node("Gemm", &["x", "e"], "y").reason(), "only MatMul"),
    ];
    for (reason, word) in cases {
        assert!(reason.contains(word), "{reason:?} does not speak of {word:?}");
    }
    let mut overridden = chosen(&[4, 8, 8], 0);
    overridden.inputs.push("w".into());
    assert!(product(gather(overridden), "e").contains("caller may replace it"));
}

#[test]
fn a_linear_on_what_was_looked_up_is_an_ordinary_one() {
    let linear = chosen(&[4, 8, 32], 0)
        .weight("m", &[32, 48])
        .node("Gather", &["w", "i"], "e")
        .node("MatMul", &["e", "m"], "y")
        .linear();
    assert_eq!((linear.experts, linear.n, linear.x.as_str()), (None, 48, "e"));
}
