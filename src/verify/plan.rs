//! What a rewritten model says of itself: the plan in its metadata.

use mx_custom_ops::contract::op;
use serde::Deserialize;

use crate::{
    onnx::Model,
    rewrite::{BaseDtype, Lowering, PLAN_KEY},
};

/// As much of a plan as the comparison needs.
#[derive(Debug, Deserialize)]
pub(super) struct Plan {
    pub sites: Vec<Planned>,
    #[serde(default)]
    products: Vec<PlannedProduct>,
    recipe: RecipeHead,
}

/// A planned product of two activations.
#[derive(Debug, Deserialize)]
struct PlannedProduct {
    node: String,
    module_path: Option<String>,
}

/// A node that a rewritten model has to have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Due<'a> {
    pub node: &'a str,
    pub module_path: Option<&'a str>,
    /// Operators that it may be.
    pub ops: &'static [&'static str],
}

/// A planned layer.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Planned {
    pub node: String,
    pub module_path: Option<String>,
    /// Name of its weight in the model that was rewritten.
    #[serde(default)]
    pub initializer: String,
    #[serde(default)]
    pub weight_format: String,
    #[serde(default)]
    pub activation_format: String,
}

#[derive(Debug, Deserialize)]
struct RecipeHead {
    #[serde(default)]
    lowering: String,
    base_dtype: Option<String>,
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

    /// Float type of everything that was not replaced, where it is not the model's own.
    pub fn base_dtype(&self) -> Option<BaseDtype> {
        match self.recipe.lowering.parse() {
            // The whole graph is converted.
            Ok(Lowering::Fp16) => Some(BaseDtype::F16),
            _ => self.recipe.base_dtype.as_deref()?.parse().ok(),
        }
    }

    /// The nodes of domain `mx` that it asks for: of layers and of attention's products.
    pub fn due(&self) -> Vec<Due<'_>> {
        use Lowering::{Bfp16, Mx, NvFp8, NvFp8EmuE4m3, NvFp8EmuE5m2};
        let lowering = self.recipe.lowering.parse::<Lowering>();
        if !matches!(lowering, Ok(Mx | Bfp16 | NvFp8 | NvFp8EmuE4m3 | NvFp8EmuE5m2)) {
            return Vec::new();
        }
        let layers = self.sites.iter().filter(|site| site.weight_format != "int8");
        let layers = layers.map(|site| Due {
            node: &site.node,
            module_path: site.module_path.as_deref(),
            ops: &[op::MX_MATMUL, op::MX_EXPERT_MATMUL],
        });
        let products = self.products.iter().map(|product| Due {
            node: &product.node,
            module_path: product.module_path.as_deref(),
            ops: &[op::MX_ACT_MATMUL],
        });
        layers.chain(products).collect()
    }
}
