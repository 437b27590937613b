//! One stage: make its graph, load it, score the corpus.

use super::describe::describe;
use super::devices::{self, Chosen, Device};
use super::error::{Error, Result};
use super::gpus::MemoryProbe;
use super::instrument;
use super::job::{Job, Task};
use super::loading::Loaded;
use super::metrics::Metrics;
use super::observer::Observer;
use super::process::{PeakDeviceMemory, PeakMemory, sha256_text};
use super::record::{Record, Status};
use super::run::Options;
use super::runtime::Runtime;
use super::schedule::Batch;
use super::score::{self, Score, Scored};
use super::session::{Scorer, SessionOptions, open_model};
use super::stage::Stage;
use super::store::WorkFolder;
use super::windows::Corpus;
use super::workers::Engine;
use crate::onnx::{DataType, Model};
use crate::rewrite::{Activation, BaseDtype, RewriteOptions, convert_file, rewrite_file};
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// One stage that is to be measured.
pub(super) struct Item<'a> {
    pub job: &'a Job,
    pub task: &'a Task,
    /// Number of the job and of the task in it.
    pub place: (usize, usize),
    pub corpus: Arc<Corpus>,
    pub batches: Arc<Vec<Batch>>,
}

/// What stages are measured with.
pub(super) struct Bench<'a> {
    pub runtime: &'a Runtime,
    pub chosen: &'a Chosen,
    pub options: &'a Options,
    /// Where rewritten models lie.
    pub work_root: PathBuf,
    pub observer: &'a dyn Observer,
    pub items: Vec<Item<'a>>,
    pub stop: AtomicBool,
}

/// A stage whose graph is made, or is known not to be.
pub(super) struct Ready {
    record: Record,
    graph: Result<Prepared>,
    /// Holds the graph on disk until it has been measured.
    folder: Option<WorkFolder>,
    seconds: f64,
}

/// How a stage's graph comes about.
enum Make {
    /// It is the model.
    AsIs,
    /// The model in another float type.
    Converted(BaseDtype),
    /// The model with layers replaced.
    Rewritten(Box<RewriteOptions>),
}

enum Prepared {
    Graph(PathBuf),
    Skipped(String),
}

/// A stage that ended.
pub(super) struct Done {
    pub number: usize,
    pub record: Record,
    /// What run.json says about it beyond the record.
    pub details: Map<String, Value>,
}

impl Engine for Bench<'_> {
    type Ready = Ready;
    type Done = Done;

    fn prepare(&self, number: usize) -> Ready {
        let Item { job, task, corpus, .. } = &self.items[number];
        let stage = task.name();
        self.observer.stage_started(number, &job.model, &stage, corpus.tokens());
        let start = Instant::now();
        let mut record = blank(job, task, self.chosen, self.options);
        let mut folder = None;
        let graph = Error::catch(|| match task {
            Task::Sweep(stage) => self.rewritten(job, *stage, &mut record, &mut folder),
            Task::Graph(_) => {
                describe(&open_model(&job.path, &job.model)?, &mut record)?;
                Ok(Prepared::Graph(job.path.clone()))
            }
        });
        Ready { record, graph, folder, seconds: start.elapsed().as_secs_f64() }
    }

    fn measure(&self, number: usize, ready: Ready, team: &[Device]) -> Option<Done> {
        let Ready { mut record, graph, folder, seconds } = ready;
        record.device = devices::name(team);
        let mut details = Map::new();
        let measured = graph.and_then(|graph| match graph {
            Prepared::Skipped(reason) => Ok((Status::Skipped, Some(reason))),
            Prepared::Graph(path) => {
                details.insert("rewrite_seconds".into(), json!(seconds));
                Error::catch(|| self.scored(number, &path, team, &mut record, &mut details))
            }
        });
        drop(folder);
        (record.status, record.reason) = match measured {
            Err(Error::Interrupted) => return None,
            Ok(ended) => ended,
            Err(error) => (Status::Failed, Some(error.to_string())),
        };
        self.observer.stage_finished(number, &record);
        Some(Done { number, record, details })
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::SeqCst) || self.observer.interrupted()
    }

    fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
    }
}

impl Bench<'_> {
    /// The stage's graph.
    fn rewritten(
        &self,
        job: &Job,
        stage: Stage,
        record: &mut Record,
        folder: &mut Option<WorkFolder>,
    ) -> Result<Prepared> {
        if stage == Stage::NvFp8
            && let Some(reason) = self.nvfp8_unavailable()
        {
            return Ok(Prepared::Skipped(reason));
        }
        let make = match self.make(stage) {
            Make::Converted(to) if has_weights_in(&open_model(&job.path, &job.model)?, to) => {
                Make::AsIs
            }
            make => make,
        };
        if matches!(make, Make::AsIs) {
            record.sites_replaced = Some(0);
            return Ok(Prepared::Graph(job.path.clone()));
        }
        let name = sha256_text(&format!("{} {stage}", job.model));
        let folder = folder.insert(WorkFolder::new(&self.work_root, &name[..16])?);
        let path = folder.path().join("model.onnx");
        let sites = match &make {
            Make::AsIs => Ok(0),
            Make::Converted(to) => convert_file(&job.path, &path, *to, true).map(|_| 0),
            Make::Rewritten(options) => {
                rewrite_file(&job.path, &path, options).map(|report| report.sites)
            }
        };
        record.sites_replaced = Some(sites.map_err(|e| Error::Rewrite(e.to_string()))? as u64);
        Ok(Prepared::Graph(path))
    }

    fn nvfp8_unavailable(&self) -> Option<String> {
        let cublaslt = || mx_kernels::cuda::blas::available().map_err(|e| e.to_string());
        match &self.chosen.gpus[..] {
            [] => devices::nvfp8_unavailable(None, &cublaslt),
            gpus => gpus.iter().find_map(|gpu| devices::nvfp8_unavailable(Some(gpu), &cublaslt)),
        }
    }

    /// How the stage's graph is made.
    fn make(&self, stage: Stage) -> Make {
        let rewrite = self.options.rewrite.clone();
        let Some(lowering) = stage.lowering() else {
            return rewrite.base_dtype.map_or(Make::AsIs, Make::Converted);
        };
        let format = match stage {
            Stage::Mx(format) => Some(format),
            _ => None,
        };
        if stage == Stage::Bf16 && self.chosen.on_gpu() {
            // A GPU computes in bfloat16; the CPU rounds to it.
            return Make::Converted(BaseDtype::Bf16);
        }
        let base_dtype =
            rewrite.base_dtype.filter(|&base| stage != Stage::Bf16 || base == BaseDtype::F32);
        let threads = rewrite.threads.or_else(|| self.rewrite_threads());
        let base = match stage {
            Stage::Mx(_) | Stage::MxTierC | Stage::MxTierD => rewrite,
            // The other lowerings have one format, no blocks and no shared exponent.
            _ => RewriteOptions {
                tier: rewrite.tier,
                include: rewrite.include,
                exclude: rewrite.exclude,
                ..RewriteOptions::default()
            },
        };
        let overwrite = true;
        let options = RewriteOptions { lowering, format, base_dtype, threads, overwrite, ..base };
        Make::Rewritten(Box::new(options))
    }

    /// While GPUs measure, a CPU is left for each of them.
    fn rewrite_threads(&self) -> Option<usize> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        self.chosen.on_gpu().then(|| cores.saturating_sub(self.chosen.devices.len()).max(1))
    }

    /// Scores the graph at `path` and fills in `record`.
    fn scored(
        &self,
        number: usize,
        path: &Path,
        team: &[Device],
        record: &mut Record,
        details: &mut Map<String, Value>,
    ) -> Result<(Status, Option<String>)> {
        let Item { job, task, corpus, batches, .. } = &self.items[number];
        let peak = PeakMemory::start();
        let device_peak = self.watch(team);
        let model = open_model(path, &job.model)?;
        let files = instrument::files(path, &model)?;
        record.model_bytes = Some(files.iter().map(|(_, bytes)| bytes).sum());
        drop(model);
        let work = score::Work {
            windows: &corpus.windows,
            batches,
            warm_up: self.chosen.on_gpu(),
            progress: &|tokens| self.observer.progress(number, tokens),
            warn: &|text| self.observer.warn(&format!("{}: {text}", task.name())),
            interrupted: &|| self.stopped(),
        };
        let loaded = Loaded::default();
        let open = |device| self.open(path, &task.name(), device, &loaded);
        let scored = score::score(&work, team, &open)?;
        record.peak_memory_bytes = match device_peak {
            Some((watch, before)) => watch.bytes().map(|bytes| bytes.saturating_sub(before)),
            None => peak.bytes(),
        };
        self.tell(&scored, &loaded, details);
        let (status, remark) = conclude(&scored, record);
        let fp8 = matches!(task, Task::Sweep(Stage::NvFp8)) && status == Status::Ok;
        let without = fp8.then(|| loaded.without_fp8(record.sites_replaced.unwrap_or(0)));
        let remarks: Vec<String> = remark.into_iter().chain(without.flatten()).collect();
        Ok((status, (!remarks.is_empty()).then(|| remarks.join("; "))))
    }

    /// Watches the memory of the team's GPUs; with it, what was in use before the run.
    fn watch(&self, team: &[Device]) -> Option<(PeakDeviceMemory, u64)> {
        let mut uuids: Vec<String> = Vec::new();
        let mut before = 0;
        for gpu in team.iter().filter_map(|&device| self.chosen.gpu(device)) {
            if !uuids.contains(&gpu.uuid) {
                before += gpu.memory.as_ref().ok()?.used();
                uuids.push(gpu.uuid.clone());
            }
        }
        let watch = if uuids.is_empty() { None } else { PeakDeviceMemory::start(uuids) };
        watch.map(|watch| (watch, before))
    }

    /// Loads the graph on a device; notes in `loaded` what that showed.
    fn open(
        &self,
        path: &Path,
        stage: &str,
        device: Device,
        loaded: &Loaded,
    ) -> Result<Box<dyn Score>> {
        if let Device::Cuda(ordinal) = device {
            // The context exists before memory is looked at. Without it the session fails, and says why.
            let _ = mx_kernels::cuda::Gpu::get(ordinal);
        }
        let gpu = self.chosen.gpu(device);
        let used = || gpu.and_then(|gpu| MemoryProbe::new()?.used(&gpu.uuid));
        let before = used();
        let options =
            SessionOptions { device, threads: self.options.threads, debug: self.options.debug };
        let scorer = Scorer::open(self.runtime, path, stage, &options)?;
        if let Some((before, after)) = before.zip(used()) {
            loaded.add_bytes(after.saturating_sub(before));
        }
        loaded.note(scorer.census());
        Ok(Box::new(scorer))
    }

    fn tell(&self, scored: &Scored, loaded: &Loaded, details: &mut Map<String, Value>) {
        details.insert("load_seconds".into(), json!(scored.load_seconds));
        details.insert("outside_run_seconds".into(), json!(scored.outside_run_seconds));
        details.insert("outside_run_share".into(), json!(scored.outside_run_share()));
        if self.chosen.on_gpu() {
            loaded.tell(details);
        }
        if let Some(rows) = scored.halved_to {
            details.insert("batch_halved_to".into(), json!(rows));
        }
        if self.options.documents {
            let nll: Vec<f64> = scored.documents.iter().map(|document| document.nll).collect();
            let tokens: Vec<u64> =
                scored.documents.iter().map(|document| document.tokens).collect();
            details.insert("documents".into(), json!({"nll": nll, "tokens": tokens}));
        }
    }
}

/// Whether the model is one of this type already, and a copy of its gigabytes would be the same:
/// every float matrix is. Constants that an exporter kept in float32 stay as they are.
fn has_weights_in(model: &Model, to: BaseDtype) -> bool {
    let floats = [DataType::Float, DataType::Float16, DataType::Bfloat16, DataType::Double];
    let matrices = model.graph().initializers().filter(|tensor| tensor.dims.len() >= 2);
    let mut types = matrices.filter_map(|tensor| tensor.data_type()).filter(|t| floats.contains(t));
    types.next().is_some_and(|first| first == to.data_type() && types.all(|t| t == first))
}

/// The record's figures, and how the stage ended.
fn conclude(scored: &Scored, record: &mut Record) -> (Status, Option<String>) {
    let documents = &scored.documents;
    let bad = documents.iter().filter(|d| !(d.nll.is_finite() && d.entropy.is_finite()));
    match (bad.count(), Metrics::new(documents)) {
        (0, Some(metrics)) => {
            record.set_metrics(&metrics, scored.seconds);
            let halved = scored
                .halved_to
                .map(|rows| format!("out of memory: batches cut to as few as {rows} documents"));
            (Status::Ok, halved)
        }
        (0, None) => (Status::Failed, Some("no token was scored".into())),
        (bad, _) => {
            let documents = documents.len();
            let text = format!(
                "the loss is not finite in {bad} of {documents} documents: the model returns NaN or \
                 Inf"
            );
            (Status::Failed, Some(text))
        }
    }
}

/// A record of a stage that has not ended.
pub(super) fn blank(job: &Job, task: &Task, chosen: &Chosen, options: &Options) -> Record {
    let device = devices::name(&chosen.devices);
    let mut record = Record::new(&job.model, &task.name(), &device, Status::Failed);
    record.definition = Some(options.definition.short());
    if let Task::Sweep(stage) = task {
        let rewrite = &options.rewrite;
        record.tier = stage.follows_tier().then(|| rewrite.tier.name().to_owned());
        if let Some((weight, activation)) = stage.formats() {
            let mx = matches!(stage, Stage::Mx(_) | Stage::MxTierC | Stage::MxTierD);
            let activation = match rewrite.activation {
                Activation::None if mx => "none",
                Activation::Format(format) if mx => format.name(),
                _ => activation,
            };
            record.weight_format = Some(weight.into());
            record.activation_format = Some(activation.into());
        }
    }
    record
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_of_the_type_is_not_converted() {
        let path = "fixtures/tinylm/dynamo/model.onnx";
        let model = Model::open(Path::new(path)).unwrap();
        assert!(has_weights_in(&model, BaseDtype::F32));
        assert!(
            !has_weights_in(&model, BaseDtype::Bf16) && !has_weights_in(&model, BaseDtype::F16)
        );
    }

    #[test]
    fn a_batch_that_was_cut_is_a_remark_and_nan_a_failure() {
        let document = |nll| crate::eval::metrics::DocumentScore {
            nll,
            entropy: 1.0,
            correct: 0,
            tokens: 2,
            bytes: 7,
            against: None,
        };
        let scored = |nll, halved_to| Scored {
            documents: vec![document(nll), document(3.0)],
            seconds: 1.0,
            halved_to,
            ..Scored::default()
        };
        let mut record = Record::new("m", "baseline", "cuda:0", Status::Failed);
        assert_eq!(conclude(&scored(1.0, None), &mut record), (Status::Ok, None));
        assert_eq!(record.xent, Some(1.0));
        let (status, reason) = conclude(&scored(1.0, Some(4)), &mut record);
        assert!(status == Status::Ok && reason.unwrap().contains("as few as 4"));
        let (status, reason) = conclude(&scored(f64::NAN, None), &mut record);
        assert!(status == Status::Failed && reason.unwrap().contains("1 of 2 documents"));
    }
}
