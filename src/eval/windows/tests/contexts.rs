//! Every mode against a table, written from its definition token by token: from which context each
//! token is predicted, and which bytes are counted.

use super::*;
use crate::eval::windows::cut::cut;
use crate::eval::windows::encode::Tokens;
use std::collections::{BTreeMap, BTreeSet};

const BOS: u32 = 7;

/// The place where the context of token `t` begins, of `count` tokens; `None` where it is not scored.
fn naive(definition: &Definition, count: usize, t: usize) -> Option<usize> {
    let seq_len = definition.seq_len;
    match definition.mode {
        Mode::PerDocument => (t >= 1 && t < seq_len).then_some(0),
        Mode::Rolling => {
            // Blocks of seq_len predictions; the last of several sees seq_len inputs.
            let block = t.checked_sub(1)? / seq_len;
            let last = (count - 2) / seq_len;
            let start =
                if block > 0 && block == last { count - 1 - seq_len } else { block * seq_len };
            Some(start)
        }
        Mode::Stride => {
            // The earliest window that holds the token.
            let stride = definition.stride.unwrap();
            (t >= 1).then(|| (0..).map(|k| k * stride).find(|start| t < start + seq_len).unwrap())
        }
        Mode::Concat | Mode::SecondHalf => {
            let unscored = if definition.mode == Mode::Concat { 1 } else { seq_len / 2 + 1 };
            let start = t / seq_len * seq_len;
            (start + seq_len <= count && t - start >= unscored).then_some(start)
        }
    }
}

/// Every definition with windows of up to eight tokens.
fn definitions() -> Vec<Definition> {
    let mut all = Vec::new();
    for mode in Mode::ALL {
        for seq_len in 3..=8 {
            for bos in [Bos::None, Bos::First, Bos::Each] {
                let strides = if mode == Mode::Stride {
                    (1..seq_len).map(Some).collect()
                } else {
                    vec![None]
                };
                let new = |stride| Definition::new(mode, seq_len, stride, Some(bos)).unwrap();
                all.extend(strides.into_iter().map(new));
            }
        }
    }
    all
}

#[test]
fn every_token_is_predicted_once_and_from_the_context_of_the_definition() {
    for definition in definitions() {
        for count in 0..=35 {
            // Ids tell places apart: 100, 101, ...
            let ids: Vec<u32> = (100..100 + count as u32).collect();
            let tokens = Tokens {
                offsets: (0..count).map(|i| (i, i + 1)).collect(),
                ids: ids.clone(),
                text_bytes: count,
            };
            let each = (definition.bos == Bos::Each).then_some(BOS);
            let mut found = BTreeMap::new();
            for window in cut(&definition, tokens, each) {
                assert!(window.inputs <= definition.seq_len, "{definition}");
                assert!(window.first_scored >= 1 && window.ids.len() <= window.inputs + 1);
                for place in window.first_scored..window.ids.len() {
                    let context = window.ids[..place].to_vec();
                    let again = found.insert(window.ids[place], context);
                    assert_eq!(again, None, "{definition}, {count} tokens: scored twice");
                }
            }
            let expected: BTreeMap<u32, Vec<u32>> = (0..count)
                .filter_map(|t| Some((ids[t], naive(&definition, count, t)?, t)))
                .map(|(id, start, t)| {
                    let mut context = ids[start..t].to_vec();
                    if let Some(bos) = each.filter(|_| start > 0) {
                        context[0] = bos;
                    }
                    (id, context)
                })
                .collect();
            assert_eq!(found, expected, "{definition}, {count} tokens");
        }
    }
}

#[test]
fn bytes_are_those_that_scored_tokens_cover_each_once() {
    // One token a byte: characters of one to four bytes lie across windows.
    let t = tokenizer(&byte_level(false, false));
    let text = "aé漢𝄞 b𝄞𝄞ß漢c漢漢é".to_owned();
    let offsets: Vec<_> = text
        .char_indices()
        .flat_map(|(at, c)| std::iter::repeat_n((at, at + c.len_utf8()), c.len_utf8()))
        .collect();
    for definition in definitions().into_iter().filter(|d| d.bos == Bos::None) {
        for end in (2..=text.len()).filter(|&end| text.is_char_boundary(end)) {
            let texts = [&text[..end]];
            let Ok(corpus) = t.tokenize(documents(&texts), &definition, 1) else { continue };
            let scored = (0..end).filter(|&token| naive(&definition, end, token).is_some());
            let covered: BTreeSet<_> = scored.flat_map(|i| offsets[i].0..offsets[i].1).collect();
            let bytes: u64 = corpus.windows.iter().map(|window| window.bytes).sum();
            assert_eq!(bytes, covered.len() as u64, "{definition}, {end} bytes");
        }
    }
}

#[test]
fn rolling_counts_the_whole_text_and_scores_a_single_token() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tokenizer.json");
    std::fs::write(&path, byte_level(true, false).to_string()).unwrap();
    let t = Tokenizer::open(&path).unwrap();
    let rolling = Definition::new(Mode::Rolling, 4, None, None).unwrap();
    let texts = ["", "a", "é23456789", "abcd"];
    let corpus = t.tokenize(documents(&texts), &rolling, 10).unwrap();
    assert_eq!((corpus.read, corpus.documents.len(), corpus.tokens()), (4, 3, 1 + 10 + 4));
    let of = |document| {
        let windows = corpus.windows.iter().filter(move |w| w.document == document);
        windows.map(|w| (w.ids.to_vec(), w.inputs, w.scored(), w.bytes)).collect::<Vec<_>>()
    };
    let a =
        t.tokenize(documents(&["ab"]), &Definition::per_document(8), 1).unwrap().windows[0].ids[1];
    assert_eq!(of(0), [(vec![256, a], 1, 1, 1)]);
    // 10 tokens in windows of 4, 4 and 2 predictions; the last is fed 4 tokens too.
    let shapes: Vec<_> = of(1).into_iter().map(|(_, i, s, b)| (i, s, b)).collect();
    assert_eq!(shapes, [(4, 4, 10), (4, 4, 0), (4, 2, 0)]);
    assert_eq!(of(2).len(), 1);
    assert!(
        corpus.summary(&rolling).contains("3 with 15 scored tokens in 5 windows; BOS is <s> (id")
    );
}

#[test]
fn streams_are_joined_and_every_window_stands_for_itself() {
    let t = tokenizer(&byte_level(false, false));
    let texts = ["abc", "", "defgh", "ij"];
    let concat = Definition::new(Mode::Concat, 5, None, None).unwrap();
    let corpus = t.tokenize(documents(&texts), &concat, 3).unwrap();
    let ids =
        |text: &str| t.tokenize(documents(&[text]), &Definition::per_document(99), 1).unwrap();
    let whole = ids("abc\n\n\n\ndefgh");
    let windows: Vec<_> = corpus.windows.iter().map(|w| (&w.ids[..], w.document)).collect();
    assert_eq!(windows, [(&whole.windows[0].ids[..5], 0), (&whole.windows[0].ids[5..10], 1)]);
    assert_eq!((corpus.read, corpus.dropped, corpus.tokens()), (3, 2, 8));
    assert_eq!(corpus.documents, [Source::default(); 2]);
    assert!(corpus.summary(&concat).contains("the last 2 tokens fill no window"));

    // llama.cpp: of 5 tokens the first 3 are context, BOS or not.
    let half = Definition::new(Mode::SecondHalf, 5, None, None).unwrap();
    let corpus = t.tokenize(documents(&texts), &half, 3).unwrap();
    assert_eq!((corpus.tokens(), corpus.windows[1].first_scored), (4, 3));
}

#[test]
fn overlapping_windows_share_their_tokens() {
    let t = tokenizer(&byte_level(false, false));
    let text = "x ".repeat(50_000);
    let stride = Definition::new(Mode::Stride, 4096, Some(1), None).unwrap();
    // 400 million ids, were they copied.
    let corpus = t.tokenize(documents(&[&text]), &stride, 1).unwrap();
    assert_eq!(corpus.windows.len(), 100_000 - 4096 + 1);
    assert_eq!(corpus.tokens(), 99_999);
}
