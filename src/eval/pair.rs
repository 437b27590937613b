//! A model beside its reference: both run on the same batch, and only their scores leave the device.
//!
//! Each model's logits stay where it ran; a third session without weights, [`instrument::judge`],
//! reduces both to a number or two a token. So a divergence costs the logits of one batch, and no
//! file.

use super::devices::Device;
use super::error::{Error, Result};
use super::instrument::{self, Inspection, JUDGED, JUDGEMENT};
use super::metrics::WindowScore;
use super::runtime::Runtime;
use super::schedule::{Batch, Padded};
use super::score::Score;
use super::session::{
    Extents, SessionOptions, Tokens, TokensAgainst, commit, device_memory, host_memory, open_model,
};
use super::windows::Window;
use crate::onnx::DataType;
use mx_custom_ops::census::Census;
use ort::session::Session;
use ort::value::DynValue;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// A session whose only output is the logits, which stay on its device.
#[derive(Debug)]
pub(super) struct Logits {
    session: Session,
    inspection: Inspection,
    shown: String,
    output: String,
    element: DataType,
    device: Device,
    census: Census,
    running: Duration,
}

impl Logits {
    /// Opens the model at `path`. `shown` is its name in messages.
    ///
    /// # Errors
    /// Those of [`Scorer::open`](super::session::Scorer::open).
    pub fn open(
        runtime: &Runtime,
        path: &Path,
        shown: &str,
        options: &SessionOptions,
    ) -> Result<Self> {
        let mut model = open_model(path, shown)?;
        let inspection = instrument::inspect(&model, shown)?;
        let (output, element) = instrument::keep_logits(&mut model, &inspection);
        let (session, census) = commit(runtime, model, path, shown, options)?;
        let (shown, device, running) = (shown.to_owned(), options.device, Duration::ZERO);
        Ok(Self { session, inspection, shown, output, element, device, census, running })
    }

    fn run(&mut self, padded: &Padded) -> Result<DynValue> {
        let doing = format!("running {} on {} x {}", self.shown, padded.rows, padded.length);
        let mut tensors = self.inspection.feeds.tensors(padded).map_err(Error::ort(&doing))?;
        tensors.retain(|(name, _)| name != super::feeds::LABELS);
        let mut binding = self.session.create_binding().map_err(Error::ort(&doing))?;
        for (name, tensor) in &tensors {
            binding.bind_input(name.as_str(), tensor).map_err(Error::ort(&doing))?;
        }
        let memory = device_memory(self.device).map_err(Error::ort(&doing))?;
        binding.bind_output_to_device(&self.output, &memory).map_err(Error::ort(&doing))?;
        let start = Instant::now();
        let outputs = self.session.run_binding(&binding);
        self.running += start.elapsed();
        let mut outputs = outputs.map_err(Error::ort(&doing))?;
        outputs.remove(&self.output).ok_or_else(|| Error::Model {
            model: self.shown.clone(),
            reason: format!("ONNX Runtime returned no `{}`", self.output),
        })
    }
}

/// The model that variants are compared with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Reference {
    /// Its graph.
    pub path: PathBuf,
    /// Its stage.
    pub stage: String,
}

/// A variant, and its reference once that is loaded.
pub(super) struct Pair<'a> {
    runtime: &'a Runtime,
    options: SessionOptions,
    variant: Logits,
    reference: &'a Reference,
    beside: Option<Beside>,
}

struct Beside {
    reference: Logits,
    judge: Session,
    running: Duration,
}

impl<'a> Pair<'a> {
    /// Opens the variant alone, so that what it takes of memory can be told before its reference is
    /// loaded.
    ///
    /// # Errors
    /// Those of [`Logits::open`].
    pub fn open(
        runtime: &'a Runtime,
        path: &Path,
        shown: &str,
        options: SessionOptions,
        reference: &'a Reference,
    ) -> Result<Self> {
        let variant = Logits::open(runtime, path, shown, &options)?;
        Ok(Self { runtime, options, variant, reference, beside: None })
    }

    /// Kernels that the variant's nodes of domain `mx` got.
    pub fn census(&self) -> Census {
        self.variant.census
    }

    fn extents(&self, batch: &Batch) -> Result<Extents> {
        let own = Extents::of(&self.variant.inspection, &self.variant.shown, batch)?;
        let Some(beside) = &self.beside else { return Ok(own) };
        let other = Extents::of(&beside.reference.inspection, &beside.reference.shown, batch)?;
        let both = |a: usize, b: usize| match (a, b) {
            (0, fixed) | (fixed, 0) => Some(fixed),
            (a, b) => (a == b).then_some(a),
        };
        match (both(own.rows, other.rows), both(own.columns, other.columns)) {
            (Some(rows), Some(columns)) => Ok(Extents { rows, columns }),
            _ => Err(Error::Model {
                model: self.variant.shown.clone(),
                reason: format!(
                    "its inputs are fixed at {} x {}, those of {} at {} x {}: they cannot run on \
                     the same batch; pass --no-kl",
                    own.rows, own.columns, self.reference.stage, other.rows, other.columns
                ),
            }),
        }
    }

    fn part(
        &mut self,
        windows: &[Window],
        part: &Batch,
        padded: &Padded,
    ) -> Result<Vec<WindowScore>> {
        let Some(beside) = &mut self.beside else {
            self.variant.run(padded)?;
            return Ok(vec![WindowScore::default(); part.windows.len()]);
        };
        let reference = beside.reference.run(padded)?;
        let logits = self.variant.run(padded)?;
        let shapes = [&logits, &reference].map(|value| value.shape().to_vec());
        if shapes[0] != shapes[1] {
            return Err(Error::Model {
                model: self.variant.shown.clone(),
                reason: format!(
                    "its logits are {:?}, those of {} {:?}: they cannot be compared; pass --no-kl",
                    shapes[0], self.reference.stage, shapes[1]
                ),
            });
        }
        beside.judge(windows, part, padded, [&logits, &reference], &self.variant.shown)
    }
}

impl Beside {
    fn judge(
        &mut self,
        windows: &[Window],
        part: &Batch,
        padded: &Padded,
        logits: [&DynValue; 2],
        shown: &str,
    ) -> Result<Vec<WindowScore>> {
        let doing = format!("scoring {shown} on {} x {}", padded.rows, padded.length);
        let ort = |error: ort::Error| Error::ort(&doing)(error);
        let shape = vec![padded.rows, padded.length];
        let labels = super::feeds::numbers(DataType::Int64, shape, padded.labels.clone());
        let labels = labels.map_err(ort)?;
        let mut binding = self.judge.create_binding().map_err(ort)?;
        for (name, value) in JUDGED.into_iter().zip(logits) {
            binding.bind_input(name, value).map_err(ort)?;
        }
        binding.bind_input(super::feeds::LABELS, &labels).map_err(ort)?;
        let host = host_memory().map_err(ort)?;
        for (name, _) in JUDGEMENT {
            binding.bind_output_to_device(name, &host).map_err(ort)?;
        }
        let start = Instant::now();
        let outputs = self.judge.run_binding(&binding);
        self.running += start.elapsed();
        let outputs = outputs.map_err(ort)?;
        let [nll, entropy, top1, kl, reference_nll, reference_top1] =
            JUDGEMENT.map(|(name, _)| name);
        let floats = |name: &str| {
            outputs[name].try_extract_tensor::<f32>().map(|(_, values)| values).map_err(ort)
        };
        let tokens = |name: &str| {
            outputs[name].try_extract_tensor::<i64>().map(|(_, values)| values).map_err(ort)
        };
        let against = TokensAgainst {
            kl: floats(kl)?,
            nll: floats(reference_nll)?,
            top1: tokens(reference_top1)?,
        };
        let scores = Tokens {
            nll: floats(nll)?,
            entropy: floats(entropy)?,
            top1: tokens(top1)?,
            against: Some(against),
        };
        scores.windows(windows, part, padded, shown)
    }
}

impl Score for Pair<'_> {
    /// Until the reference is there the variant runs alone, and the scores say nothing.
    fn score(&mut self, windows: &[Window], batch: &Batch) -> Result<Vec<WindowScore>> {
        let extents = self.extents(batch)?;
        let mut scores = Vec::with_capacity(batch.windows.len());
        for part in extents.parts(batch) {
            let padded = Padded::new(windows, &part, extents.rows, extents.columns);
            scores.extend(self.part(windows, &part, &padded)?);
        }
        Ok(scores)
    }

    fn splits(&self) -> bool {
        let free = |logits: &Logits| logits.inspection.feeds.rows.is_none();
        free(&self.variant) && self.beside.as_ref().is_none_or(|beside| free(&beside.reference))
    }

    fn running(&self) -> Duration {
        self.variant.running + self.beside.as_ref().map_or(Duration::ZERO, |b| b.running)
    }

    fn is_pair(&self) -> bool {
        true
    }

    fn attach(&mut self) -> Result<()> {
        let Reference { path, stage } = self.reference;
        let reference = Logits::open(self.runtime, path, stage, &self.options)?;
        let judge = instrument::judge([self.variant.element, reference.element])?;
        let (judge, _) = commit(self.runtime, judge, path, "the scores", &self.options)?;
        self.beside = Some(Beside { reference, judge, running: Duration::ZERO });
        Ok(())
    }

    fn sides(&self) -> Option<[Duration; 2]> {
        self.beside.as_ref().map(|beside| [self.variant.running, beside.reference.running])
    }
}
