//! From file to file: open, plan, replace, save.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::{
    BaseDtype, Checkpoint, Filter, Lowering, Notes, Recipe, RewriteError, RewriteOptions,
    RewritePlan, Rule, Select, SiteFormat, SiteScan, checkpoint::Names, execute, execute_noting,
    inline::inline, layers::layer_number, scan::find_named_sites,
};
use crate::{
    graph::GraphError,
    onnx::{Model, Progress, SaveOptions, Saved},
};

/// Key of the data files' SHA-256, as a JSON object by file name, in a rewritten model's metadata.
pub const SHA256_KEY: &str = "mx.data_sha256";

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
    /// Products of activations replaced.
    pub products: usize,
    /// Candidates left alone.
    pub skipped: usize,
    /// Bytes of the replaced layers' weights before.
    pub weight_bytes_before: u64,
    /// Bytes of the same weights, codes and scales, after.
    pub weight_bytes_after: u64,
    /// Bytes of the whole output, data file included.
    pub bytes: u64,
    /// What there is to know of the output: tensors that float16 could not hold, or why ONNX Runtime
    /// does not load it.
    pub notes: Vec<String>,
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
    plan_opened(Model::open(input)?, options, recipe, filter, input)
}

/// Plans the rewrite of a model that is in memory. Returns what the plan is of: the model, or the same with
/// calls of local functions written out.
///
/// # Errors
/// As [`plan_file`].
pub fn plan_model(
    model: Model,
    options: &RewriteOptions,
) -> Result<(Model, RewritePlan), RewriteError> {
    let recipe = Recipe::new(options)?;
    let filter = recipe.filter()?;
    let path = model.path().map_or_else(|| PathBuf::from("the model"), Path::to_owned);
    plan_opened(model, options, recipe, filter, &path)
}

/// `path` is what errors call the model.
fn plan_opened(
    opened: Model,
    options: &RewriteOptions,
    recipe: Recipe,
    filter: Filter,
    path: &Path,
) -> Result<(Model, RewritePlan), RewriteError> {
    let checkpoint = options.checkpoint.as_deref().map(Checkpoint::open).transpose()?;
    let inlined = inline(&opened)?;
    let seen = inlined.as_ref().unwrap_or(&opened);
    let graph = |source| RewriteError::Graph { path: path.to_owned(), source };
    let names = match &checkpoint {
        Some(checkpoint) => {
            let all = everything(seen, &Names::default()).map_err(graph)?;
            checkpoint.find(seen, &all.sites, options.threads)?
        }
        None => Names::default(),
    };
    let filter = match filter.counts_from_end() {
        true => filter.with_depth(depth(seen, &names).map_err(graph)?),
        false => filter,
    };
    let scan = find_named_sites(seen, &filter, &names).map_err(graph)?;
    let plan = RewritePlan::new(scan, recipe);
    // A model in which nothing is replaced stays as it is, functions included.
    let model = inlined.filter(|_| !plan.is_empty()).unwrap_or(opened);
    Ok((model, plan))
}

/// Every Linear of the model, routers and the head too.
fn everything(model: &Model, names: &Names) -> Result<SiteScan, GraphError> {
    let everything = Rule { select: Select::everything(), format: Some(SiteFormat::Bf16) };
    // Without expressions there is none that does not compile.
    let Ok(filter) = Filter::new("everything", &[everything], &[]) else {
        return Ok(SiteScan::default());
    };
    find_named_sites(model, &filter, names)
}

/// Layers of the model: one more than the highest number in a module path.
fn depth(model: &Model, names: &Names) -> Result<usize, GraphError> {
    let scan = everything(model, names)?;
    let taken = scan.sites.iter().filter_map(|site| site.module_path.as_deref());
    let left = scan.skipped.iter().filter_map(|skipped| skipped.module_path.as_deref());
    Ok(taken.chain(left).filter_map(layer_number).max().map_or(0, |last| last + 1))
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
    rewrite_file_telling(input, output, options, &Progress::NOBODY)
}

/// [`rewrite_file`] that tells how many bytes of the output are written, and can be stopped.
///
/// # Errors
/// As [`rewrite_file`]; [`onnx::Error::Stopped`](crate::onnx::Error::Stopped) when asked to.
pub fn rewrite_file_telling(
    input: &Path,
    output: &Path,
    options: &RewriteOptions,
    progress: &Progress,
) -> Result<RewriteReport, RewriteError> {
    let (model, plan) = plan_file(input, options)?;
    require_sites(input, &plan, options)?;
    let notes = Notes::default();
    let mut rewritten = execute_noting(&model, &plan, options.threads, &notes)
        .map_err(|source| RewriteError::Execute { path: input.to_owned(), source })?;
    let mut save = SaveOptions {
        overwrite: options.overwrite,
        shard_size: options.shard_size,
        resume: options.resume,
        progress: progress.clone(),
        ..SaveOptions::default()
    };
    // What nothing was replaced in stays as it is, metadata included.
    if !plan.is_empty() {
        rewritten.remove_metadata(SHA256_KEY);
        save.hash_key = Some(SHA256_KEY);
    }
    let saved = rewritten.save(output, &save)?;
    let (weight_bytes_before, weight_bytes_after) = plan.bytes();
    Ok(RewriteReport {
        input: input.to_owned(),
        output: saved.path,
        data: saved.data_path,
        lowering: plan.recipe.lowering,
        sites: plan.sites.len(),
        products: plan.products.len(),
        skipped: plan.skipped.len(),
        weight_bytes_before,
        weight_bytes_after,
        bytes: saved.bytes,
        notes: notes.lines(&plan),
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
    // The whole graph is rounded or converted, layers or not.
    if !plan.is_empty() || options.allow_empty || plan.recipe.lowering.is_whole_graph() {
        return Ok(());
    }
    Err(RewriteError::NothingToReplace {
        path: input.to_owned(),
        selection: plan.recipe.name.clone(),
        candidates: plan.skipped.clone(),
    })
}

/// The default output: beside the model, `<stem>.<tier>-<format>.onnx` or `<stem>.<recipe>.onnx`.
pub fn default_output(input: &Path, options: &RewriteOptions) -> PathBuf {
    let stem = input.file_stem().map_or_else(Default::default, |stem| stem.to_string_lossy());
    let tier = options.tier.name();
    let lowering = options.recipe.as_ref().map_or(options.lowering, |recipe| recipe.lowering);
    let by_recipe = options.recipe.as_ref().map(|r| format!("{stem}.{}.onnx", file_part(&r.name)));
    let name = match lowering {
        Lowering::Bf16 | Lowering::Fp16 => format!("{stem}.{lowering}.onnx"),
        // Tiers c and d are a mixture of formats.
        Lowering::Mx | Lowering::Qdq if options.tier.has_fixed_formats() => {
            format!("{stem}.{tier}-{lowering}.onnx")
        }
        Lowering::Mx | Lowering::Qdq => {
            let format = options.format.map_or("fp8_e4m3", |format| format.name());
            let suffix = if lowering == Lowering::Qdq { ".qdq" } else { "" };
            format!("{stem}.{tier}-{format}{suffix}.onnx")
        }
        lowering => format!("{stem}.{tier}-{lowering}.onnx"),
    };
    let name = by_recipe.unwrap_or(name);
    let name = match options.base_dtype.filter(|_| !lowering.is_whole_graph()) {
        Some(base) => format!("{}.{base}.onnx", name.trim_end_matches(".onnx")),
        None => name,
    };
    input.with_file_name(name)
}

/// A recipe's name as a part of a file name.
fn file_part(name: &str) -> String {
    let plain = |c: char| if c.is_alphanumeric() || matches!(c, '.' | '_' | '-') { c } else { '-' };
    name.trim_start_matches("recipe ").chars().map(plain).collect()
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
        assert_eq!(name(Tier::Full, Lowering::Fp16, None), path("model.v2.fp16.onnx"));
        let e4m3 = name(Tier::Full, Lowering::Qdq, None);
        assert_eq!(e4m3, path("model.v2.full-fp8_e4m3.qdq.onnx"));
        assert_eq!(name(Tier::D, Lowering::Qdq, None), path("model.v2.d-qdq.onnx"));
        let base_dtype = Some(BaseDtype::F16);
        let options = RewriteOptions { base_dtype, ..Default::default() };
        let with_base = default_output(Path::new("a/model.v2.onnx"), &options);
        assert_eq!(with_base, path("model.v2.full-fp8_e4m3.fp16.onnx"));
        let mut recipe = Recipe::built_in("w4a8").unwrap().unwrap();
        recipe.name = "recipe my mix/2".to_owned();
        let options = RewriteOptions { recipe: Some(recipe), ..Default::default() };
        let by_recipe = default_output(Path::new("a/model.v2.onnx"), &options);
        assert_eq!(by_recipe, path("model.v2.my-mix-2.onnx"));
        assert_eq!(
            name(Tier::AllLinears, Lowering::Int8, None),
            path("model.v2.all-linears-int8.onnx")
        );
    }
}
