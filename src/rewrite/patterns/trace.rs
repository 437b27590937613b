//! From the operand of a node back to the constant it is made of.

use std::collections::HashSet;

use super::slices;
use crate::{
    graph::{GraphView, Source, attribute, int_attribute, is_op, op_name},
    onnx::proto::{DataType, Node},
    rewrite::{Layout, Region},
};

/// Longest chain of nodes that is followed; exporters need four.
pub(super) const MAX_CHAIN: usize = 32;

/// Most cuts (Split, Gather ...) between a stacked constant and its reader that are explained.
const MAX_CUTS: usize = 4;

/// What an operand is made of.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Traced {
    /// A constant, through nodes that only rename, cast or rearrange it.
    Constant(Constant),
    /// Something that depends on the inputs of the graph.
    Dynamic,
    /// Constant, but in a way that cannot be replaced; the reason.
    Unusable(String),
}

/// A constant and what lies between it and the node that reads it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Constant {
    /// Name of the value that holds the numbers.
    pub root: String,
    /// Element type as stored.
    pub dtype: DataType,
    /// Element type at the reader.
    pub operand_dtype: DataType,
    /// Shape at the reader: extent and the stored axis it is, `None` for an added axis of one.
    pub axes: Vec<(i64, Option<usize>)>,
    /// Shape as stored.
    pub stored: Vec<i64>,
    /// First index along each stored axis; not 0 where the reader sees a part.
    pub starts: Vec<i64>,
    /// Nodes passed in the reader's own graph, from the constant to the reader.
    pub via: Vec<usize>,
}

impl Constant {
    /// Shape at the reader.
    pub fn dims(&self) -> Vec<i64> {
        self.axes.iter().map(|&(extent, _)| extent).collect()
    }

    /// For a rank-2 operand: true when the reader sees the stored matrix transposed.
    pub fn is_transposed(&self) -> bool {
        match self.axes[..] {
            [(_, Some(a)), (_, Some(b))] => a > b,
            // An added axis of one can be anywhere without moving a number.
            _ => false,
        }
    }

    /// True when the reader sees every stored number.
    pub fn is_whole(&self) -> bool {
        let seen = self.axes.iter().try_fold(1i64, |n, &(extent, _)| n.checked_mul(extent));
        seen == self.stored.iter().try_fold(1i64, |n, &extent| n.checked_mul(extent))
    }

    /// Keeps `len` places of an axis from `start` on; `None` when it has fewer.
    pub fn narrow(&mut self, axis: usize, start: i64, len: i64) -> Option<()> {
        let (extent, stored) = self.axes.get_mut(axis)?;
        if start < 0 || len < 0 || start.checked_add(len)? > *extent {
            return None;
        }
        *extent = len;
        if let Some(stored) = *stored {
            let first = self.starts.get_mut(stored)?;
            *first = first.checked_add(start)?;
        }
        Some(())
    }

    /// Where a rank-2 operand lies among the stored numbers, when its rows or its columns are
    /// contiguous there.
    pub fn region(&self, layout: Layout, k_first: bool) -> Option<Region> {
        let mut strides = vec![1i64; self.stored.len()];
        for axis in (1..self.stored.len()).rev() {
            strides[axis - 1] = strides[axis].checked_mul(self.stored[axis])?;
        }
        let mut start = 0i64;
        for (first, stride) in self.starts.iter().zip(&strides) {
            start = start.checked_add(first.checked_mul(*stride)?)?;
        }
        let [first, second] = self.axes[..] else { return None };
        let (k, n) = if k_first { (first, second) } else { (second, first) };
        let (outer, inner) = if layout == Layout::NK { (n, k) } else { (k, n) };
        let stride = |axis: Option<usize>, added: i64| axis.map_or(added, |axis| strides[axis]);
        if inner.0 > 1 && stride(inner.1, 1) != 1 {
            return None;
        }
        let pitch = if outer.0 > 1 { stride(outer.1, inner.0) } else { inner.0 };
        Some(Region { start: usize::try_from(start).ok()?, pitch: usize::try_from(pitch).ok()? })
    }

    /// How the stored numbers run, given that the reader contracts its first axis (`k_first`).
    pub fn layout(&self, k_first: bool) -> Layout {
        if k_first == self.is_transposed() { Layout::NK } else { Layout::KN }
    }
}

/// Traces `value` through Identity, Cast, Transpose, Squeeze, Unsqueeze and Reshape, and through cuts
/// (Split, Slice, Gather) at constant places.
pub(crate) fn trace(view: &GraphView, value: &str) -> Traced {
    trace_within(view, value, MAX_CUTS)
}

fn trace_within(view: &GraphView, value: &str, cuts: usize) -> Traced {
    let mut chain = Vec::new();
    let mut current = value;
    while chain.len() <= MAX_CHAIN {
        if let Some(outer) = view.beyond(current) {
            return match trace_within(outer, current, cuts) {
                Traced::Constant(found) => follow(view, Constant { via: vec![], ..found }, chain),
                other => other,
            };
        }
        if let Some(constant) = view.constant(current) {
            return match root(view, current, constant.dtype, &constant.dims) {
                Ok(root) => follow(view, root, chain),
                Err(reason) => Traced::Unusable(reason),
            };
        }
        let Some(Source::Node { index, slot }) = view.source(current) else {
            return Traced::Dynamic;
        };
        let node = &view.nodes()[index];
        let passes = ["Identity", "Cast", "Transpose", "Squeeze", "Unsqueeze", "Reshape"];
        let passes = passes.iter().any(|op| is_op(node, op)) || slices::is_fixed_cut(view, node);
        if !passes || node.input.is_empty() {
            return computed(view, index, cuts);
        }
        chain.push((index, slot));
        current = &node.input[0];
    }
    Traced::Dynamic
}

fn root(
    view: &GraphView,
    name: &str,
    dtype: Option<DataType>,
    dims: &[i64],
) -> Result<Constant, String> {
    if view.is_overridable(name) {
        return Err(format!(
            "its weight '{name}' is also a graph input, so a caller may replace it"
        ));
    }
    let dtype = dtype.ok_or_else(|| format!("its weight '{name}' has an unknown element type"))?;
    Ok(Constant {
        root: name.to_owned(),
        dtype,
        operand_dtype: dtype,
        axes: dims.iter().enumerate().map(|(axis, &extent)| (extent, Some(axis))).collect(),
        stored: dims.to_vec(),
        starts: vec![0; dims.len()],
        via: vec![],
    })
}

/// Applies the nodes of `chain` (reader to constant) to the constant's shape.
fn follow(view: &GraphView, mut constant: Constant, chain: Vec<(usize, usize)>) -> Traced {
    for (index, slot) in chain.into_iter().rev() {
        let node = &view.nodes()[index];
        let step = match node.op_type.as_deref() {
            Some("Cast") => cast(node, &mut constant),
            Some("Transpose") => transpose(node, &mut constant),
            Some("Squeeze") => squeeze(view, node, &mut constant),
            Some("Unsqueeze") => unsqueeze(view, node, &mut constant),
            Some("Reshape") => reshape(view, node, &mut constant),
            Some("Split" | "Slice" | "Gather") => slices::cut(view, node, slot, &mut constant),
            _ => Some(()),
        };
        if step.is_none() {
            return Traced::Unusable(format!(
                "its weight '{}' passes through {} {}, which does more than rearrange or cut out \
                 rows and columns",
                constant.root,
                op_name(node),
                view.node_name(index),
            ));
        }
        constant.via.push(index);
    }
    Traced::Constant(constant)
}

/// Only casts that lose nothing: to the same type, or from a 16-bit float to float32.
pub(super) fn cast(node: &Node, constant: &mut Constant) -> Option<()> {
    let to = DataType::try_from(i32::try_from(int_attribute(node, "to", 0)).ok()?).ok()?;
    let widening = to == DataType::Float
        && matches!(constant.operand_dtype, DataType::Float16 | DataType::Bfloat16);
    (to == constant.operand_dtype || widening).then(|| constant.operand_dtype = to)
}

fn transpose(node: &Node, constant: &mut Constant) -> Option<()> {
    let rank = constant.axes.len();
    let perm: Vec<usize> = match attribute(node, "perm") {
        Some(perm) => {
            perm.ints.iter().map(|&axis| usize::try_from(axis).ok()).collect::<Option<_>>()?
        }
        None => (0..rank).rev().collect(),
    };
    let distinct: HashSet<_> = perm.iter().collect();
    if perm.len() != rank || distinct.len() != rank {
        return None;
    }
    constant.axes =
        perm.iter().map(|&axis| constant.axes.get(axis).copied()).collect::<Option<_>>()?;
    Some(())
}

/// The axes of a Squeeze or Unsqueeze: an input since opset 13, an attribute before.
pub(super) fn axes(view: &GraphView, node: &Node, rank: usize) -> Option<Option<Vec<usize>>> {
    let ints = match node.input.get(1).filter(|value| !value.is_empty()) {
        Some(value) => view.constant(value)?.ints.clone()?,
        None => match attribute(node, "axes") {
            Some(axes) => axes.ints.clone(),
            None => return Some(None),
        },
    };
    let rank = i64::try_from(rank).ok()?;
    let ints = ints.into_iter().map(|axis| {
        let axis = if axis < 0 { axis.checked_add(rank)? } else { axis };
        (axis < rank).then(|| usize::try_from(axis).ok()).flatten()
    });
    ints.collect::<Option<Vec<_>>>().map(Some)
}

fn squeeze(view: &GraphView, node: &Node, constant: &mut Constant) -> Option<()> {
    let axes = axes(view, node, constant.axes.len())?;
    let keep = |axis: usize, extent: i64| match &axes {
        Some(axes) => !axes.contains(&axis),
        None => extent != 1,
    };
    let old = std::mem::take(&mut constant.axes);
    for (axis, entry) in old.into_iter().enumerate() {
        if keep(axis, entry.0) {
            constant.axes.push(entry);
        } else if entry.0 != 1 {
            return None;
        }
    }
    Some(())
}

fn unsqueeze(view: &GraphView, node: &Node, constant: &mut Constant) -> Option<()> {
    // Axes count in the result's rank, which the number of axes decides.
    let count = match node.input.get(1).filter(|value| !value.is_empty()) {
        Some(value) => view.constant(value)?.ints.as_ref()?.len(),
        None => attribute(node, "axes")?.ints.len(),
    };
    let rank = constant.axes.len().checked_add(count)?;
    let axes = axes(view, node, rank)??;
    let mut old = std::mem::take(&mut constant.axes).into_iter();
    for axis in 0..rank {
        let entry = if axes.contains(&axis) { (1, None) } else { old.next()? };
        constant.axes.push(entry);
    }
    old.next().is_none().then_some(())
}

/// Only reshapes that add or drop axes of one; anything else regroups numbers.
fn reshape(view: &GraphView, node: &Node, constant: &mut Constant) -> Option<()> {
    let mut target = view.constant(node.input.get(1)?)?.ints.clone()?;
    let old = constant.dims();
    if int_attribute(node, "allowzero", 0) == 0 {
        for (axis, extent) in target.iter_mut().enumerate().filter(|(_, extent)| **extent == 0) {
            *extent = *old.get(axis)?;
        }
    }
    let total = old.iter().try_fold(1i64, |n, &d| n.checked_mul(d))?;
    let known = target.iter().filter(|&&d| d != -1).try_fold(1i64, |n, &d| n.checked_mul(d))?;
    let free = target.iter().filter(|&&d| d == -1).count();
    if free > 1 || known <= 0 || (free == 0 && known != total) || total % known != 0 {
        return None;
    }
    let mut wide = constant.axes.iter().copied().filter(|&(extent, _)| extent != 1);
    let mut axes = Vec::with_capacity(target.len());
    for extent in target.into_iter().map(|d| if d == -1 { total / known } else { d }) {
        if extent == 1 {
            axes.push((1, None));
        } else {
            axes.push(wide.next().filter(|&(old, _)| old == extent)?);
        }
    }
    wide.next().is_none().then_some(())?;
    constant.axes = axes;
    Some(())
}

/// A value that another operator makes: out of constants alone (never folded by the exporter), of a
/// constant cut up by dynamic indices (stacked experts), or dynamic.
fn computed(view: &GraphView, index: usize, cuts: usize) -> Traced {
    let node = &view.nodes()[index];
    let first = node.input.first().map(String::as_str).unwrap_or_default();
    let op = op_name(node);
    let ops = ["Split", "Gather", "GatherND", "GatherElements", "Slice", "Expand"];
    if cuts > 0 && ops.iter().any(|op| is_op(node, op)) {
        match trace_within(view, first, cuts - 1) {
            Traced::Constant(constant) => {
                let (root, dims) = (&constant.root, constant.dims());
                return Traced::Unusable(format!(
                    "its weight is a part ({op}) of '{root}' {dims:?}, rank {}",
                    dims.len()
                ));
            }
            Traced::Unusable(reason) => return Traced::Unusable(reason),
            Traced::Dynamic => {}
        }
    }
    if op.ends_with("DequantizeLinear") && view.constant(first).is_some() {
        return Traced::Unusable(format!("its weight '{first}' is quantised already ({op})"));
    }
    if view.is_fixed(index) {
        let name = view.node_name(index);
        return Traced::Unusable(format!(
            "its weight is computed from constants by {op} {name}, which is not folded"
        ));
    }
    Traced::Dynamic
}
