//! What a finished graph says about itself.

use super::error::{Error, Result};
use super::record::Record;
use crate::graph::int_attribute;
use crate::onnx::{Graph, Model, element_bits};
use mx_custom_ops::contract;
use std::collections::BTreeSet;

/// Says in `record` what MX nodes a finished graph holds.
pub(super) fn describe(model: &Model, record: &mut Record) -> Result<()> {
    let mut found = Found::default();
    found
        .collect(model.graph())
        .map_err(|reason| Error::Model { model: record.model.clone(), reason })?;
    record.sites_replaced = Some(found.nodes);
    if found.nodes > 0 {
        record.weight_format = Some(Vec::from_iter(found.weights).join("+"));
        record.activation_format = Some(Vec::from_iter(found.activations).join("+"));
    }
    Ok(())
}

/// The MX nodes of a graph and its sub-graphs.
#[derive(Default)]
struct Found {
    nodes: u64,
    weights: BTreeSet<String>,
    activations: BTreeSet<String>,
}

impl Found {
    fn collect(&mut self, graph: &Graph) -> std::result::Result<(), String> {
        for (id, node) in graph.nodes() {
            if node.domain.as_deref() == Some(contract::DOMAIN)
                && matches!(
                    node.op_type.as_deref(),
                    Some(contract::op::MX_MATMUL | contract::op::MX_EXPERT_MATMUL)
                )
            {
                self.nodes += 1;
                for (attribute, names) in [
                    (contract::attr::WEIGHT_FORMAT, &mut self.weights),
                    (contract::attr::ACTIVATION_FORMAT, &mut self.activations),
                ] {
                    let value =
                        node.attribute.iter().find(|a| a.name.as_deref() == Some(attribute));
                    let text = value.and_then(|a| a.s.as_ref());
                    names.extend(text.map(|s| String::from_utf8_lossy(s).into_owned()));
                }
            }
            for (_, sub) in graph.subgraphs(id).map_err(|e| e.to_string())? {
                self.collect(&sub)?;
            }
        }
        Ok(())
    }
}

/// Mean bits of a weight, scales included: of the packed MX weights; in a graph without any, of the
/// weights that DequantizeLinear unpacks; else of the float matrices as they are stored. `None`
/// where the graph has none of these.
///
/// A stage that rounds float weights to bfloat16 and stores them as float32 counts as it is stored.
pub(super) fn bits_per_weight(model: &Model) -> Option<f64> {
    let mut bits = [Bits::default(); 3];
    count(model.graph(), model.graph(), &mut bits);
    bits.into_iter()
        .find(|bits| bits.weights > 0)
        .map(|bits| bits.bits as f64 / bits.weights as f64)
}

#[derive(Clone, Copy, Debug, Default)]
struct Bits {
    weights: u64,
    bits: u64,
}

impl Bits {
    fn add(&mut self, weights: u64, bits: u64) {
        self.weights = self.weights.saturating_add(weights);
        self.bits = self.bits.saturating_add(bits);
    }
}

fn count(graph: &Graph, outer: &Graph, found: &mut [Bits; 3]) {
    let stored = |name: &String| {
        graph.initializer(name).or_else(|| outer.initializer(name)).and_then(|tensor| {
            let (elements, bits) = (tensor.elements().ok()?, element_bits(tensor.data_type()?)?);
            Some((elements, elements.saturating_mul(bits)))
        })
    };
    for (id, node) in graph.nodes() {
        let is_mx = node.domain.as_deref() == Some(contract::DOMAIN);
        match node.op_type.as_deref() {
            Some(contract::op::MX_MATMUL | contract::op::MX_EXPERT_MATMUL) if is_mx => {
                let extent = |name, absent| int_attribute(node, name, absent).max(0).unsigned_abs();
                let weights = extent(contract::attr::N, 0)
                    .saturating_mul(extent(contract::attr::K, 0))
                    .saturating_mul(extent(contract::attr::EXPERTS, 1));
                let bits =
                    node.input.iter().skip(1).take(2).filter_map(stored).map(|(_, bits)| bits);
                found[0].add(weights, bits.sum());
            }
            Some("DequantizeLinear") => {
                let mut parts = node.input.iter().take(2).map(stored);
                if let (Some(Some((weights, bits))), Some(Some((_, scales)))) =
                    (parts.next(), parts.next())
                {
                    found[1].add(weights, bits.saturating_add(scales));
                }
            }
            _ => {}
        }
        for (_, sub) in graph.subgraphs(id).into_iter().flatten() {
            count(&sub, outer, found);
        }
    }
    for tensor in graph.initializers().filter(|t| t.dims.len() >= 2 && t.is_float()) {
        if let (Ok(elements), Some(bits)) =
            (tensor.elements(), tensor.data_type().and_then(element_bits))
        {
            found[2].add(elements, elements.saturating_mul(bits));
        }
    }
}
