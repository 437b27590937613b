//! Which sites lose, by layer and role: one map a format.

use super::heat::{Map, Tile, legend};
use super::{INK, Missing, ORANGE, PAPER, Plot, WIDTH, mix, plot, shorten, style, write};
use crate::eval::report::inputs::{FormatSensitivity, Sensitivity, SiteSensitivity};
use crate::eval::report::number::{clean, small};
use plotters::prelude::RGBColor;
use plotters::style::text_anchor::{HPos, VPos};
use std::collections::{BTreeMap, BTreeSet};

const ROW: i32 = 18;
/// Below the darkest by this many decades everything is pale.
const DECADES: f64 = 4.0;

/// The column of sites outside all layers.
type Layer = Option<u64>;

/// What is mapped: KL where every site has it, since it has less noise, else |Δxent|.
pub(in crate::eval::report) fn value(
    sensitivity: &Sensitivity,
) -> (&'static str, fn(&FormatSensitivity) -> Option<f64>) {
    let all = || sensitivity.sites.iter().flat_map(|site| site.formats.values());
    if all().next().is_some() && all().all(|format| format.kl.is_some()) {
        ("KL", |format| format.kl)
    } else {
        ("|Δxent|", |format| format.delta_xent.map(f64::abs))
    }
}

/// The map.
pub(in crate::eval::report) fn sensitivity(sensitivity: &Sensitivity) -> Result<Plot, Missing> {
    let (what, value) = value(sensitivity);
    let sites = &sensitivity.sites;
    let formats: BTreeSet<&str> =
        sites.iter().flat_map(|site| site.formats.keys().map(String::as_str)).collect();
    let of = |site: &SiteSensitivity, format: &str| {
        site.formats.get(format).and_then(value).filter(|v| v.is_finite())
    };
    let values = || sites.iter().flat_map(|s| formats.iter().filter_map(move |f| of(s, f)));
    let most = values().fold(0.0, f64::max);
    if values().next().is_none() {
        return Err("no site has a figure".into());
    }
    let maps: Vec<_> = formats.iter().map(|f| (*f, map(sites, most, |s| of(s, f)))).collect();
    let (mut width, mut height) = (WIDTH as i32 / 2, 0);
    for (_, map) in &maps {
        let size = map.size();
        (width, height) = (width.max(size.0), height + size.1 + 26);
    }
    let description = description(sensitivity, what, &formats, &of);
    let size = (width as u32, (height + 40) as u32);
    plot(size, "Sensitivity by layer and role".into(), description, |area| {
        let mut y = 0;
        for (format, map) in &maps {
            let bold = style(13, INK, HPos::Left, VPos::Center);
            write(area, &shorten(format, 60), (8, y + 14), &bold)?;
            map.draw(area, (0, y + 20))?;
            y += map.size().1 + 26;
        }
        let least = most / 10f64.powf(DECADES);
        let names = [
            (0.0, format!("≤ {}", small(Some(least)))),
            (0.5, format!("{what}, nats a token")),
            (1.0, small(Some(most))),
        ];
        legend(area, (12, y + 6), shade, &names)
    })
}

fn map(sites: &[SiteSensitivity], most: f64, of: impl Fn(&SiteSensitivity) -> Option<f64>) -> Map {
    let mut cells: BTreeMap<(&str, Layer), f64> = BTreeMap::new();
    let mut layers: BTreeSet<Layer> = BTreeSet::new();
    let mut roles: Vec<&str> = Vec::new();
    for site in sites {
        let role = if site.role.is_empty() { "site" } else { &site.role };
        if !roles.contains(&role) {
            roles.push(role);
        }
        layers.insert(site.layer);
        if let Some(value) = of(site) {
            // Of several sites in a place, such as experts, the most sensitive one counts.
            let cell = cells.entry((role, site.layer)).or_insert(value);
            *cell = cell.max(value);
        }
    }
    // Sites outside all layers, such as the head, come last.
    let mut layers: Vec<Layer> = layers.into_iter().collect();
    layers.sort_by_key(|layer| (layer.is_none(), *layer));
    let width = (620 / layers.len().max(1) as i32).clamp(7, 40);
    let every = (22 / width + 1) as usize;
    let name = |(index, layer): (usize, &Layer)| match layer {
        Some(layer) if index % every == 0 => layer.to_string(),
        Some(_) => String::new(),
        None => "-".into(),
    };
    let tile = |role: &str, layer: Layer| {
        let value = *cells.get(&(role, layer))?;
        let share = 1.0 + (value / most).log10() / DECADES;
        Some(Tile { colour: shade(if share.is_nan() { 0.0 } else { share }), text: String::new() })
    };
    Map {
        rows: roles.iter().map(|role| clean(role)).collect(),
        columns: layers.iter().enumerate().map(name).collect(),
        tiles: roles.iter().map(|r| layers.iter().map(|l| tile(r, *l)).collect()).collect(),
        tile: (width, ROW),
        apart: 0,
    }
}

/// From pale to dark: in grey print the order stays.
fn shade(share: f64) -> RGBColor {
    let (low, high) = (RGBColor(0xf3, 0xf3, 0xee), RGBColor(0x5a, 0x1e, 0x00));
    let middle = mix(ORANGE, PAPER, 0.15);
    let share = share.clamp(0.0, 1.0);
    if share < 0.6 { mix(low, middle, share / 0.6) } else { mix(middle, high, (share - 0.6) / 0.4) }
}

fn description(
    sensitivity: &Sensitivity,
    what: &str,
    formats: &BTreeSet<&str>,
    of: &dyn Fn(&SiteSensitivity, &str) -> Option<f64>,
) -> String {
    let all = sensitivity.sites.iter().flat_map(|s| formats.iter().map(move |f| (s, *f)));
    let worst = all.filter_map(|(s, f)| Some((of(s, f)?, s, f))).max_by(|a, b| a.0.total_cmp(&b.0));
    let worst = worst.map_or_else(String::new, |(value, site, format)| {
        format!(
            " The most sensitive is {} in {} with {}.",
            shorten(&site.site, 80),
            shorten(format, 40),
            small(Some(value))
        )
    });
    format!(
        "{what} in nats a token when one site alone takes the format, by layer (across) and role (down); \
         - is outside all layers; {} sites, logarithmic colours, darker is more sensitive.{worst}",
        sensitivity.sites.len()
    )
}
