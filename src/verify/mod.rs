//! Two models side by side: a model and what was made of it, fed the same, in ONNX Runtime.
//!
//! [`verify`] opens both, makes inputs (`inputs`), compares outputs (`outputs`, [`Difference`]) and,
//! where it is asked to, what every replaced layer computes (`layers`). Which node ran where comes from
//! ONNX Runtime's profile (`profile`) and from the MX kernels themselves, so that an MX node that did
//! not run as one is a failure (`placement`). `report` prints.

mod bodies;
mod cut;
mod difference;
mod error;
mod inputs;
mod layers;
mod numbers;
mod outputs;
mod placement;
mod plan;
mod profile;
mod random;
mod report;
mod session;
mod tensors;

use std::path::{Path, PathBuf};

use mx_custom_ops::ran;
use serde::Serialize;

pub use difference::Difference;
pub use error::{Result, VerifyError};
pub use inputs::{Size, Source};
pub use layers::LayerReport;
pub use numbers::Numbers;
pub use outputs::{OutputReport, OutputsReport};
pub use placement::{MxNode, OpCount, Placement, mx_node_names};
pub use profile::Executed;

use crate::eval::{
    devices::{self, Device, Request},
    runtime::{self, Runtime},
};
use inputs::{Cases, Side};
use plan::Plan;
use session::{Place, Session};

/// What to compare, and how.
#[derive(Clone, Debug)]
pub struct VerifyOptions {
    /// Inputs.
    pub source: Source,
    /// How many, how long.
    pub size: Size,
    /// Where both models run.
    pub device: Request,
    /// Compare every replaced layer, too.
    pub layers: bool,
    /// Largest absolute error that an output may have.
    pub max_error: Option<f64>,
    /// Least SQNR in decibels that a float output and, with [`Self::layers`], a layer by itself may have.
    pub min_sqnr: Option<f64>,
    /// libonnxruntime; `None` = wherever it is found.
    pub ort_lib: Option<PathBuf>,
}

impl Default for VerifyOptions {
    /// What `mxrewrite --check` does: two samples of 32 random tokens on the CPU.
    fn default() -> Self {
        Self {
            source: Source::Random { seed: 0 },
            size: Size { samples: 2, seq_len: 32 },
            device: Request::Cpu,
            layers: false,
            max_error: None,
            min_sqnr: None,
            ort_lib: None,
        }
    }
}

/// What the comparison found.
#[derive(Clone, Debug, Serialize)]
pub struct VerifyReport {
    /// The model that counts as right.
    pub a: PathBuf,
    /// The model that is held against it.
    pub b: PathBuf,
    /// Where both ran.
    pub device: String,
    /// Version of ONNX Runtime.
    pub onnxruntime: String,
    /// What they were fed, in words.
    pub inputs: String,
    /// Runs of each model.
    pub runs: usize,
    /// Their outputs.
    pub outputs: OutputsReport,
    /// Layers of B that were replaced; empty unless asked for.
    pub layers: Vec<LayerReport>,
    /// Which node of B ran where.
    pub placement: Placement,
    /// What is wrong; empty = B passes.
    pub failures: Vec<String>,
    /// What could not be looked at.
    pub notes: Vec<String>,
}

impl VerifyReport {
    /// The report as text.
    pub fn text(&self) -> String {
        report::text(self, false)
    }

    /// The report without the lists of nodes.
    pub fn summary(&self) -> String {
        report::text(self, true)
    }
}

/// Compares the model `b` with the model `a`.
///
/// # Errors
/// [`VerifyError`]: a file that is no model, that ONNX Runtime does not load, inputs that cannot be
/// made. What the comparison finds wrong is no error but in [`VerifyReport::failures`].
pub fn verify(a: &Path, b: &Path, options: &VerifyOptions) -> Result<VerifyReport> {
    let (a, b) = (Side::open(a)?, Side::open(b)?);
    let mut cases = Cases::new(&a, &b, &options.source, options.size)?;
    let runtime = runtime::load(options.ort_lib.as_deref())?;
    let device = device(&options.device, &runtime)?;
    let place = Place { runtime: &runtime, device };
    let mut report = VerifyReport {
        a: a.path.clone(),
        b: b.path.clone(),
        device: device.to_string(),
        onnxruntime: runtime.version.clone(),
        inputs: describe(&options.source, options.size, &cases),
        runs: 0,
        outputs: OutputsReport::default(),
        layers: Vec::new(),
        placement: Placement::default(),
        failures: Vec::new(),
        notes: Vec::new(),
    };
    let plan = match Plan::of(&b.model) {
        Ok(plan) => plan,
        Err(reason) => {
            report.failures.push(format!("{}: {reason}", b.path.display()));
            None
        }
    };
    compare_outputs(place, &a, &b, &mut cases, plan.as_ref(), &mut report)?;
    if options.layers {
        let (layers, missing) = layers::compare(place, &a, &b, &cases, plan.as_ref())?;
        report.layers = layers;
        // What cannot be looked at is within no bound.
        match options.min_sqnr {
            Some(_) => report.failures.extend(missing),
            None => report.notes.extend(missing),
        }
    }
    judge(&mut report, options);
    Ok(report)
}

/// The one device of a request.
fn device(request: &Request, runtime: &Runtime) -> Result<Device> {
    if *request == Request::Cpu {
        return Ok(Device::Cpu);
    }
    let chosen = devices::choose(request, 0.0, &crate::eval::gpus::Local(runtime))?;
    Ok(chosen.devices.first().copied().unwrap_or(Device::Cpu))
}

fn describe(source: &Source, size: Size, cases: &Cases) -> String {
    match (source, cases) {
        (Source::Random { seed }, Cases::Tokens { windows, .. }) => {
            let length = windows.first().map_or(0, |window| window.ids.len());
            format!("{} samples of {length} random tokens, seed {seed}", windows.len())
        }
        (Source::Random { seed }, Cases::Tensors { .. }) => {
            format!("{} samples of normally distributed numbers, seed {seed}", size.samples)
        }
        (Source::Text { data, .. }, Cases::Tokens { windows, .. }) => {
            let tokens: usize = windows.iter().map(|window| window.ids.len()).sum();
            format!("{} documents of {}, {tokens} tokens", windows.len(), data.display())
        }
        (Source::Tensors(path) | Source::Text { data: path, .. }, _) => {
            format!("the tensors of {}", path.display())
        }
    }
}

/// Runs both models; B with a profile.
fn compare_outputs(
    place: Place<'_>,
    a: &Side,
    b: &Side,
    cases: &mut Cases,
    plan: Option<&Plan>,
    report: &mut VerifyReport,
) -> Result<()> {
    let model = |source| VerifyError::Model { path: b.path.clone(), source };
    let profile = |reason: String| VerifyError::Profile { path: b.path.clone(), reason };
    let (named, mx_nodes) = placement::name_mx_nodes(&b.model).map_err(model)?;
    let folder = tempfile::tempdir().map_err(|error| profile(error.to_string()))?;
    let mut a_session = Session::open(place, &a.path, &a.model, None)?;
    let mut b_session =
        Session::open(place, &b.path, &named, Some(&folder.path().join("profile")))?;
    let mut ran: Vec<ran::Ran> = Vec::new();
    let (mut index, mut refused) = (0, 0);
    while index < cases.len() {
        // A sample that A refuses in its decode step counts not even halfway.
        let before = (report.outputs.clone(), report.runs, ran.clone());
        let done = cases.drive_one(index, &mut |name, a_inputs, b_inputs| {
            let a_outputs = a_session.run(&a_inputs)?;
            ran::start();
            let b_outputs = b_session.run(&b_inputs);
            merge(&mut ran, ran::take());
            report.outputs.add(name, &a_outputs, &b_outputs?);
            report.runs += 1;
            Ok(a_outputs)
        });
        match done {
            Ok(()) => index += 1,
            Err(VerifyError::Run { path, .. }) if path == a.path && cases.redraw(index) => {
                (report.outputs, report.runs, ran) = before;
                refused += 1;
            }
            Err(error) => return Err(error),
        }
    }
    if refused > 0 {
        report
            .notes
            .push(format!("A itself fails on {refused} samples; others were drawn instead"));
    }
    let file = b_session.end_profiling()?;
    let executed = profile::read(&file).map_err(profile)?;
    report.placement = Placement::new(mx_nodes, plan, &executed, &ran, place.device);
    Ok(())
}

fn merge(all: &mut Vec<ran::Ran>, more: Vec<ran::Ran>) {
    for one in more {
        let key = |r: &ran::Ran| (r.node.clone(), r.op, r.provider, r.kernel);
        match all.iter_mut().find(|known| key(known) == key(&one)) {
            Some(known) => known.runs += one.runs,
            None => all.push(one),
        }
    }
}

/// Collects what is wrong.
fn judge(report: &mut VerifyReport, options: &VerifyOptions) {
    let mut failures = std::mem::take(&mut report.placement.failures);
    report.notes.append(&mut report.placement.notes);
    let outputs = &report.outputs;
    failures.extend(outputs.only_in_a.iter().map(|name| format!("B has no output `{name}`")));
    report.notes.extend(outputs.only_in_b.iter().map(|name| format!("A has no output `{name}`")));
    failures.extend(outputs.differ.iter().cloned());
    report.notes.extend(outputs.not_compared.iter().cloned());
    if outputs.both.is_empty() && (options.max_error.is_some() || options.min_sqnr.is_some()) {
        failures.push("no output is compared, so none is within a bound".to_owned());
    }
    failures.extend(outputs.both.iter().flat_map(|output| judge_output(output, options)));
    if let Some(bound) = options.min_sqnr {
        failures.extend(report.layers.iter().filter_map(|layer| judge_layer(layer, bound)));
    }
    report.failures.extend(failures);
}

fn judge_output(output: &OutputReport, options: &VerifyOptions) -> Vec<String> {
    let (name, difference) = (&output.name, &output.difference);
    let mut failures = Vec::new();
    if difference.new_nan > 0 {
        let count = difference.new_nan;
        failures.push(format!("output `{name}` has {count} NaN in B where A has none"));
    }
    if let Some(bound) = options.max_error
        && less(bound, difference.max_abs)
    {
        let found = difference.max_abs;
        failures.push(format!("output `{name}`: error {found:.6e}, --max-error is {bound}"));
    }
    // Whole numbers, such as token ids, are no signal.
    if let Some(bound) = options.min_sqnr.filter(|_| output.is_float())
        && below(difference, bound)
    {
        let found = difference.sqnr();
        failures.push(format!("output `{name}`: SQNR {found:.2} dB, --min-sqnr is {bound}"));
    }
    failures
}

fn judge_layer(layer: &LayerReport, bound: f64) -> Option<String> {
    let name = layer.shown();
    let Some(local) = &layer.local else {
        let why = layer.note.as_deref().unwrap_or("not compared alone");
        return Some(format!("layer {name}: no SQNR alone ({why}), --min-sqnr is {bound}"));
    };
    let found = local.sqnr();
    below(local, bound).then(|| format!("layer {name}: SQNR {found:.2} dB, --min-sqnr is {bound}"))
}

/// Whether the SQNR is below the bound; also where numbers that are not finite make it meaningless.
fn below(difference: &Difference, bound: f64) -> bool {
    difference.elements > 0 && (difference.max_abs.is_infinite() || less(difference.sqnr(), bound))
}

/// a < b; also where one of them is NaN, so that such a bound holds for nothing.
fn less(a: f64, b: f64) -> bool {
    a.partial_cmp(&b).is_none_or(std::cmp::Ordering::is_lt)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn difference(a: f64, b: f64) -> Difference {
        let numbers = |value| Numbers { dtype: "float32", shape: vec![1], values: vec![value] };
        let mut difference = Difference::default();
        difference.add(&numbers(a), &numbers(b));
        difference
    }

    #[test]
    fn a_bound_that_is_no_number_holds_for_nothing() {
        let nan = f64::NAN;
        assert!(less(1.0, 2.0) && !less(2.0, 2.0) && less(nan, 2.0) && less(2.0, nan));
        let tenth = difference(1.0, 1.1);
        assert!(below(&tenth, nan) && below(&tenth, 21.0) && !below(&tenth, 19.0));
        assert!(!below(&difference(1.0, 1.0), 1e9), "what is equal has no noise");
        assert!(below(&difference(1.0, nan), 0.0));
    }

    #[test]
    fn a_layer_without_a_figure_is_within_no_bound() {
        let mut layer = LayerReport {
            node: "n".to_owned(),
            module_path: None,
            body: None,
            weight_format: String::new(),
            activation_format: String::new(),
            accumulated: Some(difference(1.0, 1.0)),
            local: None,
            note: Some("not by itself: a Loop".to_owned()),
        };
        let failure = judge_layer(&layer, 0.0).unwrap();
        assert!(failure.contains("layer n") && failure.contains("a Loop"), "{failure}");
        layer.local = Some(difference(1.0, 1.1));
        assert_eq!(judge_layer(&layer, 19.0), None);
    }
}
