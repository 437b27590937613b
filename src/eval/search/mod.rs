//! A format for each layer, found from what each costs alone and measured for real.
//!
//! `knapsack` chooses, `assign` writes the choice down as a recipe and checks that mxrewrite makes of
//! it what was chosen, `heldout` measures it on documents that the choice has not seen.

mod assign;
mod heldout;
mod knapsack;
mod result;

use super::error::{Error, Result};
use super::observer::Observer;
use super::process::now;
use super::sensitivity::result::Sensitivity;
use super::sensitivity::sample;
use super::sensitivity::setup::{Bench, Setup};
use super::store::{Store, WorkFolder};
use super::windows::Window;
use crate::rewrite::{Recipe, RewriteReport};
use assign::Assignment;
use heldout::Bar;
use knapsack::{Choice, Front, Taken};
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
    if setup.model.sha256 != sensitivity.model.sha256 {
        return Err(Error::Usage(format!(
            "{} is not the model that was measured (SHA-256 {}, measured {})",
            bench.model.display(),
            setup.model.sha256,
            sensitivity.model.sha256
        )));
    }
    let folder = WorkFolder::new(&store.work_root(), "search")?;
    let parts = documents(&setup, sensitivity, options, observer)?;
    let mut tried = Vec::new();
    let solution = match options.target {
        Target::Bits(bits) => problem.within(bits)?,
        Target::DeltaPpl(limit) => {
            let bar = Bar::new((&setup, bench), &parts.validation.0, folder.path(), observer)?;
            problem.up_to(limit, &bar, &mut tried)?
        }
    };
    let assignment = problem.assignment(&solution.taken);
    let point = problem.point(&solution.taken);
    let name = format!("search {:.3} bits", point.bits_per_weight);
    let recipe = assign::recipe(sensitivity, &assignment, &name)?;
    let toml = recipe.to_toml();
    assign::check(&bench.model, sensitivity, &assignment, &toml)?;
    store.write(RECIPE, toml.as_bytes())?;
    let front = problem.points(&solution.taken);
    write_json(&store, FRONT, &front)?;
    observer
        .note(&format!("{}: the recipe does what was chosen", bench.out.join(RECIPE).display()));
    let bar = Bar::new((&setup, bench), &parts.heldout.0, folder.path(), observer)?;
    let measured = problem.measure(&bar, &recipe, &also, options)?;
    let result = Search {
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
        found: point,
        bound: problem.bound(&solution),
        assignment: problem.named(&assignment),
        seq_len: bench.seq_len,
        search_documents: sensitivity.documents.clone(),
        validation_documents: if tried.is_empty() { Vec::new() } else { parts.validation.1 },
        heldout_documents: parts.heldout.1,
        overlap_known: parts.overlap_known,
        baseline_xent: bar.baseline_xent(),
        baseline: bar.baseline.clone(),
        tried,
        measured,
    };
    write_json(&store, FILE, &result)?;
    drop(folder);
    store.clear_work()?;
    Ok(result)
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

/// Documents of a search: windows, and their numbers in the text.
struct Parts {
    validation: (Vec<Window>, Vec<usize>),
    heldout: (Vec<Window>, Vec<usize>),
    overlap_known: bool,
}

/// Documents that the measurement has not seen.
fn documents(
    setup: &Setup,
    sensitivity: &Sensitivity,
    options: &Options,
    observer: &dyn Observer,
) -> Result<Parts> {
    let overlap_known = setup.data.sha256 == sensitivity.data.sha256;
    if !overlap_known {
        observer.warn(
            "the layers were measured on another text: whether it shares documents with this one is \
             not known",
        );
    }
    let mut taken = if overlap_known { sensitivity.documents.clone() } else { Vec::new() };
    let mut next = |count: usize| {
        let chosen = sample::spread(&setup.corpus, count, &taken);
        let part = sample::windows(&setup.corpus, &chosen);
        taken.extend(&part.1);
        part
    };
    let validation = match options.target {
        Target::Bits(_) => (Vec::new(), Vec::new()),
        Target::DeltaPpl(_) => next(options.validation),
    };
    let heldout = next(options.heldout);
    let wanted = match options.target {
        Target::Bits(_) => 0,
        Target::DeltaPpl(_) => options.validation,
    } + options.heldout;
    let found = validation.0.len() + heldout.0.len();
    if heldout.0.len() < 2 {
        return Err(Error::Usage(format!(
            "{found} documents are left beside those that layers were measured on; raise --max-samples, \
             or bring more text"
        )));
    }
    if found < wanted {
        observer.warn(&format!("{found} documents are held out, not {wanted}: there are no more"));
    }
    Ok(Parts { validation, heldout, overlap_known })
}

/// Layers and what each may become.
struct Problem<'a> {
    sensitivity: &'a Sensitivity,
    /// Sites that have one format, by item.
    groups: Vec<Vec<usize>>,
    /// Formats of the options.
    formats: Vec<String>,
    front: Front,
    weights: u64,
}

impl<'a> Problem<'a> {
    fn new(sensitivity: &'a Sensitivity, options: &Options) -> Result<Self> {
        let mut formats = options.formats.clone();
        if formats.is_empty() {
            formats.clone_from(&sensitivity.formats);
        }
        if let Some(unknown) =
            formats.iter().find(|format| *format != NONE && !sensitivity.formats.contains(format))
        {
            return Err(Error::Usage(format!(
                "--formats {unknown}: not measured; measured are {} (and none = as it is)",
                sensitivity.formats.join(", ")
            )));
        }
        let groups = groups(sensitivity, options.together);
        let item = |group: &Vec<usize>| -> Vec<Choice> {
            let of = |format: &String| {
                let each = group.iter().map(|&site| cost(sensitivity, site, format));
                each.fold(Choice { cost: 0, loss: 0.0 }, |sum, (bytes, kl, delta)| Choice {
                    cost: sum.cost + bytes,
                    loss: sum.loss
                        + match options.objective {
                            Objective::Kl => kl,
                            Objective::DeltaXent => delta,
                        },
                })
            };
            formats.iter().map(of).collect()
        };
        let front = Front::new(groups.iter().map(item).collect());
        let weights = sensitivity.sites.iter().map(|site| site.weights).sum();
        Ok(Self { sensitivity, groups, formats, front, weights })
    }

    fn within(&self, bits: f64) -> Result<knapsack::Solution> {
        let budget = (bits * self.weights as f64 / 8.0).floor();
        self.front.within(budget as u64).ok_or_else(|| {
            let least = self.point(&self.front.point(0)).bits_per_weight;
            Error::Usage(format!(
                "--budget-bits {bits}: the cheapest of these formats takes {least:.3} bits a weight, \
                 scales included"
            ))
        })
    }

    /// The cheapest point of the front whose perplexity, measured, keeps to `limit` percent. Taken to
    /// fall along the front, which it does but for noise.
    fn up_to(
        &self,
        limit: f64,
        bar: &Bar<'_>,
        tried: &mut Vec<Measured>,
    ) -> Result<knapsack::Solution> {
        /// Points closer than this are not told apart, bits a weight.
        const NEAR: f64 = 0.02;
        let mut keeps = |index: usize| -> Result<bool> {
            let assignment = self.assignment(&self.front.point(index));
            let name = format!("point {index}");
            let recipe = assign::recipe(self.sensitivity, &assignment, &name)?;
            let measured = bar.recipe(&recipe, &|report| self.size(report))?;
            let keeps = measured.delta_ppl_percent <= limit;
            tried.push(measured);
            Ok(keeps)
        };
        let last = self.front.len() - 1;
        if !keeps(last)? {
            let best = tried.last().map_or(f64::NAN, |one| one.delta_ppl_percent);
            return Err(Error::Usage(format!(
                "--max-delta-ppl {limit}%: the finest of these formats costs {best:.2} %; add finer ones \
                 to --formats, or none"
            )));
        }
        let (mut below, mut above) = (0, last);
        if last > 0 && keeps(0)? {
            above = 0;
        }
        let bits = |index: usize| self.point(&self.front.point(index)).bits_per_weight;
        while above > below + 1 && bits(above) - bits(below) > NEAR {
            let middle = below.midpoint(above);
            match keeps(middle)? {
                true => above = middle,
                false => below = middle,
            }
        }
        let taken = self.front.point(above);
        let (cost, loss) = self.front.sums(&taken);
        Ok(knapsack::Solution { taken, cost, loss, bound: loss })
    }

    /// Format of every site.
    fn assignment(&self, taken: &Taken) -> Assignment {
        let mut formats = vec![NONE.to_owned(); self.sensitivity.sites.len()];
        for (group, &option) in self.groups.iter().zip(taken) {
            group.iter().for_each(|&site| formats[site].clone_from(&self.formats[option]));
        }
        formats
    }

    fn named(&self, assignment: &Assignment) -> Vec<(String, String)> {
        let sites = self.sensitivity.sites.iter();
        sites.zip(assignment).map(|(site, own)| (site.shown().to_owned(), own.clone())).collect()
    }

    fn point(&self, taken: &Taken) -> Point {
        let assignment = self.assignment(taken);
        let (mut bytes, mut kl, mut delta_xent) = (0, 0.0, 0.0);
        for (site, format) in assignment.iter().enumerate() {
            let (own, own_kl, own_delta) = cost(self.sensitivity, site, format);
            bytes += own;
            kl += own_kl;
            delta_xent += own_delta;
        }
        let count = |format: &String| {
            (format.clone(), assignment.iter().filter(|own| *own == format).count())
        };
        Point {
            bits_per_weight: self.bits(bytes),
            bytes,
            predicted_kl: kl,
            predicted_delta_xent: delta_xent,
            layers: self.formats.iter().map(count).collect(),
            chosen: false,
        }
    }

    fn bits(&self, bytes: u64) -> f64 {
        bytes as f64 * 8.0 / self.weights.max(1) as f64
    }

    /// The front, with the solution among its points.
    fn points(&self, taken: &Taken) -> Vec<Point> {
        let mut points: Vec<Point> =
            (0..self.front.len()).map(|index| self.point(&self.front.point(index))).collect();
        let found = Point { chosen: true, ..self.point(taken) };
        points.retain(|point| point.bytes != found.bytes);
        points.push(found);
        points.sort_by_key(|point| point.bytes);
        points
    }

    fn bound(&self, solution: &knapsack::Solution) -> result::Bound {
        let gap = (solution.loss - solution.bound) / solution.bound.abs();
        result::Bound {
            objective: solution.loss,
            linear_programme: solution.bound,
            gap_percent: (gap.is_finite()).then_some(gap * 100.0),
        }
    }

    /// Bytes and bits of the layers that were measured, in a rewritten model.
    fn size(&self, report: &RewriteReport) -> (u64, f64) {
        let bytes = self.sensitivity.sites.iter().map(|site| {
            let mut planned = report.plan.sites.iter();
            let same = planned.find(|planned| {
                planned.site.node_name == site.node
                    && planned.site.weight.initializer == site.initializer
            });
            same.map_or(site.bytes_as_is, |planned| planned.bytes_after)
        });
        let bytes = bytes.sum();
        (bytes, self.bits(bytes))
    }

    /// The recipe, each format alone, and others, on documents that are held out.
    fn measure(
        &self,
        bar: &Bar<'_>,
        recipe: &Recipe,
        also: &[Recipe],
        options: &Options,
    ) -> Result<Vec<Measured>> {
        let size = |report: &RewriteReport| self.size(report);
        let mut measured = vec![bar.recipe(recipe, &size)?];
        for format in self.formats.iter().filter(|format| *format != NONE && !options.no_uniform) {
            let all = vec![format.clone(); self.sensitivity.sites.len()];
            let uniform = assign::recipe(self.sensitivity, &all, &format!("uniform {format}"))?;
            measured.push(bar.recipe(&uniform, &size)?);
        }
        for other in also {
            measured.push(bar.recipe(other, &size)?);
        }
        Ok(measured)
    }
}

/// Bytes, divergence and difference of cross-entropy of a site in a format.
fn cost(sensitivity: &Sensitivity, site: usize, format: &str) -> (u64, f64, f64) {
    let site = &sensitivity.sites[site];
    match site.formats.iter().find(|one| one.format == format) {
        Some(one) => (one.bytes, one.kl, one.delta_xent),
        None => (site.bytes_as_is, 0.0, 0.0),
    }
}

/// Sites that have one format: those that a rule cannot tell apart and, `together`, those that read
/// one value.
fn groups(sensitivity: &Sensitivity, together: bool) -> Vec<Vec<usize>> {
    let mut groups: Vec<Vec<usize>> = Vec::new();
    for (index, site) in sensitivity.sites.iter().enumerate() {
        let same = |other: &usize| {
            let other = &sensitivity.sites[*other];
            assign::subject(other) == assign::subject(site)
                || together && other.input == site.input && other.role == site.role
        };
        match groups.iter_mut().find(|group| group.iter().any(same)) {
            Some(group) => group.push(index),
            None => groups.push(vec![index]),
        }
    }
    groups
}

/// Where the recipe of a search lies.
pub fn recipe_path(out: &Path) -> PathBuf {
    out.join(RECIPE)
}
