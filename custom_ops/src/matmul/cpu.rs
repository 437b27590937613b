//! `MxMatMul` on the CPU provider: the kernels on tensors in host memory, by ONNX Runtime's threads.

use std::borrow::Cow;

use half::{bf16, f16};
use mx_kernels::{LinearProblem, PackedWeight, PreparedWeight};
use ort::operator::ComputeContext;

use super::{MatMulKernel, checked, output_dims};
use crate::{
    contract::{MxMatMulAttrs, ScalesShape, input, op},
    guard::OpError,
    host::{self, Node},
    pool::OrtPool,
    ran, repack,
    types::{XElement, XType},
};

/// Repacks a constant weight with block scales for this machine.
pub(super) fn prepare(
    node: &Node<'_, '_>,
    attrs: &MxMatMulAttrs,
    problem: &LinearProblem,
) -> Result<Option<PreparedWeight>, OpError> {
    if !matches!(attrs.scales_shape(), ScalesShape::Blocks(_)) {
        return Ok(None);
    }
    repack::constants(node, (input::CODES, input::SCALES), |codes, scales| {
        let weight = PackedWeight::new(*attrs.weight(), attrs.n(), attrs.k(), codes, scales)?;
        Ok(repack::weight(problem, &weight))
    })
}

pub(super) fn run(kernel: &MatMulKernel, ctx: &ComputeContext) -> Result<(), OpError> {
    match kernel.x {
        XType::F32 => run_as::<f32>(kernel, ctx),
        XType::F16 => run_as::<f16>(kernel, ctx),
        XType::Bf16 => run_as::<bf16>(kernel, ctx),
    }
}

fn run_as<T: XElement>(kernel: &MatMulKernel, ctx: &ComputeContext) -> Result<(), OpError> {
    let attrs = &kernel.attrs;
    let x_view = checked(kernel, ctx, input::X)?;
    let codes = checked(kernel, ctx, input::CODES)?.values::<u8>()?;
    let scales: Cow<'_, [u8]> = match attrs.scales_shape() {
        ScalesShape::Absent => Cow::Borrowed(&[]),
        ScalesShape::Blocks(_) => checked(kernel, ctx, input::SCALES)?.values::<u8>()?,
        ScalesShape::Tensor => {
            let scale = checked(kernel, ctx, input::SCALES)?.values::<f32>()?;
            Cow::Owned(
                scale.iter().flat_map(|s| mx_kernels::pack::tensor_scale_to_bytes(*s)).collect(),
            )
        }
    };
    let bias = match kernel.has_bias {
        true => Some(checked(kernel, ctx, input::BIAS)?.values::<T>()?),
        false => None,
    };
    let x = x_view.values::<T>()?;
    let dims = output_dims(attrs, x_view.dims());
    let Some(y) = host::output::<T>(ctx, 0, &dims)? else { return Ok(()) };
    if y.is_empty() {
        return Ok(());
    }
    let weight = PackedWeight::new(*attrs.weight(), attrs.n(), attrs.k(), &codes, &scales)?;
    let pool = OrtPool::new(ctx);
    let bias = bias.as_deref().map(T::float);
    ran::cpu(op::MX_MATMUL, &kernel.name);
    let (problem, x, y) = (&kernel.problem, T::float(&x), T::float_mut(y));
    match &kernel.prepared {
        Some(prepared) => {
            mx_kernels::linear_prepared(problem, x, &weight, prepared, bias, y, &pool)?;
        }
        None => mx_kernels::linear(problem, x, &weight, bias, y, &pool)?,
    }
    pool.finish()
}
