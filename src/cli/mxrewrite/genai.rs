//! `mxrewrite --genai`: a whole folder of ONNX Runtime GenAI.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
};

use crate::{
    cli::signals,
    genai::{self, GenaiError, GenaiReport, Unfinished},
    rewrite::{self, RewriteOptions},
};
use clap::Args;

#[derive(Args, Debug)]
#[command(next_help_heading = "ONNX Runtime GenAI")]
pub(super) struct GenaiArgs {
    /// Rewrite a folder of ONNX Runtime GenAI (genai_config.json, model, tokenizer) into a new one that its
    /// runtime loads as it is: the decoder is rewritten, the operator library is copied into the folder and
    /// named in its configuration, other files come along (docs/generation.md). -o is a folder [default:
    /// beside DIR, <name>.<tier>-<format>]
    #[arg(long, value_name = "DIR", conflicts_with_all = ["model", "print_recipe", "cpu_info", "resume"])]
    pub genai: Option<PathBuf>,
    /// The operator library for that folder [default: the file that MX_OPS_LIBRARY names, else
    /// libmx_custom_ops.so beside this program]
    #[arg(long, value_name = "FILE", conflicts_with_all = ["model", "print_recipe", "cpu_info"])]
    pub ops_library: Option<PathBuf>,
}

/// Does what was asked for; false when `--check` found something wrong.
pub(super) fn run(
    cli: &super::Cli,
    folder: &Path,
    options: &RewriteOptions,
) -> anyhow::Result<bool> {
    if cli.plan {
        plan(cli, folder, options).map_err(unwrapped)?;
        return Ok(true);
    }
    let output = cli.output.clone().unwrap_or_else(|| genai::default_output(folder, options));
    let spinner = super::spinner(&format!("rewriting {}", folder.display()));
    let library = cli.genai.ops_library.as_deref();
    let unfinished = Unfinished::default();
    remove_when_interrupted(unfinished.clone());
    let progress = super::shown_on(&spinner);
    let report = genai::rewrite_folder(folder, &output, options, library, &progress, &unfinished);
    spinner.finish_and_clear();
    let report = report.map_err(|error| unwrapped(error.into()))?;
    for note in notes(&report) {
        // With stderr closed there is nobody left to tell.
        let _ = writeln!(std::io::stderr(), "note: {note}");
    }
    let checked = match cli.check {
        true => check(&report)?,
        false => serde_json::Value::Null,
    };
    if cli.json {
        let mut value = serde_json::to_value(&report)?;
        if cli.check {
            value["check"] = checked["reports"].clone();
        }
        super::print(&super::json(&value)?)?;
    } else {
        let check = checked["text"].as_str().unwrap_or_default();
        super::print(&format!("{}{check}", summary(&report)))?;
    }
    let failed = checked["failed"] == true;
    if failed {
        let output = report.output.display();
        let _ = writeln!(
            std::io::stderr(),
            "error: --check found the above; {output} stays as written"
        );
    }
    Ok(!failed)
}

/// Ctrl-C and SIGTERM end the program, and leave no half folder beside the output.
fn remove_when_interrupted(unfinished: Unfinished) {
    let heard = signals::on_end(move || unfinished.interrupt(|| std::process::exit(130)));
    if let Err(error) = heard {
        let _ = writeln!(std::io::stderr(), "warning: Ctrl-C is not handled: {error}");
    }
}

/// Errors of the rewrite as they are for one model: they have an exit code and candidates of their own.
fn unwrapped(error: anyhow::Error) -> anyhow::Error {
    match error.downcast::<GenaiError>() {
        Ok(GenaiError::Rewrite(error)) => error.into(),
        Ok(error) => error.into(),
        Err(error) => error,
    }
}

fn plan(cli: &super::Cli, folder: &Path, options: &RewriteOptions) -> anyhow::Result<()> {
    let spinner = super::spinner(&format!("measuring {}", folder.display()));
    let plans = genai::plan_folder(folder, options, !cli.no_sqnr);
    spinner.finish_and_clear();
    let plans = plans?;
    if cli.json {
        super::print(&super::json(&serde_json::json!({ "folder": folder, "models": &plans }))?)?;
    } else {
        for plan in &plans {
            let title = folder.join(&plan.file);
            super::print(&format!("{}\n{}", title.display(), rewrite::plan_table(&plan.plan)))?;
        }
    }
    // A pipeline's stages need not all have layers.
    match plans.iter().all(|plan| plan.plan.is_empty()) {
        true => plans.iter().try_for_each(|plan| {
            Ok(rewrite::require_sites(&folder.join(&plan.file), &plan.plan, options)?)
        }),
        false => Ok(()),
    }
}

/// Compares every rewritten model with its original: an object of the reports, their text, and whether they failed.
fn check(report: &GenaiReport) -> anyhow::Result<serde_json::Value> {
    let (mut reports, mut text, mut failed) = (Vec::new(), String::new(), false);
    for model in &report.models {
        let spinner = super::spinner(&format!("checking {}", model.output.display()));
        let options = crate::verify::VerifyOptions::default();
        let found = crate::verify::verify(&model.input, &model.output, &options);
        spinner.finish_and_clear();
        let output = model.output.display();
        let found = found
            .map_err(|error| anyhow::anyhow!("--check: {error}; {output} stays as written"))?;
        failed |= !found.failures.is_empty();
        text.push_str(&format!("\n{}", found.summary()));
        reports.push(serde_json::to_value(found)?);
    }
    Ok(serde_json::json!({ "reports": reports, "text": text, "failed": failed }))
}

/// What a reader of the summary would not expect.
fn notes(report: &GenaiReport) -> Vec<String> {
    let mut notes: Vec<String> =
        report.models.iter().flat_map(|model| model.notes.iter().cloned()).collect();
    for file in &report.unchanged_models {
        notes.push(format!("{file} is copied unchanged: only layers of the decoder are replaced"));
    }
    notes
}

fn summary(report: &GenaiReport) -> String {
    let mut text: String = report.models.iter().map(super::summary).collect();
    let (output, copied) = (report.output.display(), report.copied.len());
    text.push_str(&format!("wrote {output}: genai_config.json, {copied} files copied"));
    if let Some(library) = &report.library {
        text.push_str(&format!(", {} for session_options.custom_ops_library", library.display()));
    }
    text + "\n"
}
