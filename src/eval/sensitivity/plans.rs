//! The rewrite of the model to each format.

use crate::eval::error::{Error, Result};
use crate::onnx::Model;
use crate::rewrite::{
    Lowering, PlannedSite, RewriteOptions, RewritePlan, plan_file, require_sites,
};
use mx_kernels::ElementFormat;
use std::path::Path;

/// The same sites in every format.
pub(super) struct Plans {
    /// The model that they are of.
    pub model: Model,
    /// One a format.
    pub plans: Vec<RewritePlan>,
}

impl Plans {
    /// Plans the rewrite to each format.
    ///
    /// # Errors
    /// Options that contradict each other, or nothing to rewrite.
    pub(super) fn new(
        path: &Path,
        rewrite: &RewriteOptions,
        formats: &[ElementFormat],
    ) -> Result<Self> {
        let rewriting = |e: crate::rewrite::RewriteError| Error::Rewrite(e.to_string());
        let mut found: Option<Model> = None;
        let mut plans: Vec<RewritePlan> = Vec::with_capacity(formats.len());
        for &format in formats {
            let format = Some(format);
            let options = RewriteOptions { format, lowering: Lowering::Mx, ..rewrite.clone() };
            let (model, plan) = plan_file(path, &options).map_err(rewriting)?;
            require_sites(path, &plan, &options).map_err(rewriting)?;
            if let Some(first) = plans.first() {
                let nodes = |plan: &RewritePlan| -> Vec<(usize, usize)> {
                    plan.sites
                        .iter()
                        .map(|planned| (planned.site.graph, planned.site.node))
                        .collect()
                };
                if nodes(first) != nodes(&plan) {
                    let text = "the formats do not take the same layers; measure them one by one";
                    return Err(Error::Usage(text.into()));
                }
            }
            found.get_or_insert(model);
            plans.push(plan);
        }
        let model = found.ok_or_else(|| Error::Usage("--mx-format names no format".into()))?;
        Ok(Self { model, plans })
    }

    /// The sites, as the first format plans them.
    pub(super) fn sites(&self) -> &[PlannedSite] {
        self.plans.first().map_or(&[], |plan| &plan.sites)
    }
}
