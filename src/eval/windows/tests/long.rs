//! Texts encoded in pieces give what they give as a whole.

use super::*;
use crate::eval::windows::encode::tokens;
use crate::eval::windows::stitch::{Sizes, is_exact};
use serde_json::Value;

const SMALL: Sizes = Sizes { piece: 2000, overlap: 400, margin: 100 };

const LLAMA3: &str = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| \
                      ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";

/// tinylm's tokenizer with another pre-tokenizer and normalizer.
fn tinylm(pre_tokenizer: Option<Value>, normalizer: Value) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/tinylm/tokenizer.json");
    let mut file: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    if let Some(pre_tokenizer) = pre_tokenizer {
        file["pre_tokenizer"] = pre_tokenizer;
    }
    file["normalizer"] = normalizer;
    file
}

fn llama3() -> Value {
    json!({"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": false},
        {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}]})
}

/// Text of words, runs of blanks and digits, line ends, accents apart from their letters, and special
/// tokens.
fn text(seed: u64, length: usize) -> String {
    let parts = [
        "word",
        " and",
        " the",
        "  ",
        "\n",
        "\n\n",
        " \n \t",
        "12",
        "3456789",
        "é",
        "漢字",
        "e\u{301}",
        "𝄞",
        "'ll",
        "'S",
        "...",
        " ==",
        "<|endoftext|>",
        "\u{a0}",
        "\r\n",
        "x_1",
        "Ünder",
    ];
    let mut state = seed;
    let mut text = String::new();
    while text.len() < length {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let part = parts[(state >> 33) as usize % parts.len()];
        // Now and then a run.
        let times = if (state >> 20) & 31 == 0 { 40 } else { 1 };
        text.push_str(&part.repeat(times));
    }
    text
}

#[test]
fn pieces_join_to_the_whole() {
    let digits = json!({"type": "Sequence", "pretokenizers": [
        {"type": "Digits", "individual_digits": false},
        {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": true}]});
    let files = [
        tinylm(None, Value::Null),
        tinylm(Some(digits), Value::Null),
        tinylm(Some(llama3()), json!({"type": "NFC"})),
    ];
    for (number, file) in files.iter().enumerate() {
        assert!(is_exact(file), "{}", file["pre_tokenizer"]);
        let inner = tokenizers::Tokenizer::from_bytes(file.to_string().as_bytes()).unwrap();
        let mut joined = 0;
        for seed in 0..20 {
            let text = text(seed, 20_000);
            let whole = tokens(&inner.encode(text.as_str(), false).unwrap(), &text);
            if let Some(pieces) = SMALL.encode(&inner, &text) {
                assert_eq!(pieces.unwrap(), whole, "tokenizer {number}, seed {seed}");
                joined += 1;
            }
        }
        assert!(joined >= 10, "tokenizer {number}: only {joined} of 20 texts were joined");
    }
}

#[test]
fn what_does_not_meet_is_encoded_whole() {
    let file = tinylm(Some(llama3()), Value::Null);
    let inner = tokenizers::Tokenizer::from_bytes(file.to_string().as_bytes()).unwrap();
    let none = |text: &str| SMALL.encode(&inner, text).is_none();
    assert!(none("short"));
    // One word; blanks alone; digits, which are grouped by three from the left.
    assert!(none(&"a".repeat(9000)));
    assert!(none(&format!("\n{}\n", " ".repeat(9000))));
    assert!(none(&"漢".repeat(9000)));
    assert!(!none(&"a b ".repeat(3000)));
}

#[test]
fn a_long_text_has_the_windows_of_its_whole_encoding() {
    // With a tokenizer that adds BOS.
    let mut file = tinylm(None, Value::Null);
    file["post_processor"] = byte_level(true, false)["post_processor"].clone();
    file["post_processor"]["special_tokens"]["<s>"] =
        json!({"id": "<s>", "ids": [0], "tokens": ["<|endoftext|>"]});
    let mut t = tokenizer(&file);
    t.encoder.pieces = SMALL;
    let inner = tokenizers::Tokenizer::from_bytes(file.to_string().as_bytes()).unwrap();
    let text = text(3, 40_000);
    assert!(SMALL.encode(&inner, &text).is_some(), "not joined");
    let whole = inner.encode(text.as_str(), true).unwrap();
    let concat = Definition::new(Mode::Concat, 1000, None, None).unwrap();
    let corpus = t.tokenize(documents(&[&text]), &concat, 1).unwrap();
    let ids: Vec<u32> = corpus.windows.iter().flat_map(|w| w.ids.to_vec()).collect();
    assert_eq!(ids[..], whole.get_ids()[..ids.len()]);
    assert_eq!(ids.len() + corpus.dropped, whole.len());
}

#[test]
fn tokenizers_that_look_back_or_have_no_words_are_left_alone() {
    let with = |pre_tokenizer: Value| is_exact(&tinylm(Some(pre_tokenizer), Value::Null));
    let split = |pattern: &str, behavior: &str| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": false});
    assert!(with(split(LLAMA3, "Isolated")));
    assert!(!with(split(LLAMA3, "MergedWithPrevious")));
    assert!(!with(split("(?<=a)b", "Isolated")) && !with(split("\\bword", "Isolated")));
    assert!(!with(split("a(?=bcd)", "Isolated")) && !with(split("^a|b", "Isolated")));
    assert!(!with(json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"})));
    let twice = json!({"type": "Sequence",
        "pretokenizers": [split(LLAMA3, "Isolated"), split("\\p{N}{1,3}", "Isolated")]});
    assert!(!with(twice));
    let mut file = tinylm(None, json!({"type": "Lowercase"}));
    assert!(!is_exact(&file));
    file["normalizer"] = Value::Null;
    assert!(is_exact(&file));
    file["added_tokens"][0]["rstrip"] = true.into();
    assert!(!is_exact(&file));
    // Llama 2: the whole text is one word.
    let mut file = tinylm(None, Value::Null);
    file["pre_tokenizer"] = Value::Null;
    assert!(!is_exact(&file));
}
