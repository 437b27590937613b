//! What each layer costs in each format, all others at the baseline.
//!
//! One graph holds the model and every layer in every format (`choices`); a run computes the model
//! from the segment in which the chosen layer lies (`segments`), fed with what the baseline's run
//! left there, and compares its logits with the baseline's on the device. Nothing is approximated: a
//! figure is that of the model rewritten in this one layer, up to the rounding of sums.

mod alternatives;
mod choices;
pub(crate) mod chooser;
mod head;
mod journal;
mod measure;
mod names;
mod nodes;
mod plans;
mod prepare;
pub mod result;
pub(crate) mod sample;
mod segments;
pub(crate) mod setup;
pub(crate) mod whole;

use super::error::{Error, Result};
use super::observer::Observer;
use super::process::{now, sha256_text};
use super::record::{Record, Status};
use super::store::{Store, WorkFolder};
use super::windows::Definition;
use crate::rewrite::{Activation, RewriteOptions};
use chooser::RowScore;
use journal::Journal;
use measure::{Taken, Work};
use mx_kernels::ElementFormat;
use plans::Plans;
use result::{Cost, FormatSensitivity, Sensitivity, SiteSensitivity};
use sample::Part;
use setup::Setup;
use std::time::Instant;

pub use result::RankCorrelation;
pub use setup::{Bench, FileId};

/// Where the result lies in the output folder.
pub const FILE: &str = "sensitivity.json";
const JOURNAL: &str = "sensitivity.journal.jsonl";

/// Options of a measurement.
#[derive(Clone, Debug)]
pub struct Options {
    /// Model, text and place.
    pub bench: Bench,
    /// Documents to measure on, spread over the subsets of the text.
    pub samples: usize,
    /// One of so many positions is scored, where the head can be computed there alone.
    pub every: usize,
    /// Formats to measure.
    pub formats: Vec<ElementFormat>,
    /// Which layers, and how they are rewritten; lowering and format are not its own.
    pub rewrite: RewriteOptions,
    /// Measure by full passes of a model rewritten for each layer and format: slow, and what the short
    /// passes are checked against.
    pub full: bool,
}

/// Measures every layer in every format and writes [`FILE`] into the output folder.
///
/// # Errors
/// Something is missing or does not belong together; ONNX Runtime fails; [`Error::Interrupted`], after
/// which `resume` goes on.
pub fn run(options: &Options, observer: &dyn Observer) -> Result<Sensitivity> {
    let bench = &options.bench;
    if options.rewrite.base_dtype.is_some() {
        let text = "--base-dtype does not go with sensitivity: convert the model first (mxrewrite)";
        return Err(Error::Usage(text.into()));
    }
    let store = Store::open(&bench.out, true)?;
    observer.opened(&store.work_root());
    let plans = Plans::new(&bench.model, &options.rewrite, &options.formats)?;
    let setup = Setup::new(bench, observer)?;
    let part = Part::new(&setup.corpus, &sample::spread(&setup.corpus, options.samples, &[]));
    let batches = setup.batches(&part.windows, bench.batch_size)?;
    let key = key(options, &setup, &part.documents);
    let mut journal = Journal::open(&bench.out.join(JOURNAL), &key, bench.resume)?;
    if !journal.done.is_empty() {
        observer.note(&format!("{} parts are kept from an earlier run", journal.done.len()));
    }
    let start = Instant::now();
    let folder = WorkFolder::new(&store.work_root(), "sensitivity")?;
    let (sites, formats) = (plans.sites().len(), plans.plans.len());
    observer
        .note(&format!("{sites} layers in {formats} formats on {} documents", part.windows.len()));
    let prepared = prepare::prepare(&plans, &setup, options, folder.path())?;
    let prepare_seconds = start.elapsed().as_secs_f64();
    let tokens: usize = batches.iter().map(|(_, padded)| padded.labels.len()).sum();
    let model = bench.model.display().to_string();
    observer.stage_started(0, &model, "sensitivity", (tokens * sites * formats) as u64);
    let work = Work {
        plans: &plans,
        prepared: &prepared,
        setup: &setup,
        bench,
        batches: &batches,
        every: options.every,
        work: folder.path(),
        observer,
    };
    let taken = work.run(&mut journal)?;
    let mut record = Record::new(&model, "sensitivity", &setup.device().to_string(), Status::Ok);
    record.seconds = Some(taken.seconds);
    observer.stage_finished(0, &record);
    let scores = gather(&journal, &work, part.windows.len());
    let result = summarise(options, &work, part, &scores, &taken, prepare_seconds)?;
    let mut text =
        serde_json::to_string_pretty(&result).map_err(|e| Error::Output(format!("{FILE}: {e}")))?;
    text.push('\n');
    store.write(FILE, text.as_bytes())?;
    drop(folder);
    store.clear_work()?;
    Ok(result)
}

/// Everything that decides a figure.
fn key(options: &Options, setup: &Setup, documents: &[usize]) -> String {
    let parts = [
        env!("CARGO_PKG_VERSION").to_owned(),
        setup.model.sha256.clone(),
        setup.tokenizer.sha256.clone(),
        setup.data.sha256.clone(),
        format!("{documents:?} {} {}", options.bench.seq_len, options.bench.batch_size),
        format!("{} {:?} {:?}", options.every, options.formats, options.rewrite),
        format!("full {}", options.full),
        format!("{} {}", setup.runtime.version, setup.device()),
        mx_kernels::cpu::variant().to_owned(),
    ];
    sha256_text(&parts.join("\n"))
}

/// Scores by site, format and window.
type Scores = Vec<Vec<Vec<RowScore>>>;

fn gather(journal: &Journal, work: &Work<'_>, windows: usize) -> Scores {
    let blank = vec![vec![RowScore::default(); windows]; work.plans.plans.len()];
    let mut scores: Scores = vec![blank; work.plans.sites().len()];
    for unit in &journal.done {
        let full = unit.segment >= work.prepared.shape.segments;
        let of_batch = |batch: usize| work.batches[batch].0.windows.clone();
        let order: Vec<usize> = match full {
            true => (0..work.batches.len()).flat_map(of_batch).collect(),
            false => of_batch(unit.batch),
        };
        for scored in &unit.scores {
            for (&window, row) in order.iter().zip(scored.rows()) {
                scores[scored.site][scored.format][window] = row;
            }
        }
    }
    scores
}

fn summarise(
    options: &Options,
    work: &Work<'_>,
    part: Part,
    scores: &Scores,
    taken: &Taken,
    prepare_seconds: f64,
) -> Result<Sensitivity> {
    let any = scores.first().and_then(|site| site.first()).map_or(&[][..], Vec::as_slice);
    let tokens: u64 = any.iter().map(|row| row.tokens).sum();
    if tokens == 0 {
        let text = "no token was scored: the documents are shorter than --positions";
        return Err(Error::NothingToScore(text.into()));
    }
    let (rewrite, setup) = (&options.rewrite, work.setup);
    let choices = (work.plans.sites().len() * work.plans.plans.len()) as u64;
    let evaluations = taken.work / taken.evaluation;
    let positions = work.prepared.shape.positions;
    let every = if positions { options.every } else { 1 };
    Ok(Sensitivity {
        mxeval: env!("CARGO_PKG_VERSION").into(),
        date: now(),
        command: options.bench.command.clone(),
        model: setup.model.clone(),
        tokenizer: setup.tokenizer.clone(),
        data: setup.data.clone(),
        definition: definition(every, options.bench.seq_len),
        device: setup.device().to_string(),
        onnxruntime: setup.runtime.version.clone(),
        formats: options.formats.iter().map(|format| format.name().to_owned()).collect(),
        activation_format: match rewrite.activation {
            Activation::Same => "same".into(),
            Activation::None => "none".into(),
            Activation::Format(format) => format.name().into(),
        },
        block_size: rewrite.block_size,
        rounding: rewrite.rounding.name().into(),
        scale_rule: rewrite.scale_rule.name().into(),
        seq_len: options.bench.seq_len,
        every,
        tokens,
        baseline_xent: any.iter().map(|row| row.baseline_nll).sum::<f64>() / tokens as f64,
        notes: work.prepared.notes.clone(),
        cost: Cost {
            choices,
            runs: taken.runs,
            evaluations,
            evaluations_per_choice: evaluations / choices as f64,
            evaluations_of_200_documents: evaluations * part.documents.len() as f64 / 200.0,
            seconds: taken.seconds,
            evaluation_seconds: taken.evaluation_seconds,
            prepare_seconds,
            load_seconds: taken.load_seconds,
        },
        sites: sites(work.plans, scores),
        documents: part.documents,
        beginnings: part.beginnings,
    })
}

/// A divergence or difference that JSON can hold and no search will choose: a layer that makes the model
/// return NaN or Inf costs [`BROKEN`].
fn finite(value: f64) -> f64 {
    if value.is_finite() { value } else { BROKEN }
}

/// What a layer costs in a format in which the model returns NaN or Inf, nats a token.
pub const BROKEN: f64 = 1e6;

fn sites(plans: &Plans, scores: &Scores) -> Vec<SiteSensitivity> {
    let site = |(number, planned): (usize, &crate::rewrite::PlannedSite)| {
        let site = &planned.site;
        let weights = site.rows() as u64 * site.k as u64;
        let per_weight = |bytes: u64| bytes as f64 * 8.0 / weights.max(1) as f64;
        let formats = plans.plans.iter().zip(&scores[number]).map(|(plan, rows)| {
            let planned = &plan.sites[number];
            let (kl, kl_stderr) = ratio(rows.iter().map(|row| (row.kl, row.tokens)));
            let deltas = rows.iter().map(|row| (row.nll - row.baseline_nll, row.tokens));
            let (delta_xent, delta_xent_stderr) = ratio(deltas);
            let format = planned.format.weight_name().to_owned();
            let figures = FormatSensitivity {
                activation_format: planned.format.activation_name().into(),
                bits_per_weight: per_weight(planned.bytes_after),
                bytes: planned.bytes_after,
                kl: finite(kl),
                kl_stderr,
                delta_xent: finite(delta_xent),
                delta_xent_stderr,
            };
            (format, figures)
        });
        SiteSensitivity {
            site: site.module_path.clone().unwrap_or_else(|| site.node_name.clone()),
            node: site.node_name.clone(),
            initializer: site.weight.initializer.clone(),
            module_path: site.module_path.clone(),
            layer: site.module_path.as_deref().and_then(crate::rewrite::layers::layer_number),
            role: site.role.name().into(),
            n: site.n,
            k: site.k,
            weights,
            input: site.x.clone(),
            bits_as_is: per_weight(planned.bytes_before),
            bytes_as_is: planned.bytes_before,
            formats: formats.collect(),
        }
    };
    plans.sites().iter().enumerate().map(site).collect()
}

/// A ratio of sums over documents and its standard error by linearisation (Cochran, *Sampling
/// Techniques*, 1977, section 6.4); none of fewer than two documents.
pub(crate) fn ratio(documents: impl Iterator<Item = (f64, u64)> + Clone) -> (f64, Option<f64>) {
    let scored = documents.filter(|(_, tokens)| *tokens > 0);
    let (sum, tokens, count) =
        scored.clone().fold((0.0, 0u64, 0u64), |(sum, all, n), (value, tokens)| {
            (sum + value, all + tokens, n + 1)
        });
    let mean = sum / tokens as f64;
    let residuals: f64 = scored.map(|(value, tokens)| (value - mean * tokens as f64).powi(2)).sum();
    let stderr = (residuals * count as f64 / (count as f64 - 1.0)).sqrt() / tokens as f64;
    (mean, (count > 1).then_some(stderr))
}

fn definition(every: usize, seq_len: usize) -> String {
    let positions = match every {
        1 => "every position is scored".to_owned(),
        every => format!("one of {every} positions is scored, the same ones in every run"),
    };
    format!(
        "sensitivity: one layer in one format, weight and activation as the recipe's rule has them, all \
         others as in the baseline; kl = mean KL(baseline || this) over scored tokens, delta_xent = \
         difference of the mean -ln p of the text's own tokens, both in nats; {positions}. \
         {}",
        Definition::per_document(seq_len).text()
    )
}

#[cfg(test)]
mod tests {
    use super::ratio;

    #[test]
    fn ratios_weigh_documents_by_their_tokens() {
        let (mean, stderr) = ratio([(2.0, 1), (0.0, 0), (4.0, 3)].into_iter());
        assert_eq!(mean, 1.5);
        // Residuals 0.5 and -0.5: sqrt(0.5 * 2 / 1) / 4.
        assert!((stderr.unwrap() - 0.25).abs() < 1e-15);
        assert_eq!(ratio([(2.0, 1)].into_iter()), (2.0, None));
    }
}
