//! Speed and memory: a bar a stage, with the ratio to the baseline.

use super::{
    BLUE, FAINT, GREY, INK, Missing, Plot, WIDTH, line, mix, plot, rectangle, shorten, style,
    text_width, write,
};
use crate::eval::report::number::{clean, megabytes, tick};
use crate::eval::report::table::{Group, Row};
use plotters::style::text_anchor::{HPos, VPos};

const ROW: i32 = 22;
const HEAD: i32 = 34;

/// One figure of every stage.
struct Panel {
    title: &'static str,
    value: fn(&Row<'_>) -> Option<f64>,
    /// To the baseline; as measured in turns where that was done.
    ratio: fn(&Row<'_>) -> Option<f64>,
}

const PANELS: [Panel; 4] = [
    Panel {
        title: "scored tokens a second (more is better)",
        value: |row| row.record.tokens_per_second,
        ratio: |row| row.speed_ratio(),
    },
    Panel {
        title: "size of the model, MB",
        value: |row| megabytes(row.record.model_bytes),
        ratio: |row| row.size_ratio(),
    },
    Panel {
        title: "peak memory, MB",
        value: |row| megabytes(row.memory()),
        ratio: |row| {
            let theirs = row.baseline?.peak_device_bytes;
            let theirs = theirs.or(row.baseline?.peak_resident_bytes);
            let theirs = theirs.or(row.baseline?.peak_memory_bytes)?;
            Some(row.memory()? as f64 / theirs as f64).filter(|ratio| ratio.is_finite())
        },
    },
    Panel {
        title: "time to load, s",
        value: |row| row.record.load_seconds,
        ratio: |row| {
            let ratio = row.record.load_seconds? / row.baseline?.load_seconds?;
            Some(ratio).filter(|ratio| ratio.is_finite())
        },
    },
];

/// Speed, size, memory and time to load.
pub(in crate::eval::report) fn cost(group: &Group<'_>) -> Result<Plot, Missing> {
    let has = |panel: &&Panel| group.rows.iter().any(|row| (panel.value)(row).is_some());
    let panels: Vec<&Panel> = PANELS.iter().filter(has).collect();
    if panels.is_empty() {
        return Err("no stage has a speed, a size or a peak of memory".into());
    }
    let rows: Vec<&Row<'_>> = group
        .rows
        .iter()
        .filter(|row| panels.iter().any(|panel| (panel.value)(row).is_some()))
        .collect();
    let names: Vec<_> = rows.iter().map(|row| shorten(&row.record.stage, 24)).collect();
    let left = names.iter().map(|name| text_width(name, 12)).max().unwrap_or(0) + 14;
    let tall = HEAD + rows.len() as i32 * ROW + 12;
    let height = panels.len() as i32 * tall;
    let size = (WIDTH, height as u32);
    plot(size, "Speed and memory".into(), description(group, &rows), |area| {
        for (index, panel) in panels.iter().enumerate() {
            let top = index as i32 * tall;
            let head = style(13, INK, HPos::Left, VPos::Center);
            write(area, panel.title, (left, top + 18), &head)?;
            let most = rows.iter().filter_map(|row| (panel.value)(row)).fold(0.0, f64::max);
            let room = WIDTH as i32 - left - 130;
            for (at, (row, name)) in rows.iter().zip(&names).enumerate() {
                let y = top + HEAD + at as i32 * ROW;
                let end = style(12, INK, HPos::Right, VPos::Center);
                write(area, name, (left - 8, y + ROW / 2), &end)?;
                let Some(value) = (panel.value)(row).filter(|v| v.is_finite()) else { continue };
                let share = if most > 0.0 { value / most } else { 0.0 };
                let to = left + (share * f64::from(room)) as i32;
                let fill = if row.is_baseline { GREY } else { mix(BLUE, FAINT, 0.3) };
                rectangle(area, (left, y + 3), (to.max(left + 1), y + ROW - 3), fill)?;
                let ratio = (panel.ratio)(row).map(|r| format!(" ({r:.2}×)")).unwrap_or_default();
                let text = format!("{}{ratio}", tick(round(value)));
                let ink = style(12, INK, HPos::Left, VPos::Center);
                write(area, &text, (to + 6, y + ROW / 2), &ink)?;
            }
            line(area, &[(left, top + HEAD), (left, top + tall - 12)], GREY)?;
        }
        Ok(())
    })
}

/// Three digits are enough beside a bar.
fn round(value: f64) -> f64 {
    match value.abs() {
        v if v >= 100.0 => value.round(),
        v if v >= 10.0 => (value * 10.0).round() / 10.0,
        _ => (value * 100.0).round() / 100.0,
    }
}

fn description(group: &Group<'_>, rows: &[&Row<'_>]) -> String {
    let baseline = group.baseline.map_or_else(|| "the baseline".into(), |b| clean(&b.stage));
    let fastest = rows
        .iter()
        .filter_map(|row| Some((row.record.tokens_per_second?, row)))
        .max_by(|a, b| a.0.total_cmp(&b.0));
    let smallest = rows
        .iter()
        .filter_map(|row| Some((row.record.model_bytes?, row)))
        .min_by_key(|(bytes, _)| *bytes);
    let mut out = format!("Bars of {} stages, with ratios to {baseline}.", rows.len());
    if let Some((speed, row)) = fastest {
        out.push_str(&format!(" Fastest: {}, {speed:.0} tokens/s.", clean(&row.record.stage)));
    }
    if let Some((bytes, row)) = smallest {
        let size = bytes as f64 / 1e6;
        out.push_str(&format!(" Smallest: {}, {size:.2} MB.", clean(&row.record.stage)));
    }
    out
}
