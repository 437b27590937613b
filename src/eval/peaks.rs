//! The most memory that a stage takes.

use super::devices::{Chosen, Device};
use super::process::{PeakDeviceMemory, PeakMemory};
use std::sync::{Mutex, PoisonError};

/// Watches memory until it is taken.
pub(super) struct Peaks {
    resident: PeakMemory,
    /// With what was in use before the run.
    device: Mutex<Option<(PeakDeviceMemory, u64)>>,
    taken: Mutex<Option<[Option<u64>; 2]>>,
}

impl Peaks {
    /// Begins to watch the process and the team's GPUs.
    pub fn start(chosen: &Chosen, team: &[Device]) -> Self {
        let device = Mutex::new(watch(chosen, team));
        Self { resident: PeakMemory::start(), device, taken: Mutex::new(None) }
    }

    /// Reads the peaks; what comes later does not count.
    pub fn take(&self) {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if taken.is_none() {
            let watch = self.device.lock().unwrap_or_else(PoisonError::into_inner).take();
            let device = watch.and_then(|(watch, before)| Some((watch.bytes()?, before)));
            let device = device.map(|(bytes, before)| bytes.saturating_sub(before));
            *taken = Some([self.resident.bytes(), device]);
        }
    }

    /// Resident and device memory, bytes; what was not taken is not there.
    pub fn bytes(&self) -> [Option<u64>; 2] {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner).unwrap_or_default()
    }
}

/// Watches the memory of the team's GPUs; with it, what was in use before the run.
fn watch(chosen: &Chosen, team: &[Device]) -> Option<(PeakDeviceMemory, u64)> {
    let mut uuids: Vec<String> = Vec::new();
    let mut before = 0;
    for gpu in team.iter().filter_map(|&device| chosen.gpu(device)) {
        if !uuids.contains(&gpu.uuid) {
            before += gpu.memory.as_ref().ok()?.used();
            uuids.push(gpu.uuid.clone());
        }
    }
    let watch = if uuids.is_empty() { None } else { PeakDeviceMemory::start(uuids) };
    watch.map(|watch| (watch, before))
}
