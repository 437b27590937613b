//! Which Linear layers a rewrite takes.

use regex::Regex;

use super::{
    layers::{LayerRange, layer_number},
    recipe::{Rule, SiteFormat},
    sites::Role,
};

/// Which layers a rule is for: those that everything here agrees on. Nothing said = every Linear but
/// routers and the head.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Select {
    /// Of one of these roles; empty = of any, but routers and the head only when included by name.
    pub roles: Vec<Role>,
    /// In one of these layers; empty = in any.
    pub layers: Vec<LayerRange>,
    /// Found by one of these regular expressions; empty = all.
    pub include: Vec<String>,
    /// Not found by any of these.
    pub exclude: Vec<String>,
}

impl Select {
    /// Feed-forward projections (the MLP list of the tiers), experts' included.
    pub fn mlp() -> Self {
        Self { roles: vec![Role::Mlp, Role::Expert], ..Self::default() }
    }

    /// Attention projections (the attention list of the tiers).
    pub fn attention() -> Self {
        Self { roles: vec![Role::Attention], ..Self::default() }
    }

    /// Attention's products of two activations (`--attention`).
    pub fn products() -> Self {
        Self { roles: vec![Role::Product], ..Self::default() }
    }

    /// What a regular expression names (`--include`), routers and the head included.
    pub fn named(pattern: &str) -> Self {
        Self { include: vec![pattern.to_owned()], ..Self::default() }
    }

    /// Every Linear there is.
    pub fn everything() -> Self {
        Self { roles: Role::ALL.to_vec(), ..Self::default() }
    }
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
    rules: Vec<Compiled>,
    exclude: Vec<Regex>,
    /// How skip reasons call the selection (`tier a`).
    title: String,
    /// Layers of the model, for ranges that count from the end.
    depth: Option<usize>,
}

/// A [`Rule`]'s selection with its expressions compiled.
#[derive(Clone, Debug)]
struct Compiled {
    roles: Vec<Role>,
    layers: Vec<LayerRange>,
    include: Vec<Regex>,
    exclude: Vec<Regex>,
    /// `None` for a rule that leaves its layers as they are.
    format: Option<SiteFormat>,
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
    pub fn new(title: &str, rules: &[Rule], exclude: &[String]) -> Result<Self, FilterError> {
        Ok(Self {
            rules: rules.iter().map(Compiled::new).collect::<Result<_, _>>()?,
            exclude: compile_all(exclude)?,
            title: title.to_owned(),
            depth: None,
        })
    }

    /// True when a rule counts layers from the end, which [`Self::with_depth`] makes possible.
    pub fn counts_from_end(&self) -> bool {
        let mut ranges = self.rules.iter().flat_map(|rule| &rule.layers);
        ranges.any(LayerRange::counts_from_end)
    }

    /// The filter for a model of `depth` layers.
    #[must_use]
    pub fn with_depth(self, depth: usize) -> Self {
        Self { depth: Some(depth), ..self }
    }

    /// Takes or leaves one Linear.
    pub fn decide(&self, subject: &Subject<'_>) -> Decision {
        self.decide_by(subject, |rule| rule.matches(subject, self.depth))
    }

    fn decide_by(&self, subject: &Subject<'_>, is_for: impl Fn(&Compiled) -> bool) -> Decision {
        let found = self.rules.iter().position(is_for);
        let Some(index) = found else { return Decision::Leave(self.reason(subject)) };
        if self.rules[index].format.is_none() {
            return Decision::Leave(format!("kept by rule {} of {}", index + 1, self.title));
        }
        match self.exclude.iter().find(|regex| finds(regex, subject)) {
            Some(regex) => Decision::Leave(format!("excluded by --exclude '{regex}'")),
            None => Decision::Take(index),
        }
    }

    /// Takes or leaves one product that several layers make up. What is said of the product itself (a
    /// rule for it, an expression that excludes it) decides; else it is taken when all of `parts`
    /// are, in one format.
    pub fn decide_joined(&self, whole: &Subject<'_>, parts: &[Subject<'_>]) -> Decision {
        if let Some(regex) = self.exclude.iter().find(|regex| finds(regex, whole)) {
            return Decision::Leave(format!("excluded by --exclude '{regex}'"));
        }
        if self.rules.iter().any(|rule| rule.matches(whole, self.depth)) {
            return self.decide(whole);
        }
        let mut rule: Option<usize> = None;
        for part in parts {
            let of = |path: Option<&str>| path.unwrap_or_default().to_owned();
            let is_for = |rule: &Compiled| rule.matches(part, self.depth) && !rule.excludes(whole);
            let taken = match self.decide_by(part, is_for) {
                Decision::Take(taken) => taken,
                Decision::Leave(reason) => {
                    let path = of(part.path);
                    return Decision::Leave(format!(
                        "one product of several layers, of which {path}: {reason}"
                    ));
                }
            };
            let first = *rule.get_or_insert(taken);
            if self.rules[first].format != self.rules[taken].format {
                let (a, b) = (of(parts[0].path), of(part.path));
                return Decision::Leave(format!(
                    "one product of several layers, of which {a} and {b} get different formats"
                ));
            }
        }
        rule.map_or_else(|| Decision::Leave("no layer".to_owned()), Decision::Take)
    }

    fn reason(&self, subject: &Subject<'_>) -> String {
        match (subject.role, subject.path) {
            (Role::Head, _) => {
                "the head: taken only when named (--include lm_head, or a rule for role head)"
                    .to_owned()
            }
            (Role::Router, _) => {
                "a mixture-of-experts router: taken only when named (--include, or a rule for role \
                 router)"
                    .to_owned()
            }
            (Role::Product, _) => {
                "two dynamic operands: an attention product, not a Linear; taken only when asked for \
                 (--attention, or a rule for role product)"
                    .to_owned()
            }
            (Role::Packed, None) => format!(
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

impl Compiled {
    fn new(rule: &Rule) -> Result<Self, FilterError> {
        let Select { roles, layers, include, exclude } = &rule.select;
        Ok(Self {
            roles: roles.clone(),
            layers: layers.clone(),
            include: compile_all(include)?,
            exclude: compile_all(exclude)?,
            format: rule.format,
        })
    }

    fn matches(&self, subject: &Subject<'_>, depth: Option<usize>) -> bool {
        let by_role = match self.roles.is_empty() {
            // An expression that finds a path finds the products in it too; they are not meant.
            true if subject.role == Role::Product => false,
            true => !self.include.is_empty() || !subject.role.only_when_named(),
            false => self.roles.contains(&subject.role),
        };
        let layer = subject.path.and_then(layer_number);
        let in_range = |range: &LayerRange| layer.is_some_and(|n| range.contains(n, depth));
        // A rule that asks for routers by role needs no expression that names each of them.
        let includes = |regex: &Regex| match self.roles.contains(&Role::Router) {
            true => finds(regex, subject),
            false => names(regex, subject),
        };
        by_role
            && (self.layers.is_empty() || self.layers.iter().any(in_range))
            && (self.include.is_empty() || self.include.iter().any(includes))
            && !self.excludes(subject)
    }

    fn excludes(&self, subject: &Subject<'_>) -> bool {
        self.exclude.iter().any(|regex| finds(regex, subject))
    }
}

fn compile_all(patterns: &[String]) -> Result<Vec<Regex>, FilterError> {
    patterns.iter().map(|pattern| compile(pattern)).collect()
}

pub(super) fn compile(pattern: &str) -> Result<Regex, FilterError> {
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

    fn rules(selects: Vec<Select>) -> Vec<Rule> {
        let rule = |select| Rule { select, format: Some(SiteFormat::Int8) };
        selects.into_iter().map(rule).collect()
    }

    fn subject<'a>(path: Option<&'a str>, role: Role) -> Subject<'a> {
        Subject { path, role, node: "node_linear_3", initializer: "val_12" }
    }

    #[test]
    fn include_adds_and_exclude_takes_away() {
        let rules = rules(vec![Select::mlp(), Select::named("lm_head")]);
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
            let filter = Filter::new("tier a", &rules(vec![Select::named(pattern)]), &[]).unwrap();
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
            let rules = rules(vec![Select::default(), Select::named(pattern)]);
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

    #[test]
    fn roles_layers_and_expressions_have_to_agree() {
        let select = Select {
            roles: vec![Role::Mlp],
            layers: vec!["last 1".parse().unwrap(), "0".parse().unwrap()],
            include: vec!["down".into(), "up".into()],
            exclude: vec![r"\.0\..*up".into()],
        };
        let filter = Filter::new("r", &rules(vec![select]), &[]).unwrap();
        assert!(filter.counts_from_end());
        let filter = filter.with_depth(4);
        let taken = |path, role| filter.decide(&subject(Some(path), role)) == Decision::Take(0);
        assert!(taken("layers.0.mlp.down_proj", Role::Mlp));
        assert!(taken("layers.3.mlp.up_proj", Role::Mlp));
        assert!(!taken("layers.0.mlp.up_proj", Role::Mlp), "excluded by the rule");
        assert!(!taken("layers.1.mlp.down_proj", Role::Mlp), "another layer");
        assert!(!taken("mlp.down_proj", Role::Mlp), "in no layer");
        assert!(!taken("layers.0.mlp.gate_proj", Role::Mlp), "not included");
        assert!(!taken("layers.0.mlp.down_proj", Role::Expert), "another role");
    }

    #[test]
    fn a_product_of_several_layers_is_taken_when_all_of_them_are() {
        let parts = [
            subject(Some("layers.0.self_attn.q_proj"), Role::Attention),
            subject(Some("layers.0.mlp.fc1"), Role::Mlp),
        ];
        let whole = subject(Some("layers.0.{self_attn.q_proj,mlp.fc1}"), Role::Packed);
        let excluding = |rules: &[Rule], exclude: &[&str]| {
            let exclude: Vec<String> = exclude.iter().map(|&e| e.to_owned()).collect();
            Filter::new("r", rules, &exclude).unwrap().decide_joined(&whole, &parts)
        };
        let decide = |rules: &[Rule]| excluding(rules, &[]);
        let both = rules(vec![Select::mlp(), Select::attention()]);
        assert_eq!(decide(&both), Decision::Take(1));
        assert!(matches!(decide(&both[..1]), Decision::Leave(why) if why.contains("q_proj")));
        // What names the product itself wins over what its layers are.
        let own = r"layers\.0\.\{self_attn";
        for exclude in [own, "q_proj"] {
            let left = excluding(&both, &[exclude]);
            assert!(matches!(&left, Decision::Leave(why) if why.contains("excluded")), "{left:?}");
        }
        let keep = Rule { select: Select::named(own), format: None };
        let kept = decide(&[vec![keep], both.clone()].concat());
        assert_eq!(kept, Decision::Leave("kept by rule 1 of r".into()));
        let mut others = both.clone();
        others[0].select.exclude = vec![own.into()];
        assert!(matches!(decide(&others), Decision::Leave(_)));
        assert_eq!(
            decide(&[both.clone(), rules(vec![Select::named(own)])].concat()),
            Decision::Take(2)
        );
        let mut mixed = both;
        mixed[0].format = Some(SiteFormat::Bf16);
        assert!(
            matches!(decide(&mixed), Decision::Leave(why) if why.contains("different formats"))
        );
    }

    #[test]
    fn a_rule_can_keep_layers_and_ask_for_head_and_router() {
        let keep = Rule { select: Select::named("down"), format: None };
        let head = Select { roles: vec![Role::Head, Role::Router, Role::Mlp], ..Select::default() };
        let rules = [vec![keep], rules(vec![head])].concat();
        let filter = Filter::new("r", &rules, &[]).unwrap();
        assert!(!filter.counts_from_end());
        let decide = |path, role| filter.decide(&subject(Some(path), role));
        assert_eq!(
            decide("layers.0.mlp.down_proj", Role::Mlp),
            Decision::Leave("kept by rule 1 of r".into())
        );
        assert_eq!(decide("layers.0.mlp.up_proj", Role::Mlp), Decision::Take(1));
        assert_eq!(decide("lm_head", Role::Head), Decision::Take(1));
        assert_eq!(decide("layers.0.mlp.gate", Role::Router), Decision::Take(1));
    }
}
