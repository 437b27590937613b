//! A stage's graph scored on a team of devices: sessions, score file, memory, record.

use super::describe::bits_per_weight;
use super::devices::Device;
use super::error::Result;
use super::gpus::MemoryProbe;
use super::instrument;
use super::job::Task;
use super::loading::Loaded;
use super::measure::{Bench, Item};
use super::metrics::{DocumentScore, Metrics};
use super::pair::{Pair, Reference};
use super::process::{PeakDeviceMemory, PeakMemory};
use super::record::{Record, Status};
use super::score::{self, Score, Scored};
use super::scores::{Header, Scores, Writer};
use super::session::{Scorer, SessionOptions, open_model};
use super::stage::Stage;
use super::windows::Corpus;
use super::workers::Engine as _;
use serde_json::{Map, Value, json};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

/// How a stage ended, and what is to be said of it.
type Ended = (Status, Option<String>);

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
        let corpus = &self.items[number].corpus;
        let (status, further) = self.conclude(number, &scored, &scores, baseline, record);
        let fp8 = matches!(task, Task::Sweep(Stage::NvFp8)) && status == Status::Ok;
        let without = fp8.then(|| loaded.without_fp8(record.sites_replaced.unwrap_or(0)));
        let mut remarks: Vec<String> = further.into_iter().chain(remark).collect();
        remarks.extend(without.flatten());
        if status == Status::Partial {
            remarks.insert(0, self.interrupted_after(number, &scores, corpus));
        }
        Ok((status, (!remarks.is_empty()).then(|| remarks.join("; "))))
    }

    /// Scores what is left of the batches, beside the reference if there is one.
    fn attempt<'r>(
        &self,
        number: usize,
        path: &Path,
        team: &[Device],
        reference: Option<&'r Reference>,
        record: &mut Record,
    ) -> Result<Attempt<'r>> {
        let Item { job, task, corpus, batches, todo, key, scores, .. } = &self.items[number];
        let (stage, definition) = (task.name(), self.options.definition());
        let baseline = reference.map(|reference| reference.stage.as_str());
        let names = [job.model.as_str(), &stage, key, &definition];
        let header = Header::new(corpus, batches.len(), names, baseline);
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
        let peaks = Peaks::start(self, team);
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
        if !scored.interrupted {
            writer.end(json!({
                "seconds": scored.seconds, "load_seconds": scored.load_seconds,
                "sides": scored.sides, "peak_memory_bytes": record.peak_memory_bytes,
                "peak_resident_bytes": record.peak_resident_bytes,
                "peak_device_bytes": record.peak_device_bytes,
                "halved_to": scored.halved_to,
            }))?;
        }
        Ok(Attempt { scored, scores: kept, loaded, baseline })
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
        reference: Option<&'b Reference>,
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
        let _ = (&divergence, baseline);
        let (status, remark) = conclude(&documents, scored, record);
        if status == Status::Ok && scored.interrupted {
            return (Status::Partial, remark);
        }
        (status, remark)
    }

    fn interrupted_after(&self, number: usize, scores: &Scores, corpus: &Corpus) -> String {
        format!(
            "interrupted after {} of {} batches, the longest documents first: the figures are of {} of \
             {} windows; the same command with --resume goes on from here",
            scores.done.len(),
            self.items[number].batches.len(),
            scores.windows.len(),
            corpus.windows.len()
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
fn comparable(reference: &Reference, vocabulary: Option<usize>) -> std::result::Result<(), String> {
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

/// Watches memory until it is taken.
struct Peaks {
    resident: PeakMemory,
    /// With what was in use before the run.
    device: Mutex<Option<(PeakDeviceMemory, u64)>>,
    taken: Mutex<Option<[Option<u64>; 2]>>,
}

impl Peaks {
    fn start(bench: &Bench<'_>, team: &[Device]) -> Self {
        let device = Mutex::new(watch(bench, team));
        Self { resident: PeakMemory::start(), device, taken: Mutex::new(None) }
    }

    /// Reads the peaks; what comes later does not count.
    fn take(&self) {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if taken.is_none() {
            let watch = self.device.lock().unwrap_or_else(PoisonError::into_inner).take();
            let device = watch.and_then(|(watch, before)| Some((watch.bytes()?, before)));
            let device = device.map(|(bytes, before)| bytes.saturating_sub(before));
            *taken = Some([self.resident.bytes(), device]);
        }
    }

    fn bytes(&self) -> [Option<u64>; 2] {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner).unwrap_or_default()
    }
}

/// Watches the memory of the team's GPUs; with it, what was in use before the run.
fn watch(bench: &Bench<'_>, team: &[Device]) -> Option<(PeakDeviceMemory, u64)> {
    let mut uuids: Vec<String> = Vec::new();
    let mut before = 0;
    for gpu in team.iter().filter_map(|&device| bench.chosen.gpu(device)) {
        if !uuids.contains(&gpu.uuid) {
            before += gpu.memory.as_ref().ok()?.used();
            uuids.push(gpu.uuid.clone());
        }
    }
    let watch = if uuids.is_empty() { None } else { PeakDeviceMemory::start(uuids) };
    watch.map(|watch| (watch, before))
}

/// The record's figures, and how the stage ended.
fn conclude(documents: &[DocumentScore], scored: &Scored, record: &mut Record) -> Ended {
    let bad = documents.iter().filter(|d| !(d.nll.is_finite() && d.entropy.is_finite()));
    match (bad.count(), Metrics::new(documents)) {
        (0, Some(metrics)) => {
            record.set_metrics(&metrics, scored.seconds);
            let halved = scored
                .halved_to
                .map(|rows| format!("out of memory: batches cut to as few as {rows} documents"));
            (Status::Ok, halved)
        }
        (0, None) => (Status::Failed, Some("no token was scored".into())),
        (bad, _) => {
            let documents = documents.len();
            let text = format!(
                "the loss is not finite in {bad} of {documents} documents: the model returns NaN or \
                 Inf"
            );
            (Status::Failed, Some(text))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_that_was_cut_is_a_remark_and_nan_a_failure() {
        let document =
            |nll| DocumentScore { nll, entropy: 1.0, tokens: 2, bytes: 7, ..Default::default() };
        let documents = |nll| [document(nll), document(3.0)];
        let scored = |halved_to| Scored { seconds: 1.0, halved_to, ..Scored::default() };
        let mut record = Record::new("m", "baseline", "cuda:0", Status::Failed);
        let ended = conclude(&documents(1.0), &scored(None), &mut record);
        assert_eq!(ended, (Status::Ok, None));
        assert_eq!(record.xent, Some(1.0));
        let (status, reason) = conclude(&documents(1.0), &scored(Some(4)), &mut record);
        assert!(status == Status::Ok && reason.unwrap().contains("as few as 4"));
        let (status, reason) = conclude(&documents(f64::NAN), &scored(None), &mut record);
        assert!(status == Status::Failed && reason.unwrap().contains("1 of 2 documents"));
    }
}
