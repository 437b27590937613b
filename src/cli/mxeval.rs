//! The `mxeval` command: arguments to one library call to an exit code.
#![allow(clippy::print_stdout, clippy::print_stderr)]

mod compare;
mod search;
mod sensitivity;
mod tasks;

use crate::eval::corpus::Dataset;
use crate::eval::devices::Request;
use crate::eval::job::{Job, listed};
use crate::eval::record::{Record, Status};
use crate::eval::run::{self, Data, Options, Outcome};
use crate::eval::stage::{Selection, Stage};
use crate::eval::statistics::Bootstrap;
use crate::eval::windows::{Bos, Definition, Mode};
use crate::eval::{Error, Observer, report};
use crate::rewrite::{Activation, BaseDtype, RewriteOptions, Tier};
use anyhow::Context as _;
use clap::{ArgGroup, Args, Parser, Subcommand};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use mx_kernels::{ElementFormat, Rounding, ScaleRule};
use std::collections::HashMap;
use std::ffi::OsString;
use std::io::{IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Measure what a precision costs: perplexity, entropy and bits per byte of ONNX language models
/// on real text.
///
/// With --sweep a model is rewritten for every stage and measured; graphs given by name are
/// measured as they are. Results go to stdout and to --out (results.jsonl, report.html, report.md,
/// report.csv, run.json), progress to stderr.
#[derive(Debug, Parser)]
#[command(name = "mxeval", version, max_term_width = 100, disable_help_subcommand = true)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    run: RunArgs,
}

/// What to measure, on which text, how and where.
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("what").required(true).args(["graphs", "sweep", "models"]))]
#[command(group = ArgGroup::new("text").required(true).args(["data", "dataset"]))]
struct RunArgs {
    /// Graphs to measure as they are
    #[arg(value_name = "GRAPH.onnx")]
    graphs: Vec<PathBuf>,
    /// Model to rewrite and measure in every stage
    #[arg(long, value_name = "MODEL.onnx")]
    sweep: Option<PathBuf>,
    /// List of models to sweep (scripts/models.toml): those exported to MODELS_DIR/NAME/model.onnx
    #[arg(long, value_name = "FILE.toml")]
    models: Option<PathBuf>,
    /// Only these models of the list
    #[arg(long, requires = "models")]
    name: Vec<String>,
    /// Where the listed models' exports lie
    #[arg(long, value_name = "DIR", default_value = ".", requires = "models")]
    models_dir: PathBuf,
    /// The model's tokenizer.json [default: beside the model]
    #[arg(long, value_name = "tokenizer.json")]
    tokenizer: Option<PathBuf>,
    /// Evaluation text: .parquet or .jsonl[.zst] with a `text` column, or .txt (one document); a
    /// path, a quoted glob or an http(s) address. May be repeated
    #[arg(long, value_name = "FILE")]
    data: Vec<PathBuf>,
    /// Evaluation text from the Hugging Face hub: pile, wikitext or OWNER/NAME[:PATH-OR-GLOB]
    #[arg(long, value_name = "NAME")]
    dataset: Option<Dataset>,
    /// Documents to read
    #[arg(long, value_name = "N", default_value_t = 1000)]
    max_samples: usize,
    /// Draw the documents at random from the whole text, instead of taking its first
    #[arg(long)]
    shuffle: bool,
    /// Seed of --shuffle
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Documents in one batch [default: 8, or the list's]
    #[arg(long, value_name = "N", value_parser = positive)]
    batch_size: Option<usize>,
    #[command(flatten)]
    definition: DefinitionArgs,
    #[command(flatten)]
    place: PlaceArgs,
    /// Threads of one operator [default: ONNX Runtime's choice]
    #[arg(long, value_name = "N", value_parser = positive)]
    threads: Option<usize>,
    /// Threads that tokenise
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = positive)]
    loader_workers: usize,
    /// libonnxruntime [default: ORT_DYLIB_PATH, beside mxeval, the onnxruntime Python package]
    #[arg(long, value_name = "PATH")]
    ort_lib: Option<PathBuf>,
    /// Output folder
    #[arg(long, value_name = "DIR", default_value = "mxeval_out")]
    out: PathBuf,
    /// Reuse the stages that an earlier run into --out finished
    #[arg(long)]
    resume: bool,
    /// Keep the loss of every document in run.json, too; scores/ has it in any case
    #[arg(long)]
    documents: bool,
    /// Do not run the baseline beside every other stage: no divergence, agreement and change of
    /// p(correct), in about half the time
    #[arg(long)]
    no_kl: bool,
    /// Resamples of the bootstrap behind every interval
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    #[arg(value_parser = clap::value_parser!(u32).range(100..=1_000_000))]
    resamples: u32,
    /// Seed of the bootstrap
    #[arg(long, value_name = "N", default_value_t = 0)]
    bootstrap_seed: u64,
    /// Print records (JSON Lines) instead of the table
    #[arg(long)]
    json: bool,
    /// ONNX Runtime's log on stderr
    #[arg(long)]
    debug: bool,
    #[command(flatten)]
    stages: StageArgs,
    #[command(flatten)]
    rewrite: RewriteArgs,
}

/// What is scored, and from which context (docs/definitions.md).
#[derive(Debug, Args)]
#[command(next_help_heading = "Definition of the figures")]
struct DefinitionArgs {
    /// per-document: the first seq-len tokens of each; rolling: whole documents, as lm-eval;
    /// stride: whole documents in overlapping windows; concat: one stream, as GPTQ's WikiText-2;
    /// second-half: one stream, the second half of each window scored, as llama.cpp
    #[arg(long, default_value_t)]
    mode: Mode,
    /// Tokens of a window
    #[arg(long, value_name = "N", default_value_t = 512)]
    seq_len: usize,
    /// Tokens from one window's beginning to the next, with --mode stride [default: half of seq-len]
    #[arg(long, value_name = "N")]
    stride: Option<usize>,
    /// Where BOS stands: none, first (of each document or stream), each (window) [default: first
    /// in mode rolling, else as the tokenizer adds it]
    #[arg(long, value_name = "none|first|each")]
    bos: Option<Bos>,
}

/// What is not a measurement. A graph called `compare` is `./compare`.
#[derive(Debug, Subcommand)]
enum Command {
    Sensitivity(Box<sensitivity::SensitivityArgs>),
    Search(Box<search::SearchArgs>),
    Compare(compare::CompareArgs),
    Plan(Box<tasks::PlanArgs>),
    RunTask(tasks::RunTaskArgs),
    Merge(tasks::MergeArgs),
}

/// Where stages run.
#[derive(Debug, Args)]
#[command(next_help_heading = "Devices")]
struct PlaceArgs {
    /// cpu, cuda (all GPUs), cuda:0,1 (these), or auto: the GPUs with free memory, else the CPU
    #[arg(long, default_value = "auto")]
    device: Request,
    /// Share of its memory that a GPU must have free for auto to take it
    #[arg(long, value_name = "0..1", default_value_t = 0.5, value_parser = share)]
    min_free_ratio: f64,
    /// Stages measured at a time on one GPU
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = positive)]
    workers_per_device: usize,
    /// Spread the documents of one stage over all GPUs, instead of the stages
    #[arg(long)]
    shard_documents: bool,
}

/// Which stages of a sweep run.
#[derive(Debug, Args)]
#[command(next_help_heading = "Stages of a sweep")]
struct StageArgs {
    /// Only these stages
    #[arg(long, value_delimiter = ',', value_name = "STAGE,...")]
    stages: Vec<Stage>,
    /// Only these MX formats
    #[arg(long, value_delimiter = ',', value_name = "FORMAT,...")]
    mx_format: Vec<ElementFormat>,
    /// Leave out bf16
    #[arg(long)]
    skip_bf16: bool,
    /// Leave out bfp16
    #[arg(long)]
    skip_bfp16: bool,
    /// Leave out nvfp8-emu-e4m3 and nvfp8-emu-e5m2
    #[arg(long)]
    skip_nvfp8_emulation: bool,
    /// Leave out every MX stage
    #[arg(long, visible_alias = "no-mx")]
    skip_mx: bool,
    /// Leave out int8
    #[arg(long)]
    skip_int8: bool,
    /// Leave out nvfp8
    #[arg(long)]
    skip_nvfp8: bool,
}

/// How a sweep rewrites.
#[derive(Debug, Args)]
#[command(next_help_heading = "Rewriting in a sweep")]
#[command(group = ArgGroup::new("selection").args(["tier", "tier_a", "mlp_only", "all_linears"]))]
struct RewriteArgs {
    /// Layers: a, b, c, d, full [default: full]
    #[arg(long)]
    tier: Option<Tier>,
    /// The same as --tier a
    #[arg(long)]
    tier_a: bool,
    /// The same as --tier a
    #[arg(long)]
    mlp_only: bool,
    /// Every Linear but routers and the head
    #[arg(long)]
    all_linears: bool,
    /// Activation format of the MX stages, or none [default: the weight's]
    #[arg(long, value_name = "FORMAT")]
    activation_format: Option<String>,
    /// Float type of everything that is not replaced: fp32, bf16 (GPUs only), fp16
    /// [default: the model's own]
    #[arg(long, value_name = "TYPE")]
    base_dtype: Option<BaseDtype>,
    /// Elements that share an exponent
    #[arg(long, value_name = "N", default_value_t = 32)]
    block_size: usize,
    /// even, nearest or floor
    #[arg(long, default_value = "even")]
    rounding: Rounding,
    /// floor, ceil, even or rceil
    #[arg(long, default_value = "floor")]
    scale_rule: ScaleRule,
    /// Add layers whose module path matches
    #[arg(long, value_name = "REGEX")]
    include: Vec<String>,
    /// Leave out layers whose module path matches
    #[arg(long, value_name = "REGEX")]
    exclude: Vec<String>,
}

fn positive(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("must be at least 1".into()),
        Ok(number) => Ok(number),
        Err(error) => Err(format!("{error}")),
    }
}

fn share(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(share) if (0.0..=1.0).contains(&share) => Ok(share),
        _ => Err("must be a number between 0 and 1".into()),
    }
}

/// Runs the command and returns its exit code; `arguments` begin with its name. Usage errors, `--help` and `--version` end the
/// process.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> u8 {
    let cli = Cli::parse_from(super::typed(arguments));
    let outcome = match &cli.command {
        Some(Command::Sensitivity(args)) => args.run(),
        Some(Command::Search(args)) => args.run(),
        Some(Command::Compare(args)) => args.run().map(|text| {
            print!("{text}");
            0
        }),
        Some(Command::Plan(args)) => args.run(),
        Some(Command::RunTask(args)) => args.run(),
        Some(Command::Merge(args)) => args.run(),
        None => evaluate(&cli.run),
    };
    match outcome {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error}");
            match error.downcast_ref() {
                Some(Error::Usage(_)) => 2,
                Some(Error::Interrupted) => 130,
                _ => 1,
            }
        }
    }
}

fn evaluate(args: &RunArgs) -> anyhow::Result<u8> {
    let (jobs, options) = args.resolve()?;
    let console = Console::default();
    let outcome = run::run(&jobs, &options, &console)?;
    show(&outcome, &options, args.json, &console)?;
    Ok(u8::from(outcome.failed()))
}

/// Results to stdout.
fn show(outcome: &Outcome, options: &Options, json: bool, console: &Console) -> anyhow::Result<()> {
    if json {
        outcome.entries.iter().for_each(|entry| println!("{}", entry.line));
    } else {
        print!("{}", report::terminal(&outcome.records(), &options.definition.text()));
    }
    console.say(&format!("report: {}", options.out.join("report.html").display()));
    if outcome.interrupted {
        return Err(Error::Interrupted.into());
    }
    Ok(())
}

impl RunArgs {
    /// The library's form.
    fn resolve(&self) -> anyhow::Result<(Vec<Job>, Options)> {
        let DefinitionArgs { mode, seq_len, stride, bos } = self.definition;
        let definition = Definition::new(mode, seq_len, stride, bos)?;
        let rewrite = self.rewrite.options(self.threads)?;
        let stages = self.stages.selection().stages(rewrite.tier)?;
        let jobs = jobs(self, &stages)?;
        let data = match &self.dataset {
            Some(dataset) => Data::Dataset(dataset.clone()),
            None => Data::Files(self.data.clone()),
        };
        let options = Options {
            data,
            shuffle: self.shuffle.then_some(self.seed),
            max_samples: self.max_samples,
            definition,
            device: self.place.device.clone(),
            min_free_ratio: self.place.min_free_ratio,
            workers_per_device: self.place.workers_per_device,
            shard_documents: self.place.shard_documents,
            threads: self.threads,
            loader_workers: self.loader_workers,
            ort_lib: self.ort_lib.clone(),
            out: self.out.clone(),
            resume: self.resume,
            documents: self.documents,
            kl: !self.no_kl,
            bootstrap: Bootstrap { seed: self.bootstrap_seed, resamples: self.resamples as usize },
            debug: self.debug,
            rewrite,
            command: super::command_line(),
        };
        Ok((jobs, options))
    }
}

fn jobs(cli: &RunArgs, stages: &[Stage]) -> anyhow::Result<Vec<Job>> {
    if let Some(list) = &cli.models {
        if cli.tokenizer.is_some() {
            let text = "--tokenizer does not go with --models: each model's lies beside it";
            return Err(Error::Usage(text.into()).into());
        }
        let found = listed(list, &cli.models_dir, &cli.name, cli.batch_size, stages)?;
        found.missing.iter().for_each(|line| eprintln!("missing: {line}"));
        return Ok(found.jobs);
    }
    let batch_size = cli.batch_size.unwrap_or(8);
    match &cli.sweep {
        Some(model) => Ok(vec![Job::sweep(
            model,
            &tokenizer(cli.tokenizer.as_ref(), model)?,
            batch_size,
            stages,
        )]),
        None => {
            let first = cli.graphs.first().context("no graph to measure")?;
            Ok(Job::graphs(&cli.graphs, &tokenizer(cli.tokenizer.as_ref(), first)?, batch_size))
        }
    }
}

/// `--tokenizer`, else tokenizer.json in the model's folder or the one above.
fn tokenizer(named: Option<&PathBuf>, model: &Path) -> anyhow::Result<PathBuf> {
    if let Some(path) = named {
        return Ok(path.clone());
    }
    let folder = model.parent().unwrap_or(Path::new(""));
    let places = [folder.join("tokenizer.json"), folder.join("..").join("tokenizer.json")];
    places.into_iter().find(|path| path.is_file()).ok_or_else(|| {
        let text = format!("no tokenizer.json beside {}: pass --tokenizer", model.display());
        Error::Usage(text).into()
    })
}

impl StageArgs {
    fn selection(&self) -> Selection {
        Selection {
            only: self.stages.clone(),
            mx_formats: self.mx_format.clone(),
            skip_bf16: self.skip_bf16,
            skip_bfp16: self.skip_bfp16,
            skip_nvfp8_emulation: self.skip_nvfp8_emulation,
            skip_mx: self.skip_mx,
            skip_int8: self.skip_int8,
            skip_nvfp8: self.skip_nvfp8,
        }
    }
}

impl RewriteArgs {
    fn options(&self, threads: Option<usize>) -> Result<RewriteOptions, Error> {
        let tier = match self.tier {
            Some(tier) => tier,
            None if self.tier_a || self.mlp_only => Tier::A,
            None if self.all_linears => Tier::AllLinears,
            None => Tier::Full,
        };
        let activation = match self.activation_format.as_deref() {
            None => Activation::Same,
            Some("none") => Activation::None,
            Some(name) => Activation::Format(
                name.parse().map_err(|e| Error::Usage(format!("--activation-format: {e}")))?,
            ),
        };
        Ok(RewriteOptions {
            tier,
            base_dtype: self.base_dtype,
            activation,
            block_size: self.block_size,
            rounding: self.rounding,
            scale_rule: self.scale_rule,
            include: self.include.clone(),
            exclude: self.exclude.clone(),
            threads,
            ..RewriteOptions::default()
        })
    }
}

/// Progress on stderr: a bar a stage on a terminal, a line a stage elsewhere.
#[derive(Default)]
struct Console {
    all: MultiProgress,
    bars: Mutex<HashMap<usize, ProgressBar>>,
}

impl Console {
    fn say(&self, text: &str) {
        self.all.suspend(|| eprintln!("{text}"));
    }

    fn bars(&self) -> MutexGuard<'_, HashMap<usize, ProgressBar>> {
        self.bars.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Set by the first Ctrl-C. ONNX Runtime must not be torn down while it runs, so the run stops
/// itself after the current batch; the second Ctrl-C does not wait.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

impl Observer for Console {
    fn opened(&self, work: &Path) {
        let work = work.to_path_buf();
        let heard = super::signals::on_end(move || {
            if INTERRUPTED.swap(true, Ordering::SeqCst) {
                let _ = std::fs::remove_dir_all(&work);
                std::process::exit(130);
            }
            // The terminal may be gone, which SIGHUP says.
            let text = "stopping after this batch; Ctrl-C again stops at once";
            let _ = writeln!(std::io::stderr(), "{text}");
        });
        if let Err(error) = heard {
            self.warn(&format!("Ctrl-C is not handled: {error}"));
        }
    }

    fn note(&self, text: &str) {
        self.say(text);
    }

    fn warn(&self, text: &str) {
        self.say(&format!("warning: {text}"));
    }

    fn stage_started(&self, number: usize, model: &str, stage: &str, total: u64) {
        if !std::io::stderr().is_terminal() {
            return eprintln!("{model}: {stage} ...");
        }
        let style = ProgressStyle::with_template(
            "{msg:16} [{bar:30}] {percent:>3}% {human_pos} tokens, {per_sec}, {eta} left",
        );
        let bar = ProgressBar::new(total).with_message(stage.to_owned());
        let bar = match style {
            Ok(style) => bar.with_style(style.progress_chars("=> ")),
            Err(_) => bar,
        };
        self.bars().insert(number, self.all.add(bar));
    }

    fn interrupted(&self) -> bool {
        INTERRUPTED.load(Ordering::SeqCst)
    }

    fn progress(&self, number: usize, tokens: u64) {
        if let Some(bar) = self.bars().get(&number) {
            // Rewriting and loading are no part of the speed.
            if bar.position() == 0 {
                bar.reset_elapsed();
                bar.reset_eta();
            }
            bar.inc(tokens);
        }
    }

    fn stage_finished(&self, number: usize, record: &Record) {
        if let Some(bar) = self.bars().remove(&number) {
            bar.finish_and_clear();
        }
        let figures = match (record.status, record.ppl) {
            (Status::Ok, Some(ppl)) => format!("ppl {ppl:.3}"),
            _ => record.reason.clone().unwrap_or_default(),
        };
        self.say(&format!("{}: {} {figures}", record.stage, record.status.name()));
    }
}
