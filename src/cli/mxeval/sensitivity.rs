//! `mxeval sensitivity`.

use super::{Console, RewriteArgs, positive, share, tokenizer};
use crate::eval::corpus::Dataset;
use crate::eval::devices::Request;
use crate::eval::run::Data;
use crate::eval::sensitivity::result::Sensitivity;
use crate::eval::sensitivity::{self, Bench, Options};
use clap::{ArgGroup, Args};
use mx_kernels::ElementFormat;
use std::path::{Path, PathBuf};

/// Rank every layer x format by what it costs alone
///
/// Each layer is quantised to each format while all others stay as they are; KL divergence and
/// cross-entropy against the baseline go to stdout and to OUT/sensitivity.json, from which `mxeval search`
/// makes a recipe. Passes begin where the layer lies, on what the baseline's pass left there.
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("sensitivity-text").required(true).args(["data", "dataset"]))]
pub struct SensitivityArgs {
    /// The model
    #[arg(value_name = "MODEL.onnx")]
    model: PathBuf,
    #[command(flatten)]
    bench: BenchArgs,
    #[command(flatten)]
    measure: MeasureArgs,
    /// Another sensitivity.json: print the rank correlation as well
    #[arg(long, value_name = "FILE.json")]
    compare: Option<PathBuf>,
}

/// How layers are measured.
#[derive(Debug, Args)]
#[command(next_help_heading = "Measuring layers")]
pub struct MeasureArgs {
    /// Documents to measure on, the subsets of the text in turn
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = positive)]
    samples: usize,
    /// Score one of N positions, or all: the head is computed there alone
    #[arg(long, value_name = "N|all", default_value = "2", value_parser = every)]
    positions: usize,
    /// Formats to measure
    #[arg(long, value_delimiter = ',', value_name = "FORMAT,...")]
    #[arg(default_value = "fp4_e2m1,fp6_e2m3,fp8_e4m3")]
    mx_format: Vec<ElementFormat>,
    /// Full passes of a model rewritten for each layer and format: slow, the same figures
    #[arg(long)]
    full_passes: bool,
    #[command(flatten)]
    rewrite: RewriteArgs,
}

impl MeasureArgs {
    /// The library's form.
    pub fn options(&self, args: &BenchArgs, bench: Bench) -> anyhow::Result<Options> {
        Ok(Options {
            bench,
            samples: self.samples,
            every: self.positions,
            formats: self.mx_format.clone(),
            rewrite: self.rewrite.options(args.threads)?,
            full: self.full_passes,
        })
    }
}

/// What sensitivity and search have in common.
#[derive(Debug, Args)]
pub struct BenchArgs {
    /// The model's tokenizer.json [default: beside the model]
    #[arg(long, value_name = "tokenizer.json")]
    pub tokenizer: Option<PathBuf>,
    /// Text: .parquet or .jsonl[.zst] with a `text` column, or .txt (one document); a path, a quoted
    /// glob or an http(s) address. May be repeated
    #[arg(long, value_name = "FILE")]
    pub data: Vec<PathBuf>,
    /// Text from the Hugging Face hub: pile, wikitext or OWNER/NAME[:PATH-OR-GLOB]
    #[arg(long, value_name = "NAME")]
    pub dataset: Option<Dataset>,
    /// Draw the documents at random from the whole text, instead of taking its first
    #[arg(long)]
    pub shuffle: bool,
    /// Seed of --shuffle
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// Documents to read, of which some are taken
    #[arg(long, value_name = "N", default_value_t = 1000)]
    pub max_samples: usize,
    /// Documents in one batch
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = positive)]
    pub batch_size: usize,
    /// Tokens of a document that are used
    #[arg(long, value_name = "N", default_value_t = 512)]
    pub seq_len: usize,
    /// cpu, cuda, cuda:0, or auto: a GPU with free memory, else the CPU; one device is used
    #[arg(long, default_value = "auto")]
    pub device: Request,
    /// Share of its memory that a GPU must have free for auto to take it
    #[arg(long, value_name = "0..1", default_value_t = 0.5, value_parser = share)]
    pub min_free_ratio: f64,
    /// Threads of one operator [default: ONNX Runtime's choice]
    #[arg(long, value_name = "N", value_parser = positive)]
    pub threads: Option<usize>,
    /// Threads that tokenise
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = positive)]
    pub loader_workers: usize,
    /// libonnxruntime [default: ORT_DYLIB_PATH, beside mxeval, the onnxruntime Python package]
    #[arg(long, value_name = "PATH")]
    pub ort_lib: Option<PathBuf>,
    /// Output folder
    #[arg(long, value_name = "DIR", default_value = "mxeval_out")]
    pub out: PathBuf,
    /// Go on where an earlier measurement of layers into --out was interrupted
    #[arg(long)]
    pub resume: bool,
    /// Print JSON instead of a table
    #[arg(long)]
    pub json: bool,
    /// ONNX Runtime's log on stderr
    #[arg(long)]
    pub debug: bool,
}

impl BenchArgs {
    /// The library's form, for `model`.
    pub fn bench(&self, model: &Path) -> anyhow::Result<Bench> {
        let data = match &self.dataset {
            Some(dataset) => Data::Dataset(dataset.clone()),
            None => Data::Files(self.data.clone()),
        };
        Ok(Bench {
            model: model.into(),
            tokenizer: tokenizer(self.tokenizer.as_ref(), model)?,
            data,
            shuffle: self.shuffle.then_some(self.seed),
            max_samples: self.max_samples,
            seq_len: self.seq_len,
            batch_size: self.batch_size,
            device: self.device.clone(),
            min_free_ratio: self.min_free_ratio,
            threads: self.threads,
            loader_workers: self.loader_workers,
            ort_lib: self.ort_lib.clone(),
            out: self.out.clone(),
            resume: self.resume,
            debug: self.debug,
            command: crate::cli::command_line(),
        })
    }
}

fn every(text: &str) -> Result<usize, String> {
    match text {
        "all" => Ok(1),
        number => positive(number),
    }
}

impl SensitivityArgs {
    /// Measures and prints.
    pub fn run(&self) -> anyhow::Result<u8> {
        // A mistyped name must not cost the measurement.
        let other = self.compare.as_deref().map(Sensitivity::open).transpose()?;
        let options = self.measure.options(&self.bench, self.bench.bench(&self.model)?)?;
        let console = Console::default();
        let result = sensitivity::run(&options, &console)?;
        let correlation = other.map(|other| result.compare(&other)).transpose()?;
        if self.bench.json {
            println!("{}", serde_json::to_string_pretty(&result)?);
        } else {
            print!("{}", result.table());
        }
        if let Some(correlation) = correlation {
            match self.bench.json {
                true => console.say(&correlation.text()),
                false => print!("\n{}", correlation.text()),
            }
        }
        let file = self.bench.out.join(sensitivity::FILE);
        console.say(&format!("written: {}", file.display()));
        Ok(0)
    }
}
