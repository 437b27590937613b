//! report.html: one file that needs no other, no network and no script.

use super::number::clean;
use super::page::{page, scroll};
use super::table::{self, COST, Cell, Column, DIVERGENCE, Group, Level, QUALITY, Row};
use super::{Report, facts, figures, summary};
use crate::eval::record::Status;
use maud::{Markup, html};

/// The page of a run.
pub fn html(report: &Report<'_>) -> String {
    let groups = table::groups(report.records);
    let body = html! {
        h1 { "mxeval" }
        @if let Some(date) = report.facts.get("date").and_then(|date| date.as_str()) {
            p.dim { "Run of " (clean(date)) }
        }
        @for remark in summary::remarks(report.records) { p.alarm role="note" { (remark) } }
        (contents(report, &groups))
        main {
            @for (index, group) in groups.iter().enumerate() { (model(report, index, group)) }
            @if let Some(sensitivity) = report.sensitivity { (figures::of_sites(sensitivity)) }
            h2 #definition { "How the figures are defined" }
            p { (clean(report.definition)) }
            p { (summary::LEGEND) }
            (run(report))
        }
    };
    let title = match groups.as_slice() {
        [group] => format!("mxeval: {}", group.name),
        _ => format!("mxeval: {} models", groups.len()),
    };
    page(&title, &body)
}

fn contents(report: &Report<'_>, groups: &[Group<'_>]) -> Markup {
    html! {
        nav aria-label="Contents" {
            ul {
                @for (index, group) in groups.iter().enumerate() {
                    li { a href={ "#model-" (index) } { (clean(group.name)) } }
                }
                @if report.sensitivity.is_some() { li { a href="#sensitivity" { "Sensitivity" } } }
                li { a href="#definition" { "How the figures are defined" } }
                li { a href="#run" { "The run, and how to repeat it" } }
            }
        }
    }
}

fn model(report: &Report<'_>, index: usize, group: &Group<'_>) -> Markup {
    let notes: Vec<_> = group.notes().collect();
    let divergence = grid(group, DIVERGENCE);
    html! {
        section {
            h2 id={ "model-" (index) } { (clean(group.name)) }
            ul { @for line in summary::summary(group) { li { (line) } } }
            h3 { "Quality" }
            (scroll("Quality", &grid(group, QUALITY)))
            @if group.statistics().is_some() { (key()) }
            @if !notes.is_empty() {
                ul {
                    @for (stage, status, reason) in &notes {
                        li { code { (clean(stage)) } " " (status.name()) ": " (reason) }
                    }
                }
            }
            h3 { "Size and speed" }
            (scroll("Size and speed", &grid(group, COST)))
            (figures::of_group(group, report.front, &divergence))
        }
    }
}

/// A row a stage; stages that say nothing are in the first table alone.
fn grid(group: &Group<'_>, columns: &[Column]) -> Markup {
    let columns = table::present(columns, &group.rows);
    let first = columns.iter().any(|column| column.title == "status");
    let says = |row: &&Row<'_>| {
        first
            || columns
                .iter()
                .skip(1)
                .any(|column| (column.cell)(row).main != super::number::NOTHING)
    };
    html! {
        table {
            thead {
                tr {
                    @for column in &columns {
                        @match (column.title, column.text) {
                            ("stage", _) => { th.name scope="col" { "stage" } }
                            (title, true) => { th.text scope="col" { (title) } }
                            (title, false) => { th scope="col" { (title) } }
                        }
                    }
                }
            }
            tbody {
                @for row in group.rows.iter().filter(says) {
                    tr class=(state(row)) {
                        @for column in &columns { (cell(row, column)) }
                    }
                }
            }
        }
    }
}

fn state(row: &Row<'_>) -> &'static str {
    match row.record.status {
        Status::Failed => "failed",
        Status::Skipped => "skipped",
        Status::Ok | Status::Partial if row.is_baseline => "base",
        Status::Ok | Status::Partial => "",
    }
}

fn cell(row: &Row<'_>, column: &Column) -> Markup {
    let Cell { main, aside } = (column.cell)(row);
    // Of the differences, those that the verdict is about.
    let coloured = ["verdict", "Δppl %", "Δxent"].contains(&column.title);
    let level = row.level();
    let class = match (coloured && level != Level::Unknown, column.text) {
        (true, true) => format!("text {}", level.class()),
        (true, false) => level.class().to_owned(),
        (false, true) => "text".to_owned(),
        (false, false) => String::new(),
    };
    html! {
        @if column.title == "stage" {
            th.name scope="row" { (main) }
        } @else {
            td class=[Some(class).filter(|class| !class.is_empty())] {
                (main)
                @if let Some(aside) = aside { small { (aside) } }
            }
        }
    }
}

/// What colours and signs mean.
fn key() -> Markup {
    let meaning = |level: Level| match level {
        Level::Small => "by less than 1 % of ppl",
        Level::Medium => "by less than 10 %",
        Level::Large => "by 10 % or more",
        _ => "",
    };
    let all =
        [Level::Better, Level::Same, Level::Small, Level::Medium, Level::Large, Level::TooFew];
    html! {
        p.key {
            @for level in all {
                span class=(level.class()) { (level.sign()) " " (level.word()) " " (meaning(level)) }
            }
        }
    }
}

fn run(report: &Report<'_>) -> Markup {
    html! {
        h2 #run { "The run" }
        @if let Some(command) = facts::command(report.facts) {
            h3 { "To repeat it" }
            p { "In the folder where it was started, paths being as they were given:" }
            pre { code { (command) } }
        }
        h3 { "Where the figures come from" }
        dl {
            @for (name, value) in facts::facts(report.facts) {
                dt { (name) }
                dd { code { (value) } }
            }
        }
    }
}
