//! `MatMul` with weights that a run-time index chooses from a stack `[experts, ., .]` by Gather or
//! GatherND: mixture-of-experts layers whose router's choice picks the weight, not the rows of X.
//!
//! ```text
//! Y = MatMul(X, [Transpose](Gather(stack, index)))      operand B: [index..., k, n]
//! Y = MatMul([Transpose](Gather(stack, index)), X)      operand A: [index..., n, k]; X [.., k, m], Y [.., n, m]
//! ```

use std::cell::Cell;

use super::{
    Constant, Linear, MAX_CHAIN, Stored, Traced, slices, stored, trace,
    trace::{axes, cast},
};
use crate::{
    graph::{GraphView, Source, attribute, domain, float_attribute, int_attribute, is_op, op_name},
    onnx::proto::{DataType, Node},
    rewrite::Experts,
};

/// The Linear of a product with chosen experts, or why it cannot be replaced; `None` for other products.
pub(super) fn find(view: &GraphView, index: usize) -> Option<Result<Linear, String>> {
    let node = &view.nodes()[index];
    let [a, b] = &node.input[..] else { return None };
    let (left, right) = (slices::stack(view, a), slices::stack(view, b));
    let other = if left.is_some() { b } else { a };
    let stack = match (left, right) {
        (None, None) => return None,
        (Some(_), Some(_)) => {
            return Some(Err("both operands are chosen from stacks at run time".to_owned()));
        }
        // A Linear on what was looked up in a stack, or no product of activations at all.
        _ if view.is_constant(other) || !matches!(trace(view, other), Traced::Dynamic) => {
            return None;
        }
        (Some(stack), None) | (None, Some(stack)) => stack,
    };
    Some(linear(view, index).map_err(|why| super::chosen_reason(&stack, &why)))
}

fn linear(view: &GraphView, index: usize) -> Result<Linear, String> {
    let node = &view.nodes()[index];
    let weight_first = slices::stack(view, &node.input[0]).is_some();
    let (operand, x) = if weight_first { (0, 1) } else { (1, 0) };
    let fused = domain(node) == "com.microsoft";
    let flag = |name: &str| fused && int_attribute(node, name, 0) != 0;
    let of_operand = ["transA", "transB"];
    for name in [of_operand[x], "transBatchA", "transBatchB"] {
        if flag(name) {
            return Err(format!("FusedMatMul with {name} is not taken apart"));
        }
    }
    let y = node.output.first().filter(|y| !y.is_empty()).ok_or("its output is absent")?;
    let mut choice = choice(view, &node.input[operand])?;
    if flag(of_operand[operand]) {
        choice.weight.axes.swap(0, 1);
    }
    let Stored { n, k, layout, region } = stored(&choice.weight, !weight_first)?;
    let turned = match weight_first {
        true => turned(view, &node.input[x], choice.experts.index_rank)?,
        false => None,
    };
    Ok(Linear {
        node: index,
        x: node.input[x].clone(),
        transpose_x: false,
        y: y.clone(),
        weight: choice.weight,
        operand: node.input[operand].clone(),
        layout,
        region,
        n,
        k,
        alpha: if fused { float_attribute(node, "alpha", 1.0) } else { 1.0 },
        bias: None,
        residual: None,
        replaces: vec![index],
        experts: Some(Experts { turned, ..choice.experts }),
    })
}

/// Ranks of X and Y where the weight is operand A; `None` for a vector X, which needs no turning.
fn turned(view: &GraphView, x: &str, index_rank: usize) -> Result<Option<[usize; 2]>, String> {
    let x_rank = rank(view, x).ok_or_else(|| {
        format!("it is operand A, and the rank of operand B '{x}', by which both would be turned, is not known")
    })?;
    Ok((x_rank > 1).then(|| [x_rank, x_rank.max(index_rank + 2)]))
}

/// A stack and what chooses from it. The weight's axes are those of one expert as the product reads it.
struct Choice {
    weight: Constant,
    experts: Experts,
}

/// Follows an operand back to the Gather or GatherND that chooses it.
fn choice(view: &GraphView, operand: &str) -> Result<Choice, String> {
    let (mut view, mut current) = (view, operand);
    let mut passed: Vec<&Node> = Vec::new();
    let gather = loop {
        while let Some(outer) = view.beyond(current) {
            view = outer;
        }
        let Some(Source::Node { index, .. }) = view.source(current) else {
            return Err("no Gather chooses it".to_owned());
        };
        let node = &view.nodes()[index];
        let name = view.node_name(index);
        if ["Gather", "GatherND"].iter().any(|op| is_op(node, op)) {
            break node;
        }
        let passes = ["Identity", "Cast", "Transpose"].iter().any(|op| is_op(node, op));
        let Some(first) = node.input.first().filter(|_| passes && passed.len() < MAX_CHAIN) else {
            return Err(format!(
                "{} {name} lies between the choice and the product",
                op_name(node)
            ));
        };
        passed.push(node);
        current = first;
    };
    let [data, chosen, ..] = &gather.input[..] else {
        return Err(format!("{} has no index", op_name(gather)));
    };
    let mut weight = whole_stack(view, data)?;
    let count = weight.axes.remove(0).0;
    let count = usize::try_from(count).ok().filter(|&count| count > 0);
    let (index, known, points) = index(view, gather, chosen)?;
    let mut index_rank = known;
    for node in passed.into_iter().rev() {
        match node.op_type.as_deref() {
            Some("Cast") => {
                cast(node, &mut weight).ok_or("a Cast behind the choice loses precision")?
            }
            Some("Transpose") => turn(node, &mut weight, &mut index_rank)?,
            _ => {}
        }
    }
    let index_rank =
        index_rank.ok_or_else(|| format!("the rank of its index '{index}' is not known"))?;
    let count = count.ok_or("it holds no expert")?;
    Ok(Choice { weight, experts: Experts { count, index, index_rank, points, turned: None } })
}

/// The stack `[experts, ., .]`, all of it, its experts one behind the other in memory.
fn whole_stack(view: &GraphView, value: &str) -> Result<Constant, String> {
    let stack = match trace(view, value) {
        Traced::Constant(stack) => stack,
        Traced::Unusable(reason) => return Err(reason),
        Traced::Dynamic => return Err(format!("'{value}' is not constant")),
    };
    use DataType::{Bfloat16, Float, Float16};
    if !matches!(stack.dtype, Float | Float16 | Bfloat16) {
        return Err(format!(
            "it is {:?}; float32, float16 and bfloat16 can be quantised",
            stack.dtype
        ));
    }
    let experts_first = stack.axes.len() == 3 && stack.axes[0].1 == Some(0);
    if stack.stored.len() != 3 || !experts_first || !stack.is_whole() {
        return Err(format!(
            "the index chooses from {:?} of it: three axes, the first one's matrices whole, are \
             understood",
            stack.dims()
        ));
    }
    Ok(stack)
}

/// The value that holds the index, its rank, if known, and whether a last axis of one, GatherND's, has
/// to go first. The rank is that without it.
fn index(
    view: &GraphView,
    gather: &Node,
    value: &str,
) -> Result<(String, Option<usize>, bool), String> {
    if is_op(gather, "Gather") {
        return match int_attribute(gather, "axis", 0) {
            0 | -3 => Ok((value.to_owned(), rank(view, value), false)),
            axis => Err(format!("its Gather chooses along axis {axis}, not from the experts")),
        };
    }
    if int_attribute(gather, "batch_dims", 0) != 0 {
        return Err("GatherND with batch_dims is not understood".to_owned());
    }
    let full = rank(view, value);
    if let Some(inner) = unsqueezed(view, value, full) {
        let known = rank(view, inner).or(full.and_then(|rank| rank.checked_sub(1)));
        return Ok((inner.to_owned(), known, false));
    }
    let last = view.value_type(value).and_then(|t| t.dims.as_ref()?.last().copied().flatten());
    match last {
        Some(1) => Ok((value.to_owned(), full.and_then(|rank| rank.checked_sub(1)), true)),
        Some(last) => Err(format!("GatherND with {last} numbers an index picks no whole experts")),
        None => Err(format!("how many numbers an index in '{value}' has is not known")),
    }
}

/// What a value was before an Unsqueeze gave it a last axis of one.
fn unsqueezed<'a>(view: &'a GraphView, value: &str, full: Option<usize>) -> Option<&'a str> {
    let Some(Source::Node { index, .. }) = view.source(value) else { return None };
    let node = view.nodes().get(index).filter(|node| is_op(node, "Unsqueeze"))?;
    let inner = node.input.first()?;
    let ints = |value: &String| view.constant(value).and_then(|constant| constant.ints.as_deref());
    let list = match node.input.get(1).filter(|value| !value.is_empty()) {
        Some(value) => ints(value)?,
        None => &attribute(node, "axes")?.ints,
    };
    let full = full.or_else(|| Some(rank(view, inner)? + 1));
    match list {
        [-1] => Some(inner),
        [axis] => (usize::try_from(*axis).ok()?.checked_add(1) == full).then_some(inner),
        _ => None,
    }
}

/// A Transpose behind the choice: none but the weight's own two axes may change places.
fn turn(node: &Node, weight: &mut Constant, index_rank: &mut Option<usize>) -> Result<(), String> {
    let perm = match attribute(node, "perm") {
        Some(perm) => perm.ints.clone(),
        // All axes the other way round: of a single weight, its two.
        None if *index_rank == Some(0) => vec![1, 0],
        None => return Err("a Transpose without perm turns what is chosen".to_owned()),
    };
    let rank =
        perm.len().checked_sub(2).ok_or("a Transpose of too few axes turns what is chosen")?;
    if index_rank.is_some_and(|known| known != rank) {
        return Err("the ranks of its index and of a Transpose contradict each other".to_owned());
    }
    *index_rank = Some(rank);
    let last = rank as i64;
    let leading = perm[..rank].iter().copied().eq(0..last);
    match perm[rank..] {
        [a, b] if leading && (a, b) == (last + 1, last) => weight.axes.swap(0, 1),
        [a, b] if leading && (a, b) == (last, last + 1) => {}
        _ => return Err("a Transpose moves the index's axes".to_owned()),
    }
    Ok(())
}

/// Most values that are looked at to find a rank: an Add doubles the ways to go.
const RANK_STEPS: usize = 256;

/// The rank of a value, from what the model declares or from the operators that made it.
fn rank(view: &GraphView, value: &str) -> Option<usize> {
    rank_within(view, value, &Cell::new(RANK_STEPS))
}

fn rank_within(view: &GraphView, value: &str, steps: &Cell<usize>) -> Option<usize> {
    if let Some(outer) = view.beyond(value) {
        return rank_within(outer, value, steps);
    }
    if let Some(dims) = view.value_type(value).and_then(|known| known.dims.as_ref()) {
        return Some(dims.len());
    }
    if let Some(constant) = view.constant(value) {
        return Some(constant.dims.len());
    }
    steps.set(steps.get().checked_sub(1)?);
    let Some(Source::Node { index, .. }) = view.source(value) else { return None };
    let node = &view.nodes()[index];
    if !domain(node).is_empty() {
        return None;
    }
    let of = |slot: usize| rank_within(view, node.input.get(slot)?, steps);
    let count = |slot: usize| -> Option<usize> {
        let list = view.constant(node.input.get(slot)?)?;
        list.dims.first().map_or(Some(1), |&count| usize::try_from(count).ok())
    };
    match node.op_type.as_deref()? {
        "Identity" | "Cast" | "Slice" | "Split" | "Tile" | "TopK" | "CumSum" | "Concat"
        | "Trilu" | "ScatterElements" | "Softmax" | "Relu" | "Sigmoid" | "Tanh" | "Erf"
        | "Gelu" | "Swish" | "HardSwish" | "Clip" | "Neg" | "Abs" | "Exp" | "Sqrt" => of(0),
        "Add" | "Sub" | "Mul" | "Div" | "Mod" | "Pow" | "Min" | "Max" => Some(of(0)?.max(of(1)?)),
        "MatMul" => match (of(0)?, of(1)?) {
            (a, b) if a > 1 && b > 1 => Some(a.max(b)),
            _ => None,
        },
        "Gather" => (of(0)? + of(1)?).checked_sub(1),
        "Reshape" => count(1),
        "Expand" => Some(of(0)?.max(count(1)?)),
        "Transpose" => attribute(node, "perm").map(|perm| perm.ints.len()).or_else(|| of(0)),
        "Unsqueeze" => match node.input.len() {
            1 => Some(of(0)? + attribute(node, "axes")?.ints.len()),
            _ => Some(of(0)? + count(1)?),
        },
        "Squeeze" => {
            let before = of(0)?;
            before.checked_sub(axes(view, node, before)??.len())
        }
        "ArgMax" | "ArgMin" => {
            of(0)?.checked_sub(usize::from(int_attribute(node, "keepdims", 1) == 0))
        }
        "NonZero" | "Flatten" => Some(2),
        _ => None,
    }
}
