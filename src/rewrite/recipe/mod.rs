//! Recipes: ordered rules from a selection of layers to the format they are stored and computed in.
//! A tier is a built-in recipe.
//!
//! `read` makes one of TOML, of a plan's JSON or of a rewritten model; `print` writes TOML
//! and JSON that are read back as the same recipe.

mod builtin;
mod options;
mod print;
mod read;
mod tree;

use mx_kernels::{ElementFormat, QuantSpec, Rounding, ScaleKind, ScaleRule};

pub use builtin::BUILT_IN;
pub use options::{Activation, RewriteOptions};

use super::{
    filter::{Filter, FilterError, Select},
    lower::qdq,
    lowering::{BaseDtype, Lowering},
};

/// How one layer is stored and computed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum SiteFormat {
    /// MX: an `mx::MxMatMul` or, under [`Lowering::Qdq`], standard operators.
    Mx {
        /// The weight, [n, k] quantised along k.
        weight: QuantSpec,
        /// X, quantised along k in every run; `None` = as it is.
        activation: Option<QuantSpec>,
    },
    /// int8 weight, one scale an output channel, dequantised before the original node.
    Int8,
    /// Rounded to bfloat16 like everything else in the graph.
    Bf16,
    /// Converted to float16 like everything else in the graph.
    Fp16,
}

impl SiteFormat {
    /// Name of the weight's format.
    pub fn weight_name(&self) -> &'static str {
        match self {
            Self::Mx { weight, .. } => weight.format.name(),
            Self::Int8 => "int8",
            Self::Bf16 => "bf16",
            Self::Fp16 => "fp16",
        }
    }

    /// Name of the activation's format; `none` when it is not quantised.
    pub fn activation_name(&self) -> &'static str {
        match self {
            Self::Mx { activation, .. } => activation.map_or("none", |spec| spec.format.name()),
            Self::Int8 => "none",
            Self::Bf16 => "bf16",
            Self::Fp16 => "fp16",
        }
    }

    /// Why `lowering` cannot say it, with what to use instead.
    pub(super) fn check(&self, lowering: Lowering) -> Result<(), qdq::Refusal> {
        match (lowering, self) {
            (Lowering::Qdq, Self::Mx { weight, activation }) => {
                qdq::check(weight, activation.as_ref())
            }
            _ => Ok(()),
        }
    }

    /// Why products of two activations cannot have this format, if they cannot.
    pub(super) fn why_not_products(&self, lowering: Lowering) -> Option<&'static str> {
        match self {
            Self::Mx { .. } if lowering == Lowering::Qdq => {
                Some("it is for weights; only --lower mx has products of activations")
            }
            Self::Mx { activation: Some(spec), .. } if spec.scale != ScaleKind::Tensor => None,
            Self::Mx { activation: Some(_), .. } => {
                Some("products of activations take shared exponents or none, not a tensor's scale")
            }
            Self::Mx { activation: None, .. } => {
                Some("both operands of attention's products are activations")
            }
            Self::Int8 | Self::Bf16 | Self::Fp16 => Some("it leaves products of activations alone"),
        }
    }

    /// Elements that share an exponent, where exponents are shared.
    pub fn block_size(&self) -> Option<usize> {
        match self {
            Self::Mx { weight, .. } if weight.scale == ScaleKind::E8M0 => Some(weight.block_size),
            _ => None,
        }
    }
}

/// One rule: these layers, in this format.
#[derive(Clone, Debug, PartialEq)]
pub struct Rule {
    /// Which layers.
    pub select: Select,
    /// Their format; `None` = they are kept as they are.
    pub format: Option<SiteFormat>,
}

/// Ordered rules; the first that selects a layer decides its format.
#[derive(Clone, Debug, PartialEq)]
pub struct Recipe {
    /// What messages call it: the tier's name, or the one that its file says.
    pub name: String,
    /// What layers become.
    pub lowering: Lowering,
    /// Float type of everything else.
    pub base_dtype: Option<BaseDtype>,
    /// Needs a checkpoint: it names layers by their weights, and weights that it holds as MX codes of
    /// their rule's format are taken from it.
    pub import: bool,
    /// Weights that the checkpoint holds as MX codes are taken as they are, whatever format the rules
    /// say.
    pub packed: bool,
    /// The rules.
    pub rules: Vec<Rule>,
    /// Regular expressions of layers that no rule takes.
    pub exclude: Vec<String>,
}

/// Options that contradict each other.
#[derive(Debug, thiserror::Error)]
pub enum RecipeError {
    /// A format was chosen where the tier or lowering fixes it.
    #[error("{option} does not go with {with}: {why}")]
    Conflict {
        /// The option.
        option: &'static str,
        /// What it contradicts.
        with: String,
        /// Why.
        why: &'static str,
    },
    /// A recipe that needs a checkpoint, without one.
    #[error(
        "{name} needs a checkpoint, which names layers or holds their codes (checkpoint = \"required\" or \
         packed_weights = \"checkpoint\"): name it with --checkpoint, or take those lines out"
    )]
    NoCheckpoint {
        /// The recipe.
        name: String,
    },
    /// Something in a recipe file that is not understood.
    #[error("{place}: {what}")]
    Content {
        /// File and line.
        place: String,
        /// What is wrong, and what would be right.
        what: String,
    },
    /// A recipe file that cannot be read.
    #[error("--recipe '{path}': {reason}")]
    File {
        /// The file.
        path: String,
        /// Why not.
        reason: String,
    },
    /// A combination of format, block size and scale that does not exist.
    #[error(transparent)]
    Format(#[from] mx_kernels::Error),
}

impl Recipe {
    /// The recipe's selection.
    ///
    /// # Errors
    /// [`FilterError`] for a regular expression that does not compile.
    pub fn filter(&self) -> Result<Filter, FilterError> {
        Filter::new(&self.name, &self.rules, &self.exclude)
    }
}

/// What decides the format of a rule's layers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Numbers {
    weight: ElementFormat,
    activation: Activation,
    block_size: usize,
    rounding: Rounding,
    scale_rule: ScaleRule,
}

impl Default for Numbers {
    /// The defaults of the command line.
    fn default() -> Self {
        let RewriteOptions { activation, block_size, rounding, scale_rule, .. } =
            RewriteOptions::default();
        let weight = ElementFormat::Fp8E4M3;
        Self { weight, activation, block_size, rounding, scale_rule }
    }
}

impl Numbers {
    /// The format under `lowering`; all but those that take formats bring their own.
    fn format(&self, lowering: Lowering) -> Result<SiteFormat, mx_kernels::Error> {
        let spec = |format, scale| {
            QuantSpec::new(format, scale, self.block_size, self.rounding, self.scale_rule)
        };
        let both = |format, scale| -> Result<SiteFormat, mx_kernels::Error> {
            let spec = spec(format, scale)?;
            Ok(SiteFormat::Mx { weight: spec, activation: Some(spec) })
        };
        let unscaled = |format| both(format, ScaleKind::None);
        match lowering {
            Lowering::Int8 => Ok(SiteFormat::Int8),
            Lowering::Bf16 => Ok(SiteFormat::Bf16),
            Lowering::Fp16 => Ok(SiteFormat::Fp16),
            Lowering::Bfp16 => unscaled(ElementFormat::Bf16),
            Lowering::NvFp8EmuE4m3 => unscaled(ElementFormat::Fp8E4M3),
            Lowering::NvFp8EmuE5m2 => unscaled(ElementFormat::Fp8E5M2),
            Lowering::NvFp8 => both(ElementFormat::Fp8E4M3, ScaleKind::Tensor),
            Lowering::Mx | Lowering::Qdq => {
                let weight = spec(self.weight, ScaleKind::E8M0)?;
                let activation = match self.activation {
                    Activation::Same => Some(weight),
                    Activation::None => None,
                    Activation::Format(format) => Some(spec(format, ScaleKind::E8M0)?),
                };
                Ok(SiteFormat::Mx { weight, activation })
            }
        }
    }
}

#[cfg(test)]
mod tests;
