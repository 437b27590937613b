//! Recipes: ordered rules from a selection of layers to the format they are stored and computed in.
//! A tier is a built-in recipe.

use mx_kernels::{ElementFormat, QuantSpec, Rounding, ScaleKind, ScaleRule};
use serde::{Serialize, Serializer, ser::SerializeMap};

use super::{
    filter::{Filter, FilterError, Select},
    lowering::{BaseDtype, Lowering},
    tiers::Tier,
};

/// What a user asks of a rewrite; [`Default`] is `mxrewrite MODEL`.
#[derive(Clone, Debug, PartialEq)]
pub struct RewriteOptions {
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

/// How one layer is stored and computed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum SiteFormat {
    /// An `mx::MxMatMul`.
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
}

impl SiteFormat {
    /// Name of the weight's format.
    pub fn weight_name(&self) -> &'static str {
        match self {
            Self::Mx { weight, .. } => weight.format.name(),
            Self::Int8 => "int8",
            Self::Bf16 => "bf16",
        }
    }

    /// Name of the activation's format; `none` when it is not quantised.
    pub fn activation_name(&self) -> &'static str {
        match self {
            Self::Mx { activation, .. } => activation.map_or("none", |spec| spec.format.name()),
            Self::Int8 => "none",
            Self::Bf16 => "bf16",
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
    /// Their format.
    pub format: SiteFormat,
}

/// Ordered rules; the first that selects a layer decides its format.
#[derive(Clone, Debug, PartialEq)]
pub struct Recipe {
    /// Where it comes from: the tier's name.
    pub name: String,
    /// What layers become.
    pub lowering: Lowering,
    /// Float type of everything else.
    pub base_dtype: Option<BaseDtype>,
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
    /// A combination of format, block size and scale that does not exist.
    #[error(transparent)]
    Format(#[from] mx_kernels::Error),
}

impl Recipe {
    /// The recipe that the options describe.
    ///
    /// # Errors
    /// [`RecipeError`] when they contradict each other.
    pub fn new(options: &RewriteOptions) -> Result<Self, RecipeError> {
        check_conflicts(options)?;
        let make = |format| site_format(options, format);
        let chosen = options.format.unwrap_or(ElementFormat::Fp8E4M3);
        // Layers named beyond the tier get the finer of its two formats.
        let (mlp, attention, named) = match options.tier {
            Tier::C => (ElementFormat::Fp6E3M2, ElementFormat::Fp8E4M3, ElementFormat::Fp8E4M3),
            Tier::D => (ElementFormat::Fp4E2M1, ElementFormat::Fp6E3M2, ElementFormat::Fp6E3M2),
            _ => (chosen, chosen, chosen),
        };
        let mut rules = match options.tier {
            // bfloat16 is the whole graph's, whatever the tier says.
            _ if options.lowering == Lowering::Bf16 => {
                vec![rule(Select::AllLinears, make(chosen)?), rule(named_all(), make(chosen)?)]
            }
            Tier::A | Tier::MlpOnly => vec![rule(Select::Mlp, make(mlp)?)],
            Tier::AllLinears => vec![rule(Select::AllLinears, make(chosen)?)],
            _ => vec![rule(Select::Mlp, make(mlp)?), rule(Select::Attention, make(attention)?)],
        };
        for pattern in &options.include {
            rules.push(rule(Select::Named(pattern.clone()), make(named)?));
        }
        Ok(Self {
            name: options.tier.title(),
            lowering: options.lowering,
            base_dtype: options.base_dtype,
            rules,
            exclude: options.exclude.clone(),
        })
    }

    /// The recipe's selection.
    ///
    /// # Errors
    /// [`FilterError`] for a regular expression that does not compile.
    pub fn filter(&self) -> Result<Filter, FilterError> {
        let rules: Vec<Select> = self.rules.iter().map(|rule| rule.select.clone()).collect();
        Filter::new(&self.name, &rules, &self.exclude)
    }
}

fn rule(select: Select, format: SiteFormat) -> Rule {
    Rule { select, format }
}

fn named_all() -> Select {
    Select::Named(".*".to_owned())
}

fn check_conflicts(options: &RewriteOptions) -> Result<(), RecipeError> {
    let conflict = |option, with, why| Err(RecipeError::Conflict { option, with, why });
    let formats = [
        ("--format", options.format.is_some()),
        ("--activation-format", matches!(options.activation, Activation::Format(_))),
    ];
    for (option, given) in formats {
        if given && options.tier.has_fixed_formats() {
            return conflict(option, format!("tier {}", options.tier), "its formats are fixed");
        }
    }
    if options.lowering == Lowering::Bf16 && options.base_dtype == Some(BaseDtype::F16) {
        return conflict("--base-dtype", "--lower bf16".to_owned(), "the whole graph is bfloat16");
    }
    if options.lowering == Lowering::Mx {
        return Ok(());
    }
    let given = options.format.is_some() || options.activation != Activation::Same;
    if given {
        let option = if options.format.is_some() { "--format" } else { "--activation-format" };
        return conflict(
            option,
            format!("--lower {}", options.lowering),
            "the lowering fixes its formats; only --lower mx has a choice",
        );
    }
    if options.tier.has_fixed_formats() && options.lowering != Lowering::Bf16 {
        return conflict(
            "--lower",
            format!("tier {}", options.tier),
            "it is a mixture of MX formats; use tier a or b with other lowerings",
        );
    }
    Ok(())
}

fn site_format(options: &RewriteOptions, format: ElementFormat) -> Result<SiteFormat, RecipeError> {
    let spec = |format, scale| {
        QuantSpec::new(format, scale, options.block_size, options.rounding, options.scale_rule)
    };
    let both = |format, scale| -> Result<SiteFormat, RecipeError> {
        let spec = spec(format, scale)?;
        Ok(SiteFormat::Mx { weight: spec, activation: Some(spec) })
    };
    let unscaled = |format| both(format, ScaleKind::None);
    match options.lowering {
        Lowering::Int8 => Ok(SiteFormat::Int8),
        Lowering::Bf16 => Ok(SiteFormat::Bf16),
        Lowering::Bfp16 => unscaled(ElementFormat::Bf16),
        Lowering::NvFp8EmuE4m3 => unscaled(ElementFormat::Fp8E4M3),
        Lowering::NvFp8EmuE5m2 => unscaled(ElementFormat::Fp8E5M2),
        Lowering::NvFp8 => both(ElementFormat::Fp8E4M3, ScaleKind::Tensor),
        Lowering::Mx => {
            let weight = spec(format, ScaleKind::E8M0)?;
            let activation = match options.activation {
                Activation::Same => Some(weight),
                Activation::None => None,
                Activation::Format(format) => Some(spec(format, ScaleKind::E8M0)?),
            };
            Ok(SiteFormat::Mx { weight, activation })
        }
    }
}

impl Serialize for Recipe {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("name", &self.name)?;
        map.serialize_entry("lowering", &self.lowering)?;
        if let Some(base) = self.base_dtype {
            map.serialize_entry("base_dtype", &base)?;
        }
        map.serialize_entry("rules", &self.rules)?;
        map.serialize_entry("exclude", &self.exclude)?;
        map.end()
    }
}

impl Serialize for Rule {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("select", &self.select)?;
        map.serialize_entry("weight_format", self.format.weight_name())?;
        map.serialize_entry("activation_format", self.format.activation_name())?;
        if let SiteFormat::Mx { weight, .. } = &self.format {
            map.serialize_entry("scale", weight.scale.name())?;
            map.serialize_entry("block_size", &weight.block_size)?;
            map.serialize_entry("rounding", weight.rounding.name())?;
            map.serialize_entry("scale_rule", weight.scale_rule.name())?;
        }
        map.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn formats(options: &RewriteOptions) -> Vec<(&'static str, &'static str)> {
        let recipe = Recipe::new(options).unwrap();
        recipe.rules.iter().map(|r| (r.format.weight_name(), r.format.activation_name())).collect()
    }

    #[test]
    fn tiers_are_recipes() {
        let tier = |tier| RewriteOptions { tier, ..Default::default() };
        let e4m3 = ("fp8_e4m3", "fp8_e4m3");
        assert_eq!(formats(&tier(Tier::A)), [e4m3]);
        assert_eq!(formats(&tier(Tier::Full)), [e4m3, e4m3]);
        assert_eq!(formats(&tier(Tier::C)), [("fp6_e3m2", "fp6_e3m2"), e4m3]);
        assert_eq!(formats(&tier(Tier::D)), [("fp4_e2m1", "fp4_e2m1"), ("fp6_e3m2", "fp6_e3m2")]);
        let mut d = tier(Tier::D);
        d.include.push("lm_head".into());
        d.activation = Activation::None;
        assert_eq!(formats(&d)[2], ("fp6_e3m2", "none"));
        let mut a = tier(Tier::A);
        a.format = Some(ElementFormat::Fp4E2M1);
        a.activation = Activation::Format(ElementFormat::MxInt8);
        assert_eq!(formats(&a), [("fp4_e2m1", "mxint8")]);
    }

    #[test]
    fn lowerings_fix_their_formats() {
        for (lowering, expected) in [
            (Lowering::Int8, ("int8", "none")),
            (Lowering::Bf16, ("bf16", "bf16")),
            (Lowering::Bfp16, ("bf16", "bf16")),
            (Lowering::NvFp8EmuE4m3, ("fp8_e4m3", "fp8_e4m3")),
            (Lowering::NvFp8EmuE5m2, ("fp8_e5m2", "fp8_e5m2")),
            (Lowering::NvFp8, ("fp8_e4m3", "fp8_e4m3")),
        ] {
            let mut options = RewriteOptions { lowering, ..Default::default() };
            assert_eq!(formats(&options)[0], expected);
            options.format = Some(ElementFormat::Fp4E2M1);
            assert!(matches!(Recipe::new(&options), Err(RecipeError::Conflict { .. })));
        }
    }

    #[test]
    fn contradictions_are_refused() {
        for tier in [Tier::C, Tier::D] {
            let format = Some(ElementFormat::Fp8E4M3);
            let options = RewriteOptions { tier, format, ..Default::default() };
            assert!(Recipe::new(&options).unwrap_err().to_string().contains("--format"));
            let options = RewriteOptions { tier, lowering: Lowering::Int8, ..Default::default() };
            assert!(Recipe::new(&options).is_err());
        }
        let options = RewriteOptions { format: Some(ElementFormat::Bf16), ..Default::default() };
        assert!(matches!(Recipe::new(&options), Err(RecipeError::Format(_))));
        let base_dtype = Some(BaseDtype::F16);
        let lowering = Lowering::Bf16;
        let options = RewriteOptions { lowering, base_dtype, ..Default::default() };
        assert!(Recipe::new(&options).unwrap_err().to_string().contains("--base-dtype"));
        let options = RewriteOptions { block_size: 20, ..Default::default() };
        assert!(matches!(Recipe::new(&options), Err(RecipeError::Format(_))));
    }
}
