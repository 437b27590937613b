//! From file to file: open, plan, replace, save.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::{
    BaseDtype, Lowering, Recipe, RewriteError, RewriteOptions, RewritePlan, execute, find_sites,
    inline::inline,
};
use crate::onnx::{Model, SaveOptions, Saved};

/// What a rewrite did.
#[derive(Clone, Debug, Serialize)]
pub struct RewriteReport {
    /// The model that was read.
    pub input: PathBuf,
    /// The model that was written.
    pub output: PathBuf,
    /// Its data file, when its weights are external.
    pub data: Option<PathBuf>,
    /// What the layers became.
    pub lowering: Lowering,
    /// Layers replaced.
    pub sites: usize,
    /// Candidates left alone.
    pub skipped: usize,
    /// Bytes of the replaced layers' weights before.
    pub weight_bytes_before: u64,
    /// Bytes of the same weights, codes and scales, after.
    pub weight_bytes_after: u64,
    /// Bytes of the whole output, data file included.
    pub bytes: u64,
    /// What was done, layer by layer.
    pub plan: RewritePlan,
}

/// Opens a model and plans its rewrite; nothing is changed or written.
///
/// # Errors
/// [`RewriteError`]: options that contradict each other, a file that is no valid model. Finding
/// nothing to replace is no error here; see [`require_sites`].
pub fn plan_file(
    input: &Path,
    options: &RewriteOptions,
) -> Result<(Model, RewritePlan), RewriteError> {
    // Options first: a mistyped expression is told without reading gigabytes.
    let recipe = Recipe::new(options)?;
    let filter = recipe.filter()?;
    let opened = Model::open(input)?;
    let inlined = inline(&opened)?;
    let scan = find_sites(inlined.as_ref().unwrap_or(&opened), &filter)
        .map_err(|source| RewriteError::Graph { path: input.to_owned(), source })?;
    let plan = RewritePlan::new(scan, recipe);
    // A model in which nothing is replaced stays as it is, functions included.
    let model = inlined.filter(|_| !plan.sites.is_empty()).unwrap_or(opened);
    Ok((model, plan))
}

/// Rewrites `input` into `output`: the whole way from file to file.
///
/// # Errors
/// [`RewriteError`]; no output is left then.
pub fn rewrite_file(
    input: &Path,
    output: &Path,
    options: &RewriteOptions,
) -> Result<RewriteReport, RewriteError> {
    let (model, plan) = plan_file(input, options)?;
    require_sites(input, &plan, options)?;
    let rewritten = execute(&model, &plan, options.threads)
        .map_err(|source| RewriteError::Execute { path: input.to_owned(), source })?;
    let save = SaveOptions { overwrite: options.overwrite, ..SaveOptions::default() };
    let saved = rewritten.save(output, &save)?;
    let (weight_bytes_before, weight_bytes_after) = plan.bytes();
    Ok(RewriteReport {
        input: input.to_owned(),
        output: saved.path,
        data: saved.data_path,
        lowering: options.lowering,
        sites: plan.sites.len(),
        skipped: plan.skipped.len(),
        weight_bytes_before,
        weight_bytes_after,
        bytes: saved.bytes,
        plan,
    })
}

/// Writes `input` to `output` in another float type, no layer replaced: the baseline of a GPU run.
///
/// # Errors
/// [`RewriteError`]; no output is left then.
pub fn convert_file(
    input: &Path,
    output: &Path,
    to: BaseDtype,
    overwrite: bool,
) -> Result<Saved, RewriteError> {
    let model = Model::open(input)?;
    let converted = execute::convert(&model, to)
        .map_err(|source| RewriteError::Execute { path: input.to_owned(), source })?;
    let save = SaveOptions { overwrite, ..SaveOptions::default() };
    Ok(converted.save(output, &save)?)
}

/// Refuses a plan without sites, with the list of candidates, unless the options allow one.
///
/// # Errors
/// [`RewriteError::NothingToReplace`].
pub fn require_sites(
    input: &Path,
    plan: &RewritePlan,
    options: &RewriteOptions,
) -> Result<(), RewriteError> {
    // bfloat16 rounds the whole graph, layers or not.
    if !plan.sites.is_empty() || options.allow_empty || options.lowering == Lowering::Bf16 {
        return Ok(());
    }
    Err(RewriteError::NothingToReplace {
        path: input.to_owned(),
        selection: plan.recipe.name.clone(),
        candidates: plan.skipped.clone(),
    })
}

/// The default output: beside the model, `<stem>.<tier>-<format>.onnx`.
pub fn default_output(input: &Path, options: &RewriteOptions) -> PathBuf {
    let stem = input.file_stem().map_or_else(Default::default, |stem| stem.to_string_lossy());
    let tier = options.tier.name();
    let name = match options.lowering {
        Lowering::Bf16 => format!("{stem}.bf16.onnx"),
        // Tiers c and d are a mixture of formats.
        Lowering::Mx if options.tier.has_fixed_formats() => format!("{stem}.{tier}-mx.onnx"),
        Lowering::Mx => {
            let format = options.format.map_or("fp8_e4m3", |format| format.name());
            format!("{stem}.{tier}-{format}.onnx")
        }
        lowering => format!("{stem}.{tier}-{lowering}.onnx"),
    };
    let name = match options.base_dtype.filter(|_| options.lowering != Lowering::Bf16) {
        Some(base) => format!("{}.{base}.onnx", name.trim_end_matches(".onnx")),
        None => name,
    };
    input.with_file_name(name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rewrite::Tier;

    #[test]
    fn default_output_names() {
        let name = |tier, lowering, format: Option<&str>| {
            let format = format.map(|format| format.parse().unwrap());
            let options = RewriteOptions { tier, lowering, format, ..Default::default() };
            default_output(Path::new("a/model.v2.onnx"), &options)
        };
        let path = |name: &str| Path::new("a").join(name);
        assert_eq!(name(Tier::Full, Lowering::Mx, None), path("model.v2.full-fp8_e4m3.onnx"));
        assert_eq!(name(Tier::A, Lowering::Mx, Some("fp4_e2m1")), path("model.v2.a-fp4_e2m1.onnx"));
        assert_eq!(name(Tier::C, Lowering::Mx, None), path("model.v2.c-mx.onnx"));
        assert_eq!(name(Tier::Full, Lowering::Bf16, None), path("model.v2.bf16.onnx"));
        let base_dtype = Some(BaseDtype::F16);
        let options = RewriteOptions { base_dtype, ..Default::default() };
        let with_base = default_output(Path::new("a/model.v2.onnx"), &options);
        assert_eq!(with_base, path("model.v2.full-fp8_e4m3.fp16.onnx"));
        assert_eq!(
            name(Tier::AllLinears, Lowering::Int8, None),
            path("model.v2.all-linears-int8.onnx")
        );
    }
}
