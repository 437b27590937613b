//! Linear -> `mx::MxMatMul` with packed codes and scales. Also the target of `bfp16`, `nvfp8` and the
//! fp8 emulations, which differ in the operands' specification only.
//!
//! Weights are quantised while the model is written, a few tiles of rows at a time; a weight that
//! several layers share is quantised once.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use mx_custom_ops::contract::{AttributeValue, DOMAIN, DOMAIN_VERSION, MxMatMulAttrs, op};
use mx_kernels::{QuantSpec, ScaleKind};

use super::{float, int, ints, node, string};
use crate::{
    onnx::{
        self, DataType, NodeId, Payload, Sink,
        proto::{Attribute, Node},
    },
    rewrite::{
        execute::ExecuteError,
        patch::{Patch, add_module_path},
        plan::PlannedSite,
        sites::{Bias, BiasShape, Layout, Region, Site, Weight},
        weights::{Rows, Threads},
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
struct Packed {
    source: (usize, String, Layout, Region, usize, usize),
    spec: QuantSpec,
    codes: String,
    scales: Option<String>,
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
            attribute: attributes(&attrs),
            doc_string: original.doc_string.clone(),
            metadata_props: original.metadata_props.clone(),
            ..Node::default()
        };
        add_module_path(&mut replacement, planned);
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

    /// The packed initialisers of a site's weight, made if they are not there yet.
    fn pack(
        &mut self,
        patch: &mut Patch<'_>,
        planned: &PlannedSite,
        spec: &QuantSpec,
    ) -> Result<Packed, ExecuteError> {
        let site = &planned.site;
        let name = &site.weight.initializer;
        let Weight { layout, region, .. } = site.weight;
        let (home, rows) = patch.rows(site)?;
        let source = (home, name.clone(), layout, region, site.n, site.k);
        if let Some(packed) = self.packed.iter().find(|p| p.source == source && p.spec == *spec) {
            return Ok(packed.clone());
        }
        let (codes_payload, scales_payload) = match planned.imported() {
            Some(packed) => packed.payloads(),
            None => Packer::new(rows, *spec, patch.threads.clone()).payloads(),
        };
        let codes_dims = [site.n, spec.row_bytes(site.k)];
        let codes = patch.add_tensor(
            &format!("{name}.mx_codes"),
            &codes_dims,
            DataType::Uint8,
            codes_payload,
        );
        let scales = match spec.scale {
            ScaleKind::E8M0 => Some(patch.add_tensor(
                &format!("{name}.mx_scales"),
                &[site.n, spec.blocks(site.k)],
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

fn attributes(attrs: &MxMatMulAttrs) -> Vec<Attribute> {
    let attribute = |(name, value): (&'static str, AttributeValue)| match value {
        AttributeValue::Int(value) => Some(int(name, value)),
        AttributeValue::Float(value) => Some(float(name, value)),
        AttributeValue::Text(value) => Some(string(name, &value)),
        AttributeValue::Other => None,
    };
    attrs.to_attributes().into_iter().filter_map(attribute).collect()
}

/// Quantises one weight.
struct Packer {
    rows: Rows,
    spec: QuantSpec,
    threads: Threads,
    /// The scales, from when the codes are written to when they are.
    scales: Mutex<Option<Vec<u8>>>,
}

/// Scales up to so many bytes wait for their turn; more are made a second time.
const WAITING: usize = 16 << 20;

impl Packer {
    fn new(rows: Rows, spec: QuantSpec, threads: Threads) -> Self {
        Self { rows, spec, threads, scales: Mutex::new(None) }
    }

    fn payloads(self) -> (Payload, Payload) {
        let (n, k) = (self.rows.n, self.rows.k);
        let len = |len: usize| len as u64;
        let lens = (len(self.spec.codes_len(n, k)), len(self.spec.scales_len(n, k)));
        let packer = Arc::new(self);
        let scales = packer.clone();
        (
            Payload::Stream { len: lens.0, write: Arc::new(move |sink| packer.write_codes(sink)) },
            Payload::Stream { len: lens.1, write: Arc::new(move |sink| scales.write_scales(sink)) },
        )
    }

    fn waiting(&self) -> MutexGuard<'_, Option<Vec<u8>>> {
        self.scales.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_codes(&self, sink: &mut Sink<'_>) -> onnx::Result<()> {
        let Rows { n, k, .. } = self.rows;
        if self.spec.scale == ScaleKind::Tensor {
            let scale = self.tensor_scale()?;
            *self.waiting() = Some(mx_kernels::pack::tensor_scale_to_bytes(scale).to_vec());
            // Divided by the scale, codes are those of the plain cast.
            let cast = QuantSpec { scale: ScaleKind::None, ..self.spec };
            return self.rows.quantize(&self.threads, &cast, scale, |codes, _| sink(codes));
        }
        let keep = self.spec.scales_len(n, k) <= WAITING;
        let mut all = Vec::new();
        self.rows.quantize(&self.threads, &self.spec, 1.0, |codes, scales| {
            if keep {
                all.extend_from_slice(scales);
            }
            sink(codes)
        })?;
        *self.waiting() = keep.then_some(all);
        Ok(())
    }

    fn write_scales(&self, sink: &mut Sink<'_>) -> onnx::Result<()> {
        let waiting = self.waiting().take();
        match (waiting, self.spec.scale) {
            (Some(scales), _) => sink(&scales),
            (None, ScaleKind::Tensor) => {
                sink(&mx_kernels::pack::tensor_scale_to_bytes(self.tensor_scale()?))
            }
            (None, _) => {
                self.rows.quantize(&self.threads, &self.spec, 1.0, |_, scales| sink(scales))
            }
        }
    }

    /// The scale of the whole weight, from its largest finite magnitude.
    fn tensor_scale(&self) -> onnx::Result<f32> {
        let Rows { n, k, .. } = self.rows;
        let mut largest = vec![0.0f32; n];
        let no_output = (&mut [] as &mut [u8], 0);
        let largest_of = |values: &[f32], largest: &mut [f32], _: &mut [u8]| {
            for (row, largest) in values.chunks(k).zip(largest) {
                let finite = row.iter().map(|v| v.abs()).filter(|v| v.is_finite());
                *largest = finite.fold(0.0, f32::max);
            }
            Ok(())
        };
        self.rows.for_tiles(&self.threads, (&mut largest, 1), no_output, largest_of)?;
        let largest = largest.into_iter().fold(0.0, f32::max);
        Ok(mx_kernels::reference::tensor_scale(self.spec.format, largest))
    }
}
