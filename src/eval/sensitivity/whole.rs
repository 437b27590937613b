//! A whole model that scores batches: the baseline with its logits kept where they are computed, or a
//! variant against them.
//!
//! What cannot be skipped to is measured this way, and what a search has found.

use super::chooser::{RowScore, sums};
use super::names;
use crate::eval::devices::Device;
use crate::eval::error::{Error, Result};
use crate::eval::feeds::{LABELS, element, name};
use crate::eval::instrument::{self, Inspection};
use crate::eval::runtime::Runtime;
use crate::eval::schedule::{MASKED, Padded};
use crate::eval::session::{SessionOptions, commit, device_memory, host_memory, open_model};
use crate::onnx::Model;
use crate::onnx::proto::{DataType, Node, TensorType, Type, ValueInfo};
use mx_custom_ops::contract;
use ort::value::DynValue;
use std::path::Path;

/// Whether a model is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Against {
    /// By itself.
    Nothing,
    /// With logits that every run is given.
    Logits,
}

/// The session.
pub(crate) struct Whole {
    session: ort::session::Session,
    inspection: Inspection,
    shown: String,
    against: Against,
    device: Device,
}

impl Whole {
    /// Loads the model at `path`. `shown` is its name in messages.
    ///
    /// # Errors
    /// The file is no causal language model, or ONNX Runtime refuses it.
    pub(crate) fn open(
        runtime: &Runtime,
        path: &Path,
        shown: &str,
        options: &SessionOptions,
        against: Against,
    ) -> Result<Self> {
        let mut model = open_model(path, shown)?;
        let inspection = instrument::inspect(&model, shown)?;
        score(&mut model, &inspection, against);
        let (session, _) = commit(runtime, model, path, shown, options)?;
        let (shown, device) = (shown.to_owned(), options.device);
        Ok(Self { session, inspection, shown, against, device })
    }

    /// Scores a batch, by row, at the positions along the sequence for which `scored` holds; with
    /// `keep` the logits are given back as well, where they were computed.
    ///
    /// # Errors
    /// ONNX Runtime fails.
    pub(crate) fn run(
        &mut self,
        padded: &Padded,
        scored: impl Fn(usize) -> bool,
        baseline: Option<&DynValue>,
        keep: bool,
    ) -> Result<(Vec<RowScore>, Option<DynValue>)> {
        let doing = format!("running {} on {} x {}", self.shown, padded.rows, padded.length);
        let mut padded = padded.clone();
        for (place, label) in padded.labels.iter_mut().enumerate() {
            if !scored(place % padded.length.max(1)) {
                *label = MASKED;
            }
        }
        let tensors = self.inspection.feeds.tensors(&padded).map_err(Error::ort(&doing))?;
        let mut binding = self.session.create_binding().map_err(Error::ort(&doing))?;
        for (name, tensor) in &tensors {
            binding.bind_input(name.as_str(), tensor).map_err(Error::ort(&doing))?;
        }
        if let Some(baseline) = baseline.filter(|_| self.against == Against::Logits) {
            binding.bind_input(names::BASELINE, baseline).map_err(Error::ort(&doing))?;
        }
        let host = host_memory().map_err(Error::ort(&doing))?;
        for name in outputs(self.against) {
            binding.bind_output_to_device(*name, &host).map_err(Error::ort(&doing))?;
        }
        if keep {
            let own = device_memory(self.device).map_err(Error::ort(&doing))?;
            let logits = self.inspection.logits.as_str();
            binding.bind_output_to_device(logits, &own).map_err(Error::ort(&doing))?;
        }
        let mut made = self.session.run_binding(&binding).map_err(Error::ort(&doing))?;
        let missing = |name: &str| Error::Model {
            model: self.shown.clone(),
            reason: format!("gave no `{name}`"),
        };
        let score = |name: &str| -> Result<Vec<f32>> {
            let value = made.get(name).ok_or_else(|| missing(name))?;
            let (_, data) = value.try_extract_tensor::<f32>().map_err(Error::ort(&doing))?;
            Ok(data.to_vec())
        };
        let [nll, _, _, kl, base] = names::SCORES;
        let nll = score(nll)?;
        let (base, kl) = match self.against {
            Against::Logits => (score(base)?, score(kl)?),
            Against::Nothing => (nll.clone(), vec![0.0; nll.len()]),
        };
        let rows = sums(&padded.labels, padded.rows, [&nll, &base, &kl])?;
        let logits = match keep {
            true => {
                let logits = &self.inspection.logits;
                Some(made.remove(logits).ok_or_else(|| missing(logits))?)
            }
            false => None,
        };
        Ok((rows, logits))
    }
}

fn outputs(against: Against) -> &'static [&'static str] {
    match against {
        Against::Nothing => &names::SCORES[..3],
        Against::Logits => &names::SCORES,
    }
}

/// Puts the scoring node behind the logits, which stay an output.
fn score(model: &mut Model, inspection: &Inspection, against: Against) {
    let graph = model.graph_mut();
    let typed = graph.outputs().find(|output| name(output) == inspection.logits);
    let element = typed.map_or(DataType::Float, element);
    let others: Vec<String> = graph
        .outputs()
        .map(|output| name(output).to_owned())
        .filter(|output| *output != inspection.logits)
        .collect();
    others.iter().for_each(|output| graph.remove_output(output));
    let mut input = vec![inspection.logits.clone(), LABELS.to_owned()];
    graph.add_input(open(LABELS, DataType::Int64));
    if against == Against::Logits {
        input.push(names::BASELINE.to_owned());
        graph.add_input(open(names::BASELINE, element));
    }
    for output in outputs(against) {
        graph.add_output(ValueInfo { name: Some((*output).into()), ..ValueInfo::default() });
    }
    graph.push_node(Node {
        input,
        output: outputs(against).iter().map(|&output| output.to_owned()).collect(),
        name: Some("mx.token_scores".into()),
        op_type: Some(contract::op::TOKEN_SCORES.into()),
        domain: Some(contract::DOMAIN.into()),
        ..Node::default()
    });
    model.import_opset(contract::DOMAIN, contract::DOMAIN_VERSION);
}

/// A tensor of unknown rank.
fn open(name: &str, element: DataType) -> ValueInfo {
    let tensor = TensorType { elem_type: Some(element as i32), shape: None };
    let r#type = Type { tensor_type: Some(tensor), ..Type::default() };
    ValueInfo { name: Some(name.into()), r#type: Some(r#type), ..ValueInfo::default() }
}
