//! Linear -> `mx::MxMatMul` with packed codes and scales. Also the target of `bfp16`, `nvfp8` and the
//! fp8 emulations, which differ in the operands' specification only.
//!
//! Weights are quantised while the model is written, a few tiles of rows at a time; a weight that
//! several layers share is quantised once.

use bytes::Bytes;
use mx_custom_ops::contract::{AttributeValue, DOMAIN, DOMAIN_VERSION, MxMatMulAttrs, op};
use mx_kernels::{QuantSpec, ScaleKind};

use super::{float, int, ints, node, packer::Packer, string};
use crate::{
    onnx::{
        DataType, NodeId, Payload,
        proto::{Attribute, Node},
    },
    rewrite::{
        execute::ExecuteError,
        patch::{Patch, add_module_path},
        plan::PlannedSite,
        sites::{Bias, BiasShape, Layout, Region, Site, Weight},
    },
};

/// The lowering; remembers the weights that it has packed.
#[derive(Default)]
pub(crate) struct Mx {
    packed: Vec<Packed>,
}

/// A packed weight: names of its initialisers, and what they were made
/// from: the graph that holds the weight, its name, and how its rows lie.
#[derive(Clone)]
pub(super) struct Packed {
    source: (usize, String, Layout, Region, [usize; 3]),
    spec: QuantSpec,
    pub(super) codes: String,
    pub(super) scales: Option<String>,
}

impl Mx {
    /// Replaces the nodes of one layer.
    pub(crate) fn lower(
        &mut self,
        patch: &mut Patch<'_>,
        planned: &PlannedSite,
        weight: &QuantSpec,
        activation: Option<&QuantSpec>,
    ) -> Result<(), ExecuteError> {
        let site = &planned.site;
        if let Some(experts) = &site.experts {
            return self.lower_experts(patch, planned, experts, (weight, activation));
        }
        let beta = site.bias.as_ref().map_or(1.0, |bias| bias.beta);
        let attrs = MxMatMulAttrs::new(site.n, site.k, *weight, activation.map(|a| a.format))
            .and_then(|attrs| attrs.with_factors(site.alpha, beta))
            .map_err(|error| ExecuteError::Site {
                node: site.node_name.clone(),
                reason: error.to_string(),
            })?;
        let packed = self.pack(patch, planned, weight)?;
        let bias = site.bias.as_ref().map(|bias| vector(patch, site, bias)).transpose()?;
        let at = NodeId(site.replaces.last().copied().unwrap_or(site.node));
        let x = match site.transpose_x {
            true => transposed(patch, site, at),
            false => site.x.clone(),
        };
        let mut inputs = vec![x, packed.codes, packed.scales.unwrap_or_default()];
        inputs.extend(bias);
        while inputs.last().is_some_and(String::is_empty) {
            inputs.pop();
        }
        let original = patch.original(site.graph).node(NodeId(site.node));
        let mut replacement = Node {
            op_type: Some(op::MX_MATMUL.to_owned()),
            domain: Some(DOMAIN.to_owned()),
            name: original.name.clone(),
            input: inputs,
            output: vec![site.y.clone()],
            attribute: attributes(attrs.to_attributes()),
            doc_string: original.doc_string.clone(),
            metadata_props: original.metadata_props.clone(),
            ..Node::default()
        };
        add_module_path(&mut replacement, site.module_path.as_deref());
        if let Some(residual) = &site.residual {
            let product = patch.fresh(&format!("{}.mx_product", site.y));
            let name = patch.fresh(&format!("{}.mx_add", site.node_name));
            let add = node("Add", &name, &[&product, residual], &[&site.y]);
            replacement.output = vec![product];
            patch.graph_mut(site.graph).insert_after(at, add);
        }
        for &index in site.replaces.iter().filter(|&&index| NodeId(index) != at) {
            patch.graph_mut(site.graph).remove_node(NodeId(index));
        }
        patch.graph_mut(site.graph).replace_node(at, replacement);
        patch.drop_value(site.graph, &site.weight.operand);
        patch.out.import_opset(DOMAIN, DOMAIN_VERSION);
        Ok(())
    }

    /// The packed initialisers of a site's weight, or of its stack of experts, made if they are not there
    /// yet.
    pub(super) fn pack(
        &mut self,
        patch: &mut Patch<'_>,
        planned: &PlannedSite,
        spec: &QuantSpec,
    ) -> Result<Packed, ExecuteError> {
        let site = &planned.site;
        let name = &site.weight.initializer;
        let Weight { layout, region, .. } = site.weight;
        let (home, parts) = patch.stack(site)?;
        let experts = site.experts.as_ref().map(|experts| experts.count);
        // 0 experts: a weight, which may be the only one of a stack.
        let shape = [experts.unwrap_or(0), site.n, site.k];
        let source = (home, name.clone(), layout, region, shape);
        if let Some(packed) = self.packed.iter().find(|p| p.source == source && p.spec == *spec) {
            return Ok(packed.clone());
        }
        let (codes_payload, scales_payload) = match planned.imported() {
            Some(packed) => packed.payloads(),
            None => Packer::new(parts, *spec, patch.threads.clone()).payloads(),
        };
        let dims = |last: usize| Vec::from_iter(experts.into_iter().chain([site.n, last]));
        let codes = patch.add_tensor(
            &format!("{name}.mx_codes"),
            &dims(spec.row_bytes(site.k)),
            DataType::Uint8,
            codes_payload,
        );
        let scales = match spec.scale {
            ScaleKind::E8M0 => Some(patch.add_tensor(
                &format!("{name}.mx_scales"),
                &dims(spec.blocks(site.k)),
                DataType::Uint8,
                scales_payload,
            )),
            ScaleKind::None => None,
            ScaleKind::Tensor => Some(patch.add_tensor(
                &format!("{name}.mx_scale"),
                &[1],
                DataType::Float,
                scales_payload,
            )),
        };
        let packed = Packed { source, spec: *spec, codes, scales };
        self.packed.push(packed.clone());
        Ok(packed)
    }
}

/// X of a Gemm with transA=1, turned round.
fn transposed(patch: &mut Patch<'_>, site: &Site, at: NodeId) -> String {
    let value = patch.fresh(&format!("{}.mx_transposed", site.x));
    let name = patch.fresh(&format!("{}.mx_transpose", site.node_name));
    let mut transpose = node("Transpose", &name, &[&site.x], &[&value]);
    transpose.attribute.push(ints("perm", &[1, 0]));
    patch.graph_mut(site.graph).insert_before(at, transpose);
    value
}

/// The bias as a value of shape [n].
fn vector(patch: &mut Patch<'_>, site: &Site, bias: &Bias) -> Result<String, ExecuteError> {
    let (BiasShape::Row | BiasShape::Scalar, Some(name)) = (bias.shape, &bias.constant) else {
        return Ok(bias.value.clone());
    };
    let view = patch.model.tensor(&patch.constant(site.graph, name)?.1)?;
    let copies = if bias.shape == BiasShape::Scalar { site.n } else { 1 };
    let bytes = Bytes::from(view.bytes.repeat(copies));
    patch.drop_value(site.graph, &bias.value);
    let base = format!("{name}.mx_bias");
    Ok(patch.add_tensor(&base, &[site.n], view.data_type, Payload::Bytes(bytes)))
}

/// Attributes of the contract as those of a node.
pub(super) fn attributes(list: Vec<(&'static str, AttributeValue)>) -> Vec<Attribute> {
    let attribute = |(name, value): (&'static str, AttributeValue)| match value {
        AttributeValue::Int(value) => Some(int(name, value)),
        AttributeValue::Float(value) => Some(float(name, value)),
        AttributeValue::Text(value) => Some(string(name, &value)),
        AttributeValue::Other => None,
    };
    list.into_iter().filter_map(attribute).collect()
}
