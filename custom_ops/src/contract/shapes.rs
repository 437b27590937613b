//! Shapes that follow from the attributes, and checks against them.

use mx_kernels::ScaleKind;

use super::{ContractError, MxMatMulAttrs, input};

/// The scales input that a scale kind calls for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScalesShape {
    /// No scales: the input is absent.
    Absent,
    /// uint8 `[n, ceil(k / block_size)]`, one E8M0 byte a block.
    Blocks([usize; 2]),
    /// float32 `[1]`, one factor for the whole weight.
    Tensor,
}

impl MxMatMulAttrs {
    /// Bytes of one packed row of the weight.
    pub fn row_bytes(&self) -> usize {
        self.weight().row_bytes(self.k())
    }

    /// Shape of the codes input, uint8.
    pub fn codes_shape(&self) -> [usize; 2] {
        [self.n(), self.row_bytes()]
    }

    /// Shape and type of the scales input.
    pub fn scales_shape(&self) -> ScalesShape {
        match self.weight().scale {
            ScaleKind::E8M0 => ScalesShape::Blocks([self.n(), self.weight().blocks(self.k())]),
            ScaleKind::Tensor => ScalesShape::Tensor,
            ScaleKind::None => ScalesShape::Absent,
        }
    }
}

/// Checks a shape against an expected one. A negative dimension is unknown and passes, so that the
/// same check serves model loading and computing; computed tensors have none.
///
/// # Errors
/// Another rank, or a known dimension that differs.
pub fn check_shape(
    name: &'static str,
    expected: &[usize],
    found: &[i64],
) -> Result<(), ContractError> {
    let same = expected.len() == found.len()
        && expected
            .iter()
            .zip(found)
            .all(|(&want, &have)| have < 0 || usize::try_from(have).is_ok_and(|have| have == want));
    if same {
        return Ok(());
    }
    Err(ContractError::Shape { input: name, expected: format!("{expected:?}"), found: cut(found) })
}

/// Checks that the last dimension of X is k; a negative one is unknown and passes.
///
/// # Errors
/// A scalar, or another last dimension.
pub fn check_x_shape(k: usize, found: &[i64]) -> Result<(), ContractError> {
    match found.last() {
        Some(&last) if last < 0 || usize::try_from(last).is_ok_and(|last| last == k) => Ok(()),
        _ => Err(ContractError::Shape {
            input: input::NAMES[input::X],
            expected: format!("[..., {k}] (attribute k)"),
            found: cut(found),
        }),
    }
}

/// Keeps messages short when a corrupt model lists thousands of dimensions.
fn cut(shape: &[i64]) -> Vec<i64> {
    shape.iter().copied().take(16).collect()
}
