//! What loading a stage's graph showed: device memory, and the kernels that its MX nodes got.

use mx_custom_ops::census::Census;
use serde_json::{Map, Value, json};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Gathered over the devices that a stage is spread over.
#[derive(Debug, Default)]
pub(super) struct Loaded {
    bytes: Mutex<u64>,
    census: Mutex<Option<Census>>,
}

impl Loaded {
    /// Adds device memory taken by loading.
    pub fn add_bytes(&self, bytes: u64) {
        *lock(&self.bytes) += bytes;
    }

    /// Notes a session's kernels; of several sessions the one with the fewest on fp8 tensor cores
    /// stands for all.
    pub fn note(&self, census: Census) {
        let mut noted = lock(&self.census);
        if noted.is_none_or(|noted| census.fp8 < noted.fp8) {
            *noted = Some(census);
        }
    }

    /// For run.json.
    pub fn tell(&self, details: &mut Map<String, Value>) {
        details.insert("loaded_device_bytes".into(), json!(*lock(&self.bytes)));
        if let Some(census) = *lock(&self.census) {
            let nodes = json!({"cuda": census.cuda, "fp8_tensor_cores": census.fp8});
            details.insert("mx_nodes".into(), nodes);
        }
    }

    /// What is to be said of an `nvfp8` stage of which not all of the `sites` layers run on fp8 tensor
    /// cores.
    pub fn without_fp8(&self, sites: u64) -> Option<String> {
        let fp8 = lock(&self.census).map_or(0, |census| census.fp8 as u64);
        (fp8 < sites).then(|| {
            format!(
                "{} of {sites} layers do not run on fp8 tensor cores (cuBLASLt takes multiples of 16 \
                 output features, and has to have an algorithm for the shape)",
                sites - fp8
            )
        })
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_session_with_the_fewest_fp8_kernels_is_told() {
        let loaded = Loaded::default();
        assert!(loaded.without_fp8(1).unwrap().starts_with("1 of 1 layers"));
        for fp8 in [7, 5, 6] {
            loaded.add_bytes(10);
            loaded.note(Census { cpu: 0, cuda: 8, fp8 });
        }
        let mut details = Map::new();
        loaded.tell(&mut details);
        assert_eq!(details["loaded_device_bytes"], 30);
        assert_eq!(details["mx_nodes"], json!({"cuda": 8, "fp8_tensor_cores": 5}));
        assert!(loaded.without_fp8(7).unwrap().starts_with("2 of 7 layers"));
        assert_eq!(loaded.without_fp8(5), None);
    }
}
