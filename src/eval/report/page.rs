//! What the pages share: head, style, tables, figures.

use super::number::clean;
use super::plot::{Missing, Plot};
use maud::{DOCTYPE, Markup, PreEscaped, html};

/// One file, without a reference to any other: the policy holds the browser to it.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; img-src data:";
const STYLE: &str = include_str!("style.css");

/// A page.
pub(crate) fn page(title: &str, body: &Markup) -> String {
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta http-equiv="Content-Security-Policy" content=(POLICY);
                meta name="generator" content=(concat!("mxeval ", env!("CARGO_PKG_VERSION")));
                link rel="icon" href="data:,";
                title { (clean(title)) }
                style { (PreEscaped(STYLE)) }
            }
            body { (body) }
        }
    };
    page.into_string()
}

/// A table that scrolls by itself when the page is narrow; by keyboard, too.
pub(crate) fn scroll(label: &str, table: &Markup) -> Markup {
    html! {
        div.scroll tabindex="0" role="region" aria-label=(clean(label)) { (table) }
    }
}

/// A plot with its caption and the table of its figures, or why there is none.
pub(super) fn figure(name: &str, plot: Result<Plot, Missing>, table: &Markup) -> Markup {
    match plot {
        Err(reason) => html! {
            p.dim { "No plot “" (name) "”: " (clean(&reason)) "." }
        },
        Ok(plot) => {
            let width = width(&plot.svg);
            // Below this the text would be too small to read, so it scrolls.
            let least = format!("min-width:{}px;max-width:{}px", width * 9 / 10, width * 3 / 2);
            let svg = plot.svg.replacen("<svg ", &format!("<svg style=\"{least}\" "), 1);
            html! {
                figure {
                    h3 { (plot.title) }
                    (scroll(&plot.title, &PreEscaped(svg)))
                    figcaption { (plot.description) }
                    @if !table.0.is_empty() {
                        details {
                            summary { "Figures of this plot" }
                            (scroll(&format!("Figures: {}", plot.title), table))
                        }
                    }
                }
            }
        }
    }
}

/// From the plot's own view box.
fn width(svg: &str) -> u32 {
    let numbers = svg.split_once("viewBox=\"0 0 ").map_or("", |(_, rest)| rest);
    numbers.split(' ').next().and_then(|width| width.parse().ok()).unwrap_or(760)
}

/// A table of text: the first column names rows, the others are numbers.
pub(super) fn plain_table(titles: &[&str], rows: &[Vec<String>]) -> Markup {
    html! {
        table {
            thead {
                tr {
                    @for (index, title) in titles.iter().enumerate() {
                        th.name[index == 0] scope="col" { (title) }
                    }
                }
            }
            tbody {
                @for row in rows {
                    tr {
                        @for (index, cell) in row.iter().enumerate() {
                            @if index == 0 { th.name scope="row" { (clean(cell)) } }
                            @else { td { (clean(cell)) } }
                        }
                    }
                }
            }
        }
    }
}
