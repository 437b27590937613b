//! Every replaced layer against the layer that it replaces, on the activations of real runs.
//!
//! A's copy shows X and Y of each layer. B's copy shows its own Y, and holds every layer once more, fed
//! by an input of its own, which gets A's X: the error of the layer by itself. Layers are looked at in
//! groups, so that the values shown fit in memory.

use std::collections::HashMap;

use ort::value::DynValue;
use serde::Serialize;

use super::{
    bodies::Bodies,
    cut::Cut,
    difference::Difference,
    error::{Result, VerifyError},
    inputs::{Cases, Side},
    numbers::Numbers,
    plan::{Plan, Planned},
    session::{Place, Session, output},
};
use crate::{
    eval::feeds::{element, name},
    onnx::{DataType, Model},
    rewrite::{self, Lowering, RewriteError, RewriteOptions, Site},
};

/// Bytes of the values that one group may show in one run.
const GROUP: usize = 1 << 29;

/// A replaced layer.
#[derive(Clone, Debug, Serialize)]
pub struct LayerReport {
    /// Name of its node.
    pub node: String,
    /// Its module path.
    pub module_path: Option<String>,
    /// The body that it stands in; `None` = the main graph.
    pub body: Option<String>,
    /// Element format of the weight.
    pub weight_format: String,
    /// Element format of the activation.
    pub activation_format: String,
    /// Its output in B's run against that in A's run: with the errors of all layers before it.
    pub accumulated: Option<Difference>,
    /// Its output when it is fed what A's layer was fed, against that of A's layer.
    pub local: Option<Difference>,
    /// Why a figure is missing.
    pub note: Option<String>,
}

impl LayerReport {
    /// What messages call it.
    pub fn shown(&self) -> &str {
        self.module_path.as_deref().unwrap_or(&self.node)
    }

    fn new(planned: &Planned) -> Self {
        Self {
            node: planned.node.clone(),
            module_path: planned.module_path.clone(),
            body: None,
            weight_format: planned.weight_format.clone(),
            activation_format: planned.activation_format.clone(),
            accumulated: None,
            local: None,
            note: None,
        }
    }
}

/// A layer whose values can be shown.
struct Probe<'a> {
    site: &'a Site,
    /// Its place in the report.
    index: usize,
    cut: Option<Cut>,
    /// Type of X in B.
    x_type: DataType,
}

impl Probe<'_> {
    fn value(&self, what: &str) -> String {
        format!("mx.verify.{}.{what}", self.index)
    }
}

/// Compares the layers; also what is to be said of those that cannot be found.
pub(super) fn compare(
    place: Place<'_>,
    a: &Side,
    b: &Side,
    cases: &Cases,
    plan: Option<&Plan>,
) -> Result<(Vec<LayerReport>, Vec<String>)> {
    let Some(plan) = plan else {
        let note = format!("no layer is compared: {} was not made by mxrewrite", b.path.display());
        return Ok((Vec::new(), vec![note]));
    };
    let (a_model, sites) = match linears(a) {
        Ok(found) => found,
        Err(error) => return Ok((Vec::new(), vec![format!("no layer is compared: {error}")])),
    };
    if plan.sites.is_empty() {
        return Ok((Vec::new(), vec!["no layer is compared: B's plan has none".to_owned()]));
    }
    let (found, lost) = pair(&plan.sites, &sites);
    let mut notes = Vec::new();
    if let Some(first) = lost.first() {
        let path = first.module_path.as_deref().unwrap_or(&first.node);
        let (more, all) = (lost.len(), plan.sites.len());
        notes.push(format!(
            "{more} of {all} layers of B are not found in A and not compared, such as {path}"
        ));
    }
    let mut reports: Vec<LayerReport> =
        found.iter().map(|(planned, _)| LayerReport::new(planned)).collect();
    let sites: Vec<&Site> = found.iter().map(|(_, site)| *site).collect();
    let base = plan.base_dtype().map(|base| base.data_type());
    let probes = probes(b, &sites, base, &mut reports)?;
    for group in groups(probes, cases.longest()) {
        run_group(place, (a, &a_model), b, cases, &group, &mut reports)?;
    }
    Ok((reports, notes))
}

/// Every Linear of A, whatever B's recipe is: they know the values between which each layer lies, and
/// what a checkpoint called them does not matter.
fn linears(a: &Side) -> std::result::Result<(Model, Vec<Site>), RewriteError> {
    let lowering = Lowering::Bf16;
    let options = RewriteOptions { lowering, allow_empty: true, ..Default::default() };
    let (model, plan) = rewrite::plan_file(&a.path, &options)?;
    Ok((model, plan.sites.into_iter().map(|planned| planned.site).collect()))
}

/// The planned layers with what they are in A, in A's order, and those that A does not have. Nodes of
/// one name (in several bodies) are told apart by their weights.
fn pair<'a>(
    planned: &'a [Planned],
    sites: &'a [Site],
) -> (Vec<(&'a Planned, &'a Site)>, Vec<&'a Planned>) {
    let mut left: Vec<Option<&Planned>> = planned.iter().map(Some).collect();
    let mut take = |wanted: &dyn Fn(&Planned) -> bool| {
        left.iter_mut().find(|one| one.is_some_and(wanted)).and_then(Option::take)
    };
    let mut uses: HashMap<&str, usize> = HashMap::new();
    for site in sites {
        *uses.entry(&site.node_name).or_default() += 1;
    }
    let found = sites.iter().filter_map(|site| {
        let (node, weight) = (&site.node_name, &site.weight.initializer);
        let only = uses[node.as_str()] == 1;
        let of = |one: &Planned| one.node == *node && (only || one.initializer == *weight);
        take(&of).map(|planned| (planned, site))
    });
    (found.collect(), left.into_iter().flatten().collect())
}

fn probes<'a>(
    b: &Side,
    sites: &[&'a Site],
    base: Option<DataType>,
    reports: &mut [LayerReport],
) -> Result<Vec<Probe<'a>>> {
    let bodies = Bodies::new(&b.model)
        .map_err(|source| VerifyError::Model { path: b.path.clone(), source })?;
    let types = types(&bodies);
    let mut probes = Vec::new();
    for (index, &site) in sites.iter().enumerate() {
        let report = &mut reports[index];
        let body = bodies.branches.get(site.graph).map(|branch| branch.title.clone());
        report.body = body.filter(|title| !title.is_empty());
        if site.graph >= bodies.branches.len() || bodies.maker(site.graph, &site.y).is_none() {
            report.note = Some(format!("B has no value `{}`, the layer's output in A", site.y));
            continue;
        }
        let cut = match Cut::new(&bodies, site.graph, &site.x, &site.y) {
            Ok(cut) => Some(cut),
            Err(reason) => {
                report.note = Some(format!("not by itself: {reason}"));
                None
            }
        };
        let known = types.get(&(site.graph, site.x.as_str())).copied();
        let x_type = known.or(base).unwrap_or(site.weight.operand_dtype);
        probes.push(Probe { site, index, cut, x_type });
    }
    Ok(probes)
}

/// Element types that a model says, by graph and value.
fn types(bodies: &Bodies) -> HashMap<(usize, &str), DataType> {
    let mut types = HashMap::new();
    for (at, branch) in bodies.branches.iter().enumerate() {
        let graph = &branch.graph;
        for value in graph.value_infos().chain(graph.inputs()).chain(graph.outputs()) {
            if element(value) != DataType::Undefined {
                types.insert((at, name(value)), element(value));
            }
        }
    }
    types
}

fn groups(probes: Vec<Probe<'_>>, rows: usize) -> Vec<Vec<Probe<'_>>> {
    let mut groups: Vec<Vec<Probe<'_>>> = Vec::new();
    let mut bytes = 0usize;
    for probe in probes {
        // X and Y of A, two Ys of B: in ONNX Runtime and as float64.
        let numbers = probe.site.k.saturating_mul(2).saturating_add(probe.site.n.saturating_mul(3));
        let own = numbers.saturating_mul(rows).saturating_mul(12);
        bytes = bytes.saturating_add(own);
        match groups.last_mut() {
            Some(group) if bytes <= GROUP => group.push(probe),
            _ => {
                bytes = own;
                groups.push(vec![probe]);
            }
        }
    }
    groups
}

/// Runs one group's copies of both models.
fn run_group(
    place: Place<'_>,
    (a, a_model): (&Side, &Model),
    b: &Side,
    cases: &Cases,
    group: &[Probe<'_>],
    reports: &mut [LayerReport],
) -> Result<()> {
    let mut a_session = Session::open(place, &a.path, &shown_a(a, a_model, group, reports)?, None)?;
    let whole = shown_b(b, group, true, reports)?;
    let (mut b_session, local) = match Session::open(place, &b.path, &whole, None) {
        Ok(session) => (session, true),
        // A layer by itself may be refused where it is not in its place (a type taken for another).
        Err(error) => {
            for probe in group {
                let note = &mut reports[probe.index].note;
                note.get_or_insert_with(|| format!("not by itself: {error}"));
            }
            (Session::open(place, &b.path, &shown_b(b, group, false, reports)?, None)?, false)
        }
    };
    cases.drive(&mut |_, a_inputs, mut b_inputs| {
        let a_outputs = a_session.run(&a_inputs)?;
        for probe in group.iter().filter(|probe| local && probe.cut.is_some()) {
            let x = output(&a_outputs, &probe.value("x"));
            b_inputs.push((probe.value("in"), fed(b, probe, x)?));
        }
        let b_outputs = b_session.run(&b_inputs)?;
        for probe in group {
            let report = &mut reports[probe.index];
            let Some(y) = output(&a_outputs, &probe.value("y")) else { continue };
            add(&mut report.accumulated, y, output(&b_outputs, &probe.value("y")));
            add(&mut report.local, y, output(&b_outputs, &probe.value("local")));
        }
        Ok(a_outputs)
    })?;
    for probe in group {
        let report = &mut reports[probe.index];
        let note = match (&report.accumulated, &report.local) {
            (Some(_), _) => continue,
            (None, None) => "did not run with these inputs",
            (None, Some(_)) => {
                "gets other rows in B than in A: what it is fed was routed otherwise"
            }
        };
        report.note.get_or_insert_with(|| note.to_owned());
    }
    Ok(())
}

/// Adds a run; a layer that did not run shows nothing.
fn add(difference: &mut Option<Difference>, a: &Numbers, b: Option<&Numbers>) {
    if let Some(b) = b.filter(|b| !a.values.is_empty() && a.values.len() == b.values.len()) {
        difference.get_or_insert_default().add(a, b);
    }
}

/// What A's layer was fed, for B's; of a layer that did not run, a matrix without rows.
fn fed(b: &Side, probe: &Probe<'_>, x: Option<&Numbers>) -> Result<DynValue> {
    let k = probe.site.k;
    let shape = if probe.site.transpose_x { vec![k, 0] } else { vec![0, k] };
    let none = Numbers { dtype: "float32", shape, values: Vec::new() };
    let x = x.filter(|x| !x.values.is_empty()).unwrap_or(&none);
    x.to_input(probe.x_type).map_err(|error| VerifyError::Layers {
        path: b.path.clone(),
        reason: format!("layer '{}' cannot be fed: {error}", probe.site.node_name),
    })
}

fn shown_a(
    a: &Side,
    model: &Model,
    group: &[Probe<'_>],
    reports: &mut [LayerReport],
) -> Result<Model> {
    let broken = |source| VerifyError::Model { path: a.path.clone(), source };
    let mut bodies = Bodies::new(model).map_err(broken)?;
    for probe in group {
        let site = probe.site;
        let element = site.weight.operand_dtype;
        for (value, what) in [(&site.x, "x"), (&site.y, "y")] {
            if let Err(reason) = bodies.expose(site.graph, value, element, &probe.value(what)) {
                reports[probe.index].note = Some(format!("not compared: {reason}"));
            }
        }
    }
    bodies.finish().map_err(broken)
}

fn shown_b(
    b: &Side,
    group: &[Probe<'_>],
    local: bool,
    reports: &mut [LayerReport],
) -> Result<Model> {
    let broken = |source| VerifyError::Model { path: b.path.clone(), source };
    let mut bodies = Bodies::new(&b.model).map_err(broken)?;
    for probe in group {
        let site = probe.site;
        // Where it cannot be shown, A's copy has said so.
        let _ = bodies.expose(site.graph, &site.y, probe.x_type, &probe.value("y"));
        let Some(cut) = probe.cut.as_ref().filter(|_| local) else { continue };
        let (input, made) = (probe.value("in"), probe.value("local"));
        let x = (site.x.as_str(), input.as_str(), probe.x_type);
        if let Err(reason) = cut.paste(&mut bodies, x, (&site.y, &made)) {
            reports[probe.index].note = Some(format!("not by itself: {reason}"));
        }
    }
    bodies.finish().map_err(broken)
}
