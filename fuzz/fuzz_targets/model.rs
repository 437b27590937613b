//! A model from arbitrary bytes through the whole rewrite: read, search, plan, replace, write, read again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mxrewrite::{
    onnx::Model,
    rewrite::{self, Lowering, RewriteOptions, Tier},
};

fuzz_target!(|bytes: &[u8]| {
    // The last byte chooses what layers become; to a model it is one more unknown field, or damage.
    let lowering = Lowering::ALL[usize::from(bytes.last().copied().unwrap_or(0)) % Lowering::ALL.len()];
    let Ok(model) = Model::from_bytes(bytes::Bytes::copy_from_slice(bytes), None) else { return };
    // What was read is written as it was read.
    if let Ok(same) = model.to_bytes() {
        assert!(Model::from_bytes(same, None).is_ok(), "the same model is not read again");
    }
    let options = RewriteOptions {
        tier: Tier::AllLinears,
        include: vec![".*".to_owned()],
        lowering,
        attention: lowering == Lowering::Mx,
        threads: Some(1),
        ..RewriteOptions::default()
    };
    let Ok((model, mut plan)) = rewrite::plan_model(model, &options) else { return };
    let _ = rewrite::plan_table(&plan);
    // Sizes that only dims claim are refused when the weight is read; do not reserve them here.
    if plan.sites.iter().all(|planned| planned.bytes_before < 1 << 24) {
        let _ = rewrite::measure_plan(&model, &mut plan, Some(1));
        let Ok(rewritten) = rewrite::execute(&model, &plan, Some(1)) else { return };
        let Ok(bytes) = rewritten.to_bytes() else { return };
        assert!(Model::from_bytes(bytes, None).is_ok(), "a rewritten model is not read again");
    }
});
