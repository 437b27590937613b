//! What a graph wants to be fed, and the tensors of one batch.
//!
//! Exporters disagree: token ids and masks in int64 or int32, position ids or not, past key-value
//! tensors that have to be there but empty, a flag that switches the cache. Every input is
//! recognised by name and checked by type and shape; one that is not known is an error, never a
//! guess.

mod step;

pub use step::Cache;

use super::schedule::Padded;
use crate::onnx::proto::{DataType, DimensionValue, ValueInfo};
use half::{bf16, f16};
use ort::value::{DynValue, Tensor};

/// One dimension of an input.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Extent {
    Fixed(usize),
    Symbol(String),
}

/// What an input means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Ids,
    Mask,
    Positions,
    TokenTypes,
    CachePositions,
    Past,
    UseCache,
    LogitsToKeep,
    Labels,
}

#[derive(Clone, Debug)]
struct Feed {
    name: String,
    role: Role,
    element: DataType,
    /// Extents of a past tensor; `None` is the batch.
    past: Vec<Option<usize>>,
    /// Rank of the declared shape.
    rank: usize,
}

/// Sizes that a graph may leave open and its configuration file states.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hints {
    /// Key-value heads of one layer.
    pub kv_heads: Option<usize>,
    /// Size of one attention head.
    pub head_size: Option<usize>,
}

/// How to feed a graph.
#[derive(Clone, Debug)]
pub struct Feeds {
    feeds: Vec<Feed>,
    /// Fixed number of rows, where the graph has one.
    pub rows: Option<usize>,
    /// Fixed number of columns, where the graph has one.
    pub columns: Option<usize>,
}

/// Name of the input that the appended scoring node reads.
pub const LABELS: &str = "mx.labels";

impl Feeds {
    /// Recognises the inputs of a graph (initialisers left out).
    ///
    /// # Errors
    /// A sentence that names the input that is missing, unknown or of an unusable type or shape.
    pub fn new<'a>(
        inputs: impl IntoIterator<Item = &'a ValueInfo>,
        hints: Hints,
    ) -> Result<Self, String> {
        let inputs: Vec<_> = inputs.into_iter().collect();
        let mut feeds = Self { feeds: Vec::new(), rows: None, columns: None };
        let ids = inputs.iter().find(|input| name(input) == "input_ids").ok_or_else(|| {
            let names: Vec<_> = inputs.iter().map(|input| name(input)).collect();
            format!("no input `input_ids`; its inputs are {}", names.join(", "))
        })?;
        if let [rows, columns] = &extents(ids)[..] {
            let fixed = |extent: &Extent| match extent {
                Extent::Fixed(size) => Some(*size),
                Extent::Symbol(_) => None,
            };
            (feeds.rows, feeds.columns) = (fixed(rows), fixed(columns));
        }
        if feeds.rows == Some(0) || feeds.columns == Some(0) {
            return Err("input `input_ids` has an empty shape".into());
        }
        for input in inputs {
            feeds.feeds.push(feed(input, hints)?);
        }
        feeds.feeds.push(Feed {
            name: LABELS.into(),
            role: Role::Labels,
            element: DataType::Int64,
            past: Vec::new(),
            rank: 2,
        });
        Ok(feeds)
    }

    /// Windows that fit in one run.
    pub fn rows_per_run(&self, batch: usize) -> usize {
        self.rows.unwrap_or(batch).max(1)
    }

    /// The tensors of one batch, by input name.
    ///
    /// # Errors
    /// ONNX Runtime refuses a tensor (out of memory).
    pub fn tensors(&self, batch: &Padded) -> ort::Result<Vec<(String, DynValue)>> {
        self.feeds.iter().map(|feed| Ok((feed.name.clone(), feed.tensor(batch)?))).collect()
    }
}

impl Feed {
    fn tensor(&self, batch: &Padded) -> ort::Result<DynValue> {
        let shape = vec![batch.rows, batch.length];
        let tokens = batch.rows * batch.length;
        match self.role {
            Role::Ids => numbers(self.element, shape, batch.ids.clone()),
            Role::Mask => numbers(self.element, shape, batch.mask.clone()),
            Role::Labels => numbers(self.element, shape, batch.labels.clone()),
            Role::TokenTypes => numbers(self.element, shape, vec![0; tokens]),
            Role::Positions => {
                let row = 0..batch.length as i64;
                let values = row.cycle().take(tokens).collect();
                numbers(self.element, shape, values)
            }
            Role::CachePositions => {
                numbers(self.element, vec![batch.length], (0..batch.length as i64).collect())
            }
            Role::LogitsToKeep | Role::UseCache => {
                numbers(self.element, vec![1; self.rank], vec![0])
            }
            Role::Past => {
                let shape: Vec<_> =
                    self.past.iter().map(|extent| extent.unwrap_or(batch.rows)).collect();
                let elements = shape.iter().product();
                numbers(self.element, shape, vec![0; elements])
            }
        }
    }
}

/// A tensor of whole numbers in the element type that the graph asks for.
pub(crate) fn numbers(
    element: DataType,
    shape: Vec<usize>,
    values: Vec<i64>,
) -> ort::Result<DynValue> {
    fn cast<T>(values: Vec<i64>, to: impl Fn(i64) -> T) -> Vec<T> {
        values.into_iter().map(to).collect()
    }
    Ok(match element {
        DataType::Int64 => Tensor::from_array((shape, values))?.into_dyn(),
        // Token ids, positions and flags fit: ids come from u32, positions from the window.
        DataType::Int32 => Tensor::from_array((shape, cast(values, |v| v as i32)))?.into_dyn(),
        DataType::Bool => Tensor::from_array((shape, cast(values, |v| v != 0)))?.into_dyn(),
        DataType::Float => Tensor::from_array((shape, cast(values, |v| v as f32)))?.into_dyn(),
        DataType::Float16 => {
            Tensor::from_array((shape, cast(values, |v| f16::from_f32(v as f32))))?.into_dyn()
        }
        DataType::Bfloat16 => {
            Tensor::from_array((shape, cast(values, |v| bf16::from_f32(v as f32))))?.into_dyn()
        }
        other => return Err(ort::Error::new(format!("cannot make a tensor of {other:?}"))),
    })
}

fn feed(input: &ValueInfo, hints: Hints) -> Result<Feed, String> {
    let name = name(input);
    let element = element(input);
    let extents = extents(input);
    let role = role(name).ok_or_else(|| {
        format!(
            "does not know what to feed input `{name}` ({element:?} {}); mxeval knows token ids, \
             attention masks, position ids, token types and empty caches",
            shape_text(&extents)
        )
    })?;
    let (types, ranks): (&[DataType], &[usize]) = match role {
        Role::Ids | Role::Positions | Role::TokenTypes => (&INTEGERS, &[2]),
        Role::Mask => (&MASKS, &[2]),
        Role::CachePositions => (&INTEGERS, &[1]),
        Role::LogitsToKeep => (&INTEGERS, &[0, 1]),
        Role::UseCache => (&[DataType::Bool], &[0, 1]),
        Role::Past => (&FLOATS, &[4]),
        Role::Labels => (&[DataType::Int64], &[2]),
    };
    if !types.contains(&element) || !ranks.contains(&extents.len()) {
        return Err(format!(
            "input `{name}` is {element:?} {}; expected {types:?} of rank {ranks:?}",
            shape_text(&extents)
        ));
    }
    let past = match role {
        Role::Past => past_extents(name, &extents, hints)?,
        _ => Vec::new(),
    };
    Ok(Feed { name: name.to_owned(), role, element, past, rank: extents.len() })
}

const INTEGERS: [DataType; 2] = [DataType::Int64, DataType::Int32];
const FLOATS: [DataType; 3] = [DataType::Float, DataType::Float16, DataType::Bfloat16];
const MASKS: [DataType; 6] = [
    DataType::Int64,
    DataType::Int32,
    DataType::Bool,
    DataType::Float,
    DataType::Float16,
    DataType::Bfloat16,
];

fn role(name: &str) -> Option<Role> {
    Some(match name {
        "input_ids" => Role::Ids,
        "attention_mask" => Role::Mask,
        "position_ids" => Role::Positions,
        "token_type_ids" => Role::TokenTypes,
        "cache_position" => Role::CachePositions,
        "use_cache_branch" => Role::UseCache,
        "num_logits_to_keep" | "logits_to_keep" => Role::LogitsToKeep,
        LABELS => Role::Labels,
        _ if name.starts_with("past") => Role::Past,
        _ => return None,
    })
}

/// Extents of an empty past tensor, [batch, heads, past, head size]: the past is 0 long.
fn past_extents(
    name: &str,
    extents: &[Extent],
    hints: Hints,
) -> Result<Vec<Option<usize>>, String> {
    let open =
        [("the number of key-value heads", hints.kv_heads), ("the head size", hints.head_size)];
    extents
        .iter()
        .enumerate()
        .map(|(axis, extent)| match (axis, extent) {
            (0, Extent::Symbol(_)) => Ok(None),
            (2, Extent::Symbol(_) | Extent::Fixed(0)) => Ok(Some(0)),
            (2, Extent::Fixed(size)) => Err(format!(
                "input `{name}` has a fixed past of {size} tokens; export it with a dynamic past"
            )),
            (_, Extent::Fixed(size)) => Ok(Some(*size)),
            (_, Extent::Symbol(symbol)) => {
                let (what, hint) = open[axis / 2];
                hint.map(Some).ok_or_else(|| {
                    format!(
                        "input `{name}` leaves {what} open (`{symbol}`) and no config.json or \
                         genai_config.json beside the model says it"
                    )
                })
            }
        })
        .collect()
}

impl Hints {
    /// Reads `config.json` (Hugging Face) and `genai_config.json` (ORT GenAI); what is missing or
    /// unreadable leaves the hint open.
    pub fn read(folder: &std::path::Path) -> Self {
        let load = |name: &str| -> Option<serde_json::Value> {
            serde_json::from_slice(&std::fs::read(folder.join(name)).ok()?).ok()
        };
        let genai = load("genai_config.json").unwrap_or_default();
        let config = load("config.json").unwrap_or_default();
        let size = |value: &serde_json::Value| {
            value.as_u64().filter(|&size| size > 0 && size < 1 << 20).map(|size| size as usize)
        };
        let decoder = &genai["model"]["decoder"];
        let heads = size(&config["num_attention_heads"]);
        let derived = size(&config["hidden_size"]).zip(heads).map(|(hidden, heads)| hidden / heads);
        Self {
            kv_heads: size(&decoder["num_key_value_heads"])
                .or_else(|| size(&config["num_key_value_heads"]))
                .or(heads),
            head_size: size(&decoder["head_size"])
                .or_else(|| size(&config["head_dim"]))
                .or(derived),
        }
    }
}

/// Name of a value.
pub(crate) fn name(value: &ValueInfo) -> &str {
    value.name.as_deref().unwrap_or_default()
}

/// Element type of a value; `Undefined` where it is no tensor.
pub(crate) fn element(value: &ValueInfo) -> DataType {
    let tensor = value.r#type.as_ref().and_then(|t| t.tensor_type.as_ref());
    tensor
        .and_then(|tensor| DataType::try_from(tensor.elem_type?).ok())
        .unwrap_or(DataType::Undefined)
}

/// Sizes of a value's dimensions, `None` where symbolic; `None` as a whole where the rank is unknown.
pub(crate) fn sizes(value: &ValueInfo) -> Option<Vec<Option<usize>>> {
    let tensor = value.r#type.as_ref()?.tensor_type.as_ref()?;
    tensor.shape.as_ref()?;
    let size = |extent: Extent| match extent {
        Extent::Fixed(size) => Some(size),
        Extent::Symbol(_) => None,
    };
    Some(extents(value).into_iter().map(size).collect())
}

fn extents(value: &ValueInfo) -> Vec<Extent> {
    let tensor = value.r#type.as_ref().and_then(|t| t.tensor_type.as_ref());
    let shape = tensor.and_then(|tensor| tensor.shape.as_ref());
    let dims = shape.map_or(&[][..], |shape| &shape.dim);
    dims.iter()
        .map(|dim| match &dim.value {
            Some(DimensionValue::Value(size)) => {
                usize::try_from(*size).map_or_else(|_| Extent::Symbol(String::new()), Extent::Fixed)
            }
            Some(DimensionValue::Param(symbol)) => Extent::Symbol(symbol.clone()),
            None => Extent::Symbol(String::new()),
        })
        .collect()
}

fn shape_text(extents: &[Extent]) -> String {
    let text = |extent: &Extent| match extent {
        Extent::Fixed(size) => size.to_string(),
        Extent::Symbol(symbol) if symbol.is_empty() => "?".into(),
        Extent::Symbol(symbol) => symbol.clone(),
    };
    format!("[{}]", extents.iter().map(text).collect::<Vec<_>>().join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::onnx::proto::{Dimension, TensorShape, TensorType, Type};

    fn value(name: &str, element: DataType, dims: &[&str]) -> ValueInfo {
        let dim = |text: &&str| {
            let value = match text.parse() {
                Ok(size) => DimensionValue::Value(size),
                Err(_) => DimensionValue::Param((*text).into()),
            };
            Dimension { value: Some(value), denotation: None }
        };
        let shape = TensorShape { dim: dims.iter().map(dim).collect() };
        let tensor = TensorType { elem_type: Some(element as i32), shape: Some(shape) };
        let r#type = Type { tensor_type: Some(tensor), ..Type::default() };
        ValueInfo { name: Some(name.into()), r#type: Some(r#type), ..ValueInfo::default() }
    }

    fn feeds(inputs: &[ValueInfo]) -> Result<Feeds, String> {
        Feeds::new(inputs, Hints::default())
    }

    #[test]
    fn symbolic_and_fixed_extents_of_the_ids() {
        let open = feeds(&[value("input_ids", DataType::Int64, &["batch", "sequence"])]).unwrap();
        assert_eq!((open.rows, open.columns, open.rows_per_run(8)), (None, None, 8));
        let fixed = feeds(&[value("input_ids", DataType::Int32, &["2", "128"])]).unwrap();
        assert_eq!((fixed.rows, fixed.columns, fixed.rows_per_run(8)), (Some(2), Some(128), 2));
    }

    #[test]
    fn an_empty_past_takes_its_sizes_from_the_shape_or_the_configuration() {
        let past = |dims| value("past_key_values.0.key", DataType::Float, dims);
        let known = feed(&past(&["batch", "2", "past", "16"]), Hints::default()).unwrap();
        assert_eq!(known.past, [None, Some(2), Some(0), Some(16)]);
        let open = past(&["batch_size", "2", "past_sequence_length", "kv_cache_dim"]);
        let error = feed(&open, Hints::default()).unwrap_err();
        assert!(error.contains("the head size") && error.contains("kv_cache_dim"), "{error}");
        let hints = Hints { head_size: Some(64), kv_heads: None };
        assert_eq!(feed(&open, hints).unwrap().past[3], Some(64));
        let error = feed(&past(&["batch", "2", "16", "16"]), hints).unwrap_err();
        assert!(error.contains("fixed past of 16"), "{error}");
    }

    #[test]
    fn hints_come_from_the_files_beside_the_model() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Hints::read(dir.path()), Hints::default());
        let config = r#"{"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}"#;
        std::fs::write(dir.path().join("config.json"), config).unwrap();
        let derived = Hints { kv_heads: Some(2), head_size: Some(16) };
        assert_eq!(Hints::read(dir.path()), derived);
        let genai = r#"{"model": {"decoder": {"head_size": 32, "num_key_value_heads": 1}}}"#;
        std::fs::write(dir.path().join("genai_config.json"), genai).unwrap();
        assert_eq!(Hints::read(dir.path()), Hints { kv_heads: Some(1), head_size: Some(32) });
    }

    #[test]
    fn what_is_not_understood_is_named() {
        let ids = value("input_ids", DataType::Int64, &["b", "s"]);
        let with = |extra| feeds(&[ids.clone(), extra]).unwrap_err();
        let unknown = with(value("encoder_hidden_states", DataType::Float, &["b", "s", "64"]));
        assert!(unknown.contains("`encoder_hidden_states` (Float [b, s, 64])"), "{unknown}");
        let mask = with(value("attention_mask", DataType::Float, &["b", "1", "s", "s"]));
        assert!(mask.contains("`attention_mask` is Float [b, 1, s, s]"), "{mask}");
        let missing = feeds(&[value("inputs_embeds", DataType::Float, &["b", "s", "64"])]);
        assert!(missing.unwrap_err().contains("its inputs are inputs_embeds"));
    }
}
