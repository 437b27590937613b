//! Keyword arguments to [`RewriteOptions`].

use std::path::PathBuf;

use mx_kernels::{ElementFormat, Rounding, ScaleRule};
use mxrewrite::rewrite::{Activation, BaseDtype, Lowering, Recipe, RewriteOptions, Tier};
use pyo3::prelude::*;

use crate::error::Failure;

/// What `mxrewrite.plan` and `mxrewrite.rewrite` take; `None` = not given. The Python side fills in
/// every key.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub(crate) struct Options {
    tier: Option<String>,
    format: Option<String>,
    activation_format: Option<String>,
    /// A recipe's file, or a built-in recipe's name.
    recipe: Option<PathBuf>,
    /// A recipe as JSON text.
    recipe_json: Option<String>,
    lower: Option<String>,
    base_dtype: Option<String>,
    block_size: Option<usize>,
    rounding: Option<String>,
    scale_rule: Option<String>,
    include: Vec<String>,
    exclude: Vec<String>,
    checkpoint: Option<PathBuf>,
    attention: bool,
    allow_empty: bool,
    overwrite: bool,
    threads: Option<usize>,
    shard_size: Option<u64>,
    resume: bool,
}

impl Options {
    /// The library's form.
    pub(crate) fn resolve(&self) -> Result<RewriteOptions, Failure> {
        let recipe = self.recipe()?;
        let default = RewriteOptions::default();
        Ok(RewriteOptions {
            recipe,
            tier: named("tier", &self.tier)?.unwrap_or(default.tier),
            lowering: named("lower", &self.lower)?.unwrap_or(default.lowering),
            format: named("format", &self.format)?,
            activation: match self.activation_format.as_deref() {
                None => Activation::Same,
                Some("none") => Activation::None,
                Some(name) => Activation::Format(parse("activation_format", name)?),
            },
            block_size: self.block_size.unwrap_or(default.block_size),
            rounding: named("rounding", &self.rounding)?.unwrap_or(default.rounding),
            scale_rule: named("scale_rule", &self.scale_rule)?.unwrap_or(default.scale_rule),
            base_dtype: named("base_dtype", &self.base_dtype)?,
            include: self.include.clone(),
            exclude: self.exclude.clone(),
            attention: self.attention,
            checkpoint: self.checkpoint.clone(),
            allow_empty: self.allow_empty,
            overwrite: self.overwrite,
            threads: self.threads,
            shard_size: self.shard_size,
            resume: self.resume,
        })
    }

    /// The recipe, which says by itself what these options would.
    fn recipe(&self) -> Result<Option<Recipe>, Failure> {
        let recipe = match (&self.recipe, &self.recipe_json) {
            (Some(path), _) => Recipe::open(path)?,
            (None, Some(text)) => Recipe::from_text(text, "recipe")?,
            (None, None) => return Ok(None),
        };
        let beside = [
            ("tier", self.tier.is_some()),
            ("format", self.format.is_some()),
            ("activation_format", self.activation_format.is_some()),
            ("lower", self.lower.is_some()),
            ("block_size", self.block_size.is_some()),
            ("rounding", self.rounding.is_some()),
            ("scale_rule", self.scale_rule.is_some()),
            ("include", !self.include.is_empty()),
            ("attention", self.attention),
        ];
        match beside.iter().find(|(_, given)| *given) {
            Some((name, _)) => Err(Failure::usage(format!(
                "{name} does not go with recipe: the recipe says it itself"
            ))),
            None => Ok(Some(recipe)),
        }
    }
}

/// A value by its name, if one was given.
fn named<T: Named>(option: &str, name: &Option<String>) -> Result<Option<T>, Failure> {
    name.as_deref().map(|name| parse(option, name)).transpose()
}

pub(crate) fn parse<T: Named>(option: &str, name: &str) -> Result<T, Failure> {
    T::named(name).map_err(|error| Failure::usage(format!("{option}: {error}")))
}

/// What has names on the command line.
pub(crate) trait Named: Sized {
    fn named(name: &str) -> Result<Self, String>;
}

macro_rules! named {
    ($($type:ty),*) => {
        $(impl Named for $type {
            fn named(name: &str) -> Result<Self, String> {
                name.parse::<$type>().map_err(|error| error.to_string())
            }
        })*
    };
}
named!(Tier, Lowering, BaseDtype, ElementFormat, Rounding, ScaleRule);
