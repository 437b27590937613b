//! Which Linear layers a rewrite takes.

use regex::Regex;
use serde::Serialize;

use super::{
    roles::{Family, family},
    sites::Role,
};

/// One rule of selection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Select {
    /// Feed-forward projections (the MLP list of the tiers), experts' included.
    Mlp,
    /// Attention projections (the attention list of the tiers).
    Attention,
    /// Every Linear but routers and the head.
    AllLinears,
    /// What a regular expression names (`--include`), routers and the head included.
    Named(String),
}

/// A regular expression that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("'{pattern}' is not a usable regular expression: {reason}")]
pub struct FilterError {
    /// The expression.
    pub pattern: String,
    /// What is wrong with it, in one line.
    pub reason: String,
}

/// Ordered rules, first match wins, and what is taken away again.
#[derive(Clone, Debug)]
pub struct Filter {
    rules: Vec<(Select, Option<Regex>)>,
    exclude: Vec<Regex>,
    /// How skip reasons call the selection (`tier a`).
    title: String,
}

/// What the filter looks at.
#[derive(Clone, Copy, Debug)]
pub struct Subject<'a> {
    /// Module path.
    pub path: Option<&'a str>,
    /// Role.
    pub role: Role,
    /// Node name.
    pub node: &'a str,
    /// Name of the weight.
    pub initializer: &'a str,
}

/// The filter's answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Take it by the rule of this index.
    Take(usize),
    /// Leave it, for this reason.
    Leave(String),
}

impl Filter {
    /// Compiles the rules; `title` is what skip reasons call them.
    ///
    /// # Errors
    /// [`FilterError`] for a regular expression that does not compile.
    pub fn new(title: &str, rules: &[Select], exclude: &[String]) -> Result<Self, FilterError> {
        let rules = rules
            .iter()
            .map(|select| {
                let regex = match select {
                    Select::Named(pattern) => Some(compile(pattern)?),
                    _ => None,
                };
                Ok((select.clone(), regex))
            })
            .collect::<Result<_, FilterError>>()?;
        let exclude = exclude.iter().map(|p| compile(p)).collect::<Result<_, _>>()?;
        Ok(Self { rules, exclude, title: title.to_owned() })
    }

    /// Takes or leaves one Linear.
    pub fn decide(&self, subject: &Subject<'_>) -> Decision {
        let taken = self.rules.iter().position(|(select, regex)| match (select, regex) {
            (Select::Named(_), Some(regex)) => names(regex, subject),
            (select, _) => matches(select, subject),
        });
        let Some(rule) = taken else { return Decision::Leave(self.reason(subject)) };
        match self.exclude.iter().find(|regex| finds(regex, subject)) {
            Some(regex) => Decision::Leave(format!("excluded by --exclude '{regex}'")),
            None => Decision::Take(rule),
        }
    }

    fn reason(&self, subject: &Subject<'_>) -> String {
        match (subject.role, subject.path) {
            (Role::Head, _) => "the head: taken only when named (--include lm_head)".to_owned(),
            (Role::Router, _) => {
                "a mixture-of-experts router: taken only when named (--include)".to_owned()
            }
            (Role::Packed, _) => format!(
                "several layers packed into one product ('{}', a Split follows) under a made-up \
                 name, and one of them may be a router: taken only when named (--include {0})",
                subject.initializer
            ),
            (_, None) => format!(
                "not in {}: no metadata, initializer, node or bias name says which layer it is \
                 (name it with --include, or use --all-linears)",
                self.title
            ),
            (role, Some(path)) => format!("not in {}: {path} ({role})", self.title),
        }
    }
}

fn compile(pattern: &str) -> Result<Regex, FilterError> {
    Regex::new(pattern).map_err(|error| FilterError {
        pattern: pattern.to_owned(),
        // The crate's message is a drawing of several lines; its last line is the cause.
        reason: error
            .to_string()
            .lines()
            .rev()
            .map(|line| line.trim().trim_start_matches("error: ").to_owned())
            .find(|line| !line.is_empty())
            .unwrap_or_default(),
    })
}

fn matches(select: &Select, subject: &Subject<'_>) -> bool {
    if matches!(subject.role, Role::Head | Role::Router | Role::Packed) {
        return false;
    }
    let family = subject.path.and_then(family);
    match select {
        Select::Mlp => family == Some(Family::Mlp),
        Select::Attention => family == Some(Family::Attention),
        Select::AllLinears => true,
        Select::Named(_) => false,
    }
}

/// The texts that a pattern is searched in: the module path, else the node's and the weight's name.
/// The head answers to its usual names whatever it is called.
fn texts<'a>(subject: &Subject<'a>) -> impl Iterator<Item = &'a str> {
    let (first, second) = match subject.path {
        Some(path) => (path, None),
        None => (subject.node, Some(subject.initializer)),
    };
    let aliases: &[&str] = if subject.role == Role::Head { &["lm_head", "embed_out"] } else { &[] };
    std::iter::once(first).chain(second).chain(aliases.iter().copied())
}

fn finds(regex: &Regex, subject: &Subject<'_>) -> bool {
    texts(subject).any(|text| regex.is_match(text))
}

/// Like [`finds`], but a router has to be named itself: `--include mlp` finds the `mlp` in
/// `mlp.gate`, which nobody means by it.
fn names(regex: &Regex, subject: &Subject<'_>) -> bool {
    match (subject.role, subject.path) {
        (Role::Router, Some(path)) => {
            let own = path.rfind('.').map_or(0, |dot| dot + 1);
            regex.find_iter(path).any(|found| found.end() > own)
        }
        _ => finds(regex, subject),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subject<'a>(path: Option<&'a str>, role: Role) -> Subject<'a> {
        Subject { path, role, node: "node_linear_3", initializer: "val_12" }
    }

    #[test]
    fn include_adds_and_exclude_takes_away() {
        let rules = [Select::Mlp, Select::Named("lm_head".into())];
        let filter = Filter::new("tier a", &rules, &[r"layers\.0\.".into()]).unwrap();
        let decide = |path, role| filter.decide(&subject(path, role));
        assert_eq!(decide(Some("layers.1.mlp.up_proj"), Role::Mlp), Decision::Take(0));
        assert_eq!(decide(Some("embed_out"), Role::Head), Decision::Take(1));
        assert_eq!(decide(None, Role::Head), Decision::Take(1));
        assert_eq!(
            decide(Some("layers.0.mlp.up_proj"), Role::Mlp),
            Decision::Leave(r"excluded by --exclude 'layers\.0\.'".into())
        );
        assert!(matches!(decide(Some("layers.1.self_attn.q_proj"), Role::Attention),
            Decision::Leave(why) if why.contains("tier a") && why.contains("attention")));
        assert!(
            matches!(decide(None, Role::Other), Decision::Leave(why) if why.contains("--include"))
        );
    }

    #[test]
    fn nameless_layers_are_found_by_node_or_initializer() {
        for pattern in ["linear_3$", "val_12"] {
            let filter = Filter::new("tier a", &[Select::Named(pattern.into())], &[]).unwrap();
            assert_eq!(filter.decide(&subject(None, Role::Other)), Decision::Take(0));
            // A known path is the only text searched.
            let known = subject(Some("layers.0.fc1"), Role::Mlp);
            assert!(matches!(filter.decide(&known), Decision::Leave(_)));
        }
    }

    #[test]
    fn a_router_has_to_be_named_itself() {
        let router = subject(Some("layers.0.mlp.gate"), Role::Router);
        for (pattern, taken) in
            [("mlp", false), ("layers", false), (r"mlp\.gate$", true), (".*", true)]
        {
            let rules = [Select::AllLinears, Select::Named(pattern.into())];
            let filter = Filter::new("all-linears", &rules, &[]).unwrap();
            assert_eq!(filter.decide(&router) == Decision::Take(1), taken, "{pattern}");
        }
    }

    #[test]
    fn a_bad_expression_is_named() {
        let error = Filter::new("tier a", &[], &["(".into()]).unwrap_err();
        assert!(error.to_string().contains("'('"), "{error}");
        assert!(!error.to_string().contains('\n'));
    }
}
