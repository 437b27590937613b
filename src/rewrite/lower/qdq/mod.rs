//! Linear -> the same node between standard operators: the weight as FLOAT8, FLOAT6 or FLOAT4E2M1
//! codes with FLOAT8E8M0 scales behind a blocked DequantizeLinear, X through a blocked
//! QuantizeLinear and DequantizeLinear whose scales are computed in the graph ([`activation`]).
//!
//! The node keeps its operator, alpha, beta and bias. It computes in float32: a half-precision layer
//! gets Casts around it, so that dequantised values lose nothing. Codes and scales are those of
//! [`super::mx`], byte for byte, except that ONNX packs rows without filling up their last block.

mod activation;
mod opset;

use std::collections::HashMap;

use bytes::Bytes;
use mx_kernels::{ElementFormat, QuantSpec, Rounding};

use super::{int, ints, node, packer::Packer};
use crate::{
    onnx::{
        DataType, Model, NodeId, Payload,
        proto::{Attribute, Node},
    },
    rewrite::{
        execute::ExecuteError,
        patch::{Patch, add_module_path},
        plan::PlannedSite,
        recipe::SiteFormat,
        sites::{Layout, Region, Weight},
    },
};

/// ONNX's element type of a format; `None` where there is none.
fn element_type(format: ElementFormat) -> Option<DataType> {
    match format {
        ElementFormat::Fp8E4M3 => Some(DataType::Float8E4m3fn),
        ElementFormat::Fp8E5M2 => Some(DataType::Float8E5m2),
        ElementFormat::Fp6E3M2 => Some(DataType::Float6E3m2),
        ElementFormat::Fp6E2M3 => Some(DataType::Float6E2m3),
        ElementFormat::Fp4E2M1 => Some(DataType::Float4E2m1),
        ElementFormat::MxInt8 | ElementFormat::Bf16 => None,
    }
}

/// Versions of ai.onnx and of the file format that a format needs: FLOAT8E8M0 came with opset 24 and
/// IR 12, FLOAT6 with opset 28 and IR 14.
fn versions(format: ElementFormat) -> (i64, i64) {
    match format {
        ElementFormat::Fp6E3M2 | ElementFormat::Fp6E2M3 => (28, 14),
        _ => (24, 12),
    }
}

/// Raises a model in which `sites` were replaced to the versions that their formats need.
///
/// # Errors
/// As [`opset::raise`].
pub(in crate::rewrite) fn raise(
    model: &mut Model,
    sites: &[PlannedSite],
) -> Result<(), ExecuteError> {
    let needed = sites.iter().flat_map(|planned| formats(&planned.format)).map(versions);
    let (opset, ir) = needed.fold((0, 0), |(a, b), (opset, ir)| (a.max(opset), b.max(ir)));
    opset::raise(model, opset, ir)
}

/// The element formats of a layer.
fn formats(format: &SiteFormat) -> impl Iterator<Item = ElementFormat> {
    let specs = match format {
        SiteFormat::Mx { weight, activation } => [Some(*weight), *activation],
        _ => [None, None],
    };
    specs.into_iter().flatten().map(|spec| spec.format)
}

/// What standard operators cannot say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::rewrite) struct Refusal {
    /// The key in a recipe; on the command line an option of the same name.
    pub key: &'static str,
    /// Why, and what to use instead.
    pub why: &'static str,
}

/// Refuses what standard operators cannot say.
pub(in crate::rewrite) fn check(
    weight: &QuantSpec,
    activation: Option<&QuantSpec>,
) -> Result<(), Refusal> {
    let why = "ONNX has no element type for mxint8 under a shared exponent; use an fp8, fp6 or fp4 \
               format, or --lower mx";
    if element_type(weight.format).is_none() {
        return Err(Refusal { key: "weight_format", why });
    }
    let Some(activation) = activation else { return Ok(()) };
    if element_type(activation.format).is_none() {
        return Err(Refusal { key: "activation_format", why });
    }
    if activation.rounding != Rounding::Even {
        let why = "QuantizeLinear rounds activations half to even and no other way; use rounding even, \
                   activation format none, or --lower mx";
        return Err(Refusal { key: "rounding", why });
    }
    Ok(())
}

/// The lowering; remembers what layers share.
#[derive(Default)]
pub(crate) struct Qdq {
    codes: Vec<Codes>,
    /// Dequantised weights: index of the codes, turned to [k, n], read in a body -> value.
    weights: HashMap<(usize, bool, bool), String>,
    /// Quantised and dequantised activations.
    activations: HashMap<activation::Key, String>,
    /// Small initialisers: type, shape, bytes -> name.
    constants: HashMap<(DataType, Vec<usize>, Vec<u8>), String>,
}

/// A quantised weight: what it was made from, and the names of its initialisers.
struct Codes {
    source: (usize, String, Layout, Region, usize, usize),
    spec: QuantSpec,
    codes: String,
    scales: String,
}

impl Qdq {
    /// Puts the quantised operands in the place of one layer's.
    pub(crate) fn lower(
        &mut self,
        patch: &mut Patch<'_>,
        planned: &PlannedSite,
        weight: &QuantSpec,
        activation: Option<&QuantSpec>,
    ) -> Result<(), ExecuteError> {
        let site = &planned.site;
        let failed = |reason: String| ExecuteError::Site { node: site.node_name.clone(), reason };
        check(weight, activation).map_err(|refusal| failed(refusal.why.to_owned()))?;
        let id = NodeId(site.node);
        let mut changed = patch.graph_mut(site.graph).node(id).clone();
        if changed.input.get(1) != Some(&site.weight.operand) {
            return Err(failed(format!("'{}' is not its second operand", site.weight.operand)));
        }
        // MatMul has no attribute for it.
        let transposes = site.op != "MatMul";
        changed.input[1] = self.weight(patch, planned, weight, !transposes)?;
        if transposes {
            set(&mut changed, int("transB", 1));
        }
        let mut at = Place { patch, graph: site.graph, before: id, base: site.x.clone() };
        let mut x = site.x.clone();
        if site.transpose_x {
            x = at.add("Transpose", &[&x], "transposed", vec![ints("perm", &[1, 0])]);
            set(&mut changed, int("transA", 0));
        }
        let is_float = site.weight.operand_dtype == DataType::Float;
        if let Some(spec) = activation {
            x = self.activation(&mut at, (&x, site.transpose_x), site.k, is_float, spec);
        } else if !is_float {
            x = at.cast(&x, DataType::Float);
        }
        changed.input[0] = x;
        if !is_float {
            widen(&mut at, &mut changed, site.weight.operand_dtype);
        }
        add_module_path(&mut changed, site.module_path.as_deref());
        patch.graph_mut(site.graph).replace_node(id, changed);
        patch.drop_value(site.graph, &site.weight.operand);
        Ok(())
    }

    /// The value of the dequantised weight in float32, [k, n] or [n, k].
    fn weight(
        &mut self,
        patch: &mut Patch<'_>,
        planned: &PlannedSite,
        spec: &QuantSpec,
        k_first: bool,
    ) -> Result<String, ExecuteError> {
        let site = &planned.site;
        let index = self.quantized(patch, planned, spec)?;
        let key = (index, k_first, site.graph > 0);
        if let Some(value) = self.weights.get(&key) {
            return Ok(value.clone());
        }
        let Codes { codes, scales, .. } = &self.codes[index];
        let base = format!("{}.qdq", site.weight.initializer);
        let mut value = patch.fresh(&base);
        let name = patch.fresh(&format!("{base}_dequantize"));
        let mut dequantize = node("DequantizeLinear", &name, &[codes, scales], &[&value]);
        dequantize.attribute = blocked(1, spec.block_size);
        dequantize.attribute.push(int("output_dtype", DataType::Float as i64));
        let mut nodes = vec![dequantize];
        if k_first {
            let turned = patch.fresh(&format!("{base}_transposed"));
            let name = patch.fresh(&format!("{base}_transpose"));
            let mut transpose = node("Transpose", &name, &[&value], &[&turned]);
            transpose.attribute.push(ints("perm", &[1, 0]));
            nodes.push(transpose);
            value = turned;
        }
        let graph = patch.out.graph_mut();
        if site.graph > 0 {
            // In front of whatever owns the bodies that read it.
            nodes.into_iter().rev().for_each(|node| _ = graph.push_front(node));
        } else {
            // Sites come in node order, so the first layer that shares a weight is the earliest reader.
            nodes.into_iter().for_each(|node| _ = graph.insert_before(NodeId(site.node), node));
        }
        self.weights.insert(key, value.clone());
        Ok(value)
    }

    /// Index of the quantised weight of a layer, made unless it is there already.
    fn quantized(
        &mut self,
        patch: &mut Patch<'_>,
        planned: &PlannedSite,
        spec: &QuantSpec,
    ) -> Result<usize, ExecuteError> {
        let site = &planned.site;
        let name = &site.weight.initializer;
        let Weight { layout, region, .. } = site.weight;
        let (home, rows) = patch.rows(site)?;
        let source = (home, name.clone(), layout, region, site.n, site.k);
        let same = |codes: &Codes| codes.source == source && codes.spec == *spec;
        if let Some(index) = self.codes.iter().position(same) {
            return Ok(index);
        }
        let element = element_type(spec.format).ok_or_else(|| ExecuteError::Site {
            node: site.node_name.clone(),
            reason: format!("ONNX has no element type for {}", spec.format.name()),
        })?;
        let (codes, scales) = match planned.imported() {
            // A checkpoint's rows are whole blocks, so packed and dense are the same bytes.
            Some(packed) => packed.payloads(),
            None => Packer::dense(rows, *spec, patch.threads.clone()).payloads(),
        };
        let (n, k) = (site.n, site.k);
        let codes = patch.add_tensor(&format!("{name}.qdq_codes"), &[n, k], element, codes);
        let dims = [n, spec.blocks(k)];
        let base = format!("{name}.qdq_scales");
        let scales = patch.add_tensor(&base, &dims, DataType::Float8E8m0, scales);
        self.codes.push(Codes { source, spec: *spec, codes, scales });
        Ok(self.codes.len() - 1)
    }

    /// A small initialiser, made once.
    fn constant(
        &mut self,
        patch: &mut Patch<'_>,
        base: &str,
        data_type: DataType,
        dims: &[usize],
        bytes: Vec<u8>,
    ) -> String {
        let key = (data_type, dims.to_vec(), bytes);
        if let Some(name) = self.constants.get(&key) {
            return name.clone();
        }
        let payload = Payload::Bytes(Bytes::from(key.2.clone()));
        let name = patch.add_tensor(&format!("qdq.{base}"), dims, data_type, payload);
        self.constants.insert(key, name.clone());
        name
    }

    /// A float32 scalar.
    fn scalar(&mut self, patch: &mut Patch<'_>, base: &str, value: f32) -> String {
        self.constant(patch, base, DataType::Float, &[], value.to_le_bytes().to_vec())
    }

    /// An int64 vector.
    fn vector(&mut self, patch: &mut Patch<'_>, base: &str, values: &[i64]) -> String {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.constant(patch, base, DataType::Int64, &[values.len()], bytes)
    }
}

/// Has a half-precision layer compute in float32; its operands are float32 already.
fn widen(at: &mut Place<'_, '_>, changed: &mut Node, data_type: DataType) {
    // A Gemm's C.
    if let Some(c) = changed.input.get(2).filter(|c| !c.is_empty()).cloned() {
        changed.input[2] = at.cast(&c, DataType::Float);
    }
    let Some(y) = changed.output.first().cloned() else { return };
    let wide = at.patch.fresh(&format!("{y}.qdq_fp32"));
    let name = at.patch.fresh(&format!("{y}.qdq_cast"));
    let mut cast = node("Cast", &name, &[&wide], &[&y]);
    cast.attribute.push(int("to", data_type as i64));
    at.patch.graph_mut(at.graph).insert_after(at.before, cast);
    changed.output[0] = wide;
}

/// Sets an attribute, whatever it was.
fn set(node: &mut Node, attribute: Attribute) {
    node.attribute.retain(|a| a.name != attribute.name);
    node.attribute.push(attribute);
}

/// The attributes of blocked quantisation.
fn blocked(axis: i64, block_size: usize) -> Vec<Attribute> {
    vec![int("axis", axis), int("block_size", i64::try_from(block_size).unwrap_or(i64::MAX))]
}

/// Where nodes of one layer go, and what their values are named after.
struct Place<'p, 'a> {
    patch: &'p mut Patch<'a>,
    graph: usize,
    before: NodeId,
    base: String,
}

impl Place<'_, '_> {
    /// Adds a node; returns its value.
    fn add(&mut self, op: &str, inputs: &[&str], suffix: &str, more: Vec<Attribute>) -> String {
        let value = self.patch.fresh(&format!("{}.qdq_{suffix}", self.base));
        let name = self.patch.fresh(&format!("{value}_node"));
        let mut added = node(op, &name, inputs, &[&value]);
        added.attribute = more;
        self.patch.graph_mut(self.graph).insert_before(self.before, added);
        value
    }

    fn cast(&mut self, value: &str, to: DataType) -> String {
        self.add("Cast", &[value], "fp32", vec![int("to", to as i64)])
    }
}
