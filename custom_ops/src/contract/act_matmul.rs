//! `MxActMatMul`: attributes, and the shapes of a product with MatMul's broadcasting.

use std::borrow::Cow;

use mx_kernels::{ElementFormat, QuantSpec, ScaleKind};

use super::{
    AttributeSource, AttributeValue, ContractError, attr, float_or, int_or, operand, quantisation,
    text,
};

/// Everything an `MxActMatMul` node says about its product, validated.
#[derive(Debug, Clone, PartialEq)]
pub struct MxActMatMulAttrs {
    a: QuantSpec,
    b: QuantSpec,
    transpose_b: bool,
    alpha: f32,
}

impl MxActMatMulAttrs {
    /// Attributes of a product whose A is quantised as `a`, and B to `b_format` with A's scale kind,
    /// block size and roundings. B is [..., k, n] and alpha is 1.
    ///
    /// # Errors
    /// A format that the scale kind excludes, and a scale `tensor`.
    pub fn new(a: QuantSpec, b_format: ElementFormat) -> Result<Self, ContractError> {
        let operand = |attribute| move |source| ContractError::Operand { attribute, source };
        let b = QuantSpec::new(b_format, a.scale, a.block_size, a.rounding, a.scale_rule)
            .map_err(operand(attr::B_FORMAT))?;
        if a.scale == ScaleKind::Tensor {
            return Err(ContractError::Text {
                attribute: attr::SCALE,
                value: a.scale.name().to_owned(),
                cause: "two activations take e8m0 or none".to_owned(),
            });
        }
        Ok(Self { a, b, transpose_b: false, alpha: 1.0 })
    }

    /// The same product with B as [..., n, k] or [..., k, n], and another factor.
    ///
    /// # Errors
    /// A factor that is NaN or infinite.
    pub fn with(mut self, transpose_b: bool, alpha: f32) -> Result<Self, ContractError> {
        if !alpha.is_finite() {
            return Err(ContractError::NotFinite { attribute: attr::ALPHA, value: alpha });
        }
        (self.transpose_b, self.alpha) = (transpose_b, alpha);
        Ok(self)
    }

    /// Reads and validates the attributes of a node. All but `a_format` have defaults: `b_format`
    /// is A's, `transpose_b` 0, the others are those of `MxMatMul`; unknown attributes are ignored.
    ///
    /// # Errors
    /// Any attribute missing, of the wrong type or outside what it allows.
    pub fn read(source: &impl AttributeSource) -> Result<Self, ContractError> {
        let a_format = text(source, attr::A_FORMAT)?;
        let a = quantisation(source, attr::A_FORMAT, &a_format)?;
        let b_format = match text(source, attr::B_FORMAT) {
            Err(ContractError::Missing { .. }) => a_format,
            found => found?,
        };
        let b = quantisation(source, attr::B_FORMAT, &b_format)?;
        let transpose_b = match int_or(source, attr::TRANSPOSE_B, 0)? {
            0 => false,
            1 => true,
            value => {
                let (attribute, allowed) = (attr::TRANSPOSE_B, "0 or 1");
                return Err(ContractError::OutOfRange { attribute, value, allowed });
            }
        };
        Self::new(a, b.format)?.with(transpose_b, float_or(source, attr::ALPHA, 1.0)?)
    }

    /// All attributes in a fixed order, ready to be written into a node.
    pub fn to_attributes(&self) -> Vec<(&'static str, AttributeValue)> {
        use AttributeValue::{Float, Int};
        let text = |value: &'static str| AttributeValue::Text(Cow::Borrowed(value));
        vec![
            (attr::A_FORMAT, text(self.a.format.name())),
            (attr::B_FORMAT, text(self.b.format.name())),
            (attr::BLOCK_SIZE, Int(self.a.block_size as i64)),
            (attr::SCALE, text(self.a.scale.name())),
            (attr::ROUNDING, text(self.a.rounding.name())),
            (attr::SCALE_RULE, text(self.a.scale_rule.name())),
            (attr::TRANSPOSE_B, Int(i64::from(self.transpose_b))),
            (attr::ALPHA, Float(self.alpha)),
        ]
    }

    /// How A is quantised.
    pub fn a(&self) -> &QuantSpec {
        &self.a
    }

    /// How B is quantised.
    pub fn b(&self) -> &QuantSpec {
        &self.b
    }

    /// Whether B is [..., n, k].
    pub fn transpose_b(&self) -> bool {
        self.transpose_b
    }

    /// Factor of the product.
    pub fn alpha(&self) -> f32 {
        self.alpha
    }
}

/// The shape of A * B; a negative dimension is unknown, and so is one of the result that follows
/// from unknown ones alone. A vector A is a row and a vector B a column, whose dimension the result
/// lacks, whatever `transpose_b` says.
///
/// # Errors
/// A scalar, operands of different k, and leading dimensions that do not broadcast.
pub fn product_dims(a: &[i64], b: &[i64], transpose_b: bool) -> Result<Vec<i64>, ContractError> {
    let [m, a_k] = matrix(operand::A, a)?;
    let [n, b_k] = column_matrix(b, transpose_b)?;
    if a_k >= 0 && b_k >= 0 && a_k != b_k {
        let expected = format!("a contraction length of {a_k}, that of A");
        return Err(shape_error(operand::B, expected, b));
    }
    let (a_batch, b_batch) = (&a[..a.len().saturating_sub(2)], &b[..b.len().saturating_sub(2)]);
    let rank = a_batch.len().max(b_batch.len());
    let mut dims = Vec::with_capacity(rank + 2);
    for i in 0..rank {
        dims.push(match (aligned(a_batch, i, rank), aligned(b_batch, i, rank)) {
            (1, other) | (other, 1) => other,
            (x, y) if x == y => x,
            (x, y) if x < 0 => y,
            (x, y) if y < 0 => x,
            _ => {
                let expected = format!("leading dimensions that broadcast with {a_batch:?} of A");
                return Err(shape_error(operand::B, expected, b));
            }
        });
    }
    dims.extend((a.len() > 1).then_some(m));
    dims.extend((b.len() > 1).then_some(n));
    Ok(dims)
}

/// A product whose shapes are all known, as one matrix product a pair.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Product {
    /// Rows of a matrix of A.
    pub m: usize,
    /// Columns of a product.
    pub n: usize,
    /// Contraction length.
    pub k: usize,
    /// For each product in the order of Y, which matrix of A and which of B; none for an empty Y.
    pub batches: Vec<(usize, usize)>,
}

/// Splits the product of A and B into products of matrices. Where all of A meets one matrix of B,
/// the rows of A are one matrix.
///
/// # Errors
/// As [`product_dims`], a k of 0, and sizes that are unknown or overflow.
pub fn product(a: &[i64], b: &[i64], transpose_b: bool) -> Result<Product, ContractError> {
    let dims = product_dims(a, b, transpose_b)?;
    let [m, k] = matrix(operand::A, a)?;
    let [n, _] = column_matrix(b, transpose_b)?;
    if k == 0 {
        return Err(shape_error(operand::A, "a contraction length of at least 1".to_owned(), a));
    }
    let size = |dim: i64| usize::try_from(dim).unwrap_or(usize::MAX);
    let count =
        |dims: &[i64]| dims.iter().try_fold(1_usize, |all, &dim| all.checked_mul(size(dim)));
    let unknown = || shape_error(operand::A, "sizes that fit into memory".to_owned(), a);
    let elements = count(&dims).ok_or_else(unknown)?;
    let mut product = Product { m: size(m), n: size(n), k: size(k), batches: Vec::new() };
    if elements == 0 {
        return Ok(product);
    }
    let (a_batch, b_batch) = (&a[..a.len().saturating_sub(2)], &b[..b.len().saturating_sub(2)]);
    let rank = a_batch.len().max(b_batch.len());
    if count(b_batch) == Some(1) {
        product.m = count(a_batch).and_then(|c| c.checked_mul(size(m))).ok_or_else(unknown)?;
        product.batches.push((0, 0));
        return Ok(product);
    }
    product.batches.push((0, 0));
    for (i, &dim) in dims[..rank].iter().enumerate() {
        // What one step along this dimension means for each operand: nothing where it is broadcast.
        let (a_dim, b_dim) = (aligned(a_batch, i, rank), aligned(b_batch, i, rank));
        let step = |index: usize, along: i64, own: i64| match own {
            1 => index,
            own => index * size(own) + size(along),
        };
        let before = std::mem::take(&mut product.batches);
        product.batches = before
            .iter()
            .flat_map(|&(a, b)| (0..dim).map(move |at| (step(a, at, a_dim), step(b, at, b_dim))))
            .collect();
    }
    Ok(product)
}

/// Dimension `i` of `rank` leading ones, counted from the end; 1 where there is none.
fn aligned(batch: &[i64], i: usize, rank: usize) -> i64 {
    (i + batch.len()).checked_sub(rank).map_or(1, |at| batch[at])
}

/// The last two dimensions, a vector being a row.
fn matrix(index: usize, dims: &[i64]) -> Result<[i64; 2], ContractError> {
    match dims {
        [] => Err(shape_error(index, "at least one dimension".to_owned(), dims)),
        [only] => Ok([1, *only]),
        [.., rows, columns] => Ok([*rows, *columns]),
    }
}

/// n and k of B.
fn column_matrix(b: &[i64], transpose_b: bool) -> Result<[i64; 2], ContractError> {
    let [first, second] = matrix(operand::B, b)?;
    Ok(if transpose_b || b.len() == 1 { [first, second] } else { [second, first] })
}

fn shape_error(index: usize, expected: String, found: &[i64]) -> ContractError {
    let found = found.iter().copied().take(16).collect();
    ContractError::Shape { input: operand::NAMES[index], expected, found }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_are_those_of_matmul() {
        for (a, b, transpose_b, want) in [
            (&[2, 3][..], &[3, 4][..], false, &[2, 4][..]),
            (&[2, 3], &[4, 3], true, &[2, 4]),
            (&[3], &[3], false, &[]),
            (&[3], &[3], true, &[]),
            (&[3], &[3, 4], false, &[4]),
            (&[3], &[5, 3, 4], false, &[5, 4]),
            (&[5, 2, 3], &[3], false, &[5, 2]),
            (&[5, 2, 3], &[3], true, &[5, 2]),
            (&[7, 1, 2, 3], &[5, 3, 4], false, &[7, 5, 2, 4]),
            (&[1, 2, 3], &[6, 5, 3, 4], false, &[6, 5, 2, 4]),
            (&[0, 2, 3], &[1, 3, 4], false, &[0, 2, 4]),
            (&[-1, 2, 3], &[6, 3, 4], false, &[6, 2, 4]),
            (&[-1, -1, 3], &[1, -1, 4], false, &[-1, -1, 4]),
        ] {
            assert_eq!(product_dims(a, b, transpose_b).unwrap(), want, "{a:?} {b:?} {transpose_b}");
        }
        for (a, b, transpose_b) in [
            (&[2, 3][..], &[4, 3][..], false),
            (&[2, 3], &[3, 4], true),
            (&[], &[3], false),
            (&[3], &[], false),
            (&[2, 2, 3], &[3, 3, 4], false),
            (&[4], &[3], false),
        ] {
            let error = product_dims(a, b, transpose_b).unwrap_err();
            assert!(matches!(error, ContractError::Shape { .. }), "{a:?} {b:?}");
        }
    }

    #[test]
    fn pairs_follow_the_broadcast() {
        let of = |a: &[i64], b: &[i64]| product(a, b, false).unwrap();
        assert_eq!(of(&[3], &[3]), Product { m: 1, n: 1, k: 3, batches: vec![(0, 0)] });
        let rows = of(&[5, 7, 2, 3], &[1, 3, 4]);
        assert_eq!(rows, Product { m: 70, n: 4, k: 3, batches: vec![(0, 0)] });
        let pairs = of(&[2, 1, 2, 3], &[3, 3, 4]).batches;
        assert_eq!(pairs, [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]);
        let pairs = of(&[2, 3], &[2, 1, 3, 4]).batches;
        assert_eq!(pairs, [(0, 0), (0, 1)]);
        let pairs = of(&[2, 2, 2, 3], &[2, 2, 3, 4]).batches;
        assert_eq!(pairs, [(0, 0), (1, 1), (2, 2), (3, 3)]);
        assert!(of(&[0, 2, 3], &[1, 3, 4]).batches.is_empty());
        assert!(product(&[2, 0], &[0, 4], false).is_err());
        assert!(product(&[i64::MAX, 2, 3], &[i64::MAX, 3, 4], false).is_err());
    }
}
