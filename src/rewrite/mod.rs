//! From a model to a rewritten model: find the Linear layers, choose a format for each, replace them.

pub mod execute;
pub mod filter;
mod lower;
pub mod lowering;
mod patch;
pub mod paths;
mod patterns;
pub mod plan;
pub mod recipe;
pub mod roles;
mod scan;
pub mod sites;
pub mod tiers;
mod weights;

pub use execute::{ExecuteError, PLAN_KEY, execute};
pub use filter::{Filter, FilterError, Select};
pub use lowering::Lowering;
pub use patch::MODULE_PATH_KEY;
pub use plan::{PlannedSite, RewritePlan};
pub use recipe::{Activation, Recipe, RecipeError, RewriteOptions, Rule, SiteFormat};
pub use scan::find_sites;
pub use sites::{
    Bias, BiasShape, Layout, Origin, PathSource, Role, Site, SiteScan, Skipped, Weight,
};
pub use tiers::Tier;
