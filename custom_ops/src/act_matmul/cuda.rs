//! `MxActMatMul` on the CUDA provider.
#![allow(unsafe_code)]

use mx_kernels::cuda::{ActMatMulBuffers, ActMatMulPlan, Gpu};
use ort::operator::ComputeContext;

use super::{ActMatMulKernel, call, problem};
use crate::{
    contract::{MxActMatMulAttrs, Product, op},
    guard::OpError,
    host,
    provider::GpuDevice,
    ran,
    types::XType,
};

/// Compiles or loads the kernels, so that a machine that cannot says so when the session is created.
pub(super) fn prepare(
    gpu: &'static Gpu,
    attrs: &MxActMatMulAttrs,
    x: XType,
) -> Result<(), OpError> {
    ActMatMulPlan::prepare(gpu)?;
    let product = Product { m: 1, n: 1, k: 1, batches: vec![(0, 0)] };
    ActMatMulPlan::new(gpu, &problem(attrs, &product), x.float_type())?;
    Ok(())
}

pub(super) fn run(
    kernel: &ActMatMulKernel,
    device: &GpuDevice,
    ctx: &ComputeContext,
) -> Result<(), OpError> {
    let (call, ordinal) = (call(kernel, ctx)?, device.ordinal());
    let y = host::device_output(ctx, 0, kernel.x.element(), &call.y_dims, ordinal)?;
    let (Some(y), false) = (y, call.product.batches.is_empty()) else { return Ok(()) };
    let (a, b) = (call.a.device_ptr(ordinal)?, call.b.device_ptr(ordinal)?);
    let plan = ActMatMulPlan::new(
        device.gpu,
        &problem(&kernel.attrs, &call.product),
        kernel.x.float_type(),
    )?;
    let (stream, scratch) = device.enqueue_on(ctx, plan.scratch_bytes())?;
    let buffers = ActMatMulBuffers { a, b, y, scratch: scratch.address() };
    // SAFETY: every buffer lies on the plan's device, which was checked, and has the shape that
    // the plan was made for; ONNX Runtime keeps inputs and outputs until its stream is done with
    // them, and the scratch memory goes to no other stream.
    unsafe { plan.run(stream, &buffers)? };
    ran::cuda(op::MX_ACT_MATMUL, &kernel.name, "act_matmul");
    Ok(())
}
