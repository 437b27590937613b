//! From a model to a rewritten model: find the Linear layers, choose a format for each, replace them.

pub mod filter;
pub mod lowering;
pub mod roles;
pub mod sites;

pub use filter::{Filter, FilterError, Select};
pub use lowering::Lowering;
pub use sites::{
    Bias, BiasShape, Layout, Origin, PathSource, Role, Site, SiteScan, Skipped, Weight,
};
