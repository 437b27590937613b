//! A plan carried out: every planned layer replaced, what became unused removed, the plan noted in
//! the model.

use std::path::{Path, PathBuf};

use super::{
    Recipe, RewriteOptions, RewritePlan, SiteFormat,
    error::RewriteError,
    find_sites,
    lower::{Int8, Mx, bf16},
    lowering::Lowering,
    patch::Patch,
    weights::Threads,
};
use crate::onnx::{Model, SaveOptions};

/// Key of the plan, as JSON, in a rewritten model's metadata.
pub const PLAN_KEY: &str = "mx.plan";

/// What a rewrite did.
#[derive(Clone, Debug)]
pub struct RewriteReport {
    /// Layers replaced (under [`Lowering::Bf16`]: layers among everything that was rounded).
    pub sites: usize,
    /// The plan that was carried out.
    pub plan: RewritePlan,
    /// Bytes of the weights of these layers before.
    pub bytes_before: u64,
    /// Bytes of the same weights afterwards.
    pub bytes_after: u64,
    /// The model file, if one was written.
    pub output: Option<PathBuf>,
    /// Its data file, if it has one.
    pub data: Option<PathBuf>,
    /// Bytes of both files; 0 if none was written.
    pub model_bytes: u64,
}

/// Finds the layers that the options name and decides what each becomes. Changes nothing.
///
/// # Errors
/// Options that contradict each other, a graph that ONNX does not allow.
pub fn plan(model: &Model, options: &RewriteOptions) -> Result<RewritePlan, RewriteError> {
    let recipe = Recipe::new(options)?;
    let scan = find_sites(model, &recipe.filter()?)?;
    Ok(RewritePlan::new(scan, recipe))
}

/// Rewrites a model file.
///
/// # Errors
/// Whatever [`rewrite_model`] and [`Model::save`] refuse; no output is left then.
pub fn rewrite_file(
    input: impl AsRef<Path>,
    output: impl AsRef<Path>,
    options: &RewriteOptions,
) -> Result<RewriteReport, RewriteError> {
    let model = Model::open(input)?;
    let (rewritten, mut report) = rewrite_model(&model, options)?;
    let save = SaveOptions { overwrite: options.overwrite, ..SaveOptions::default() };
    let saved = rewritten.save(output, &save)?;
    report.output = Some(saved.path);
    report.data = saved.data_path;
    report.model_bytes = saved.bytes;
    Ok(report)
}

/// Rewrites a model in memory: [`plan`], then [`execute`]. Weights are quantised when the result is
/// written, by [`Model::save`] or [`Model::to_bytes`].
///
/// # Errors
/// No layer found (unless `allow_empty`); a layer or model that the lowering cannot take; a weight
/// that cannot be read.
pub fn rewrite_model(
    model: &Model,
    options: &RewriteOptions,
) -> Result<(Model, RewriteReport), RewriteError> {
    let plan = plan(model, options)?;
    // Rounding to bfloat16 covers the whole graph and has work to do without any layer.
    if plan.sites.is_empty() && !options.allow_empty && options.lowering != Lowering::Bf16 {
        return Err(RewriteError::NothingFound {
            selection: plan.recipe.name.clone(),
            skipped: plan.skipped,
        });
    }
    let rewritten = execute(model, &plan, options.threads)?;
    let (bytes_before, bytes_after) = plan.bytes();
    let report = RewriteReport {
        sites: plan.sites.len(),
        plan,
        bytes_before,
        bytes_after,
        output: None,
        data: None,
        model_bytes: 0,
    };
    Ok((rewritten, report))
}

/// Carries out a plan that was made from this model; weights are quantised by `threads` threads
/// (`None` = one a processor) when the result is written. Without any layer to replace the model is
/// returned as it is.
///
/// # Errors
/// A layer or model that the lowering cannot take; a weight that cannot be read.
pub fn execute(
    model: &Model,
    plan: &RewritePlan,
    threads: Option<usize>,
) -> Result<Model, RewriteError> {
    let threads = Threads::new(threads)?;
    let mut out = if plan.recipe.lowering == Lowering::Bf16 {
        bf16::round(model, plan, threads)?
    } else {
        if plan.sites.is_empty() {
            return Ok(model.clone());
        }
        replace_sites(model, plan, threads)?
    };
    if let Ok(json) = serde_json::to_string(plan) {
        out.set_metadata(PLAN_KEY, &json);
    }
    Ok(out)
}

fn replace_sites(
    model: &Model,
    plan: &RewritePlan,
    threads: Threads,
) -> Result<Model, RewriteError> {
    let mut patch = Patch::new(model, threads)?;
    let (mut mx, mut int8) = (Mx::default(), Int8::default());
    for planned in &plan.sites {
        match &planned.format {
            SiteFormat::Mx { weight, activation } => {
                mx.lower(&mut patch, planned, weight, activation.as_ref())?;
            }
            SiteFormat::Int8 => int8.lower(&mut patch, planned)?,
            SiteFormat::Bf16 => {
                return Err(RewriteError::Unsupported {
                    lowering: plan.recipe.lowering.name(),
                    reason: "bf16 is a format of whole graphs, not of single layers".to_owned(),
                });
            }
        }
    }
    patch.sweep()?;
    Ok(patch.out)
}
