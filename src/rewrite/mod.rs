//! From a model to a rewritten model: find the Linear layers, choose a format for each, replace them.

pub mod filter;
pub mod lowering;
pub mod paths;
mod patterns;
pub mod plan;
pub mod recipe;
pub mod roles;
mod scan;
pub mod sites;
pub mod tiers;

pub use filter::{Filter, FilterError, Select};
pub use lowering::Lowering;
pub use plan::{PlannedSite, RewritePlan};
pub use recipe::{Activation, Recipe, RecipeError, RewriteOptions, Rule, SiteFormat};
pub use scan::find_sites;
pub use sites::{
    Bias, BiasShape, Layout, Origin, PathSource, Role, Site, SiteScan, Skipped, Weight,
};
pub use tiers::Tier;
