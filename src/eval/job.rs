//! What a run consists of: models, each with its tokenizer, batch size and stages.

use super::error::{Error, Result};
use super::instrument;
use super::process::{sha256_files, sha256_text};
use super::session::open_model;
use super::stage::Stage;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// One stage of a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Task {
    /// A precision of a sweep: the job's model is rewritten for it.
    Sweep(Stage),
    /// The job's graph as it is, under this name.
    Graph(String),
}

impl Task {
    /// The stage's name in records.
    pub fn name(&self) -> String {
        match self {
            Self::Sweep(stage) => stage.name(),
            Self::Graph(name) => name.clone(),
        }
    }
}

/// A model to measure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Job {
    /// Its name in records and messages.
    pub model: String,
    /// The graph.
    pub path: PathBuf,
    /// Its tokenizer.json.
    pub tokenizer: PathBuf,
    /// Windows that run together.
    pub batch_size: usize,
    /// What to measure.
    pub tasks: Vec<Task>,
}

impl Job {
    /// A sweep of one model.
    pub fn sweep(path: &Path, tokenizer: &Path, batch_size: usize, stages: &[Stage]) -> Self {
        Self {
            model: path.display().to_string(),
            path: path.into(),
            tokenizer: tokenizer.into(),
            batch_size,
            tasks: stages.iter().copied().map(Task::Sweep).collect(),
        }
    }

    /// Graphs measured as they are: the stage is the file's stem, with as much of the path in front
    /// as tells equal stems apart.
    pub fn graphs(paths: &[PathBuf], tokenizer: &Path, batch_size: usize) -> Vec<Self> {
        let names = stage_names(paths);
        let jobs = paths.iter().zip(names).map(|(path, name)| Self {
            model: path.display().to_string(),
            path: path.clone(),
            tokenizer: tokenizer.into(),
            batch_size,
            tasks: vec![Task::Graph(name)],
        });
        jobs.collect()
    }

    /// Digest of the graph's file and its external data.
    ///
    /// # Errors
    /// The model cannot be opened, or a file of it cannot be read.
    pub fn sha256(&self) -> Result<String> {
        let model = open_model(&self.path, &self.model)?;
        let files = instrument::files(&self.path, &model)?;
        sha256_files(files.iter().map(|(path, _)| path.as_path()))
    }
}

/// Stems of the paths; equal ones get their folders in front.
fn stage_names(paths: &[PathBuf]) -> Vec<String> {
    let tail = |path: &Path, parts: usize| {
        let path = path.with_extension("");
        let names: Vec<_> = path.iter().map(|part| part.to_string_lossy().into_owned()).collect();
        names[names.len().saturating_sub(parts)..].join("/")
    };
    let deepest = paths.iter().map(|path| path.iter().count()).max().unwrap_or(1);
    (1..=deepest.max(1))
        .map(|parts| paths.iter().map(|path| tail(path, parts)).collect::<Vec<_>>())
        .find(|names| {
            let mut sorted = names.clone();
            sorted.sort();
            sorted.windows(2).all(|pair| pair[0] != pair[1])
        })
        .unwrap_or_else(|| {
            let numbered = paths.iter().enumerate();
            numbered.map(|(index, path)| format!("{}#{}", tail(path, 1), index + 1)).collect()
        })
}

/// What decides whether an earlier result of a stage still holds.
#[derive(Clone, Debug)]
pub struct KeyParts<'a> {
    /// Digest of the model.
    pub model: &'a str,
    /// Digest of the evaluation text.
    pub data: &'a str,
    /// Digest of the tokenizer.
    pub tokenizer: &'a str,
    /// The stage.
    pub stage: &'a str,
    /// Every option that can change a figure.
    pub options: &'a str,
    /// ONNX Runtime and CPU variant.
    pub platform: &'a str,
}

impl KeyParts<'_> {
    /// The key.
    pub fn key(&self) -> String {
        let Self { model, data, tokenizer, stage, options, platform } = self;
        let version = env!("CARGO_PKG_VERSION");
        sha256_text(&[version, model, data, tokenizer, stage, options, platform].join("\n"))
    }
}

/// `scripts/models.toml`, as far as mxeval reads it.
#[derive(Clone, Debug, Deserialize)]
struct ModelList {
    models: BTreeMap<String, ListedModel>,
}

#[derive(Clone, Debug, Deserialize)]
struct ListedModel {
    batch_size: usize,
}

/// The jobs of a list of models whose exports lie under `folder` as NAME/model.onnx with
/// NAME/tokenizer.json beside it.
#[derive(Clone, Debug, Default)]
pub struct ListedJobs {
    /// Models that are there.
    pub jobs: Vec<Job>,
    /// One line for each that is not.
    pub missing: Vec<String>,
}

/// Reads a list of models. `names` picks some of them; `batch_size` overrides the list's.
///
/// # Errors
/// The file is not readable or no such list, a name is not in it, or none of the models is there.
pub fn listed(
    list: &Path,
    folder: &Path,
    names: &[String],
    batch_size: Option<usize>,
    stages: &[Stage],
) -> Result<ListedJobs> {
    let text = std::fs::read_to_string(list).map_err(Error::io(list))?;
    let parsed: ModelList = toml::from_str(&text)
        .map_err(|e| Error::Usage(format!("{}: {}", list.display(), e.message())))?;
    if let Some(name) = names.iter().find(|name| !parsed.models.contains_key(*name)) {
        let known: Vec<_> = parsed.models.keys().map(String::as_str).collect();
        return Err(Error::Usage(format!(
            "--name {name}: not in {}; it lists {}",
            list.display(),
            known.join(", ")
        )));
    }
    let mut found = ListedJobs::default();
    for (name, model) in &parsed.models {
        if !names.is_empty() && !names.contains(name) {
            continue;
        }
        let path = folder.join(name).join("model.onnx");
        if path.is_file() {
            let tokenizer = path.with_file_name("tokenizer.json");
            let batch_size = batch_size.unwrap_or(model.batch_size);
            let job = Job::sweep(&path, &tokenizer, batch_size, stages);
            found.jobs.push(Job { model: name.clone(), ..job });
        } else {
            let out = folder.join(name);
            found.missing.push(format!(
                "{name}: no {}; export it with scripts/export_hf.py --name {name} {}",
                path.display(),
                out.display()
            ));
        }
    }
    if found.jobs.is_empty() {
        return Err(Error::Usage(format!("no model to measure\n{}", found.missing.join("\n"))));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stage_names_are_stems_as_long_as_they_differ() {
        let names = |paths: &[&str]| {
            stage_names(&paths.iter().map(PathBuf::from).collect::<Vec<_>>()).join(" ")
        };
        assert_eq!(names(&["a.onnx", "x/b.full-fp8_e4m3.onnx"]), "a b.full-fp8_e4m3");
        assert_eq!(names(&["x/model.onnx", "y/model.onnx"]), "x/model y/model");
        assert_eq!(names(&["a.onnx", "a.onnx"]), "a#1 a#2");
    }

    #[test]
    fn keys_depend_on_every_part() {
        let base = KeyParts {
            model: "m",
            data: "d",
            tokenizer: "t",
            stage: "s",
            options: "o",
            platform: "p",
        };
        let variants = [
            KeyParts { model: "x", ..base.clone() },
            KeyParts { data: "x", ..base.clone() },
            KeyParts { tokenizer: "x", ..base.clone() },
            KeyParts { stage: "x", ..base.clone() },
            KeyParts { options: "x", ..base.clone() },
            KeyParts { platform: "x", ..base.clone() },
        ];
        assert!(variants.iter().all(|variant| variant.key() != base.key()));
        assert_eq!(base.key(), base.clone().key());
    }

    #[test]
    fn a_list_gives_the_models_that_are_there_and_says_which_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let list = dir.path().join("models.toml");
        let text =
            "[models.\"a-1.5\"]\nhub = \"x/a\"\nbatch_size = 16\n[models.b]\nbatch_size = 2\n";
        std::fs::write(&list, text).unwrap();
        let read = |names: &[&str], batch| {
            let names: Vec<_> = names.iter().map(|name| (*name).to_owned()).collect();
            listed(&list, dir.path(), &names, batch, &[Stage::Baseline])
        };
        assert!(read(&[], None).unwrap_err().to_string().contains("export_hf.py --name b"));
        std::fs::create_dir(dir.path().join("a-1.5")).unwrap();
        std::fs::write(dir.path().join("a-1.5/model.onnx"), "x").unwrap();
        let found = read(&[], None).unwrap();
        assert_eq!((found.jobs.len(), found.missing.len()), (1, 1));
        assert_eq!((found.jobs[0].model.as_str(), found.jobs[0].batch_size), ("a-1.5", 16));
        assert_eq!(found.jobs[0].tokenizer, dir.path().join("a-1.5/tokenizer.json"));
        assert_eq!(read(&["a-1.5"], Some(3)).unwrap().jobs[0].batch_size, 3);
        assert!(read(&["c"], None).unwrap_err().to_string().contains("it lists a-1.5, b"));
        std::fs::write(&list, "models = 3").unwrap();
        assert!(read(&[], None).unwrap_err().to_string().contains("models.toml"));
    }
}
