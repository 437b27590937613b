//! Products of two matrices that are both quantised on the fly: `MatMul` of activations.

use std::sync::Mutex;

use crate::{
    error::{Error, check_len},
    parallel::{Parallel, Serial},
    quantize::quantize_rows,
    scale::ScaleKind,
    tensor::{Float, FloatMut, LinearProblem, PackedWeight, QuantSpec},
};

/// `y[i] = alpha * a[batches[i].0] * b[batches[i].1]`: a matrix of y [m, n] for each pair, of a
/// matrix of a [m, k] and one of b [k, n], or [n, k] with `transpose_b`. Both are quantised along k.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ActMatMulProblem<'a> {
    /// Rows of a matrix of a.
    pub m: usize,
    /// Columns of a product.
    pub n: usize,
    /// The contraction axis.
    pub k: usize,
    /// How a is quantised.
    pub a_spec: QuantSpec,
    /// How b is quantised.
    pub b_spec: QuantSpec,
    /// Whether matrices of b are [n, k].
    pub transpose_b: bool,
    /// Factor of the product.
    pub alpha: f32,
    /// For each product, which matrix of a and which of b. A matrix may occur any number of times.
    pub batches: &'a [(usize, usize)],
}

impl ActMatMulProblem<'_> {
    /// Checks the specifications and dimensions; the lengths of buffers are left to [`Self::check`].
    ///
    /// # Errors
    /// An invalid specification, a scale `tensor` (whose amax would be that of one matrix or of all,
    /// by how they are batched), or a dimension of zero.
    pub fn check_sizes(&self) -> Result<(), Error> {
        for spec in [&self.a_spec, &self.b_spec] {
            spec.validate()?;
            if spec.scale == ScaleKind::Tensor {
                return Err(Error::Combination {
                    format: spec.format.name(),
                    scale: spec.scale.name(),
                    reason: "a product of activations takes e8m0 or none",
                });
            }
        }
        for (what, size) in [("m", self.m), ("n", self.n), ("k", self.k)] {
            if size == 0 {
                return Err(Error::ZeroDimension(what));
            }
        }
        Ok(())
    }

    /// Checks everything that [`crate::act_matmul()`] relies on.
    ///
    /// # Errors
    /// As [`Self::check_sizes`], a buffer that holds no whole number of matrices, a pair that names a
    /// matrix past the end, and a y of another length.
    pub fn check(&self, a: &Float<'_>, b: &Float<'_>, y: &FloatMut<'_>) -> Result<(), Error> {
        self.check_sizes()?;
        let a_size = self.m.saturating_mul(self.k);
        let b_size = self.k.saturating_mul(self.n);
        for (what, row, values) in [("a", a_size, a), ("b", b_size, b)] {
            if !values.len().is_multiple_of(row) {
                return Err(Error::Rows { what, row, actual: values.len() });
            }
        }
        let matrices = |what, size: usize, last: Option<usize>, actual| match last {
            Some(last) if last >= actual / size => {
                let expected = last.saturating_add(1).saturating_mul(size);
                Err(Error::Length { what, expected, actual })
            }
            _ => Ok(()),
        };
        matrices("a", a_size, self.batches.iter().map(|pair| pair.0).max(), a.len())?;
        matrices("b", b_size, self.batches.iter().map(|pair| pair.1).max(), b.len())?;
        let y_size = self.m.saturating_mul(self.n);
        check_len("y", y.len(), self.batches.len().saturating_mul(y_size))
    }

    /// The linear layer that one product is, once b's matrix is packed row by row of its columns.
    fn linear(&self) -> LinearProblem {
        LinearProblem {
            n: self.n,
            k: self.k,
            weight: self.b_spec,
            activation: Some(self.a_spec),
            alpha: self.alpha,
            beta: 0.0,
        }
    }

    /// Matrix `index` of b as rows [n, k], exactly.
    fn columns_of_b(&self, b: &Float<'_>, index: usize) -> Vec<f32> {
        let (n, k) = (self.n, self.k);
        let mut raw = vec![0.0; k * n];
        b.load(index * k * n, &mut raw);
        if self.transpose_b {
            return raw;
        }
        let mut out = vec![0.0; k * n];
        for (i, row) in raw.chunks_exact(n).enumerate() {
            for (j, &v) in row.iter().enumerate() {
                out[j * k + i] = v;
            }
        }
        out
    }
}

/// [`crate::quantize_rows`] or the reference's.
type Quantize = fn(&QuantSpec, &[f32], usize, usize, &mut [u8], &mut [u8]) -> Result<(), Error>;

/// A quantised matrix of b.
struct Packed {
    codes: Vec<u8>,
    scales: Vec<u8>,
}

impl Packed {
    fn weight(&self, problem: &ActMatMulProblem<'_>) -> Result<PackedWeight<'_>, Error> {
        PackedWeight::new(problem.b_spec, problem.n, problem.k, &self.codes, &self.scales)
    }
}

/// Quantises matrix `index` of b.
fn pack_b(
    problem: &ActMatMulProblem<'_>,
    b: &Float<'_>,
    index: usize,
    quantize: Quantize,
) -> Result<Packed, Error> {
    let (n, k, spec) = (problem.n, problem.k, &problem.b_spec);
    let rows = problem.columns_of_b(b, index);
    let mut codes = vec![0; spec.codes_len(n, k)];
    let mut scales = vec![0; spec.scales_len(n, k)];
    quantize(spec, &rows, n, k, &mut codes, &mut scales)?;
    Ok(Packed { codes, scales })
}

/// See [`crate::act_matmul()`].
pub(crate) fn act_matmul(
    problem: &ActMatMulProblem<'_>,
    a: Float<'_>,
    b: Float<'_>,
    y: FloatMut<'_>,
    par: &dyn Parallel,
) -> Result<(), Error> {
    problem.check(&a, &b, &y)?;
    if problem.batches.is_empty() {
        return Ok(());
    }
    let (size, linear) = (problem.m * problem.n, problem.linear());
    let products = split(y, size);
    // Products that share a matrix of b are neighbours in `order`, and a group shares its packing.
    let mut order: Vec<usize> = (0..products.len()).collect();
    order.sort_by_key(|&i| problem.batches[i].1);
    let groups: Vec<&[usize]> =
        order.chunk_by(|&i, &j| problem.batches[i].1 == problem.batches[j].1).collect();
    let failure = Mutex::new(None);
    let group = |group: &[usize], par: &dyn Parallel| -> Result<(), Error> {
        let packed = pack_b(problem, &b, problem.batches[group[0]].1, quantize_rows)?;
        let w = packed.weight(problem)?;
        for &i in group {
            let x = a.slice(problem.batches[i].0 * problem.m * problem.k, problem.m * problem.k);
            // Every product is in one group, so the lock is never contended.
            let y = products[i].lock().ok().and_then(|mut y| y.take());
            if let Some(y) = y {
                crate::linear(&linear, x, &w, None, y, par)?;
            }
        }
        Ok(())
    };
    let run = |index: usize, par: &dyn Parallel| {
        if let Err(error) = group(groups[index], par)
            && let Ok(mut failure) = failure.lock()
        {
            failure.get_or_insert(error);
        }
    };
    // Many groups keep the threads busy by themselves; few leave them to the product.
    if groups.len() >= 2 * par.threads() {
        par.run(groups.len(), &|index| run(index, &Serial));
    } else {
        (0..groups.len()).for_each(|index| run(index, par));
    }
    failure.into_inner().ok().flatten().map_or(Ok(()), Err)
}

/// The products of `y`, each to be taken once.
fn split(y: FloatMut<'_>, size: usize) -> Vec<Mutex<Option<FloatMut<'_>>>> {
    let one = |part| Mutex::new(Some(part));
    match y {
        FloatMut::F32(y) => y.chunks_exact_mut(size).map(FloatMut::F32).map(one).collect(),
        FloatMut::F16(y) => y.chunks_exact_mut(size).map(FloatMut::F16).map(one).collect(),
        FloatMut::Bf16(y) => y.chunks_exact_mut(size).map(FloatMut::Bf16).map(one).collect(),
    }
}

/// What the specification does: one product after the other, by `quantize` and `linear` of its own.
pub(crate) fn in_order(
    problem: &ActMatMulProblem<'_>,
    a: Float<'_>,
    b: Float<'_>,
    y: FloatMut<'_>,
    quantize: Quantize,
    linear: impl Fn(&LinearProblem, Float<'_>, &PackedWeight<'_>, FloatMut<'_>) -> Result<(), Error>,
) -> Result<(), Error> {
    problem.check(&a, &b, &y)?;
    if problem.batches.is_empty() {
        return Ok(());
    }
    let size = problem.m * problem.k;
    for (product, &(a_index, b_index)) in
        split(y, problem.m * problem.n).iter().zip(problem.batches)
    {
        let packed = pack_b(problem, &b, b_index, quantize)?;
        let x = a.slice(a_index * size, size);
        if let Some(y) = product.lock().ok().and_then(|mut y| y.take()) {
            linear(&problem.linear(), x, &packed.weight(problem)?, y)?;
        }
    }
    Ok(())
}
