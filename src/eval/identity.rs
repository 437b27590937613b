//! What a run is about: digests, keys by which a later run reuses results, facts for run.json.

use super::devices::{self, Chosen, Device};
use super::error::Result;
use super::gpus::Gpu;
use super::job::{Job, KeyParts, Task};
use super::process::{now, sha256_files};
use super::run::Options;
use super::runtime::Runtime;
use super::windows::{Definition, Tokenizer};
use crate::rewrite::BaseDtype;
use serde_json::{Map, Value, json};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};

/// Digests of a job's files. One that cannot be read becomes the failure of the job's stages, not of
/// the run.
#[derive(Clone, Default)]
struct JobDigests {
    model: Option<String>,
    tokenizer: Option<String>,
}

/// Digests of everything a run reads.
#[derive(Clone, Default)]
pub(super) struct Digests {
    data: String,
    jobs: Vec<JobDigests>,
}

/// Reads the models in a thread of its own, while stages are measured already: gigabytes take a while.
pub(super) struct Hashing {
    data: String,
    thread: JoinHandle<Vec<JobDigests>>,
}

impl Hashing {
    /// Reads the data, and begins to read the models.
    ///
    /// # Errors
    /// The data cannot be read.
    pub(super) fn start(jobs: &[Job], data: &Path, definition: &Definition) -> Result<Self> {
        let data = sha256_files([data])?;
        let files: Vec<(Job, Vec<PathBuf>)> = jobs
            .iter()
            .map(|job| (job.clone(), Tokenizer::files(&job.tokenizer, definition)))
            .collect();
        let thread = thread::spawn(move || {
            let digests = |(job, tokenizer): &(Job, Vec<PathBuf>)| JobDigests {
                model: job.sha256().ok(),
                tokenizer: sha256_files(tokenizer.iter().map(PathBuf::as_path)).ok(),
            };
            files.iter().map(digests).collect()
        });
        Ok(Self { data, thread })
    }

    pub(super) fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }

    pub(super) fn wait(self) -> Digests {
        Digests { data: self.data, jobs: self.thread.join().unwrap_or_default() }
    }
}

/// Keys and facts of a run.
pub(super) struct Identity {
    /// Key of every stage, by job and task.
    pub keys: Vec<Vec<String>>,
    /// What run.json says.
    pub facts: Map<String, Value>,
}

/// What is measured, with what.
pub(super) struct Subject<'a> {
    pub jobs: &'a [Job],
    pub options: &'a Options,
    pub chosen: &'a Chosen,
    pub runtime: &'a Runtime,
    pub data: &'a Path,
}

impl Subject<'_> {
    pub(super) fn identity(&self, digests: &Digests) -> Identity {
        let of = |index: usize| digests.jobs.get(index).cloned().unwrap_or_default();
        let jobs: Vec<_> =
            self.jobs.iter().enumerate().map(|(index, job)| (job, of(index))).collect();
        let keys = jobs.iter().map(|(job, own)| self.keys(job, own, &digests.data)).collect();
        Identity { keys, facts: self.facts(&jobs, &digests.data) }
    }

    /// Key of every stage of a job.
    fn keys(&self, job: &Job, own: &JobDigests, data: &str) -> Vec<String> {
        let options = self.options;
        let place = place(self.chosen, mx_kernels::cpu::variant());
        let platform = format!("{} {place} {:?}", self.runtime.version, options.threads);
        let mut figures = format!(
            "{} {} {} {:?}",
            options.max_samples, options.definition, job.batch_size, options.rewrite
        );
        if options.kl {
            figures.push_str(" kl");
        }
        let _ = write!(figures, " {:?}", options.bootstrap);
        if options.documents {
            // Results without documents do not serve a run that keeps them.
            figures.push_str(" documents");
        }
        let key = |task: &Task| {
            let parts = KeyParts {
                model: own.model.as_deref().unwrap_or("unreadable"),
                data,
                tokenizer: own.tokenizer.as_deref().unwrap_or("unreadable"),
                stage: &task.name(),
                options: &figures,
                platform: &platform,
            };
            parts.key()
        };
        job.tasks.iter().map(key).collect()
    }

    fn facts(&self, jobs: &[(&Job, JobDigests)], data: &str) -> Map<String, Value> {
        let (options, rewrite) = (self.options, &self.options.rewrite);
        let model = |(job, own): &(&Job, JobDigests)| {
            json!({
                "model": job.model, "path": job.path, "sha256": own.model,
                "batch_size": job.batch_size,
                "tokenizer": {"path": job.tokenizer, "sha256": own.tokenizer},
            })
        };
        let facts = json!({
            "mxeval": env!("CARGO_PKG_VERSION"),
            "date": now(),
            "command": options.command,
            "device": devices::name(&self.chosen.devices),
            "gpus": self.chosen.gpus.iter().map(gpu_facts).collect::<Vec<_>>(),
            "cpu_variant": mx_kernels::cpu::variant(),
            "threads": options.threads.map_or_else(
                || json!(format!("default ({} available)", available_threads())), |t| json!(t)),
            "onnxruntime": {"version": self.runtime.version, "library": self.runtime.library},
            "models": jobs.iter().map(model).collect::<Vec<_>>(),
            "data": {"path": self.data, "sha256": data},
            "options": {
                "kl": options.kl, "seed": options.bootstrap.seed,
                "resamples": options.bootstrap.resamples,
                "max_samples": options.max_samples, "seq_len": options.definition.seq_len,
                "definition": options.definition.short(),
                "workers_per_device": options.workers_per_device,
                "shard_documents": options.shard_documents,
                "tier": rewrite.tier.name(), "block_size": rewrite.block_size,
                "rounding": rewrite.rounding.name(), "scale_rule": rewrite.scale_rule.name(),
                "base_dtype": rewrite.base_dtype.map_or("the model's", BaseDtype::name),
                "include": rewrite.include, "exclude": rewrite.exclude,
            },
            "definition": options.definition.text(),
        });
        facts.as_object().cloned().unwrap_or_default()
    }
}

/// What decides the bits of a result, apart from ONNX Runtime: which GPUs of a kind does not.
fn place(chosen: &Chosen, cpu: &str) -> String {
    let mut kinds: Vec<String> = chosen
        .gpus
        .iter()
        .map(|gpu| format!("{} {:?}", gpu.name, gpu.compute_capability))
        .collect();
    kinds.sort();
    kinds.dedup();
    if kinds.is_empty() { format!("{cpu} cpu") } else { kinds.join(" ") }
}

fn gpu_facts(gpu: &Gpu) -> Value {
    let (major, minor) = gpu.compute_capability;
    let memory = gpu.memory.as_ref().ok();
    json!({
        "device": Device::Cuda(gpu.ordinal).to_string(), "name": gpu.name, "uuid": gpu.uuid,
        "compute_capability": format!("{major}.{minor}"),
        "total_bytes": memory.map(|m| m.total), "free_bytes": memory.map(|m| m.free),
    })
}

fn available_threads() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_result_holds_on_every_gpu_of_the_kind() {
        let gpu = |ordinal, name: &str| Gpu {
            ordinal,
            name: name.into(),
            uuid: format!("{ordinal}"),
            compute_capability: (9, 0),
            memory: Err("unseen".into()),
        };
        let chosen = |gpus: Vec<Gpu>| Chosen {
            devices: gpus.iter().map(|gpu| Device::Cuda(gpu.ordinal)).collect(),
            gpus,
            note: None,
        };
        let one = place(&chosen(vec![gpu(0, "H100")]), "avx2");
        assert_eq!(one, place(&chosen(vec![gpu(1, "H100"), gpu(0, "H100")]), "avx512"));
        assert_ne!(one, place(&chosen(vec![gpu(0, "H200")]), "avx2"));
        assert_ne!(one, place(&chosen(vec![]), "avx2"));
    }
}
