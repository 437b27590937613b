//! `MxExpertMatMul` on the CUDA provider: one product after the other on ONNX Runtime's stream. The
//! index is in host memory, as its declaration asks; ONNX Runtime copies it there.
#![allow(unsafe_code)]

use mx_kernels::{
    LinearProblem,
    cuda::{CudaError, Gpu, LinearBuffers, LinearPlan},
};
use ort::operator::ComputeContext;

use super::{ExpertKernel, call};
use crate::{
    contract::{MxExpertMatMulAttrs, op},
    guard::OpError,
    host,
    provider::GpuDevice,
    ran,
    types::XType,
};

/// Alignment of codes and Y that the kernels rely on, and of scales.
const ALIGNMENT: (usize, usize) = (16, 4);

/// Compiles or loads every kernel, and refuses stacks whose experts the kernels could not address. Answers the
/// path of the plan for one row.
pub(super) fn prepare(
    gpu: &'static Gpu,
    attrs: &MxExpertMatMulAttrs,
    problem: &LinearProblem,
    x: XType,
) -> Result<&'static str, OpError> {
    let (n, k) = (problem.n, problem.k);
    let (codes, scales) = (problem.weight.codes_len(n, k), problem.weight.scales_len(n, k));
    let row = n * x.float_type().bytes();
    let aligned = codes.is_multiple_of(ALIGNMENT.0) && scales.is_multiple_of(ALIGNMENT.1);
    if !row.is_multiple_of(ALIGNMENT.0) || !(aligned || attrs.experts() == 1) {
        return Err(CudaError::Unsupported(format!(
            "experts of n = {n}: rows of Y take {row} bytes and an expert's codes {codes}, which have \
             to be multiples of 16, and its scales {scales}, a multiple of 4; run this model on the \
             CPU provider"
        ))
        .into());
    }
    LinearPlan::prepare(gpu, problem)?;
    Ok(LinearPlan::new(gpu, problem, 1, x.float_type(), false)?.path_name())
}

pub(super) fn run(
    kernel: &ExpertKernel,
    device: &GpuDevice,
    ctx: &ComputeContext,
) -> Result<(), OpError> {
    let (call, ordinal) = (call(kernel, ctx)?, device.ordinal());
    let y = host::device_output(ctx, 0, kernel.x.element(), &call.y_dims, ordinal)?;
    let Some(y) = y.filter(|&y| y != 0) else { return Ok(()) };
    let product = kernel.attrs.product(call.x.dims(), &call.index)?;
    let (x, codes) = (call.x.device_ptr(ordinal)?, call.codes.device_ptr(ordinal)?);
    let scales = call.scales.as_ref().map_or(Ok(0), |scales| scales.device_ptr(ordinal))?;
    let (problem, x_type) = (&kernel.problem, kernel.x.float_type());
    let plan = LinearPlan::new(device.gpu, problem, product.m, x_type, false)?;
    let (stream, scratch) = device.enqueue_on(ctx, plan.scratch_bytes())?;
    // SAFETY: the stream is ONNX Runtime's for this device.
    if unsafe { device.gpu.is_capturing(stream)? } {
        return Err(CudaError::Unsupported(
            "a captured graph would keep the experts that were chosen when it was captured: turn \
             enable_cuda_graph off"
                .into(),
        )
        .into());
    }
    ran::cuda(op::MX_EXPERT_MATMUL, &kernel.name, plan.path_name());
    let (n, k) = (problem.n, problem.k);
    let (x_bytes, y_bytes) = (product.m * k * x_type.bytes(), product.m * n * x_type.bytes());
    let (code_bytes, scale_bytes) =
        (problem.weight.codes_len(n, k), problem.weight.scales_len(n, k));
    for (place, &(rows, chosen)) in product.batches.iter().enumerate() {
        let expert = call.experts[chosen];
        let buffers = LinearBuffers {
            x: x + (rows * x_bytes) as u64,
            codes: codes + (expert * code_bytes) as u64,
            scales: if scales == 0 { 0 } else { scales + (expert * scale_bytes) as u64 },
            bias: 0,
            y: y + (place * y_bytes) as u64,
            scratch: scratch.address(),
        };
        // SAFETY: every buffer lies on the plan's device, which was checked, and the parts of it
        // that belong to this product are within shapes that were; ONNX Runtime keeps inputs and
        // outputs until its stream is done with them, and products of one stream take turns with
        // the scratch memory.
        unsafe { plan.run(stream, &buffers)? };
    }
    Ok(())
}
