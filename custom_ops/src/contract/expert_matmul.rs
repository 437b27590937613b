//! `MxExpertMatMul`: attributes and shapes of a product with experts chosen at run time.

use mx_kernels::ScaleKind;

use super::{
    AttributeSource, AttributeValue, ContractError, DIM_RANGE, MAX_DIM, MxMatMulAttrs, Product,
    attr, check_shape, check_x_shape, dimension, expert, int_or, product, product_dims,
};

/// Everything an `MxExpertMatMul` node says about its product, validated.
#[derive(Debug, Clone, PartialEq)]
pub struct MxExpertMatMulAttrs {
    linear: MxMatMulAttrs,
    experts: usize,
    index_rank: Option<usize>,
}

impl MxExpertMatMulAttrs {
    /// Attributes of a product with `experts` weights that are each as `linear` says (its beta has
    /// no meaning), chosen by an index of rank `index_rank`, if that is known.
    ///
    /// # Errors
    /// `experts` outside `1..=MAX_DIM`, a scale `tensor`, packed sizes that do not fit into memory.
    pub fn new(
        linear: MxMatMulAttrs,
        experts: usize,
        index_rank: Option<usize>,
    ) -> Result<Self, ContractError> {
        if experts == 0 || experts as u64 > MAX_DIM as u64 {
            return Err(ContractError::OutOfRange {
                attribute: attr::EXPERTS,
                value: i64::try_from(experts).unwrap_or(i64::MAX),
                allowed: DIM_RANGE,
            });
        }
        if linear.weight().scale == ScaleKind::Tensor {
            return Err(ContractError::Text {
                attribute: attr::SCALE,
                value: linear.weight().scale.name().to_owned(),
                cause: "a stack of experts takes e8m0 or none".to_owned(),
            });
        }
        let (n, row_bytes) = (linear.n(), linear.row_bytes());
        let rows = experts.checked_mul(n);
        rows.and_then(|rows| rows.checked_mul(row_bytes))
            .filter(|&bytes| isize::try_from(bytes).is_ok())
            .ok_or(ContractError::TooLarge { n: rows.unwrap_or(usize::MAX), row_bytes })?;
        Ok(Self { linear, experts, index_rank })
    }

    /// Reads and validates the attributes of a node: those of `MxMatMul` but `beta`, `experts`, and
    /// `index_rank`, which may be absent or -1; unknown attributes are ignored.
    ///
    /// # Errors
    /// Any attribute missing, of the wrong type or outside what it allows.
    pub fn read(source: &impl AttributeSource) -> Result<Self, ContractError> {
        let linear = MxMatMulAttrs::read(source)?;
        let experts = dimension(source, attr::EXPERTS)?;
        let rank = int_or(source, attr::INDEX_RANK, -1)?;
        let index_rank = match rank {
            -1 => None,
            0..=MAX_RANK => usize::try_from(rank).ok(),
            value => {
                let (attribute, allowed) = (attr::INDEX_RANK, "-1 (unknown) to 62");
                return Err(ContractError::OutOfRange { attribute, value, allowed });
            }
        };
        Self::new(linear, experts, index_rank)
    }

    /// All attributes in a fixed order, ready to be written into a node.
    pub fn to_attributes(&self) -> Vec<(&'static str, AttributeValue)> {
        let mut list = self.linear.to_attributes();
        list.retain(|(name, _)| *name != attr::BETA);
        list.push((attr::EXPERTS, AttributeValue::Int(self.experts as i64)));
        list.push((
            attr::INDEX_RANK,
            AttributeValue::Int(self.index_rank.map_or(-1, |r| r as i64)),
        ));
        list
    }

    /// What each expert's product is.
    pub fn linear(&self) -> &MxMatMulAttrs {
        &self.linear
    }

    /// How many experts the stack holds.
    pub fn experts(&self) -> usize {
        self.experts
    }

    /// Rank of the index, where the node says it.
    pub fn index_rank(&self) -> Option<usize> {
        self.index_rank
    }

    /// Shape of the codes input, uint8.
    pub fn codes_shape(&self) -> [usize; 3] {
        [self.experts, self.linear.n(), self.linear.row_bytes()]
    }

    /// Shape of the scales input, uint8; `None` where there is none.
    pub fn scales_shape(&self) -> Option<[usize; 3]> {
        let blocks = self.linear.weight().blocks(self.linear.k());
        let scaled = self.linear.weight().scale == ScaleKind::E8M0;
        scaled.then(|| [self.experts, self.linear.n(), blocks])
    }

    /// Checks the shape of an input by its position; negative dimensions are unknown and pass.
    ///
    /// # Errors
    /// Another shape; scales that should be absent.
    pub fn check_input(&self, input: usize, found: &[i64]) -> Result<(), ContractError> {
        match input {
            expert::X => check_x_shape(self.linear.k(), found),
            expert::INDEX => self.check_index_rank(found),
            expert::CODES => check_shape(expert::NAMES[input], &self.codes_shape(), found),
            _ => match self.scales_shape() {
                Some(shape) => check_shape(expert::NAMES[input], &shape, found),
                None => Err(ContractError::UnexpectedInput {
                    input: expert::NAMES[expert::SCALES],
                    reason: "attribute scale is \"none\"",
                }),
            },
        }
    }

    fn check_index_rank(&self, found: &[i64]) -> Result<(), ContractError> {
        let rank = self.index_rank.unwrap_or(found.len());
        if rank == found.len() && rank as i64 <= MAX_RANK {
            return Ok(());
        }
        let expected = format!("rank {} (attribute index_rank)", rank.min(MAX_RANK as usize));
        Err(index_error(expected, found))
    }

    /// The shape of Y: that of MatMul(X, W) with W `[index..., k, n]`. Negative dimensions are unknown.
    ///
    /// # Errors
    /// X without dimension k, leading dimensions that do not broadcast with the index's.
    pub fn y_dims(&self, x: &[i64], index: &[i64]) -> Result<Vec<i64>, ContractError> {
        check_x_shape(self.linear.k(), x)?;
        self.check_index_rank(index)?;
        product_dims(x, &self.chosen_dims(index), true).map_err(|_| broadcast_error(x, index))
    }

    /// The products of matrices that Y is made of; `batches` are matrices of X and places of the index.
    ///
    /// # Errors
    /// As [`Self::y_dims`], and sizes that are unknown or overflow.
    pub fn product(&self, x: &[i64], index: &[i64]) -> Result<Product, ContractError> {
        self.y_dims(x, index)?;
        product(x, &self.chosen_dims(index), true)
    }

    /// Shape of the chosen weights, `[index..., n, k]`.
    pub fn chosen_dims(&self, index: &[i64]) -> Vec<i64> {
        [index, &[self.linear.n() as i64, self.linear.k() as i64]].concat()
    }

    /// Which expert an element of the index names; a negative one counts from the end, as Gather has
    /// it.
    ///
    /// # Errors
    /// One outside `[-experts, experts)`.
    pub fn expert(&self, place: usize, index: i64) -> Result<usize, ContractError> {
        let experts = self.experts as i64;
        let counted = if index < 0 { index.checked_add(experts) } else { Some(index) };
        counted
            .filter(|index| (0..experts).contains(index))
            .and_then(|index| usize::try_from(index).ok())
            .ok_or(ContractError::NoExpert { place, index, experts: self.experts })
    }
}

/// Highest rank of an index; the weights that it chooses have two dimensions more.
const MAX_RANK: i64 = 62;

fn index_error(expected: String, found: &[i64]) -> ContractError {
    let found = found.iter().copied().take(16).collect();
    ContractError::Shape { input: expert::NAMES[expert::INDEX], expected, found }
}

fn broadcast_error(x: &[i64], index: &[i64]) -> ContractError {
    let leading: Vec<i64> = x[..x.len().saturating_sub(2)].iter().copied().take(16).collect();
    index_error(
        format!("a shape that broadcasts with the leading dimensions {leading:?} of X"),
        index,
    )
}
