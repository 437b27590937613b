//! The `mxrewrite` command: arguments, one library call, an exit code.
//!
//! Exit codes: 0 done, 1 failed, 2 usage. Results go to stdout, everything else to stderr.

mod cpu_info;
mod genai;
mod verify;

use std::{
    ffi::OsString,
    io::Write,
    ops::ControlFlow,
    path::{Path, PathBuf},
};

use crate::onnx::Progress;
use crate::rewrite::{
    self, Activation, BUILT_IN, BaseDtype, Lowering, Recipe, RewriteError, RewriteOptions,
    RewriteReport, Role, Tier,
};
use crate::verify::VerifyOptions;
use clap::{
    ArgGroup, Args, CommandFactory, Parser, Subcommand, builder::PossibleValuesParser,
    builder::TypedValueParser,
};
use indicatif::{ProgressBar, ProgressStyle};
use mx_kernels::{ElementFormat, Rounding, ScaleRule};

/// Replace the Linear layers of an ONNX language model by OCP Microscaling (MX) operators.
///
/// Layers are found by structure, named by what the exporter left behind (metadata, tensor names, node
/// names) and chosen by a tier. The head and mixture-of-experts routers are taken only when named.
#[derive(Parser, Debug)]
#[command(name = "mxrewrite", version, after_help = EXAMPLES, max_term_width = 100)]
#[command(override_usage = USAGE)]
#[command(group = ArgGroup::new("selection"))]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
#[command(disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    /// The model: an .onnx file, with its external data beside it
    #[arg(required_unless_present_any = ["print_recipe", "cpu_info", "genai"])]
    model: Option<PathBuf>,
    /// Output [default: beside the model, <stem>.<tier>-<format>.onnx]
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Show what would be replaced, write nothing. Reads every weight once for the SQNR (signal to
    /// quantisation noise) to expect of it, which no other command does
    #[arg(long)]
    plan: bool,
    /// With --plan: no SQNR, no weight is read
    #[arg(long, requires = "plan")]
    no_sqnr: bool,
    /// Print the plan or the result as JSON
    #[arg(long)]
    json: bool,
    /// Replace an existing output
    #[arg(long)]
    force: bool,
    /// Finding no layer to replace is fine
    #[arg(long)]
    allow_empty: bool,
    /// Threads to quantise with [default: all cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Cut external data into files of at most this size: bytes, or with K, M or G (powers of 1000)
    #[arg(long, value_name = "SIZE", value_parser = size)]
    shard_size: Option<u64>,
    /// Go on with what a killed run with the same arguments has left
    #[arg(long)]
    resume: bool,
    /// Compare the result with the model in ONNX Runtime (mxrewrite verify, random tokens); fails when a
    /// layer does not run as MX, or NaNs appear
    #[arg(long, conflicts_with_all = ["plan", "print_recipe"])]
    check: bool,
    /// Show the CPU's kernels: which variants this machine runs, which one is in use (MX_CPU_VARIANT
    /// forces one) and what multiplies each format; and end
    #[arg(long, conflicts_with_all = ["plan", "print_recipe", "model", "check"])]
    cpu_info: bool,
    #[command(flatten)]
    layers: Layers,
    #[command(flatten)]
    formats: Formats,
    #[command(flatten)]
    genai: genai::GenaiArgs,
}

/// What is not a rewrite. A model file called `verify` is `./verify`.
#[derive(Subcommand, Debug)]
enum Command {
    Verify(verify::VerifyArgs),
}

#[derive(Args, Debug)]
#[command(next_help_heading = "Layers")]
struct Layers {
    /// a = MLP, b = full = MLP + attention, c = MLP fp6_e3m2 + attention fp8_e4m3, d = MLP fp4_e2m1 +
    /// attention fp6_e3m2 [default: full]
    #[arg(long, value_name = "TIER", group = "selection", ignore_case = true)]
    #[arg(value_parser = PossibleValuesParser::new(["a", "b", "c", "d", "full"]))]
    tier: Option<String>,
    /// The same as --tier a
    #[arg(long, group = "selection")]
    tier_a: bool,
    /// Every Linear but routers and the head
    #[arg(long, group = "selection")]
    all_linears: bool,
    /// The same as --tier a
    #[arg(long, group = "selection")]
    mlp_only: bool,
    /// Rules from layers to formats: a TOML file (docs/recipes.md), the JSON of a plan, a rewritten
    /// .onnx (the recipe that made it) or a built-in name, as --print-recipe's
    #[arg(long, value_name = "FILE", group = "selection", conflicts_with_all = BESIDE_RECIPE)]
    recipe: Option<PathBuf>,
    /// Print a built-in recipe as TOML, with the other options in it, and end
    #[arg(long, value_name = "NAME", group = "selection", ignore_case = true)]
    #[arg(value_parser = PossibleValuesParser::new(BUILT_IN.map(|(name, ..)| name)))]
    print_recipe: Option<String>,
    /// Take also layers that this expression finds in the module path, or in node and weight name where
    /// there is no path; repeatable
    #[arg(long, value_name = "REGEX")]
    include: Vec<String>,
    /// Leave layers out that this expression finds; repeatable
    #[arg(long, value_name = "REGEX")]
    exclude: Vec<String>,
    /// The weights before the export: a folder of *.safetensors or one such file. Layers are named by
    /// the content of their weights, and weights that are MX codes there (gpt-oss, compressed-tensors
    /// mxfp4 and mxfp8) are taken as they are unless a format is asked for (docs/checkpoints.md)
    #[arg(long, value_name = "DIR")]
    checkpoint: Option<PathBuf>,
    /// Also attention's products of two activations (queries with keys, probabilities with values),
    /// both operands in the activations' format
    #[arg(long)]
    attention: bool,
}

/// What a recipe says itself.
const BESIDE_RECIPE: [&str; 8] = [
    "include",
    "attention",
    "format",
    "activation_format",
    "block_size",
    "rounding",
    "scale_rule",
    "lower",
];

/// Formats that take shared exponents.
const MX_FORMATS: [&str; 6] =
    ["fp8_e4m3", "fp8_e5m2", "fp6_e3m2", "fp6_e2m3", "fp4_e2m1", "mxint8"];
const ACTIVATION_FORMATS: [&str; 7] =
    ["none", "fp8_e4m3", "fp8_e5m2", "fp6_e3m2", "fp6_e2m3", "fp4_e2m1", "mxint8"];

#[derive(Args, Debug)]
#[command(next_help_heading = "Formats")]
struct Formats {
    /// Element format of weights [default: fp8_e4m3]
    #[arg(long, value_name = "FORMAT", value_parser = PossibleValuesParser::new(MX_FORMATS))]
    format: Option<String>,
    /// Element format of activations; none = weight-only [default: the weights']
    #[arg(long, value_name = "FORMAT", value_parser = PossibleValuesParser::new(ACTIVATION_FORMATS))]
    activation_format: Option<String>,
    /// Elements that share an exponent
    #[arg(long, value_name = "N", default_value = "32")]
    #[arg(value_parser = PossibleValuesParser::new(["16", "32", "64", "128", "256"])
        .map(|size| size.parse::<usize>().unwrap_or(32)))]
    block_size: usize,
    /// Rounding of elements: half to even, half away from zero, toward zero
    #[arg(long, value_name = "R", default_value = "even")]
    #[arg(value_parser = PossibleValuesParser::new(["even", "nearest", "floor"]))]
    rounding: String,
    /// How a block's largest magnitude becomes its exponent
    #[arg(long, value_name = "S", default_value = "floor")]
    #[arg(value_parser = PossibleValuesParser::new(["floor", "ceil", "even", "rceil"]))]
    scale_rule: String,
    /// What layers become: mx, qdq (MX by standard operators of opset 24, FP6 28; ONNX Runtime 1.31
    /// does not load them), int8 (weight-only DequantizeLinear), bf16 (the whole graph rounded), fp16
    /// (the whole graph converted), bfp16 (bf16 operands), nvfp8-emu-e4m3, nvfp8-emu-e5m2 (fp8 casts without scales), nvfp8 (fp8
    /// E4M3 with one scale a tensor)
    #[arg(long, value_name = "TARGET", default_value = "mx")]
    lower: Lowering,
    /// Float type of everything that is not replaced, for GPUs: fp32, bf16, fp16 [default: the
    /// model's own]. With --lower bf16 the whole graph is converted
    #[arg(long, value_name = "TYPE")]
    base_dtype: Option<BaseDtype>,
}

/// The model is optional only beside --print-recipe, --cpu-info and --genai.
const USAGE: &str = "mxrewrite [OPTIONS] <MODEL>\n       mxrewrite --print-recipe <NAME> [OPTIONS]\n       mxrewrite --cpu-info [--json]\n       mxrewrite --genai <DIR> [OPTIONS]\n       \
                     mxrewrite verify <A> <B> [OPTIONS]";

const EXAMPLES: &str = "\
Examples:
  mxrewrite model.onnx                                  MLP and attention in fp8_e4m3
  mxrewrite model.onnx --plan                           what would be replaced, and why not the rest
  mxrewrite model.onnx --tier-a --format fp4_e2m1 -o out.onnx
  mxrewrite model.onnx --tier d --include lm_head       mixed formats, the head too
  mxrewrite model.onnx --all-linears --exclude 'layers\\.(0|31)\\.' --activation-format none
  mxrewrite model.onnx --lower int8                     weight-only int8, standard operators
  mxrewrite model.onnx --check                          and compare the result with the model
  mxrewrite verify model.onnx out.onnx --layers         the same for files, layer by layer
  mxrewrite model.onnx --lower qdq --format fp4_e2m1    MX in standard operators, no custom ones
  mxrewrite --print-recipe tier-c > mine.toml           a recipe to start from (docs/recipes.md)
  mxrewrite model.onnx --recipe mine.toml
  mxrewrite model.onnx --checkpoint DIR                 layers named by the values of their weights
  mxrewrite --genai DIR --format fp4_e2m1 -o OUT        a whole folder of ONNX Runtime GenAI

Run the result in ONNX Runtime with libmx_custom_ops.so registered as a custom-op library.
Exit codes: 0 done, 1 failed (also when no layer was found, unless --allow-empty), 2 usage.";

/// Runs the command and returns its exit code; `arguments` begin with its name. Usage errors, `--help` and `--version` end the
/// process.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> u8 {
    let cli = Cli::parse_from(super::typed(arguments));
    if let Some(Command::Verify(args)) = &cli.command {
        return run_verify(args);
    }
    let options = match options(&cli) {
        Ok(options) => options,
        Err(error) => usage(&mut Cli::command(), &error.to_string()),
    };
    match run(&cli, &options) {
        Ok(passed) => u8::from(!passed),
        Err(error) => fail(&cli, &error),
    }
}

fn run_verify(args: &verify::VerifyArgs) -> u8 {
    if let Some(conflict) = args.conflict() {
        // Built, the subcommand knows its whole name.
        let mut cli = Cli::command();
        cli.build();
        let own = cli.find_subcommand("verify").cloned();
        usage(&mut own.unwrap_or(cli), conflict);
    }
    let spinner = spinner("comparing");
    let report = args.run();
    spinner.finish_and_clear();
    let shown = report.and_then(|report| {
        print(&if args.json { json(&report)? } else { report.text() })?;
        Ok(report.failures.is_empty())
    });
    match shown {
        Ok(passed) => u8::from(!passed),
        Err(error) => {
            // With stderr closed there is nobody left to tell.
            let _ = writeln!(std::io::stderr(), "error: {error}");
            1
        }
    }
}

/// `500M` -> 500 000 000.
fn size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let factor = match text[digits.len()..].to_ascii_uppercase().trim_end_matches('B') {
        "" => 1,
        "K" => 1_000,
        "M" => 1_000_000,
        "G" => 1_000_000_000,
        unit => return Err(format!("'{unit}' is no unit of size; use K, M or G")),
    };
    let size = digits.parse::<u64>().ok().and_then(|n| n.checked_mul(factor));
    size.filter(|&n| n > 0).ok_or_else(|| "a size is a number above 0, such as 2G".to_owned())
}

/// Ends with clap's own form of a usage error and exit code 2.
fn usage(command: &mut clap::Command, message: &str) -> ! {
    command.error(clap::error::ErrorKind::ArgumentConflict, message).exit()
}

fn options(cli: &Cli) -> anyhow::Result<RewriteOptions> {
    let Layers { tier, tier_a, all_linears, mlp_only, include, exclude, .. } = &cli.layers;
    let tier = match tier.as_deref().map(str::parse::<Tier>) {
        Some(Ok(tier)) => tier,
        _ if *tier_a => Tier::A,
        _ if *mlp_only => Tier::MlpOnly,
        _ if *all_linears => Tier::AllLinears,
        _ => Tier::Full,
    };
    let formats = &cli.formats;
    let activation = match formats.activation_format.as_deref() {
        None => Activation::Same,
        Some("none") => Activation::None,
        Some(name) => Activation::Format(name.parse()?),
    };
    Ok(RewriteOptions {
        recipe: cli.layers.recipe.as_deref().map(Recipe::open).transpose()?,
        tier,
        lowering: formats.lower,
        base_dtype: formats.base_dtype,
        format: formats.format.as_deref().map(str::parse::<ElementFormat>).transpose()?,
        activation,
        block_size: formats.block_size,
        rounding: formats.rounding.parse::<Rounding>()?,
        scale_rule: formats.scale_rule.parse::<ScaleRule>()?,
        include: include.clone(),
        exclude: exclude.clone(),
        attention: cli.layers.attention,
        checkpoint: cli.layers.checkpoint.clone(),
        allow_empty: cli.allow_empty,
        overwrite: cli.force,
        threads: cli.threads.map(usize::from),
        shard_size: cli.shard_size,
        resume: cli.resume,
    })
}

/// Does what was asked for; false when `--check` found something wrong.
fn run(cli: &Cli, options: &RewriteOptions) -> anyhow::Result<bool> {
    if cli.cpu_info {
        print(&if cli.json { json(&cpu_info::value())? } else { cpu_info::text() })?;
        return Ok(true);
    }
    if let Some(name) = &cli.layers.print_recipe {
        let recipe = Recipe::built_in_with(name, options).map_err(RewriteError::Recipe)?;
        let Some(recipe) = recipe else { return Ok(true) };
        print(&if cli.json { json(&recipe)? } else { recipe.to_toml() })?;
        return Ok(true);
    }
    if let Some(folder) = &cli.genai.genai {
        return genai::run(cli, folder, options);
    }
    // Clap demands a model for everything else.
    let Some(model) = &cli.model else { return Ok(true) };
    if cli.plan {
        plan(cli, model, options)?;
        return Ok(true);
    }
    let output = cli.output.clone().unwrap_or_else(|| rewrite::default_output(model, options));
    let spinner = spinner(&format!("rewriting {}", model.display()));
    let progress = shown_on(&spinner);
    let report = rewrite::rewrite_file_telling(model, &output, options, &progress);
    spinner.finish_and_clear();
    let report = report?;
    for note in &report.notes {
        // As with errors: with stderr closed there is nobody left to tell.
        let _ = writeln!(std::io::stderr(), "note: {note}");
    }
    if cli.check {
        return check(cli, &report);
    }
    print(&if cli.json { json(&report)? } else { summary(&report) })?;
    Ok(true)
}

/// Compares what was written with what was read. The file stays, whatever is found.
fn check(cli: &Cli, report: &RewriteReport) -> anyhow::Result<bool> {
    if !cli.json {
        print(&summary(report))?;
    }
    let spinner = spinner(&format!("checking {}", report.output.display()));
    let found = crate::verify::verify(&report.input, &report.output, &VerifyOptions::default());
    spinner.finish_and_clear();
    let output = report.output.display();
    if cli.json {
        let mut both = serde_json::to_value(report)?;
        both["check"] = match &found {
            Ok(found) => serde_json::to_value(found)?,
            Err(error) => serde_json::json!({ "error": error.to_string() }),
        };
        print(&json(&both)?)?;
    }
    let found =
        found.map_err(|error| anyhow::anyhow!("--check: {error}; {output} stays as written"))?;
    let passed = found.failures.is_empty();
    if !cli.json {
        print(&format!("\n{}", found.summary()))?;
    }
    if !passed {
        let _ = writeln!(
            std::io::stderr(),
            "error: --check found the above; {output} stays as written"
        );
    }
    Ok(passed)
}

fn plan(cli: &Cli, path: &Path, options: &RewriteOptions) -> anyhow::Result<()> {
    let (model, mut plan) = rewrite::plan_file(path, options)?;
    if !cli.no_sqnr {
        let spinner = spinner(&format!("measuring {}", path.display()));
        let measured = rewrite::measure_plan(&model, &mut plan, options.threads);
        spinner.finish_and_clear();
        measured.map_err(|source| RewriteError::Execute { path: path.to_owned(), source })?;
    }
    // An empty plan is shown like any other: it lists the candidates.
    print(&if cli.json { json(&plan)? } else { rewrite::plan_table(&plan) })?;
    Ok(rewrite::require_sites(path, &plan, options)?)
}

/// A sign of life on stderr; hidden when that is no terminal.
fn spinner(message: &str) -> ProgressBar {
    let spinner = ProgressBar::new_spinner().with_message(message.to_owned());
    if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} ({elapsed})") {
        spinner.set_style(style);
    }
    spinner.enable_steady_tick(std::time::Duration::from_millis(100));
    spinner
}

/// A listener that shows bytes on a spinner.
fn shown_on(spinner: &ProgressBar) -> Progress {
    if let Ok(style) =
        ProgressStyle::with_template("{spinner} {msg} {bytes}/{total_bytes} ({elapsed})")
    {
        spinner.set_style(style);
    }
    let shown = spinner.clone();
    Progress::new(move |done, total| {
        shown.set_length(total);
        shown.set_position(done);
        ControlFlow::Continue(())
    })
}

/// Says what went wrong on stderr. Options at fault end with 2, everything else with 1.
fn fail(cli: &Cli, error: &anyhow::Error) -> u8 {
    let known = error.downcast_ref::<RewriteError>();
    if known.is_some_and(RewriteError::is_usage) {
        usage(&mut Cli::command(), &error.to_string());
    }
    // Messages name their causes themselves, in one line.
    let mut text = format!("error: {error}\n");
    if let Some(RewriteError::NothingToReplace { candidates, .. }) = known
        && !cli.plan
    {
        for candidate in candidates {
            let (node, op, reason) = (&candidate.node, &candidate.op, &candidate.reason);
            text.push_str(&format!("  {node} ({op}): {reason}\n"));
        }
    }
    // With stderr closed there is nobody left to tell.
    let _ = std::io::stderr().write_all(text.as_bytes());
    1
}

/// Writes a result to stdout. A reader that went away (`| head`) is no failure.
fn print(text: &str) -> anyhow::Result<()> {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

fn json<T: serde::Serialize>(value: &T) -> anyhow::Result<String> {
    Ok(serde_json::to_string_pretty(value)? + "\n")
}

fn summary(report: &RewriteReport) -> String {
    let (before, after) = (report.weight_bytes_before, report.weight_bytes_after);
    let base = report.plan.recipe.base_dtype;
    let mut text = if report.lowering == Lowering::Bf16 && base == Some(BaseDtype::Bf16) {
        "the whole graph converted to bfloat16\n".to_owned()
    } else if report.lowering == Lowering::Fp16 {
        "the whole graph converted to float16\n".to_owned()
    } else if report.lowering == Lowering::Bf16 {
        format!("every weight and float result rounded to bfloat16 ({} layers)\n", report.sites)
    } else {
        let candidates = report.sites + report.skipped;
        let share = 100.0 * after as f64 / before.max(1) as f64;
        format!(
            "{} of {candidates} candidates rewritten ({}, {})\n\
             weights of these layers: {before} -> {after} bytes ({share:.2} %)\n",
            report.sites, report.plan.recipe.name, report.lowering,
        )
    };
    let asked = report.plan.recipe.rules.iter().any(|r| r.select.roles.contains(&Role::Product));
    if report.products > 0 {
        text.push_str(&format!("{} attention products rewritten\n", report.products));
    } else if asked {
        text.push_str(
            "no attention product found (attention inside one fused operator has none)\n",
        );
    }
    if let Some(base) = base.filter(|_| !report.lowering.is_whole_graph()) {
        text.push_str(&format!("everything else converted to {base}\n"));
    }
    if let Some(checkpoint) = &report.plan.checkpoint {
        text.push_str(&rewrite::checkpoint_line(&report.plan, checkpoint));
    }
    text.push_str(&format!("wrote {} ({} bytes", report.output.display(), report.bytes));
    if let Some(data) = &report.data {
        text.push_str(&format!(" with {}", data.display()));
    }
    text + ")\n"
}
