//! What keeps two runs from being compared.

use super::{Folder, is_whole};
use crate::eval::record::Record;
use serde::Serialize;
use serde_json::Value;

/// How far figures can be compared, the worst first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Not at all.
    NotComparable,
    /// Tokens differ: bits per byte alone.
    OnlyBitsPerByte,
    /// Fully, or what the remark says.
    Note,
}

/// A reason.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Remark {
    /// How grave it is.
    pub kind: Kind,
    /// What differs, and what follows.
    pub text: String,
}

/// Options that choose the text, beside the data itself.
const TEXT: [&str; 1] = ["max_samples"];
/// Options that define what is scored.
const DEFINITION: [&str; 2] = ["seq_len", "definition"];
/// What speed depends on.
const PLACE: [&str; 4] = ["device", "threads", "cpu_variant", "gpus"];

/// Compares what holds of whole runs.
pub(super) fn runs(first: &Folder, other: &Folder, remarks: &mut Vec<Remark>) -> Kind {
    let names = format!("{} and {}", first.path.display(), other.path.display());
    let mut worst = Kind::Note;
    let mut add = |kind: Kind, text: String| {
        worst = worst.min(kind);
        remarks.push(Remark { kind, text: format!("{names}: {text}") });
    };
    let at = |folder: &Folder, path: &[&str]| -> Option<Value> {
        let (head, rest) = path.split_first()?;
        rest.iter().try_fold(folder.run.get(*head)?, |value, key| value.get(*key)).cloned()
    };
    let both = |path: &[&str]| (at(first, path), at(other, path));
    // The documents measured say more than the file they came from.
    let documents = match both(&["data", "documents_sha256"]) {
        (Some(Value::String(a)), Some(Value::String(b))) => Some((Value::from(a), Value::from(b))),
        _ => None,
    };
    let (a, b) = both(&["data", "sha256"]);
    let same_text = documents.as_ref().is_some_and(|(a, b)| a == b);
    match documents.or_else(|| a.zip(b)) {
        Some((a, b)) if a != b => add(
            Kind::NotComparable,
            format!(
                "the text differs (sha256 {} and {}): no figure can be compared",
                short(&a),
                short(&b)
            ),
        ),
        Some((a, _)) if !a.is_null() => {}
        _ => add(Kind::Note, "run.json does not say what the text was; it may differ".into()),
    }
    for name in TEXT.into_iter().filter(|_| !same_text) {
        let (a, b) = both(&["options", name]);
        // More documents asked for than there are is the same text.
        if a != b && !(name == "max_samples" && same_documents(first, other)) {
            add(
                Kind::NotComparable,
                format!(
                    "{name} is {} and {}: the text differs, no figure can be compared",
                    say(&a),
                    say(&b)
                ),
            );
        }
    }
    for name in DEFINITION {
        let (a, b) = both(&["options", name]);
        if a != b {
            add(
                Kind::NotComparable,
                format!("{name} is {} and {}: figures are defined differently", say(&a), say(&b)),
            );
        }
    }
    if let (Some(a), Some(b)) = both(&["definition"])
        && a != b
    {
        add(Kind::NotComparable, "the definitions of the figures differ".into());
    }
    let places: Vec<_> =
        PLACE.into_iter().filter(|name| at(first, &[name]) != at(other, &[name])).collect();
    if !places.is_empty() {
        add(Kind::Note, format!("{} differ: so may speed and memory", places.join(", ")));
    }
    for (name, path) in [("mxeval", ["mxeval", ""]), ("ONNX Runtime", ["onnxruntime", "version"])] {
        let path = if path[1].is_empty() { &path[..1] } else { &path[..] };
        if let (Some(a), Some(b)) = both(path)
            && a != b
        {
            add(Kind::Note, format!("{name} {} and {}", say(&Some(a)), say(&Some(b))));
        }
    }
    worst
}

fn same_documents(first: &Folder, other: &Folder) -> bool {
    let docs = |folder: &Folder| {
        let mut docs: Vec<_> =
            folder.records.iter().filter(|r| is_whole(r)).map(|r| r.docs).collect();
        docs.sort();
        docs.dedup();
        docs
    };
    docs(first) == docs(other) && docs(first).len() == 1
}

/// Compares two records of a stage.
pub(super) fn stages(
    (first, base): (&Folder, &Record),
    (other, record): (&Folder, &Record),
    remarks: &mut Vec<Remark>,
) -> Kind {
    let names = format!("{} and {}", first.path.display(), other.path.display());
    let mut worst = Kind::Note;
    let mut add = |kind: Kind, text: String| {
        worst = worst.min(kind);
        let remark = Remark { kind, text: format!("{names}: {text}") };
        // Most hold of every stage of a model.
        if !remarks.contains(&remark) {
            remarks.push(remark);
        }
    };
    let facts = (first.model_facts(base), other.model_facts(record));
    let tokenizer =
        |facts: Option<&Value>| facts.and_then(|f| f.pointer("/tokenizer/sha256")).cloned();
    let tokenizers = (tokenizer(facts.0), tokenizer(facts.1));
    let other_tokens =
        matches!(&tokenizers, (Some(a), Some(b)) if a != b && !a.is_null() && !b.is_null());
    if base.definition.is_some()
        && record.definition.is_some()
        && base.definition != record.definition
    {
        let (a, b) = (&base.definition, &record.definition);
        add(
            Kind::NotComparable,
            format!("defined as {} and {}", a.as_deref().unwrap_or(""), b.as_deref().unwrap_or("")),
        );
    }
    let partial = !is_whole(base) || !is_whole(record);
    let differ = (base.tokens, base.bytes) != (record.tokens, record.bytes);
    if partial && (other_tokens || differ) {
        add(
            Kind::NotComparable,
            format!("{} was interrupted: the two saw different text", record.stage),
        );
    } else if other_tokens {
        add(
            Kind::OnlyBitsPerByte,
            "the tokenizers differ: xent, ppl and entropy cannot be compared, bits/byte can".into(),
        );
        if base.bytes != record.bytes {
            add(
                Kind::OnlyBitsPerByte,
                format!(
                    "windows of equally many tokens cover {} and {} bytes: bits/byte are of different \
                     lengths of the same documents, so only roughly comparable",
                    count(base.bytes),
                    count(record.bytes)
                ),
            );
        }
    } else if base.tokens != record.tokens || base.bytes != record.bytes {
        add(
            Kind::NotComparable,
            format!(
                "{} scored {} and {} tokens: not the same text",
                record.stage,
                count(base.tokens),
                count(record.tokens)
            ),
        );
    }
    let sha = |facts: Option<&Value>| {
        facts.and_then(|f| f.get("sha256")).filter(|v| !v.is_null()).cloned()
    };
    if let (Some(a), Some(b)) = (sha(facts.0), sha(facts.1))
        && a != b
    {
        let text = format!(
            "the models differ ({} {} and {} {}): differences are of models, not only of runs",
            base.model,
            short(&a),
            record.model,
            short(&b)
        );
        add(Kind::Note, text);
    }
    worst
}

fn count(value: Option<u64>) -> String {
    value.map_or_else(|| "?".into(), |value| value.to_string())
}

fn short(digest: &Value) -> String {
    digest.as_str().unwrap_or("?").chars().take(12).collect()
}

fn say(value: &Option<Value>) -> String {
    match value {
        None | Some(Value::Null) => "not set".into(),
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
    }
}
