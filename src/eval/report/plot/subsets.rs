//! Which kinds of text lose, by stage.

use super::heat::{Map, Tile, legend};
use super::scale::Symlog;
use super::{BLUE, Missing, ORANGE, PAPER, Plot, WIDTH, mix, plot, shorten};
use crate::eval::figures::Figures;
use crate::eval::report::number::{brief, clean};
use crate::eval::report::table::{Group, Level, Row};
use plotters::prelude::RGBColor;

/// A difference without significance: no colour of either side.
const NEUTRAL: RGBColor = RGBColor(0xee, 0xee, 0xee);

/// Δxent of every subset and stage.
pub(in crate::eval::report) fn subsets(group: &Group<'_>) -> Result<Plot, Missing> {
    let names = group.subsets();
    let stages: Vec<&Row<'_>> = group
        .rows
        .iter()
        .filter(|row| {
            names.iter().any(|name| row.subset(name).is_some_and(|(f, _)| f.versus.is_some()))
        })
        .collect();
    if names.is_empty() || stages.is_empty() {
        return Err("no stage has figures by subset".into());
    }
    let value = |figures: &Figures| figures.versus.as_ref().and_then(|v| v.delta_xent.value);
    let cells: Vec<f64> = names
        .iter()
        .flat_map(|name| stages.iter().filter_map(move |row| row.subset(name)))
        .filter_map(|(figures, _)| value(figures))
        .collect();
    let scale = Symlog::new(cells.iter().copied());
    let most = cells.iter().map(|v| v.abs()).fold(0.0, f64::max);
    let tile = |figures: Option<&Figures>| tile(figures?, scale, most);
    let mut rows = vec!["all documents".to_owned(), "mean of subsets".into()];
    rows.extend(names.iter().map(|name| clean(name)));
    let mut tiles: Vec<Vec<Option<Tile>>> = vec![
        stages.iter().map(|row| tile(row.statistics().map(|s| &s.all))).collect(),
        stages
            .iter()
            .map(|row| tile(row.statistics().and_then(|s| s.macro_average.as_ref())))
            .collect(),
    ];
    for name in &names {
        let of = |row: &&Row<'_>| tile(row.subset(name).map(|(figures, _)| figures));
        tiles.push(stages.iter().map(of).collect());
    }
    let columns: Vec<_> = stages.iter().map(|row| clean(&row.record.stage)).collect();
    let map = Map { rows, columns, tiles, tile: (66, 22), apart: 2 };
    let (width, height) = map.size();
    let size = (width.max(WIDTH as i32 / 2) as u32, (height + 44) as u32);
    plot(size, "Loss by subset".into(), description(group, &stages, &names), |area| {
        map.draw(area, (0, 0))?;
        let bar = |share: f64| shade(share * 2.0 - 1.0);
        let names = [
            (0.0, format!("▼ better {}", brief(-most))),
            (0.5, "0".into()),
            (1.0, format!("worse ▲ {}", brief(most))),
        ];
        legend(area, (width.max(WIDTH as i32 / 2) - 290, height), bar, &names)
    })
}

fn tile(figures: &Figures, scale: Symlog, most: f64) -> Option<Tile> {
    let versus = figures.versus.as_ref()?;
    let value = versus.delta_xent.value?;
    let text = brief(value);
    let share = if most > 0.0 { scale.at(value) / scale.at(most) } else { 0.0 };
    Some(match Level::of(versus) {
        Level::Better => Tile { colour: shade(share), text: format!("{text} ▼") },
        level if level.is_worse() => Tile { colour: shade(share), text: format!("{text} ▲") },
        Level::TooFew => Tile { colour: PAPER, text: format!("({text})") },
        _ => Tile { colour: NEUTRAL, text },
    })
}

/// From blue at -1 to orange at 1. Some colour remains at the smallest difference.
fn shade(share: f64) -> RGBColor {
    let full = if share < 0.0 { BLUE } else { ORANGE };
    mix(PAPER, full, 0.12 + 0.78 * share.abs())
}

fn description(group: &Group<'_>, stages: &[&Row<'_>], names: &[&str]) -> String {
    let worst = names.iter().flat_map(|name| stages.iter().map(move |row| (*name, *row)));
    let worst = worst.filter_map(|(name, row)| {
        let versus = row.subset(name)?.0.versus.as_ref()?;
        Level::of(versus).is_worse().then_some((versus.delta_xent.value?, name, row))
    });
    let worst = worst.max_by(|a, b| a.0.total_cmp(&b.0));
    let said = worst.map_or_else(
        || "No subset is significantly worse in any stage.".to_owned(),
        |(value, name, row)| {
            let (name, stage) = (shorten(name, 60), shorten(&row.record.stage, 60));
            format!("The largest significant loss is {value:+.4} on {name} with {stage}.")
        },
    );
    let baseline = group.baseline.map_or_else(String::new, |b| clean(&b.stage));
    format!(
        "Difference of xent to {baseline}, nats a token, in {} subsets and {} stages: ▲ worse, ▼ better, no \
         mark where the interval holds zero, in brackets where there are too few documents. {said}",
        names.len(),
        stages.len()
    )
}
