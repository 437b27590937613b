//! A model in ONNX Runtime, set up to return scores instead of logits.

use super::devices::Device;
use super::error::{Error, Result};
use super::instrument::{self, Inspection};
use super::metrics::{Against, DocumentScore, WindowScore};
use super::runtime::{self, Runtime};
use super::schedule::{Batch, MASKED, Padded};
use super::score::Score;
use super::windows::Window;
use crate::onnx::Model;
use mx_custom_ops::census;
use ort::memory::{AllocationDevice, AllocatorType, MemoryInfo, MemoryType};
use ort::session::builder::{GraphOptimizationLevel, SessionBuilder};
use std::path::Path;
use std::time::{Duration, Instant};

/// A session that scores batches of windows inside the graph.
#[derive(Debug)]
pub struct Scorer {
    session: ort::session::Session,
    inspection: Inspection,
    shown: String,
    census: census::Census,
    /// Time inside ONNX Runtime's runs.
    running: Duration,
}

/// How a session is set up.
#[derive(Clone, Copy, Debug)]
pub struct SessionOptions {
    /// Where it runs.
    pub device: Device,
    /// Threads of one operator; `None` = one a physical core.
    pub threads: Option<usize>,
    /// Let ONNX Runtime log what it does.
    pub debug: bool,
}

impl Scorer {
    /// Opens the model at `path` with the scoring node appended. `shown` is its name in messages.
    ///
    /// # Errors
    /// The file is no model, no causal language model, ONNX Runtime refuses it, or a node of domain
    /// `mx` has no kernel on the GPU that was asked for.
    pub fn open(
        runtime: &Runtime,
        path: &Path,
        shown: &str,
        options: &SessionOptions,
    ) -> Result<Self> {
        let mut model = open_model(path, shown)?;
        let inspection = instrument::inspect(&model, shown)?;
        instrument::append_scores(&mut model, &inspection);
        let (session, census) = commit(runtime, model, path, shown, options)?;
        let (shown, running) = (shown.to_owned(), Duration::ZERO);
        Ok(Self { session, inspection, shown, census, running })
    }

    /// Kernels that the session's nodes of domain `mx` got.
    pub fn census(&self) -> census::Census {
        self.census
    }

    /// What the graph looks like.
    pub fn inspection(&self) -> &Inspection {
        &self.inspection
    }

    fn run(
        &mut self,
        windows: &[Window],
        batch: &Batch,
        padded: &Padded,
    ) -> Result<Vec<WindowScore>> {
        let doing = format!("running {} on {} x {}", self.shown, padded.rows, padded.length);
        let tensors = self.inspection.feeds.tensors(padded).map_err(Error::ort(&doing))?;
        // A binding is good for one run: ONNX Runtime keeps the outputs of the last one, whose
        // shapes differ. Inputs go to the device here, once; the scores come back, the logits stay.
        let mut binding = self.session.create_binding().map_err(Error::ort(&doing))?;
        for (name, tensor) in &tensors {
            binding.bind_input(name.as_str(), tensor).map_err(Error::ort(&doing))?;
        }
        let host = host_memory().map_err(Error::ort(&doing))?;
        for (name, _) in instrument::OUTPUTS {
            binding.bind_output_to_device(name, &host).map_err(Error::ort(&doing))?;
        }
        let start = Instant::now();
        let outputs = self.session.run_binding(&binding);
        self.running += start.elapsed();
        let outputs = outputs.map_err(Error::ort(&doing))?;
        let [(nll, _), (entropy, _), (top1, _)] = instrument::OUTPUTS;
        let (_, nll) = outputs[nll].try_extract_tensor::<f32>().map_err(Error::ort(&doing))?;
        let (_, entropy) =
            outputs[entropy].try_extract_tensor::<f32>().map_err(Error::ort(&doing))?;
        let (_, top1) = outputs[top1].try_extract_tensor::<i64>().map_err(Error::ort(&doing))?;
        let tokens = Tokens { nll, entropy, top1, against: None };
        tokens.windows(windows, batch, padded, &self.shown)
    }
}

impl Score for Scorer {
    /// A graph with a fixed number of rows is run several times, with rows that score nothing in
    /// the last run.
    fn score(&mut self, windows: &[Window], batch: &Batch) -> Result<Vec<WindowScore>> {
        let extents = Extents::of(&self.inspection, &self.shown, batch)?;
        let mut scores = Vec::with_capacity(batch.windows.len());
        for part in extents.parts(batch) {
            let padded = Padded::new(windows, &part, extents.rows, extents.columns);
            scores.extend(self.run(windows, &part, &padded)?);
        }
        Ok(scores)
    }

    fn splits(&self) -> bool {
        self.inspection.feeds.rows.is_none()
    }

    fn running(&self) -> Duration {
        self.running
    }
}

/// Loads a model that was edited; its external data lies beside `path`.
pub(super) fn commit(
    runtime: &Runtime,
    model: Model,
    path: &Path,
    shown: &str,
    options: &SessionOptions,
) -> Result<(ort::session::Session, census::Census)> {
    let bytes = model
        .to_bytes()
        .map_err(|e| Error::Model { model: shown.into(), reason: e.to_string() })?;
    drop(model);
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    census::reset();
    let session = builder(runtime, folder, options)
        .and_then(|mut builder| builder.commit_from_memory(&bytes))
        .map_err(Error::ort(format!("loading {shown} on {}", options.device)))?;
    let census = census::made();
    check_census(options.device, census, shown)?;
    Ok((session, census))
}

/// The rows and columns that graphs want; 0 = what the batch has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Extents {
    pub rows: usize,
    pub columns: usize,
}

impl Extents {
    /// Those of one graph.
    pub fn of(inspection: &Inspection, shown: &str, batch: &Batch) -> Result<Self> {
        let feeds = &inspection.feeds;
        if let Some(columns) = feeds.columns.filter(|&columns| columns < batch.length) {
            return Err(Error::Model {
                model: shown.into(),
                reason: format!(
                    "its sequence length is fixed at {columns}: pass --seq-len {columns} or less, \
                     or export it with a dynamic sequence"
                ),
            });
        }
        Ok(Self { rows: feeds.rows.unwrap_or(0), columns: feeds.columns.unwrap_or(0) })
    }

    /// A batch in as many parts as the rows ask for.
    pub fn parts<'b>(&self, batch: &'b Batch) -> impl Iterator<Item = Batch> + 'b {
        let rows = if self.rows == 0 { batch.windows.len() } else { self.rows };
        let part = |chunk: &[usize]| Batch { windows: chunk.to_vec(), length: batch.length };
        batch.windows.chunks(rows.max(1)).map(part)
    }
}

/// Scores of every position of a padded batch.
pub(super) struct Tokens<'a> {
    pub nll: &'a [f32],
    pub entropy: &'a [f32],
    pub top1: &'a [i64],
    pub against: Option<TokensAgainst<'a>>,
}

/// The same against a reference.
pub(super) struct TokensAgainst<'a> {
    pub kl: &'a [f32],
    pub nll: &'a [f32],
    pub top1: &'a [i64],
}

impl Tokens<'_> {
    /// Sums of the batch's windows over their labelled positions.
    pub fn windows(
        &self,
        windows: &[Window],
        batch: &Batch,
        padded: &Padded,
        shown: &str,
    ) -> Result<Vec<WindowScore>> {
        let expected = padded.labels.len();
        let lengths = [self.nll.len(), self.entropy.len(), self.top1.len()];
        let further = self.against.as_ref().map(|a| [a.kl.len(), a.nll.len(), a.top1.len()]);
        if let Some(wrong) =
            lengths.into_iter().chain(further.into_iter().flatten()).find(|&n| n != expected)
        {
            return Err(Error::Model {
                model: shown.into(),
                reason: format!("returned {wrong} scores for {expected} positions"),
            });
        }
        let rows = batch.windows.iter().enumerate();
        Ok(rows.map(|(row, &index)| self.row(row, padded, windows[index].bytes)).collect())
    }

    fn row(&self, row: usize, padded: &Padded, bytes: u64) -> WindowScore {
        let mut score = DocumentScore { bytes, ..DocumentScore::default() };
        let mut sums = Against::default();
        let mut divergence = Vec::new();
        for position in row * padded.length..(row + 1) * padded.length {
            let label = padded.labels[position];
            if label == MASKED {
                continue;
            }
            let nll = f64::from(self.nll[position]);
            score.nll += nll;
            score.entropy += f64::from(self.entropy[position]);
            score.correct += u64::from(self.top1[position] == label);
            score.tokens += 1;
            if let Some(against) = &self.against {
                let other = f64::from(against.nll[position]);
                let delta_p = (-nll).exp() - (-other).exp();
                sums.nll += other;
                sums.correct += u64::from(against.top1[position] == label);
                sums.kl += f64::from(against.kl[position]);
                sums.agree += u64::from(against.top1[position] == self.top1[position]);
                sums.delta_p += delta_p;
                sums.delta_p_squared += delta_p * delta_p;
                divergence.push(against.kl[position]);
            }
        }
        score.against = self.against.is_some().then_some(sums);
        WindowScore { score, kl: divergence }
    }
}

/// Where scores are read.
pub(super) fn host_memory() -> ort::Result<MemoryInfo<'static>> {
    device_memory(Device::Cpu)
}

/// Where a device keeps its values.
pub(super) fn device_memory(device: Device) -> ort::Result<MemoryInfo<'static>> {
    let (at, ordinal) = match device {
        Device::Cpu => (AllocationDevice::CPU, 0),
        Device::Cuda(ordinal) => (AllocationDevice::CUDA, ordinal.cast_signed()),
    };
    MemoryInfo::new(at, ordinal, AllocatorType::Device, MemoryType::Default)
}

/// Refuses a session on a GPU of which a node of domain `mx` fell back to the CPU: its figures would
/// be right and its speed a lie.
fn check_census(device: Device, made: census::Census, shown: &str) -> Result<()> {
    if device == Device::Cpu || made.cpu == 0 {
        return Ok(());
    }
    Err(Error::Model {
        model: shown.into(),
        reason: format!(
            "{} of its {} nodes of domain `mx` have no kernel on {device} and would run on the CPU; \
             pass --device cpu, or --debug to see which",
            made.cpu,
            made.cpu + made.cuda
        ),
    })
}

/// Opens a model file; errors name it as the user did.
///
/// # Errors
/// The file cannot be read, is no ONNX model or is of a later version of the operators.
pub fn open_model(path: &Path, shown: &str) -> Result<Model> {
    Model::open(path).map_err(|e| Error::Model { model: shown.into(), reason: e.to_string() })
}

/// A session as mxeval sets it up; external data is looked for in `folder`.
pub(crate) fn builder(
    runtime: &Runtime,
    folder: &Path,
    options: &SessionOptions,
) -> ort::Result<SessionBuilder> {
    let folder = std::path::absolute(folder).unwrap_or_else(|_| folder.into());
    // Errors come back as errors; printed as well they would be there twice.
    let log =
        if options.debug { ort::logging::LogLevel::Info } else { ort::logging::LogLevel::Fatal };
    let mut builder = ort::session::Session::builder(&runtime.environment)?
        .with_operators(mx_custom_ops::operator_domain()?)?
        .with_optimization_level(GraphOptimizationLevel::All)?
        // Batches differ in length: a plan per shape would only be kept, never used again.
        .with_memory_pattern(false)?
        .with_log_level(log)?
        .with_config_entry(
            "session.model_external_initializers_file_folder_path",
            folder.to_string_lossy(),
        )?
        // The default fuses int8 weights into an operator that quantises activations as well.
        .with_config_entry("session.qdq_matmulnbits_accuracy_level", "1")?;
    if let Some(threads) = options.threads {
        builder = builder.with_intra_threads(threads)?;
    }
    if let Device::Cuda(ordinal) = options.device {
        // What is left to the CPU are shapes: a pool of spinning threads a session would only take
        // time from the threads that feed the GPUs.
        if options.threads.is_none() {
            builder = builder.with_intra_threads(2)?;
        }
        // Not `with_deterministic_compute`: it sends every reduction to cuDNN, which may be absent,
        // and those over the last axis, the only ones of a language model, are deterministic anyway.
        builder = builder
            .with_intra_op_spinning(false)?
            .with_execution_providers([runtime::cuda(ordinal)])?;
    }
    Ok(builder)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn padded(labels: &[i64]) -> Padded {
        let (rows, length, none) = (1, labels.len(), vec![0; labels.len()]);
        Padded { rows, length, ids: none.clone(), mask: none, labels: labels.to_vec() }
    }

    #[test]
    fn only_labelled_positions_count() {
        let tokens = Tokens {
            nll: &[0.5, 100.0, 1.5, 100.0],
            entropy: &[1.0, 100.0, 2.0, 100.0],
            top1: &[7, 0, 8, 0],
            against: None,
        };
        let found = tokens.row(0, &padded(&[7, MASKED, 9, MASKED]), 11);
        let score = DocumentScore {
            nll: 2.0,
            entropy: 3.0,
            correct: 1,
            tokens: 2,
            bytes: 11,
            against: None,
        };
        assert_eq!(found, WindowScore { score, kl: vec![] });
    }

    #[test]
    fn a_reference_is_compared_token_by_token() {
        let ln2 = std::f32::consts::LN_2;
        let tokens = Tokens {
            nll: &[ln2, 9.0, 2.0 * ln2],
            entropy: &[1.0, 9.0, 2.0],
            top1: &[7, 0, 8],
            against: Some(TokensAgainst {
                kl: &[0.25, 9.0, 0.5],
                nll: &[2.0 * ln2, 9.0, ln2],
                top1: &[7, 1, 9],
            }),
        };
        let found = tokens.row(0, &padded(&[7, MASKED, 9]), 4);
        assert_eq!(found.kl, [0.25, 0.5]);
        let against = found.score.against.unwrap();
        assert_eq!((against.correct, against.agree, against.kl), (2, 1, 0.75));
        // p goes from 1/4 to 1/2 and from 1/2 to 1/4.
        assert!(against.delta_p.abs() < 1e-7 && (against.delta_p_squared - 0.125).abs() < 1e-7);
        assert!((against.nll - 3.0 * f64::from(ln2)).abs() < 1e-6);
    }

    #[test]
    fn lengths_that_do_not_fit_are_an_error() {
        let tokens = Tokens { nll: &[0.0], entropy: &[0.0, 0.0], top1: &[0, 0], against: None };
        let batch = Batch { windows: vec![0], length: 2 };
        let windows = [Window::whole(vec![1, 2], 1, 0)];
        let error = tokens.windows(&windows, &batch, &padded(&[7, MASKED]), "m").unwrap_err();
        assert!(error.to_string().contains("1 scores for 2 positions"), "{error}");
    }

    #[test]
    fn a_node_that_fell_back_to_the_cpu_is_refused_on_a_gpu() {
        let made = census::Census { cpu: 2, cuda: 3, fp8: 1 };
        assert!(check_census(Device::Cpu, made, "m").is_ok());
        let error = check_census(Device::Cuda(0), made, "m").unwrap_err().to_string();
        assert!(error.contains("2 of its 5 nodes") && error.contains("cuda:0"), "{error}");
        assert!(check_census(Device::Cuda(0), census::Census { cpu: 0, ..made }, "m").is_ok());
    }
}
