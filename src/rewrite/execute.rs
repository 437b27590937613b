//! A plan carried out: every planned layer replaced, what became unused removed, the plan noted in
//! the model.

use super::{
    Notes, RewritePlan, SiteFormat,
    lower::{Int8, Mx, Qdq, base, bf16, lower_product, qdq},
    lowering::{BaseDtype, Lowering},
    patch::Patch,
    weights::Threads,
};
use crate::onnx::{self, Model};

/// Key of the plan, as JSON, in a rewritten model's metadata.
pub const PLAN_KEY: &str = "mx.plan";

/// Why a plan cannot be carried out.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExecuteError {
    /// A part of the model that cannot be read.
    #[error(transparent)]
    Onnx(#[from] onnx::Error),
    /// One layer cannot be replaced.
    #[error("node '{node}': {reason}")]
    Site {
        /// The layer's node.
        node: String,
        /// Why not.
        reason: String,
    },
    /// The model is too old for a lowering.
    #[error(
        "--lower {lowering} needs opset {needed} or newer, the model imports {found}; export it again"
    )]
    Opset {
        /// Name of the lowering.
        lowering: &'static str,
        /// Version that it needs.
        needed: i64,
        /// Version that the model imports.
        found: i64,
    },
    /// A model or plan that a lowering cannot take.
    #[error("--lower {lowering}: {reason}")]
    Unsupported {
        /// Name of the lowering.
        lowering: &'static str,
        /// Why.
        reason: String,
    },
    /// No threads to quantise with.
    #[error("cannot start {threads} threads: {reason}")]
    Threads {
        /// How many were asked for.
        threads: usize,
        /// Why not.
        reason: String,
    },
}

/// Carries out a plan that was made from this model. Weights are quantised by `threads` threads
/// (`None` = one a processor), one at a time, when the result is written by [`Model::save`] or
/// [`Model::to_bytes`]. Without any layer to replace the model is returned as it is (under
/// [`Lowering::Bf16`] and [`Lowering::Fp16`] the whole graph is rounded or converted, layers or not), but for the plan's base type.
///
/// # Errors
/// A layer or model that the lowering cannot take; a weight that cannot be read.
pub fn execute(
    model: &Model,
    plan: &RewritePlan,
    threads: Option<usize>,
) -> Result<Model, ExecuteError> {
    execute_noting(model, plan, threads, &Notes::default())
}

/// [`execute`], with what there is to know of the result in `notes`; those on weights are taken when
/// the result is written.
///
/// # Errors
/// As [`execute`].
pub fn execute_noting(
    model: &Model,
    plan: &RewritePlan,
    threads: Option<usize>,
    notes: &Notes,
) -> Result<Model, ExecuteError> {
    let threads = Threads::new(threads)?;
    let base = plan.recipe.lowering.base(plan.recipe.base_dtype);
    let whole = plan.recipe.lowering.is_whole_graph();
    let mut out = match whole || plan.is_empty() {
        true => model.clone(),
        false => replace_sites(model, plan, threads)?,
    };
    if let Some(base) = base {
        out = base::convert(model, &out, base, notes)?;
    }
    if plan.recipe.lowering == Lowering::Bf16 && base != Some(BaseDtype::Bf16) {
        out = bf16::round(&out)?;
    }
    if plan.is_empty() && !whole {
        return Ok(out);
    }
    let json = serde_json::to_string(plan).map_err(|error| ExecuteError::Unsupported {
        lowering: plan.recipe.lowering.name(),
        reason: format!("the plan cannot be written as JSON: {error}"),
    })?;
    out.set_metadata(PLAN_KEY, &json);
    Ok(out)
}

/// The model with everything in another float type, no layer replaced.
///
/// # Errors
/// An opset before 13; a value whose type is not known where it must be.
pub fn convert(model: &Model, to: BaseDtype) -> Result<Model, ExecuteError> {
    base::convert(model, model, to, &Notes::default())
}

fn replace_sites(
    model: &Model,
    plan: &RewritePlan,
    threads: Threads,
) -> Result<Model, ExecuteError> {
    let mut patch = Patch::new(model, threads)?;
    let (mut mx, mut int8, mut qdq) = (Mx::default(), Int8::default(), Qdq::default());
    let by_standard = plan.recipe.lowering == Lowering::Qdq;
    for planned in &plan.sites {
        let is_mx = matches!(planned.format, SiteFormat::Mx { .. }) && !by_standard;
        if planned.site.experts.is_some() && !is_mx {
            return Err(ExecuteError::Site {
                node: planned.site.node_name.clone(),
                reason: "experts chosen at run time have no form but mx::MxExpertMatMul".to_owned(),
            });
        }
        match &planned.format {
            SiteFormat::Mx { weight, activation } if by_standard => {
                qdq.lower(&mut patch, planned, weight, activation.as_ref())?;
            }
            SiteFormat::Mx { weight, activation } => {
                mx.lower(&mut patch, planned, weight, activation.as_ref())?;
            }
            SiteFormat::Int8 => int8.lower(&mut patch, planned)?,
            SiteFormat::Bf16 | SiteFormat::Fp16 => {
                return Err(ExecuteError::Unsupported {
                    lowering: plan.recipe.lowering.name(),
                    reason: format!(
                        "{} is a format of whole graphs, not of single layers",
                        planned.format.weight_name()
                    ),
                });
            }
        }
    }
    for planned in &plan.products {
        lower_product(&mut patch, planned)?;
    }
    let mut out = patch.finish()?;
    if by_standard {
        qdq::raise(&mut out, &plan.sites)?;
    }
    Ok(out)
}
