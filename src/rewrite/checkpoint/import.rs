//! Packed weights taken as they are: the checkpoint's codes and scales, row by row.

use std::{fmt, sync::Arc};

use bytes::Bytes;
use mx_kernels::{ElementFormat, QuantSpec};

use super::{
    matrix::{BLOCK, Matrix, Values},
    search::Run,
};
use crate::onnx::{self, Payload, Sink};

/// Bytes that are gathered before they are written.
const CHUNK: usize = 8 << 20;

/// A weight [n, k] whose codes and scales are in a checkpoint, in the operator's own packing: blocks of
/// 32 along k, E8M0 scales.
#[derive(Clone)]
pub struct PackedWeight {
    /// Format of the codes.
    pub format: ElementFormat,
    k: usize,
    parts: Arc<[Part]>,
}

/// Rows `first`, `first + step` ... of a packed matrix.
struct Part {
    codes: Bytes,
    scales: Bytes,
    first: usize,
    step: usize,
    count: usize,
}

/// Which of the two tensors.
#[derive(Clone, Copy)]
enum Which {
    Codes,
    Scales,
}

impl PackedWeight {
    /// The weight that the runs make up, when all of them are packed rows of one format.
    pub(super) fn new(matrices: &[Matrix], runs: &[&Run]) -> Option<Self> {
        let mut of = None;
        let mut parts = Vec::with_capacity(runs.len());
        for run in runs {
            let matrix = &matrices[run.first.matrix];
            let Values::Packed { format, codes, scales } = &matrix.values else { return None };
            if run.first.columns || of.is_some_and(|of| of != (*format, matrix.cols)) {
                return None;
            }
            of = Some((*format, matrix.cols));
            let (codes, scales) = (codes.clone(), scales.clone());
            let Run { first, step, count } = **run;
            parts.push(Part { codes, scales, first: first.line, step, count });
        }
        let (format, k) = of?;
        Some(Self { format, k, parts: parts.into() })
    }

    /// The weight's specification, where rounding and scale rule (which its codes no longer need) are
    /// those of `like`.
    pub fn spec(&self, like: &QuantSpec) -> QuantSpec {
        let (format, block_size) = (self.format, BLOCK);
        QuantSpec { format, block_size, scale: mx_kernels::ScaleKind::E8M0, ..*like }
    }

    /// The payloads of codes and scales, copied from the checkpoint when they are written.
    pub(crate) fn payloads(&self) -> (Payload, Payload) {
        let payload = |which: Which| {
            let rows: usize = self.parts.iter().map(|part| part.count).sum();
            let (len, weight) = ((rows * self.row_bytes(which)) as u64, self.clone());
            Payload::Stream { len, write: Arc::new(move |sink| weight.write(which, sink)) }
        };
        (payload(Which::Codes), payload(Which::Scales))
    }

    fn row_bytes(&self, which: Which) -> usize {
        match which {
            Which::Codes => self.k * self.format.bits() as usize / 8,
            Which::Scales => self.k / BLOCK,
        }
    }

    fn write(&self, which: Which, sink: &mut Sink<'_>) -> onnx::Result<()> {
        let row = self.row_bytes(which);
        let rows = (CHUNK / row).max(1);
        for part in self.parts.iter() {
            let bytes = if matches!(which, Which::Codes) { &part.codes } else { &part.scales };
            for at in (0..part.count).step_by(rows) {
                let count = rows.min(part.count - at);
                let first = part.first + at * part.step;
                if part.step == 1 {
                    sink(bytes.slice(first * row..(first + count) * row))?;
                    continue;
                }
                let mut gathered = Vec::with_capacity(count * row);
                for index in 0..count {
                    gathered.extend_from_slice(&bytes[(first + index * part.step) * row..][..row]);
                }
                sink(gathered.into())?;
            }
            onnx::release(bytes);
        }
        Ok(())
    }
}

/// The same rows of the same tensors; their bytes are not compared.
impl PartialEq for PackedWeight {
    fn eq(&self, other: &Self) -> bool {
        let key = |part: &Part| {
            let places = (part.codes.as_ptr() as usize, part.scales.as_ptr() as usize);
            (places, part.first, part.step, part.count)
        };
        (self.format, self.k) == (other.format, other.k)
            && self.parts.iter().map(key).eq(other.parts.iter().map(key))
    }
}

impl fmt::Debug for PackedWeight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rows: usize = self.parts.iter().map(|part| part.count).sum();
        write!(f, "PackedWeight({} [{rows}, {}])", self.format, self.k)
    }
}
