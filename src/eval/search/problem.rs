//! The layers as a knapsack, and its solutions as recipes and points of a front.

use super::assign::{Assignment, NONE, recipe as recipe_of, subject};
use super::heldout::{Bar, Measured};
use super::knapsack::{Choice, Front, Solution, Taken};
use super::result::{Bound, Point};
use super::{Objective, Options};
use crate::eval::error::{Error, Result};
use crate::eval::sensitivity::result::Sensitivity;
use crate::rewrite::{Recipe, RewriteReport};

/// Layers and what each may become.
pub(super) struct Problem<'a> {
    pub sensitivity: &'a Sensitivity,
    /// Sites that have one format, by item.
    groups: Vec<Vec<usize>>,
    /// Formats of the options.
    formats: Vec<String>,
    front: Front,
    weights: u64,
}

impl<'a> Problem<'a> {
    pub(super) fn new(sensitivity: &'a Sensitivity, options: &Options) -> Result<Self> {
        let mut formats = options.formats.clone();
        if formats.is_empty() {
            formats.clone_from(&sensitivity.formats);
        }
        if let Some(unknown) =
            formats.iter().find(|format| *format != NONE && !sensitivity.formats.contains(format))
        {
            return Err(Error::Usage(format!(
                "--formats {unknown}: not measured; measured are {} (and none = as it is)",
                sensitivity.formats.join(", ")
            )));
        }
        let groups = groups(sensitivity, options.together);
        let item = |group: &Vec<usize>| -> Vec<Choice> {
            let of = |format: &String| {
                let each = group.iter().map(|&site| cost(sensitivity, site, format));
                each.fold(Choice { cost: 0, loss: 0.0 }, |sum, (bytes, kl, delta)| Choice {
                    cost: sum.cost + bytes,
                    loss: sum.loss
                        + match options.objective {
                            Objective::Kl => kl,
                            Objective::DeltaXent => delta,
                        },
                })
            };
            formats.iter().map(of).collect()
        };
        let front = Front::new(groups.iter().map(item).collect());
        let weights = sensitivity.sites.iter().map(|site| site.weights).sum();
        Ok(Self { sensitivity, groups, formats, front, weights })
    }

    pub(super) fn within(&self, bits: f64) -> Result<Solution> {
        let budget = (bits * self.weights as f64 / 8.0).floor();
        self.front.within(budget as u64).ok_or_else(|| {
            let least = self.point(&self.front.point(0)).bits_per_weight;
            Error::Usage(format!(
                "--budget-bits {bits}: the cheapest of these formats takes {least:.3} bits a weight, \
                 scales included"
            ))
        })
    }

    /// The cheapest point of the front whose perplexity, measured, keeps to `limit` percent. Taken to
    /// fall along the front, which it does but for noise.
    pub(super) fn up_to(
        &self,
        limit: f64,
        bar: &Bar<'_>,
        tried: &mut Vec<Measured>,
    ) -> Result<Solution> {
        /// Points closer than this are not told apart, bits a weight.
        const NEAR: f64 = 0.02;
        let mut keeps = |index: usize| -> Result<bool> {
            let assignment = self.assignment(&self.front.point(index));
            let name = format!("point {index}");
            let recipe = recipe_of(self.sensitivity, &assignment, &name)?;
            let measured = match bar.recipe(&recipe, &|report| self.size(report)) {
                // A point at which the model returns NaN does not keep to anything.
                Err(Error::Model { reason, .. }) if reason.contains("not finite") => {
                    return Ok(false);
                }
                other => other?,
            };
            let keeps = measured.delta_ppl_percent <= limit;
            tried.push(measured);
            Ok(keeps)
        };
        let last = self.front.len() - 1;
        if !keeps(last)? {
            let best = tried.last().map_or(f64::NAN, |one| one.delta_ppl_percent);
            return Err(Error::Usage(format!(
                "--max-delta-ppl {limit}%: the finest of these formats costs {best:.2} %; add finer ones \
                 to --formats, or none"
            )));
        }
        let (mut below, mut above) = (0, last);
        if last > 0 && keeps(0)? {
            above = 0;
        }
        let bits = |index: usize| self.point(&self.front.point(index)).bits_per_weight;
        while above > below + 1 && bits(above) - bits(below) > NEAR {
            let middle = below.midpoint(above);
            match keeps(middle)? {
                true => above = middle,
                false => below = middle,
            }
        }
        let taken = self.front.point(above);
        let (cost, loss) = self.front.sums(&taken);
        Ok(Solution { taken, cost, loss, bound: loss })
    }

    /// Format of every site.
    pub(super) fn assignment(&self, taken: &Taken) -> Assignment {
        let mut formats = vec![NONE.to_owned(); self.sensitivity.sites.len()];
        for (group, &option) in self.groups.iter().zip(taken) {
            group.iter().for_each(|&site| formats[site].clone_from(&self.formats[option]));
        }
        formats
    }

    pub(super) fn named(&self, assignment: &Assignment) -> Vec<(String, String)> {
        let sites = self.sensitivity.sites.iter();
        sites.zip(assignment).map(|(site, own)| (site.shown().to_owned(), own.clone())).collect()
    }

    pub(super) fn point(&self, taken: &Taken) -> Point {
        let assignment = self.assignment(taken);
        let (mut bytes, mut kl, mut delta_xent) = (0, 0.0, 0.0);
        for (site, format) in assignment.iter().enumerate() {
            let (own, own_kl, own_delta) = cost(self.sensitivity, site, format);
            bytes += own;
            kl += own_kl;
            delta_xent += own_delta;
        }
        let count = |format: &String| {
            (format.clone(), assignment.iter().filter(|own| *own == format).count())
        };
        Point {
            bits_per_weight: self.bits(bytes),
            bytes,
            predicted_kl: kl,
            predicted_delta_xent: delta_xent,
            layers: self.formats.iter().map(count).collect(),
            chosen: false,
        }
    }

    pub(super) fn bits(&self, bytes: u64) -> f64 {
        bytes as f64 * 8.0 / self.weights.max(1) as f64
    }

    /// The front, with the solution among its points.
    pub(super) fn points(&self, taken: &Taken) -> Vec<Point> {
        let mut points: Vec<Point> =
            (0..self.front.len()).map(|index| self.point(&self.front.point(index))).collect();
        let found = Point { chosen: true, ..self.point(taken) };
        points.retain(|point| point.bytes != found.bytes);
        points.push(found);
        points.sort_by_key(|point| point.bytes);
        points
    }

    pub(super) fn bound(&self, solution: &Solution) -> Bound {
        let gap = (solution.loss - solution.bound) / solution.bound.abs();
        Bound {
            objective: solution.loss,
            linear_programme: solution.bound,
            gap_percent: (gap.is_finite()).then_some(gap * 100.0),
        }
    }

    /// Bytes and bits of the layers that were measured, in a rewritten model.
    pub(super) fn size(&self, report: &RewriteReport) -> (u64, f64) {
        let bytes = self.sensitivity.sites.iter().map(|site| {
            let mut planned = report.plan.sites.iter();
            let same = planned.find(|planned| {
                planned.site.node_name == site.node
                    && planned.site.weight.initializer == site.initializer
            });
            same.map_or(site.bytes_as_is, |planned| planned.bytes_after)
        });
        let bytes = bytes.sum();
        (bytes, self.bits(bytes))
    }

    /// The recipe, each format alone, and others, on documents that are held out.
    pub(super) fn measure(
        &self,
        bar: &Bar<'_>,
        recipe: &Recipe,
        also: &[Recipe],
        options: &Options,
        done: &mut dyn FnMut(&[Measured]) -> Result<()>,
    ) -> Result<Vec<Measured>> {
        let size = |report: &RewriteReport| self.size(report);
        let mut measured = vec![bar.recipe(recipe, &size)?];
        done(&measured)?;
        // What fails beside the recipe found costs its own row alone.
        let mut row =
            |recipe: &Recipe, measured: &mut Vec<Measured>| match bar.recipe(recipe, &size) {
                Ok(one) => {
                    measured.push(one);
                    done(measured)
                }
                Err(Error::Interrupted) => Err(Error::Interrupted),
                Err(error) => {
                    bar.observer.warn(&format!("{}: {error}", recipe.name));
                    Ok(())
                }
            };
        for format in self.formats.iter().filter(|format| *format != NONE && !options.no_uniform) {
            let all = vec![format.clone(); self.sensitivity.sites.len()];
            let uniform = recipe_of(self.sensitivity, &all, &format!("uniform {format}"))?;
            row(&uniform, &mut measured)?;
        }
        for other in also {
            row(other, &mut measured)?;
        }
        Ok(measured)
    }
}

/// Bytes, divergence and difference of cross-entropy of a site in a format.
fn cost(sensitivity: &Sensitivity, site: usize, format: &str) -> (u64, f64, f64) {
    let site = &sensitivity.sites[site];
    match site.formats.get(format) {
        Some(one) => (one.bytes, one.kl, one.delta_xent),
        None => (site.bytes_as_is, 0.0, 0.0),
    }
}

/// Sites that have one format: those that a rule cannot tell apart and, `together`, those that read
/// one value.
fn groups(sensitivity: &Sensitivity, together: bool) -> Vec<Vec<usize>> {
    let mut groups: Vec<Vec<usize>> = Vec::new();
    for (index, site) in sensitivity.sites.iter().enumerate() {
        let same = |other: &usize| {
            let other = &sensitivity.sites[*other];
            subject(other) == subject(site)
                || together && other.input == site.input && other.role == site.role
        };
        match groups.iter_mut().find(|group| group.iter().any(same)) {
            Some(group) => group.push(index),
            None => groups.push(vec![index]),
        }
    }
    groups
}
