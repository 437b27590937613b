//! BOS: where it stands and where its id is from; what options go together.

use super::*;
use serde_json::Value;

/// A folder with a tokenizer and further files.
fn folder(tokenizer: &Value, files: &[(&str, Value)]) -> (tempfile::TempDir, Tokenizer) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tokenizer.json");
    std::fs::write(&path, tokenizer.to_string()).unwrap();
    for (name, content) in files {
        std::fs::write(dir.path().join(name), content.to_string()).unwrap();
    }
    let tokenizer = Tokenizer::open(&path).unwrap();
    (dir, tokenizer)
}

fn first_id(tokenizer: &Tokenizer, mode: Mode, bos: Bos) -> Result<u32, String> {
    let definition = Definition::new(mode, 4, None, Some(bos)).unwrap();
    let corpus = tokenizer.tokenize(documents(&["abcdefgh"]), &definition, 1);
    corpus.map(|corpus| corpus.windows[0].ids[0]).map_err(|e| e.to_string())
}

#[test]
fn the_id_is_looked_for_in_the_files_beside_the_tokenizer() {
    let bare = byte_level(false, false);
    let id = |tokenizer: &Value, files: &[(&str, Value)], mode| {
        let (_dir, tokenizer) = folder(tokenizer, files);
        first_id(&tokenizer, mode, Bos::First)
    };
    let names = |bos: Value, eos: Value| {
        ("tokenizer_config.json", json!({"bos_token": bos, "eos_token": eos}))
    };
    let config = ("config.json", json!({"bos_token_id": 3, "eos_token_id": [5, 6]}));
    let concat = Mode::Concat;
    assert_eq!(id(&bare, &[names(json!("<s>"), Value::Null), config.clone()], concat), Ok(256));
    let object = json!({"content": "<s>", "lstrip": false});
    assert_eq!(id(&bare, &[names(object, Value::Null)], concat), Ok(256));
    // lm-eval asks the tokenizer for BOS, then for EOS; others have no use for EOS.
    let eos = names(Value::Null, json!("<s>"));
    assert_eq!(id(&bare, &[eos.clone(), config.clone()], Mode::Rolling), Ok(256));
    assert_eq!(id(&bare, &[eos, config.clone()], concat), Ok(3));
    assert_eq!(
        id(&bare, &[("config.json", json!({"eos_token_id": [5, 6]}))], Mode::Rolling),
        Ok(5)
    );
    assert_eq!(id(&byte_level(true, false), &[], concat), Ok(256));
    assert_eq!(id(&byte_level(true, false), &[config], concat), Ok(3));

    let missing = id(&bare, &[names(Value::Null, Value::Null)], Mode::Rolling).unwrap_err();
    for words in [
        "tokenizer_config.json names no bos_token or eos_token",
        "config.json is missing",
        "--bos none",
    ] {
        assert!(missing.contains(words), "{missing}");
    }
    let unknown = id(&bare, &[names(json!("<none>"), Value::Null)], concat).unwrap_err();
    assert!(unknown.contains("`<none>`") && unknown.contains("bos_token"), "{unknown}");
    let (dir, tokenizer) = folder(&bare, &[]);
    std::fs::write(dir.path().join("config.json"), "{").unwrap();
    let broken = first_id(&tokenizer, concat, Bos::First).unwrap_err();
    assert!(broken.contains("config.json: not JSON"), "{broken}");
}

#[test]
fn bos_stands_where_the_option_says() {
    let (_dir, adds) = folder(&byte_level(true, false), &[]);
    let bare = tokenizer(&byte_level(false, false));
    let firsts = |tokenizer: &Tokenizer, mode, bos| {
        let definition = Definition::new(mode, 4, None, bos).unwrap();
        let corpus = tokenizer.tokenize(documents(&["abcdefgh"]), &definition, 1).unwrap();
        corpus.windows.iter().map(|window| window.ids[0] == 256).collect::<Vec<_>>()
    };
    for mode in Mode::ALL {
        let count = firsts(&adds, mode, Some(Bos::First)).len();
        let first: Vec<_> = (0..count).map(|number| number == 0).collect();
        assert_eq!(firsts(&adds, mode, Some(Bos::First)), first, "{mode}");
        assert_eq!(firsts(&adds, mode, Some(Bos::Each)), vec![true; count], "{mode}");
        assert!(firsts(&adds, mode, Some(Bos::None)).iter().all(|bos| !bos), "{mode}");
        // By default as the reference: llama.cpp has it in front of every window.
        let default = if mode == Mode::SecondHalf { vec![true; count] } else { first };
        assert_eq!(firsts(&adds, mode, None), default, "{mode}");
        if mode != Mode::Rolling {
            assert!(firsts(&bare, mode, None).iter().all(|bos| !bos), "{mode}");
        }
    }
}

#[test]
fn options_that_do_not_go_together_are_refused() {
    let message = |mode, seq_len, stride| {
        Definition::new(mode, seq_len, stride, None).unwrap_err().to_string()
    };
    assert!(message(Mode::Rolling, 1, None).contains("--seq-len 1: mode rolling needs at least 2"));
    assert!(message(Mode::SecondHalf, 2, None).contains("at least 3"));
    assert!(message(Mode::Stride, 8, Some(8)).contains("--stride 8: must be at least 1"));
    assert!(message(Mode::Stride, 8, Some(0)).contains("--stride 0"));
    assert!(message(Mode::Concat, 8, Some(4)).contains("--mode stride"));
    assert_eq!(Definition::new(Mode::Stride, 9, None, None).unwrap().stride, Some(4));
    assert_eq!(Definition::new(Mode::Stride, 2, None, None).unwrap().stride, Some(1));
    assert!("rolled".parse::<Mode>().unwrap_err().contains("per-document, rolling"));
    assert!("tokenizer".parse::<Bos>().unwrap_err().contains("none, first, each"));
}

#[test]
fn definitions_say_what_they_are() {
    let new = |mode, stride, bos| Definition::new(mode, 2048, stride, bos).unwrap();
    assert_eq!(new(Mode::Rolling, None, None).short(), "rolling, seq-len 2048, bos first");
    assert_eq!(
        new(Mode::Stride, Some(64), Some(Bos::None)).short(),
        "stride, seq-len 2048, stride 64, bos none"
    );
    let default = "per-document, seq-len 2048, bos as the tokenizer adds it";
    assert_eq!(Definition::per_document(2048).short(), default);
    assert_eq!(new(Mode::PerDocument, None, None), Definition::per_document(2048));
    for mode in Mode::ALL {
        assert_eq!(mode.name().parse(), Ok(mode));
        for bos in [None, Some(Bos::None), Some(Bos::First), Some(Bos::Each)] {
            let definition = new(mode, None, bos);
            let text = definition.text();
            assert!(text.starts_with(&format!("{mode}: ")), "{text}");
            assert!(text.contains("2048 ") && text.contains("BOS: ") && text.contains("bits/byte"));
            assert_eq!(
                text.contains("whole text"),
                mode == Mode::Rolling && bos != Some(Bos::None)
            );
            assert!(text.contains(&format!("resample {}", definition.unit())), "{text}");
            let again: Definition =
                serde_json::from_str(&serde_json::to_string(&definition).unwrap()).unwrap();
            assert_eq!(again, definition);
        }
    }
}

#[test]
fn the_context_is_what_the_files_state() {
    let stated = |files: &[(&str, Value)]| {
        let (dir, _) = folder(&byte_level(false, false), files);
        stated_context(dir.path())
    };
    assert_eq!(stated(&[]), None);
    assert_eq!(stated(&[("config.json", json!({"n_positions": 1024}))]), Some(1024));
    let nested =
        json!({"max_position_embeddings": 77, "text_config": {"max_position_embeddings": 9}});
    let genai = ("genai_config.json", json!({"model": {"context_length": 4096}}));
    assert_eq!(stated(&[("config.json", nested), genai.clone()]), Some(9));
    assert_eq!(stated(&[genai]), Some(4096));
}
