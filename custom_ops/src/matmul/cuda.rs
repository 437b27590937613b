//! `MxMatMul` on the CUDA provider: the kernels on addresses in device memory. No element is read
//! here, and nothing waits for the device.
#![allow(unsafe_code)]

use mx_kernels::{
    LinearProblem,
    cuda::{FP8_PATH, Gpu, LinearBuffers, LinearPlan},
};
use ort::operator::ComputeContext;

use super::{MatMulKernel, checked, output_dims};
use crate::{
    census,
    contract::{ScalesShape, input, op},
    guard::OpError,
    host,
    provider::GpuDevice,
    ran,
    types::XType,
};

/// Compiles or loads every kernel, so that a machine that cannot says so when the session is created,
/// and that none is left to load while a graph is captured. Answers the path of the plan for many rows.
pub(super) fn prepare(
    gpu: &'static Gpu,
    problem: &LinearProblem,
    x: XType,
    has_bias: bool,
) -> Result<&'static str, OpError> {
    LinearPlan::prepare(gpu, problem)?;
    // How many rows will come is not known; a few long products have no algorithm in cuBLASLt.
    const ROWS: usize = 512;
    let path = LinearPlan::new(gpu, problem, ROWS, x.float_type(), has_bias)?.path_name();
    if path == FP8_PATH {
        census::fp8();
    }
    Ok(path)
}

pub(super) fn run(
    kernel: &MatMulKernel,
    device: &GpuDevice,
    ctx: &ComputeContext,
) -> Result<(), OpError> {
    let (attrs, ordinal) = (&kernel.attrs, device.ordinal());
    let input = |index| checked(kernel, ctx, index)?.device_ptr(ordinal);
    let x_view = checked(kernel, ctx, input::X)?;
    let dims = output_dims(attrs, x_view.dims());
    let Some(y) = host::device_output(ctx, 0, kernel.x.element(), &dims, ordinal)? else {
        return Ok(());
    };
    let codes = input(input::CODES)?;
    let scales = match attrs.scales_shape() {
        ScalesShape::Absent => 0,
        ScalesShape::Blocks(_) | ScalesShape::Tensor => input(input::SCALES)?,
    };
    let bias = if kernel.has_bias { input(input::BIAS)? } else { 0 };
    let m = host::elements(x_view.dims())? / attrs.k();
    if m == 0 {
        return Ok(());
    }
    let x = x_view.device_ptr(ordinal)?;
    let x_type = kernel.x.float_type();
    let plan = LinearPlan::new(device.gpu, &kernel.problem, m, x_type, kernel.has_bias)?;
    let (stream, scratch) = device.enqueue_on(ctx, plan.scratch_bytes())?;
    let buffers = LinearBuffers { x, codes, scales, bias, y, scratch: scratch.address() };
    // SAFETY: every buffer lies on the plan's device, which was checked, and has the shape that
    // the plan was made for; ONNX Runtime keeps inputs and outputs until its stream is done with
    // them, and the scratch memory goes to no other stream.
    unsafe { plan.run(stream, &buffers)? };
    ran::cuda(op::MX_MATMUL, &kernel.name, plan.path_name());
    Ok(())
}
