//! Results for people: a table on the terminal, report.md, report.html, and report.csv for others.
//!
//! `table` groups records, `columns` decides what a row says; everything else only writes it down.

mod columns;
mod csv;
mod facts;
#[cfg(test)]
pub(crate) mod fake;
mod figures;
mod html;
mod inputs;
mod markdown;
mod number;
pub(super) mod page;
mod plot;
mod summary;
mod table;
mod terminal;
#[cfg(test)]
mod tests;

pub use csv::{stages as csv, subsets as subsets_csv};
pub use html::html;
pub use inputs::{FormatSensitivity, ParetoPoint, Sensitivity, SensitivityModel, SiteSensitivity};
pub use markdown::markdown;
pub(super) use number::{clean, plain, plus_minus, signed};
pub use terminal::terminal;
pub(super) use terminal::{Alignment, align};

use super::record::Record;
use serde_json::{Map, Value};

/// What a report is made of.
#[derive(Clone, Copy, Debug)]
pub struct Report<'a> {
    /// One record a stage. Those of a model become one table.
    pub records: &'a [Record],
    /// What run.json says.
    pub facts: &'a Map<String, Value>,
    /// How the figures are defined.
    pub definition: &'a str,
    /// What `mxeval sensitivity` found, if it ran.
    pub sensitivity: Option<&'a Sensitivity>,
    /// Recipes of `mxeval search`: size against what they cost. Empty without a search.
    pub front: &'a [ParetoPoint],
}
