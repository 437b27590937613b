//! Shapes and buffers: what a caller describes and what the kernels check.

use half::{bf16, f16};

use crate::{
    error::{Error, check_len},
    formats::ElementFormat,
    quantize::Rounding,
    scale::{ScaleKind, ScaleRule},
};

/// How one operand is quantised along k.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct QuantSpec {
    /// Format of the elements.
    pub format: ElementFormat,
    /// What accompanies the codes.
    pub scale: ScaleKind,
    /// Elements along k that share a scale; without block scales, k is padded to a multiple of it.
    pub block_size: usize,
    /// Rounding of an element.
    pub rounding: Rounding,
    /// Rule for the shared exponent; unused unless the scale is `e8m0`.
    pub scale_rule: ScaleRule,
}

impl QuantSpec {
    /// A checked specification.
    ///
    /// # Errors
    /// [`Error::BlockSize`] for a block size other than 16, 32, 64, 128 or 256, and
    /// [`Error::Combination`] where format and scale do not go together: `e8m0` takes the five MX
    /// floats and `mxint8`, `none` takes `bf16` and the two fp8, `tensor` the two fp8.
    pub fn new(
        format: ElementFormat,
        scale: ScaleKind,
        block_size: usize,
        rounding: Rounding,
        scale_rule: ScaleRule,
    ) -> Result<Self, Error> {
        let spec = Self { format, scale, block_size, rounding, scale_rule };
        spec.validate()?;
        Ok(spec)
    }

    /// E8M0 scales, blocks of 32, half to even, scale rule `floor`: the defaults of OCP MX v1.0.
    ///
    /// # Errors
    /// As [`QuantSpec::new`]: `bf16` takes no scale.
    pub fn mx(format: ElementFormat) -> Result<Self, Error> {
        Self::new(format, ScaleKind::E8M0, 32, Rounding::Even, ScaleRule::Floor)
    }

    /// The checks of [`QuantSpec::new`], for a value whose fields were set one by one.
    ///
    /// # Errors
    /// As [`QuantSpec::new`].
    pub fn validate(&self) -> Result<(), Error> {
        if !matches!(self.block_size, 16 | 32 | 64 | 128 | 256) {
            return Err(Error::BlockSize(self.block_size));
        }
        let fp8 = matches!(self.format, ElementFormat::Fp8E4M3 | ElementFormat::Fp8E5M2);
        let (fits, reason) = match self.scale {
            ScaleKind::E8M0 => (self.format != ElementFormat::Bf16, "bf16 takes scale none"),
            ScaleKind::None => (
                fp8 || self.format == ElementFormat::Bf16,
                "only bf16, fp8_e4m3 and fp8_e5m2 can do without a scale",
            ),
            ScaleKind::Tensor => (fp8, "only fp8_e4m3 and fp8_e5m2 take one scale a tensor"),
        };
        if fits {
            Ok(())
        } else {
            let (format, scale) = (self.format.name(), self.scale.name());
            Err(Error::Combination { format, scale, reason })
        }
    }

    /// Blocks in a row of `k` elements.
    pub const fn blocks(&self, k: usize) -> usize {
        k.div_ceil(self.block_size)
    }

    /// Packed bytes of a row of `k` elements: ceil(k / block) whole blocks of codes.
    ///
    /// Saturates, so that an absurd `k` from a file matches no buffer instead of wrapping.
    pub const fn row_bytes(&self, k: usize) -> usize {
        self.blocks(k).saturating_mul(self.block_bytes())
    }

    /// Packed bytes of one whole block.
    pub const fn block_bytes(&self) -> usize {
        self.block_size * self.format.bits() as usize / 8
    }

    /// Packed bytes of `rows` rows; saturates.
    pub const fn codes_len(&self, rows: usize, k: usize) -> usize {
        rows.saturating_mul(self.row_bytes(k))
    }

    /// Bytes of the scales of `rows` rows: one a block, none, or the four of a float32; saturates.
    pub const fn scales_len(&self, rows: usize, k: usize) -> usize {
        match self.scale {
            ScaleKind::E8M0 => rows.saturating_mul(self.blocks(k)),
            ScaleKind::None => 0,
            ScaleKind::Tensor => 4,
        }
    }
}

/// Input values in one of the three float types.
#[derive(Debug, Clone, Copy)]
pub enum Float<'a> {
    /// IEEE single precision.
    F32(&'a [f32]),
    /// IEEE half precision.
    F16(&'a [f16]),
    /// bfloat16.
    Bf16(&'a [bf16]),
}

impl Float<'_> {
    /// The `len` values from `start` on.
    pub(crate) fn slice(&self, start: usize, len: usize) -> Self {
        match *self {
            Self::F32(v) => Self::F32(&v[start..start + len]),
            Self::F16(v) => Self::F16(&v[start..start + len]),
            Self::Bf16(v) => Self::Bf16(&v[start..start + len]),
        }
    }

    /// Number of values.
    pub fn len(&self) -> usize {
        match self {
            Self::F32(v) => v.len(),
            Self::F16(v) => v.len(),
            Self::Bf16(v) => v.len(),
        }
    }

    /// Whether there is no value.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Value `i` as an f32, exactly.
    #[inline(always)]
    pub fn get(&self, i: usize) -> f32 {
        match self {
            Self::F32(v) => v[i],
            Self::F16(v) => v[i].to_f32(),
            Self::Bf16(v) => v[i].to_f32(),
        }
    }

    /// Copies the values from `start` on into `out`, exactly.
    #[inline(always)]
    pub fn load(&self, start: usize, out: &mut [f32]) {
        let end = start + out.len();
        match self {
            Self::F32(v) => out.copy_from_slice(&v[start..end]),
            Self::F16(v) => {
                half::slice::HalfFloatSliceExt::convert_to_f32_slice(&v[start..end], out);
            }
            Self::Bf16(v) => {
                for (o, v) in out.iter_mut().zip(&v[start..end]) {
                    *o = f32::from_bits(u32::from(v.to_bits()) << 16);
                }
            }
        }
    }
}

/// Output values in one of the three float types; f32 results are rounded half to even.
#[derive(Debug)]
pub enum FloatMut<'a> {
    /// IEEE single precision.
    F32(&'a mut [f32]),
    /// IEEE half precision.
    F16(&'a mut [f16]),
    /// bfloat16.
    Bf16(&'a mut [bf16]),
}

impl FloatMut<'_> {
    /// Number of values.
    pub fn len(&self) -> usize {
        match self {
            Self::F32(v) => v.len(),
            Self::F16(v) => v.len(),
            Self::Bf16(v) => v.len(),
        }
    }

    /// Whether there is no value.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The `len` elements from `start` on.
    pub(crate) fn slice_mut(&mut self, start: usize, len: usize) -> FloatMut<'_> {
        match self {
            Self::F32(v) => FloatMut::F32(&mut v[start..start + len]),
            Self::F16(v) => FloatMut::F16(&mut v[start..start + len]),
            Self::Bf16(v) => FloatMut::Bf16(&mut v[start..start + len]),
        }
    }

    /// Stores `value` at `i`, rounded half to even to the type.
    #[inline(always)]
    pub fn set(&mut self, i: usize, value: f32) {
        match self {
            Self::F32(v) => v[i] = value,
            Self::F16(v) => v[i] = f16::from_f32(value),
            Self::Bf16(v) => v[i] = bf16::from_f32(value),
        }
    }
}

/// A weight [n, k] in packed form, its lengths checked against its shape.
#[derive(Debug, Clone, Copy)]
pub struct PackedWeight<'a> {
    n: usize,
    k: usize,
    spec: QuantSpec,
    codes: &'a [u8],
    scales: &'a [u8],
}

impl<'a> PackedWeight<'a> {
    /// A view of `n` rows of `k` elements: `codes` is [n, row_bytes]; `scales` is [n, blocks] bytes
    /// for `e8m0`, empty for `none`, the four little-endian bytes of a float32 for `tensor`.
    ///
    /// # Errors
    /// An invalid specification, a dimension of zero, or a buffer of another length.
    pub fn new(
        spec: QuantSpec,
        n: usize,
        k: usize,
        codes: &'a [u8],
        scales: &'a [u8],
    ) -> Result<Self, Error> {
        spec.validate()?;
        check_dimensions(n, k)?;
        check_len("codes", codes.len(), spec.codes_len(n, k))?;
        check_len("scales", scales.len(), spec.scales_len(n, k))?;
        Ok(Self { n, k, spec, codes, scales })
    }

    /// Rows: output features.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Elements of a row: input features.
    pub fn k(&self) -> usize {
        self.k
    }

    /// How the weight is quantised.
    pub fn spec(&self) -> &QuantSpec {
        &self.spec
    }

    /// All packed codes, [n, row_bytes].
    pub fn codes(&self) -> &'a [u8] {
        self.codes
    }

    /// All scales, as bytes.
    pub fn scales(&self) -> &'a [u8] {
        self.scales
    }
}

/// `y[m, n] = alpha * x[m, k] * w[n, k]^T (+ beta * bias[n])`; m follows from the length of x.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LinearProblem {
    /// Output features.
    pub n: usize,
    /// Input features, the contraction axis.
    pub k: usize,
    /// How the weight is quantised.
    pub weight: QuantSpec,
    /// How x is quantised on the fly; `None` takes x as it is.
    pub activation: Option<QuantSpec>,
    /// Factor of the product.
    pub alpha: f32,
    /// Factor of the bias.
    pub beta: f32,
}

impl LinearProblem {
    /// Checks everything that `linear` relies on and returns m.
    ///
    /// # Errors
    /// A length or a specification that does not fit; see [`Error`].
    pub fn check(
        &self,
        x: &Float<'_>,
        w: &PackedWeight<'_>,
        bias: Option<&Float<'_>>,
        y: &FloatMut<'_>,
    ) -> Result<usize, Error> {
        check_dimensions(self.n, self.k)?;
        if let Some(activation) = &self.activation {
            activation.validate()?;
        }
        let mismatch =
            |what, problem: String, weight: String| Err(Error::Mismatch { what, problem, weight });
        if self.n != w.n || self.k != w.k {
            let shape = |n: usize, k: usize| format!("[{n}, {k}]");
            return mismatch("shape", shape(self.n, self.k), shape(w.n, w.k));
        }
        let (a, b) = (&self.weight, &w.spec);
        if (a.format, a.scale, a.block_size) != (b.format, b.scale, b.block_size) {
            return mismatch("quantisation", format!("{a:?}"), format!("{b:?}"));
        }
        if !x.len().is_multiple_of(self.k) {
            return Err(Error::Rows { what: "x", row: self.k, actual: x.len() });
        }
        let m = x.len() / self.k;
        check_len("y", y.len(), m.saturating_mul(self.n))?;
        if let Some(bias) = bias {
            check_len("bias", bias.len(), self.n)?;
        }
        Ok(m)
    }
}

fn check_dimensions(n: usize, k: usize) -> Result<(), Error> {
    if n == 0 {
        return Err(Error::ZeroDimension("n"));
    }
    if k == 0 {
        return Err(Error::ZeroDimension("k"));
    }
    Ok(())
}
