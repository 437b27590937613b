//! What a stage costs against how small it is.

use super::labels::{Frame, Places};
use super::scale::{Axis, Symlog, bit_ticks, linear_ticks};
use super::{
    BLUE, Drawn, FAINT, GREY, INK, Missing, Plot, WIDTH, colour, line, plot, shorten, style,
    text_width, write,
};
use crate::eval::figures::Estimate;
use crate::eval::report::inputs::ParetoPoint;
use crate::eval::report::number::{clean, megabytes};
use crate::eval::report::table::{Group, Level};
use plotters::chart::ChartBuilder;
use plotters::element::{Circle, Polygon};
use plotters::prelude::RGBColor;
use plotters::style::Color as _;
use plotters::style::text_anchor::{HPos, VPos};

const HEIGHT: u32 = 460;
/// Characters of a name in a plot; tables have the whole.
const NAME: usize = 28;
/// Recipes of a search beyond which only the first and the last of them are named in the plot.
const NAMED: usize = 4;
/// Names in a sentence.
const LISTED: usize = 12;

/// A point.
struct Point {
    x: f64,
    y: Estimate,
    name: String,
    level: Level,
    /// A recipe of the search, not a stage.
    square: bool,
}

struct Axes {
    x_title: &'static str,
    /// Logarithmic, base 2.
    log: bool,
    /// For the second axis.
    base_ppl: Option<f64>,
}

/// Δxent of the stages against bits a weight, with error bars.
pub(in crate::eval::report) fn bits(group: &Group<'_>) -> Result<Plot, Missing> {
    let mut points = Vec::new();
    for row in &group.rows {
        let Some(bits) = row.record.bits_per_weight.filter(|bits| *bits > 0.0) else { continue };
        let delta = row.delta.as_ref().map(|delta| delta.xent);
        let y = delta.or_else(|| row.is_baseline.then(|| Estimate::exact(0.0)));
        let Some(y) = y.filter(finite) else { continue };
        let name = shorten(&row.record.stage, NAME);
        points.push(Point { x: bits, y, name, level: row.level(), square: false });
    }
    if points.len() < 2 {
        return Err("fewer than two stages have both bits a weight and a difference to the \
                    baseline"
            .into());
    }
    let axes = Axes {
        x_title: "bits a weight, scales included (logarithmic)",
        log: true,
        base_ppl: group.baseline.and_then(|baseline| baseline.ppl),
    };
    let title = "Loss against bits a weight".to_owned();
    let description = format!(
        "Difference of xent to the baseline (and the ppl it makes) against bits a weight, for {} \
         stages, with 95 % intervals. {}",
        points.len(),
        extremes(&points)
    );
    scatter(title, description, &points, &[], &axes)
}

fn finite(estimate: &Estimate) -> bool {
    estimate.value.is_some_and(f64::is_finite)
}

fn extremes(points: &[Point]) -> String {
    let say = |point: &Point| {
        format!("{} {:+.5} nats a token", point.name, point.y.value.unwrap_or_default())
    };
    let by = |a: &&Point, b: &&Point| {
        a.y.value.unwrap_or_default().total_cmp(&b.y.value.unwrap_or_default())
    };
    match (points.iter().min_by(by), points.iter().max_by(by)) {
        (Some(least), Some(most)) => format!("Lowest: {}; highest: {}.", say(least), say(most)),
        _ => String::new(),
    }
}

/// What may be shipped: a stage, or a recipe of the search.
pub(in crate::eval::report) struct Candidate {
    pub name: String,
    /// Megabytes, or bits a weight where the sizes of recipes are not known.
    pub size: f64,
    pub delta_xent: Estimate,
    pub level: Level,
    pub recipe: bool,
    /// No other is both smaller and better.
    pub on_front: bool,
}

/// Stages and recipes by size, the smallest first, and the unit of sizes.
pub(in crate::eval::report) fn candidates(
    group: &Group<'_>,
    front: &[ParetoPoint],
) -> (Vec<Candidate>, &'static str) {
    let bytes = front.iter().all(|point| point.bytes.is_some());
    let mut out: Vec<Candidate> = Vec::new();
    for row in &group.rows {
        let record = row.record;
        let size = if bytes { megabytes(record.model_bytes) } else { record.bits_per_weight };
        let delta = row.delta.as_ref().map(|delta| delta.xent);
        let delta = delta.or_else(|| row.is_baseline.then(|| Estimate::exact(0.0)));
        if let Some((size, delta_xent)) = size.zip(delta.filter(finite)) {
            let (name, level) = (clean(&record.stage), row.level());
            out.push(Candidate { name, size, delta_xent, level, recipe: false, on_front: false });
        }
    }
    for (index, point) in front.iter().enumerate() {
        let size = if bytes { megabytes(point.bytes) } else { point.bits_per_weight };
        let delta = point.delta_xent.filter(|delta| delta.is_finite());
        if let Some((size, delta)) = size.zip(delta) {
            let name = match point.label.as_str() {
                "" => format!("recipe {}", index + 1),
                label => clean(label),
            };
            let (delta_xent, level) = (Estimate::exact(delta), Level::Unknown);
            out.push(Candidate { name, size, delta_xent, level, recipe: true, on_front: false });
        }
    }
    mark_front(&mut out);
    (out, if bytes { "MB" } else { "bits a weight" })
}

fn mark_front(candidates: &mut [Candidate]) {
    let loss = |c: &Candidate| c.delta_xent.value.unwrap_or(f64::INFINITY);
    candidates.sort_by(|a, b| a.size.total_cmp(&b.size).then(loss(a).total_cmp(&loss(b))));
    let mut best = f64::INFINITY;
    for candidate in candidates {
        if loss(candidate) < best {
            (best, candidate.on_front) = (loss(candidate), true);
        }
    }
}

/// The Pareto front of size against Δxent.
pub(in crate::eval::report) fn front(
    group: &Group<'_>,
    front: &[ParetoPoint],
) -> Result<Plot, Missing> {
    let (all, unit) = candidates(group, front);
    if all.len() < 2 {
        return Err("fewer than two stages or recipes have both a size and a difference to the \
                    baseline"
            .into());
    }
    let recipes = all.iter().filter(|candidate| candidate.recipe).count();
    let ends = [
        all.iter().position(|candidate| candidate.recipe),
        all.iter().rposition(|candidate| candidate.recipe),
    ];
    let named =
        |index: usize, c: &Candidate| !c.recipe || recipes <= NAMED || ends.contains(&Some(index));
    let points: Vec<_> = all
        .iter()
        .enumerate()
        .map(|(index, c)| Point {
            x: c.size,
            y: c.delta_xent,
            name: if named(index, c) { shorten(&c.name, NAME) } else { String::new() },
            level: c.level,
            square: c.recipe,
        })
        .collect();
    let on: Vec<_> = all.iter().filter(|candidate| candidate.on_front).collect();
    let steps: Vec<_> =
        on.iter().map(|c| (c.size, c.delta_xent.value.unwrap_or_default())).collect();
    let names: Vec<_> = on.iter().map(|c| c.name.as_str()).take(LISTED).collect();
    let description = format!(
        "Difference of xent to the baseline against size in {unit}, for {} stages and {recipes} \
         recipes of the search (squares). On the front, where nothing is both smaller and better: {}{}.",
        all.len() - recipes,
        names.join(", "),
        if on.len() > LISTED { format!(" and {} more", on.len() - LISTED) } else { String::new() }
    );
    let x_title = if unit == "MB" { "size, MB" } else { "bits a weight, scales included" };
    let axes = Axes { x_title, log: false, base_ppl: None };
    scatter("Pareto front: size against loss".into(), description, &points, &steps, &axes)
}

fn x_axis(points: &[Point], log: bool) -> Axis {
    let at = |x: f64| if log { x.log2() } else { x };
    let low = points.iter().map(|p| at(p.x)).fold(f64::INFINITY, f64::min);
    let high = points.iter().map(|p| at(p.x)).fold(f64::NEG_INFINITY, f64::max);
    let pad = ((high - low) * 0.08).max(if log { 0.2 } else { high.abs() * 0.02 + 1e-9 });
    let range = low - pad..high + pad;
    let values = if log {
        bit_ticks(range.start.exp2(), range.end.exp2())
    } else {
        linear_ticks(range.start, range.end, 7)
    };
    let ticks = values.into_iter().map(|value| (at(value), value)).collect();
    Axis { range, ticks, signed: false }
}

fn y_axis(points: &[Point], scale: Symlog) -> Axis {
    let ends = points.iter().flat_map(|p| [p.y.value, p.y.low, p.y.high]).flatten();
    let (low, high) =
        ends.fold((0f64, 0f64), |(low, high), value| (low.min(value), high.max(value)));
    let (from, to) = (scale.at(low), scale.at(high));
    let pad = ((to - from) * 0.08).max(0.05);
    let ticks = scale.ticks(low * 1.2 - 1e-12, high * 1.2 + 1e-12);
    let ticks: Vec<_> = ticks.into_iter().map(|value| (scale.at(value), value)).collect();
    let ticks = ticks.into_iter().filter(|(at, _)| *at >= from - pad && *at <= to + pad).collect();
    Axis { range: from - pad..to + pad, ticks, signed: true }
}

fn scatter(
    title: String,
    description: String,
    points: &[Point],
    steps: &[(f64, f64)],
    axes: &Axes,
) -> Result<Plot, Missing> {
    let scale = Symlog::new(points.iter().flat_map(|p| [p.y.value, p.y.low, p.y.high]).flatten());
    let (x, y) = (x_axis(points, axes.log), y_axis(points, scale));
    let at_x = |v: f64| if axes.log { v.log2() } else { v };
    plot((WIDTH, HEIGHT), title, description, |area| {
        let right = if axes.base_ppl.is_some() { 74 } else { 10 };
        let mut chart = ChartBuilder::on(area)
            .margin(12)
            .x_label_area_size(46)
            .y_label_area_size(82)
            .right_y_label_area_size(right)
            .build_cartesian_2d(x.clone(), y.clone())?
            .set_secondary_coord(x.clone(), y.clone());
        let small = style(12, INK, HPos::Center, VPos::Center);
        chart
            .configure_mesh()
            .bold_line_style(FAINT)
            .label_style(small.clone())
            .axis_desc_style(small.clone())
            .x_desc(axes.x_title)
            .y_desc("Δxent, nats a token (logarithmic away from 0)")
            .draw()?;
        if let Some(base) = axes.base_ppl {
            let ppl = |at: &f64| {
                let ppl = base * y.value(*at).exp();
                if ppl < 1e5 { format!("{ppl:.3}") } else { format!("{ppl:.2e}") }
            };
            let mut right = chart.configure_secondary_axes();
            right.y_label_formatter(&ppl).label_style(small.clone()).axis_desc_style(small);
            right.y_desc("ppl").draw()?;
        }
        let pixel = |px: f64, py: f64| chart.backend_coord(&(at_x(px), scale.at(py)));
        let (left, top) = chart.backend_coord(&(x.range.start, y.range.end));
        let (end, bottom) = chart.backend_coord(&(x.range.end, y.range.start));
        let zero = pixel(points[0].x, 0.0).1;
        line(area, &[(left, zero), (end, zero)], GREY)?;
        draw_steps(area, steps, pixel)?;
        draw_bars(area, points, pixel)?;
        name_points(area, points, pixel, Frame(left + 2, top + 2, end - 2, bottom - 2))
    })
}

/// The front as a staircase: between two points nothing better is known than the smaller one.
fn draw_steps(
    area: &super::Area<'_>,
    steps: &[(f64, f64)],
    pixel: impl Fn(f64, f64) -> (i32, i32),
) -> Drawn {
    let mut path: Vec<(i32, i32)> = Vec::new();
    for (x, y) in steps {
        let at = pixel(*x, *y);
        if let Some(last) = path.last().copied() {
            path.push((at.0, last.1));
        }
        path.push(at);
    }
    if path.len() > 1 { line(area, &path, BLUE.stroke_width(2)) } else { Ok(()) }
}

fn draw_bars(
    area: &super::Area<'_>,
    points: &[Point],
    pixel: impl Fn(f64, f64) -> (i32, i32),
) -> Drawn {
    for point in points {
        let at = pixel(point.x, point.y.value.unwrap_or_default());
        let colour = colour(point.level);
        if let Some((low, high)) = point.y.low.zip(point.y.high) {
            let (low, high) = (pixel(point.x, low).1, pixel(point.x, high).1);
            line(area, &[(at.0, low), (at.0, high)], colour.stroke_width(2))?;
            for end in [low, high] {
                line(area, &[(at.0 - 5, end), (at.0 + 5, end)], colour.stroke_width(2))?;
            }
        }
        marker(area, at, point, colour)?;
    }
    Ok(())
}

/// Shapes say what colours say: up is worse, down is better, round is neither.
fn marker(area: &super::Area<'_>, (x, y): (i32, i32), point: &Point, c: RGBColor) -> Drawn {
    let polygon = |corners: &[(i32, i32)]| {
        let corners: Vec<_> = corners.iter().map(|(dx, dy)| (x + dx, y + dy)).collect();
        area.draw(&Polygon::new(corners, c.filled()))
    };
    match point.level {
        _ if point.square => polygon(&[(-4, -4), (4, -4), (4, 4), (-4, 4)]),
        Level::Better => polygon(&[(-7, -5), (7, -5), (0, 7)]),
        level if level.is_worse() => polygon(&[(-7, 5), (7, 5), (0, -7)]),
        _ => area.draw(&Circle::new((x, y), 5, c.filled())),
    }
}

fn name_points(
    area: &super::Area<'_>,
    points: &[Point],
    pixel: impl Fn(f64, f64) -> (i32, i32),
    bounds: Frame,
) -> Drawn {
    let mut places = Places::new(bounds);
    let at: Vec<_> =
        points.iter().map(|point| pixel(point.x, point.y.value.unwrap_or_default())).collect();
    for ((x, y), point) in at.iter().zip(points) {
        places.take(Frame(x - 6, y - 6, x + 6, y + 6));
        if let Some((low, high)) = point.y.low.zip(point.y.high) {
            places.take(Frame(x - 2, pixel(point.x, high).1, x + 2, pixel(point.x, low).1));
        }
    }
    let text = style(12, INK, HPos::Left, VPos::Center);
    for (point, at) in points.iter().zip(at).filter(|(point, _)| !point.name.is_empty()) {
        let width = text_width(&point.name, 12);
        // A name that has no place is in the table below the plot.
        let Some(place) = places.find(at, (width, 14)) else { continue };
        if place.far {
            let end = place.at.0.max(at.0.min(place.at.0 + width));
            line(area, &[at, (end, place.at.1)], GREY.mix(0.6))?;
        }
        write(area, &point.name, place.at, &text)?;
    }
    Ok(())
}
