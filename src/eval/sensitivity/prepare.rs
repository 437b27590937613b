//! From a model to the graph with choices, on disk.

use super::Options;
use super::alternatives;
use super::choices::{self, Parts, SiteForms};
use super::chooser::{Chooser, Shape};
use super::head::{self, Head, find_head};
use super::plans::Plans;
use super::segments::{self, Segments, SiteNodes};
use super::setup::{Bench, Setup};
use crate::eval::error::{Error, Result};
use crate::eval::feeds::{element, name};
use crate::graph::{GraphView, Scope};
use crate::onnx::proto::DataType;
use crate::onnx::{NodeId, SaveOptions};
use crate::rewrite::{Site, execute};
use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

/// The graph with choices and what it costs to run.
pub(super) struct Prepared {
    pub path: PathBuf,
    pub shape: Shape,
    pub cuts: Vec<String>,
    pub logits: String,
    /// Of each segment, the sites in it by their number in the graph, with their number in the plan.
    pub sites: Vec<Vec<(usize, usize)>>,
    /// Sites that no segment holds: bodies of other operators.
    pub left: Vec<usize>,
    pub cost: Weights,
    /// What there is to say of how it is measured.
    pub notes: Vec<String>,
}

/// Numbers in constant matrices, which cost one multiplication a token each.
#[derive(Clone, Debug, Default)]
pub(super) struct Weights {
    /// Computed in every run.
    pub common: u64,
    /// Of each segment, without the head.
    pub segments: Vec<u64>,
    pub head: u64,
}

impl Weights {
    /// Multiplications a token of a run that begins with segment `start` and computes the head at
    /// `share` of the positions.
    pub(super) fn from(&self, start: usize, share: f64) -> f64 {
        let segments: u64 = self.segments.iter().skip(start).sum();
        (self.common + segments) as f64 + self.head as f64 * share
    }
}

/// Makes the graph with choices below `work`.
///
/// # Errors
/// The model cannot be read or rewritten, or the result cannot be written.
pub(super) fn prepare(
    plans: &Plans,
    setup: &Setup,
    options: &Options,
    work: &Path,
) -> Result<Prepared> {
    let bench = &options.bench;
    let shown = bench.model.display().to_string();
    let fail = |reason: String| Error::Model { model: shown.clone(), reason };
    let model = &plans.model;
    let scope = Scope::of_graph(model, model.graph()).map_err(|e| fail(e.to_string()))?;
    let view = GraphView::new(scope, None).map_err(|e| fail(e.to_string()))?;
    let logits = &setup.inspection.logits;
    let inside = inside(plans, &view);
    let types = plans.sites().first().map_or(DataType::Float, |p| p.site.weight.operand_dtype);
    let nodes: Vec<SiteNodes<'_>> = inside.iter().map(|(_, nodes)| SiteNodes { nodes }).collect();
    let divided = segments::divide(&view, &nodes, logits, types);
    let mut notes = Vec::new();
    let head = head(&view, logits, &divided, options.every, &mut notes);
    if divided.segments.len() == 1 {
        notes.push("no value between the layers can be begun at: every pass is a full one".into());
    }
    let logits_type = model.graph().outputs().find(|output| name(output) == logits);
    let logits_type = logits_type.map_or(DataType::Float, element);
    let parts = Grafting {
        plans,
        view: &view,
        divided: &divided,
        inside: &inside,
        logits: (logits, logits_type),
        head: head.as_ref(),
    };
    let path = work.join("choices.onnx");
    parts.write(bench.threads, &path).map_err(fail)?;
    let shape = Shape {
        segments: divided.segments.len(),
        sites: inside.len(),
        formats: plans.plans.len(),
        positions: head.is_some(),
        hidden: divided.element.unwrap_or(DataType::Float),
        logits: logits_type,
    };
    let cuts = divided.segments.iter().filter_map(|segment| segment.output.clone()).collect();
    let cost = weights(&view, &divided, logits);
    let (sites, left) = shares(plans, &divided, &inside, options.full, &mut notes);
    Ok(Prepared { path, shape, cuts, logits: logits.clone(), sites, left, cost, notes })
}

/// Number in the plan, and nodes, of the sites in the main graph.
fn inside(plans: &Plans, view: &GraphView) -> Vec<(usize, Vec<usize>)> {
    let order = plans.model.graph().node_order();
    let order: HashMap<NodeId, usize> =
        order.into_iter().enumerate().map(|(at, id)| (id, at)).collect();
    let made: HashSet<&String> = view.nodes().iter().flat_map(|node| &node.output).collect();
    let nodes = |site: &Site| -> Option<Vec<usize>> {
        let of = |&node: &usize| order.get(&NodeId(node)).copied();
        let inside = site.graph == 0 && made.contains(&site.y);
        inside.then(|| site.replaces.iter().map(of).collect::<Option<_>>()).flatten()
    };
    let sites = plans.sites().iter().enumerate();
    sites.filter_map(|(number, planned)| Some((number, nodes(&planned.site)?))).collect()
}

/// The sites of each segment, and those that take full passes.
fn shares(
    plans: &Plans,
    divided: &Segments,
    inside: &[(usize, Vec<usize>)],
    full: bool,
    notes: &mut Vec<String>,
) -> (Vec<Vec<(usize, usize)>>, Vec<usize>) {
    let of = |segment: &segments::Segment| -> Vec<(usize, usize)> {
        match full {
            true => Vec::new(),
            false => segment.sites.iter().map(|&site| (site, inside[site].0)).collect(),
        }
    };
    let sites: Vec<Vec<(usize, usize)>> = divided.segments.iter().map(of).collect();
    let held = |number: &usize| sites.iter().flatten().any(|(_, held)| held == number);
    let left: Vec<usize> = (0..plans.sites().len()).filter(|number| !held(number)).collect();
    if !left.is_empty() && !full {
        notes.push(format!(
            "{} layers are inside other operators' bodies and take a full pass each",
            left.len()
        ));
    }
    (sites, left)
}

/// The head, where it is wanted apart and lies where positions can be chosen for it alone.
fn head(
    view: &GraphView,
    logits: &str,
    divided: &Segments,
    every: usize,
    notes: &mut Vec<String>,
) -> Option<Head> {
    if every <= 1 {
        return None;
    }
    let last = divided.segments.last();
    let found = find_head(view, logits)
        .filter(|head| last.is_some_and(|segment| segment.nodes.contains(&head.node)));
    if found.is_none() {
        notes.push("the head is not recognised: every position is scored".into());
    }
    found
}

fn weights(view: &GraphView, divided: &Segments, logits: &str) -> Weights {
    let head = find_head(view, logits);
    let of_head = head.map_or(0, |head| head::weight(view, &view.nodes()[head.node]));
    let mut segments: Vec<u64> =
        divided.segments.iter().map(|segment| head::weights(view, &segment.nodes)).collect();
    if let Some(last) = segments.last_mut() {
        *last = last.saturating_sub(of_head);
    }
    Weights { common: head::weights(view, &divided.common), segments, head: of_head }
}

struct Grafting<'a> {
    plans: &'a Plans,
    view: &'a GraphView,
    divided: &'a Segments,
    inside: &'a [(usize, Vec<usize>)],
    logits: (&'a str, DataType),
    head: Option<&'a Head>,
}

impl Grafting<'_> {
    /// Rewrites the model to every format, takes the layers out of that and writes the graph.
    fn write(&self, threads: Option<usize>, path: &Path) -> std::result::Result<(), String> {
        let model = &self.plans.model;
        let sites = self.plans.sites();
        let ys: Vec<&str> =
            self.inside.iter().map(|(number, _)| sites[*number].site.y.as_str()).collect();
        let mut formats = Vec::with_capacity(self.plans.plans.len());
        for plan in &self.plans.plans {
            let rewritten = execute(model, plan, threads).map_err(|e| e.to_string())?;
            let format = plan.sites.first().map_or("mx", |planned| planned.format.weight_name());
            let taken = alternatives::take(model, &rewritten, &ys, format)?;
            formats.push((format.to_owned(), taken));
        }
        let forms: Vec<SiteForms<'_>> =
            self.inside.iter().zip(&ys).map(|((_, nodes), &y)| SiteForms { nodes, y }).collect();
        let parts = Parts {
            model,
            view: self.view,
            segments: self.divided,
            sites: &forms,
            formats: &formats,
            logits: self.logits,
            head: self.head,
        };
        let grafted = choices::graft(&parts)?;
        // Weights beside the graph are mapped, not copied.
        let save = SaveOptions { overwrite: true, inline_limit: 0, ..SaveOptions::default() };
        grafted.save(path, &save).map(drop).map_err(|e| e.to_string())
    }
}

impl Prepared {
    /// Loads it.
    ///
    /// # Errors
    /// ONNX Runtime refuses it.
    pub(super) fn open(&self, setup: &Setup, bench: &Bench) -> Result<Chooser> {
        let feeds = setup.inspection.feeds.clone();
        let values = (self.cuts.clone(), self.logits.clone());
        let options = setup.session(bench);
        Chooser::open(&setup.runtime, &self.path, &options, feeds, self.shape, values)
    }
}
