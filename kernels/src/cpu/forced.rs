//! The kernels of one variant, by name: for tests that hold every variant against the reference.
//!
//! A name that [`super::available_variants`] does not list runs the scalar variant.

use crate::{
    error::Error,
    parallel::Parallel,
    quantize::StoredWeight,
    tensor::{Float, FloatMut, LinearProblem, PackedWeight, QuantSpec},
};

fn table(variant: &str) -> &'static super::Kernels {
    super::by_name(variant).or_else(|| super::by_name("scalar")).unwrap_or_else(super::kernels)
}

/// [`crate::linear`].
///
/// # Errors
/// As there.
pub fn linear(
    variant: &str,
    problem: &LinearProblem,
    x: Float<'_>,
    w: &PackedWeight<'_>,
    bias: Option<Float<'_>>,
    y: FloatMut<'_>,
    par: &dyn Parallel,
) -> Result<(), Error> {
    super::linear(table(variant), problem, x, w, None, bias, y, par)
}

/// Whether the variant repacks such a weight for such a problem.
pub fn repacks(variant: &str, problem: &LinearProblem, w: &PackedWeight<'_>) -> bool {
    super::PreparedWeight::with(table(variant), problem, w, &crate::Serial).is_some()
}

/// [`crate::linear_prepared`] with a weight prepared for it; [`crate::linear`] where the variant has no use
/// for one.
///
/// # Errors
/// As there.
pub fn linear_prepared(
    variant: &str,
    problem: &LinearProblem,
    x: Float<'_>,
    w: &PackedWeight<'_>,
    bias: Option<Float<'_>>,
    y: FloatMut<'_>,
    par: &dyn Parallel,
) -> Result<(), Error> {
    let kernels = table(variant);
    match super::PreparedWeight::with(kernels, problem, w, par) {
        Some(prepared) => super::packed::linear(kernels, problem, x, w, &prepared, bias, y, par),
        None => super::linear(kernels, problem, x, w, None, bias, y, par),
    }
}

/// [`crate::quantize_rows`].
///
/// # Errors
/// As there.
pub fn quantize_rows(
    variant: &str,
    spec: &QuantSpec,
    x: &[f32],
    rows: usize,
    k: usize,
    codes: &mut [u8],
    scales: &mut [u8],
) -> Result<(), Error> {
    super::quantize_rows(table(variant), spec, x, rows, k, codes, scales)
}

/// [`crate::fake_quantize_rows`].
///
/// # Errors
/// As there.
pub fn fake_quantize_rows(
    variant: &str,
    spec: &QuantSpec,
    x: &[f32],
    rows: usize,
    k: usize,
    out: &mut [f32],
) -> Result<(), Error> {
    super::fake_quantize_rows(table(variant), spec, x, rows, k, out)
}

/// [`crate::quantize_weight`].
///
/// # Errors
/// As there.
pub fn quantize_weight(
    variant: &str,
    spec: &QuantSpec,
    weight: &StoredWeight<'_>,
    first: usize,
    codes: &mut [u8],
    scales: &mut [u8],
) -> Result<(), Error> {
    super::quantize_weight(table(variant), spec, weight, first, codes, scales)
}
