//! The output folder: written under a temporary name, filled with copies, renamed.

use std::{
    collections::BTreeSet,
    fs, io, mem,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tempfile::TempDir;

use super::{GenaiError, LIBRARY, config::Config};
use crate::{
    onnx::{self, Model},
    rewrite::PLAN_KEY,
};

/// Files from this size on are hard links to the input's where the file system allows: weights of models that
/// are not rewritten take no space twice. Smaller ones are copies.
const LINK_FROM: u64 = 16 << 20;

/// Files that people edit or replace in place are copies whatever their size: a large vocabulary has 30 MB of JSON.
const EDITED: [&str; 7] = ["json", "jsonl", "txt", "jinja", "model", "md", "so"];

/// How deeply folders may nest.
const MAX_DEPTH: usize = 16;

/// What whoever ends the process before a folder is complete has to know.
#[derive(Clone, Debug, Default)]
pub struct Unfinished(Arc<Mutex<State>>);

#[derive(Debug, Default)]
enum State {
    /// No folder is written.
    #[default]
    Idle,
    /// This temporary one is.
    Writing(PathBuf),
    /// It was removed, and no other one may begin.
    Interrupted,
}

impl Unfinished {
    /// Removes the temporary folder for good and calls `end`. A rewrite that goes on in another thread neither gives
    /// its folder a name nor returns before `end` has; an output that is just being given its name gets it first.
    pub fn interrupt(&self, end: impl FnOnce()) {
        let mut state = self.lock();
        if let State::Writing(folder) = mem::replace(&mut *state, State::Interrupted) {
            // Files that appear while it is emptied are met by the next turn.
            for _ in 0..100 {
                match fs::remove_dir_all(&folder) {
                    Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {}
                    _ => break,
                }
            }
        }
        end();
    }

    /// The error of a rewrite, which is another one when its folder was taken away.
    pub(super) fn cause(&self, error: GenaiError) -> GenaiError {
        match *self.lock() {
            State::Interrupted => onnx::Error::Stopped.into(),
            _ => error,
        }
    }

    /// The state, unless it is [`State::Interrupted`].
    fn going_on(&self) -> Result<MutexGuard<'_, State>, GenaiError> {
        let state = self.lock();
        match *state {
            State::Interrupted => Err(onnx::Error::Stopped.into()),
            _ => Ok(state),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An output folder that is being written.
pub(super) struct Output {
    temporary: TempDir,
    target: PathBuf,
    force: bool,
    unfinished: Unfinished,
}

impl Output {
    /// Starts the folder that will become `target`, for files of `input`.
    pub fn create(
        input: &Path,
        target: &Path,
        force: bool,
        unfinished: &Unfinished,
    ) -> Result<Self, GenaiError> {
        let refuse =
            |what: &str| Err(GenaiError::Output { path: target.to_owned(), what: what.to_owned() });
        let (parent, name) = match (target.parent(), target.file_name()) {
            (Some(parent), Some(name)) if parent.as_os_str().is_empty() => (Path::new("."), name),
            (Some(parent), Some(name)) => (parent, name),
            _ => return refuse("it is no name of a folder"),
        };
        // What does not exist yet has no canonical path, but its parent has.
        let parent = parent.canonicalize().map_err(GenaiError::io("open", parent))?;
        let input = input.canonicalize().map_err(GenaiError::io("open", input))?;
        let place = parent.join(name);
        let place = place.canonicalize().unwrap_or(place);
        if place.starts_with(&input) || input.starts_with(&place) {
            return refuse("it is the input, or one is within the other");
        }
        if target.symlink_metadata().is_ok() {
            if !force {
                return refuse("it exists; --force replaces it");
            }
            if !is_replaceable(target) {
                return refuse(
                    "it does not say that mxrewrite made it; remove it first, or name another with -o",
                );
            }
        }
        let mut state = unfinished.going_on()?;
        let temporary = tempfile::Builder::new()
            .prefix(".mxrewrite-")
            .suffix(".tmp")
            .tempdir_in(&parent)
            .map_err(GenaiError::io("create a folder in", &parent))?;
        *state = State::Writing(temporary.path().to_owned());
        Ok(Self { temporary, target: target.to_owned(), force, unfinished: unfinished.clone() })
    }

    /// The folder as long as it is written.
    pub fn path(&self) -> &Path {
        self.temporary.path()
    }

    /// Where a file of it will be.
    pub fn finally(&self, path: &Path) -> PathBuf {
        path.strip_prefix(self.path()).map_or_else(|_| path.to_owned(), |p| self.target.join(p))
    }

    /// Gives the complete folder its name, in place of an old one where that was asked for.
    pub fn persist(self) -> Result<(), GenaiError> {
        let mut state = self.unfinished.going_on()?;
        share(self.path())?;
        let old = match self.force && self.target.symlink_metadata().is_ok() {
            true => Some(self.set_aside()?),
            false => None,
        };
        let renamed = fs::rename(self.path(), &self.target);
        if renamed.is_err()
            && let Some(old) = old
        {
            // The old folder goes back where it was; where it cannot, it stays beside it.
            if fs::rename(old.path().join("old"), &self.target).is_err() {
                let _ = old.keep();
            }
        }
        renamed.map_err(GenaiError::io("write", &self.target))?;
        // Renamed: there is nothing left to remove.
        *state = State::Idle;
        let _ = self.temporary.keep();
        Ok(())
    }

    /// Moves the old output into a folder that is removed when it is dropped.
    fn set_aside(&self) -> Result<TempDir, GenaiError> {
        let parent = self.path().parent().unwrap_or(Path::new("."));
        let aside = tempfile::Builder::new().prefix(".mxrewrite-").tempdir_in(parent);
        let aside = aside.map_err(GenaiError::io("create a folder in", parent))?;
        fs::rename(&self.target, aside.path().join("old"))
            .map_err(GenaiError::io("replace", &self.target))?;
        Ok(aside)
    }
}

/// Temporary folders are their owner's alone; the output has the mode that a new folder has here.
fn share(folder: &Path) -> Result<(), GenaiError> {
    let probe = folder.join(".mode");
    fs::create_dir(&probe).map_err(GenaiError::io("create", &probe))?;
    let mode = fs::metadata(&probe).map_err(GenaiError::io("read", &probe))?.permissions();
    fs::remove_dir(&probe).map_err(GenaiError::io("remove", &probe))?;
    fs::set_permissions(folder, mode).map_err(GenaiError::io("set the mode of", folder))
}

/// `--force` replaces an earlier output or an empty folder: never somebody's home, nor a model that was downloaded.
fn is_replaceable(target: &Path) -> bool {
    let is_folder = target.symlink_metadata().is_ok_and(|m| m.is_dir());
    let is_empty = || fs::read_dir(target).is_ok_and(|mut entries| entries.next().is_none());
    is_folder && (is_empty() || is_ours(target))
}

/// True when the configuration loads our library, or a model of the decoder says which plan made it.
fn is_ours(folder: &Path) -> bool {
    let Ok(config) = Config::open(folder) else { return false };
    let planned = |file: &str| {
        let model = Model::open(folder.join(file));
        model.is_ok_and(|model| model.metadata().any(|(key, _)| key == PLAN_KEY))
    };
    let stages = config.stages().unwrap_or_default();
    config.loads(LIBRARY) || stages.iter().any(|stage| planned(&stage.file))
}

/// Every file of `folder`, relative to it, in order of names. Links are followed.
pub(super) fn files(folder: &Path) -> Result<Vec<PathBuf>, GenaiError> {
    let mut found = Vec::new();
    walk(folder, Path::new(""), 0, &mut found)?;
    found.sort();
    Ok(found)
}

fn walk(
    folder: &Path,
    below: &Path,
    depth: usize,
    found: &mut Vec<PathBuf>,
) -> Result<(), GenaiError> {
    let here = folder.join(below);
    if depth > MAX_DEPTH {
        let source = io::Error::other("folders nest too deeply (a link in a circle?)");
        return Err(GenaiError::Io { action: "read", path: here, source });
    }
    for entry in fs::read_dir(&here).map_err(GenaiError::io("read", &here))? {
        let entry = entry.map_err(GenaiError::io("read", &here))?;
        let path = below.join(entry.file_name());
        let full = folder.join(&path);
        let metadata = fs::metadata(&full).map_err(GenaiError::io("read", &full))?;
        if metadata.is_dir() {
            walk(folder, &path, depth + 1, found)?;
        } else if metadata.is_file() {
            found.push(path);
        } else {
            let source = io::Error::other("it is neither a file nor a folder");
            return Err(GenaiError::Io { action: "copy", path: full, source });
        }
    }
    Ok(())
}

/// Copies files of `from` into `to`; none may be there already.
pub(super) fn copy(
    from: &Path,
    to: &Path,
    files: &[PathBuf],
    taken: &BTreeSet<PathBuf>,
) -> Result<(), GenaiError> {
    for file in files {
        let (source, target) = (from.join(file), to.join(file));
        if taken.contains(file) {
            let what = format!(
                "'{}' is needed by a model that is not rewritten, and the rewritten one writes a file of that name",
                file.display()
            );
            return Err(GenaiError::Output { path: target, what });
        }
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent).map_err(GenaiError::io("create", parent))?;
        }
        copy_file(&source, &target)?;
    }
    Ok(())
}

fn copy_file(source: &Path, target: &Path) -> Result<(), GenaiError> {
    // A hard link to a symbolic link would be one itself.
    let real = source.canonicalize().map_err(GenaiError::io("read", source))?;
    let size = fs::metadata(&real).map_err(GenaiError::io("read", source))?.len();
    let edited = source.extension().is_some_and(|e| EDITED.iter().any(|known| e == *known));
    if size >= LINK_FROM && !edited && fs::hard_link(&real, target).is_ok() {
        return Ok(());
    }
    fs::copy(&real, target).map_err(GenaiError::io("copy", source))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder_with(parent: &Path, name: &str, file: &str) -> PathBuf {
        let folder = parent.join(name);
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join(file), file).unwrap();
        folder
    }

    /// Whatever the moment of the signal, the output is the old one, the new one or none.
    #[test]
    fn an_interrupted_output_gets_no_name() {
        let root = tempfile::tempdir().unwrap();
        let input = folder_with(root.path(), "in", "model.onnx");
        let target = root.path().join("out");
        let stopped = |error: GenaiError| {
            matches!(error, GenaiError::Onnx(onnx::Error::Stopped)).then_some(()).unwrap();
        };
        let unfinished = Unfinished::default();
        let output = Output::create(&input, &target, false, &unfinished).unwrap();
        fs::write(output.path().join("half"), "").unwrap();
        fs::create_dir(&target).unwrap();
        fs::write(target.join("old"), "").unwrap();
        let mut ended = false;
        unfinished.interrupt(|| ended = true);
        assert!(ended && !output.path().exists());
        let force = Output { force: true, ..output };
        stopped(force.persist().unwrap_err());
        assert!(target.join("old").exists());
        stopped(
            Output::create(&input, &root.path().join("next"), false, &unfinished).err().unwrap(),
        );
        let gone = GenaiError::Output { path: target, what: "the folder is gone".into() };
        stopped(unfinished.cause(gone));
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 2);

        let unfinished = Unfinished::default();
        let target = root.path().join("complete");
        let output = Output::create(&input, &target, false, &unfinished).unwrap();
        fs::write(output.path().join("whole"), "").unwrap();
        output.persist().unwrap();
        unfinished.interrupt(|| ());
        assert!(target.join("whole").exists());
    }
}
