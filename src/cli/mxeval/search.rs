//! `mxeval search`.

use super::sensitivity::{BenchArgs, MeasureArgs};
use super::{Console, positive};
use crate::eval::search::{self, Objective, Options, Target};
use crate::eval::sensitivity::result::Sensitivity;
use clap::{ArgGroup, Args};
use std::path::PathBuf;

/// Find a format for each layer within a budget, and measure the recipe
///
/// From what each layer costs alone (`mxeval sensitivity`) a multiple-choice knapsack is solved; the recipe
/// goes to OUT/recipe.toml for mxrewrite --recipe, all points of size against loss to OUT/front.json, and
/// figures on documents that the search has not seen to stdout and OUT/search.json.
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("search-text").required(true).args(["data", "dataset"]))]
#[command(group = ArgGroup::new("target").required(true).args(["budget_bits", "max_delta_ppl"]))]
pub struct SearchArgs {
    /// The model
    #[arg(value_name = "MODEL.onnx")]
    model: PathBuf,
    /// What `mxeval sensitivity` wrote [default: measured first, with the options below]
    #[arg(long, value_name = "FILE.json")]
    sensitivity: Option<PathBuf>,
    /// At most so many bits a weight, scales included, over the layers measured
    #[arg(long, value_name = "BITS", value_parser = number)]
    budget_bits: Option<f64>,
    /// The fewest bits with which perplexity rises by at most this
    #[arg(long, value_name = "PERCENT%", value_parser = percent)]
    max_delta_ppl: Option<f64>,
    /// What is kept small: the sum of the layers' kl or delta-xent
    #[arg(long, default_value = "kl")]
    objective: Objective,
    /// Formats to choose from; none = a layer may stay as it is [default: those measured]
    #[arg(long, value_delimiter = ',', value_name = "FORMAT,...")]
    formats: Vec<String>,
    /// One format for layers that read one value (queries, keys and values; gate and up)
    #[arg(long)]
    keep_together: bool,
    /// Documents to report figures on, none of which the search has seen
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = positive)]
    heldout_samples: usize,
    /// With --max-delta-ppl: documents to try recipes on, apart from those
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = positive)]
    validation_samples: usize,
    /// Do not measure each format alone for comparison
    #[arg(long)]
    no_uniform: bool,
    /// Another recipe to measure on the same documents; repeatable
    #[arg(long, value_name = "RECIPE")]
    also: Vec<PathBuf>,
    #[command(flatten)]
    bench: BenchArgs,
    #[command(flatten)]
    measure: MeasureArgs,
}

fn number(text: &str) -> Result<f64, String> {
    let number = text.parse::<f64>().ok().filter(|number| number.is_finite() && *number > 0.0);
    number.ok_or_else(|| "must be a number above 0".to_owned())
}

fn percent(text: &str) -> Result<f64, String> {
    number(text.trim_end_matches('%'))
}

impl SearchArgs {
    /// Searches and prints.
    pub fn run(&self) -> anyhow::Result<u8> {
        let console = Console::default();
        let target = match (self.budget_bits, self.max_delta_ppl) {
            (Some(bits), _) => Target::Bits(bits),
            (None, limit) => Target::DeltaPpl(limit.unwrap_or_default()),
        };
        let bench = self.bench.bench(&self.model)?;
        let there = self.bench.out.join("sensitivity.json");
        if self.sensitivity.is_none() && !self.bench.resume && there.is_file() {
            let text = format!(
                "{} is there already: pass --sensitivity with it, or --resume to measure what it lacks, or \
                 another --out",
                there.display()
            );
            return Err(crate::eval::Error::Usage(text).into());
        }
        let sensitivity = match &self.sensitivity {
            Some(path) => Sensitivity::open(path)?,
            None => {
                let options = self.measure.options(&self.bench, bench.clone())?;
                crate::eval::sensitivity::run(&options, &console)?
            }
        };
        let options = Options {
            bench,
            target,
            objective: self.objective,
            formats: self.formats.clone(),
            together: self.keep_together,
            heldout: self.heldout_samples,
            validation: self.validation_samples,
            no_uniform: self.no_uniform,
            also: self.also.clone(),
        };
        let result = search::run(&options, &sensitivity, &console)?;
        if self.bench.json {
            println!("{}", serde_json::to_string_pretty(&result)?);
        } else {
            print!("{}", result.table());
        }
        let recipe = search::recipe_path(&self.bench.out);
        console.say(&format!("mxrewrite {} --recipe {}", self.model.display(), recipe.display()));
        Ok(0)
    }
}
