//! `TokenScores` on the CUDA provider: logits and labels stay on the device, so a label outside the
//! vocabulary is no error here, but scores NaN.
#![allow(unsafe_code)]

use mx_kernels::cuda::{Gpu, ScoresBuffers, ScoresPlan};
use ort::operator::ComputeContext;

use super::{ScoresKernel, inputs, without_baseline};
use crate::{
    contract::scores,
    guard::OpError,
    host::{self, ElementType},
    provider::GpuDevice,
    types::XType,
};

/// Compiles or loads the kernels, so that a machine that cannot says so when the session is created.
pub(super) fn prepare(gpu: &'static Gpu, logits: XType, has_baseline: bool) -> Result<(), OpError> {
    let float = logits.float_type();
    ScoresPlan::new(gpu, 1, 1, float, has_baseline.then_some(float))?;
    Ok(())
}

pub(super) fn run(
    kernel: &ScoresKernel,
    device: &GpuDevice,
    ctx: &ComputeContext,
) -> Result<(), OpError> {
    let (inputs, ordinal) = (inputs(kernel, ctx)?, device.ordinal());
    let mut outputs = [None; scores::OUTPUT_NAMES.len()];
    for (index, address) in outputs.iter_mut().enumerate() {
        let element = if index == scores::TOP1 { ElementType::I64 } else { ElementType::F32 };
        *address = host::device_output(ctx, index, element, &inputs.dims, ordinal)?;
        if address.is_some() && index >= scores::AGAINST_BASELINE && inputs.baseline.is_none() {
            return Err(without_baseline(index));
        }
    }
    let rows = inputs.rows()?;
    if rows == 0 {
        return Ok(());
    }
    let (logits, labels) = (inputs.logits.device_ptr(ordinal)?, inputs.labels.device_ptr(ordinal)?);
    let baseline = inputs.baseline.as_ref().map(|view| view.device_ptr(ordinal)).transpose()?;
    let [nll, entropy, top1, kl, baseline_nll] = outputs.map(|output| output.unwrap_or(0));
    let float = kernel.logits.float_type();
    let plan = ScoresPlan::new(device.gpu, rows, inputs.vocab, float, baseline.map(|_| float))?;
    let baseline = baseline.unwrap_or(0);
    let buffers = ScoresBuffers { logits, labels, baseline, nll, entropy, top1, kl, baseline_nll };
    // SAFETY: every buffer lies on the plan's device, which was checked, and has the shape that
    // the plan was made for; ONNX Runtime keeps inputs and outputs until its stream is done with them.
    unsafe { plan.run(host::stream(ctx)?, &buffers)? };
    Ok(())
}
