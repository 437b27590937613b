//! How KL is distributed over tokens: one row a stage.

use super::{
    BLUE, FAINT, INK, Missing, ORANGE, PAPER, Plot, WIDTH, line, mix, plot, rectangle, shorten,
    style, text_width, write,
};
use crate::eval::figures::Divergence;
use crate::eval::report::number::{clean, small};
use crate::eval::report::table::Group;
use plotters::style::Color as _;
use plotters::style::text_anchor::{HPos, VPos};

const ROW: i32 = 44;
const TOP: i32 = 34;
/// Bins of `Divergence::histogram` are quarters of a decade, from 1e-9 on.
const BINS_PER_DECADE: f64 = 4.0;
const FIRST: f64 = -9.0;

/// The distributions of all stages that have one.
pub(in crate::eval::report) fn divergence(group: &Group<'_>) -> Result<Plot, Missing> {
    let rows: Vec<(String, &Divergence)> = group
        .rows
        .iter()
        .filter_map(|row| Some((clean(&row.record.stage), row.kl()?)))
        .filter(|(_, kl)| kl.histogram.iter().any(|count| *count > 0))
        .collect();
    if rows.is_empty() {
        return Err("no stage ran beside the baseline".into());
    }
    let (first, last) = occupied(&rows);
    let label = rows.iter().map(|row| text_width(&shorten(&row.0, 24), 12)).max().unwrap_or(0) + 14;
    let right = WIDTH as i32 - 16;
    let x = |bin: f64| {
        let share = (bin - first as f64) / (last + 1 - first) as f64;
        label + (share * f64::from(right - label)).round() as i32
    };
    let at = |kl: f64| x((kl.log10() - FIRST) * BINS_PER_DECADE).clamp(label, right);
    let bottom = TOP + rows.len() as i32 * ROW;
    let height = (bottom + 44) as u32;
    plot((WIDTH, height), "KL of tokens".into(), description(&rows), |area| {
        let centred = style(12, INK, HPos::Center, VPos::Center);
        let key = "bars: share of tokens; line: median; dashes: 99 %; dot: mean";
        write(area, key, ((label + right) / 2, 14), &centred)?;
        let step = if last - first > 32 { 8 } else { 4 };
        for bin in (first..=last + 1).filter(|bin| bin % step == 0) {
            let place = x(bin as f64);
            line(area, &[(place, TOP - 6), (place, bottom + 4)], FAINT)?;
            let power = FIRST + bin as f64 / BINS_PER_DECADE;
            write(area, &format!("1e{power}"), (place, bottom + 14), &centred)?;
        }
        write(
            area,
            "KL of a token, nats (logarithmic)",
            ((label + right) / 2, bottom + 32),
            &centred,
        )?;
        for (index, (name, kl)) in rows.iter().enumerate() {
            let base = TOP + (index as i32 + 1) * ROW - 8;
            let end = style(12, INK, HPos::Right, VPos::Center);
            write(area, &shorten(name, 24), (label - 8, base - ROW / 3), &end)?;
            let most = kl.histogram.iter().copied().max().unwrap_or(1) as f64;
            for (bin, count) in kl.histogram.iter().enumerate().filter(|(_, count)| **count > 0) {
                let tall = (*count as f64 / most * f64::from(ROW - 14)).ceil() as i32;
                let (from, to) = (x(bin as f64), x(bin as f64 + 1.0) - 1);
                rectangle(area, (from, base - tall), (to, base), mix(BLUE, PAPER, 0.45))?;
            }
            line(area, &[(label, base), (right, base)], FAINT)?;
            let mark = |value: Option<f64>| value.filter(|v| *v > 0.0).map(at);
            if let Some(place) = mark(kl.median) {
                line(area, &[(place, base - ROW + 16), (place, base)], INK.stroke_width(2))?;
            }
            if let Some(place) = mark(kl.p99) {
                for y in (0..ROW - 16).step_by(8) {
                    line(
                        area,
                        &[(place, base - y), (place, base - y - 4)],
                        ORANGE.stroke_width(2),
                    )?;
                }
            }
            if let Some(place) = mark(kl.mean.value) {
                let dot = plotters::element::Circle::new((place, base), 4, INK.filled());
                area.draw(&dot)?;
            }
        }
        Ok(())
    })
}

/// The first and the last bin that any stage has tokens in.
fn occupied(rows: &[(String, &Divergence)]) -> (usize, usize) {
    let bins = rows.iter().flat_map(|(_, kl)| {
        kl.histogram.iter().enumerate().filter(|(_, count)| **count > 0).map(|(bin, _)| bin)
    });
    bins.fold((usize::MAX, 0), |(low, high), bin| (low.min(bin), high.max(bin)))
}

fn description(rows: &[(String, &Divergence)]) -> String {
    let by = |a: &&(String, &Divergence), b: &&(String, &Divergence)| {
        a.1.mean.value.unwrap_or(0.0).total_cmp(&b.1.mean.value.unwrap_or(0.0))
    };
    let say = |row: Option<&(String, &Divergence)>| {
        row.map_or_else(String::new, |(name, kl)| {
            format!(
                "{name}: mean {}, median {}, 99 % of tokens below {}",
                small(kl.mean.value),
                small(kl.median),
                small(kl.p99)
            )
        })
    };
    format!(
        "Histogram of KL(baseline || stage) over tokens, {} stages. Closest to the baseline, {}; farthest, {}.",
        rows.len(),
        say(rows.iter().min_by(by)),
        say(rows.iter().max_by(by))
    )
}
