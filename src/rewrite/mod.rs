//! From a model to a rewritten model: find the Linear layers, choose a format for each, replace them.
//!
//! ```text
//! Model --find_sites(filter)--> SiteScan --RewritePlan::new(recipe)--> RewritePlan --execute--> Model
//! ```
//! Searching and planning are pure; every candidate ends in `sites` or in `skipped` with its reason.
//! [`rewrite_file`] does it all from file to file, for the command and for mxeval's stages alike.

pub mod base;
mod buffers;
pub mod checkpoint;
mod error;
pub mod execute;
pub mod filter;
mod inline;
pub mod layers;
mod lower;
pub mod lowering;
mod notes;
mod patch;
pub mod paths;
mod patterns;
pub mod plan;
pub mod products;
pub mod recipe;
pub mod roles;
mod run;
mod scan;
pub mod sites;
mod sqnr;
mod sweep;
mod table;
pub mod tiers;
mod weights;

pub use checkpoint::{Checkpoint, CheckpointError, CheckpointUse};
pub use error::RewriteError;
pub use execute::{ExecuteError, PLAN_KEY, execute, execute_noting};
pub use filter::{Filter, FilterError, Select};
pub use layers::LayerRange;
pub use lowering::{BaseDtype, Lowering};
pub use notes::Notes;
pub use patch::MODULE_PATH_KEY;
pub use plan::{PlannedSite, RewritePlan, WeightSource};
pub use products::{PlannedProduct, Product};
pub use recipe::{Activation, BUILT_IN, Recipe, RecipeError, RewriteOptions, Rule, SiteFormat};
pub use run::{
    RewriteReport, SHA256_KEY, convert_file, default_output, plan_file, plan_model, require_sites,
    rewrite_file, rewrite_file_telling,
};
pub use scan::find_sites;
pub use sites::{
    Bias, BiasShape, Experts, Layout, PathSource, Region, Role, Site, SiteScan, Skipped, Weight,
};
pub use sqnr::measure_plan;
pub(crate) use table::align;
pub use table::{checkpoint_line, plan_table};
pub use tiers::Tier;
