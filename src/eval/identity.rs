//! What a run is about: digests, keys by which a later run reuses results, facts for run.json.

use super::corpus::{Source, Text};
use super::devices::{self, Chosen, Device};
use super::gpus::Gpu;
use super::job::{Job, KeyParts, Task};
use super::process::{now, sha256_files, sha256_text};
use super::run::Options;
use super::runtime::Runtime;
use super::windows::{Definition, Tokenizer};
use crate::rewrite::BaseDtype;
use serde_json::{Map, Value, json};
use std::path::PathBuf;
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
    /// Of the documents that are used.
    pub documents: String,
    /// Of the text's files, in order.
    files: Vec<FileFacts>,
    jobs: Vec<JobDigests>,
}

/// What is known of a file of the text.
#[derive(Clone)]
struct FileFacts {
    path: PathBuf,
    bytes: Option<u64>,
    /// Of the whole file, or why it is not known.
    sha256: std::result::Result<String, String>,
}

/// Bytes of text files that are read for a digest of the whole. It is for the record only, as
/// results go by the documents used, and must not cost more than these.
const HASHED: u64 = 256 << 20;

impl FileFacts {
    /// Reads a file, where no more than `left` bytes do, and takes its bytes from `left`.
    fn read(source: &Source, left: &mut u64) -> Self {
        let bytes = source.path().and_then(|path| Some(std::fs::metadata(path).ok()?.len()));
        let sha256 = match (source.path(), bytes) {
            (Some(path), Some(bytes)) if bytes <= *left => {
                *left -= bytes;
                sha256_files([path]).map_err(|error| error.to_string())
            }
            (Some(_), Some(_)) => Err("too large to be read as a whole".into()),
            (Some(_), None) => Err("unreadable".into()),
            (None, _) => Err("remote, and read in part".into()),
        };
        Self { path: source.name(), bytes, sha256 }
    }

    fn json(&self) -> Value {
        let mut value = json!({"path": self.path, "bytes": self.bytes});
        value["sha256"] = json!(self.sha256.as_ref().ok());
        if let Err(reason) = &self.sha256 {
            value["sha256_missing"] = json!(reason);
        }
        value
    }
}

/// Reads models and text in a thread of its own, while the text is tokenised: gigabytes take a
/// while.
pub(super) struct Hashing {
    thread: JoinHandle<Digests>,
}

impl Hashing {
    /// Begins to read.
    pub(super) fn start(jobs: &[Job], sources: &[Source], definition: &Definition) -> Self {
        let files: Vec<(Job, Vec<PathBuf>)> = jobs
            .iter()
            .map(|job| (job.clone(), Tokenizer::files(&job.tokenizer, definition)))
            .collect();
        let sources = sources.to_vec();
        let thread = thread::spawn(move || {
            let digests = |(job, tokenizer): &(Job, Vec<PathBuf>)| JobDigests {
                model: job.sha256().ok(),
                tokenizer: sha256_files(tokenizer.iter().map(PathBuf::as_path)).ok(),
            };
            let mut left = HASHED;
            Digests {
                documents: String::new(),
                files: sources.iter().map(|source| FileFacts::read(source, &mut left)).collect(),
                jobs: files.iter().map(digests).collect(),
            }
        });
        Self { thread }
    }

    pub(super) fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }

    pub(super) fn wait(self) -> Digests {
        self.thread.join().unwrap_or_default()
    }
}

/// Keys and facts of a run.
pub(super) struct Identity {
    /// Key of every stage's record, by job and task.
    pub keys: Vec<Vec<String>>,
    /// Key of its scores, which other intervals are made of as well.
    pub scores: Vec<Vec<String>>,
    /// What run.json says.
    pub facts: Map<String, Value>,
}

/// What is measured, with what.
pub(super) struct Subject<'a> {
    pub jobs: &'a [Job],
    pub options: &'a Options,
    pub chosen: &'a Chosen,
    pub runtime: &'a Runtime,
    pub data: &'a Text,
}

impl Subject<'_> {
    pub(super) fn identity(&self, digests: &Digests) -> Identity {
        let of = |index: usize| digests.jobs.get(index).cloned().unwrap_or_default();
        let jobs: Vec<_> =
            self.jobs.iter().enumerate().map(|(index, job)| (job, of(index))).collect();
        let first = of(0).model.unwrap_or_default();
        let scores: Vec<Vec<String>> =
            jobs.iter().map(|(job, own)| self.keys(job, own, &digests.documents, &first)).collect();
        // Results without documents do not serve a run that keeps them.
        let further = format!("{:?} {}", self.options.bootstrap, self.options.documents);
        let record = |key: &String| sha256_text(&format!("{key}\n{further}"));
        let keys = scores.iter().map(|keys| keys.iter().map(record).collect()).collect();
        Identity { keys, scores, facts: self.facts(&jobs, digests) }
    }

    /// Key of the scores of every stage of a job. `first` is the digest of the first job's model, which graphs are
    /// compared with.
    fn keys(&self, job: &Job, own: &JobDigests, data: &str, first: &str) -> Vec<String> {
        let options = self.options;
        let place = place(self.chosen, mx_kernels::cpu::variant());
        let platform = format!("{} {place} {:?}", self.runtime.version, options.threads);
        let mut figures = format!(
            "{} {} {} {:?}",
            options.max_samples, options.definition, job.batch_size, options.rewrite
        );
        if options.kl {
            figures.push_str(" kl");
            if job.tasks.iter().any(|task| matches!(task, Task::Graph(_))) {
                figures.push_str(first);
            }
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

    /// The text: `path` and `sha256` are those of the only file, else null.
    fn data(&self, digests: &Digests) -> Value {
        let files: Vec<_> = digests.files.iter().map(FileFacts::json).collect();
        let only = |field: &str| match files.as_slice() {
            [file] => file[field].clone(),
            _ => Value::Null,
        };
        json!({
            "path": only("path"), "sha256": only("sha256"),
            "documents_sha256": digests.documents,
            "shuffle_seed": self.data.seed(), "files": files,
        })
    }

    fn facts(&self, jobs: &[(&Job, JobDigests)], digests: &Digests) -> Map<String, Value> {
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
            "data": self.data(digests),
            "options": {
                "kl": options.kl, "bootstrap_seed": options.bootstrap.seed,
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
