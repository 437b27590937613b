//! `mxeval plan`, `mxeval run-task`, `mxeval merge`.

use super::{Console, RunArgs, show};
use crate::eval::Error;
use crate::eval::devices::Request;
use crate::eval::job::Job;
use crate::eval::run::Options;
use crate::eval::tasks::{self, Plan};
use clap::{Args, Parser};
use std::path::PathBuf;

/// Cut a run into tasks that any number of machines do (docs/scale.md)
///
/// Takes the arguments of the run itself. The plan lists one task a stage and share of the text; each is
/// done by `mxeval run-task`, and `mxeval merge` writes what the run as a whole would have written.
#[derive(Debug, Args)]
#[command(after_help = "Exit codes: 0 done, 1 failed, 2 usage.")]
pub struct PlanArgs {
    /// Tasks that every stage is cut into
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = super::positive)]
    shards: usize,
    /// Where the plan goes [default: OUT/plan.json]
    #[arg(long, value_name = "FILE.json")]
    plan: Option<PathBuf>,
    #[command(flatten)]
    run: RunArgs,
}

/// The arguments after `plan`, read again.
#[derive(Debug, Parser)]
struct Again {
    #[command(flatten)]
    args: PlanArgs,
}

/// Do one task of a plan, or go on with it
///
/// The record is printed as JSON. Safe to repeat: a task that is done stays as it is. Exit codes: 0 done
/// (a skipped stage, too), 1 failed, 2 usage, 130 interrupted.
#[derive(Debug, Args)]
pub struct RunTaskArgs {
    /// What `mxeval plan` wrote
    #[arg(value_name = "PLAN.json")]
    plan: PathBuf,
    /// The task's id in the plan
    #[arg(value_name = "ID", required_unless_present = "index")]
    id: Option<String>,
    /// Its place in the plan instead, from 0: the index that a scheduler gives an array's job
    #[arg(long, value_name = "N", conflicts_with = "id")]
    index: Option<usize>,
    /// Another device than the plan's: cpu, cuda, cuda:0
    #[arg(long)]
    device: Option<Request>,
    #[command(flatten)]
    place: Elsewhere,
}

/// Put the tasks of a plan together
///
/// Writes results.jsonl, run.json and the reports into OUT, and prints the table. Fails, naming them, while
/// tasks are not done.
#[derive(Debug, Args)]
pub struct MergeArgs {
    /// What `mxeval plan` wrote
    #[arg(value_name = "PLAN.json")]
    plan: PathBuf,
    #[command(flatten)]
    place: Elsewhere,
    /// Print records (JSON Lines) instead of the table
    #[arg(long)]
    json: bool,
}

/// What may differ from machine to machine.
#[derive(Debug, Args)]
struct Elsewhere {
    /// Another folder than the plan's; tasks lie below it
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Where relative paths of the plan start on this machine [default: where the plan was made]
    #[arg(long, value_name = "DIR")]
    folder: Option<PathBuf>,
    /// libonnxruntime on this machine
    #[arg(long, value_name = "PATH")]
    ort_lib: Option<PathBuf>,
}

impl PlanArgs {
    /// Plans and prints the tasks' ids.
    pub fn run(&self) -> anyhow::Result<u8> {
        let (jobs, options) = self.run.resolve()?;
        let arguments = crate::cli::command_line()
            .into_iter()
            .skip_while(|argument| argument != "plan")
            .skip(1);
        let console = Console::default();
        let plan = Plan::new(&jobs, &options, self.shards, arguments.collect(), &console)?;
        let path = self.plan.clone().unwrap_or_else(|| options.out.join("plan.json"));
        plan.write(&path)?;
        if self.run.json {
            println!("{}", serde_json::to_string_pretty(&plan)?);
        } else {
            plan.tasks.iter().for_each(|task| println!("{}", task.id));
        }
        console.say(&format!("{} tasks: {}", plan.tasks.len(), path.display()));
        Ok(0)
    }
}

/// The run that a plan was made of. Its relative paths are read where it was made.
fn planned(plan: &Plan, place: &Elsewhere) -> anyhow::Result<(Vec<Job>, Options)> {
    let here = |path: &Option<PathBuf>| path.as_ref().map(std::path::absolute).transpose();
    let (out, ort_lib) = (here(&place.out)?, here(&place.ort_lib)?);
    let folder = place.folder.as_ref().unwrap_or(&plan.folder);
    std::env::set_current_dir(folder).map_err(|e| {
        let text = "the plan's relative paths start there; pass --folder where that is elsewhere";
        Error::Usage(format!("{}: {e}: {text}", folder.display()))
    })?;
    let arguments = std::iter::once("mxeval plan".to_owned()).chain(plan.arguments.clone());
    let again = Again::try_parse_from(arguments).map_err(|e| {
        Error::Usage(format!("the plan's arguments are none of mxeval plan: {}", e.kind()))
    })?;
    let (jobs, mut options) = again.args.run.resolve()?;
    options.command = single_run(&plan.arguments);
    options.out = std::path::absolute(out.unwrap_or(options.out))?;
    if ort_lib.is_some() {
        options.ort_lib = ort_lib;
    }
    Ok((jobs, options))
}

/// The command that does the whole plan at once: what a report says repeats it.
fn single_run(arguments: &[String]) -> Vec<String> {
    let mut command = vec!["mxeval".to_owned()];
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        match argument.split_once('=').map_or(argument.as_str(), |(name, _)| name) {
            "--shards" | "--plan" if argument.contains('=') => {}
            "--shards" | "--plan" => drop(rest.next()),
            _ => command.push(argument.clone()),
        }
    }
    command
}

impl RunTaskArgs {
    /// Does the task and prints its record.
    pub fn run(&self) -> anyhow::Result<u8> {
        let plan = Plan::read(&self.plan)?;
        let id = match (&self.id, self.index) {
            (Some(id), _) => id,
            (None, index) => plan.at(index.unwrap_or(0))?,
        };
        let (jobs, mut options) = planned(&plan, &self.place)?;
        if let Some(device) = &self.device {
            options.device = device.clone();
        }
        let record = match tasks::run_task(&plan, id, &jobs, &options, &Console::default()) {
            Err(Error::Interrupted) => {
                eprintln!("task {id}: interrupted; the same command goes on from here");
                return Ok(130);
            }
            other => other?,
        };
        println!("{}", serde_json::to_string(&record)?);
        let failed = record.status == crate::eval::record::Status::Failed;
        Ok(u8::from(failed))
    }
}

impl MergeArgs {
    /// Merges and prints.
    pub fn run(&self) -> anyhow::Result<u8> {
        let plan = Plan::read(&self.plan)?;
        let (jobs, options) = planned(&plan, &self.place)?;
        let console = Console::default();
        let outcome = tasks::merge(&plan, &jobs, &options, &console)?;
        show(&outcome, &options, self.json, &console)?;
        Ok(u8::from(outcome.failed()))
    }
}
