//! `TokenScores` on the CPU provider.

use half::{bf16, f16};
use mx_kernels::{BaselineScores, TokenScores as Outputs};
use ort::operator::ComputeContext;

use super::{ScoresKernel, inputs, without_baseline};
use crate::{
    contract::scores,
    guard::OpError,
    host::{self, Element, TensorView},
    pool::OrtPool,
    types::{XElement, XType},
};

pub(super) fn run(kernel: &ScoresKernel, ctx: &ComputeContext) -> Result<(), OpError> {
    match kernel.logits {
        XType::F32 => run_as::<f32>(kernel, ctx),
        XType::F16 => run_as::<f16>(kernel, ctx),
        XType::Bf16 => run_as::<bf16>(kernel, ctx),
    }
}

/// Output `index`, or room that nobody reads where the node leaves it out.
fn output_or<'a, T: Element + Default>(
    ctx: &'a ComputeContext,
    index: usize,
    dims: &[i64],
    spare: &'a mut Vec<T>,
    rows: usize,
) -> Result<&'a mut [T], OpError> {
    match host::output::<T>(ctx, index, dims)? {
        Some(values) => Ok(values),
        None => {
            spare.resize(rows, T::default());
            Ok(spare)
        }
    }
}

fn run_as<T: XElement>(kernel: &ScoresKernel, ctx: &ComputeContext) -> Result<(), OpError> {
    let inputs = inputs(kernel, ctx)?;
    let (logits, labels) = (inputs.logits.values::<T>()?, inputs.labels.values::<i64>()?);
    let baseline = inputs.baseline.as_ref().map(TensorView::values::<T>).transpose()?;
    let (dims, rows) = (inputs.dims, labels.len());
    let (mut spare, mut spare_top1) = ([const { Vec::new() }; 4], Vec::new());
    let [spare_nll, spare_entropy, spare_kl, spare_base] = &mut spare;
    let nll = output_or(ctx, 0, &dims, spare_nll, rows)?;
    let entropy = output_or(ctx, 1, &dims, spare_entropy, rows)?;
    let top1 = output_or(ctx, 2, &dims, &mut spare_top1, rows)?;
    let against = match &baseline {
        Some(_) => Some(BaselineScores {
            kl: output_or(ctx, 3, &dims, spare_kl, rows)?,
            nll: output_or(ctx, 4, &dims, spare_base, rows)?,
        }),
        None => {
            reject_baseline_outputs(ctx, &dims)?;
            None
        }
    };
    if rows == 0 {
        return Ok(());
    }
    let pool = OrtPool::new(ctx);
    let outputs = Outputs { nll, entropy, top1, baseline: against };
    let baseline = baseline.as_deref().map(T::float);
    mx_kernels::token_scores(T::float(&logits), &labels, inputs.vocab, baseline, outputs, &pool)?;
    pool.finish()
}

/// Outputs that compare with a baseline cannot be filled without one.
fn reject_baseline_outputs(ctx: &ComputeContext, dims: &[i64]) -> Result<(), OpError> {
    for index in scores::AGAINST_BASELINE..scores::OUTPUT_NAMES.len() {
        if host::output::<f32>(ctx, index, dims)?.is_some() {
            return Err(without_baseline(index));
        }
    }
    Ok(())
}
