//! A model made ready for scoring: a `TokenScores` node in place of its outputs.
//!
//! The node reduces the logits inside the graph, so that a matrix of batch x sequence x vocabulary
//! never becomes an output. Logits and present key-value tensors stop being outputs, which lets ONNX
//! Runtime free them as soon as they are used.

use super::error::{Error, Result};
use super::feeds::{Feeds, Hints, LABELS, element, name, sizes};
use crate::onnx::Model;
use crate::onnx::proto::{
    Attribute, AttributeType, DataType, Dimension, DimensionValue, Node, TensorShape, TensorType,
    Type, ValueInfo,
};
use crate::rewrite::base;
use mx_custom_ops::contract;
use std::path::Path;

/// Outputs of the scoring node, which become the graph's.
pub const OUTPUTS: [(&str, DataType); 3] =
    [("mx.nll", DataType::Float), ("mx.entropy", DataType::Float), ("mx.top1", DataType::Int64)];

/// A graph as the evaluation sees it.
#[derive(Clone, Debug)]
pub struct Inspection {
    /// How to feed it.
    pub feeds: Feeds,
    /// Name of the logits.
    pub logits: String,
    /// Number of tokens the model knows, where the graph says: rows of the embedding or the last
    /// extent of the logits, whichever is smaller.
    pub vocabulary: Option<usize>,
}

/// Recognises inputs, logits and vocabulary of `model`. `shown` is its name in messages.
///
/// # Errors
/// The graph is no causal language model that mxeval can feed; the message names the input or output.
pub fn inspect(model: &Model, shown: &str) -> Result<Inspection> {
    let error = |reason: String| Error::Model { model: shown.into(), reason };
    let graph = model.graph();
    let inputs = graph.inputs().filter(|input| graph.initializer(name(input)).is_none());
    let hints = model.dir().map(Hints::read).unwrap_or_default();
    let feeds = Feeds::new(inputs, hints).map_err(error)?;
    let outputs: Vec<_> = graph.outputs().collect();
    let logits = find_logits(&outputs).map_err(error)?;
    let last = sizes(logits).and_then(|sizes| sizes.last().copied().flatten());
    let vocabulary = [last, embedding_rows(model)].into_iter().flatten().min();
    Ok(Inspection { feeds, logits: name(logits).to_owned(), vocabulary })
}

impl Inspection {
    /// Checks that every token id of the corpus exists in the model.
    ///
    /// # Errors
    /// One does not: the tokenizer belongs to another model. The message has both sizes.
    pub fn check_ids(&self, shown: &str, largest: Option<u32>, tokenizer: usize) -> Result<()> {
        match (self.vocabulary, largest) {
            (Some(vocabulary), Some(id)) if id as usize >= vocabulary => Err(Error::Model {
                model: shown.into(),
                reason: format!(
                    "token id {id} is outside its vocabulary of {vocabulary}; the tokenizer has \
                     {tokenizer} tokens: pass the tokenizer.json that belongs to the model"
                ),
            }),
            _ => Ok(()),
        }
    }
}

fn find_logits<'a>(outputs: &[&'a ValueInfo]) -> std::result::Result<&'a ValueInfo, String> {
    let float = |value: &ValueInfo| {
        matches!(element(value), DataType::Float | DataType::Float16 | DataType::Bfloat16)
    };
    let found = match outputs.iter().find(|output| name(output) == "logits") {
        Some(logits) => logits,
        None => {
            let mut candidates =
                outputs.iter().filter(|o| float(o) && sizes(o).is_some_and(|s| s.len() == 3));
            match (candidates.next(), candidates.next()) {
                (Some(only), None) => only,
                _ => {
                    let names: Vec<_> = outputs.iter().map(|output| name(output)).collect();
                    return Err(format!(
                        "no output `logits` and not exactly one float output of rank 3; its \
                         outputs are {}",
                        names.join(", ")
                    ));
                }
            }
        }
    };
    if !float(found) {
        return Err(format!(
            "logits `{}` are {:?}; expected float32, float16 or bfloat16",
            name(found),
            element(found)
        ));
    }
    match sizes(found) {
        Some(sizes) if sizes.len() != 3 => Err(format!(
            "logits `{}` have rank {}; expected [batch, sequence, vocabulary]",
            name(found),
            sizes.len()
        )),
        _ => Ok(found),
    }
}

/// Rows of the table that `input_ids` index directly.
pub(crate) fn embedding_rows(model: &Model) -> Option<usize> {
    let graph = model.graph();
    graph.nodes().find_map(|(_, node)| {
        let [table, ids, ..] = &node.input[..] else { return None };
        if node.op_type.as_deref() != Some("Gather") || ids != "input_ids" {
            return None;
        }
        let dims = &graph.initializer(table)?.dims;
        (dims.len() == 2).then(|| usize::try_from(dims[0]).ok()).flatten()
    })
}

/// Appends the scoring node: input [`LABELS`], outputs [`OUTPUTS`] and nothing else.
pub fn append_scores(model: &mut Model, inspection: &Inspection) {
    let graph = model.graph_mut();
    let outputs: Vec<String> = graph.outputs().map(|output| name(output).to_owned()).collect();
    let logits = graph.outputs().find(|output| name(output) == inspection.logits).cloned();
    for output in outputs {
        graph.remove_output(&output);
    }
    // The type of the logits stays known, which picks the operator's variant.
    let mut scored = inspection.logits.clone();
    if let Some(mut logits) = logits {
        if let Some((before, element)) = base::uncast(graph, &scored) {
            scored.clone_from(&before);
            logits.name = Some(before);
            if let Some(tensor) = logits.r#type.as_mut().and_then(|t| t.tensor_type.as_mut()) {
                tensor.elem_type = Some(element as i32);
            }
        }
        graph.add_value_info(logits);
    }
    graph.add_input(matrix(LABELS, DataType::Int64));
    for (output, element) in OUTPUTS {
        graph.add_output(matrix(output, element));
    }
    graph.push_node(Node {
        input: vec![scored, LABELS.into()],
        output: OUTPUTS.map(|(output, _)| output.to_owned()).to_vec(),
        name: Some("mx.token_scores".into()),
        op_type: Some(contract::op::TOKEN_SCORES.into()),
        domain: Some(contract::DOMAIN.into()),
        ..Node::default()
    });
    model.import_opset(contract::DOMAIN, contract::DOMAIN_VERSION);
}

/// Makes the logits the graph's only output; their name and type there. Where a change of the base
/// type cast them at the end, the value before the Cast is taken.
pub fn keep_logits(model: &mut Model, inspection: &Inspection) -> (String, DataType) {
    let graph = model.graph_mut();
    let outputs: Vec<ValueInfo> = graph.outputs().cloned().collect();
    let mut kept = outputs.iter().find(|output| name(output) == inspection.logits).cloned();
    outputs.iter().for_each(|output| graph.remove_output(name(output)));
    if let Some(logits) = &mut kept
        && let Some((before, element)) = base::uncast(graph, &inspection.logits)
    {
        logits.name = Some(before);
        if let Some(tensor) = logits.r#type.as_mut().and_then(|t| t.tensor_type.as_mut()) {
            tensor.elem_type = Some(element as i32);
        }
    }
    let found = kept.as_ref().map_or((inspection.logits.clone(), DataType::Float), |logits| {
        (name(logits).to_owned(), element(logits))
    });
    kept.into_iter().for_each(|logits| graph.add_output(logits));
    found
}

/// Inputs of [`judge`].
pub const JUDGED: [&str; 2] = ["mx.logits", "mx.reference"];

/// Outputs of [`judge`]: the variant's, then the reference's.
pub const JUDGEMENT: [(&str, DataType); 6] = [
    ("mx.nll", DataType::Float),
    ("mx.entropy", DataType::Float),
    ("mx.top1", DataType::Int64),
    ("mx.kl", DataType::Float),
    ("mx.reference_nll", DataType::Float),
    ("mx.reference_top1", DataType::Int64),
];

/// The least that is a model: IR version 8, opset 17, an empty graph `g`.
const EMPTY: [u8; 11] = [0x08, 8, 0x3a, 3, 0x12, 1, b'g', 0x42, 2, 0x10, 17];

/// A model without weights that scores the logits of a variant and of its reference, [`JUDGED`], of
/// these types, against [`LABELS`]: [`JUDGEMENT`]. Two models that ran apart meet in it on the device.
///
/// # Errors
/// None that can be caused from outside.
pub fn judge(types: [DataType; 2]) -> Result<Model> {
    let bytes = bytes::Bytes::from_static(&EMPTY);
    let mut model = Model::from_bytes(bytes, None)
        .map_err(|e| Error::Model { model: "the judge".into(), reason: e.to_string() })?;
    let graph = model.graph_mut();
    for (input, element) in JUDGED.into_iter().zip(types) {
        graph.add_input(value(input, element, &["mx.batch", "mx.sequence", "mx.vocabulary"]));
    }
    graph.add_input(matrix(LABELS, DataType::Int64));
    JUDGEMENT.into_iter().for_each(|(output, element)| graph.add_output(matrix(output, element)));
    // The operator wants both of one type; float32 holds the values of all.
    let widened = JUDGED.map(|input| match types[0] == types[1] {
        true => input.to_owned(),
        false => format!("{input}.float"),
    });
    for ((input, to), element) in JUDGED.into_iter().zip(&widened).zip(types) {
        if input == to {
            continue;
        }
        let float = Attribute {
            name: Some("to".into()),
            i: Some(i64::from(DataType::Float as i32)),
            r#type: Some(AttributeType::Int as i32),
            ..Attribute::default()
        };
        let same = element == DataType::Float;
        graph.push_node(Node {
            input: vec![input.into()],
            output: vec![to.clone()],
            name: Some(format!("{to}.cast")),
            op_type: Some(if same { "Identity" } else { "Cast" }.into()),
            attribute: if same { vec![] } else { vec![float] },
            ..Node::default()
        });
    }
    let [variant, reference] = &widened;
    let [nll, entropy, top1, kl, reference_nll, reference_top1] = JUDGEMENT.map(|(name, _)| name);
    let scores = |name: &str, input: &[&str], output: &[&str]| Node {
        input: input.iter().map(|&s| s.to_owned()).collect(),
        output: output.iter().map(|&s| s.to_owned()).collect(),
        name: Some(name.into()),
        op_type: Some(contract::op::TOKEN_SCORES.into()),
        domain: Some(contract::DOMAIN.into()),
        ..Node::default()
    };
    let unused = ["mx.reference_alone", "mx.reference_entropy"];
    let alone = [unused[0], unused[1], reference_top1];
    graph.push_node(scores("mx.reference_scores", &[reference, LABELS], &alone));
    let both = [nll, entropy, top1, kl, reference_nll];
    graph.push_node(scores("mx.token_scores", &[variant, LABELS, reference], &both));
    model.import_opset(contract::DOMAIN, contract::DOMAIN_VERSION);
    Ok(model)
}

/// A value of rank 2 with open extents.
fn matrix(name: &str, element: DataType) -> ValueInfo {
    value(name, element, &["mx.batch", "mx.sequence"])
}

/// A value with open extents of these names.
fn value(name: &str, element: DataType, extents: &[&str]) -> ValueInfo {
    let dim = |symbol: &&str| Dimension {
        value: Some(DimensionValue::Param((*symbol).into())),
        denotation: None,
    };
    let shape = TensorShape { dim: extents.iter().map(dim).collect() };
    let tensor = TensorType { elem_type: Some(element as i32), shape: Some(shape) };
    let r#type = Type { tensor_type: Some(tensor), ..Type::default() };
    ValueInfo { name: Some(name.into()), r#type: Some(r#type), ..ValueInfo::default() }
}

/// Bytes of a model on disk: the file and the distinct external files it names.
///
/// # Errors
/// A file cannot be looked at.
pub fn files(path: &Path, model: &Model) -> Result<Vec<(std::path::PathBuf, u64)>> {
    let mut paths = vec![path.to_path_buf()];
    for location in external_locations(model) {
        let file = path.parent().unwrap_or(Path::new("")).join(location);
        if !paths.contains(&file) {
            paths.push(file);
        }
    }
    paths
        .into_iter()
        .map(|file| {
            let length = std::fs::metadata(&file).map_err(Error::io(&file))?.len();
            Ok((file, length))
        })
        .collect()
}

fn external_locations(model: &Model) -> Vec<String> {
    let mut found: Vec<String> = Vec::new();
    for tensor in model.graph().initializers() {
        if let crate::onnx::Storage::External(external) = &tensor.storage
            && !found.contains(&external.location)
        {
            found.push(external.location.clone());
        }
    }
    found.sort();
    found
}
