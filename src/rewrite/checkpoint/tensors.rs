//! Which matrices the tensors of a checkpoint are: floats, and the two ways in which MX weights are
//! stored.
//!
//! gpt-oss: `X_blocks` uint8 [experts, rows, k / 32, 16] and `X_scales` uint8 [experts, rows, k / 32]
//! (`X.blocks`, `X.scales` in OpenAI's own files). E2M1 codes, the even element in the low nibble;
//! value = code * 2^(scale - 127). The rows of `gate_up_proj` alternate, gate first. Source:
//! huggingface/transformers 93a1c400417fd8e89db9f42f8b2265e97265d75a,
//! src/transformers/integrations/mxfp4.py (`convert_moe_packed_tensors`, `Mxfp4GptOssExperts`).
//!
//! compressed-tensors: format `mxfp4-pack-quantized` has `X.weight_packed` uint8 [n, k / 2], nibbles as
//! above, and `X.weight_scale` [n, k / 32]; `mxfp8-quantized` has `X.weight` float8_e4m3fn [n, k] and
//! `X.weight_scale` [n, k / 32]. Scales are E8M0 exponents with bias 127, in uint8 (or float8_e8m0).
//! Source: vllm-project/compressed-tensors, src/compressed_tensors/compressors/: mxfp4/base.py at
//! 0186d7ae2fe969fbfc5934ba1cf9896e6a6fda65, mxfp8/base.py at
//! 15df5d1c99eced45e0517f8dcfcf082cc0b5a4b4, nvfp4/helpers.py (packing) at
//! 01dd1a58d39e47c617df54aaa4519a30273be0c5.

use std::{collections::HashSet, sync::Arc};

use mx_kernels::ElementFormat;
use safetensors::Dtype;

use super::{
    CheckpointError,
    files::{Entries, Entry},
    matrix::{BLOCK, FloatKind, Matrix, Values},
};

/// Endings of packed codes, of the scales beside them.
const GPT_OSS: [(&str, &str); 2] = [("_blocks", "_scales"), (".blocks", ".scales")];
const PACKED: (&str, &str) = (".weight_packed", ".weight_scale");
const PLAIN: (&str, &str) = (".weight", ".weight_scale");

/// A matrix of the checkpoint, or a stack of such.
#[derive(Clone, Debug)]
pub(super) struct Stack {
    /// How many there are; `None` for one that is not stacked.
    count: Option<usize>,
    /// The first one, with the values of all.
    all: Matrix,
}

impl Stack {
    /// Whether rows or columns of its matrices are of one of these lengths.
    pub fn has_lines_of(&self, lengths: &HashSet<usize>) -> bool {
        let by_columns = self.all.has_columns() && lengths.contains(&self.all.rows);
        lengths.contains(&self.all.cols) || by_columns
    }

    /// Its matrices, in order.
    pub fn matrices(&self) -> impl Iterator<Item = Matrix> {
        let size = self.all.rows * self.all.cols;
        (0..self.count.unwrap_or(1)).map(move |index| Matrix {
            expert: self.count.map(|_| index),
            values: self.all.values.part(index * size, size),
            ..self.all.clone()
        })
    }
}

/// Every matrix of the checkpoint, in the order of names. Vectors, scales and what is of no known type
/// are none.
pub(super) fn stacks(entries: &Entries) -> Result<Vec<Stack>, CheckpointError> {
    let mut all = Vec::new();
    for (name, entry) in entries {
        if let Some(pair) = Pair::find(entries, name, entry)? {
            all.push(pair.stack()?);
        } else if let Some(float) = float_kind(entry.dtype) {
            let Some((count, extents)) = extents(&entry.shape) else { continue };
            let values = Values::Float { float, bytes: entry.bytes.clone() };
            all.push(Stack { count, all: matrix(name, entry, extents, values) });
        }
    }
    Ok(all)
}

fn float_kind(dtype: Dtype) -> Option<FloatKind> {
    match dtype {
        Dtype::F32 => Some(FloatKind::F32),
        Dtype::F16 => Some(FloatKind::F16),
        Dtype::BF16 => Some(FloatKind::Bf16),
        _ => None,
    }
}

/// Matrices in the stack and their extents, for ranks 2 and 3 without an empty axis.
fn extents(shape: &[usize]) -> Option<(Option<usize>, [usize; 2])> {
    match *shape {
        [rows, cols] if rows > 0 && cols > 0 => Some((None, [rows, cols])),
        [stack, rows, cols] if stack > 0 && rows > 0 && cols > 0 => {
            Some((Some(stack), [rows, cols]))
        }
        _ => None,
    }
}

fn matrix(name: &str, entry: &Entry, [rows, cols]: [usize; 2], values: Values) -> Matrix {
    let (tensor, path): (Arc<str>, _) = (name.into(), entry.path.clone());
    Matrix { module: module(name), expert: None, tensor, path, rows, cols, values }
}

/// The module of a parameter.
fn module(name: &str) -> Arc<str> {
    let endings = ["_blocks", ".blocks", ".weight_packed"];
    let own = endings.iter().find_map(|ending| name.strip_suffix(ending)).unwrap_or(name);
    // OpenAI's gpt-oss has `mlp1_weight.blocks`.
    let ending = if name.ends_with(".blocks") { "_weight" } else { ".weight" };
    own.strip_suffix(ending).unwrap_or(own).into()
}

/// Codes and their scales.
struct Pair<'a> {
    name: &'a str,
    codes: &'a Entry,
    scales: &'a Entry,
    scales_name: String,
    format: ElementFormat,
    /// The codes' shape has an axis of blocks.
    blocked: bool,
}

impl<'a> Pair<'a> {
    /// The pair that the tensor is the codes of, if it is MX codes.
    fn find(
        entries: &'a Entries,
        name: &'a str,
        codes: &'a Entry,
    ) -> Result<Option<Self>, CheckpointError> {
        let stem = |ending: &str| name.strip_suffix(ending);
        let bytes = codes.dtype == Dtype::U8;
        let gpt_oss = GPT_OSS.iter().find_map(|(codes, scales)| Some((stem(codes)?, *scales)));
        let (stem, ending, format, blocked) = if let (Some((stem, scales)), true) = (gpt_oss, bytes)
        {
            (stem, scales, ElementFormat::Fp4E2M1, true)
        } else if let (Some(stem), true) = (stem(PACKED.0), bytes) {
            (stem, PACKED.1, ElementFormat::Fp4E2M1, false)
        } else if let (Some(stem), Dtype::F8_E4M3) = (stem(PLAIN.0), codes.dtype) {
            (stem, PLAIN.1, ElementFormat::Fp8E4M3, false)
        } else {
            return Ok(None);
        };
        let scales_name = format!("{stem}{ending}");
        let scales = entries.get(&scales_name);
        // NVFP4 has float scales; fp8 may have such, or none.
        let other = match scales {
            Some(scales) => !is_exponents(scales.dtype),
            None => format == ElementFormat::Fp8E4M3,
        };
        // `attn.mask_blocks` is a name like any other.
        let other =
            if blocked { scales.is_none() && codes.shape.last() != Some(&16) } else { other };
        if other {
            return Ok(None);
        }
        let Some(scales) = scales else {
            let what = format!("has no scales: '{scales_name}' is not in the checkpoint");
            return Err(error(name, codes, what));
        };
        if !is_exponents(scales.dtype) {
            let what = format!("is {:?}; the scales of MX codes are U8 or F8_E8M0", scales.dtype);
            return Err(error(&scales_name, scales, what));
        }
        Ok(Some(Self { name, codes, scales, scales_name, format, blocked }))
    }

    /// One matrix, or one of every expert.
    fn stack(self) -> Result<Stack, CheckpointError> {
        let (count, extents) = self.extents()?;
        let Self { name, codes, scales, format, .. } = self;
        let values =
            Values::Packed { format, codes: codes.bytes.clone(), scales: scales.bytes.clone() };
        Ok(Stack { count, all: matrix(name, codes, extents, values) })
    }

    /// Matrices and their extents, the scales' shape checked against the codes'.
    fn extents(&self) -> Result<(Option<usize>, [usize; 2]), CheckpointError> {
        let (shape, scales) = (&self.codes.shape, &self.scales.shape);
        let misfit = || {
            let Self { name, scales_name, .. } = self;
            let takes = match self.blocked {
                true => "codes [.., rows, k / 32, 16] take scales [.., rows, k / 32]",
                false if self.format == ElementFormat::Fp4E2M1 => {
                    "codes [n, k / 2] take scales [n, k / 32]"
                }
                false => "codes [n, k] take scales [n, k / 32]",
            };
            let what =
                format!("has shape {scales:?} and its codes '{name}' have {shape:?}; {takes}");
            error(scales_name, self.scales, what)
        };
        let (stacked, blocks) = match (self.blocked, &shape[..]) {
            (true, [outer @ .., 16]) if outer == &scales[..] => (outer.to_vec(), 1),
            (true, _) => return Err(misfit()),
            (false, shape) => (shape.to_vec(), 0),
        };
        let (stack, [rows, inner]) = extents(&stacked).ok_or_else(misfit)?;
        if blocks == 1 {
            let cols = inner.checked_mul(BLOCK).ok_or_else(misfit)?;
            return Ok((stack, [rows, cols]));
        }
        let cols = inner.checked_mul(8 / self.format.bits() as usize).ok_or_else(misfit)?;
        let mut expected = stacked;
        if let Some(last) = expected.last_mut() {
            *last = cols / BLOCK;
        }
        match cols % BLOCK == 0 && expected == *scales {
            true => Ok((stack, [rows, cols])),
            false => Err(misfit()),
        }
    }
}

fn is_exponents(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::U8 | Dtype::F8_E8M0)
}

fn error(tensor: &str, entry: &Entry, what: String) -> CheckpointError {
    let path = entry.path.as_ref().clone();
    CheckpointError::Tensor { tensor: tensor.to_owned(), path, what }
}
