//! What a rewritten model says of itself: the plan in its metadata.

use serde::Deserialize;

use crate::{
    onnx::Model,
    rewrite::{Lowering, PLAN_KEY},
};

/// As much of a plan as the comparison needs.
#[derive(Debug, Deserialize)]
pub(super) struct Plan {
    pub sites: Vec<Planned>,
    recipe: RecipeHead,
}

/// A planned layer.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Planned {
    pub node: String,
    pub module_path: Option<String>,
    #[serde(default)]
    pub weight_format: String,
}

#[derive(Debug, Deserialize)]
struct RecipeHead {
    #[serde(default)]
    lowering: String,
}

impl Plan {
    /// The plan of a model; `None` where there is none.
    ///
    /// # Errors
    /// A sentence: it cannot be read.
    pub fn of(model: &Model) -> Result<Option<Self>, String> {
        let Some((_, text)) = model.metadata().find(|(key, _)| *key == PLAN_KEY) else {
            return Ok(None);
        };
        let plan = serde_json::from_str(text);
        plan.map(Some).map_err(|error| format!("metadata `{PLAN_KEY}` is no plan: {error}"))
    }

    /// Whether a layer is to be a node of domain `mx`.
    pub fn is_mx(&self, planned: &Planned) -> bool {
        use Lowering::{Bfp16, Mx, NvFp8, NvFp8EmuE4m3, NvFp8EmuE5m2};
        let lowering = self.recipe.lowering.parse::<Lowering>();
        planned.weight_format != "int8"
            && matches!(lowering, Ok(Mx | Bfp16 | NvFp8 | NvFp8EmuE4m3 | NvFp8EmuE5m2))
    }
}
