//! The output folder: results that survive an interruption, and one writer at a time.

use super::error::{Error, Result};
use super::record::{Record, Status};
use serde_json::{Map, Value};
use std::fs::{File, OpenOptions, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};

/// A record and its line in results.jsonl.
///
/// What is kept from an earlier run is kept as text: reading a float and writing it again may change
/// its last digit.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// The record.
    pub record: Record,
    /// The line, without its end.
    pub line: String,
}

/// The folder of one run; holds its lock.
#[derive(Debug)]
pub struct Store {
    folder: PathBuf,
    entries: Vec<Entry>,
    /// Key of every record that is ok, by model and stage.
    keys: Map<String, Value>,
    /// What a record has no field for, by model and stage.
    details: Map<String, Value>,
    run: Map<String, Value>,
    _lock: File,
}

const RESULTS: &str = "results.jsonl";
const RUN: &str = "run.json";
const LOCK: &str = ".lock";
const WORK: &str = ".work";
const SCORES: &str = "scores";

impl Store {
    /// Opens or makes the folder and takes its lock. With `resume` earlier records are kept to be
    /// reused, without it they are dropped.
    ///
    /// # Errors
    /// Another mxeval holds the folder, it cannot be written, or a record in it is not readable.
    pub fn open(folder: &Path, resume: bool) -> Result<Self> {
        std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
        let path = folder.join(LOCK);
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(Error::io(&path))?;
        lock.try_lock().map_err(|e| match e {
            TryLockError::WouldBlock => Error::Output(format!(
                "{}: another mxeval is writing to this folder; wait for it or choose another --out",
                folder.display()
            )),
            TryLockError::Error(source) => Error::Io { path, source },
        })?;
        let mut store = Self {
            folder: folder.into(),
            entries: Vec::new(),
            keys: Map::new(),
            details: Map::new(),
            run: Map::new(),
            _lock: lock,
        };
        // A run that was killed may have left a rewritten model.
        store.clear_work()?;
        let scores = folder.join(SCORES);
        std::fs::create_dir_all(&scores).map_err(Error::io(&scores))?;
        if resume {
            store.entries = read_entries(&folder.join(RESULTS))?;
            [store.keys, store.details] = read_run(&folder.join(RUN), ["keys", "stages"]);
        }
        Ok(store)
    }

    /// Keeps of the earlier records those that `wanted` (model, stage, key) names with an equal key,
    /// and writes results.jsonl anew with them.
    ///
    /// # Errors
    /// results.jsonl cannot be written.
    pub fn keep(&mut self, wanted: &[(String, String, String)]) -> Result<()> {
        let keys = std::mem::take(&mut self.keys);
        let mut details = std::mem::take(&mut self.details);
        let matches = |record: &Record| {
            record.status == Status::Ok
                && wanted.iter().any(|(model, stage, key)| {
                    *model == record.model
                        && *stage == record.stage
                        && keys.get(&slot(model, stage)).and_then(Value::as_str) == Some(key)
                })
        };
        let mut kept: Vec<Entry> = Vec::new();
        for entry in std::mem::take(&mut self.entries) {
            let Record { model, stage, .. } = &entry.record;
            let again = |e: &Entry| e.record.model == *model && e.record.stage == *stage;
            if matches(&entry.record) && !kept.iter().any(again) {
                let slot = slot(model, stage);
                if let Some(key) = keys.get(&slot) {
                    if let Some(details) = details.remove(&slot) {
                        self.details.insert(slot.clone(), details);
                    }
                    self.keys.insert(slot, key.clone());
                }
                kept.push(entry);
            }
        }
        let lines: String = kept.iter().map(|entry| format!("{}\n", entry.line)).collect();
        self.entries = kept;
        self.write(RESULTS, lines.as_bytes())
    }

    /// The record of a stage, kept or new.
    pub fn get(&self, model: &str, stage: &str) -> Option<&Entry> {
        let wanted = |e: &&Entry| e.record.model == model && e.record.stage == stage;
        self.entries.iter().find(wanted)
    }

    /// Appends a record, then its key and `details` to run.json: a stage that was cut off in between
    /// is run again.
    ///
    /// # Errors
    /// The folder cannot be written.
    pub fn append(&mut self, record: Record, key: &str, details: Map<String, Value>) -> Result<()> {
        let path = self.folder.join(RESULTS);
        let mut file =
            OpenOptions::new().append(true).create(true).open(&path).map_err(Error::io(&path))?;
        let line =
            serde_json::to_string(&record).map_err(|e| Error::Output(format!("{RESULTS}: {e}")))?;
        file.write_all(format!("{line}\n").as_bytes())
            .and_then(|()| file.sync_data())
            .map_err(Error::io(&path))?;
        if record.status == Status::Ok {
            self.keys.insert(slot(&record.model, &record.stage), key.into());
        }
        if !details.is_empty() {
            self.details.insert(slot(&record.model, &record.stage), Value::Object(details));
        }
        self.entries.push(Entry { record, line });
        self.write_run()
    }

    /// Sets what run.json says about the run and writes it.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn set_run(&mut self, run: Map<String, Value>) -> Result<()> {
        self.run = run;
        self.write_run()
    }

    fn write_run(&self) -> Result<()> {
        let mut run = self.run.clone();
        run.insert("stages".into(), Value::Object(self.details.clone()));
        run.insert("keys".into(), Value::Object(self.keys.clone()));
        let text =
            serde_json::to_string_pretty(&run).map_err(|e| Error::Output(format!("{RUN}: {e}")))?;
        self.write(RUN, format!("{text}\n").as_bytes())
    }

    /// Writes a file of the folder as a whole or not at all.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<()> {
        write_whole(&self.folder.join(name), bytes)
    }

    /// Removes a file of the folder, if it is there.
    ///
    /// # Errors
    /// It cannot be removed.
    pub fn remove(&self, name: &str) -> Result<()> {
        let path = self.folder.join(name);
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io(path)(e)),
            _ => Ok(()),
        }
    }

    /// Where rewritten models lie while they are measured.
    pub fn work_root(&self) -> PathBuf {
        self.folder.join(WORK)
    }

    /// Removes the rewritten models.
    ///
    /// # Errors
    /// They cannot be removed.
    pub fn clear_work(&self) -> Result<()> {
        match std::fs::remove_dir_all(self.work_root()) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::io(self.work_root())(e))
            }
            _ => Ok(()),
        }
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }
}

/// Writes a file as a whole or not at all.
pub(super) fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let written =
        tempfile::NamedTempFile::new_in(folder.unwrap_or(Path::new("."))).and_then(|mut file| {
            file.write_all(bytes)?;
            set_readable(file.as_file())?;
            file.persist(path).map_err(|e| e.error)
        });
    written.map(drop).map_err(Error::io(path))
}

/// Temporary files are private by default; results are not.
fn set_readable(file: &File) -> std::io::Result<()> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        file.set_permissions(std::fs::Permissions::from_mode(0o644))?;
    }
    let _ = file;
    Ok(())
}

/// A folder for one rewritten model, gone when the model has been measured.
#[derive(Debug)]
pub struct WorkFolder(PathBuf);

impl WorkFolder {
    /// Makes a folder below `root`, [`Store::work_root`].
    ///
    /// # Errors
    /// It cannot be made.
    pub fn new(root: &Path, name: &str) -> Result<Self> {
        let path = root.join(name);
        std::fs::create_dir_all(&path).map_err(Error::io(&path))?;
        Ok(Self(path))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for WorkFolder {
    fn drop(&mut self) {
        // What is left over is removed at the end of the run and at the start of the next.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn slot(model: &str, stage: &str) -> String {
    format!("{model} {stage}")
}

/// Earlier records. A last line without its newline was cut off by a crash and is left out.
fn read_entries(path: &Path) -> Result<Vec<Entry>> {
    let text = match std::fs::read_to_string(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(Error::io(path))?,
    };
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    whole
        .lines()
        .enumerate()
        .map(|(index, line)| {
            let record = serde_json::from_str(line).map_err(|e| {
                Error::Output(format!(
                    "{}, line {}: not a record of mxeval ({e}); choose another --out or leave out \
                     --resume",
                    path.display(),
                    index + 1
                ))
            })?;
            Ok(Entry { record, line: line.to_owned() })
        })
        .collect()
}

/// Parts of an earlier run.json; without the keys nothing is reused.
fn read_run<const N: usize>(path: &Path, parts: [&str; N]) -> [Map<String, Value>; N] {
    let run = std::fs::read(path).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
    let mut run: Map<String, Value> = run.unwrap_or_default();
    parts.map(|part| match run.remove(part) {
        Some(Value::Object(part)) => part,
        _ => Map::new(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(stage: &str, status: Status) -> Record {
        Record::new("m.onnx", stage, "cpu", status)
    }

    fn wanted(stages: &[(&str, &str)]) -> Vec<(String, String, String)> {
        stages.iter().map(|(s, k)| ("m.onnx".into(), (*s).into(), (*k).into())).collect()
    }

    fn stages(folder: &Path) -> Vec<String> {
        let entries = read_entries(&folder.join(RESULTS)).unwrap();
        entries.into_iter().map(|entry| entry.record.stage).collect()
    }

    #[test]
    fn resume_keeps_what_is_ok_and_has_the_same_key() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = Store::open(dir.path(), false).unwrap();
        let details = |n: u64| Map::from_iter([("n".to_owned(), Value::from(n))]);
        store.append(record("baseline", Status::Ok), "k1", details(1)).unwrap();
        store.append(record("bf16", Status::Failed), "k2", Map::new()).unwrap();
        store.append(record("int8", Status::Ok), "k3", details(3)).unwrap();
        drop(store);
        let mut store = Store::open(dir.path(), true).unwrap();
        store.keep(&wanted(&[("baseline", "k1"), ("bf16", "k2"), ("int8", "other")])).unwrap();
        assert!(store.get("m.onnx", "baseline").is_some());
        assert!(store.get("m.onnx", "int8").is_none());
        assert_eq!(stages(dir.path()), ["baseline"]);
        store.append(record("bf16", Status::Ok), "k2", Map::new()).unwrap();
        assert_eq!(stages(dir.path()), ["baseline", "bf16"]);
        let [kept] = read_run(&dir.path().join(RUN), ["stages"]);
        assert_eq!(Value::Object(kept), serde_json::json!({"m.onnx baseline": {"n": 1}}));
        drop(store);
        // Without --resume everything starts anew.
        let mut store = Store::open(dir.path(), false).unwrap();
        store.keep(&wanted(&[("baseline", "k1")])).unwrap();
        assert!(stages(dir.path()).is_empty());
    }

    #[test]
    fn a_line_cut_off_by_a_crash_is_dropped_and_foreign_files_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = Store::open(dir.path(), false).unwrap();
        store.append(record("baseline", Status::Ok), "k1", Map::new()).unwrap();
        drop(store);
        let path = dir.path().join(RESULTS);
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, format!("{text}{{\"model\": \"m.on")).unwrap();
        assert_eq!(Store::open(dir.path(), true).unwrap().entries.len(), 1);
        std::fs::write(&path, "{\"other\": 1}\n").unwrap();
        let error = Store::open(dir.path(), true).unwrap_err().to_string();
        assert!(error.contains("line 1"), "{error}");
    }

    #[test]
    fn one_writer_at_a_time_and_no_leftovers() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), false).unwrap();
        let folder = |name| WorkFolder::new(&store.work_root(), name).unwrap();
        let (left, gone) = (folder("a"), folder("b"));
        for folder in [&left, &gone] {
            std::fs::write(folder.path().join("model.onnx"), "x").unwrap();
        }
        drop(gone);
        assert!(left.path().exists() && !store.work_root().join("b").exists());
        // A run that is killed.
        std::mem::forget(left);
        let error = Store::open(dir.path(), true).unwrap_err().to_string();
        assert!(error.contains("another mxeval"), "{error}");
        drop(store);
        let store = Store::open(dir.path(), true).unwrap();
        assert!(!store.work_root().exists());
    }
}
