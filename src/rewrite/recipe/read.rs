//! Recipes from files. What is not understood is an error with its line and the nearest thing that
//! would have been: a mistyped key that is ignored would quantise the wrong layers.

use std::{
    io::Read as _,
    path::{Path, PathBuf},
};

use mx_kernels::{Rounding, ScaleRule};

use super::{
    Activation, BUILT_IN, Numbers, Recipe, RecipeError, Rule, SiteFormat,
    print::{IMPORT, KEEP, REQUIRED},
    tree::{self, Item, Value},
};
use crate::{
    onnx::Model,
    rewrite::{
        PLAN_KEY,
        filter::{Select, compile},
        layers::LayerRange,
        lowering::{BaseDtype, Lowering},
        sites::Role,
    },
};

/// More than any recipe or plan; a device file ends here.
const LARGEST: u64 = 64 << 20;

const TOP_KEYS: &[&str] =
    &["name", "lowering", "base_dtype", "checkpoint", "packed_weights", "exclude", "rules"];
const RULE_KEYS: &[&str] = &[
    "role",
    "layers",
    "include",
    "exclude",
    "weight_format",
    "activation_format",
    "block_size",
    "rounding",
    "scale_rule",
];
const WEIGHTS: &[&str] =
    &["fp8_e4m3", "fp8_e5m2", "fp6_e3m2", "fp6_e2m3", "fp4_e2m1", "mxint8", KEEP];
const ACTIVATIONS: &[&str] =
    &["fp8_e4m3", "fp8_e5m2", "fp6_e3m2", "fp6_e2m3", "fp4_e2m1", "mxint8", "none"];
const BLOCK_SIZES: [usize; 5] = [16, 32, 64, 128, 256];

impl Recipe {
    /// The recipe of a command line: a TOML file, the JSON of a plan, a rewritten model, or the name
    /// of a built-in recipe.
    ///
    /// # Errors
    /// [`RecipeError`]: no such file, or something in it that is not understood.
    pub fn open(path: &Path) -> Result<Self> {
        let shown = path.display().to_string();
        let fail = |reason: String| RecipeError::File { path: shown.clone(), reason };
        if !path.exists()
            && let Some(recipe) = Self::built_in(&shown)?
        {
            return Ok(recipe);
        }
        if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("onnx")) {
            let model = Model::open(path).map_err(|error| fail(error.to_string()))?;
            let plan = model.metadata().find(|(key, _)| *key == PLAN_KEY).map(|(_, plan)| plan);
            let no_plan =
                || fail(format!("the model has no '{PLAN_KEY}': mxrewrite did not make it"));
            return Self::from_text(plan.ok_or_else(no_plan)?, &format!("{shown}: {PLAN_KEY}"));
        }
        let missing = |error: std::io::Error| {
            let names: Vec<&str> = BUILT_IN.iter().map(|(name, ..)| *name).collect();
            let known = names.join(", ");
            fail(format!("{error} (neither is it a built-in recipe: {known})"))
        };
        let file = std::fs::File::open(path).map_err(missing)?;
        let mut text = String::new();
        let read = file.take(LARGEST).read_to_string(&mut text);
        read.map_err(|error| fail(format!("is no recipe: {error}")))?;
        let mut recipe = Self::from_text(&text, &shown)?;
        if recipe.name.is_empty() {
            let stem = path.file_stem().unwrap_or(path.as_os_str());
            recipe.name = format!("recipe {}", PathBuf::from(stem).display());
        }
        Ok(recipe)
    }

    /// The recipe in a text: TOML, or JSON that starts with `{`, of a recipe or of a whole plan.
    /// `source` is what errors call it.
    ///
    /// # Errors
    /// [`RecipeError`] with the line of what is not understood.
    pub fn from_text(text: &str, source: &str) -> Result<Self> {
        let is_json = text.trim_start().starts_with('{');
        let parsed = if is_json { tree::of_json(text) } else { tree::of_toml(text) };
        let reader = Reader { source };
        let mut item = parsed.map_err(|(line, what)| reader.error(line, what))?;
        if let Value::Table(entries) = &mut item.value
            && is_json
            && let Some(index) = entries.iter().position(|(key, _)| key == "recipe")
        {
            item = entries.swap_remove(index).1;
        }
        reader.recipe(&item)
    }
}

/// Turns items into a recipe; knows what errors call the file.
struct Reader<'a> {
    source: &'a str,
}

type Result<T> = std::result::Result<T, RecipeError>;

impl Reader<'_> {
    fn error(&self, line: Option<usize>, what: String) -> RecipeError {
        let place = match line {
            Some(line) => format!("{}:{line}", self.source),
            None => self.source.to_owned(),
        };
        RecipeError::Content { place, what }
    }

    fn recipe(&self, item: &Item) -> Result<Recipe> {
        let entries = self.table(item, "a recipe", TOP_KEYS)?;
        let name = match field(entries, "name") {
            Some(item) => self.text(item, "name")?.to_owned(),
            None => String::new(),
        };
        let lowering = match field(entries, "lowering") {
            Some(item) => self.name(item, "lowering", &Lowering::ALL.map(Lowering::name))?,
            None => Lowering::default(),
        };
        let base_dtype = match field(entries, "base_dtype") {
            Some(item) => {
                Some(self.name(item, "base_dtype", &BaseDtype::ALL.map(BaseDtype::name))?)
            }
            None => None,
        };
        if let Some(item) = field(entries, "base_dtype")
            && let Some(why) = lowering.refuses(base_dtype)
        {
            let base = base_dtype.map_or("", BaseDtype::name);
            let what =
                format!("base_dtype \"{base}\" does not go with lowering \"{lowering}\": {why}");
            return Err(self.error(item.line, what));
        }
        let exclude = self.patterns(field(entries, "exclude"), "exclude")?;
        let no_rules = "a recipe needs rules: at least one [[rules]] with a weight_format";
        let rules = match field(entries, "rules") {
            Some(Item { value: Value::List(rules), .. }) if !rules.is_empty() => rules,
            Some(item) => return Err(self.error(item.line, no_rules.to_owned())),
            None => return Err(self.error(item.line, no_rules.to_owned())),
        };
        let rules = rules.iter().map(|item| self.rule(item, lowering)).collect::<Result<_>>()?;
        let says = |key, value| match field(entries, key) {
            Some(item) => self.choice(item, key, &[value]).map(|_| true),
            None => Ok(false),
        };
        let packed = says("packed_weights", IMPORT)?;
        let import = says("checkpoint", REQUIRED)? || packed;
        if let (Some(item), true) = (field(entries, "packed_weights"), !lowering.takes_formats()) {
            let what = "packed_weights goes with lowering \"mx\" or \"qdq\"";
            return Err(self.error(item.line, what.to_owned()));
        }
        Ok(Recipe { name, lowering, base_dtype, import, packed, rules, exclude })
    }

    fn rule(&self, item: &Item, lowering: Lowering) -> Result<Rule> {
        let entries = self.table(item, "a rule", RULE_KEYS)?;
        let select = Select {
            roles: match field(entries, "role") {
                Some(item) => self.each(item, |item| {
                    let name = self.choice(item, "role", &Role::ALL.map(Role::name))?;
                    Ok(Role::ALL.into_iter().find(|role| role.name() == name))
                })?,
                None => Vec::new(),
            },
            layers: match field(entries, "layers") {
                Some(item) => self.each(item, |item| self.layers(item).map(Some))?,
                None => Vec::new(),
            },
            include: self.patterns(field(entries, "include"), "include")?,
            exclude: self.patterns(field(entries, "exclude"), "exclude")?,
        };
        let weight = field(entries, "weight_format");
        let keeps = weight.is_some_and(|item| matches!(&item.value, Value::Text(t) if t == KEEP));
        let format = match keeps {
            true => {
                self.refuse(
                    entries,
                    &RULE_KEYS[5..],
                    "a rule that keeps its layers has no format",
                )?;
                None
            }
            false => Some(self.format(item, entries, lowering)?),
        };
        if select.roles.contains(&Role::Product)
            && let Some(why) = format.as_ref().and_then(|format| format.why_not_products(lowering))
        {
            return Err(self.error(item.line, format!("role product: {why}")));
        }
        Ok(Rule { select, format })
    }

    /// What a rule's layers become. `item` is the rule.
    fn format(&self, item: &Item, entries: &Entries, lowering: Lowering) -> Result<SiteFormat> {
        let mut numbers = Numbers::default();
        if let Some(item) = field(entries, "block_size") {
            let known = BLOCK_SIZES.into_iter().find(|&size| {
                matches!(item.value, Value::Integer(given) if usize::try_from(given) == Ok(size))
            });
            let what = || format!("block_size is one of {BLOCK_SIZES:?}, {}", given(&item.value));
            numbers.block_size = known.ok_or_else(|| self.error(item.line, what()))?;
        }
        if let Some(item) = field(entries, "rounding") {
            let names: Vec<&str> = Rounding::ALL.iter().map(|r| r.name()).collect();
            numbers.rounding = self.name(item, "rounding", &names)?;
        }
        if let Some(item) = field(entries, "scale_rule") {
            let names: Vec<&str> = ScaleRule::ALL.iter().map(|r| r.name()).collect();
            numbers.scale_rule = self.name(item, "scale_rule", &names)?;
        }
        if lowering.takes_formats() {
            let Some(weight) = field(entries, "weight_format") else {
                let what = format!("a rule needs a weight_format: one of {}", WEIGHTS.join(", "));
                return Err(self.error(item.line, what));
            };
            numbers.weight = self.name(weight, "weight_format", WEIGHTS)?;
            if let Some(item) = field(entries, "activation_format") {
                numbers.activation = match self.choice(item, "activation_format", ACTIVATIONS)? {
                    "none" => Activation::None,
                    _ => Activation::Format(self.name(item, "activation_format", ACTIVATIONS)?),
                };
            }
        }
        let format =
            numbers.format(lowering).map_err(|error| self.error(item.line, error.to_string()))?;
        if !lowering.takes_formats() {
            self.check_fixed(entries, lowering, &format)?;
        }
        format.check(lowering).map_err(|refusal| {
            let line = field(entries, refusal.key).map_or(item.line, |item| item.line);
            let (key, why) = (refusal.key, refusal.why);
            self.error(line, format!("{key} does not go with lowering \"{lowering}\": {why}"))
        })?;
        Ok(format)
    }

    /// Lowerings other than mx bring their formats: a rule may say them, but no others.
    fn check_fixed(
        &self,
        entries: &Entries,
        lowering: Lowering,
        format: &SiteFormat,
    ) -> Result<()> {
        let fixed = [
            ("weight_format", format.weight_name()),
            ("activation_format", format.activation_name()),
        ];
        for (key, name) in fixed {
            if let Some(item) = field(entries, key)
                && self.text(item, key)? != name
            {
                let what = format!(
                    "lowering \"{lowering}\" fixes {key} = \"{name}\"; only lowerings \"mx\" and \"qdq\" have a choice"
                );
                return Err(self.error(item.line, what));
            }
        }
        if !matches!(format, SiteFormat::Mx { .. }) {
            let why = format!("lowering \"{lowering}\" has no blocks and one rounding");
            self.refuse(entries, &RULE_KEYS[6..], &why)?;
        }
        Ok(())
    }

    /// Refuses keys that mean nothing here.
    fn refuse(&self, entries: &Entries, keys: &[&str], why: &str) -> Result<()> {
        match entries.iter().find(|(key, _)| keys.contains(&key.as_str())) {
            Some((key, item)) => {
                Err(self.error(item.line, format!("{key} means nothing here: {why}")))
            }
            None => Ok(()),
        }
    }

    /// The entries of a table that has only known keys.
    fn table<'a>(&self, item: &'a Item, what: &str, known: &[&str]) -> Result<&'a Entries> {
        let Value::Table(entries) = &item.value else {
            let what = format!("{what} is a table of keys, not {}", item.value.kind());
            return Err(self.error(item.line, what));
        };
        match entries.iter().find(|(key, _)| !known.contains(&key.as_str())) {
            Some((key, item)) => {
                let what = format!("{what} has no key '{key}'{}", suggestion(key, known));
                Err(self.error(item.line, what))
            }
            None => Ok(entries),
        }
    }

    fn text<'a>(&self, item: &'a Item, key: &str) -> Result<&'a str> {
        match &item.value {
            Value::Text(text) => Ok(text),
            other => {
                Err(self.error(item.line, format!("{key} is a text in quotes, {}", given(other))))
            }
        }
    }

    /// A text that is one of `known`.
    fn choice<'a>(&self, item: &'a Item, key: &str, known: &[&str]) -> Result<&'a str> {
        let text = self.text(item, key)?;
        if known.contains(&text) {
            return Ok(text);
        }
        Err(self.error(item.line, format!("{key} cannot be '{text}'{}", suggestion(text, known))))
    }

    /// The same as the type that it names.
    fn name<T: std::str::FromStr>(&self, item: &Item, key: &str, known: &[&str]) -> Result<T> {
        let text = self.choice(item, key, known)?;
        text.parse().map_err(|_| self.error(item.line, format!("{key} cannot be '{text}'")))
    }

    /// One thing or a list of things.
    fn each<T>(&self, item: &Item, read: impl Fn(&Item) -> Result<Option<T>>) -> Result<Vec<T>> {
        match &item.value {
            // Nothing selects nothing, but an empty selection means everything.
            Value::List(items) if items.is_empty() => {
                Err(self.error(item.line, "an empty list: leave the key out".to_owned()))
            }
            Value::List(items) => items.iter().filter_map(|item| read(item).transpose()).collect(),
            _ => Ok(read(item)?.into_iter().collect()),
        }
    }

    fn layers(&self, item: &Item) -> Result<LayerRange> {
        match &item.value {
            Value::Integer(layer) => Ok(LayerRange::one(*layer)),
            Value::Text(text) => text.parse().map_err(|what| self.error(item.line, what)),
            other => {
                let what =
                    format!("layers are numbers or ranges (\"4-7\", \"last 2\"), {}", given(other));
                Err(self.error(item.line, what))
            }
        }
    }

    fn patterns(&self, item: Option<&Item>, key: &str) -> Result<Vec<String>> {
        let Some(item) = item else { return Ok(Vec::new()) };
        if matches!(&item.value, Value::List(items) if items.is_empty()) {
            return Ok(Vec::new());
        }
        self.each(item, |item| {
            let pattern = self.text(item, key)?;
            compile(pattern).map_err(|error| self.error(item.line, error.to_string()))?;
            Ok(Some(pattern.to_owned()))
        })
    }
}

type Entries = [(String, Item)];

fn field<'a>(entries: &'a Entries, key: &str) -> Option<&'a Item> {
    entries.iter().find(|(name, _)| name == key).map(|(_, item)| item)
}

/// What stands in the place of something else, for messages.
fn given(value: &Value) -> String {
    match value {
        Value::Integer(number) => format!("not {number}"),
        Value::Text(text) => format!("not '{text}'"),
        other => format!("not {}", other.kind()),
    }
}

/// The end of a message about a word that is not known.
fn suggestion(word: &str, known: &[&str]) -> String {
    let listed = known.join(", ");
    match nearest(word, known) {
        Some(near) => format!("; did you mean '{near}'? (known are {listed})"),
        None => format!("; known are {listed}"),
    }
}

/// The known word that `word` was probably meant to be.
fn nearest<'a>(word: &str, known: &[&'a str]) -> Option<&'a str> {
    let plain = |text: &str| text.to_ascii_lowercase().replace(['-', '_', ' '], "");
    let word = plain(word);
    let near = |name: &&'a str| {
        let name = plain(name);
        let apart = distance(&word, &name);
        // An abbreviation (`weight` for `weight_format`) is near whatever is missing.
        let part = word.len() > 3 && (name.contains(&word) || word.contains(&name));
        (part || apart <= 1 + word.len() / 3).then_some(apart)
    };
    known.iter().copied().filter_map(|name| Some((near(&name)?, name))).min().map(|(_, name)| name)
}

/// Letters to change, add or drop to make one word the other.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, left) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, right) in b.iter().enumerate() {
            let changed = diagonal + usize::from(left != *right);
            diagonal = row[j + 1];
            row[j + 1] = changed.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}
