//! A graph cut into segments that follow each other, so that a run can begin in the middle.
//!
//! What depends on no quantisable layer (embeddings, masks, rotary angles) is *common* and computed in
//! every run. Of the rest, a value is a *cut* when everything after it depends on nothing before it
//! but this value and what is common: the residual stream between two blocks. Nothing here knows an
//! architecture; a graph without cuts is one segment.

use crate::graph::{GraphView, Use};
use crate::onnx::proto::{DataType, Node};
use std::collections::HashMap;

/// A site as far as cutting is concerned.
pub(super) struct SiteNodes<'a> {
    /// Nodes that a replacement stands for, ascending.
    pub nodes: &'a [usize],
}

/// Nodes of one segment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Segment {
    /// Indices of its nodes, in file order.
    pub nodes: Vec<usize>,
    /// Indices of the sites in it.
    pub sites: Vec<usize>,
    /// The value that the next segment begins with; `None` for the last segment.
    pub output: Option<String>,
}

/// The main graph, divided.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Segments {
    /// Nodes that every run computes.
    pub common: Vec<usize>,
    /// What runs one after the other; at least one. The last makes the logits.
    pub segments: Vec<Segment>,
    /// Element type of the values between segments.
    pub element: Option<DataType>,
}

/// Divides what `logits` needs. `element` is the type of a value where the graph does not say it.
pub(super) fn divide(
    view: &GraphView,
    sites: &[SiteNodes<'_>],
    logits: &str,
    element: DataType,
) -> Segments {
    let needed = needed(view, logits);
    let dependent = dependent(view, sites, &needed);
    let common = (0..view.nodes().len()).filter(|&i| needed[i] && !dependent[i]).collect();
    let order: Vec<usize> = (0..view.nodes().len()).filter(|&i| dependent[i]).collect();
    let cuts = cuts(view, &order, sites, element);
    let starts = starts(&order, sites);
    // Of the cuts only those that some site can begin at are of use.
    let mut chosen: Vec<usize> = starts
        .iter()
        .filter_map(|&start| cuts.iter().rev().find(|cut| cut.place < start).map(|cut| cut.place))
        .collect();
    chosen.sort_unstable();
    chosen.dedup();
    let mut segments = Vec::new();
    let mut begin = 0;
    for end in chosen.iter().map(|&place| place + 1).chain([order.len()]) {
        let within =
            |(site, &start): (usize, &usize)| (begin..end).contains(&start).then_some(site);
        let output = cuts.iter().find(|cut| cut.place + 1 == end && end < order.len());
        segments.push(Segment {
            nodes: order[begin..end].to_vec(),
            sites: starts.iter().enumerate().filter_map(within).collect(),
            output: output.map(|cut| cut.value.clone()),
        });
        begin = end;
    }
    let known = cuts.first().map(|cut| cut.element);
    Segments { common, segments, element: known }
}

/// Nodes that the logits depend on. Also a `Vec` of the graph's length.
fn needed(view: &GraphView, logits: &str) -> Vec<bool> {
    let nodes = view.nodes();
    let mut needed = vec![false; nodes.len()];
    let mut makers: Vec<Vec<usize>> = vec![Vec::new(); nodes.len()];
    for maker in 0..nodes.len() {
        for reader in view.readers(maker) {
            makers[reader].push(maker);
        }
    }
    let mut open: Vec<usize> = nodes
        .iter()
        .enumerate()
        .filter(|(_, node)| node.output.iter().any(|value| value == logits))
        .map(|(index, _)| index)
        .collect();
    while let Some(index) = open.pop() {
        if !std::mem::replace(&mut needed[index], true) {
            open.extend(&makers[index]);
        }
    }
    needed
}

/// Nodes of sites and all that depends on them, among the needed ones.
fn dependent(view: &GraphView, sites: &[SiteNodes<'_>], needed: &[bool]) -> Vec<bool> {
    let mut dependent = vec![false; needed.len()];
    let mut open: Vec<usize> = sites.iter().flat_map(|site| site.nodes.iter().copied()).collect();
    while let Some(index) = open.pop() {
        if needed[index] && !std::mem::replace(&mut dependent[index], true) {
            open.extend(view.readers(index));
        }
    }
    dependent
}

/// Place in `order` where each site begins; its end for a site that the logits do not need.
fn starts(order: &[usize], sites: &[SiteNodes<'_>]) -> Vec<usize> {
    let place: HashMap<usize, usize> = order.iter().enumerate().map(|(p, &i)| (i, p)).collect();
    let first = |site: &SiteNodes<'_>| site.nodes.iter().filter_map(|node| place.get(node)).min();
    sites.iter().map(|site| first(site).copied().unwrap_or(order.len())).collect()
}

/// A value that everything behind it depends on alone.
struct Cut {
    /// Place in the order of the node that makes it.
    place: usize,
    value: String,
    element: DataType,
}

fn cuts(view: &GraphView, order: &[usize], sites: &[SiteNodes<'_>], element: DataType) -> Vec<Cut> {
    let place: HashMap<usize, usize> = order.iter().enumerate().map(|(p, &i)| (i, p)).collect();
    let reach: Vec<usize> = order
        .iter()
        .enumerate()
        .map(|(own, &index)| {
            let readers = view.readers(index);
            readers.iter().filter_map(|reader| place.get(reader).copied()).fold(own, usize::max)
        })
        .collect();
    // Nodes of a file that is not sorted: nothing can be said.
    let sorted = order.iter().enumerate().all(|(own, &index)| {
        view.readers(index).iter().filter_map(|reader| place.get(reader)).all(|&to| to > own)
    });
    if !sorted {
        return Vec::new();
    }
    let inside = |at: usize| {
        sites.iter().any(|site| {
            let mut places = site.nodes.iter().filter_map(|node| place.get(node).copied());
            let first = places.next();
            first.is_some_and(|first| first <= at) && places.next_back().is_some_and(|p| p > at)
        })
    };
    let mut cuts: Vec<Cut> = Vec::new();
    let mut furthest = 0;
    for (at, &index) in order.iter().enumerate() {
        // Nothing made before reaches beyond this node, and of this node one value does.
        if furthest <= at
            && !inside(at)
            && let Some(value) = only_value(view, &view.nodes()[index], &place)
        {
            let element = view.value_type(value).and_then(|t| t.dtype).unwrap_or(element);
            cuts.push(Cut { place: at, value: value.to_owned(), element });
        }
        furthest = furthest.max(reach[at]);
    }
    let common = cuts.first().map(|cut| cut.element);
    cuts.retain(|cut| Some(cut.element) == common);
    cuts
}

/// The one output that dependent nodes read, if it is a float tensor as far as is known.
fn only_value<'a>(
    view: &GraphView,
    node: &'a Node,
    place: &HashMap<usize, usize>,
) -> Option<&'a str> {
    let is_read = |value: &&String| {
        view.uses(value)
            .iter()
            .any(|one| matches!(one, Use::Node { index, .. } if place.contains_key(index)))
    };
    let mut read = node.output.iter().filter(is_read);
    let (value, second) = (read.next()?, read.next());
    let floats = [DataType::Float, DataType::Float16, DataType::Bfloat16];
    let known = view.value_type(value).and_then(|value_type| value_type.dtype);
    (second.is_none() && known.is_none_or(|known| floats.contains(&known))).then_some(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::Scope;

    fn node(op: &str, inputs: &[&str], output: &str) -> Node {
        Node {
            op_type: Some(op.into()),
            input: inputs.iter().map(|&name| name.into()).collect(),
            output: vec![output.into()],
            ..Node::default()
        }
    }

    /// Two blocks `h + f(h)`, an angle that both use, and a head.
    fn nodes() -> Vec<Node> {
        vec![
            node("Gather", &["table", "ids"], "h0"),   // 0 common
            node("Cos", &["ids"], "angle"),            // 1 common
            node("MatMul", &["h0", "w"], "a0"),        // 2 site 0
            node("Mul", &["a0", "angle"], "b0"),       // 3
            node("Add", &["h0", "b0"], "h1"),          // 4 cut
            node("MatMul", &["h1", "w"], "a1"),        // 5 site 1
            node("Add", &["a1", "bias"], "c1"),        // 6 site 1
            node("Mul", &["c1", "angle"], "b1"),       // 7
            node("Relu", &["a1"], "unused"),           // 8 not needed
            node("Add", &["h1", "b1"], "h2"),          // 9 cut
            node("MatMul", &["h2", "head"], "logits"), // 10
        ]
    }

    fn view(nodes: Vec<Node>) -> GraphView {
        let constants = ["table", "w", "bias", "head"];
        let scope = Scope {
            nodes,
            inputs: vec!["ids".into()],
            outputs: vec!["logits".into()],
            initializers: constants.map(|name| (name.into(), Default::default())).to_vec(),
            ..Scope::default()
        };
        GraphView::new(scope, None).unwrap()
    }

    fn divided(nodes: Vec<Node>, sites: &[&[usize]]) -> Segments {
        let sites: Vec<_> = sites.iter().map(|&nodes| SiteNodes { nodes }).collect();
        divide(&view(nodes), &sites, "logits", DataType::Float)
    }

    fn segment(nodes: &[usize], sites: &[usize], output: Option<&str>) -> Segment {
        Segment { nodes: nodes.into(), sites: sites.into(), output: output.map(str::to_owned) }
    }

    #[test]
    fn a_residual_stream_is_cut_where_sites_begin() {
        let segments = divided(nodes(), &[&[2], &[5, 6]]);
        assert_eq!(segments.common, [0, 1]);
        let first = segment(&[2, 3, 4], &[0], Some("h1"));
        // The head is no site, so nothing begins at h2.
        assert_eq!(segments.segments, [first, segment(&[5, 6, 7, 9, 10], &[1], None)]);
        assert_eq!(segments.element, Some(DataType::Float));
        let with_head = divided(nodes(), &[&[2], &[5, 6], &[10]]);
        assert_eq!(with_head.segments[2], segment(&[10], &[2], None));
        assert_eq!(with_head.segments[1].output.as_deref(), Some("h2"));
    }

    #[test]
    fn what_jumps_over_a_value_makes_it_no_cut() {
        let mut jumping = nodes();
        // The last site reads the second block's inside as well as its end.
        jumping[10] = node("MatMul", &["h2", "c1"], "logits");
        let segments = divided(jumping, &[&[2], &[5, 6], &[10]]);
        let first = segment(&[2, 3, 4], &[0], Some("h1"));
        assert_eq!(segments.segments, [first, segment(&[5, 6, 7, 9, 10], &[1, 2], None)]);
    }

    #[test]
    fn a_cut_is_never_inside_a_site() {
        let chain = vec![
            node("MatMul", &["ids", "w"], "a"),
            node("Add", &["a", "bias"], "b"),
            node("MatMul", &["b", "w"], "c"),
            node("Add", &["c", "bias"], "logits"),
        ];
        let segments = divided(chain, &[&[0, 1], &[2, 3]]);
        let expected = [segment(&[0, 1], &[0], Some("b")), segment(&[2, 3], &[1], None)];
        assert_eq!(segments.segments, expected);
    }
}
