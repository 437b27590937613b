//! `mxeval compare`.

use crate::eval::compare::{Folder, Kind, compare};
use clap::Args;
use std::io::Write as _;
use std::path::{Path, PathBuf};

/// Lay the results of several runs side by side
///
/// Stages are matched by name, also those of different models. Differences are to the first folder; what
/// cannot be compared, because text, tokenizer or definition differ, is said and not subtracted.
#[derive(Debug, Args)]
#[command(after_help = "Exit codes: 0 done, 1 a folder cannot be read, 2 usage.")]
pub struct CompareArgs {
    /// Output folders of mxeval
    #[arg(value_name = "DIR", required = true, num_args = 2..)]
    folders: Vec<PathBuf>,
    /// Print everything as JSON
    #[arg(long)]
    json: bool,
    /// Write an HTML page, too
    #[arg(long, value_name = "FILE.html")]
    out: Option<PathBuf>,
}

impl CompareArgs {
    /// Compares; the text for stdout.
    pub fn run(&self) -> anyhow::Result<String> {
        let folders: Vec<_> =
            self.folders.iter().map(|folder| Folder::read(folder)).collect::<Result<_, _>>()?;
        let compared = compare(&folders)?;
        if let Some(path) = &self.out {
            write(path, &compared.html())
                .map_err(|error| anyhow::anyhow!("--out {}: {error}", path.display()))?;
        }
        if !self.json {
            return Ok(compared.text());
        }
        for remark in compared.remarks.iter().filter(|remark| remark.kind != Kind::Note) {
            eprintln!("warning: {}", remark.text);
        }
        Ok(serde_json::to_string_pretty(&compared)? + "\n")
    }
}

/// Writes a file as a whole or not at all.
fn write(path: &Path, text: &str) -> std::io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let mut file = tempfile::Builder::new()
        .permissions(permissions())
        .tempfile_in(folder.unwrap_or(Path::new(".")))?;
    file.write_all(text.as_bytes())?;
    file.persist(path).map_err(|error| error.error)?;
    Ok(())
}

/// Temporary files are private by default; pages are not.
fn permissions() -> std::fs::Permissions {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::Permissions::from_mode(0o644)
}
