//! The operator contract: what a node of domain `mx` looks like in a model.
//!
//! The rewriter writes nodes through this module and the operators read them back through it, so
//! names, attribute types and shapes exist once. Plain data: no ONNX Runtime type appears here.
//!
//! ```text
//! MxMatMul   X [..., k] (float32 | float16 | bfloat16)
//!            codes uint8 [n, row_bytes]
//!            scales uint8 [n, ceil(k / block_size)] (e8m0) | float32 [1] (tensor) | "" (none)
//!            bias [n], X's type, optional
//!         -> Y [..., n], X's type
//! MxActMatMul A [..., m, k], B [..., k, n] or [..., n, k] (transpose_b), one float type; both dynamic,
//!            both quantised along k by the same block size, scale, rounding and scale rule
//!         -> Y [..., m, n], broadcast and with vectors for matrices as MatMul has it
//! MxExpertMatMul X [..., m, k] or [k] (float32 | float16 | bfloat16)
//!            index int64 | int32 [i...], each in -experts..experts
//!            codes uint8 [experts, n, row_bytes]
//!            scales uint8 [experts, n, ceil(k / block_size)] (e8m0) | "" (none)
//!         -> Y, X's type: MatMul(X, W) with W [i..., k, n], the chosen experts' weights turned
//! TokenScores logits [b, s, v] (float32 | float16 | bfloat16), labels int64 [b, s] (-100 = masked),
//!            baseline logits, optional, like logits
//!         -> nll, entropy float32, top1 int64 [, kl, baseline_nll float32], all [b, s]
//! ```

mod act_matmul;
mod error;
mod expert_matmul;
mod names;
mod shapes;
#[cfg(test)]
mod tests;

use std::{borrow::Cow, fmt, str::FromStr};

use mx_kernels::{ElementFormat, QuantSpec};

pub use self::{
    act_matmul::{MxActMatMulAttrs, Product, product, product_dims},
    error::ContractError,
    expert_matmul::MxExpertMatMulAttrs,
    names::{attr, expert, input, op, operand, scores},
    shapes::{ScalesShape, check_shape, check_x_shape},
};

/// The operator domain of every operator of this library.
pub const DOMAIN: &str = "mx";
/// The version of [`DOMAIN`] to import in a model.
pub const DOMAIN_VERSION: i64 = 1;
/// The only weight layout so far: row-major, rows of `ceil(k / block) * block` packed codes.
pub const LAYOUT: i64 = 1;

/// Refuses a model that imports a later version of [`DOMAIN`] than [`DOMAIN_VERSION`]. ONNX Runtime
/// does not: it takes the operators of the last version it has.
///
/// # Errors
/// [`ContractError::Newer`] with both versions.
pub fn check_domain_version(found: i64) -> Result<(), ContractError> {
    if found <= DOMAIN_VERSION {
        return Ok(());
    }
    let what = "the opset version of domain mx";
    Err(ContractError::Newer { what, found, supported: DOMAIN_VERSION })
}

/// A label that [`op::TOKEN_SCORES`] leaves out: every output is 0 there.
pub const IGNORE_LABEL: i64 = -100;
/// Text of [`attr::ACTIVATION_FORMAT`] for a product whose X stays as it is (weight-only).
pub const NO_FORMAT: &str = "none";
/// The largest `k` and `n` that a node may name; keeps every product of sizes inside an `i64`.
pub const MAX_DIM: i64 = i32::MAX as i64;

/// One attribute's value, as far as this contract knows ONNX attribute types.
#[derive(Debug, Clone, PartialEq)]
pub enum AttributeValue {
    /// ONNX `INT`.
    Int(i64),
    /// ONNX `FLOAT`.
    Float(f32),
    /// ONNX `STRING`.
    Text(Cow<'static, str>),
    /// Any other attribute type (lists, tensors, graphs, text that is not UTF-8).
    Other,
}

impl AttributeValue {
    /// The ONNX name of the value's type.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Int(_) => "int",
            Self::Float(_) => "float",
            Self::Text(_) => "string",
            Self::Other => "another type",
        }
    }
}

/// Where attributes are read from: an ONNX node, or a node as ONNX Runtime presents it.
pub trait AttributeSource {
    /// The value of attribute `name`, `None` when the node has none of that name.
    fn attribute(&self, name: &str) -> Option<AttributeValue>;
}

/// Everything an `MxMatMul` node says about its product, validated.
///
/// `PartialEq` compares floats as numbers; both are finite by construction.
#[derive(Debug, Clone, PartialEq)]
pub struct MxMatMulAttrs {
    k: usize,
    n: usize,
    weight: QuantSpec,
    activation: Option<QuantSpec>,
    alpha: f32,
    beta: f32,
}

impl MxMatMulAttrs {
    /// Attributes of a product `[.., k] x [n, k]^T` whose weight is quantised as `weight`; X is
    /// quantised to `activation` with the weight's scale kind, block size and roundings, or stays
    /// as it is for `None`. alpha and beta are 1.
    ///
    /// # Errors
    /// k or n outside `1..=MAX_DIM`, an activation format that the scale kind excludes, packed
    /// sizes that do not fit into memory.
    pub fn new(
        n: usize,
        k: usize,
        weight: QuantSpec,
        activation: Option<ElementFormat>,
    ) -> Result<Self, ContractError> {
        let activation = activation
            .map(|format| {
                QuantSpec::new(
                    format,
                    weight.scale,
                    weight.block_size,
                    weight.rounding,
                    weight.scale_rule,
                )
            })
            .transpose()
            .map_err(|source| ContractError::Operand {
                attribute: attr::ACTIVATION_FORMAT,
                source,
            })?;
        let attrs = Self { k, n, weight, activation, alpha: 1.0, beta: 1.0 };
        attrs.validate_sizes()?;
        Ok(attrs)
    }

    /// The same product with other factors.
    ///
    /// # Errors
    /// A factor that is NaN or infinite.
    pub fn with_factors(mut self, alpha: f32, beta: f32) -> Result<Self, ContractError> {
        for (attribute, value) in [(attr::ALPHA, alpha), (attr::BETA, beta)] {
            if !value.is_finite() {
                return Err(ContractError::NotFinite { attribute, value });
            }
        }
        (self.alpha, self.beta) = (alpha, beta);
        Ok(self)
    }

    /// Reads and validates the attributes of a node. Only `alpha`, `beta`, `rounding`,
    /// `scale_rule`, `scale`, `block_size` and `layout` have defaults (1, 1, `even`, `floor`,
    /// `e8m0`, 32, 1); unknown attributes are ignored.
    ///
    /// # Errors
    /// Any attribute missing, of the wrong type or outside what it allows.
    pub fn read(source: &impl AttributeSource) -> Result<Self, ContractError> {
        let layout = int_or(source, attr::LAYOUT, LAYOUT)?;
        if layout > LAYOUT {
            return Err(ContractError::Newer {
                what: "attribute layout",
                found: layout,
                supported: LAYOUT,
            });
        }
        if layout != LAYOUT {
            return Err(ContractError::OutOfRange {
                attribute: attr::LAYOUT,
                value: layout,
                allowed: "1",
            });
        }
        let k = dimension(source, attr::K)?;
        let n = dimension(source, attr::N)?;
        let weight =
            quantisation(source, attr::WEIGHT_FORMAT, &text(source, attr::WEIGHT_FORMAT)?)?;
        let activation = text(source, attr::ACTIVATION_FORMAT)?;
        let activation = match activation.as_ref() {
            NO_FORMAT => None,
            name => Some(parse(attr::ACTIVATION_FORMAT, name)?),
        };
        Self::new(n, k, weight, activation)?
            .with_factors(float_or(source, attr::ALPHA, 1.0)?, float_or(source, attr::BETA, 1.0)?)
    }

    /// All attributes in a fixed order, ready to be written into a node.
    pub fn to_attributes(&self) -> Vec<(&'static str, AttributeValue)> {
        use AttributeValue::{Float, Int};
        let text = |value: &'static str| AttributeValue::Text(Cow::Borrowed(value));
        let activation = self.activation.as_ref().map_or(NO_FORMAT, |spec| spec.format.name());
        vec![
            (attr::K, Int(self.k as i64)),
            (attr::N, Int(self.n as i64)),
            (attr::WEIGHT_FORMAT, text(self.weight.format.name())),
            (attr::ACTIVATION_FORMAT, text(activation)),
            (attr::BLOCK_SIZE, Int(self.weight.block_size as i64)),
            (attr::SCALE, text(self.weight.scale.name())),
            (attr::ROUNDING, text(self.weight.rounding.name())),
            (attr::SCALE_RULE, text(self.weight.scale_rule.name())),
            (attr::ALPHA, Float(self.alpha)),
            (attr::BETA, Float(self.beta)),
            (attr::LAYOUT, Int(LAYOUT)),
        ]
    }

    /// Contraction length.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Output features, rows of the weight.
    pub fn n(&self) -> usize {
        self.n
    }

    /// How the weight is quantised.
    pub fn weight(&self) -> &QuantSpec {
        &self.weight
    }

    /// How X is quantised, `None` for weight-only.
    pub fn activation(&self) -> Option<&QuantSpec> {
        self.activation.as_ref()
    }

    /// Factor of the product.
    pub fn alpha(&self) -> f32 {
        self.alpha
    }

    /// Factor of the bias.
    pub fn beta(&self) -> f32 {
        self.beta
    }

    fn validate_sizes(&self) -> Result<(), ContractError> {
        for (attribute, value) in [(attr::K, self.k), (attr::N, self.n)] {
            if value == 0 || value as u64 > MAX_DIM as u64 {
                return Err(ContractError::OutOfRange {
                    attribute,
                    value: i64::try_from(value).unwrap_or(i64::MAX),
                    allowed: DIM_RANGE,
                });
            }
        }
        let row_bytes = self.weight.row_bytes(self.k);
        self.n
            .checked_mul(row_bytes)
            .filter(|&bytes| isize::try_from(bytes).is_ok())
            .map(|_| ())
            .ok_or(ContractError::TooLarge { n: self.n, row_bytes })
    }
}

/// The quantisation of the operand whose format is `format`, the value of attribute `name`; the other
/// attributes are shared by all operands of a node.
fn quantisation(
    source: &impl AttributeSource,
    name: &'static str,
    format: &str,
) -> Result<QuantSpec, ContractError> {
    let block_size = int_or(source, attr::BLOCK_SIZE, 32)?;
    let block_size = usize::try_from(block_size)
        .ok()
        .filter(|size| BLOCK_SIZES.contains(size))
        .ok_or(ContractError::OutOfRange {
            attribute: attr::BLOCK_SIZE,
            value: block_size,
            allowed: "16, 32, 64, 128 or 256",
        })?;
    let scale = parse(attr::SCALE, &text_or(source, attr::SCALE, "e8m0")?)?;
    let rounding = parse(attr::ROUNDING, &text_or(source, attr::ROUNDING, "even")?)?;
    let rule = parse(attr::SCALE_RULE, &text_or(source, attr::SCALE_RULE, "floor")?)?;
    let format = parse(name, format)?;
    QuantSpec::new(format, scale, block_size, rounding, rule)
        .map_err(|source| ContractError::Operand { attribute: name, source })
}

const BLOCK_SIZES: [usize; 5] = [16, 32, 64, 128, 256];
const DIM_RANGE: &str = "1 to 2147483647";

fn wrong_kind(name: &'static str, expected: &'static str, found: &AttributeValue) -> ContractError {
    ContractError::WrongKind { attribute: name, expected, found: found.kind() }
}

fn int_or(
    source: &impl AttributeSource,
    name: &'static str,
    default: i64,
) -> Result<i64, ContractError> {
    match source.attribute(name) {
        None => Ok(default),
        Some(AttributeValue::Int(value)) => Ok(value),
        Some(other) => Err(wrong_kind(name, "int", &other)),
    }
}

fn float_or(
    source: &impl AttributeSource,
    name: &'static str,
    default: f32,
) -> Result<f32, ContractError> {
    match source.attribute(name) {
        None => Ok(default),
        Some(AttributeValue::Float(value)) => Ok(value),
        Some(other) => Err(wrong_kind(name, "float", &other)),
    }
}

fn text(
    source: &impl AttributeSource,
    name: &'static str,
) -> Result<Cow<'static, str>, ContractError> {
    match source.attribute(name) {
        None => Err(ContractError::Missing { attribute: name, expected: "string" }),
        Some(AttributeValue::Text(value)) => Ok(value),
        Some(other) => Err(wrong_kind(name, "string", &other)),
    }
}

fn text_or(
    source: &impl AttributeSource,
    name: &'static str,
    default: &'static str,
) -> Result<Cow<'static, str>, ContractError> {
    match text(source, name) {
        Err(ContractError::Missing { .. }) => Ok(Cow::Borrowed(default)),
        found => found,
    }
}

fn dimension(source: &impl AttributeSource, name: &'static str) -> Result<usize, ContractError> {
    let value = match source.attribute(name) {
        None => return Err(ContractError::Missing { attribute: name, expected: "int" }),
        Some(AttributeValue::Int(value)) => value,
        Some(other) => return Err(wrong_kind(name, "int", &other)),
    };
    usize::try_from(value)
        .ok()
        .filter(|_| (1..=MAX_DIM).contains(&value))
        .ok_or(ContractError::OutOfRange { attribute: name, value, allowed: DIM_RANGE })
}

fn parse<T>(attribute: &'static str, value: &str) -> Result<T, ContractError>
where
    T: FromStr,
    T::Err: fmt::Display,
{
    value.parse().map_err(|cause: T::Err| ContractError::Text {
        attribute,
        value: value.chars().take(40).collect(),
        cause: cause.to_string().chars().take(300).collect(),
    })
}
