//! What TOML and JSON have in common, with the line where each thing stands.

use toml::de::{DeTable, DeValue};

/// One value of a recipe file.
#[derive(Debug)]
pub(super) struct Item {
    /// Line of its key, or of itself in a list; `None` in JSON that a program wrote.
    pub line: Option<usize>,
    pub value: Value,
}

#[derive(Debug)]
pub(super) enum Value {
    Text(String),
    Integer(i64),
    List(Vec<Item>),
    Table(Vec<(String, Item)>),
    /// Anything that no recipe holds, by the name of its type.
    Other(&'static str),
}

impl Value {
    /// Name of the type, for messages.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Text(_) => "text",
            Self::Integer(_) => "a number",
            Self::List(_) => "a list",
            Self::Table(_) => "a table",
            Self::Other(kind) => kind,
        }
    }
}

/// A text that does not parse: the line and what is wrong there.
pub(super) type SyntaxError = (Option<usize>, String);

/// Reads TOML.
pub(super) fn of_toml(text: &str) -> Result<Item, SyntaxError> {
    match DeTable::parse(text) {
        Ok(table) => Ok(Item { line: Some(1), value: toml_table(table.get_ref(), text) }),
        Err(error) => {
            let line = error.span().map(|span| line_of(text, span.start));
            // The message may be several lines; a diagnostic is one.
            Err((line, error.message().split_whitespace().collect::<Vec<_>>().join(" ")))
        }
    }
}

/// Reads JSON.
pub(super) fn of_json(text: &str) -> Result<Item, SyntaxError> {
    let value: serde_json::Value =
        serde_json::from_str(text).map_err(|error| (Some(error.line()), error.to_string()))?;
    Ok(json(value))
}

fn line_of(text: &str, offset: usize) -> usize {
    1 + text.bytes().take(offset).filter(|&byte| byte == b'\n').count()
}

fn toml_table(table: &DeTable<'_>, text: &str) -> Value {
    let mut entries: Vec<_> = table.iter().collect();
    // In the order of the file, so that the first mistake is the one that is told.
    entries.sort_by_key(|(key, _)| key.span().start);
    let entry = |(key, value): (&toml::Spanned<_>, &toml::Spanned<DeValue<'_>>)| {
        let line = Some(line_of(text, key.span().start));
        let name: &std::borrow::Cow<'_, str> = key.get_ref();
        (name.to_string(), Item { line, value: toml_value(value.get_ref(), text) })
    };
    Value::Table(entries.into_iter().map(entry).collect())
}

fn toml_value(value: &DeValue<'_>, text: &str) -> Value {
    match value {
        DeValue::String(string) => Value::Text(string.to_string()),
        DeValue::Integer(integer) => i64::from_str_radix(integer.as_str(), integer.radix())
            .map_or(Value::Other("a number out of range"), Value::Integer),
        DeValue::Array(array) => {
            let item = |value: &toml::Spanned<DeValue<'_>>| Item {
                line: Some(line_of(text, value.span().start)),
                value: toml_value(value.get_ref(), text),
            };
            Value::List(array.iter().map(item).collect())
        }
        DeValue::Table(table) => toml_table(table, text),
        DeValue::Float(_) => Value::Other("a fraction"),
        DeValue::Boolean(_) => Value::Other("true or false"),
        DeValue::Datetime(_) => Value::Other("a date"),
    }
}

fn json(value: serde_json::Value) -> Item {
    use serde_json::Value as Json;
    let value = match value {
        Json::String(text) => Value::Text(text),
        Json::Number(number) => number.as_i64().map_or(Value::Other("a fraction"), Value::Integer),
        Json::Array(array) => Value::List(array.into_iter().map(json).collect()),
        Json::Object(map) => {
            Value::Table(map.into_iter().map(|(key, value)| (key, json(value))).collect())
        }
        Json::Bool(_) => Value::Other("true or false"),
        Json::Null => Value::Other("null"),
    };
    Item { line: None, value }
}
