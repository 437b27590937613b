//! What a user should know of an output although nothing failed.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use super::{Lowering, RewritePlan, SiteFormat};

/// Notes that are taken while a model is rewritten and written. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Notes {
    /// By tensor: how many finite numbers lay beyond the range of the type that it was stored in.
    limited: Arc<Mutex<BTreeMap<String, (u64, &'static str)>>>,
}

impl Notes {
    /// Notes how many numbers of a tensor were limited to the largest finite one of type `to`.
    pub(crate) fn limited(&self, tensor: &str, count: u64, to: &'static str) {
        if count > 0 {
            let mut limited = self.limited.lock().unwrap_or_else(PoisonError::into_inner);
            limited.insert(tensor.to_owned(), (count, to));
        }
    }

    /// All notes on the output of `plan`, one a line, once it is written.
    pub fn lines(&self, plan: &RewritePlan) -> Vec<String> {
        let limited = self.limited.lock().unwrap_or_else(PoisonError::into_inner);
        let limited = limited.iter().map(|(tensor, (count, to))| {
            format!(
                "tensor '{tensor}': {count} finite numbers beyond the range of {to} became its largest"
            )
        });
        loading(plan).into_iter().chain(limited).collect()
    }
}

/// Why ONNX Runtime does not load the output; measured with version 1.31.1 (docs/onnx.md).
fn loading(plan: &RewritePlan) -> Option<String> {
    if plan.recipe.lowering != Lowering::Qdq || plan.sites.is_empty() {
        return None;
    }
    let is_fp6 = |spec: &mx_kernels::QuantSpec| spec.format.bits() == 6;
    let has_fp6 = plan.sites.iter().any(|planned| match &planned.format {
        SiteFormat::Mx { weight, activation } => {
            is_fp6(weight) || activation.as_ref().is_some_and(is_fp6)
        }
        _ => false,
    });
    let why = match has_fp6 {
        true => "FLOAT6 needs opset 28 and IR version 14, and it takes 26 and 13",
        false => "it has no DequantizeLinear or QuantizeLinear with FLOAT8E8M0 scales",
    };
    Some(format!(
        "ONNX Runtime 1.31 does not load this file: {why}; onnx's ReferenceEvaluator runs it, and \
         --lower mx makes a file for ONNX Runtime"
    ))
}
