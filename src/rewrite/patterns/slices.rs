//! Parts of a constant that the graph cuts out by constant numbers: one expert of a stack, one layer
//! of a packed weight. Such a part is read where it lies in the stored tensor.

use crate::{
    graph::{GraphView, Source, attribute, int_attribute, is_op},
    onnx::proto::Node,
};

use super::trace::Constant;

/// True for an operator that cuts a part out of its first input at places that no caller decides.
pub(super) fn is_fixed_cut(view: &GraphView, node: &Node) -> bool {
    let fixed = |slot: usize| {
        let input = node.input.get(slot).filter(|value| !value.is_empty());
        input.is_none_or(|value| ints(view, value).is_some())
    };
    (is_op(node, "Split") && fixed(1))
        || (is_op(node, "Gather") && fixed(1))
        || (is_op(node, "Slice") && (1..5).all(fixed))
}

/// Applies output `slot` of such an operator to a constant's shape; `None` where it does more than cut
/// one range out of an axis.
pub(super) fn cut(
    view: &GraphView,
    node: &Node,
    slot: usize,
    constant: &mut Constant,
) -> Option<()> {
    match node.op_type.as_deref()? {
        "Split" => split(view, node, slot, constant),
        "Gather" => gather(view, node, constant),
        _ => slice(view, node, constant),
    }
}

/// The elements of a short integer constant.
fn ints(view: &GraphView, value: &str) -> Option<Vec<i64>> {
    if view.is_overridable(value) {
        return None;
    }
    view.constant(value)?.ints.clone()
}

fn input(view: &GraphView, node: &Node, slot: usize) -> Option<Vec<i64>> {
    ints(view, node.input.get(slot).filter(|value| !value.is_empty())?)
}

fn axis(constant: &Constant, axis: i64) -> Option<usize> {
    let rank = i64::try_from(constant.axes.len()).ok()?;
    let axis = if axis < 0 { axis.checked_add(rank)? } else { axis };
    (axis < rank).then(|| usize::try_from(axis).ok()).flatten()
}

fn split(view: &GraphView, node: &Node, slot: usize, constant: &mut Constant) -> Option<()> {
    let axis = axis(constant, int_attribute(node, "axis", 0))?;
    let extent = constant.axes[axis].0;
    let sizes = input(view, node, 1).or_else(|| Some(attribute(node, "split")?.ints.clone()));
    let (start, len) = match sizes {
        Some(sizes) => {
            let before = sizes.iter().take(slot).try_fold(0i64, |sum, &size| sum.checked_add(size));
            (before?, *sizes.get(slot)?)
        }
        None => {
            // Equal parts, of which the last may be smaller.
            let outputs = i64::try_from(node.output.len()).ok()?;
            let count = int_attribute(node, "num_outputs", outputs);
            let part =
                if count > 0 { extent.checked_add(count - 1)? / count } else { return None };
            let start = part.checked_mul(i64::try_from(slot).ok()?)?;
            (start, part.min(extent.checked_sub(start)?))
        }
    };
    constant.narrow(axis, start, len)
}

/// One index; a scalar takes the axis away.
fn gather(view: &GraphView, node: &Node, constant: &mut Constant) -> Option<()> {
    let axis = axis(constant, int_attribute(node, "axis", 0))?;
    let indices = view.constant(node.input.get(1)?)?;
    let [index] = indices.ints.as_deref()? else { return None };
    let extent = constant.axes[axis].0;
    let index = if *index < 0 { index.checked_add(extent)? } else { *index };
    constant.narrow(axis, index, 1)?;
    match indices.dims.len() {
        0 => drop(constant.axes.remove(axis)),
        1 => {}
        _ => return None,
    }
    Some(())
}

fn slice(view: &GraphView, node: &Node, constant: &mut Constant) -> Option<()> {
    let list = |slot: usize, name: &str| {
        input(view, node, slot).or_else(|| attribute(node, name).map(|list| list.ints.clone()))
    };
    let (starts, ends) = (list(1, "starts")?, list(2, "ends")?);
    let count = i64::try_from(starts.len()).ok()?;
    let axes = list(3, "axes").unwrap_or_else(|| (0..count).collect());
    let steps = input(view, node, 4).unwrap_or_else(|| vec![1; starts.len()]);
    if ends.len() != starts.len() || axes.len() != starts.len() || steps != vec![1; starts.len()] {
        return None;
    }
    for ((start, end), at) in starts.into_iter().zip(ends).zip(axes) {
        let axis = axis(constant, at)?;
        let extent = constant.axes[axis].0;
        let clamp = |i: i64| (if i < 0 { i.saturating_add(extent) } else { i }).clamp(0, extent);
        let (start, end) = (clamp(start), clamp(end));
        constant.narrow(axis, start, (end - start).max(0))?;
    }
    Some(())
}

/// The stack of experts, rank 3 or more, that a value is chosen from at run time; its name and shape.
pub(super) fn stack(view: &GraphView, value: &str) -> Option<(String, Vec<i64>)> {
    let moves = ["Identity", "Cast", "Transpose", "Squeeze", "Unsqueeze", "Reshape", "Expand"];
    let cuts = ["Split", "Gather", "GatherND", "GatherElements", "Slice"];
    let (mut view, mut current, mut chosen) = (view, value, false);
    // Longer than any exporter's chain, and an end to one that no exporter made.
    for _ in 0..64 {
        if let Some(outer) = view.beyond(current) {
            view = outer;
            continue;
        }
        if let Some(constant) = view.constant(current) {
            return (chosen && constant.dims.len() > 2)
                .then(|| (current.to_owned(), constant.dims.clone()));
        }
        let Some(Source::Node { index, .. }) = view.source(current) else { return None };
        let node = &view.nodes()[index];
        let cut = cuts.iter().any(|op| is_op(node, op));
        if !cut && !moves.iter().any(|op| is_op(node, op)) {
            return None;
        }
        chosen |= cut && !is_fixed_cut(view, node);
        current = node.input.first()?;
    }
    None
}
