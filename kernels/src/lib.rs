//! OCP Microscaling (MX) on the CPU: element formats, shared scales, packing, quantisation, the
//! linear layer on packed weights and the scores of predicted tokens. No ONNX and no files.
//!
//! ```text
//! f32 rows --quantize--> codes + scales --pack--> bytes --linear(x)--> y
//! ```
//!
//! [`mod@reference`] is the specification; everything else is held against it. [`pack`] alone knows the
//! order of packed bytes, [`formats`] holds the one table of formats, [`scale`] the shared exponents.
//!
//! Source: OCP Microscaling Formats (MX) Specification v1.0.

pub mod act_matmul;
pub mod cpu;
pub mod cuda;
pub mod error;
pub mod formats;
pub mod pack;
pub mod parallel;
pub mod quantize;
pub mod reference;
pub mod scale;
pub mod scores;
pub mod tensor;

pub use act_matmul::ActMatMulProblem;
pub use cpu::PreparedWeight;
pub use error::Error;
pub use formats::ElementFormat;
pub use parallel::{Parallel, Serial, StdThreads};
pub use quantize::{
    FloatType, Rounding, StoredWeight, dequantize_rows, fake_quantize_rows, quantize_rows,
    quantize_weight,
};
pub use scale::{ScaleKind, ScaleRule};
pub use scores::{BaselineScores, TokenScores, token_scores};
pub use tensor::{Float, FloatMut, LinearProblem, PackedWeight, QuantSpec};

/// `y[m, n] = alpha * x[m, k] * w[n, k]^T (+ beta * bias[n])`, x quantised on the fly where the
/// problem says so.
///
/// The sum runs in fp32 in a fixed order, whatever the threads: the same input gives the same bits
/// again. It differs from the exact one by at most (k/16 + 32) * 2^-23 * sum |x_i w_i|; results
/// below 2^-126 may be flushed to zero. y is rounded half to even to its type.
///
/// # Errors
/// A specification, length or dimension that does not fit; y is untouched then.
pub fn linear(
    problem: &LinearProblem,
    x: Float<'_>,
    w: &PackedWeight<'_>,
    bias: Option<Float<'_>>,
    y: FloatMut<'_>,
    par: &dyn Parallel,
) -> Result<(), Error> {
    cpu::linear(cpu::kernels(), problem, x, w, None, bias, y, par)
}

/// [`fn@linear`] with a weight that was repacked for this machine.
///
/// The bound of the result is that of [`fn@linear`], not always its last bits: where both operands are
/// small integers (e2m1, e2m3, mxint8) the sums of a block are exact, and an unquantised float32 x may be
/// taken as two bfloat16, exact to 2^-18. The same input gives the same bits again.
///
/// # Errors
/// As [`fn@linear`].
#[allow(clippy::too_many_arguments)]
pub fn linear_prepared(
    problem: &LinearProblem,
    x: Float<'_>,
    w: &PackedWeight<'_>,
    prepared: &PreparedWeight,
    bias: Option<Float<'_>>,
    y: FloatMut<'_>,
    par: &dyn Parallel,
) -> Result<(), Error> {
    cpu::packed::linear(cpu::kernels(), problem, x, w, prepared, bias, y, par)
}

/// Products of matrices of a and b, each quantised along k on the fly; see [`ActMatMulProblem`].
///
/// Sums and rounding are those of [`fn@linear`], and so are its bounds.
///
/// # Errors
/// A specification, length, dimension or pair that does not fit; y is untouched then.
pub fn act_matmul(
    problem: &ActMatMulProblem<'_>,
    a: Float<'_>,
    b: Float<'_>,
    y: FloatMut<'_>,
    par: &dyn Parallel,
) -> Result<(), Error> {
    act_matmul::act_matmul(problem, a, b, y, par)
}
