//! What a user asks of a rewrite.

use std::path::PathBuf;

use mx_kernels::{ElementFormat, Rounding, ScaleRule};

use super::Recipe;
use crate::rewrite::{
    lowering::{BaseDtype, Lowering},
    tiers::Tier,
};

/// What a user asks of a rewrite; [`Default`] is `mxrewrite MODEL`.
#[derive(Clone, Debug, PartialEq)]
pub struct RewriteOptions {
    /// Which layers in which formats, in place of a tier, formats and `include`.
    pub recipe: Option<Recipe>,
    /// Which layers.
    pub tier: Tier,
    /// What they become.
    pub lowering: Lowering,
    /// Element format of weights under [`Lowering::Mx`]. `None` = fp8_e4m3, or the tier's own.
    pub format: Option<ElementFormat>,
    /// Element format of activations under [`Lowering::Mx`].
    pub activation: Activation,
    /// Elements that share an exponent: 16, 32, 64, 128 or 256.
    pub block_size: usize,
    /// How elements are rounded.
    pub rounding: Rounding,
    /// How a block's exponent is chosen.
    pub scale_rule: ScaleRule,
    /// Float type of everything else; `None` = the model's own. Under [`Lowering::Bf16`],
    /// [`BaseDtype::Bf16`] converts the graph in place of rounding it, and [`BaseDtype::F32`] has it
    /// widened before it is rounded.
    pub base_dtype: Option<BaseDtype>,
    /// Regular expressions that add layers to the tier.
    pub include: Vec<String>,
    /// Regular expressions that take layers away.
    pub exclude: Vec<String>,
    /// Attention's products of two activations too, in the activations' format.
    pub attention: bool,
    /// Folder or file of safetensors in which the weights are looked up: module paths by content, and
    /// packed MX weights as they are.
    pub checkpoint: Option<PathBuf>,
    /// Finding nothing to replace is no error.
    pub allow_empty: bool,
    /// An existing output may be replaced.
    pub overwrite: bool,
    /// Threads to quantise with; `None` = all.
    pub threads: Option<usize>,
    /// External data is cut into files of at most so many bytes.
    pub shard_size: Option<u64>,
    /// Goes on with what a killed run has left.
    pub resume: bool,
}

impl Default for RewriteOptions {
    fn default() -> Self {
        Self {
            recipe: None,
            tier: Tier::default(),
            lowering: Lowering::default(),
            format: None,
            activation: Activation::default(),
            block_size: 32,
            rounding: Rounding::Even,
            scale_rule: ScaleRule::Floor,
            base_dtype: None,
            include: Vec::new(),
            exclude: Vec::new(),
            attention: false,
            checkpoint: None,
            allow_empty: false,
            overwrite: false,
            threads: None,
            shard_size: None,
            resume: false,
        }
    }
}

/// Format of activations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Activation {
    /// The weight's.
    #[default]
    Same,
    /// Not quantised: weight-only.
    None,
    /// This one.
    Format(ElementFormat),
}
