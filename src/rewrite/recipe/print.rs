//! Recipes as TOML, for people, and as JSON, in plans. The keys are the same, and
//! [`Recipe::from_text`] reads both back as the same recipe.

use serde::{Serialize, Serializer};

use super::{Recipe, Rule, SiteFormat};
use crate::rewrite::{
    layers::LayerRange,
    lowering::{BaseDtype, Lowering},
};

/// `weight_format` of a rule that leaves its layers as they are.
pub(super) const KEEP: &str = "keep";

/// `checkpoint` of a recipe that needs one.
pub(super) const REQUIRED: &str = "required";

/// `packed_weights` of a recipe that takes packed weights from a checkpoint.
pub(super) const IMPORT: &str = "checkpoint";

/// The file's form of a recipe, in the order of its keys.
#[derive(Serialize)]
struct Document<'a> {
    name: &'a str,
    lowering: Lowering,
    #[serde(skip_serializing_if = "Option::is_none")]
    base_dtype: Option<BaseDtype>,
    #[serde(skip_serializing_if = "Option::is_none")]
    checkpoint: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    packed_weights: Option<&'static str>,
    rules: Vec<Table<'a>>,
    exclude: &'a [String],
}

#[derive(Default, Serialize)]
struct Table<'a> {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    role: Vec<&'a str>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    layers: Vec<String>,
    #[serde(skip_serializing_if = "<[String]>::is_empty")]
    include: &'a [String],
    #[serde(skip_serializing_if = "<[String]>::is_empty")]
    exclude: &'a [String],
    weight_format: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    activation_format: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    block_size: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rounding: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    scale_rule: Option<&'a str>,
}

impl<'a> Table<'a> {
    fn new(rule: &'a Rule) -> Self {
        let select = &rule.select;
        let mut table = Self {
            role: select.roles.iter().map(|role| role.name()).collect(),
            layers: select.layers.iter().map(LayerRange::to_string).collect(),
            include: &select.include,
            exclude: &select.exclude,
            weight_format: KEEP,
            ..Self::default()
        };
        if let Some(format) = &rule.format {
            table.weight_format = format.weight_name();
            table.activation_format = Some(format.activation_name());
        }
        if let Some(SiteFormat::Mx { weight, .. }) = &rule.format {
            table.block_size = Some(weight.block_size);
            table.rounding = Some(weight.rounding.name());
            table.scale_rule = Some(weight.scale_rule.name());
        }
        table
    }

    fn to_toml(&self) -> String {
        let mut text = "\n[[rules]]\n".to_owned();
        let lists: [(&str, Vec<&str>); 4] = [
            ("role", self.role.clone()),
            ("layers", self.layers.iter().map(String::as_str).collect()),
            ("include", self.include.iter().map(String::as_str).collect()),
            ("exclude", self.exclude.iter().map(String::as_str).collect()),
        ];
        for (key, values) in lists.iter().filter(|(_, values)| !values.is_empty()) {
            text.push_str(&format!("{key} = {}\n", list(values)));
        }
        let names = [
            ("weight_format", Some(self.weight_format)),
            ("activation_format", self.activation_format),
            ("rounding", self.rounding),
            ("scale_rule", self.scale_rule),
        ];
        for (key, value) in names {
            if let Some(value) = value {
                text.push_str(&format!("{key} = {}\n", quoted(value)));
            }
        }
        if let Some(block_size) = self.block_size {
            text.push_str(&format!("block_size = {block_size}\n"));
        }
        text
    }
}

impl Recipe {
    /// The recipe as a TOML file.
    pub fn to_toml(&self) -> String {
        let mut text = format!(
            "# Ordered rules: the first that matches a layer decides. See docs/recipes.md.\n\
             name = {}\nlowering = {}\n",
            quoted(&self.name),
            quoted(self.lowering.name())
        );
        if let Some(base) = self.base_dtype {
            text.push_str(&format!("base_dtype = {}\n", quoted(base.name())));
        }
        if self.import {
            text.push_str(&format!("checkpoint = {}\n", quoted(REQUIRED)));
        }
        if self.packed {
            text.push_str(&format!("packed_weights = {}\n", quoted(IMPORT)));
        }
        if !self.exclude.is_empty() {
            let exclude: Vec<&str> = self.exclude.iter().map(String::as_str).collect();
            text.push_str(&format!("exclude = {}\n", list(&exclude)));
        }
        for rule in &self.rules {
            text.push_str(&Table::new(rule).to_toml());
        }
        text
    }
}

impl Serialize for Recipe {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Document {
            name: &self.name,
            lowering: self.lowering,
            base_dtype: self.base_dtype,
            checkpoint: self.import.then_some(REQUIRED),
            packed_weights: self.packed.then_some(IMPORT),
            rules: self.rules.iter().map(Table::new).collect(),
            exclude: &self.exclude,
        }
        .serialize(serializer)
    }
}

fn list(values: &[&str]) -> String {
    let values: Vec<String> = values.iter().map(|value| quoted(value)).collect();
    format!("[{}]", values.join(", "))
}

/// A TOML string: literal, so that regular expressions stay as they are, wherever that is possible.
fn quoted(text: &str) -> String {
    let plain = !text.contains(['\\', '"']) && !text.contains(char::is_control);
    if plain {
        return format!("\"{text}\"");
    }
    if !text.contains('\'') && !text.contains(char::is_control) {
        return format!("'{text}'");
    }
    let mut out = "\"".to_owned();
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            c if c.is_control() => out.push_str(&format!("\\u{:04X}", u32::from(c))),
            c => out.push(c),
        }
    }
    out + "\""
}
