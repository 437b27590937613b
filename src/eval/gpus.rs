//! The GPUs of this machine: from the driver which there are, from NVML what is free on them.

use super::runtime::Runtime;
use nvml_wrapper::Nvml;
use std::path::Path;

/// Device memory at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Bytes that nobody uses.
    pub free: u64,
    /// All bytes.
    pub total: u64,
}

impl Memory {
    /// Free memory as a share of all.
    pub fn free_ratio(&self) -> f64 {
        self.free as f64 / self.total.max(1) as f64
    }

    /// Bytes in use, by whomever.
    pub fn used(&self) -> u64 {
        self.total.saturating_sub(self.free)
    }
}

/// A GPU that this process sees.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gpu {
    /// CUDA ordinal.
    pub ordinal: u32,
    /// Product name.
    pub name: String,
    /// UUID without its `GPU-` or `MIG-`.
    pub uuid: String,
    /// Compute capability, major and minor.
    pub compute_capability: (u32, u32),
    /// Its memory when it was looked at, or why NVML does not say.
    pub memory: Result<Memory, String>,
}

/// What decides where a run can take place; a test puts its own in place of the real one.
pub trait Machine {
    /// The GPUs, by CUDA ordinal.
    ///
    /// # Errors
    /// What is missing and what to do.
    fn gpus(&self) -> Result<Vec<Gpu>, String>;

    /// Whether ONNX Runtime can run on them.
    ///
    /// # Errors
    /// What is missing and what to do.
    fn provider(&self) -> Result<(), String>;
}

/// This machine with this ONNX Runtime.
#[derive(Clone, Copy, Debug)]
pub struct Local<'a>(pub &'a Runtime);

impl Machine for Local<'_> {
    fn gpus(&self) -> Result<Vec<Gpu>, String> {
        let devices = mx_kernels::cuda::devices().map_err(|e| e.to_string())?;
        if devices.is_empty() {
            let text = "the NVIDIA driver shows no device (is CUDA_VISIBLE_DEVICES empty?)";
            return Err(text.into());
        }
        let nvml = Nvml::init().map_err(|e| format!("NVML is not available: {e}"));
        let gpu = |device: mx_kernels::cuda::DeviceInfo| Gpu {
            ordinal: device.ordinal,
            name: device.name,
            memory: match &nvml {
                Ok(nvml) => memory(nvml, &device.uuid),
                Err(reason) => Err(reason.clone()),
            },
            uuid: device.uuid,
            compute_capability: device.compute_capability,
        };
        Ok(devices.into_iter().map(gpu).collect())
    }

    fn provider(&self) -> Result<(), String> {
        let library = &self.0.library;
        let advice = "install onnxruntime-gpu (the version of mxeval's ONNX Runtime) and pass its \
                      capi/libonnxruntime.so.* with --ort-lib or ORT_DYLIB_PATH";
        if !self.0.has_cuda() {
            return Err(format!(
                "{} was built without the CUDA provider: {advice}",
                library.display()
            ));
        }
        // Links are followed as the loader does: the providers lie beside the file itself.
        let file = library.canonicalize().unwrap_or_else(|_| library.clone());
        let folder = file.parent().unwrap_or(Path::new("."));
        for name in PROVIDER_LIBRARIES {
            if !folder.join(name).is_file() {
                return Err(format!("{name} is missing in {}: {advice}", folder.display()));
            }
        }
        self.0.probe_cuda().map_err(|reason| {
            format!(
                "ONNX Runtime cannot load its CUDA provider ({reason}); the CUDA libraries that it was \
                 built for have to be on LD_LIBRARY_PATH"
            )
        })
    }
}

/// What lies beside libonnxruntime where it can use a GPU.
#[cfg(windows)]
const PROVIDER_LIBRARIES: [&str; 2] =
    ["onnxruntime_providers_shared.dll", "onnxruntime_providers_cuda.dll"];
#[cfg(not(windows))]
const PROVIDER_LIBRARIES: [&str; 2] =
    ["libonnxruntime_providers_shared.so", "libonnxruntime_providers_cuda.so"];

/// Memory of the device with this UUID, which may be a MIG instance.
fn memory(nvml: &Nvml, uuid: &str) -> Result<Memory, String> {
    let device = nvml
        .device_by_uuid(format!("GPU-{uuid}"))
        .or_else(|_| nvml.device_by_uuid(format!("MIG-{uuid}")))
        .map_err(|e| format!("NVML does not know device {uuid}: {e}"))?;
    let info = device.memory_info().map_err(|e| format!("NVML: {e}"))?;
    Ok(Memory { free: info.free, total: info.total })
}

/// Asks NVML for the memory in use on some GPUs.
#[derive(Debug)]
pub struct MemoryProbe {
    nvml: Nvml,
}

impl MemoryProbe {
    /// `None` where there is no NVML.
    pub fn new() -> Option<Self> {
        Nvml::init().ok().map(|nvml| Self { nvml })
    }

    /// Bytes in use on a GPU.
    pub fn used(&self, uuid: &str) -> Option<u64> {
        memory(&self.nvml, uuid).ok().map(|memory| memory.used())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_as_a_share() {
        let memory = Memory { free: 30, total: 120 };
        assert_eq!((memory.free_ratio(), memory.used()), (0.25, 90));
        assert_eq!(Memory { free: 0, total: 0 }.free_ratio(), 0.0);
    }
}
