//! Codes and scales of one weight, made while the model is written, a few tiles of rows at a time.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use mx_kernels::{QuantSpec, ScaleKind};

use crate::{
    onnx::{self, Payload, Sink},
    rewrite::weights::{Rows, Threads},
};

/// Quantises one weight, or a stack of experts.
pub(super) struct Packer {
    /// The rows, one part behind the other; all of one k.
    parts: Vec<Rows>,
    spec: QuantSpec,
    threads: Threads,
    /// Rows end with their last code, not with their last block, and follow each other bit by bit.
    dense: bool,
    /// The scales, from when the codes are written to when they are.
    scales: Mutex<Option<Vec<u8>>>,
}

/// Scales up to so many bytes wait for their turn; more are made a second time.
const WAITING: usize = 16 << 20;

impl Packer {
    pub(super) fn new(parts: Vec<Rows>, spec: QuantSpec, threads: Threads) -> Self {
        Self { parts, spec, threads, dense: false, scales: Mutex::new(None) }
    }

    /// Codes of one weight as ONNX packs a tensor [n, k]: without the zeros that fill up a row's last
    /// block.
    pub(super) fn dense(rows: Rows, spec: QuantSpec, threads: Threads) -> Self {
        let dense = !rows.k.is_multiple_of(spec.block_size);
        Self { dense, ..Self::new(vec![rows], spec, threads) }
    }

    fn codes_len(&self) -> u64 {
        let of = |rows: &Rows| match self.dense {
            true => {
                (rows.n as u64 * rows.k as u64 * u64::from(self.spec.format.bits())).div_ceil(8)
            }
            false => self.spec.codes_len(rows.n, rows.k) as u64,
        };
        self.parts.iter().map(of).sum()
    }

    fn scales_len(&self) -> usize {
        match self.spec.scale {
            ScaleKind::Tensor => self.spec.scales_len(1, 1),
            _ => self.parts.iter().map(|rows| self.spec.scales_len(rows.n, rows.k)).sum(),
        }
    }

    pub(super) fn payloads(self) -> (Payload, Payload) {
        let lens = (self.codes_len(), self.scales_len() as u64);
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
        if self.spec.scale == ScaleKind::Tensor {
            let scale = self.tensor_scale()?;
            *self.waiting() = Some(mx_kernels::pack::tensor_scale_to_bytes(scale).to_vec());
            // Divided by the scale, codes are those of the plain cast.
            let cast = QuantSpec { scale: ScaleKind::None, ..self.spec };
            return self.quantize(&cast, scale, |_, codes, _| sink(codes));
        }
        let keep = self.scales_len() <= WAITING;
        let mut all = Vec::new();
        self.quantize(&self.spec, 1.0, |k, codes, scales| {
            if keep {
                all.extend_from_slice(scales);
            }
            match self.dense {
                true => sink(dense(&self.spec, k, &codes).into()),
                false => sink(codes),
            }
        })?;
        *self.waiting() = keep.then_some(all);
        Ok(())
    }

    fn write_scales(&self, sink: &mut Sink<'_>) -> onnx::Result<()> {
        let waiting = self.waiting().take();
        match (waiting, self.spec.scale) {
            (Some(scales), _) => sink(scales.into()),
            (None, ScaleKind::Tensor) => {
                let scale = mx_kernels::pack::tensor_scale_to_bytes(self.tensor_scale()?);
                sink(scale.to_vec().into())
            }
            (None, _) => {
                self.quantize(&self.spec, 1.0, |_, _, scales| sink(Bytes::copy_from_slice(scales)))
            }
        }
    }

    /// [`Rows::quantize`] of one part after the other; `take` gets their k, too.
    fn quantize(
        &self,
        spec: &QuantSpec,
        divisor: f32,
        mut take: impl FnMut(usize, Bytes, &[u8]) -> onnx::Result<()> + Send,
    ) -> onnx::Result<()> {
        self.parts.iter().try_for_each(|rows| {
            let take = |codes: Bytes, scales: &[u8]| take(rows.k, codes, scales);
            rows.quantize(&self.threads, spec, divisor, take)
        })
    }

    /// The scale of the whole weight, from its largest finite magnitude.
    fn tensor_scale(&self) -> onnx::Result<f32> {
        let mut all = 0.0f32;
        for rows in &self.parts {
            let k = rows.k;
            let mut largest = vec![0.0f32; rows.n];
            let no_output = (&mut [] as &mut [u8], 0);
            let largest_of = |values: &[f32], largest: &mut [f32], _: &mut [u8]| {
                for (row, largest) in values.chunks(k).zip(largest) {
                    let finite = row.iter().map(|v| v.abs()).filter(|v| v.is_finite());
                    *largest = finite.fold(0.0, f32::max);
                }
                Ok(())
            };
            rows.for_tiles(&self.threads, (&mut largest, 1), no_output, largest_of)?;
            all = largest.into_iter().fold(all, f32::max);
        }
        Ok(mx_kernels::reference::tensor_scale(self.spec.format, all))
    }
}

/// Whole rows of packed codes without those behind the first `k` of each. Tiles hold a multiple of 64
/// rows, so all but the last end at a whole byte.
fn dense(spec: &QuantSpec, k: usize, packed: &[u8]) -> Vec<u8> {
    let row_bytes = spec.row_bytes(k);
    let bits = spec.format.bits() as usize;
    let rows = packed.len() / row_bytes;
    let mut row = vec![0u16; row_bytes * 8 / bits];
    let mut codes = Vec::with_capacity((rows * k).next_multiple_of(4));
    for packed in packed.chunks_exact(row_bytes) {
        mx_kernels::pack::unpack(spec.format, packed, &mut row);
        codes.extend_from_slice(&row[..k]);
    }
    let len = (codes.len() * bits).div_ceil(8);
    codes.resize(codes.len().next_multiple_of(4), 0);
    let mut out = vec![0; codes.len() * bits / 8];
    mx_kernels::pack::pack(spec.format, &codes, &mut out);
    out.truncate(len);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use mx_kernels::{ElementFormat, Rounding, ScaleRule};

    #[test]
    fn rows_follow_each_other_bit_by_bit() {
        let spec = |format| {
            QuantSpec::new(format, ScaleKind::E8M0, 16, Rounding::Even, ScaleRule::Floor).unwrap()
        };
        // Three rows of five codes in blocks of 16.
        for format in [ElementFormat::Fp4E2M1, ElementFormat::Fp6E3M2, ElementFormat::Fp8E5M2] {
            let codes: Vec<u16> =
                (0..48).map(|i| if i % 16 < 5 { i % 16 + 1 } else { 0 }).collect();
            let bits = format.bits() as usize;
            let mut packed = vec![0; 48 * bits / 8];
            mx_kernels::pack::pack(format, &codes, &mut packed);
            let out = dense(&spec(format), 5, &packed);
            assert_eq!(out.len(), (15 * bits).div_ceil(8), "{format:?}");
            let mut padded = out.clone();
            padded.resize(16 * bits / 8, 0);
            let mut back = vec![0; 16];
            mx_kernels::pack::unpack(format, &padded, &mut back);
            assert_eq!(back, [1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 0], "{format:?}");
        }
    }
}
