//! The two tensors that one quantisation of a weight makes.

use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;

use crate::onnx::{self, Payload};

/// Codes and scales, `lens` bytes each: `quantize` runs when either is written, and the other one
/// is kept only until it is written too.
pub(super) fn payloads(
    lens: [u64; 2],
    quantize: impl Fn() -> onnx::Result<[Bytes; 2]> + Send + Sync + 'static,
) -> (Payload, Payload) {
    let waiting = Mutex::new([None, None]);
    let take = Arc::new(move |which: usize| {
        let mut waiting = waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting[which].is_none() {
            *waiting = quantize()?.map(Some);
        }
        Ok(waiting[which].take().unwrap_or_default())
    });
    let other = take.clone();
    (
        Payload::Lazy { len: lens[0], make: Arc::new(move || take(0)) },
        Payload::Lazy { len: lens[1], make: Arc::new(move || other(1)) },
    )
}
