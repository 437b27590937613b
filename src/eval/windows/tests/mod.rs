//! Tokenizers made for the tests, and mode `per-document`.

use super::*;
use crate::eval::corpus::Document;
use serde_json::json;
use std::path::Path;

mod contexts;
mod front;
mod long;

fn tokenizer(value: &serde_json::Value) -> Tokenizer {
    Tokenizer::from_bytes(Path::new("test.json"), value.to_string().as_bytes()).unwrap()
}

/// Documents without subsets.
fn documents<'a>(
    texts: &'a [&'a str],
) -> impl Iterator<Item = crate::eval::Result<Document>> + use<'a> {
    texts.iter().map(|text| Ok(Document { text: (*text).into(), subset: None }))
}

/// The window of one text in mode `per-document`, if it has one.
fn window_of(tokenizer: &Tokenizer, text: &str, seq_len: usize) -> Option<Window> {
    let definition = Definition::per_document(seq_len);
    let corpus = tokenizer.tokenize(documents(&[text]), &definition, 1);
    corpus.ok().and_then(|corpus| corpus.windows.into_iter().next())
}

/// Byte-level BPE without merges: one token a byte; `bos` adds token 256 in front.
fn byte_level(bos: bool, trim: bool) -> serde_json::Value {
    let mut alphabet: Vec<char> =
        tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet().into_iter().collect();
    alphabet.sort_unstable();
    let mut vocab: serde_json::Map<_, _> =
        alphabet.iter().enumerate().map(|(i, c)| (c.to_string(), i.into())).collect();
    vocab.insert("<s>".into(), 256.into());
    vocab.insert("Ġw".into(), 257.into());
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false,
        "trim_offsets": trim, "use_regex": true});
    let template = json!({"type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                   {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}},
                 {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [256], "tokens": ["<s>"]}}});
    json!({"version": "1.0",
        "truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst",
                       "stride": 0},
        "padding": {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": null,
                    "pad_id": 0, "pad_type_id": 0, "pad_token": "!"},
        "added_tokens": [{"id": 256, "content": "<s>", "single_word": false, "lstrip": false,
                          "rstrip": false, "normalized": false, "special": true}],
        "normalizer": null, "pre_tokenizer": byte_level,
        "post_processor": if bos { template } else { byte_level.clone() },
        "decoder": null,
        "model": {"type": "BPE", "dropout": null, "unk_token": null,
            "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": false, "byte_fallback": false, "vocab": vocab,
            "merges": [["Ġ", "w"]]}})
}

fn metaspace() -> serde_json::Value {
    json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": null,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always",
                          "split": true},
        "post_processor": null, "decoder": null,
        "model": {"type": "Unigram", "unk_id": 0, "byte_fallback": false, "vocab":
            [["<unk>", 0.0], ["▁ab", -1.0], ["▁é", -1.0], ["▁", -2.0], ["c", -2.0]]}})
}

#[test]
fn without_bos_the_first_token_is_not_scored() {
    let t = tokenizer(&byte_level(false, false));
    let window = window_of(&t, "héllo", 512).unwrap();
    // Six bytes, six tokens; the first byte is only context.
    assert_eq!((window.ids.len(), window.scored(), window.bytes), (6, 5, 5));
    // The split character counts once, though both of its tokens carry both its bytes.
    assert_eq!(window_of(&t, "hé", 512).unwrap().bytes, 2);
    assert_eq!(window_of(&t, "éh", 512).unwrap().bytes, 3);
}

#[test]
fn with_bos_every_byte_is_scored_up_to_the_window() {
    let t = tokenizer(&byte_level(true, false));
    let window = window_of(&t, "hello", 512).unwrap();
    assert_eq!((window.ids[0], window.scored(), window.bytes), (256, 5, 5));
    let cut = window_of(&t, "hello", 4).unwrap();
    assert_eq!((cut.ids.len(), cut.bytes), (4, 3));
    assert_eq!(cut.ids[..], window.ids[..4]);
    // BOS alone predicts nothing.
    assert_eq!(window_of(&t, "", 512), None);
    assert_eq!(window_of(&t, "a", 512).unwrap().bytes, 1);
}

#[test]
fn the_files_truncation_and_padding_do_not_apply() {
    // The file cuts to 3 tokens and pads to 64.
    let t = tokenizer(&byte_level(false, false));
    assert_eq!(window_of(&t, "hello there", 512).unwrap().ids.len(), 11);
}

#[test]
fn trimmed_white_space_is_counted() {
    for trim in [false, true] {
        let t = tokenizer(&byte_level(false, trim));
        // "a", " w", "b": the space belongs to the second token.
        let window = window_of(&t, "a wb", 512).unwrap();
        assert_eq!((window.ids.len(), window.bytes), (3, 3), "trim {trim}");
    }
}

#[test]
fn metaspace_offsets_refer_to_the_text() {
    let t = tokenizer(&metaspace());
    // "▁ab", "▁é": the first token's ▁ is not in the text; the second is " é", 3 bytes.
    let window = window_of(&t, "ab é", 512).unwrap();
    assert_eq!((&window.ids[..], window.bytes), (&[1, 2][..], 3));
}

#[test]
fn corpora_keep_order_subsets_and_count_the_short() {
    let t = tokenizer(&byte_level(false, false));
    let doc = |text: &str, subset: Option<&str>| {
        Ok(Document { text: text.into(), subset: subset.map(str::to_owned) })
    };
    let docs = || {
        (0..200).map(move |i| match i % 4 {
            0 => doc("", None),
            1 => doc(&"a".repeat(i), Some("A")),
            2 => doc(&"b".repeat(i), Some("B")),
            _ => doc(&"c".repeat(i), None),
        })
    };
    let corpus = t.tokenize(docs(), &Definition::per_document(100), 150).unwrap();
    // i = 0, 4, ...: empty; i = 1: a single token.
    assert_eq!((corpus.read, corpus.windows.len()), (150, 150 - 38 - 1));
    assert_eq!(corpus.subsets, ["B", "A"]);
    assert_eq!(corpus.windows[0].ids.len(), 2);
    assert_eq!(corpus.windows.last().unwrap().ids.len(), 100);
    let naive: usize = (0..150).filter(|i| i % 4 != 0).map(|i: usize| i.min(100) - 1).sum();
    assert_eq!(corpus.tokens(), naive as u64);
    assert_eq!(corpus.largest_id(), corpus.windows.iter().flat_map(|w| w.ids.to_vec()).max());
}

#[test]
fn nothing_to_score_is_an_error_that_says_why() {
    let t = tokenizer(&byte_level(false, false));
    let message = |texts: &[&str], definition: &Definition| {
        t.tokenize(documents(texts), definition, 10).unwrap_err().to_string()
    };
    let per_document = Definition::per_document(512);
    assert!(message(&[], &per_document).contains("no document"));
    assert!(message(&["", "a"], &per_document).contains("2 documents read has fewer than two"));
    assert!(message(&["abc"], &Definition::per_document(1)).contains("--seq-len 1"));
    let concat = Definition::new(Mode::Concat, 8, None, None).unwrap();
    assert!(message(&[], &concat).contains("no document"));
    let short = message(&["abc", "d"], &concat);
    assert!(short.contains("are 6 tokens together") && short.contains("--seq-len 8"), "{short}");
}

#[test]
fn a_file_that_is_no_tokenizer_is_named() {
    let error = Tokenizer::from_bytes(Path::new("x/config.json"), b"{\"model_type\": \"llama\"}");
    assert!(error.unwrap_err().to_string().contains("x/config.json"));
}
