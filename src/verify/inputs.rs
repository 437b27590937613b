//! What both models are fed: the same tokens or tensors, each in the types that it declares.
//!
//! A language model that takes a cache is run twice a sample: on all tokens but the last with an empty
//! cache, then on the last token with the cache that A returned, for A and for B. So both branches of a
//! merged decoder run, and an error of B's cache does not hide behind the next.

use std::path::{Path, PathBuf};

use ort::value::DynValue;
use serde::Serialize;

use super::{
    error::{Result, VerifyError},
    numbers::Numbers,
    random::Random,
    session::{Inputs, Outputs, output},
    tensors,
};
use crate::{
    eval::{
        Error, corpus,
        feeds::{Feeds, Hints, element, name, sizes},
        instrument,
        schedule::{Batch, Padded},
        windows::{Definition, Tokenizer, Window},
    },
    onnx::{Model, proto::ValueInfo},
};

/// Where inputs come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// Made up: token ids of the vocabulary, evenly; numbers of a normal distribution for float inputs.
    Random {
        /// Where the sequence starts; the same seed gives the same inputs.
        seed: u64,
    },
    /// Text, cut into windows as mxeval does.
    Text {
        /// `.parquet`, `.jsonl[.zst]` or `.txt`.
        data: PathBuf,
        /// The model's tokenizer.json.
        tokenizer: PathBuf,
    },
    /// A `.safetensors` file with one tensor an input.
    Tensors(PathBuf),
}

/// How many inputs, and how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Size {
    /// Samples; every one is a run, or two with a cache.
    pub samples: usize,
    /// Tokens of a sample at most.
    pub seq_len: usize,
}

/// One of the two models and what the comparison knows of it.
pub(super) struct Side {
    pub path: PathBuf,
    pub model: Model,
}

impl Side {
    pub fn open(path: &Path) -> Result<Self> {
        let model = Model::open(path)
            .map_err(|source| VerifyError::Model { path: path.to_owned(), source })?;
        Ok(Self { path: path.to_owned(), model })
    }

    /// Inputs that have to be fed.
    fn inputs(&self) -> impl Iterator<Item = &ValueInfo> {
        let graph = self.model.graph();
        graph.inputs().filter(|input| graph.initializer(name(input)).is_none())
    }

    fn error(&self, reason: impl Into<String>) -> VerifyError {
        VerifyError::Inputs { path: self.path.clone(), reason: reason.into() }
    }

    /// Sizes that the files beside the model say.
    fn hints(&self) -> Hints {
        self.model.dir().map(Hints::read).unwrap_or_default()
    }

    /// How to feed the model. What no file beside it says, `other` may know: a rewritten model is often
    /// written to a folder of its own.
    fn feeds(&self, other: Hints) -> Result<Feeds> {
        let own = self.hints();
        let hints = Hints {
            kv_heads: own.kv_heads.or(other.kv_heads),
            head_size: own.head_size.or(other.head_size),
        };
        Feeds::new(self.inputs(), hints)
            .map_err(|reason| self.error(format!("{reason}; pass inputs: --data FILE.safetensors")))
    }
}

/// Inputs of every run.
pub(super) enum Cases {
    /// Of language models.
    Tokens { windows: Vec<Window>, feeds: [Feeds; 2], draw: Option<Draw> },
    /// Of any other graph: tensors by input name, one list a run.
    Tensors { runs: Vec<Vec<(String, Numbers)>>, sides: [Vec<ValueInfo>; 2] },
}

impl Cases {
    pub fn new(a: &Side, b: &Side, source: &Source, size: Size) -> Result<Self> {
        let sides = || [a, b].map(|side| side.inputs().cloned().collect::<Vec<_>>());
        if let Source::Tensors(path) = source {
            let run = tensors::read(path)?;
            for input in sides().iter().flatten().map(name) {
                if !run.iter().any(|(known, _)| known == input) {
                    let reason = format!("has no tensor `{input}`, an input of the model");
                    return Err(VerifyError::Inputs { path: path.clone(), reason });
                }
            }
            return Ok(Self::Tensors { runs: vec![run], sides: sides() });
        }
        let is_language_model = a.inputs().any(|input| name(input) == "input_ids");
        if !is_language_model && let Source::Random { seed } = source {
            let mut random = Random::new(*seed);
            let runs = (0..size.samples)
                .map(|_| a.inputs().map(|input| made_up(a, input, size, &mut random)).collect())
                .collect::<Result<_>>()?;
            return Ok(Self::Tensors { runs, sides: sides() });
        }
        let feeds = [a.feeds(b.hints())?, b.feeds(a.hints())?];
        let fixed = feeds.iter().filter_map(|feeds| feeds.columns).min();
        let seq_len = size.seq_len.min(fixed.unwrap_or(usize::MAX));
        let (windows, draw) = match source {
            Source::Random { seed } => {
                let mut draw = Draw::new(a, *seed, seq_len)?;
                ((0..size.samples).map(|_| draw.window()).collect(), Some(draw))
            }
            Source::Text { data, tokenizer } => {
                (text(a, data, tokenizer, size.samples, seq_len)?, None)
            }
            Source::Tensors(_) => (Vec::new(), None),
        };
        Ok(Self::Tokens { windows, feeds, draw })
    }

    /// Samples.
    pub fn len(&self) -> usize {
        match self {
            Self::Tokens { windows, .. } => windows.len(),
            Self::Tensors { runs, .. } => runs.len(),
        }
    }

    /// Puts other random tokens in the place of a sample that A refuses (a traced mixture of experts may
    /// run only when every expert gets a token). False where tokens are not random, or too many were
    /// refused.
    pub fn redraw(&mut self, index: usize) -> bool {
        let Self::Tokens { windows, draw: Some(draw), .. } = self else { return false };
        draw.left = match draw.left.checked_sub(1) {
            Some(left) => left,
            None => return false,
        };
        windows[index] = draw.window();
        true
    }

    /// Tokens of the longest run, as far as they are known.
    pub fn longest(&self) -> usize {
        match self {
            Self::Tokens { windows, feeds, .. } => {
                let rows = feeds.iter().filter_map(|f| f.rows).max().unwrap_or(1);
                rows * windows.iter().map(|w| w.ids.len()).max().unwrap_or(1)
            }
            Self::Tensors { runs, .. } => {
                let sizes =
                    runs.iter().flatten().map(|(_, t)| t.shape.iter().rev().skip(1).product());
                sizes.max().unwrap_or(1)
            }
        }
    }

    /// Makes the inputs of every run, one after the other. `run` gets its name and the inputs of A and
    /// of B, and returns the outputs of A.
    pub fn drive(&self, run: &mut Run<'_>) -> Result<()> {
        (0..self.len()).try_for_each(|index| self.drive_one(index, run))
    }

    /// The same for one sample.
    pub fn drive_one(&self, index: usize, run: &mut Run<'_>) -> Result<()> {
        match self {
            Self::Tokens { windows, feeds, .. } => drive_window(windows, index, feeds, run),
            Self::Tensors { runs, sides } => {
                let inputs = |side: &[ValueInfo]| -> Result<Inputs> {
                    side.iter().map(|input| typed(&runs[index], input)).collect()
                };
                run(&format!("run {index}"), inputs(&sides[0])?, inputs(&sides[1])?).map(drop)
            }
        }
    }
}

/// What is done with the inputs of a run.
pub(super) type Run<'a> = dyn FnMut(&str, Inputs, Inputs) -> Result<Outputs> + 'a;

/// Random tokens.
pub(super) struct Draw {
    random: Random,
    vocabulary: u64,
    seq_len: usize,
    /// Samples that may still be replaced.
    left: usize,
}

impl Draw {
    fn new(a: &Side, seed: u64, seq_len: usize) -> Result<Self> {
        // An encoder has no logits; its embedding still says how many tokens there are.
        let inspected = instrument::inspect(&a.model, "").ok().and_then(|found| found.vocabulary);
        let vocabulary = inspected.or_else(|| instrument::embedding_rows(&a.model));
        let vocabulary = vocabulary.filter(|&size| size > 0).ok_or_else(|| {
            a.error(
                "neither logits nor embedding say how large the vocabulary is; pass --data and \
                 --tokenizer",
            )
        })?;
        Ok(Self { random: Random::new(seed), vocabulary: vocabulary as u64, seq_len, left: 32 })
    }

    fn window(&mut self) -> Window {
        // Vocabularies are counted in u32 everywhere.
        let ids = (0..self.seq_len).map(|_| self.random.below(self.vocabulary) as u32).collect();
        Window::whole(ids, 0, 0)
    }
}

fn typed(tensors: &[(String, Numbers)], input: &ValueInfo) -> Result<(String, DynValue)> {
    let wanted = name(input);
    let found = tensors.iter().find(|(known, _)| known == wanted);
    let refused = |reason: String| {
        VerifyError::Eval(Error::Ort { doing: format!("making input `{wanted}`"), reason })
    };
    let (_, tensor) = found.ok_or_else(|| refused("it has no value".to_owned()))?;
    let value = tensor.to_input(element(input)).map_err(|error| refused(error.to_string()))?;
    Ok((wanted.to_owned(), value))
}

fn drive_window(
    windows: &[Window],
    index: usize,
    feeds: &[Feeds; 2],
    run: &mut Run<'_>,
) -> Result<()> {
    let ids = &windows[index].ids;
    let steps = feeds.iter().all(Feeds::steps) && ids.len() > 1;
    let first = &ids[..ids.len() - usize::from(steps)];
    let part = [Window::whole(first.to_vec(), 0, 0)];
    let batch = Batch { windows: vec![0], length: first.len() };
    let inputs = |feeds: &Feeds| -> Result<Inputs> {
        let (rows, columns) = (feeds.rows.unwrap_or(0), feeds.columns.unwrap_or(0));
        let padded = Padded::new(&part, &batch, rows, columns);
        let tensors = feeds.tensors(&padded).map_err(Error::ort("making the inputs"))?;
        // The scoring node's labels are no input here.
        Ok(tensors.into_iter().filter(|(name, _)| name != crate::eval::feeds::LABELS).collect())
    };
    let outputs = run(&format!("sample {index}"), inputs(&feeds[0])?, inputs(&feeds[1])?)?;
    if !steps {
        return Ok(());
    }
    let rows = feeds[0].rows.unwrap_or(1);
    let token = vec![i64::from(ids[ids.len() - 1]); rows];
    let step = |feeds: &Feeds| -> Result<Inputs> {
        let cache = |input: &str, element| match present(feeds, input, &outputs) {
            Some(present) => present.to_input(element),
            None => Err(ort::Error::new(format!("no output goes with cache input `{input}`"))),
        };
        let tensors = feeds.step(&token, first.len(), &cache);
        Ok(tensors.map_err(Error::ort("making the inputs of a decode step"))?)
    };
    run(&format!("sample {index}, decode step"), step(&feeds[0])?, step(&feeds[1])?)?;
    Ok(())
}

/// The output that a cache input takes up: `past_key_values.0.key` <- `present.0.key` and the like,
/// else the one at the same place among the outputs of rank 4.
fn present<'a>(feeds: &Feeds, input: &str, outputs: &'a Outputs) -> Option<&'a Numbers> {
    for prefix in ["past_key_values", "past_key", "past"] {
        if let Some(rest) = input.strip_prefix(prefix)
            && let Some(found) = output(outputs, &format!("present{rest}"))
        {
            return Some(found);
        }
    }
    let place = feeds.cache_inputs().position(|name| name == input)?;
    let caches = outputs.iter().filter_map(|(_, value)| value.as_ref().ok());
    caches.filter(|numbers| numbers.shape.len() == 4).nth(place)
}

fn text(
    a: &Side,
    data: &Path,
    tokenizer: &Path,
    samples: usize,
    seq_len: usize,
) -> Result<Vec<Window>> {
    let tokenizer = Tokenizer::open(tokenizer)?;
    let corpus =
        tokenizer.tokenize(corpus::open(data)?, &Definition::per_document(seq_len), samples)?;
    let shown = a.path.display().to_string();
    if let Ok(inspection) = instrument::inspect(&a.model, &shown) {
        inspection.check_ids(&shown, corpus.largest_id(), tokenizer.len())?;
    }
    Ok(corpus.windows)
}

/// A float input of normally distributed numbers; open extents are 1 in front, else the length.
fn made_up(
    side: &Side,
    input: &ValueInfo,
    size: Size,
    random: &mut Random,
) -> Result<(String, Numbers)> {
    use crate::onnx::DataType::{Bfloat16, Double, Float, Float16};
    let (input_name, element) = (name(input), element(input));
    let shape = sizes(input).filter(|_| matches!(element, Float | Float16 | Bfloat16 | Double));
    let shape = shape.ok_or_else(|| {
        side.error(format!(
            "cannot make up input `{input_name}` ({element:?}): the graph has no `input_ids`, and only \
             float inputs of known rank are filled at random; pass inputs: --data FILE.safetensors"
        ))
    })?;
    let rank = shape.len();
    let extent = |(axis, known): (usize, &Option<usize>)| {
        known.unwrap_or(if axis == 0 && rank > 2 { 1 } else { size.seq_len })
    };
    let shape: Vec<usize> = shape.iter().enumerate().map(extent).collect();
    let elements = shape.iter().try_fold(1usize, |n, &extent| n.checked_mul(extent));
    let elements = elements.filter(|&n| n <= MOST).ok_or_else(|| {
        side.error(format!("input `{input_name}` of shape {shape:?} is too large to make up"))
    })?;
    let values = (0..elements).map(|_| random.normal()).collect();
    Ok((input_name.to_owned(), Numbers { dtype: "float64", shape, values }))
}

/// Most numbers of one input that are made up.
const MOST: usize = 1 << 28;
