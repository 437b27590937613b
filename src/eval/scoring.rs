//! A stage's graph scored on a team of devices: sessions, score file, memory, record.

use super::describe::bits_per_weight;
use super::devices::Device;
use super::error::Result;
use super::gpus::MemoryProbe;
use super::instrument;
use super::job::Task;
use super::loading::Loaded;
use super::measure::{Bench, Item};
use super::metrics::DocumentScore;
use super::pair::{self, Pair};
use super::peaks::Peaks;
use super::record::{Record, Status};
use super::score::{self, Score, Scored};
use super::scores::{self, Header, Scores, Writer};
use super::session::{Scorer, SessionOptions, open_model};
use super::stage::Stage;
use super::summary::{Ended, Summary, conclude};
use super::windows::Corpus;
use super::workers::Engine as _;
use serde_json::{Map, Value, json};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

impl Bench<'_> {
    /// Scores the graph at `path` and fills in `record`.
    pub(super) fn scored(
        &self,
        number: usize,
        path: &Path,
        team: &[Device],
        record: &mut Record,
        details: &mut Map<String, Value>,
    ) -> Result<Ended> {
        let Item { job, task, .. } = &self.items[number];
        let model = open_model(path, &job.model)?;
        let inspection = instrument::inspect(&model, &job.model)?;
        let files = instrument::files(path, &model)?;
        record.model_bytes = Some(files.iter().map(|(_, bytes)| bytes).sum());
        record.bits_per_weight = bits_per_weight(&model);
        drop(model);
        let (reference, mut remark) = match self.reference(number) {
            None => (None, None),
            Some(Ok(reference)) => match comparable(reference, inspection.vocabulary) {
                Ok(()) => (Some(reference), None),
                Err(reason) => (None, Some(reason)),
            },
            Some(Err(reason)) => (None, Some(format!("not compared: {reason}"))),
        };
        let mut measured = self.attempt(number, path, team, reference, record);
        if let (Err(error), Some(reference)) = (&measured, reference)
            && error.is_out_of_memory()
        {
            remark = Some(format!(
                "not compared token by token: {} does not fit beside it in memory",
                reference.stage
            ));
            measured = self.attempt(number, path, team, None, record);
        }
        let Attempt { scored, scores, loaded, baseline } = measured?;
        self.tell(&scored, &scores, &loaded, number, details);
        details.insert("sides".into(), json!(scored.sides));
        let corpus = &self.items[number].corpus;
        let (status, further) = self.conclude(number, &scored, &scores, baseline, record);
        let fp8 = matches!(task, Task::Sweep(Stage::NvFp8)) && status == Status::Ok;
        let without = fp8.then(|| loaded.without_fp8(record.sites_replaced.unwrap_or(0)));
        let own: Vec<String> = remark.into_iter().chain(without.flatten()).collect();
        if !own.is_empty() {
            // Merging shards keeps these, and finds the others anew.
            details.insert("remarks".into(), json!(own));
        }
        let partial = status == Status::Partial;
        let partial = partial.then(|| self.interrupted_after(number, &scores, corpus));
        let remarks: Vec<String> = partial.into_iter().chain(further).chain(own).collect();
        Ok((status, (!remarks.is_empty()).then(|| remarks.join("; "))))
    }

    /// Scores what is left of the batches, beside the reference if there is one.
    fn attempt<'r>(
        &self,
        number: usize,
        path: &Path,
        team: &[Device],
        reference: Option<&'r pair::Reference>,
        record: &mut Record,
    ) -> Result<Attempt<'r>> {
        let Item { task, corpus, batches, todo, scores, .. } = &self.items[number];
        let stage = task.name();
        let baseline = reference.map(|reference| reference.stage.as_str());
        let header = self.header(number, baseline);
        let (mut writer, kept) = Writer::open(scores, &header, self.options.resume)?;
        let todo: Vec<usize> =
            todo.iter().copied().filter(|batch| !kept.done.contains(batch)).collect();
        if !kept.done.is_empty() {
            let text = format!("{stage}: {} of {} batches kept", kept.done.len(), batches.len());
            self.observer.note(&text);
            let tokens = kept.windows.values().map(|(_, window)| window.score.tokens).sum();
            self.observer.progress(number, tokens);
        }
        let earlier = kept.seconds / team.len().max(1) as f64;
        let peaks = Peaks::start(self.chosen, team);
        let journal = Mutex::new((&mut writer, kept));
        let work = score::Work {
            windows: &corpus.windows,
            batches,
            todo: &todo,
            warm_up: self.chosen.on_gpu(),
            // What a stage takes is taken before its reference is loaded.
            loaded: &|| {
                if reference.is_some() {
                    peaks.take();
                }
            },
            done: &|index, found, seconds| {
                let mut journal = journal.lock().unwrap_or_else(PoisonError::into_inner);
                let (writer, scores) = &mut *journal;
                let place = |&window: &usize| (window, corpus.windows[window].document);
                let places: Vec<_> = batches[index].windows.iter().map(place).collect();
                writer.batch(index, &places, found, seconds, scores)
            },
            progress: &|tokens| self.observer.progress(number, tokens),
            warn: &|text| self.observer.warn(&format!("{stage}: {text}")),
            interrupted: &|| self.stopped(),
        };
        let loaded = Loaded::default();
        let open = |device| self.open(path, &stage, device, reference, &loaded);
        let mut scored = score::score(&work, team, &open)?;
        peaks.take();
        let (_, kept) = journal.into_inner().unwrap_or_else(PoisonError::into_inner);
        scored.seconds += earlier;
        self.fill(record, &peaks, &scored);
        Ok(Attempt { scored, scores: kept, loaded, baseline })
    }

    fn header(&self, number: usize, baseline: Option<&str>) -> Header {
        let Item { job, task, corpus, batches, key, .. } = &self.items[number];
        let (stage, definition) = (task.name(), self.options.definition.short());
        let names = [job.model.as_str(), &stage, key, &definition];
        Header::new(corpus, batches.len(), names, baseline)
    }

    /// Stage and documents of the baseline, where a stage ran without it and it has come to its end.
    fn baseline_scores(&self, number: usize, own: &Header) -> Option<(String, Vec<DocumentScore>)> {
        let Item { task, place: (job, _), scores, .. } = &self.items[number];
        let (of, stage) = match task {
            _ if own.baseline.is_some() => return None,
            Task::Sweep(Stage::Baseline) => return None,
            Task::Sweep(_) => (*job, Stage::Baseline.name()),
            Task::Graph(_) if *job == 0 => return None,
            Task::Graph(_) => (0, self.jobs.first()?.tasks.first()?.name()),
        };
        let name = scores::file_name(&self.jobs.get(of)?.model, &stage);
        let path = scores.parent()?.join(Path::new(&name).file_name()?);
        let (header, scores) = scores::read(&path).ok()?;
        // Of this run's baseline: a file of an older model or text has another key.
        let key = self.keys.get(of).and_then(|keys| {
            let tasks = self.jobs[of].tasks.iter().zip(keys);
            tasks.into_iter().find(|(task, _)| task.name() == stage).map(|(_, key)| key)
        });
        let same = key == Some(&header.key)
            && header.subset_of == own.subset_of
            && header.definition == own.definition
            && scores.done.len() == header.batches;
        same.then(|| (stage, scores.documents(header.subset_of.len()).0))
    }

    /// Speed and memory.
    fn fill(&self, record: &mut Record, peaks: &Peaks, scored: &Scored) {
        let [resident, device] = peaks.bytes();
        record.peak_resident_bytes = resident.filter(|_| self.one_by_one);
        record.peak_device_bytes = device;
        record.peak_memory_bytes = if self.chosen.on_gpu() { device } else { resident };
        record.load_seconds = Some(scored.load_seconds);
        let ratio = |[own, reference]: [f64; 2]| reference / own;
        record.speed_ratio = scored.sides.map(ratio).filter(|ratio| ratio.is_finite());
    }

    /// Loads the graph on a device; notes in `loaded` what that showed.
    fn open<'b>(
        &'b self,
        path: &Path,
        stage: &str,
        device: Device,
        reference: Option<&'b pair::Reference>,
        loaded: &Loaded,
    ) -> Result<Box<dyn Score + 'b>> {
        if let Device::Cuda(ordinal) = device {
            // The context exists before memory is looked at. Without it the session fails, and says why.
            let _ = mx_kernels::cuda::Gpu::get(ordinal);
        }
        let gpu = self.chosen.gpu(device);
        let used = || gpu.and_then(|gpu| MemoryProbe::new()?.used(&gpu.uuid));
        let before = used();
        let options =
            SessionOptions { device, threads: self.options.threads, debug: self.options.debug };
        let opened: Box<dyn Score + 'b> = match reference {
            None => {
                let scorer = Scorer::open(self.runtime, path, stage, &options)?;
                loaded.note(scorer.census());
                Box::new(scorer)
            }
            Some(reference) => {
                let pair = Pair::open(self.runtime, path, stage, options, reference)?;
                loaded.note(pair.census());
                Box::new(pair)
            }
        };
        if let Some((before, after)) = before.zip(used()) {
            loaded.add_bytes(after.saturating_sub(before));
        }
        Ok(opened)
    }

    fn tell(
        &self,
        scored: &Scored,
        scores: &Scores,
        loaded: &Loaded,
        number: usize,
        details: &mut Map<String, Value>,
    ) {
        let Item { corpus, scores: file, .. } = &self.items[number];
        details.insert("load_seconds".into(), json!(scored.load_seconds));
        details.insert("outside_run_seconds".into(), json!(scored.outside_run_seconds));
        details.insert("outside_run_share".into(), json!(scored.outside_run_share()));
        if let Some(name) = file.file_name() {
            details.insert("scores".into(), json!(format!("scores/{}", name.to_string_lossy())));
        }
        if self.chosen.on_gpu() {
            loaded.tell(details);
        }
        if let Some(rows) = scored.halved_to {
            details.insert("batch_halved_to".into(), json!(rows));
        }
        if self.options.documents {
            let (documents, _) = scores.documents(corpus.documents.len());
            let nll: Vec<f64> = documents.iter().map(|document| document.nll).collect();
            let tokens: Vec<u64> = documents.iter().map(|document| document.tokens).collect();
            details.insert("documents".into(), json!({"nll": nll, "tokens": tokens}));
        }
    }

    /// The record's figures, and how the stage ended.
    fn conclude(
        &self,
        number: usize,
        scored: &Scored,
        scores: &Scores,
        baseline: Option<&str>,
        record: &mut Record,
    ) -> Ended {
        let corpus = &self.items[number].corpus;
        let (mut documents, mut divergence) = scores.documents(corpus.documents.len());
        if scored.interrupted {
            // A document counts when all of its windows are there.
            for (index, window) in corpus.windows.iter().enumerate() {
                if !scores.windows.contains_key(&index) {
                    documents[window.document] = DocumentScore::default();
                    divergence[window.document].clear();
                }
            }
        }
        let (status, remark) = conclude(&documents, scored, record);
        let header = self.header(number, baseline);
        record.definition = Some(header.definition.clone());
        // A shard's figures say nothing about the corpus.
        if status == Status::Ok && self.items[number].is_whole() {
            let others = self.baseline_scores(number, &header);
            let summary = Summary { header: &header, documents, divergence, others };
            record.statistics =
                summary.statistics(self.options.bootstrap, self.options.definition.unit());
        }
        if scored.interrupted {
            // Also where no document is whole yet: it did not fail.
            return (Status::Partial, remark.filter(|_| status == Status::Ok));
        }
        (status, remark)
    }

    fn interrupted_after(&self, number: usize, scores: &Scores, corpus: &Corpus) -> String {
        format!(
            "interrupted after {} of {} batches, the longest documents first: the figures are of {} of \
             {} windows; the same command{} goes on from here",
            scores.done.len(),
            self.items[number].batches.len(),
            scores.windows.len(),
            corpus.windows.len(),
            // A task of a plan always goes on.
            if self.options.resume { "" } else { " with --resume" }
        )
    }
}

/// What scoring a graph left.
struct Attempt<'r> {
    scored: Scored,
    scores: Scores,
    loaded: Loaded,
    baseline: Option<&'r str>,
}

/// Whether two vocabularies can be compared, as far as the graphs say.
fn comparable(
    reference: &pair::Reference,
    vocabulary: Option<usize>,
) -> std::result::Result<(), String> {
    let other = open_model(&reference.path, &reference.stage)
        .and_then(|model| instrument::inspect(&model, &reference.stage))
        .map_err(|e| format!("not compared: {e}"))?;
    match (vocabulary, other.vocabulary) {
        (Some(own), Some(other)) if own != other => Err(format!(
            "not compared with {}: its vocabulary is {other}, this one's {own}",
            reference.stage
        )),
        _ => Ok(()),
    }
}
