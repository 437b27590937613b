//! A choice of formats as a recipe that mxrewrite takes.

use crate::eval::error::{Error, Result};
use crate::eval::sensitivity::result::{Sensitivity, SiteSensitivity};
use crate::rewrite::layers::layer_number;
use crate::rewrite::{Lowering, Recipe, RewriteOptions, Rule, Select, SiteFormat, plan_file};
use mx_kernels::{ElementFormat, QuantSpec, Rounding, ScaleKind, ScaleRule};
use std::collections::BTreeMap;
use std::path::Path;

/// A layer that stays as it is.
pub const NONE: &str = "none";

/// The format of each site, by name, in the order of the sensitivity's sites.
pub(crate) type Assignment = Vec<String>;

/// The text by which a rule finds a site.
pub(crate) fn subject(site: &SiteSensitivity) -> &str {
    site.module_path.as_deref().unwrap_or(&site.node)
}

/// The recipe that gives every site its format; a rule a format.
///
/// # Errors
/// A name in the measurement that is no format, block size or rounding.
pub(crate) fn recipe(
    sensitivity: &Sensitivity,
    assignment: &Assignment,
    name: &str,
) -> Result<Recipe> {
    let mut rules = Vec::new();
    for format in &sensitivity.formats {
        let chosen = sensitivity.sites.iter().zip(assignment).filter(|(_, own)| *own == format);
        let sites: Vec<&SiteSensitivity> = chosen.map(|(site, _)| site).collect();
        let Some(first) = sites.first() else { continue };
        let activation =
            first.formats.get(format).map_or("same", |one| one.activation_format.as_str());
        let include = patterns(&sites);
        let select = Select { include, ..Select::default() };
        let format = Some(site_format(sensitivity, format, activation)?);
        rules.push(Rule { select, format });
    }
    Ok(Recipe {
        name: name.to_owned(),
        lowering: Lowering::Mx,
        base_dtype: None,
        import: false,
        packed: false,
        rules,
        exclude: Vec::new(),
    })
}

fn site_format(sensitivity: &Sensitivity, weight: &str, activation: &str) -> Result<SiteFormat> {
    let bad = |what: &str, value: &str, why: String| {
        Error::Usage(format!("the measurement's {what} '{value}': {why}"))
    };
    let rounding: Rounding = sensitivity
        .rounding
        .parse()
        .map_err(|e| bad("rounding", &sensitivity.rounding, format!("{e}")))?;
    let rule: ScaleRule = sensitivity
        .scale_rule
        .parse()
        .map_err(|e| bad("scale_rule", &sensitivity.scale_rule, format!("{e}")))?;
    let spec = |name: &str| -> Result<QuantSpec> {
        let format: ElementFormat =
            name.parse().map_err(|e| bad("format", name, format!("{e}")))?;
        QuantSpec::new(format, ScaleKind::E8M0, sensitivity.block_size, rounding, rule)
            .map_err(|e| bad("format", name, format!("{e}")))
    };
    let activation = match activation {
        "none" => None,
        "same" => Some(spec(weight)?),
        name => Some(spec(name)?),
    };
    Ok(SiteFormat::Mx { weight: spec(weight)?, activation })
}

/// Expressions that find these sites and no others: whole paths, those that differ in the number of
/// their layer in one.
fn patterns(sites: &[&SiteSensitivity]) -> Vec<String> {
    let mut layers: BTreeMap<(String, String), Vec<usize>> = BTreeMap::new();
    let mut others = Vec::new();
    for site in sites {
        let path = site.module_path.as_deref();
        match path.and_then(split) {
            Some((before, layer, after)) => layers.entry((before, after)).or_default().push(layer),
            None => others.push(format!("^{}$", regex::escape(subject(site)))),
        }
    }
    let joined = layers.into_iter().map(|((before, after), mut numbers)| {
        numbers.sort_unstable();
        numbers.dedup();
        let numbers: Vec<String> = numbers.iter().map(usize::to_string).collect();
        let (before, after) = (regex::escape(&before), regex::escape(&after));
        match &numbers[..] {
            [one] => format!("^{before}{one}{after}$"),
            _ => format!("^{before}({}){after}$", numbers.join("|")),
        }
    });
    others.sort_unstable();
    others.dedup();
    joined.chain(others).collect()
}

/// A module path around the number of its layer.
fn split(path: &str) -> Option<(String, usize, String)> {
    let layer = layer_number(path)?;
    let mut at = 0;
    for part in path.split('.') {
        // `007` would not come back.
        if part == layer.to_string() {
            let after = path[at + part.len()..].to_owned();
            return Some((path[..at].to_owned(), layer, after));
        }
        at += part.len() + 1;
    }
    None
}

/// Checks that a recipe, read back from its text, does to the model what was chosen, site by site.
///
/// # Errors
/// It does not; the message names the first layer.
pub(crate) fn check(
    model: &Path,
    sensitivity: &Sensitivity,
    assignment: &Assignment,
    toml: &str,
) -> Result<()> {
    let recipe =
        Recipe::from_text(toml, "the recipe found").map_err(|e| Error::Rewrite(e.to_string()))?;
    let options =
        RewriteOptions { recipe: Some(recipe), allow_empty: true, ..RewriteOptions::default() };
    let (_, plan) = plan_file(model, &options).map_err(|e| Error::Rewrite(e.to_string()))?;
    let mut planned = plan.sites.iter().map(|planned| {
        let site = &planned.site;
        (site.node_name.as_str(), site.weight.initializer.as_str(), planned.format.weight_name())
    });
    let wanted = sensitivity.sites.iter().zip(assignment).filter(|(_, format)| *format != NONE);
    for (site, format) in wanted {
        let expected = (site.node.as_str(), site.initializer.as_str(), format.as_str());
        let found = planned.next();
        if found != Some(expected) {
            return Err(Error::Rewrite(format!(
                "the recipe does not do what was chosen: '{}' was to become {format}, but the plan \
                 has {}; the model is another one than was measured, or two layers share a name",
                site.shown(),
                found.map_or("nothing".to_owned(), |(node, _, format)| format!(
                    "{node} in {format}"
                ))
            )));
        }
    }
    match planned.next() {
        None => Ok(()),
        Some((node, _, format)) => Err(Error::Rewrite(format!(
            "the recipe does not do what was chosen: '{node}' becomes {format} and was to stay"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn site(path: Option<&str>, node: &str) -> SiteSensitivity {
        SiteSensitivity {
            site: path.unwrap_or(node).into(),
            node: node.into(),
            initializer: format!("{node}.w"),
            module_path: path.map(str::to_owned),
            layer: path.and_then(layer_number),
            role: "mlp".into(),
            n: 1,
            k: 32,
            weights: 32,
            input: "x".into(),
            bits_as_is: 32.0,
            bytes_as_is: 128,
            formats: BTreeMap::new(),
        }
    }

    #[test]
    fn layers_are_joined_and_nothing_else_is_found() {
        let sites = [
            site(Some("model.layers.10.mlp.up_proj"), "a"),
            site(Some("model.layers.1.mlp.up_proj"), "b"),
            site(Some("model.layers.1.mlp.down_proj"), "c"),
            site(Some("lm_head"), "d"),
            site(None, "/h.0/MatMul+1"),
        ];
        let found = patterns(&sites.iter().collect::<Vec<_>>());
        let expected = [
            r"^model\.layers\.1\.mlp\.down_proj$",
            r"^model\.layers\.(1|10)\.mlp\.up_proj$",
            r"^/h\.0/MatMul\+1$",
            "^lm_head$",
        ];
        assert_eq!(found, expected);
        let regex = regex::Regex::new(&found[1]).unwrap();
        assert!(regex.is_match("model.layers.10.mlp.up_proj"));
        assert!(!regex.is_match("model.layers.11.mlp.up_proj"));
        assert!(!regex.is_match("model.layers.1.mlp.up_proj.x"));
    }
}
