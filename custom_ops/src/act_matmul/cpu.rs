//! `MxActMatMul` on the CPU provider.

use half::{bf16, f16};
use ort::operator::ComputeContext;

use super::{ActMatMulKernel, call, problem};
use crate::{
    contract::op,
    guard::OpError,
    host,
    pool::OrtPool,
    ran,
    types::{XElement, XType},
};

pub(super) fn run(kernel: &ActMatMulKernel, ctx: &ComputeContext) -> Result<(), OpError> {
    match kernel.x {
        XType::F32 => run_as::<f32>(kernel, ctx),
        XType::F16 => run_as::<f16>(kernel, ctx),
        XType::Bf16 => run_as::<bf16>(kernel, ctx),
    }
}

fn run_as<T: XElement>(kernel: &ActMatMulKernel, ctx: &ComputeContext) -> Result<(), OpError> {
    let call = call(kernel, ctx)?;
    let Some(y) = host::output::<T>(ctx, 0, &call.y_dims)? else { return Ok(()) };
    if y.is_empty() {
        return Ok(());
    }
    let (a, b) = (call.a.values::<T>()?, call.b.values::<T>()?);
    let pool = OrtPool::new(ctx);
    let problem = problem(&kernel.attrs, &call.product);
    ran::cpu(op::MX_ACT_MATMUL, &kernel.name);
    mx_kernels::act_matmul(&problem, T::float(&a), T::float(&b), T::float_mut(y), &pool)?;
    pool.finish()
}
