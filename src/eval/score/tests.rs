//! Scoring with models that are not there.

use super::*;
use crate::eval::metrics::{DocumentScore, Metrics};
use crate::eval::schedule::plan;
use std::sync::atomic::AtomicU64;

/// Scores by token ids; runs out of memory above some padded tokens, fails or panics on demand.
#[derive(Clone, Debug)]
struct Fake {
    device: Device,
    most: usize,
    splits: bool,
    fails: Option<Device>,
    panics: bool,
    delay: Duration,
    running: Duration,
}

impl Fake {
    fn on(device: Device) -> Self {
        Self {
            device,
            most: usize::MAX,
            splits: true,
            fails: None,
            panics: false,
            delay: Duration::ZERO,
            running: Duration::ZERO,
        }
    }
}

impl Score for Fake {
    fn score(&mut self, windows: &[Window], batch: &Batch) -> Result<Vec<WindowScore>> {
        let ort = |text: &str| Err(Error::Ort { doing: "fake".into(), reason: text.into() });
        assert!(!self.panics, "fake panic");
        std::thread::sleep(self.delay);
        self.running += self.delay;
        if self.fails == Some(self.device) {
            return ort("an illegal memory access was encountered");
        }
        if batch.windows.len() * batch.length > self.most {
            return ort("Failed to allocate memory for requested buffer of size 123");
        }
        let score = |&index: &usize| {
            let window = &windows[index];
            let nll = window.ids.iter().map(|&id| 1.0 / f64::from(id)).sum();
            let score = DocumentScore {
                nll,
                entropy: nll / 3.0,
                correct: 0,
                tokens: window.scored() as u64,
                bytes: window.bytes,
                against: None,
            };
            WindowScore { score, kl: Vec::new() }
        };
        Ok(batch.windows.iter().map(score).collect())
    }

    fn splits(&self) -> bool {
        self.splits
    }

    fn running(&self) -> Duration {
        self.running
    }
}

fn corpus() -> Vec<Window> {
    let ids = |n: u32| (3..3 + 2 + (n * 7) % 31).map(|id| id * 3 + n).collect();
    let window = |n: u32| Window::whole(ids(n), u64::from(n), n as usize);
    (0..57).map(window).collect()
}

struct Outcome {
    scored: Result<Scored>,
    /// By window.
    documents: Vec<DocumentScore>,
    loaded: u64,
    progress: u64,
    warnings: Vec<String>,
}

fn run(devices: &[Device], warm_up: bool, fake: impl Fn(Device) -> Fake + Sync) -> Outcome {
    let windows = corpus();
    let batches = plan(&windows, 8);
    let (progress, warnings) = (AtomicU64::new(0), Mutex::new(Vec::new()));
    let todo = Vec::from_iter(0..batches.len());
    let (documents, loaded) =
        (Mutex::new(vec![DocumentScore::default(); windows.len()]), AtomicU64::new(0));
    let work = Work {
        windows: &windows,
        batches: &batches,
        todo: &todo,
        warm_up,
        loaded: &|| {
            loaded.fetch_add(1, Ordering::SeqCst);
        },
        done: &|index, scores, _| {
            let mut documents = documents.lock().unwrap();
            for (&window, score) in batches[index].windows.iter().zip(scores) {
                documents[window] = score.score;
            }
            Ok(())
        },
        progress: &|tokens| {
            progress.fetch_add(tokens, Ordering::SeqCst);
        },
        warn: &|text| warnings.lock().unwrap().push(text.to_owned()),
        interrupted: &|| false,
    };
    let scored = score(&work, devices, &|device| Ok(Box::new(fake(device)) as Box<dyn Score>));
    Outcome {
        scored,
        documents: documents.into_inner().unwrap(),
        loaded: loaded.into_inner(),
        progress: progress.into_inner(),
        warnings: warnings.into_inner().unwrap(),
    }
}

const GPUS: [Device; 2] = [Device::Cuda(0), Device::Cuda(1)];

#[test]
fn the_number_of_devices_changes_no_bit() {
    let one = run(&GPUS[..1], false, Fake::on).documents;
    let slow = |device| {
        let delay = if device == GPUS[0] { Duration::from_millis(3) } else { Duration::ZERO };
        Fake { delay, ..Fake::on(device) }
    };
    for devices in [&GPUS[..], &[GPUS[0], GPUS[0], GPUS[1]]] {
        let outcome = run(devices, true, slow);
        let scored = outcome.scored.unwrap();
        assert_eq!(outcome.documents, one);
        assert_eq!(Metrics::new(&outcome.documents), Metrics::new(&one));
        assert!(one.iter().all(|document| document.nll > 0.0) && outcome.loaded == 1);
        assert_eq!(outcome.progress, corpus().iter().map(|w| w.scored() as u64).sum::<u64>());
        assert!(outcome.warnings.is_empty() && scored.halved_to.is_none());
    }
}

#[test]
fn out_of_memory_halves_the_batch_and_says_so() {
    let whole = run(&GPUS[..1], false, Fake::on).documents;
    // The longest batch is 8 x 32; 70 tokens hold 2 rows of it and more rows of shorter ones.
    for (devices, warm_up) in [(&GPUS[..1], false), (&GPUS[..1], true), (&GPUS[..], true)] {
        let outcome = run(devices, warm_up, |device| Fake { most: 70, ..Fake::on(device) });
        let scored = outcome.scored.unwrap();
        assert_eq!(outcome.documents, whole);
        assert_eq!(scored.halved_to, Some(2));
        let said = outcome.warnings.iter().filter(|text| text.contains("cuda:0")).count();
        assert_eq!(said, 2, "{:?}", outcome.warnings);
        assert!(outcome.warnings[0].contains("on 8 documents of"), "{:?}", outcome.warnings);
    }
}

#[test]
fn one_document_that_does_not_fit_and_a_fixed_batch_fail() {
    let outcome = run(&GPUS[..1], false, |device| Fake { most: 20, ..Fake::on(device) });
    assert!(outcome.scored.unwrap_err().is_out_of_memory());
    assert_eq!(outcome.warnings.len(), 3, "{:?}", outcome.warnings);
    let fixed = |device| Fake { most: 70, splits: false, ..Fake::on(device) };
    let outcome = run(&GPUS[..1], false, fixed);
    assert!(outcome.scored.unwrap_err().is_out_of_memory() && outcome.warnings.is_empty());
}

#[test]
fn a_device_that_fails_stops_the_others() {
    for panics in [false, true] {
        let broken = move |device| Fake {
            fails: Some(GPUS[1]),
            panics: panics && device == GPUS[1],
            delay: Duration::from_millis(1),
            ..Fake::on(device)
        };
        for warm_up in [false, true] {
            let error = run(&GPUS, warm_up, broken).scored.unwrap_err().to_string();
            let says = if panics { "panicked: fake panic" } else { "illegal memory access" };
            assert!(error.contains(says), "{error}");
        }
    }
}

#[test]
fn an_interruption_is_seen_after_a_batch() {
    let windows = corpus();
    let batches = plan(&windows, 8);
    let seen = AtomicU64::new(0);
    let work = Work {
        windows: &windows,
        batches: &batches,
        todo: &[0, 1, 2, 3],
        warm_up: false,
        loaded: &|| {},
        done: &|_, _, _| Ok(()),
        progress: &|_| {
            seen.fetch_add(1, Ordering::SeqCst);
        },
        warn: &|_| {},
        interrupted: &|| seen.load(Ordering::SeqCst) >= 2,
    };
    let open = |device| Ok(Box::new(Fake::on(device)) as Box<dyn Score>);
    let stopped = score(&work, &GPUS[..1], &open);
    assert!(stopped.unwrap().interrupted);
    assert_eq!(seen.into_inner(), 2);
}

#[test]
fn time_outside_the_runtime_is_what_is_left() {
    let slow = |device| Fake { delay: Duration::from_millis(2), ..Fake::on(device) };
    let scored = run(&GPUS[..1], true, slow).scored.unwrap();
    // Eight batches; the warm-up is not among them.
    assert!(scored.seconds >= 0.016, "{scored:?}");
    assert!(scored.outside_run_seconds <= scored.seconds - 0.0159, "{scored:?}");
}
