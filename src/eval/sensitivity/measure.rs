//! The passes: every batch once through the baseline, then every layer and format from where it is.

use super::chooser::{Choice, Chooser, RowScore};
use super::journal::{Journal, Scored, Unit};
use super::plans::Plans;
use super::prepare::Prepared;
use super::setup::{Bench, Setup};
use super::whole::{Against, Whole};
use crate::eval::error::{Error, Result};
use crate::eval::observer::Observer;
use crate::eval::schedule::{Batch, Padded};
use crate::onnx::SaveOptions;
use crate::rewrite::{RewritePlan, execute};
use std::path::Path;
use std::time::Instant;

/// What is measured with.
pub(super) struct Work<'a> {
    pub plans: &'a Plans,
    pub prepared: &'a Prepared,
    pub setup: &'a Setup,
    pub bench: &'a Bench,
    pub batches: &'a [(Batch, Padded)],
    /// One of so many positions is scored.
    pub every: usize,
    pub work: &'a Path,
    pub observer: &'a dyn Observer,
}

/// What the passes took.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Taken {
    pub runs: u64,
    /// Multiplications by weights, and those of one evaluation of the documents.
    pub work: f64,
    pub evaluation: f64,
    pub seconds: f64,
    pub evaluation_seconds: f64,
    pub load_seconds: f64,
}

/// Positions along a sequence of `length` that are scored: the last of every `every`.
pub(super) fn positions(length: usize, every: usize) -> Vec<usize> {
    // The last position predicts nothing.
    let every = every.clamp(1, length.saturating_sub(1).max(1));
    (every - 1..length).step_by(every).collect()
}

impl Work<'_> {
    /// Positions of a batch.
    fn positions(&self, padded: &Padded) -> Vec<usize> {
        let every = if self.prepared.shape.positions { self.every } else { 1 };
        positions(padded.length, every)
    }

    /// Runs what the journal does not have yet.
    ///
    /// # Errors
    /// ONNX Runtime fails; [`Error::Interrupted`].
    pub(super) fn run(&self, journal: &mut Journal) -> Result<Taken> {
        let mut taken = Taken::default();
        let start = Instant::now();
        let mut chooser = self.prepared.open(self.setup, self.bench)?;
        taken.load_seconds = start.elapsed().as_secs_f64();
        let warm_up = self.setup.chosen.on_gpu();
        for (number, (_, padded)) in self.batches.iter().enumerate() {
            if number == 0 && warm_up {
                let all: Vec<usize> = (0..padded.length).collect();
                let fed = chooser.feed(padded, &all)?;
                chooser.evaluate(&fed).map_err(|error| self.hint(error))?;
            }
            self.batch(&mut chooser, number, padded, journal, &mut taken)?;
        }
        drop(chooser);
        self.left(journal)?;
        for unit in &journal.done {
            taken.runs += unit.runs;
            taken.seconds += unit.seconds;
        }
        self.count(journal, &mut taken);
        Ok(taken)
    }

    /// One batch: the baseline, then all that begins at each segment.
    fn batch(
        &self,
        chooser: &mut Chooser,
        number: usize,
        padded: &Padded,
        journal: &mut Journal,
        taken: &mut Taken,
    ) -> Result<()> {
        let positions = self.positions(padded);
        let tokens = padded.labels.len() as u64;
        let start = Instant::now();
        // What an evaluation costs: every position is scored.
        let all: Vec<usize> = (0..padded.length).collect();
        let every = if self.prepared.shape.positions { &all } else { &positions };
        let evaluated = chooser.feed(padded, every)?;
        chooser.evaluate(&evaluated).map_err(|error| self.hint(error))?;
        drop(evaluated);
        taken.evaluation_seconds += start.elapsed().as_secs_f64();
        let open =
            |(segment, sites): (usize, &Vec<_>)| !sites.is_empty() && !journal.has(number, segment);
        if !self.prepared.sites.iter().enumerate().any(open) {
            return Ok(());
        }
        let start = Instant::now();
        let fed = chooser.feed(padded, &positions)?;
        let baseline = chooser.baseline(&fed).map_err(|error| self.hint(error))?;
        taken.seconds += start.elapsed().as_secs_f64();
        for (segment, sites) in self.prepared.sites.iter().enumerate() {
            if sites.is_empty() || journal.has(number, segment) {
                continue;
            }
            let start = Instant::now();
            let (mut scores, mut runs) = (Vec::new(), 0);
            for &(site, planned) in sites {
                for format in 0..self.plans.plans.len() {
                    let choice = Choice { start: segment, site: Some((site, format)) };
                    let rows = chooser
                        .choose(&fed, choice, &baseline)
                        .map_err(|error| self.hint(error))?;
                    scores.push(Scored::new(planned, format, &rows));
                    runs += 1;
                    self.observer.progress(0, tokens);
                    if self.observer.interrupted() {
                        return Err(Error::Interrupted);
                    }
                }
            }
            let seconds = start.elapsed().as_secs_f64();
            journal.add(Unit { batch: number, segment, scores, runs, seconds })?;
        }
        Ok(())
    }

    /// Layers that no segment holds, by full passes of a model rewritten for each.
    fn left(&self, journal: &mut Journal) -> Result<()> {
        let segments = self.prepared.shape.segments;
        if self.prepared.left.is_empty() {
            return Ok(());
        }
        let (runtime, options) = (&self.setup.runtime, self.setup.session(self.bench));
        let model = &self.bench.model;
        let mut base = Whole::open(runtime, model, "the baseline", &options, Against::Nothing)?;
        for (place, &site) in self.prepared.left.iter().enumerate() {
            if journal.has(0, segments + place) {
                continue;
            }
            let start = Instant::now();
            let (mut scores, mut runs) = (Vec::new(), 0);
            for format in 0..self.plans.plans.len() {
                let rows = self.full(&mut base, site, format)?;
                runs += 2 * self.batches.len() as u64;
                scores.push(Scored::new(site, format, &rows));
            }
            let seconds = start.elapsed().as_secs_f64();
            journal.add(Unit { batch: 0, segment: segments + place, scores, runs, seconds })?;
        }
        Ok(())
    }

    /// A layer in a format by full passes; rows of all batches, in their order.
    fn full(&self, base: &mut Whole, site: usize, format: usize) -> Result<Vec<RowScore>> {
        let mut all = Vec::new();
        let path = self.rewritten(site, format)?;
        let options = self.setup.session(self.bench);
        let runtime = &self.setup.runtime;
        let mut one = Whole::open(runtime, &path, "the rewritten", &options, Against::Logits)?;
        for (batch, padded) in self.batches {
            let chosen = self.positions(padded);
            let scored = |position: usize| chosen.contains(&position);
            let (_, logits) = base.run(padded, scored, None, true)?;
            let (rows, _) = one.run(padded, scored, logits.as_ref(), false)?;
            all.extend(rows.into_iter().take(batch.windows.len()));
            self.observer.progress(0, padded.labels.len() as u64);
            if self.observer.interrupted() {
                return Err(Error::Interrupted);
            }
        }
        Ok(all)
    }

    /// The model with one layer in one format, as a file.
    fn rewritten(&self, site: usize, format: usize) -> Result<std::path::PathBuf> {
        let plan = &self.plans.plans[format];
        let sites = plan.sites.get(site).cloned().into_iter().collect();
        let plan = RewritePlan { sites, products: Vec::new(), ..plan.clone() };
        let rewriting = |reason: String| Error::Rewrite(reason);
        let rewritten = execute(&self.plans.model, &plan, self.bench.threads)
            .map_err(|e| rewriting(e.to_string()))?;
        let path = self.work.join("one.onnx");
        let save = SaveOptions { overwrite: true, ..SaveOptions::default() };
        rewritten.save(&path, &save).map_err(|e| rewriting(e.to_string()))?;
        Ok(path)
    }

    /// Multiplications of the passes and of one evaluation.
    fn count(&self, journal: &Journal, taken: &mut Taken) {
        let cost = &self.prepared.cost;
        for (number, (_, padded)) in self.batches.iter().enumerate() {
            let tokens = padded.labels.len() as f64;
            let share = self.positions(padded).len() as f64 / padded.length.max(1) as f64;
            taken.evaluation += tokens * cost.from(0, 1.0);
            // The baseline.
            taken.work += tokens * cost.from(0, share);
            taken.runs += 1;
            for unit in journal.done.iter().filter(|unit| unit.batch == number) {
                if unit.segment < self.prepared.shape.segments {
                    taken.work += tokens * unit.runs as f64 * cost.from(unit.segment, share);
                }
            }
        }
        let full = journal.done.iter().filter(|u| u.segment >= self.prepared.shape.segments);
        let full: u64 = full.map(|unit| unit.runs).sum();
        taken.work += full as f64 * taken.evaluation / self.batches.len().max(1) as f64;
    }

    /// Says what helps when memory is short.
    fn hint(&self, error: Error) -> Error {
        match error {
            Error::Ort { doing, reason }
                if (Error::Ort { doing: doing.clone(), reason: reason.clone() })
                    .is_out_of_memory() =>
            {
                let reason =
                    format!("{reason}; pass a --batch-size below {}", self.bench.batch_size);
                Error::Ort { doing, reason }
            }
            other => other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::positions;

    #[test]
    fn positions_are_the_last_of_every_so_many() {
        assert_eq!(positions(5, 1), [0, 1, 2, 3, 4]);
        assert_eq!(positions(6, 2), [1, 3, 5]);
        assert_eq!(positions(5, 2), [1, 3]);
        // A text shorter than a step keeps one.
        assert_eq!(positions(3, 8), [1]);
    }
}
