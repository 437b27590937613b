//! Folders of ONNX Runtime GenAI: the decoder is rewritten, its configuration loads the operator library, and
//! everything else comes along.
//!
//! ```text
//! DIR/genai_config.json  ->  the same, with session_options.custom_ops_library
//! DIR/model.onnx[.data]  ->  rewritten
//! DIR/tokenizer.json ... ->  copied
//!                            libmx_custom_ops.so, copied
//! ```
//! GenAI looks for a relative library in the model folder and refuses one outside it, so the output has its own copy
//! and can be moved.

mod config;
mod error;
mod folder;

use std::{
    collections::BTreeSet,
    env, fs,
    path::{Component, Path, PathBuf},
};

use mx_custom_ops::contract::DOMAIN;
use serde::Serialize;

use crate::{
    onnx::{Model, Progress},
    rewrite::{self, RewriteError, RewriteOptions, RewritePlan, RewriteReport},
};
use config::{Config, Stage};
use folder::Output;

pub use config::CONFIG;
pub use error::GenaiError;
pub use folder::Unfinished;

/// Name of the operator library.
pub const LIBRARY: &str = "libmx_custom_ops.so";

/// Environment variable with the path of the operator library; the Python package sets it.
pub const LIBRARY_VARIABLE: &str = "MX_OPS_LIBRARY";

/// What was done with a folder.
#[derive(Clone, Debug, Serialize)]
pub struct GenaiReport {
    /// The folder that was read.
    pub input: PathBuf,
    /// The folder that was written.
    pub output: PathBuf,
    /// The operator library in it, when its models need one.
    pub library: Option<PathBuf>,
    /// The decoder's models that were rewritten: one, or several stages of a pipeline.
    pub models: Vec<RewriteReport>,
    /// Models that were copied as they are: other parts (embedding, vision, speech) and stages without layers to
    /// replace. Relative to the folder.
    pub unchanged_models: Vec<String>,
    /// Other files that were copied, relative to the folder.
    pub copied: Vec<PathBuf>,
}

/// The plan of one of the decoder's models.
#[derive(Clone, Debug, Serialize)]
pub struct GenaiPlan {
    /// The model, relative to the folder.
    pub file: String,
    /// What would be replaced.
    pub plan: RewritePlan,
}

/// Plans the rewrite of a folder's decoder; nothing is written. With `sqnr`, every weight is read and what its format
/// loses is in the plan.
///
/// # Errors
/// [`GenaiError`]: a folder without `genai_config.json` or with one that names no decoder in it, and what
/// [`rewrite::plan_file`] refuses.
pub fn plan_folder(
    folder: &Path,
    options: &RewriteOptions,
    sqnr: bool,
) -> Result<Vec<GenaiPlan>, GenaiError> {
    let stages = Config::open(folder)?.stages()?;
    let (mut plans, mut quantised): (Vec<GenaiPlan>, _) = (Vec::new(), None);
    for Stage { file, .. } in stages {
        if plans.iter().any(|plan| plan.file == file) {
            continue;
        }
        let path = folder.join(&file);
        let (model, mut plan) = rewrite::plan_file(&path, options)?;
        if sqnr {
            rewrite::measure_plan(&model, &mut plan, options.threads)
                .map_err(|source| RewriteError::Execute { path: path.clone(), source })?;
        }
        if plan.is_empty() && is_quantised(&model) {
            quantised.get_or_insert(path);
        }
        plans.push(GenaiPlan { file, plan });
    }
    let nothing = |GenaiPlan { file, plan }: &GenaiPlan| {
        rewrite::require_sites(&folder.join(file), plan, options).is_err()
    };
    match quantised {
        Some(path) if plans.iter().all(nothing) => Err(GenaiError::Quantised { path }),
        _ => Ok(plans),
    }
}

/// Rewrites a folder into `output`, which is a new one. `library` is the operator library to put into it; see
/// [`find_library`] for the default. `progress` is told each model's bytes; `unfinished` learns of the folder that
/// is written until `output` is there.
///
/// # Errors
/// [`GenaiError`]; no output is left then.
pub fn rewrite_folder(
    folder: &Path,
    output: &Path,
    options: &RewriteOptions,
    library: Option<&Path>,
    progress: &Progress,
    unfinished: &Unfinished,
) -> Result<GenaiReport, GenaiError> {
    let written = write_folder(folder, output, options, library, progress, unfinished);
    written.map_err(|error| unfinished.cause(error))
}

fn write_folder(
    folder: &Path,
    output: &Path,
    options: &RewriteOptions,
    library: Option<&Path>,
    progress: &Progress,
    unfinished: &Unfinished,
) -> Result<GenaiReport, GenaiError> {
    let mut config = Config::open(folder)?;
    let stages = config.stages()?;
    let lowering = options.recipe.as_ref().map_or(options.lowering, |recipe| recipe.lowering);
    // Told before gigabytes are read; what other lowerings need is seen in their result.
    if lowering == rewrite::Lowering::Mx {
        find_library(library)?;
    }
    let out = Output::create(folder, output, options.overwrite, unfinished)?;
    let mut models = rewrite_stages(folder, &out, &stages, options, progress)?;
    let rewritten = |stage: &&Stage| models.iter().any(|m| m.input == folder.join(&stage.file));
    let done: Vec<&Stage> = stages.iter().filter(rewritten).collect();
    let mut with_operators = Vec::new();
    for stage in &done {
        if Model::open(out.path().join(&stage.file))?.opset(DOMAIN).is_some() {
            with_operators.push(*stage);
        }
    }
    let copied =
        copy_rest(folder, &out, &done, with_operators.is_empty() && config.loads(LIBRARY))?;
    let in_output = match with_operators.is_empty() {
        true => None,
        false => Some(install(&find_library(library)?, &out)?),
    };
    if in_output.is_some() {
        config.load_library(&with_operators, LIBRARY)?;
    }
    config.write(out.path())?;
    for model in &mut models {
        model.output = out.finally(&model.output);
        model.data = model.data.as_deref().map(|data| out.finally(data));
    }
    let mut unchanged: Vec<String> = stages.iter().map(|stage| stage.file.clone()).collect();
    unchanged.retain(|file| done.iter().all(|stage| stage.file != *file));
    unchanged.extend(config.other_models(&stages));
    unchanged.sort();
    unchanged.dedup();
    let report = GenaiReport {
        input: folder.to_owned(),
        output: output.to_owned(),
        library: in_output.map(|path| out.finally(&path)),
        models,
        unchanged_models: unchanged,
        copied,
    };
    out.persist()?;
    Ok(report)
}

/// Rewrites the models that have layers to replace. One of them must.
fn rewrite_stages(
    folder: &Path,
    out: &Output,
    stages: &[Stage],
    options: &RewriteOptions,
    progress: &Progress,
) -> Result<Vec<RewriteReport>, GenaiError> {
    let (mut models, mut nothing): (Vec<RewriteReport>, _) = (Vec::new(), None);
    for Stage { file, .. } in stages {
        let (input, target) = (folder.join(file), out.path().join(file));
        if models.iter().any(|model| model.input == input) {
            continue;
        }
        let parent = target.parent().unwrap_or(out.path());
        fs::create_dir_all(parent).map_err(GenaiError::io("create", parent))?;
        match rewrite::rewrite_file_telling(&input, &target, options, progress) {
            Ok(report) => models.push(report),
            Err(error @ RewriteError::NothingToReplace { .. }) => {
                nothing.get_or_insert((input, error));
            }
            Err(error) => return Err(error.into()),
        }
    }
    match nothing {
        Some((path, error)) if models.is_empty() => {
            let quantised = is_quantised(&Model::open(&path)?);
            Err(if quantised { GenaiError::Quantised { path } } else { error.into() })
        }
        _ => Ok(models),
    }
}

/// Copies all files but those that the rewritten models replace; returns what was copied. `library`: an operator
/// library that other models need comes along, too.
fn copy_rest(
    folder: &Path,
    out: &Output,
    done: &[&Stage],
    library: bool,
) -> Result<Vec<PathBuf>, GenaiError> {
    let mut files = folder::files(folder)?;
    let models: BTreeSet<PathBuf> =
        done.iter().map(|stage| normal(Path::new(&stage.file))).collect();
    let (mut old, mut needed) = (BTreeSet::new(), BTreeSet::new());
    for model in &models {
        old.extend(data_of(folder, model)?);
    }
    for file in files.iter().filter(|file| file.extension().is_some_and(|e| e == "onnx")) {
        if !models.contains(file) {
            // What cannot be read may need any file.
            needed.extend(data_of(folder, file).unwrap_or_else(|_| old.iter().cloned().collect()));
        }
    }
    files.retain(|file| {
        let replaced = models.contains(file) || (old.contains(file) && !needed.contains(file));
        !replaced && file != Path::new(CONFIG) && (library || file != Path::new(LIBRARY))
    });
    let taken = folder::files(out.path())?.into_iter().collect();
    folder::copy(folder, out.path(), &files, &taken)?;
    Ok(files)
}

/// The external data files of a model, relative to the folder.
fn data_of(folder: &Path, model: &Path) -> Result<Vec<PathBuf>, GenaiError> {
    let opened = Model::open(folder.join(model))?;
    let beside = model.parent().unwrap_or(Path::new(""));
    Ok(opened.data_files().map(|file| normal(&beside.join(file))).collect())
}

/// Without `.` in between.
fn normal(path: &Path) -> PathBuf {
    path.components().filter(|part| !matches!(part, Component::CurDir)).collect()
}

/// Copies the library; a link would tie the folder to a build that changes.
fn install(library: &Path, out: &Output) -> Result<PathBuf, GenaiError> {
    let target = out.path().join(LIBRARY);
    fs::copy(library, &target).map_err(GenaiError::io("copy", library))?;
    Ok(target)
}

/// True when weights are MatMulNBits', ONNX Runtime's integer formats.
fn is_quantised(model: &Model) -> bool {
    model.graph().nodes().any(|(_, node)| node.op_type.as_deref() == Some("MatMulNBits"))
}

/// The operator library: `named`, else what the environment variable [`LIBRARY_VARIABLE`] names, else
/// `libmx_custom_ops.so` beside the executable.
///
/// # Errors
/// [`GenaiError::NoLibrary`], with where it was looked for.
pub fn find_library(named: Option<&Path>) -> Result<PathBuf, GenaiError> {
    let (path, whose) = match (named, env::var_os(LIBRARY_VARIABLE)) {
        (Some(path), _) => (path.to_owned(), "--ops-library "),
        (None, Some(path)) if !path.is_empty() => (path.into(), "MX_OPS_LIBRARY="),
        _ => {
            let executable = env::current_exe().unwrap_or_default();
            (executable.with_file_name(LIBRARY), "")
        }
    };
    if path.is_file() {
        return Ok(path);
    }
    Err(GenaiError::NoLibrary { tried: format!("{whose}{}", path.display()) })
}

/// The default output: beside the folder, `<name>.<tier>-<format>`.
pub fn default_output(folder: &Path, options: &RewriteOptions) -> PathBuf {
    // `.` and `x/..` have names of their own.
    let named = match folder.file_name() {
        Some(_) => folder.to_owned(),
        None => folder.canonicalize().unwrap_or_else(|_| folder.to_owned()),
    };
    let mut model = named.into_os_string();
    model.push(".onnx");
    rewrite::default_output(Path::new(&model), options).with_extension("")
}
