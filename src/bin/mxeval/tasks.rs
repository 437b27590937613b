//! `mxeval plan`, `mxeval run-task`, `mxeval merge`.

use super::{Console, RunArgs, show};
use clap::{Args, Parser};
use mxrewrite::eval::devices::Request;
use mxrewrite::eval::job::Job;
use mxrewrite::eval::run::Options;
use mxrewrite::eval::tasks::{self, Plan};
use std::path::PathBuf;
use std::process::ExitCode;

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
    #[arg(value_name = "ID")]
    id: String,
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
    /// libonnxruntime on this machine
    #[arg(long, value_name = "PATH")]
    ort_lib: Option<PathBuf>,
}

impl PlanArgs {
    /// Plans and prints the tasks' ids.
    pub fn run(&self) -> anyhow::Result<ExitCode> {
        let (jobs, options) = self.run.resolve()?;
        let arguments = std::env::args().skip_while(|argument| argument != "plan").skip(1);
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
        Ok(ExitCode::SUCCESS)
    }
}

/// The run that a plan was made of.
fn planned(plan: &Plan, place: &Elsewhere) -> anyhow::Result<(Vec<Job>, Options)> {
    let arguments = std::iter::once("mxeval plan".to_owned()).chain(plan.arguments.clone());
    let again = Again::try_parse_from(arguments)?;
    let (jobs, mut options) = again.args.run.resolve()?;
    if let Some(out) = &place.out {
        options.out.clone_from(out);
    }
    if place.ort_lib.is_some() {
        options.ort_lib.clone_from(&place.ort_lib);
    }
    Ok((jobs, options))
}

impl RunTaskArgs {
    /// Does the task and prints its record.
    pub fn run(&self) -> anyhow::Result<ExitCode> {
        let plan = Plan::read(&self.plan)?;
        let (jobs, mut options) = planned(&plan, &self.place)?;
        if let Some(device) = &self.device {
            options.device = device.clone();
        }
        let record = tasks::run_task(&plan, &self.id, &jobs, &options, &Console::default())?;
        println!("{}", serde_json::to_string(&record)?);
        let failed = record.status == mxrewrite::eval::record::Status::Failed;
        Ok(ExitCode::from(u8::from(failed)))
    }
}

impl MergeArgs {
    /// Merges and prints.
    pub fn run(&self) -> anyhow::Result<ExitCode> {
        let plan = Plan::read(&self.plan)?;
        let (jobs, options) = planned(&plan, &self.place)?;
        let console = Console::default();
        let outcome = tasks::merge(&plan, &jobs, &options, &console)?;
        show(&outcome, &options, self.json, &console)?;
        Ok(ExitCode::from(u8::from(outcome.failed())))
    }
}
