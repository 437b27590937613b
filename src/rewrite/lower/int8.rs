//! Linear -> the same node with an int8 weight behind a standard DequantizeLinear: weight-only,
//! symmetric, one scale an output channel.
//!
//! scale = max |w| of the channel / 127 in float32 (1 for a channel of zeros); code = w / scale,
//! rounded half to even, in [-127, 127]. A half-precision graph gets the float32 result cast to its
//! type, so that the scale keeps its precision.

use bytes::Bytes;

use super::{int, node, pair};
use crate::{
    onnx::{self, DataType, NodeId, Payload},
    rewrite::{
        execute::ExecuteError,
        patch::{Patch, add_module_path},
        plan::PlannedSite,
        sites::{Layout, Region, Site, Weight},
        weights::{Rows, Threads},
    },
};

/// First opset whose DequantizeLinear takes one scale a channel.
const OPSET: i64 = 13;

/// The lowering; remembers the weights that it has quantised.
#[derive(Default)]
pub(crate) struct Int8 {
    done: Vec<Done>,
}

/// The graph that holds the initialiser, its name, which of its axes is n, which part of it, whether
/// the operand is [n, k], n, k, operand type.
type Source = (usize, String, Layout, Region, bool, usize, usize, DataType);

struct Done {
    source: Source,
    codes: String,
    scales: String,
    /// The dequantised weight for readers in the main graph (false) and in bodies (true).
    operands: Vec<(bool, String)>,
}

impl Int8 {
    /// Puts a dequantised weight in the place of one layer's weight.
    pub(crate) fn lower(
        &mut self,
        patch: &mut Patch<'_>,
        planned: &PlannedSite,
    ) -> Result<(), ExecuteError> {
        let found = patch.model.opset("").unwrap_or(0);
        if found < OPSET {
            return Err(ExecuteError::Opset { lowering: "int8", needed: OPSET, found });
        }
        let site = &planned.site;
        let id = NodeId(site.node);
        let mut replacement = patch.graph_mut(site.graph).node(id).clone();
        let rows_first = has_transposed_weight(&replacement);
        let operand = self.operand(patch, site, rows_first)?;
        match replacement.input.get_mut(1) {
            Some(input) if *input == site.weight.operand => *input = operand,
            _ => {
                let reason = format!("'{}' is not its second operand", site.weight.operand);
                return Err(ExecuteError::Site { node: site.node_name.clone(), reason });
            }
        }
        add_module_path(&mut replacement, planned.site.module_path.as_deref());
        patch.graph_mut(site.graph).replace_node(id, replacement);
        patch.drop_value(site.graph, &site.weight.operand);
        Ok(())
    }

    /// The value of the dequantised weight, in the orientation that the node reads.
    fn operand(
        &mut self,
        patch: &mut Patch<'_>,
        site: &Site,
        rows_first: bool,
    ) -> Result<String, ExecuteError> {
        let done = self.quantized(patch, site, rows_first)?;
        let in_body = site.graph > 0;
        if let Some((_, operand)) = done.operands.iter().find(|(body, _)| *body == in_body) {
            return Ok(operand.clone());
        }
        let (dtype, name) = (site.weight.operand_dtype, &site.weight.initializer);
        let mut operand = patch.fresh(&format!("{name}.int8"));
        let node_name = patch.fresh(&format!("{name}.int8_dequantize"));
        let inputs = [done.codes.as_str(), done.scales.as_str()];
        let mut dequantize = node("DequantizeLinear", &node_name, &inputs, &[&operand]);
        dequantize.attribute.push(int("axis", if rows_first { 0 } else { 1 }));
        let mut nodes = vec![dequantize];
        if dtype != DataType::Float {
            let cast_operand = patch.fresh(&format!("{name}.int8_cast"));
            let node_name = patch.fresh(&format!("{name}.int8_cast_node"));
            let mut cast = node("Cast", &node_name, &[&operand], &[&cast_operand]);
            cast.attribute.push(int("to", dtype as i64));
            nodes.push(cast);
            operand = cast_operand;
        }
        let graph = patch.out.graph_mut();
        if in_body {
            // ONNX Runtime refuses a body's DequantizeLinear whose codes lie outside the body, so the
            // main graph dequantises, in front of whatever owns the bodies.
            for node in nodes.into_iter().rev() {
                graph.push_front(node);
            }
        } else {
            // Sites come in node order, so the first layer that shares a weight is the earliest reader.
            for node in nodes {
                graph.insert_before(NodeId(site.node), node);
            }
        }
        done.operands.push((in_body, operand.clone()));
        Ok(operand)
    }

    /// The quantised weight of a layer, made unless it is there already.
    fn quantized(
        &mut self,
        patch: &mut Patch<'_>,
        site: &Site,
        rows_first: bool,
    ) -> Result<&mut Done, ExecuteError> {
        let (n, k, dtype) = (site.n, site.k, site.weight.operand_dtype);
        let name = &site.weight.initializer;
        let (home, rows) = patch.rows(site)?;
        // A square weight may be read both as it is and transposed: two products, two copies.
        let Weight { layout, region, .. } = site.weight;
        let source = (home, name.clone(), layout, region, rows_first, n, k, dtype);
        let at = match self.done.iter().position(|done| done.source == source) {
            Some(at) => at,
            None => {
                let coder = Coder { rows, rows_first, threads: patch.threads.clone() };
                let (codes, scales) = coder.payloads();
                let dims = if rows_first { [n, k] } else { [k, n] };
                let base = format!("{name}.int8_codes");
                let codes = patch.add_tensor(&base, &dims, DataType::Int8, codes);
                let base = format!("{name}.int8_scales");
                let scales = patch.add_tensor(&base, &[n], DataType::Float, scales);
                self.done.push(Done { source, codes, scales, operands: Vec::new() });
                self.done.len() - 1
            }
        };
        Ok(&mut self.done[at])
    }
}

/// True when the node reads its weight as [n, k]: Gemm and FusedMatMul with transB=1.
fn has_transposed_weight(node: &crate::onnx::proto::Node) -> bool {
    node.attribute.iter().any(|a| a.name.as_deref() == Some("transB") && a.i.unwrap_or(0) != 0)
}

/// Quantises one weight.
struct Coder {
    rows: Rows,
    rows_first: bool,
    threads: Threads,
}

impl Coder {
    fn payloads(self) -> (Payload, Payload) {
        let (n, k) = (self.rows.n as u64, self.rows.k as u64);
        pair::payloads([n * k, 4 * n], move || self.quantize())
    }

    fn quantize(&self) -> onnx::Result<[Bytes; 2]> {
        let Rows { n, k, .. } = self.rows;
        let mut codes = vec![0u8; n * k];
        let mut scales = vec![1.0f32; n];
        self.rows.for_tiles(
            &self.threads,
            (&mut codes, k),
            (&mut scales, 1),
            |values, codes, scales| {
                for ((row, codes), scale) in values.chunks(k).zip(codes.chunks_mut(k)).zip(scales) {
                    *scale = quantize_channel(row, codes);
                }
                Ok(())
            },
        )?;
        if !self.rows_first {
            codes = transpose(&codes, n, k);
        }
        let scales: Vec<u8> = scales.iter().flat_map(|scale| scale.to_le_bytes()).collect();
        Ok([codes.into(), scales.into()])
    }
}

/// Codes of one channel (as bytes of int8); returns its scale. A channel with NaN or Inf, for which
/// no scale exists, gets the scale NaN.
fn quantize_channel(row: &[f32], codes: &mut [u8]) -> f32 {
    if row.iter().any(|v| !v.is_finite()) {
        codes.fill(0);
        return f32::NAN;
    }
    let amax = row.iter().fold(0.0f32, |max, v| max.max(v.abs()));
    // A channel of the smallest subnormals would get scale 0 and is as good as zero.
    let scale = amax / 127.0;
    if scale == 0.0 {
        codes.fill(0);
        return 1.0;
    }
    for (code, value) in codes.iter_mut().zip(row) {
        *code = (value / scale).round_ties_even().clamp(-127.0, 127.0) as i8 as u8;
    }
    scale
}

/// [n, k] to [k, n].
fn transpose(codes: &[u8], n: usize, k: usize) -> Vec<u8> {
    let mut out = vec![0; codes.len()];
    for (i, row) in codes.chunks_exact(k).enumerate() {
        for (j, &code) in row.iter().enumerate() {
            out[j * n + i] = code;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn channels() {
        let mut codes = [9u8; 4];
        let scale = quantize_channel(&[-2.0, 1.0, 0.5, 0.0], &mut codes);
        assert_eq!(scale, 2.0 / 127.0);
        // 1.0 / scale = 63.5 rounds to even, 0.5 / scale = 31.75.
        assert_eq!(codes.map(|c| c as i8), [-127, 64, 32, 0]);
        assert_eq!(quantize_channel(&[0.0; 4], &mut codes), 1.0);
        assert_eq!(codes, [0; 4]);
        assert!(quantize_channel(&[1.0, f32::INFINITY, 0.0, 0.0], &mut codes).is_nan());
        assert!(quantize_channel(&[1.0, f32::NAN, 3.0, 0.0], &mut codes).is_nan());
        assert_eq!(quantize_channel(&[f32::from_bits(1); 4], &mut codes), 1.0);
    }

    #[test]
    fn transposition() {
        assert_eq!(transpose(&[1, 2, 3, 4, 5, 6], 2, 3), [1, 4, 2, 5, 3, 6]);
    }
}
