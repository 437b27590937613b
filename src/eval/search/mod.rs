//! A format for each layer, found from what each costs alone and measured for real.
//!
//! `knapsack` chooses, `assign` writes the choice down as a recipe and checks that mxrewrite makes of
//! it what was chosen, `heldout` measures it on documents that the choice has not seen.

mod assign;
mod heldout;
mod knapsack;
mod page;
mod problem;
mod result;

use super::error::{Error, Result};
use super::observer::Observer;
use super::process::now;
use super::sensitivity::result::Sensitivity;
use super::sensitivity::sample::{self, Part};
use super::sensitivity::setup::{Bench, Setup};
use super::store::{Store, WorkFolder};
use crate::rewrite::Recipe;
use assign::Assignment;
use heldout::Bar;
use knapsack::Taken;
use problem::Problem;
use std::path::{Path, PathBuf};

pub use assign::NONE;
pub use heldout::{DocumentLosses, Measured};
pub use result::{Point, Search};

/// The recipe found, in the output folder.
pub const RECIPE: &str = "recipe.toml";
/// Every point of the front.
pub const FRONT: &str = "front.json";
/// What was found and what it measures.
pub const FILE: &str = "search.json";
/// The same for people.
pub const PAGE: &str = "search.html";

/// What adds up to what the recipe is expected to cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Objective {
    /// Divergence from the baseline: never negative, and steady on few documents.
    #[default]
    Kl,
    /// Difference of cross-entropy: what is wanted in the end, but noise where it is small.
    DeltaXent,
}

impl Objective {
    /// Its name in results.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kl => "kl",
            Self::DeltaXent => "delta-xent",
        }
    }
}

impl std::str::FromStr for Objective {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "kl" => Ok(Self::Kl),
            "delta-xent" => Ok(Self::DeltaXent),
            _ => Err(format!("unknown objective {text:?}; known are kl, delta-xent")),
        }
    }
}

/// When to stop adding bits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Target {
    /// At most so many bits a weight, scales included, over all layers measured.
    Bits(f64),
    /// The fewest bits with which perplexity rises by no more than so many percent.
    DeltaPpl(f64),
}

/// Options of a search.
#[derive(Clone, Debug)]
pub struct Options {
    /// Model, text and place.
    pub bench: Bench,
    /// When to stop.
    pub target: Target,
    /// What is kept small.
    pub objective: Objective,
    /// Formats to choose from, `none` included where layers may stay as they are; empty = those that
    /// were measured.
    pub formats: Vec<String>,
    /// Layers that read one value get one format.
    pub together: bool,
    /// Documents for the figures that are reported.
    pub heldout: usize,
    /// Documents that recipes are tried on, where perplexity is the target.
    pub validation: usize,
    /// Do not measure the formats alone.
    pub no_uniform: bool,
    /// Other recipes to measure on the same documents.
    pub also: Vec<PathBuf>,
}

/// Searches, writes recipe, front and figures into the output folder.
///
/// # Errors
/// The measurement is of another model, nothing keeps to the target, or a model cannot be run.
pub fn run(
    options: &Options,
    sensitivity: &Sensitivity,
    observer: &dyn Observer,
) -> Result<Search> {
    let bench = &options.bench;
    let also = recipes(&options.also)?;
    let problem = Problem::new(sensitivity, options)?;
    let store = Store::open(&bench.out, true)?;
    observer.opened(&store.work_root());
    let setup = Setup::new(bench, observer)?;
    same_model(&setup, sensitivity)?;
    let folder = WorkFolder::new(&store.work_root(), "search")?;
    let parts = documents(&setup, sensitivity, options, observer)?;
    let mut tried = Vec::new();
    let solution = match options.target {
        Target::Bits(bits) => problem.within(bits)?,
        Target::DeltaPpl(limit) => {
            let bar =
                Bar::new((&setup, bench), &parts.validation.windows, folder.path(), observer)?;
            problem.up_to(limit, &bar, &mut tried)?
        }
    };
    let (assignment, recipe) = write_recipe(&problem, &solution.taken, options, &store)?;
    observer
        .note(&format!("{}: the recipe does what was chosen", recipe_path(&bench.out).display()));
    let bar = Bar::new((&setup, bench), &parts.heldout.windows, folder.path(), observer)?;
    let mut result = Search {
        mxeval: env!("CARGO_PKG_VERSION").into(),
        date: now(),
        command: bench.command.clone(),
        model: setup.model.clone(),
        tokenizer: setup.tokenizer.clone(),
        data: setup.data.clone(),
        device: setup.device().to_string(),
        objective: options.objective.name().into(),
        target: options.target.describe(),
        together: options.together,
        found: problem.point(&solution.taken),
        bound: problem.bound(&solution),
        assignment: problem.named(&assignment),
        seq_len: bench.seq_len,
        search_documents: sensitivity.documents.clone(),
        validation_documents: parts.validation.documents,
        heldout_documents: parts.heldout.documents,
        baseline_xent: bar.baseline_xent(),
        baseline: bar.baseline.clone(),
        tried,
        complete: false,
        measured: Vec::new(),
    };
    // Each row as it comes: an interruption leaves those measured so far.
    let mut partial = result.clone();
    let measured = problem.measure(&bar, &recipe, &also, options, &mut |rows| {
        partial.measured = rows.to_vec();
        write_json(&store, FILE, &partial)
    })?;
    (result.measured, result.complete) = (measured, true);
    write_json(&store, FILE, &result)?;
    store.write(PAGE, page::html(&result, sensitivity)?.as_bytes())?;
    drop(folder);
    store.clear_work()?;
    Ok(result)
}

/// Refuses a measurement of another model.
fn same_model(setup: &Setup, sensitivity: &Sensitivity) -> Result<()> {
    if setup.model.sha256 != sensitivity.model.sha256 {
        return Err(Error::Usage(format!(
            "{} is not the model that was measured (SHA-256 {}, measured {})",
            setup.model.path.display(),
            setup.model.sha256,
            sensitivity.model.sha256
        )));
    }
    // Documents that were seen are known by their tokens.
    if setup.tokenizer.sha256 != sensitivity.tokenizer.sha256 {
        return Err(Error::Usage(format!(
            "{} is not the tokenizer that was measured with (SHA-256 {}, measured {})",
            setup.tokenizer.path.display(),
            setup.tokenizer.sha256,
            sensitivity.tokenizer.sha256
        )));
    }
    Ok(())
}

/// Writes the recipe of a choice and the front around it.
fn write_recipe(
    problem: &Problem<'_>,
    taken: &Taken,
    options: &Options,
    store: &Store,
) -> Result<(Assignment, Recipe)> {
    let assignment = problem.assignment(taken);
    let name = format!("search {:.3} bits", problem.point(taken).bits_per_weight);
    let recipe = assign::recipe(problem.sensitivity, &assignment, &name)?;
    let toml = recipe.to_toml();
    assign::check(&options.bench.model, problem.sensitivity, &assignment, &toml)?;
    // The figures of an earlier search would stand beside this one's recipe.
    store.remove(FILE)?;
    store.remove(PAGE)?;
    store.write(RECIPE, toml.as_bytes())?;
    write_json(store, FRONT, &problem.points(taken))?;
    Ok((assignment, recipe))
}

fn write_json(store: &Store, name: &str, value: &impl serde::Serialize) -> Result<()> {
    let mut text =
        serde_json::to_string_pretty(value).map_err(|e| Error::Output(format!("{name}: {e}")))?;
    text.push('\n');
    store.write(name, text.as_bytes())
}

fn recipes(paths: &[PathBuf]) -> Result<Vec<Recipe>> {
    let open = |path: &PathBuf| {
        let recipe = Recipe::open(path).map_err(|e| Error::Usage(e.to_string()))?;
        let stem = path.file_stem().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
        Ok(Recipe { name: stem, ..recipe })
    };
    paths.iter().map(open).collect()
}

impl Target {
    fn describe(self) -> String {
        match self {
            Self::Bits(bits) => format!("at most {bits} bits a weight"),
            Self::DeltaPpl(limit) => format!("perplexity up by at most {limit} %"),
        }
    }
}

/// Documents of a search.
struct Parts {
    validation: Part,
    heldout: Part,
}

/// Documents that the measurement has not seen.
fn documents(
    setup: &Setup,
    sensitivity: &Sensitivity,
    options: &Options,
    observer: &dyn Observer,
) -> Result<Parts> {
    let mut taken = sensitivity.beginnings.clone();
    let mut next = |count: usize| {
        let part = Part::new(&setup.corpus, &sample::spread(&setup.corpus, count, &taken));
        taken.extend(part.beginnings.iter().cloned());
        part
    };
    let tries = match options.target {
        Target::Bits(_) => 0,
        Target::DeltaPpl(_) => options.validation,
    };
    let (validation, heldout) = (next(tries), next(options.heldout));
    let found = validation.windows.len() + heldout.windows.len();
    if heldout.windows.len() < 2 {
        return Err(Error::Usage(format!(
            "{found} documents are left beside those that layers were measured on; raise --max-samples, \
             or bring more text"
        )));
    }
    if found < tries + options.heldout {
        observer.warn(&format!(
            "{found} documents are held out, not {}: there are no more",
            tries + options.heldout
        ));
    }
    Ok(Parts { validation, heldout })
}

/// Where the recipe of a search lies.
pub fn recipe_path(out: &Path) -> PathBuf {
    out.join(RECIPE)
}
