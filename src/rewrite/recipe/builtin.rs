//! The recipes that need no file: the tiers, in the formats that the options choose, and the usual
//! pairs of weight and activation format.

use mx_kernels::ElementFormat;

use super::{Activation, Numbers, Recipe, RecipeError, RewriteOptions, Rule, SiteFormat};
use crate::rewrite::{filter::Select, lowering::Lowering, tiers::Tier};

/// Names of the built-in recipes and the tier and formats that each stands for.
pub const BUILT_IN: [(&str, Tier, Option<ElementFormat>, Activation); 10] = {
    use ElementFormat::{Fp4E2M1, Fp6E2M3, Fp8E4M3};
    const FP8: Activation = Activation::Format(Fp8E4M3);
    [
        ("tier-a", Tier::A, None, Activation::Same),
        ("tier-b", Tier::B, None, Activation::Same),
        ("tier-c", Tier::C, None, Activation::Same),
        ("tier-d", Tier::D, None, Activation::Same),
        ("full", Tier::Full, None, Activation::Same),
        ("all-linears", Tier::AllLinears, None, Activation::Same),
        ("mlp-only", Tier::MlpOnly, None, Activation::Same),
        ("w4a8", Tier::Full, Some(Fp4E2M1), FP8),
        ("w6a8", Tier::Full, Some(Fp6E2M3), FP8),
        ("w4a16", Tier::Full, Some(Fp4E2M1), Activation::None),
    ]
};

impl Recipe {
    /// The recipe that the options describe.
    ///
    /// # Errors
    /// [`RecipeError`] when they contradict each other.
    pub fn new(options: &RewriteOptions) -> Result<Self, RecipeError> {
        check_conflicts(options)?;
        if let Some(recipe) = &options.recipe {
            let mut recipe = recipe.clone();
            recipe.exclude.extend(options.exclude.iter().cloned());
            recipe.base_dtype = options.base_dtype.or(recipe.base_dtype);
            if recipe.import && options.checkpoint.is_none() {
                return Err(RecipeError::NoCheckpoint { name: recipe.name });
            }
            recipe.import = options.checkpoint.is_some();
            return Ok(recipe);
        }
        Ok(Self {
            name: options.tier.title(),
            lowering: options.lowering,
            base_dtype: options.base_dtype,
            import: options.checkpoint.is_some(),
            packed: takes_packed(options),
            rules: tier_rules(options)?,
            exclude: options.exclude.clone(),
        })
    }

    /// The built-in recipe of this name ([`BUILT_IN`]), if there is one.
    ///
    /// # Errors
    /// As [`Self::new`]; none for the recipes that exist.
    pub fn built_in(name: &str) -> Result<Option<Self>, RecipeError> {
        Self::built_in_with(name, &RewriteOptions::default())
    }

    /// The same under options, whose tier it replaces, and whose formats win over its own.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn built_in_with(
        name: &str,
        options: &RewriteOptions,
    ) -> Result<Option<Self>, RecipeError> {
        let found = BUILT_IN.into_iter().find(|(known, ..)| name.eq_ignore_ascii_case(known));
        let Some((name, tier, format, activation)) = found else { return Ok(None) };
        let own_activation = options.activation == Activation::Same;
        let mut recipe = Self::new(&RewriteOptions {
            tier,
            format: options.format.or(format),
            activation: if own_activation { activation } else { options.activation },
            ..options.clone()
        })?;
        if format.is_some() && options.format.is_none() && own_activation {
            name.clone_into(&mut recipe.name);
        }
        Ok(Some(recipe))
    }
}

/// Packed weights are taken as they are unless the options ask for a format.
fn takes_packed(options: &RewriteOptions) -> bool {
    let default = RewriteOptions::default();
    let asks = options.format.is_some()
        || options.tier.has_fixed_formats()
        || options.block_size != default.block_size;
    options.checkpoint.is_some() && options.lowering.takes_formats() && !asks
}

fn tier_rules(options: &RewriteOptions) -> Result<Vec<Rule>, RecipeError> {
    let format = |weight| -> Result<SiteFormat, RecipeError> {
        let RewriteOptions { activation, block_size, rounding, scale_rule, .. } = *options;
        let numbers = Numbers { weight, activation, block_size, rounding, scale_rule };
        let format = numbers.format(options.lowering)?;
        format.check(options.lowering).map_err(|refusal| RecipeError::Conflict {
            option: match refusal.key {
                "rounding" => "--rounding",
                "activation_format" => "--activation-format",
                _ => "--format",
            },
            with: format!("--lower {}", options.lowering),
            why: refusal.why,
        })?;
        Ok(format)
    };
    let chosen = options.format.unwrap_or(ElementFormat::Fp8E4M3);
    // Layers named beyond the tier get the finer of its two formats.
    let (mlp, attention, named) = match options.tier {
        Tier::C => (ElementFormat::Fp6E3M2, ElementFormat::Fp8E4M3, ElementFormat::Fp8E4M3),
        Tier::D => (ElementFormat::Fp4E2M1, ElementFormat::Fp6E3M2, ElementFormat::Fp6E3M2),
        _ => (chosen, chosen, chosen),
    };
    let mut rules = match options.tier {
        // The type is the whole graph's, whatever the tier says.
        _ if options.lowering.is_whole_graph() => {
            vec![
                rule(Select::default(), format(chosen)?),
                rule(Select::named(".*"), format(chosen)?),
            ]
        }
        Tier::A | Tier::MlpOnly => vec![rule(Select::mlp(), format(mlp)?)],
        Tier::AllLinears => vec![rule(Select::default(), format(chosen)?)],
        _ => vec![rule(Select::mlp(), format(mlp)?), rule(Select::attention(), format(attention)?)],
    };
    for pattern in &options.include {
        rules.push(rule(Select::named(pattern), format(named)?));
    }
    if options.attention {
        let format = format(attention)?;
        if let Some(why) = format.why_not_products(options.lowering) {
            let with = "--attention".to_owned();
            let option = match options.lowering {
                Lowering::Mx => "--activation-format none",
                _ => "--lower",
            };
            return Err(RecipeError::Conflict { option, with, why });
        }
        rules.push(rule(Select::products(), format));
    }
    Ok(rules)
}

fn rule(select: Select, format: SiteFormat) -> Rule {
    Rule { select, format: Some(format) }
}

fn check_conflicts(options: &RewriteOptions) -> Result<(), RecipeError> {
    let conflict = |option, with, why| Err(RecipeError::Conflict { option, with, why });
    if options.recipe.is_some() {
        return check_beside_recipe(options);
    }
    let formats = [
        ("--format", options.format.is_some()),
        ("--activation-format", matches!(options.activation, Activation::Format(_))),
    ];
    for (option, given) in formats {
        if given && options.tier.has_fixed_formats() {
            return conflict(option, format!("tier {}", options.tier), "its formats are fixed");
        }
    }
    if let Some(why) = options.lowering.refuses(options.base_dtype) {
        return conflict("--base-dtype", format!("--lower {}", options.lowering), why);
    }
    if options.lowering.takes_formats() {
        return Ok(());
    }
    let given = options.format.is_some() || options.activation != Activation::Same;
    if given {
        let option = if options.format.is_some() { "--format" } else { "--activation-format" };
        return conflict(
            option,
            format!("--lower {}", options.lowering),
            "the lowering fixes its formats; only --lower mx and qdq have a choice",
        );
    }
    if options.tier.has_fixed_formats() && !options.lowering.is_whole_graph() {
        return conflict(
            "--lower",
            format!("tier {}", options.tier),
            "it is a mixture of MX formats; use tier a or b with other lowerings",
        );
    }
    Ok(())
}

/// Beside a recipe only what it does not say can be chosen: `exclude` and the base type.
fn check_beside_recipe(options: &RewriteOptions) -> Result<(), RecipeError> {
    let given = [
        ("--format", options.format.is_some()),
        ("--activation-format", options.activation != Activation::Same),
        ("--include", !options.include.is_empty()),
        ("--attention", options.attention),
        ("--lower", options.lowering != Lowering::default()),
    ];
    if let Some((option, _)) = given.into_iter().find(|(_, given)| *given) {
        let why = "the recipe says which layers become what; write a rule there";
        return Err(RecipeError::Conflict { option, with: "--recipe".to_owned(), why });
    }
    let lowering = options.recipe.as_ref().map_or(Lowering::default(), |recipe| recipe.lowering);
    match lowering.refuses(options.base_dtype) {
        Some(why) => Err(RecipeError::Conflict {
            option: "--base-dtype",
            with: format!("a recipe with lowering {lowering}"),
            why,
        }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rewrite::BaseDtype;
    use mx_kernels::Rounding;

    fn pair(rule: &Rule) -> (&'static str, &'static str) {
        rule.format.as_ref().map_or(("keep", "keep"), |f| (f.weight_name(), f.activation_name()))
    }

    fn formats(options: &RewriteOptions) -> Vec<(&'static str, &'static str)> {
        let recipe = Recipe::new(options).unwrap();
        recipe.rules.iter().map(pair).collect()
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
            (Lowering::Fp16, ("fp16", "fp16")),
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
        for base_dtype in BaseDtype::ALL.map(Some) {
            let lowering = Lowering::Qdq;
            let options = RewriteOptions { lowering, base_dtype, ..Default::default() };
            assert!(Recipe::new(&options).unwrap_err().to_string().contains("--lower fp16"));
        }
        let options = RewriteOptions { block_size: 20, ..Default::default() };
        assert!(matches!(Recipe::new(&options), Err(RecipeError::Format(_))));
    }

    #[test]
    fn qdq_takes_what_standard_operators_say() {
        let qdq = RewriteOptions { lowering: Lowering::Qdq, ..Default::default() };
        let refusal = |options: &RewriteOptions| Recipe::new(options).unwrap_err().to_string();
        let floor = RewriteOptions { rounding: Rounding::Floor, ..qdq.clone() };
        assert!(refusal(&floor).starts_with("--rounding does not"), "{}", refusal(&floor));
        let weights = RewriteOptions { activation: Activation::None, ..floor };
        assert!(Recipe::new(&weights).is_ok());
        let format = Some(ElementFormat::MxInt8);
        let int8 = RewriteOptions { format, ..qdq.clone() };
        assert!(refusal(&int8).starts_with("--format does not"), "{}", refusal(&int8));
        let activation = Activation::Format(ElementFormat::MxInt8);
        assert!(Recipe::new(&RewriteOptions { activation, ..qdq }).is_err());
    }

    #[test]
    fn built_in_recipes_exist_by_name() {
        for (name, tier, ..) in BUILT_IN {
            let recipe = Recipe::built_in(name).unwrap().unwrap();
            assert!(recipe.name == tier.title() || recipe.name == name, "{name}");
        }
        let w4a8 = Recipe::built_in("W4A8").unwrap().unwrap();
        assert_eq!(pair(&w4a8.rules[0]), ("fp4_e2m1", "fp8_e4m3"));
        assert_eq!(Recipe::built_in("tier-e").unwrap(), None);
    }

    #[test]
    fn beside_a_recipe_only_what_it_does_not_say_can_be_chosen() {
        let recipe = Recipe::built_in("tier-d").unwrap();
        let beside = RewriteOptions {
            recipe: recipe.clone(),
            exclude: vec!["x".into()],
            base_dtype: Some(BaseDtype::F16),
            ..Default::default()
        };
        let made = Recipe::new(&beside).unwrap();
        assert_eq!((made.exclude.len(), made.base_dtype), (1, Some(BaseDtype::F16)));
        assert_eq!(made.rules, recipe.unwrap().rules);
        let include = RewriteOptions { include: vec!["x".into()], ..beside.clone() };
        assert!(Recipe::new(&include).unwrap_err().to_string().contains("--include"));
        let lowering = RewriteOptions { lowering: Lowering::Int8, ..beside };
        assert!(Recipe::new(&lowering).unwrap_err().to_string().contains("--lower"));
    }
}
