//! Checkpoints: which parameter a weight of the graph is, by its values, and codes that need no
//! quantising because the checkpoint holds them.
//!
//! ```text
//! files (headers) -> tensors (matrices) -> index (lines by key) -> search (lines compared) -> naming
//! ```
//! Every value of a match has been compared; a few values only decide what is compared with what.
//! See docs/checkpoints.md.

mod error;
mod files;
mod import;
mod index;
mod matrix;
mod naming;
mod search;
mod tensors;
#[cfg(test)]
mod tests;

use std::{
    collections::{HashMap, HashSet},
    path::{Path, PathBuf},
    sync::Arc,
};

use rayon::prelude::*;
use serde::Serialize;

pub use error::CheckpointError;
pub use import::PackedWeight;
pub(crate) use naming::{Found, Settled};

use self::{
    index::{Index, row_keys},
    matrix::{FloatKind, Matrix},
    search::{Assembly, Run, Search},
    tensors::Stack,
};
use super::{
    execute::ExecuteError,
    patch::Patch,
    sites::{Layout, Region, Site},
    weights::{Rows, Threads},
};
use crate::onnx::{self, Model};

/// The weights of a model, as they were before its export.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    stacks: Vec<Stack>,
}

/// How much of a graph is in a checkpoint.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CheckpointUse {
    /// The checkpoint.
    pub path: PathBuf,
    /// Linear layers of the graph.
    pub layers: usize,
    /// Those whose weight is in the checkpoint.
    pub matched: usize,
    /// Of these, those whose weight it holds under several names.
    pub ambiguous: usize,
    /// Of these, those whose weight it holds as MX codes and scales.
    pub packed: usize,
}

/// What was found, by graph and node.
#[derive(Clone, Debug, Default)]
pub(crate) struct Names {
    found: HashMap<(usize, usize), Arc<Found>>,
    /// How much that is; `None` without a checkpoint.
    pub summary: Option<CheckpointUse>,
}

impl Names {
    /// What the checkpoint says of a node.
    pub fn get(&self, graph: usize, node: usize) -> Option<&Found> {
        self.found.get(&(graph, node)).map(Arc::as_ref)
    }
}

/// A weight of the graph: the graph that holds it, its name, and how its rows lie.
type Key = (usize, String, Layout, Region, usize, usize);

impl Checkpoint {
    /// Reads the headers of a folder of `*.safetensors`, with or without an index, or of one such file.
    ///
    /// # Errors
    /// [`CheckpointError`]: nothing there, a file that is damaged, an index that names what is missing,
    /// scales that do not fit their codes.
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        let stacks = tensors::stacks(&files::open(path)?)?;
        Ok(Self { path: path.to_owned(), stacks })
    }

    /// Looks for the weights of `sites`, layers of `model`, with `threads` threads.
    pub(crate) fn find(
        &self,
        model: &Model,
        sites: &[Site],
        threads: Option<usize>,
    ) -> Result<Names, CheckpointError> {
        let patch = Patch::new(model, Threads::new(threads)?)?;
        let (mut numbers, mut weights) = (HashMap::<Key, usize>::new(), Vec::new());
        // A stack of experts is no matrix of a checkpoint.
        let sites: Vec<&Site> = sites.iter().filter(|site| site.experts.is_none()).collect();
        let mut of_site = Vec::with_capacity(sites.len());
        for &site in &sites {
            let (home, rows) = patch.rows(site)?;
            let weight = &site.weight;
            let name = weight.initializer.clone();
            let key = (home, name, weight.layout, weight.region, site.n, site.k);
            let number = *numbers.entry(key).or_insert_with(|| {
                weights.push(rows);
                weights.len() - 1
            });
            of_site.push(number);
        }
        // A stack that no layer's rows are in may be of millions.
        let lengths = weights.iter().map(|rows| rows.k).collect();
        let stacks = self.stacks.iter().filter(|stack| stack.has_lines_of(&lengths));
        let matrices: Vec<Matrix> = stacks.flat_map(Stack::matrices).collect();
        let found = patch.threads.run(|| search(&matrices, &weights))?;
        let found: Vec<Option<Arc<Found>>> = found.into_iter().map(|f| f.map(Arc::new)).collect();
        let by_site = sites.iter().copied().zip(of_site);
        let found: HashMap<_, _> = by_site
            .filter_map(|(site, number)| Some(((site.graph, site.node), found[number].clone()?)))
            .collect();
        let count = |is: fn(&Found) -> bool| found.values().filter(|found| is(found)).count();
        let summary = CheckpointUse {
            path: self.path.clone(),
            layers: sites.len(),
            matched: found.len(),
            ambiguous: count(Found::is_ambiguous),
            packed: count(|found| found.packed.is_some()),
        };
        Ok(Names { found, summary: Some(summary) })
    }
}

/// What each of `weights` is.
fn search(matrices: &[Matrix], weights: &[Rows]) -> Result<Vec<Option<Found>>, CheckpointError> {
    let mut found = vec![None; weights.len()];
    for target in [FloatKind::F32, FloatKind::F16, FloatKind::Bf16] {
        let of_type = |&number: &usize| FloatKind::of(weights[number].data_type()) == Some(target);
        let numbers: Vec<usize> = (0..weights.len()).filter(of_type).collect();
        let lengths = |numbers: &[usize]| numbers.iter().map(|&n| weights[n].k).collect();
        let index = Index::of_anchors(matrices, &lengths(&numbers), target);
        assemble(matrices, weights, &numbers, target, &index, &mut found)?;
        let rest: Vec<usize> = numbers.into_iter().filter(|&n| found[n].is_none()).collect();
        if rest.is_empty() {
            continue;
        }
        // They begin elsewhere: inside a parameter, or with its rows in another order.
        let keys = rest.par_iter().map(|&n| row_keys(&weights[n], 0, weights[n].n));
        let keys: Vec<Vec<u64>> = keys.collect::<Result<_, _>>()?;
        let wanted: HashSet<u64> = keys.into_iter().flatten().collect();
        let index = Index::of_lines(matrices, &lengths(&rest), target, &wanted);
        assemble(matrices, weights, &rest, target, &index, &mut found)?;
    }
    Ok(found)
}

fn assemble(
    matrices: &[Matrix],
    weights: &[Rows],
    numbers: &[usize],
    target: FloatKind,
    index: &Index,
    found: &mut [Option<Found>],
) -> Result<(), CheckpointError> {
    let one = |&number: &usize| -> Result<_, CheckpointError> {
        let assembly = Search { matrices, rows: &weights[number], target }.assemble(index)?;
        weights[number].release();
        for run in assembly.iter().flatten().flatten() {
            refuse_nan(&matrices[run.first.matrix], run)?;
            onnx::release(matrices[run.first.matrix].bytes());
        }
        Ok((number, assembly))
    };
    let all: Vec<(usize, Option<Assembly>)> =
        numbers.par_iter().map(one).collect::<Result<_, _>>()?;
    for (number, assembly) in all {
        found[number] = assembly.map(|assembly| Found::new(matrices, &assembly));
    }
    Ok(())
}

/// A block whose scale is NaN stands for no weight: what has one is nothing to import.
fn refuse_nan(matrix: &Matrix, run: &Run) -> Result<(), CheckpointError> {
    let rows = (0..run.count).map(|row| run.first.line + row * run.step);
    let wrong =
        rows.filter(|_| !run.first.columns).find_map(|row| Some((row, matrix.nan_block(row)?)));
    let Some((row, block)) = wrong else { return Ok(()) };
    let expert = matrix.expert.map_or(String::new(), |expert| format!("of expert {expert} "));
    Err(CheckpointError::Tensor {
        tensor: matrix.tensor.to_string(),
        path: matrix.path.as_ref().clone(),
        what: format!(
            "the scale of block {block} of row {row} {expert}is 0xff, NaN: the weight is damaged; \
             download it again, or leave --checkpoint out"
        ),
    })
}

impl From<ExecuteError> for CheckpointError {
    fn from(error: ExecuteError) -> Self {
        Self::Model(Box::new(error))
    }
}

impl From<onnx::Error> for CheckpointError {
    fn from(error: onnx::Error) -> Self {
        Self::Model(Box::new(error.into()))
    }
}
