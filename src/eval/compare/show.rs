//! Runs side by side, as text and as a page.

use super::{Compared, Delta, Kind, Remark, Side};
use crate::eval::figures::Verdict;
use crate::eval::record::Record;
use crate::eval::report::{Alignment, align, clean, page, plain, plus_minus, signed};
use maud::{Markup, html};
use std::fmt::Write as _;

const COLUMNS: [(&str, Alignment); 13] = [
    ("stage", Alignment::Left),
    ("run", Alignment::Left),
    ("ppl", Alignment::Right),
    ("Δppl %", Alignment::Right),
    ("xent", Alignment::Right),
    ("Δxent", Alignment::Right),
    ("bits/byte", Alignment::Right),
    ("Δbits/byte", Alignment::Right),
    ("size MB", Alignment::Right),
    ("tok/s", Alignment::Right),
    ("speed ×", Alignment::Right),
    ("verdict", Alignment::Left),
    ("status", Alignment::Left),
];

/// What the columns mean.
const LEGEND: &str = "Differences are to run A. A ± is half of a 95 % interval, paired by document (scores/ of both \
runs); without one there is no verdict. - is what is not there or cannot be compared.";

impl Compared {
    /// A table with its remarks first.
    pub fn text(&self) -> String {
        let mut out = String::new();
        for (index, folder) in self.folders.iter().enumerate() {
            let _ = writeln!(out, "{}  {}", letter(index), clean(folder));
        }
        out.push('\n');
        for remark in &self.remarks {
            let _ = writeln!(out, "{}{}", alarm(remark.kind), clean(&remark.text));
        }
        if !self.remarks.is_empty() {
            out.push('\n');
        }
        let mut rows = vec![COLUMNS.map(|column| column.0.to_owned()).to_vec()];
        rows.extend(self.cells().into_iter().map(|(_, cells)| cells));
        let alignments: Vec<_> = COLUMNS.iter().map(|column| column.1).collect();
        out.push_str(&align(&alignments, &rows));
        let _ = write!(out, "\n{LEGEND}\n");
        out
    }

    /// The same as one HTML file that needs no other.
    pub fn html(&self) -> String {
        let body = html! {
            h1 { "mxeval compare" }
            dl {
                @for (index, folder) in self.folders.iter().enumerate() {
                    dt { (letter(index)) }
                    dd { code { (clean(folder)) } }
                }
            }
            @for remark in &self.remarks { (note(remark)) }
            main {
                (page::scroll("Stages side by side", &self.table()))
                p { (LEGEND) }
            }
        };
        page::page("mxeval compare", &body)
    }

    fn table(&self) -> Markup {
        html! {
            table {
                thead {
                    tr {
                        @for (index, (title, alignment)) in COLUMNS.iter().enumerate() {
                            th.name[index == 0] .text[*alignment == Alignment::Left] scope="col" { (title) }
                        }
                    }
                }
                tbody {
                    @for (verdict, cells) in self.cells() {
                        tr {
                            @for (index, cell) in cells.iter().enumerate() {
                                @if index == 0 {
                                    th.name scope="row" { (cell) }
                                } @else {
                                    td class=(class(index, verdict)) { (cell) }
                                }
                            }
                        }
                    }
                }
            }
        }
    }

    /// A line a stage and run.
    fn cells(&self) -> Vec<(Option<Verdict>, Vec<String>)> {
        let mut out = Vec::new();
        for row in &self.rows {
            let sides = row.sides.iter().enumerate();
            for (place, (index, side)) in
                sides.filter_map(|(index, side)| Some((index, side.as_ref()?))).enumerate()
            {
                // The name once, above its runs.
                let stage = if place == 0 { clean(&row.stage) } else { String::new() };
                let verdict = side.delta.and_then(|delta| delta.verdict);
                out.push((verdict, line(stage, letter(index), side)));
            }
        }
        out
    }
}

fn line(stage: String, letter: String, side: &Side) -> Vec<String> {
    let Side { record, delta } = side;
    let of = |field: fn(&Delta) -> Option<f64>| delta.as_ref().and_then(field);
    let size = |record: &Record| record.model_bytes.map(|bytes| bytes as f64 / 1e6);
    let xent = delta.as_ref().and_then(|delta| delta.xent);
    vec![
        stage,
        letter,
        plain(record.ppl, 3),
        signed(of(|d| d.ppl_percent), 2),
        plain(record.xent, 5),
        xent.map_or_else(|| "-".into(), |xent| plus_minus(&xent, 5)),
        plain(record.bits_per_byte, 4),
        signed(of(|d| d.bits_per_byte), 4),
        plain(size(record), 2),
        plain(record.tokens_per_second, 0),
        plain(of(|d| d.speed_ratio), 2),
        delta.and_then(|delta| delta.verdict).map_or("-", word).into(),
        record.status.name().into(),
    ]
}

fn word(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Worse => "▲ worse",
        Verdict::Better => "▼ better",
        Verdict::NoSignificantDifference => "≈ no difference",
        Verdict::TooFewDocuments => "? too few documents",
        Verdict::NotFinite => "! not finite",
    }
}

fn class(column: usize, verdict: Option<Verdict>) -> String {
    let text = if COLUMNS[column].1 == Alignment::Left { "text" } else { "" };
    let coloured = ["Δppl %", "Δxent", "verdict"].contains(&COLUMNS[column].0);
    let level = match verdict.filter(|_| coloured) {
        Some(Verdict::Worse) => "worse2",
        Some(Verdict::Better) => "better",
        Some(Verdict::NoSignificantDifference) => "same",
        Some(Verdict::TooFewDocuments | Verdict::NotFinite) | None => "",
    };
    format!("{text} {level}").trim().to_owned()
}

/// A, B, C, ...; numbers after the alphabet.
fn letter(index: usize) -> String {
    match u8::try_from(index) {
        Ok(index @ 0..26) => char::from(b'A' + index).to_string(),
        _ => (index + 1).to_string(),
    }
}

fn alarm(kind: Kind) -> &'static str {
    match kind {
        Kind::NotComparable => "NOT COMPARABLE: ",
        Kind::OnlyBitsPerByte => "ONLY BITS/BYTE IS COMPARABLE: ",
        Kind::Note => "note: ",
    }
}

fn note(remark: &Remark) -> Markup {
    let text = clean(&remark.text);
    match remark.kind {
        Kind::NotComparable => {
            html! { p.alarm role="alert" { strong { "Not comparable" } (text) } }
        }
        Kind::OnlyBitsPerByte => {
            html! { p.alarm role="alert" { strong { "Only bits/byte is comparable" } (text) } }
        }
        Kind::Note => html! { p.note { (text) } },
    }
}
