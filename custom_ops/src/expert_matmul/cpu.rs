//! `MxExpertMatMul` on the CPU provider.

use std::borrow::Cow;

use half::{bf16, f16};
use mx_kernels::PackedWeight;
use ort::operator::ComputeContext;

use super::{Call, ExpertKernel, call};
use crate::{
    contract::{Product, op},
    guard::OpError,
    host,
    pool::OrtPool,
    ran,
    types::{XElement, XType},
};

/// Rows of X that go to one expert at a time: enough to decode its weight once for many.
const ROWS: usize = 512;

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
        let weight = stack.weight(expert(places[0]))?;
        for places in places.chunks(most) {
            products(kernel, &product, places, &x, &weight, y, &pool)?;
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
        let attrs = self.kernel.attrs.linear();
        let (spec, n, k) = (*attrs.weight(), attrs.n(), attrs.k());
        let (codes, scales) = (spec.codes_len(n, k), spec.scales_len(n, k));
        // The lengths of both were held against the number of experts.
        let (codes, scales) =
            (&self.codes[expert * codes..][..codes], &self.scales[expert * scales..][..scales]);
        PackedWeight::new(spec, n, k, codes, scales)
    }
}

/// The products at some places, all with one weight.
fn products<T: XElement>(
    kernel: &ExpertKernel,
    product: &Product,
    places: &[usize],
    x: &[T],
    weight: &PackedWeight<'_>,
    y: &mut [T],
    pool: &OrtPool<'_>,
) -> Result<(), OpError> {
    let (x_len, y_len) = (product.m * product.k, product.m * product.n);
    let x_of = |place: usize| &x[product.batches[place].0 * x_len..][..x_len];
    let linear = |x: &[T], y: &mut [T]| {
        mx_kernels::linear(&kernel.problem, T::float(x), weight, None, T::float_mut(y), pool)
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
