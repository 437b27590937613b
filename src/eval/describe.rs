//! What a finished graph says about itself.

use super::error::{Error, Result};
use super::record::Record;
use crate::onnx::{Graph, Model};
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
