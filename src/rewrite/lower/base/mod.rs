//! The whole graph in another float type: what a GPU runs when it is asked for bfloat16, float16 or
//! float32.
//!
//! The model's *own* type is that of most of its constants. Where it is float32, only *model* values
//! change: what is computed from rows of an embedding, from float graph inputs, from products with a
//! constant weight (as in [`super::bf16`]). Positions, rotary angles and masks stay in float32 and are
//! cast where they enter a model operation. Where the own type is a 16-bit one, every value of it
//! changes: what the model computes in float32, it does so on purpose, by Casts of its own.
//!
//! - Constants that only operations in the new type read are stored in it, half to even, what is
//!   finite staying finite; others are cast by the graph.
//! - An operator that ONNX Runtime's CUDA provider has no kernel for in the new type ([`kernels`])
//!   computes in float32 between Casts. In a float32 model so do the insides of norms, SiLU and GELU
//!   (in 16 bits, ONNX Runtime's fused kernel rounds after every step of a sigmoid), and operations
//!   with a number of the formula that the new type cannot hold (1/sqrt 96).
//! - What may hold a finite number beyond the new type's range (-3.4e38 in a mask) is limited to it
//!   before its Cast.
//! - Graph inputs and outputs keep names and types, through Casts; the value in the new type behind
//!   such an output is named `<output>.<type>`. Sub-graphs are converted like the main graph, with
//!   Casts at their inputs and outputs; operators that are not known, model-local functions among
//!   them, keep their types.
//! - But a key-value cache that only GroupQueryAttention reads and writes has the new type itself:
//!   ONNX Runtime keeps past and present in one buffer, which a Cast would break.

mod constants;
mod copies;
mod kernels;
mod nodes;
#[cfg(test)]
mod tests;
mod walk;

use std::collections::{HashMap, HashSet};

use super::super::{Notes, execute::ExecuteError, lowering::BaseDtype, patch::collect_names};
use crate::onnx::{DataType, Model};

/// First opset whose operators take bfloat16.
const OPSET: i64 = 13;

/// `model`, which was made from `source`, with everything in `base`.
///
/// # Errors
/// An opset before 13; a value whose type is not known where it must be; a sub-graph or constant that
/// cannot be read.
pub(crate) fn convert(
    source: &Model,
    model: &Model,
    base: BaseDtype,
    notes: &Notes,
) -> Result<Model, ExecuteError> {
    let found = model.opset("").unwrap_or(0);
    if found < OPSET {
        return Err(ExecuteError::Opset { lowering: base.name(), needed: OPSET, found });
    }
    let own = own_type(source);
    if own == DataType::Float && base == BaseDtype::F32 {
        return Ok(model.clone());
    }
    let mut names = HashSet::new();
    collect_names(model.graph(), &mut names)?;
    let types = walk::Types { own, to: base.data_type(), opset: found, label: base.name() };
    // The first pass finds out who reads each constant; its edits are thrown away.
    let mut survey = walk::Conversion::new(model, types, names.clone(), HashSet::new(), notes);
    survey.graph(&mut model.graph().clone(), &walk::Scope::default())?;
    let converted = survey.converted();
    let mut out = model.clone();
    let mut conversion = walk::Conversion::new(model, types, names, converted, notes);
    conversion.graph(out.graph_mut(), &walk::Scope::default())?;
    Ok(out)
}

/// What the value is called that a Cast makes the graph output `name` from.
pub(crate) fn cast_output_name(name: &str, data_type: DataType) -> String {
    format!("{name}.{}", copies::type_label(Some(data_type)))
}

/// The float type that most of the constants have.
fn own_type(model: &Model) -> DataType {
    let mut elements: HashMap<DataType, u64> = HashMap::new();
    for info in model.graph().initializers() {
        if let (Some(data_type), Ok(count)) = (info.data_type(), info.elements()) {
            let sum = elements.entry(data_type).or_default();
            *sum = sum.saturating_add(count);
        }
    }
    let own = [DataType::Float, DataType::Bfloat16, DataType::Float16];
    let count = |data_type: &DataType| elements.get(data_type).copied().unwrap_or(0);
    // The first of equals.
    own.into_iter().rev().max_by_key(count).unwrap_or(DataType::Float)
}
