//! The figures of a page: plots, each with a table that says the same.

use super::inputs::{ParetoPoint, Sensitivity};
use super::number::{NOTHING, clean, plain, plus_minus, signed, small};
use super::page::{figure, plain_table};
use super::plot;
use super::table::{Group, Level, Row};
use crate::eval::figures::Figures;
use maud::{Markup, html};

/// Sites in the table below the map.
const SITES: usize = 25;

/// Everything drawn of one model.
pub(super) fn of_group(group: &Group<'_>, points: &[ParetoPoint], divergence: &Markup) -> Markup {
    let nothing = html! {};
    html! {
        (figure("Loss against bits a weight", plot::bits(group), &nothing))
        (figure("Pareto front", plot::front(group, points), &front_table(group, points)))
        (figure("Loss by subset", plot::subsets(group), &subset_table(group)))
        (figure("KL of tokens", plot::divergence(group), divergence))
        (figure("Speed and memory", plot::cost(group), &nothing))
    }
}

fn front_table(group: &Group<'_>, points: &[ParetoPoint]) -> Markup {
    let (candidates, unit) = plot::candidates(group, points);
    let rows: Vec<_> = candidates
        .iter()
        .map(|c| {
            vec![
                c.name.clone(),
                if c.recipe { "recipe" } else { "stage" }.into(),
                plain(Some(c.size), 2),
                plus_minus(&c.delta_xent, 5),
                if c.on_front { "yes" } else { "no" }.into(),
            ]
        })
        .collect();
    plain_table(&["", "what", unit, "Δxent", "on the front"], &rows)
}

/// Subset by stage: the baseline's figures, and what every stage adds to the loss.
fn subset_table(group: &Group<'_>) -> Markup {
    let names = group.subsets();
    let others: Vec<_> = group.rows.iter().filter(|row| row.versus().is_some()).collect();
    let base = group.rows.iter().find(|row| row.is_baseline).or(group.rows.first());
    let line = |name: &str, of: &dyn Fn(&Row<'_>) -> Option<Figures>| {
        let figures = base.and_then(of);
        let value = |field: fn(&Figures) -> Option<f64>| plain(figures.as_ref().and_then(field), 4);
        html! {
            tr {
                th.name scope="row" { (clean(name)) }
                td { (figures.as_ref().map_or_else(|| NOTHING.into(), |f| f.docs.to_string())) }
                td { (value(|f| f.xent.value)) }
                td { (value(|f| f.bits_per_byte.value)) }
                @for row in &others {
                    @match of(row).and_then(|f| f.versus) {
                        Some(versus) => {
                            @let level = Level::of(&versus);
                            td class=(level.class()) {
                                (plus_minus(&versus.delta_xent, 4)) " " (level.sign())
                            }
                        }
                        None => { td { (NOTHING) } }
                    }
                }
            }
        }
    };
    html! {
        table {
            caption { "Δxent in nats a token; docs, xent and bits/byte are the baseline's" }
            thead {
                tr {
                    th.name scope="col" { "subset" }
                    th scope="col" { "docs" }
                    th scope="col" { "xent" }
                    th scope="col" { "bits/byte" }
                    @for row in &others { th scope="col" { (clean(&row.record.stage)) } }
                }
            }
            tbody {
                (line("all documents (micro)", &|row| row.statistics().map(|s| s.all.clone())))
                (line("mean of subsets (macro)", &|row| row.statistics()?.macro_average.clone()))
                @for name in &names {
                    (line(name, &|row| row.subset(name).map(|(figures, _)| figures.clone())))
                }
            }
        }
    }
}

/// The map of the sites and the most sensitive of them.
pub(super) fn of_sites(sensitivity: &Sensitivity) -> Markup {
    let (_, value) = plot::sensitivity_value(sensitivity);
    let mut sites: Vec<_> = sensitivity
        .sites
        .iter()
        .flat_map(|site| site.formats.iter().map(move |(format, figures)| (site, format, figures)))
        .collect();
    let key = |figures| value(figures).unwrap_or(f64::NEG_INFINITY);
    sites.sort_by(|a, b| key(b.2).total_cmp(&key(a.2)));
    let rows: Vec<_> = sites
        .iter()
        .take(SITES)
        .map(|(site, format, figures)| {
            vec![
                site.site.clone(),
                (*format).clone(),
                plain(figures.bits, 2),
                signed(figures.delta_xent, 5),
                small(figures.kl),
            ]
        })
        .collect();
    let table = plain_table(&["most sensitive sites", "format", "bits", "Δxent", "KL"], &rows);
    html! {
        h2 #sensitivity { "Sensitivity" }
        (figure("Sensitivity by layer and role", plot::sensitivity(sensitivity), &table))
    }
}
