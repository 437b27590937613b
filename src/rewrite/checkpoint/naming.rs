//! From lines of the checkpoint to a module path, and what that means for the one that the graph says.

use super::{
    import::PackedWeight,
    matrix::Matrix,
    search::{Assembly, Run},
};
use crate::rewrite::{
    roles::{self, components},
    sites::{PathSource, Role},
};

/// Names that exporters and checkpoints give to layers that are stored as one.
const JOINED: &[(&[&str], &str)] = &[
    (&["q_proj", "k_proj", "v_proj"], "qkv_proj"),
    (&["query", "key", "value"], "query_key_value"),
    (&["gate_proj", "up_proj"], "gate_up_proj"),
    (&["w1", "w3"], "gate_up_proj"),
    (&["wq", "wk", "wv"], "wqkv"),
];

/// Names that a note lists before it says how many more there are.
const LISTED: usize = 6;

/// What the checkpoint says about one weight of the graph.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Found {
    /// Module paths of this content: one, or several where the checkpoint holds it several times.
    paths: Vec<String>,
    /// What the rows are, when they are not all of one parameter.
    parts: Option<String>,
    /// What the layers in it are for, when they are several.
    role: Option<Role>,
    /// Paths of the layers in it, when they are several of different roles.
    mixture: Vec<String>,
    /// Its codes and scales, when the checkpoint holds such.
    pub packed: Option<PackedWeight>,
}

/// The path that a layer goes by, everything considered.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Settled {
    pub path: Option<String>,
    pub source: PathSource,
    /// In place of what the path says.
    pub role: Option<Role>,
    /// Paths of the layers in it, when they are several of different roles.
    pub mixture: Vec<String>,
    pub note: Option<String>,
}

impl Found {
    /// Names what was found.
    pub(super) fn new(matrices: &[Matrix], assembly: &Assembly) -> Self {
        let packed = |choice: usize| {
            let runs: Option<Vec<&Run>> =
                assembly.iter().map(|runs| runs.get(choice).or(runs.first())).collect();
            PackedWeight::new(matrices, &runs?)
        };
        // Of equal contents any may be imported; the first that is packed is.
        let most = assembly.iter().map(Vec::len).max().unwrap_or(0);
        let packed = (0..most).find_map(packed);
        if let [runs] = &assembly[..] {
            let mut pieces: Vec<Piece> =
                runs.iter().map(|run| Piece::new(matrices, vec![run])).collect();
            let parts = pieces.first().and_then(|piece| piece.range.clone());
            pieces.dedup_by(|a, b| a.path == b.path);
            let paths = pieces.into_iter().map(|piece| piece.path).collect();
            return Self { paths, parts, role: None, mixture: Vec::new(), packed };
        }
        let pieces = pieces(matrices, assembly);
        let sure = assembly.iter().all(|runs| runs.len() == 1);
        let (path, role) = join(&pieces);
        let mut paths = vec![path];
        if !sure {
            let others = assembly.iter().filter(|runs| runs.len() > 1).flatten();
            paths.extend(others.map(|run| Piece::new(matrices, vec![run]).path));
        }
        let parts = match &pieces[..] {
            [one] => one.range.clone(),
            several => {
                Some(format!("rows of {}, in this order", list(several.iter().map(|p| &p.path))))
            }
        };
        let mixture = match role {
            Some(Role::Packed) => pieces.into_iter().map(|piece| piece.path).collect(),
            _ => Vec::new(),
        };
        Self { paths, parts, role, mixture, packed }
    }

    /// True when the checkpoint holds the content under several names.
    pub fn is_ambiguous(&self) -> bool {
        self.paths.len() > 1
    }

    /// The path of a layer that the graph calls `path` by `source`; `head` when it produces the
    /// logits, `tied` when its weight is the embedding's.
    pub fn settle(
        &self,
        path: Option<String>,
        source: PathSource,
        head: bool,
        tied: bool,
    ) -> Settled {
        let keep = |path, note| Settled { path, source, role: None, mixture: Vec::new(), note };
        let known =
            self.paths.iter().find(|found| path.as_deref().is_some_and(|path| agree(path, found)));
        if head || tied {
            // The content is the embedding's as well, and only its name may be in the checkpoint.
            let named = self.paths.iter().find(|p| roles::role(Some(p), false) == Role::Head);
            return match (known, named) {
                (None, Some(named)) if head => self.by_content(named, None),
                (None, _) if path.is_none() => self.by_content(&self.paths[0], None),
                _ => keep(path, None),
            };
        }
        if self.is_ambiguous() {
            if known.is_some() {
                return keep(path, None);
            }
            let note = format!("its values are those of {}", list(self.paths.iter()));
            let role = |path: &String| roles::role(Some(path), false);
            let same_role = self.paths.iter().all(|path| role(path) == role(&self.paths[0]));
            if path.is_some() || !same_role {
                return keep(path, Some(note));
            }
            let source = PathSource::CheckpointAmbiguous;
            let first = self.paths.first().cloned();
            let (role, mixture) = (self.role, self.mixture.clone());
            return Settled { path: first, source, role, mixture, note: Some(note) };
        }
        let found = &self.paths[0];
        match path {
            None => self.by_content(found, None),
            Some(path) if agree(&path, found) => {
                let says_all = components(&path).len() >= components(found).len();
                let high = matches!(source, PathSource::Metadata | PathSource::Initializer);
                match high && says_all && self.role.is_none() {
                    true => keep(Some(path), self.parts.clone()),
                    false => self.by_content(found, None),
                }
            }
            // A scheme of names that nothing is known of is no reason to forget what a layer is.
            Some(path)
                if self.role.unwrap_or_else(|| roles::role(Some(found), false)) == Role::Other
                    && roles::role(Some(&path), false) != Role::Other =>
            {
                let note = format!("the checkpoint calls it {found}");
                let notes: Vec<String> = [note].into_iter().chain(self.parts.clone()).collect();
                keep(Some(path), Some(notes.join("; ")))
            }
            Some(path) => {
                let note = format!("the graph ({source}) calls it {path}");
                self.by_content(found, Some(note))
            }
        }
    }

    fn by_content(&self, path: &str, note: Option<String>) -> Settled {
        let notes: Vec<String> = note.into_iter().chain(self.parts.clone()).collect();
        Settled {
            path: Some(path.to_owned()),
            source: PathSource::Checkpoint,
            role: self.role,
            mixture: self.mixture.clone(),
            note: (!notes.is_empty()).then(|| notes.join("; ")),
        }
    }
}

/// Lines of one matrix.
struct Piece {
    path: String,
    /// Which rows of it, when not all.
    range: Option<String>,
}

impl Piece {
    fn new(matrices: &[Matrix], runs: Vec<&Run>) -> Self {
        let matrix = &matrices[runs[0].first.matrix];
        let whole = with_expert(&matrix.module, matrix.expert);
        let (lines, _) = matrix.lines(runs[0].first.columns);
        if runs.iter().map(|run| run.count).sum::<usize>() >= lines {
            return Self { path: whole, range: None };
        }
        let (first, last) = (runs[0], runs[runs.len() - 1]);
        let end = last.first.line + (last.count - 1) * last.step + 1;
        let every = if first.step == 1 { "" } else { ", every second one" };
        let range = Some(format!("rows {}..{end} of {whole}{every}", first.first.line));
        let path = half(&whole, &runs, lines).unwrap_or(whole);
        Self { path, range }
    }
}

/// The layer that a half of `gate_up_proj` is: gate and up follow each other, or alternate.
fn half(whole: &str, runs: &[&Run], lines: usize) -> Option<String> {
    let stem = whole.strip_suffix("gate_up_proj")?;
    let [run] = runs else { return None };
    if run.count * 2 != lines {
        return None;
    }
    match (run.first.line, run.step) {
        (0, _) => Some(format!("{stem}gate_proj")),
        (1, 2) => Some(format!("{stem}up_proj")),
        (line, 1) if line * 2 == lines => Some(format!("{stem}up_proj")),
        _ => None,
    }
}

/// `mlp.experts.gate_up_proj` of expert 3 is `mlp.experts.3.gate_up_proj`, as it is called where
/// experts have modules of their own.
fn with_expert(module: &str, expert: Option<usize>) -> String {
    match (expert, module.rsplit_once('.')) {
        (None, _) => module.to_owned(),
        (Some(expert), Some((stack, own))) if stack.ends_with("experts") => {
            format!("{stack}.{expert}.{own}")
        }
        // OpenAI's gpt-oss has the stacks right in `mlp`.
        (Some(expert), Some((mlp, own @ ("mlp1" | "mlp2")))) => {
            format!("{mlp}.experts.{expert}.{own}")
        }
        (Some(expert), _) => format!("{module}.{expert}"),
    }
}

/// The assembly by matrix, in the order of their first rows.
fn pieces(matrices: &[Matrix], assembly: &Assembly) -> Vec<Piece> {
    let mut grouped: Vec<Vec<&Run>> = Vec::new();
    for run in assembly.iter().filter_map(|runs| runs.first()) {
        match grouped.iter_mut().find(|runs| runs[0].first.matrix == run.first.matrix) {
            Some(runs) => runs.push(run),
            None => grouped.push(vec![run]),
        }
    }
    grouped.into_iter().map(|runs| Piece::new(matrices, runs)).collect()
}

/// The path of several layers in one, and their role.
fn join(pieces: &[Piece]) -> (String, Option<Role>) {
    let [first, rest @ ..] = pieces else { return (String::new(), None) };
    if rest.is_empty() {
        return (first.path.clone(), None);
    }
    let split: Vec<Vec<&str>> = pieces.iter().map(|p| p.path.split('.').collect()).collect();
    let shared = (0..).take_while(|&i| {
        let same = |parts: &Vec<&str>| i + 1 < parts.len() && parts[i] == split[0][i];
        split.iter().all(same)
    });
    let shared = shared.count();
    let own: Vec<String> = split.iter().map(|parts| parts[shared..].join(".")).collect();
    let name = JOINED.iter().find(|(parts, _)| parts.iter().eq(own.iter()));
    let name =
        name.map_or_else(|| format!("{{{}}}", own.join(",")), |(_, name)| (*name).to_owned());
    let prefix = split[0][..shared].join(".");
    let path = if prefix.is_empty() { name } else { format!("{prefix}.{name}") };
    let role = |piece: &Piece| roles::role(Some(&piece.path), false);
    let role = match rest.iter().all(|piece| role(piece) == role(first)) {
        true => role(first),
        false => Role::Packed,
    };
    (path, Some(role))
}

/// Whether two paths are of the same module: equal, or equal but for a wrapper's prefix or for what
/// lies below.
fn agree(a: &str, b: &str) -> bool {
    let (a, b) = (components(a), components(b));
    let (long, short) = if a.len() >= b.len() { (&a, &b) } else { (&b, &a) };
    long.ends_with(short) || short.len() > 1 && long.starts_with(short)
}

/// `a, b and 3 more`.
fn list<'a>(names: impl ExactSizeIterator<Item = &'a String>) -> String {
    let more = names.len().saturating_sub(LISTED);
    let listed: Vec<&str> = names.take(LISTED).map(String::as_str).collect();
    match more {
        0 => listed.join(", "),
        more => format!("{} and {more} more", listed.join(", ")),
    }
}
