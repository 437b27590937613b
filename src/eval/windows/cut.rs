//! The tokens of a document, or of the stream, divided into windows.

use super::Window;
use super::definition::{Definition, Mode};
use super::encode::Tokens;
use super::ids::Ids;

/// A window as places in the tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Span {
    start: usize,
    end: usize,
    /// The first scored token; greater than `start`.
    first: usize,
}

/// The windows of `tokens`, the token put in front included. `each` takes the place of the first
/// token of all windows but the first. No window where nothing has a token before it.
pub(super) fn cut(definition: &Definition, tokens: Tokens, each: Option<u32>) -> Vec<Window> {
    let Tokens { ids, offsets, text_bytes } = tokens;
    let spans = spans(definition, ids.len());
    let ids = Ids::from(ids);
    let mut covered = Covered::default();
    spans
        .into_iter()
        .enumerate()
        .map(|(number, span)| {
            let Span { start, end, first } = span;
            let own = match each.filter(|_| number > 0) {
                Some(bos) => {
                    std::iter::once(bos).chain(ids[start + 1..end].iter().copied()).collect()
                }
                None => ids.part(start..end),
            };
            let bytes = match (definition.counts_whole_text(), number) {
                (true, 0) => text_bytes as u64,
                (true, _) => 0,
                (false, _) => covered.add(&offsets[first - 1..end]),
            };
            // lm-eval feeds a window without its last token, which is only predicted; the others
            // feed it, so that a window is as long as asked for.
            let inputs = if definition.mode == Mode::Rolling { own.len() - 1 } else { own.len() };
            Window { ids: own, inputs, first_scored: first - start, bytes, document: 0 }
        })
        .collect()
}

/// Places of the windows over `count` tokens, in order.
fn spans(definition: &Definition, count: usize) -> Vec<Span> {
    let seq_len = definition.seq_len;
    match definition.mode {
        Mode::PerDocument => {
            let end = count.min(seq_len);
            if end < 2 { Vec::new() } else { vec![Span { start: 0, end, first: 1 }] }
        }
        Mode::Rolling => {
            let mut spans = Vec::new();
            let mut first = 1_usize;
            while first < count {
                // A full window predicts seq_len tokens and begins with the one before them; the
                // last one reaches back as far as seq_len inputs go.
                let end = first.saturating_add(seq_len).min(count);
                spans.push(Span {
                    start: end.saturating_sub(seq_len.saturating_add(1)),
                    end,
                    first,
                });
                first = end;
            }
            spans
        }
        Mode::Stride => {
            let stride = definition.stride.unwrap_or(1).max(1);
            let (mut spans, mut start, mut first) = (Vec::new(), 0_usize, 1_usize);
            while first < count {
                let end = start.saturating_add(seq_len).min(count);
                spans.push(Span { start, end, first });
                (start, first) = (start + stride, end);
            }
            spans
        }
        Mode::Concat | Mode::SecondHalf => {
            let context = if definition.mode == Mode::SecondHalf { seq_len / 2 + 1 } else { 1 };
            (0..count / seq_len)
                .map(|number| number * seq_len)
                .map(|start| Span { start, end: start + seq_len, first: start + context })
                .collect()
        }
    }
}

/// UTF-8 bytes of the text that scored tokens cover, each byte once.
#[derive(Debug, Default)]
struct Covered {
    /// Where the bytes counted so far end.
    end: usize,
}

impl Covered {
    /// Bytes that `offsets[1..]` cover beyond what was counted already.
    ///
    /// Special tokens have empty offsets. The tokens of one character that a byte-level tokenizer
    /// splits all carry the whole character, so lengths must not be added up: the span is taken. It
    /// starts where the token before the first scored one ends, or earlier where a scored token
    /// reaches back into that token's last character, so that white space which a tokenizer trims
    /// from its offsets (`trim_offsets`) is counted for the token that holds it.
    fn add(&mut self, offsets: &[(usize, usize)]) -> u64 {
        let Some((before, scored)) = offsets.split_first() else { return 0 };
        let covering = || scored.iter().filter(|(start, end)| end > start);
        let Some(end) = covering().map(|&(_, end)| end).max() else { return 0 };
        let start = covering().map(|&(start, _)| start).min().unwrap_or(end).min(before.1);
        let start = start.max(self.end);
        self.end = self.end.max(end);
        end.saturating_sub(start) as u64
    }
}
