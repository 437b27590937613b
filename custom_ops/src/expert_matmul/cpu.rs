//! `MxExpertMatMul` on the CPU provider.

use std::{borrow::Cow, sync::OnceLock};

use half::{bf16, f16};
use mx_kernels::{LinearProblem, PackedWeight, PreparedWeight, Serial};
use ort::operator::ComputeContext;

use super::{Call, ExpertKernel, call};
use crate::{
    contract::{MxExpertMatMulAttrs, Product, expert, op},
    guard::OpError,
    host::{self, Node},
    pool::OrtPool,
    ran, repack,
    types::{XElement, XType},
};

/// Rows of X that go to one expert at a time: enough to decode its weight once for many.
const ROWS: usize = 512;

/// Repacks the experts of a constant stack for this machine, those that it has a use for.
pub(super) fn prepare(
    node: &Node<'_, '_>,
    attrs: &MxExpertMatMulAttrs,
    problem: &LinearProblem,
) -> Result<Vec<Option<PreparedWeight>>, OpError> {
    if attrs.scales_shape().is_none() {
        return Ok(Vec::new());
    }
    repack::constants(node, (expert::CODES, expert::SCALES), |codes, scales| {
        let (linear, count) = (attrs.linear(), attrs.experts());
        let elements = linear.n().saturating_mul(linear.k()).saturating_mul(count);
        // An expert a task: threads are started once for all of them.
        let results: Vec<OnceLock<_>> = (0..count).map(|_| OnceLock::new()).collect();
        repack::threads(elements).run(count, &|index| {
            let prepared = weight(attrs, codes, scales, index)
                .map(|w| PreparedWeight::new(problem, &w, &Serial));
            let _ = results[index].set(prepared);
        });
        results.into_iter().map(|result| result.into_inner().unwrap_or(Ok(None))).collect()
    })
}

/// Expert `index` of a stack, whose lengths were held against the number of experts.
fn weight<'a>(
    attrs: &MxExpertMatMulAttrs,
    codes: &'a [u8],
    scales: &'a [u8],
    index: usize,
) -> Result<PackedWeight<'a>, mx_kernels::Error> {
    let attrs = attrs.linear();
    let (spec, n, k) = (*attrs.weight(), attrs.n(), attrs.k());
    let part = |bytes: &'a [u8], len: usize| bytes.get(index * len..(index + 1) * len);
    let codes = part(codes, spec.codes_len(n, k)).unwrap_or_default();
    let scales = part(scales, spec.scales_len(n, k)).unwrap_or_default();
    PackedWeight::new(spec, n, k, codes, scales)
}

pub(super) fn run(kernel: &ExpertKernel, ctx: &ComputeContext) -> Result<(), OpError> {
    match kernel.x {
        XType::F32 => run_as::<f32>(kernel, ctx),
        XType::F16 => run_as::<f16>(kernel, ctx),
        XType::Bf16 => run_as::<bf16>(kernel, ctx),
    }
}

fn run_as<T: XElement>(kernel: &ExpertKernel, ctx: &ComputeContext) -> Result<(), OpError> {
    let call = call(kernel, ctx)?;
    let Some(y) = host::output::<T>(ctx, 0, &call.y_dims)? else { return Ok(()) };
    if y.is_empty() {
        return Ok(());
    }
    ran::cpu(op::MX_EXPERT_MATMUL, &kernel.name);
    let product = kernel.attrs.product(call.x.dims(), &call.index)?;
    let x = call.x.values::<T>()?;
    let pool = OrtPool::new(ctx);
    // Products of one expert together, whatever their places.
    let mut places: Vec<usize> = (0..product.batches.len()).collect();
    let expert = |place: usize| call.experts[product.batches[place].1];
    places.sort_by_key(|&place| expert(place));
    let most = (ROWS / product.m.max(1)).max(1);
    let stack = Stack::new(kernel, &call)?;
    for places in places.chunk_by(|&a, &b| expert(a) == expert(b)) {
        let index = expert(places[0]);
        let weight = (stack.weight(index)?, kernel.prepared.get(index).and_then(Option::as_ref));
        for places in places.chunks(most) {
            products(kernel, &product, places, &x, weight, y, &pool)?;
        }
    }
    pool.finish()
}

/// The packed weights of all experts.
struct Stack<'a> {
    kernel: &'a ExpertKernel,
    codes: Cow<'a, [u8]>,
    scales: Cow<'a, [u8]>,
}

impl<'a> Stack<'a> {
    fn new(kernel: &'a ExpertKernel, call: &Call<'a>) -> Result<Self, OpError> {
        let scales = call.scales.as_ref().map(|scales| scales.values::<u8>()).transpose()?;
        let (codes, scales) = (call.codes.values::<u8>()?, scales.unwrap_or_default());
        Ok(Self { kernel, codes, scales })
    }

    fn weight(&self, expert: usize) -> Result<PackedWeight<'_>, mx_kernels::Error> {
        weight(&self.kernel.attrs, &self.codes, &self.scales, expert)
    }
}

/// The products at some places, all with one weight.
fn products<T: XElement>(
    kernel: &ExpertKernel,
    product: &Product,
    places: &[usize],
    x: &[T],
    (weight, prepared): (PackedWeight<'_>, Option<&PreparedWeight>),
    y: &mut [T],
    pool: &OrtPool<'_>,
) -> Result<(), OpError> {
    let (x_len, y_len) = (product.m * product.k, product.m * product.n);
    let x_of = |place: usize| &x[product.batches[place].0 * x_len..][..x_len];
    let linear = |x: &[T], y: &mut [T]| {
        let (problem, x, y) = (&kernel.problem, T::float(x), T::float_mut(y));
        match prepared {
            Some(prepared) => {
                mx_kernels::linear_prepared(problem, x, &weight, prepared, None, y, pool)
            }
            None => mx_kernels::linear(problem, x, &weight, None, y, pool),
        }
    };
    if let [place] = *places {
        return Ok(linear(x_of(place), &mut y[place * y_len..][..y_len])?);
    }
    let rows: Vec<T> = places.iter().flat_map(|&place| x_of(place)).copied().collect();
    let mut results = vec![T::default(); places.len() * y_len];
    linear(&rows, &mut results)?;
    for (place, result) in places.iter().zip(results.chunks(y_len)) {
        y[place * y_len..][..y_len].copy_from_slice(result);
    }
    Ok(())
}
