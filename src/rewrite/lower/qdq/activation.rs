//! X quantised along its last axis in every run, by standard operators.
//!
//! ```text
//! |X| -(Pad to whole blocks)-> Reshape [.., blocks, block] -> ReduceMax -> a
//! a -> Max(., 2^(emax - 127)) -> + NaN where the block holds NaN or Inf
//!   -> Cast to FLOAT8E8M0, down -> Cast to float -> x 2^-emax (x 2 by the scale rule)
//!   -> Cast to FLOAT8E8M0 -> QuantizeLinear, DequantizeLinear of X
//! ```
//! - The first Cast leaves 2^floor(log2 a), exactly. Multiplying a itself by 2^-emax first would round
//!   where the product is subnormal: the largest number below 2^(emax - 126) would get the next exponent.
//! - Max clamps the exponent to -127, for blocks of zeros too, and keeps powers out of the range that
//!   a float32 holds as subnormals only.
//! - A block with NaN or Inf adds up to NaN after a multiplication by 0. ONNX says neither what ReduceMax
//!   and Max do with NaN nor, for round_mode down, what a Cast to FLOAT8E8M0 makes of Inf (E8M0's
//!   largest under `up`; NaN in onnx's reference evaluator); of NaN it makes NaN.
//! - Scale rules other than `floor` take the next exponent above a threshold between a's power of two
//!   and the next one.

use mx_kernels::{ElementFormat, QuantSpec, ScaleRule};

use super::{Place, Qdq, blocked, element_type};
use crate::{
    onnx::{DataType, proto::Attribute},
    rewrite::lower::{int, string},
};

/// What makes two layers share an activation: the graph, X as read, whether it was transposed.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    graph: usize,
    x: String,
    transposed: bool,
    format: ElementFormat,
    block_size: usize,
    rule: &'static str,
}

impl Qdq {
    /// The value of `x` [.., k] quantised and dequantised, float32. `x` is float32 or, unless
    /// `is_float`, a half-precision value; with `true` it is a transpose made for this layer.
    pub(super) fn activation(
        &mut self,
        at: &mut Place<'_, '_>,
        (x, transposed): (&str, bool),
        k: usize,
        is_float: bool,
        spec: &QuantSpec,
    ) -> String {
        let key = Key {
            graph: at.graph,
            x: x.to_owned(),
            transposed,
            format: spec.format,
            block_size: spec.block_size,
            rule: spec.scale_rule.name(),
        };
        if let Some(value) = self.activations.get(&key) {
            return value.clone();
        }
        let wide = if is_float { x.to_owned() } else { at.cast(x, DataType::Float) };
        let blocks = self.blocks(at, &wide, k, spec.block_size);
        let largest = self.largest(at, &blocks, spec.format);
        let scales = self.scales(at, &largest, spec);
        let element = element_type(spec.format).unwrap_or(DataType::Undefined) as i64;
        let float = DataType::Float as i64;
        let mut quantize = blocked(-1, spec.block_size);
        // Without `precision` the quotient would be one of FLOAT8E8M0.
        quantize.extend([int("output_dtype", element), int("precision", float)]);
        let codes = at.add("QuantizeLinear", &[&wide, &scales], "codes", quantize);
        let mut dequantize = blocked(-1, spec.block_size);
        dequantize.push(int("output_dtype", float));
        let value = at.add("DequantizeLinear", &[&codes, &scales], "rounded", dequantize);
        self.activations.insert(key, value.clone());
        value
    }

    /// |x| as [.., blocks, block].
    fn blocks(&mut self, at: &mut Place<'_, '_>, x: &str, k: usize, block: usize) -> String {
        let long = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        let count = k.div_ceil(block);
        let mut values = at.add("Abs", &[x], "abs", vec![]);
        if !k.is_multiple_of(block) {
            let pads = self.vector(at.patch, "pads", &[0, long(count * block - k)]);
            let last = self.vector(at.patch, "last_axis", &[-1]);
            values = at.add("Pad", &[&values, &pads, "", &last], "padded", vec![]);
        }
        let lead = at.add("Shape", &[x], "lead", vec![int("end", -1)]);
        let split = self.vector(at.patch, "blocks", &[long(count), long(block)]);
        let shape = at.add("Concat", &[&lead, &split], "shape", vec![int("axis", 0)]);
        at.add("Reshape", &[&values, &shape], "blocks", vec![])
    }

    /// The largest magnitude of each block, at least 2^(emax - 127); NaN where one is NaN or Inf.
    fn largest(&mut self, at: &mut Place<'_, '_>, blocks: &str, format: ElementFormat) -> String {
        let last = self.vector(at.patch, "last_axis", &[-1]);
        let largest = at.add("ReduceMax", &[blocks, &last], "largest", vec![int("keepdims", 0)]);
        let least = self.scalar(at.patch, "least", power(format.emax() - 127));
        let limited = at.add("Max", &[&largest, &least], "limited", vec![]);
        let zero = self.scalar(at.patch, "zero", 0.0);
        let zeros = at.add("Mul", &[blocks, &zero], "zeros", vec![]);
        let marks = at.add("ReduceSum", &[&zeros, &last], "marks", vec![int("keepdims", 0)]);
        at.add("Add", &[&limited, &marks], "marked", vec![])
    }

    /// The FLOAT8E8M0 scales of blocks by their largest magnitudes.
    fn scales(&mut self, at: &mut Place<'_, '_>, largest: &str, spec: &QuantSpec) -> String {
        let emax = spec.format.emax();
        let top = at.add("Cast", &[largest], "top", e8m0());
        let top = at.add("Cast", &[&top], "power", vec![int("to", DataType::Float as i64)]);
        let factor = self.scalar(at.patch, "factor", power(-emax));
        let factor = match threshold(spec) {
            None => factor,
            Some((compare, bound)) => {
                let bound = self.scalar(at.patch, "bound", bound);
                let bound = at.add("Mul", &[&top, &bound], "bound", vec![]);
                let above = at.add(compare, &[largest, &bound], "above", vec![]);
                let doubled = self.scalar(at.patch, "factor", power(1 - emax));
                at.add("Where", &[&above, &doubled, &factor], "factor", vec![])
            }
        };
        let scale = at.add("Mul", &[&top, &factor], "scale", vec![]);
        at.add("Cast", &[&scale], "scales", e8m0())
    }
}

/// Where in a binade, as a multiple of its power of two, a block's largest magnitude takes the next
/// exponent, and the comparison; `None` = nowhere.
fn threshold(spec: &QuantSpec) -> Option<(&'static str, f32)> {
    let row = spec.format.row();
    match spec.scale_rule {
        ScaleRule::Floor => None,
        ScaleRule::Ceil => Some(("Greater", 1.0)),
        ScaleRule::Rceil => Some(("Greater", row.largest * power(-row.emax))),
        // The middle between the last number of the binade and the first of the next is rounded to
        // the latter, whose mantissa is even.
        ScaleRule::Even => Some(("GreaterOrEqual", 2.0 - power(-(row.mantissa_bits as i32) - 1))),
    }
}

/// 2^exponent, a normal float32.
fn power(exponent: i32) -> f32 {
    f32::from_bits(((exponent.clamp(-126, 127) + 127) as u32) << 23)
}

/// A Cast to FLOAT8E8M0 that keeps the exponent.
fn e8m0() -> Vec<Attribute> {
    vec![int("to", DataType::Float8E8m0 as i64), string("round_mode", "down")]
}

#[cfg(test)]
mod tests {
    use super::*;
    use mx_kernels::{Rounding, ScaleKind};

    #[test]
    fn thresholds() {
        let spec = |rule| {
            let format = ElementFormat::Fp4E2M1;
            QuantSpec::new(format, ScaleKind::E8M0, 32, Rounding::Even, rule).unwrap()
        };
        assert_eq!(threshold(&spec(ScaleRule::Floor)), None);
        assert_eq!(threshold(&spec(ScaleRule::Ceil)), Some(("Greater", 1.0)));
        assert_eq!(threshold(&spec(ScaleRule::Rceil)), Some(("Greater", 1.5)));
        assert_eq!(threshold(&spec(ScaleRule::Even)), Some(("GreaterOrEqual", 1.75)));
        assert_eq!((power(-125), power(0), power(3)), (2f32.powi(-125), 1.0, 8.0));
    }
}
