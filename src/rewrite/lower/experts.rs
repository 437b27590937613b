//! A product with experts chosen at run time -> `mx::MxExpertMatMul` with the packed stack and the
//! graph's own index.
//!
//! Where the weight is the left operand, `W X = (X^T W^T)^T`: X and the result have their last two axes
//! exchanged by a Transpose each, which moves numbers and changes none.

use mx_custom_ops::contract::{DOMAIN, DOMAIN_VERSION, MxExpertMatMulAttrs, MxMatMulAttrs, op};
use mx_kernels::QuantSpec;

use super::{
    ints,
    mx::{Mx, attributes},
    node,
};
use crate::{
    onnx::{DataType, NodeId, Payload, proto::Node},
    rewrite::{
        Experts, PlannedSite, Site,
        execute::ExecuteError,
        patch::{Patch, add_module_path},
    },
};

/// First opset whose Squeeze takes its axes as an input.
const AXES_INPUT: i64 = 13;

impl Mx {
    /// Replaces the product; what chose the weight goes when nothing else reads it.
    pub(super) fn lower_experts(
        &mut self,
        patch: &mut Patch<'_>,
        planned: &PlannedSite,
        experts: &Experts,
        (weight, activation): (&QuantSpec, Option<&QuantSpec>),
    ) -> Result<(), ExecuteError> {
        let site = &planned.site;
        let attrs = MxMatMulAttrs::new(site.n, site.k, *weight, activation.map(|a| a.format))
            .and_then(|attrs| attrs.with_factors(site.alpha, 1.0))
            .and_then(|attrs| {
                MxExpertMatMulAttrs::new(attrs, experts.count, Some(experts.index_rank))
            })
            .map_err(|error| ExecuteError::Site {
                node: site.node_name.clone(),
                reason: error.to_string(),
            })?;
        let packed = self.pack(patch, planned, weight)?;
        let at = NodeId(site.node);
        let index = match experts.points {
            true => squeezed(patch, site, &experts.index, at),
            false => experts.index.clone(),
        };
        let (x, y) = match experts.turned {
            None => (site.x.clone(), site.y.clone()),
            Some([x_rank, y_rank]) => {
                let x = patch.fresh(&format!("{}.mx_transposed", site.x));
                let turn = transpose(patch, site, (&site.x, &x), x_rank);
                patch.graph_mut(site.graph).insert_before(at, turn);
                let y = patch.fresh(&format!("{}.mx_product", site.y));
                let turn = transpose(patch, site, (&y, &site.y), y_rank);
                patch.graph_mut(site.graph).insert_after(at, turn);
                (x, y)
            }
        };
        let original = patch.original(site.graph).node(at);
        let mut replacement = Node {
            op_type: Some(op::MX_EXPERT_MATMUL.to_owned()),
            domain: Some(DOMAIN.to_owned()),
            name: original.name.clone(),
            input: [x, index, packed.codes].into_iter().chain(packed.scales).collect(),
            output: vec![y],
            attribute: attributes(attrs.to_attributes()),
            doc_string: original.doc_string.clone(),
            metadata_props: original.metadata_props.clone(),
            ..Node::default()
        };
        add_module_path(&mut replacement, site.module_path.as_deref());
        patch.graph_mut(site.graph).replace_node(at, replacement);
        patch.drop_value(site.graph, &site.weight.operand);
        patch.out.import_opset(DOMAIN, DOMAIN_VERSION);
        Ok(())
    }
}

/// A Transpose of the last two of `rank` axes.
fn transpose(patch: &mut Patch<'_>, site: &Site, (from, to): (&str, &str), rank: usize) -> Node {
    let name = patch.fresh(&format!("{}.mx_transpose", site.node_name));
    let mut turn = node("Transpose", &name, &[from], &[to]);
    let mut perm: Vec<i64> = (0..rank as i64).collect();
    if rank > 1 {
        perm.swap(rank - 2, rank - 1);
    }
    turn.attribute.push(ints("perm", &perm));
    turn
}

/// The index without its last axis, which is one.
fn squeezed(patch: &mut Patch<'_>, site: &Site, index: &str, at: NodeId) -> String {
    let value = patch.fresh(&format!("{index}.mx_index"));
    let name = patch.fresh(&format!("{}.mx_squeeze", site.node_name));
    let node = match patch.model.opset("").unwrap_or(0) < AXES_INPUT {
        true => {
            let mut squeeze = node("Squeeze", &name, &[index], &[&value]);
            squeeze.attribute.push(ints("axes", &[-1]));
            squeeze
        }
        false => {
            let last = Payload::Bytes((-1_i64).to_le_bytes().to_vec().into());
            let axes = patch.add_tensor("mx_last_axis", &[1], DataType::Int64, last);
            node("Squeeze", &name, &[index, &axes], &[&value])
        }
    };
    patch.graph_mut(site.graph).insert_before(at, node);
    value
}
