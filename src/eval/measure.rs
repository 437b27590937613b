//! One stage: make its graph, load it, score the corpus.

use super::describe::describe;
use super::devices::{self, Chosen, Device};
use super::error::{Error, Result};
use super::job::{Job, Task};
use super::observer::Observer;
use super::pair::Reference;
use super::process::sha256_text;
use super::record::{Record, Status};
use super::run::Options;
use super::runtime::Runtime;
use super::schedule::Batch;
use super::scores;
use super::session::open_model;
use super::stage::Stage;
use super::store::WorkFolder;
use super::windows::Corpus;
use super::workers::Engine;
use crate::onnx::{DataType, Model};
use crate::rewrite::{Activation, BaseDtype, RewriteOptions, convert_file, rewrite_file};
use serde_json::{Map, Value, json};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

/// One stage that is to be measured.
pub(super) struct Item<'a> {
    pub job: &'a Job,
    pub task: &'a Task,
    /// Number of the job and of the task in it.
    pub place: (usize, usize),
    pub corpus: Arc<Corpus>,
    pub batches: Arc<Vec<Batch>>,
    /// Indices of the batches to run: all, or those of a shard.
    pub todo: Vec<usize>,
    /// What decides whether earlier scores hold.
    pub key: &'a str,
    /// The score file.
    pub scores: PathBuf,
}

impl Item<'_> {
    /// Whether every batch of the corpus is to be run.
    pub fn is_whole(&self) -> bool {
        self.todo.len() == self.batches.len()
    }
}

/// What stages are measured with.
pub(super) struct Bench<'a> {
    pub runtime: &'a Runtime,
    pub chosen: &'a Chosen,
    pub options: &'a Options,
    /// Where rewritten models lie.
    pub work_root: PathBuf,
    pub observer: &'a dyn Observer,
    pub jobs: &'a [Job],
    /// Key of the scores of every stage, by job and task.
    pub keys: &'a [Vec<String>],
    pub items: Vec<Item<'a>>,
    /// The model that a job's stages are compared with, by job, once one of them asks.
    pub references: Vec<OnceLock<std::result::Result<MadeReference, String>>>,
    /// Whether stages are measured one after the other, so that the process's memory is the stage's.
    pub one_by_one: bool,
    pub stop: AtomicBool,
}

/// A reference, and the folder that holds its graph where it had to be made.
pub(super) struct MadeReference {
    pub reference: Reference,
    _folder: Option<WorkFolder>,
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
        if record.status == Status::Ok {
            let end = json!({"record": record, "details": details});
            if let Err(error) = scores::end(&self.items[number].scores, end) {
                (record.status, record.reason) = (Status::Failed, Some(error.to_string()));
            }
        }
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

    /// The model that a stage is compared with: the sweep's own, or the first of several graphs; none
    /// for that one itself. A reason where there should be one and it cannot be had.
    pub(super) fn reference(&self, number: usize) -> Option<std::result::Result<&Reference, &str>> {
        let Item { task, place: (job, _), .. } = &self.items[number];
        if !self.options.kl || matches!(task, Task::Sweep(Stage::Baseline)) {
            return None;
        }
        let of = if matches!(task, Task::Graph(_)) { 0 } else { *job };
        if matches!(task, Task::Graph(_)) && *job == 0 {
            return None;
        }
        let made = self.references.get(of)?.get_or_init(|| {
            Error::catch(|| self.make_reference(&self.jobs[of])).map_err(|e| e.to_string())
        });
        Some(made.as_ref().map(|made| &made.reference).map_err(String::as_str))
    }

    fn make_reference(&self, job: &Job) -> Result<MadeReference> {
        let stage = match job.tasks.first() {
            Some(Task::Graph(name)) => name.clone(),
            _ => Stage::Baseline.name(),
        };
        let sweep = matches!(job.tasks.first(), Some(Task::Sweep(_)));
        let to = self.options.rewrite.base_dtype.filter(|_| sweep);
        let to = match to {
            Some(to) if !has_weights_in(&open_model(&job.path, &job.model)?, to) => to,
            _ => {
                let reference = Reference { path: job.path.clone(), stage };
                return Ok(MadeReference { reference, _folder: None });
            }
        };
        let name = sha256_text(&format!("{} reference", job.model));
        let folder = WorkFolder::new(&self.work_root, &name[..16])?;
        let path = folder.path().join("model.onnx");
        convert_file(&job.path, &path, to, true).map_err(|e| Error::Rewrite(e.to_string()))?;
        Ok(MadeReference { reference: Reference { path, stage }, _folder: Some(folder) })
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
    use std::path::Path;

    #[test]
    fn a_model_of_the_type_is_not_converted() {
        let path = "fixtures/tinylm/dynamo/model.onnx";
        let model = Model::open(Path::new(path)).unwrap();
        assert!(has_weights_in(&model, BaseDtype::F32));
        assert!(
            !has_weights_in(&model, BaseDtype::Bf16) && !has_weights_in(&model, BaseDtype::F16)
        );
    }
}
