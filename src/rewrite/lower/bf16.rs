//! bf16.
use crate::{onnx::Model, rewrite::execute::ExecuteError};
pub(crate) fn round(_model: &Model) -> Result<Model, ExecuteError> {
    Err(ExecuteError::Unsupported { lowering: "bf16", reason: "not built yet".into() })
}
