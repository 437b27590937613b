//! A session of the graph with choices, and a run of it.

use super::names;
use crate::eval::devices::Device;
use crate::eval::error::{Error, Result};
use crate::eval::feeds::{Feeds, LABELS, numbers};
use crate::eval::runtime::Runtime;
use crate::eval::schedule::{MASKED, Padded};
use crate::eval::session::{SessionOptions, builder, device_memory, host_memory};
use crate::onnx::proto::DataType;
use ort::session::IoBinding;
use ort::value::DynValue;
use std::collections::HashMap;
use std::path::Path;

/// What one row of a batch scored.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct RowScore {
    /// Scored positions.
    pub tokens: u64,
    /// Sum of -ln p of the text's own tokens.
    pub nll: f64,
    /// The same of the baseline.
    pub baseline_nll: f64,
    /// Sum of KL(baseline || this).
    pub kl: f64,
}

/// What a run computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Choice {
    /// The segment it begins with.
    pub start: usize,
    /// The site that is quantised, and the format.
    pub site: Option<(usize, usize)>,
}

/// How many inputs of each kind the graph has.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    /// Segments, the last one included.
    pub segments: usize,
    pub sites: usize,
    pub formats: usize,
    /// Whether the head is computed at chosen positions.
    pub positions: bool,
    /// Types of the values between segments and of the logits.
    pub hidden: DataType,
    pub logits: DataType,
}

/// A batch on its way into the graph.
pub(super) struct Fed {
    /// The model's own inputs.
    own: Vec<(String, DynValue)>,
    labels: Labels,
}

/// The tokens to predict, at the positions where the head is computed.
struct Labels {
    rows: usize,
    values: Vec<i64>,
    tensor: DynValue,
    positions: DynValue,
}

/// The baseline's run of a batch: what the others begin with and are compared with.
pub(super) struct Baseline {
    /// The values between segments.
    pub hidden: Vec<DynValue>,
    logits: DynValue,
}

/// The session.
pub(super) struct Chooser {
    session: ort::session::Session,
    feeds: Feeds,
    shape: Shape,
    cuts: Vec<String>,
    logits: String,
    device: Device,
    yes: DynValue,
    no: DynValue,
    none_hidden: DynValue,
    none_logits: DynValue,
    bound: Option<Bound>,
}

/// A binding that stays for the runs of a batch: on a GPU every input that is bound is copied there, and
/// most are the same in the next run.
struct Bound {
    binding: IoBinding,
    flags: HashMap<String, bool>,
    /// The value that a run began with last.
    start: Option<usize>,
    compares: bool,
}

impl Chooser {
    /// Loads the graph at `path`. `cuts` are the values between segments.
    pub(super) fn open(
        runtime: &Runtime,
        path: &Path,
        options: &SessionOptions,
        feeds: Feeds,
        shape: Shape,
        (cuts, logits): (Vec<String>, String),
    ) -> Result<Self> {
        let folder = path.parent().unwrap_or(Path::new("."));
        let doing = format!("loading the model with its choices on {}", options.device);
        mx_custom_ops::census::reset();
        let session = builder(runtime, folder, options)
            .and_then(|mut builder| builder.commit_from_file(path))
            .map_err(Error::ort(doing))?;
        let made = mx_custom_ops::census::made();
        if options.device != Device::Cpu && made.cpu > 0 {
            return Err(Error::Device(format!(
                "{} nodes of domain `mx` have no kernel on {}; pass --device cpu, or --debug to see \
                 which",
                made.cpu, options.device
            )));
        }
        let tensor = |element, shape: &[usize], value: i64| {
            let values = vec![value; shape.iter().product()];
            numbers(element, shape.to_vec(), values).map_err(Error::ort("making an input"))
        };
        Ok(Self {
            session,
            feeds,
            shape,
            cuts,
            logits,
            device: options.device,
            yes: tensor(DataType::Bool, &[], 1)?,
            no: tensor(DataType::Bool, &[], 0)?,
            none_hidden: tensor(shape.hidden, &[1], 0)?,
            none_logits: tensor(shape.logits, &[1, 1, 1], 0)?,
            bound: None,
        })
    }

    /// Makes the tensors of a batch whose head is computed at `positions` along the sequence.
    pub(super) fn feed(&self, padded: &Padded, positions: &[usize]) -> Result<Fed> {
        let making = || Error::ort("making the inputs of a batch");
        let own = self.feeds.tensors(padded).map_err(making())?;
        let own = own.into_iter().filter(|(name, _)| name != LABELS).collect();
        let mut values = Vec::with_capacity(padded.rows * positions.len());
        for row in padded.labels.chunks(padded.length.max(1)) {
            let at = |&position: &usize| row.get(position).copied().unwrap_or(MASKED);
            values.extend(positions.iter().map(at));
        }
        let shape = vec![padded.rows, positions.len()];
        let places = positions.iter().map(|&position| position as i64).collect();
        let labels = Labels {
            rows: padded.rows,
            tensor: numbers(DataType::Int64, shape, values.clone()).map_err(making())?,
            positions: numbers(DataType::Int64, vec![positions.len()], places).map_err(making())?,
            values,
        };
        Ok(Fed { own, labels })
    }

    /// The baseline from the first token to the logits, which stay where they are computed.
    pub(super) fn baseline(&mut self, fed: &Fed) -> Result<Baseline> {
        let mut keep = self.cuts.clone();
        keep.push(self.logits.clone());
        self.bound = None;
        let (_, mut kept) = self.run(fed, Choice::default(), None, &keep)?;
        let logits = kept.pop().ok_or_else(|| Error::Runtime("the logits are missing".into()))?;
        Ok(Baseline { hidden: kept, logits })
    }

    /// The baseline's scores alone.
    pub(super) fn evaluate(&mut self, fed: &Fed) -> Result<Vec<RowScore>> {
        self.bound = None;
        self.run(fed, Choice::default(), None, &[]).map(|(rows, _)| rows)
    }

    /// One choice against the baseline of the same batch, which was run last.
    pub(super) fn choose(
        &mut self,
        fed: &Fed,
        choice: Choice,
        baseline: &Baseline,
    ) -> Result<Vec<RowScore>> {
        self.run(fed, choice, Some(baseline), &[]).map(|(rows, _)| rows)
    }

    fn run(
        &mut self,
        fed: &Fed,
        choice: Choice,
        baseline: Option<&Baseline>,
        keep: &[String],
    ) -> Result<(Vec<RowScore>, Vec<DynValue>)> {
        let doing = format!("running {choice:?} on {}", self.device);
        let mut bound = match self.bound.take() {
            Some(bound) => bound,
            None => self.bind(fed).map_err(Error::ort(&doing))?,
        };
        self.choose_by(&mut bound, choice, baseline).map_err(Error::ort(&doing))?;
        // ONNX Runtime keeps the outputs of the last run.
        bound.binding.clear_outputs();
        let host = host_memory().map_err(Error::ort(&doing))?;
        for name in names::SCORES {
            bound.binding.bind_output_to_device(name, &host).map_err(Error::ort(&doing))?;
        }
        let own = device_memory(self.device).map_err(Error::ort(&doing))?;
        for name in keep {
            bound.binding.bind_output_to_device(name, &own).map_err(Error::ort(&doing))?;
        }
        let mut outputs = self.session.run_binding(&bound.binding).map_err(Error::ort(&doing))?;
        let score = |name: &str| -> Result<Vec<f32>> {
            let value = outputs.get(name).ok_or_else(|| missing(name))?;
            let (_, data) = value.try_extract_tensor::<f32>().map_err(Error::ort(&doing))?;
            Ok(data.to_vec())
        };
        let [nll, _, _, kl, base] = names::SCORES;
        let rows =
            sums(&fed.labels.values, fed.labels.rows, [&score(nll)?, &score(base)?, &score(kl)?])?;
        let take = |name: &String| outputs.remove(name).ok_or_else(|| missing(name));
        let kept = keep.iter().map(take).collect::<Result<_>>()?;
        drop(outputs);
        self.bound = Some(bound);
        Ok((rows, kept))
    }

    /// Binds what is the same in every run of a batch.
    fn bind(&self, fed: &Fed) -> ort::Result<Bound> {
        let mut binding = self.session.create_binding()?;
        for (name, tensor) in &fed.own {
            binding.bind_input(name.as_str(), tensor)?;
        }
        binding.bind_input(LABELS, &fed.labels.tensor)?;
        binding.bind_input(names::BASELINE, &self.none_logits)?;
        if self.shape.positions {
            binding.bind_input(names::POSITIONS, &fed.labels.positions)?;
        }
        if self.shape.segments > 1 {
            binding.bind_input(names::HIDDEN, &self.none_hidden)?;
        }
        Ok(Bound { binding, flags: HashMap::new(), start: None, compares: false })
    }

    /// Binds the inputs that say what is computed, where they are others than in the last run.
    fn choose_by(
        &self,
        bound: &mut Bound,
        choice: Choice,
        baseline: Option<&Baseline>,
    ) -> ort::Result<()> {
        if let Some(baseline) = baseline.filter(|_| !bound.compares) {
            bound.binding.bind_input(names::BASELINE, &baseline.logits)?;
            bound.compares = true;
        }
        let hidden = choice.start.checked_sub(1).zip(baseline);
        if let Some((index, baseline)) = hidden.filter(|(index, _)| bound.start != Some(*index))
            && let Some(value) = baseline.hidden.get(index)
        {
            bound.binding.bind_input(names::HIDDEN, value)?;
            bound.start = Some(index);
        }
        for (name, on) in self.flags(choice, baseline.is_some()) {
            if bound.flags.get(&name) != Some(&on) {
                bound.binding.bind_input(&name, if on { &self.yes } else { &self.no })?;
                bound.flags.insert(name, on);
            }
        }
        Ok(())
    }

    /// The flags of a choice.
    fn flags(&self, choice: Choice, compare: bool) -> Vec<(String, bool)> {
        let Shape { segments, sites, formats, .. } = self.shape;
        let mut flags = vec![(names::COMPARE.to_owned(), compare)];
        for segment in 0..segments.saturating_sub(1) {
            flags.push((names::skip(segment), segment < choice.start));
            flags.push((names::start(segment + 1), segment + 1 == choice.start));
        }
        let is = |site| choice.site.is_some_and(|(chosen, _)| chosen == site);
        flags.extend((0..sites).map(|site| (names::site(site), is(site))));
        let of = |format| choice.site.is_some_and(|(_, chosen)| chosen == format);
        let asked = 0..formats.saturating_sub(1);
        flags.extend(asked.map(|format| (names::format(format), of(format))));
        flags
    }
}

fn missing(name: &str) -> Error {
    Error::Runtime(format!("the run gave no `{name}`"))
}

/// Sums by row over the labelled positions: loss, the baseline's loss, divergence.
pub(super) fn sums(
    labels: &[i64],
    rows: usize,
    [nll, baseline, kl]: [&[f32]; 3],
) -> Result<Vec<RowScore>> {
    if [nll.len(), baseline.len(), kl.len()] != [labels.len(); 3] {
        let text = format!("{} scores came back for {} positions", nll.len(), labels.len());
        return Err(Error::Runtime(text));
    }
    let length = labels.len() / rows.max(1);
    let row = |row: usize| {
        let mut score = RowScore::default();
        let at = row * length..(row + 1) * length;
        for position in at.filter(|&position| labels[position] != MASKED) {
            score.tokens += 1;
            score.nll += f64::from(nll[position]);
            score.baseline_nll += f64::from(baseline[position]);
            score.kl += f64::from(kl[position]);
        }
        score
    };
    Ok((0..rows).map(row).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_summed_over_labelled_positions() {
        let labels = [5, MASKED, 6, 7, MASKED, MASKED];
        let nll = [1.0, 9.0, 2.0, 3.0, 9.0, 9.0];
        let zero = [0.0; 6];
        let rows = sums(&labels, 2, [&nll, &zero, &nll]).unwrap();
        assert_eq!((rows[0].tokens, rows[0].nll, rows[0].kl), (2, 3.0, 3.0));
        assert_eq!((rows[1].tokens, rows[1].nll, rows[1].baseline_nll), (1, 3.0, 0.0));
        assert!(sums(&labels, 2, [&nll[..5], &zero, &zero]).is_err());
    }
}
