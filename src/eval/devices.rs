//! Where stages run: what is asked for, what the machine has, and what is chosen.
//!
//! CUDA ordinals are those of the driver, which has applied `CUDA_VISIBLE_DEVICES` and
//! `CUDA_DEVICE_ORDER`; NVML knows the same devices in another order and is asked by UUID.

use super::error::{Error, Result};
use super::gpus::{Gpu, Machine};
use std::fmt;
use std::str::FromStr;

/// A device named on the command line.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Request {
    /// GPUs with free memory, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// These CUDA ordinals; empty = all.
    Cuda(Vec<u32>),
}

impl FromStr for Request {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let unknown =
            || format!("unknown device {text:?}; known are cpu, cuda, cuda:0,1 (ordinals), auto");
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(Vec::new())),
            _ => {
                let ordinals = text.strip_prefix("cuda:").ok_or_else(unknown)?;
                let ordinals: Vec<u32> = ordinals
                    .split(',')
                    .map(|n| n.trim().parse())
                    .collect::<std::result::Result<_, _>>()
                    .map_err(|_| unknown())?;
                match repeated(&ordinals) {
                    Some(twice) => Err(format!(
                        "{text}: device {twice} is named twice; --workers-per-device 2 runs two \
                         stages on one device"
                    )),
                    None => Ok(Self::Cuda(ordinals)),
                }
            }
        }
    }
}

fn repeated(ordinals: &[u32]) -> Option<u32> {
    let mut earlier = ordinals.iter().enumerate();
    earlier.find(|(index, n)| ordinals[..*index].contains(n)).map(|(_, n)| *n)
}

/// A device that sessions are made on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    /// ONNX Runtime's CPU provider.
    Cpu,
    /// ONNX Runtime's CUDA provider on the device with this ordinal.
    Cuda(u32),
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

/// Several devices as one name: `cpu`, `cuda:0`, `cuda:0,1`.
pub fn name(devices: &[Device]) -> String {
    let mut ordinals: Vec<String> = Vec::new();
    for device in devices {
        match device {
            Device::Cpu => return "cpu".into(),
            Device::Cuda(ordinal) if !ordinals.contains(&ordinal.to_string()) => {
                ordinals.push(ordinal.to_string());
            }
            Device::Cuda(_) => {}
        }
    }
    format!("cuda:{}", ordinals.join(","))
}

/// What a run uses.
#[derive(Clone, Debug, PartialEq)]
pub struct Chosen {
    /// The devices; at least one, all of one kind.
    pub devices: Vec<Device>,
    /// Facts of the GPUs among them, in the same order; empty on the CPU.
    pub gpus: Vec<Gpu>,
    /// Why `auto` runs on the CPU, or what could not be looked at.
    pub note: Option<String>,
}

impl Chosen {
    fn cpu(note: Option<String>) -> Self {
        Self { devices: vec![Device::Cpu], gpus: Vec::new(), note }
    }

    fn gpus(gpus: Vec<Gpu>, note: Option<String>) -> Self {
        Self { devices: gpus.iter().map(|gpu| Device::Cuda(gpu.ordinal)).collect(), gpus, note }
    }

    /// The GPU behind `device`.
    pub fn gpu(&self, device: Device) -> Option<&Gpu> {
        self.gpus.iter().find(|gpu| Device::Cuda(gpu.ordinal) == device)
    }

    /// Whether stages run on GPUs.
    pub fn on_gpu(&self) -> bool {
        !self.gpus.is_empty()
    }
}

/// The devices for a request. `auto` takes the GPUs whose free memory is at least `min_free_ratio`
/// of their whole; a device that is named is taken as it is.
///
/// # Errors
/// CUDA was asked for and something of it is missing; the message says what.
pub fn choose(request: &Request, min_free_ratio: f64, machine: &dyn Machine) -> Result<Chosen> {
    let usable = || {
        let gpus = machine.gpus()?;
        machine.provider().map(|()| gpus)
    };
    match request {
        Request::Cpu => Ok(Chosen::cpu(None)),
        Request::Auto => Ok(match usable() {
            Err(missing) => Chosen::cpu(Some(format!("running on the CPU: {missing}"))),
            Ok(gpus) => free_enough(gpus, min_free_ratio),
        }),
        Request::Cuda(ordinals) => {
            let gpus = usable().map_err(|missing| refused(&missing))?;
            let gpus = named(gpus, ordinals).map_err(|reason| refused(&reason))?;
            let unseen = gpus.iter().find_map(|gpu| gpu.memory.as_ref().err());
            let note = unseen.map(|reason| format!("device memory is not measured: {reason}"));
            Ok(Chosen::gpus(gpus, note))
        }
    }
}

fn refused(reason: &str) -> Error {
    Error::Device(format!("--device cuda: {reason}; or pass --device cpu"))
}

fn named(gpus: Vec<Gpu>, ordinals: &[u32]) -> std::result::Result<Vec<Gpu>, String> {
    if ordinals.is_empty() {
        return Ok(gpus);
    }
    let find = |ordinal: &u32| {
        gpus.iter().find(|gpu| gpu.ordinal == *ordinal).cloned().ok_or_else(|| {
            let known: Vec<_> = gpus.iter().map(|gpu| gpu.ordinal.to_string()).collect();
            format!(
                "there is no device {ordinal}; the driver shows {} (CUDA_VISIBLE_DEVICES decides \
                 which)",
                known.join(", ")
            )
        })
    };
    ordinals.iter().map(find).collect()
}

fn free_enough(gpus: Vec<Gpu>, min_free_ratio: f64) -> Chosen {
    let mut passed_over = Vec::new();
    let mut taken = Vec::new();
    for gpu in gpus {
        match &gpu.memory {
            Ok(memory) if memory.free_ratio() >= min_free_ratio => taken.push(gpu),
            Ok(memory) => passed_over.push(format!(
                "cuda:{} has {:.0} % of its memory free, --min-free-ratio asks for {:.0} %",
                gpu.ordinal,
                memory.free_ratio() * 100.0,
                min_free_ratio * 100.0
            )),
            Err(reason) => passed_over.push(format!(
                "the free memory of cuda:{} is unknown ({reason}; --device cuda takes it unseen)",
                gpu.ordinal
            )),
        }
    }
    let reasons = passed_over.join("; ");
    if taken.is_empty() {
        return Chosen::cpu(Some(format!("running on the CPU: {reasons}")));
    }
    let note = (!reasons.is_empty()).then(|| format!("not used: {reasons}"));
    Chosen::gpus(taken, note)
}

/// Why real NV-FP8 does not run on `gpu` (`None`: the CPU), or `None` where it does. `cublaslt` says
/// whether that library can be loaded; it is asked only where a GPU could make use of it.
pub fn nvfp8_unavailable(
    gpu: Option<&Gpu>,
    cublaslt: &dyn Fn() -> std::result::Result<(), String>,
) -> Option<String> {
    let needs = "real NV-FP8 (fp8 tensor cores with tensor scales) needs CUDA";
    match gpu {
        None => Some(format!("{needs}; this run is on cpu")),
        Some(gpu) if gpu.compute_capability < (8, 9) => {
            let (major, minor) = gpu.compute_capability;
            Some(format!(
                "{needs} with compute capability 8.9 or higher; {} (cuda:{}) has {major}.{minor}",
                gpu.name, gpu.ordinal
            ))
        }
        Some(_) => cublaslt().err().map(|missing| format!("{needs} and cuBLASLt: {missing}")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::gpus::Memory;
    use super::*;

    #[derive(Default)]
    struct Fake {
        gpus: Vec<Gpu>,
        no_driver: bool,
        no_provider: bool,
    }

    impl Machine for Fake {
        fn gpus(&self) -> std::result::Result<Vec<Gpu>, String> {
            if self.no_driver { Err("no driver".into()) } else { Ok(self.gpus.clone()) }
        }

        fn provider(&self) -> std::result::Result<(), String> {
            if self.no_provider { Err("no provider library".into()) } else { Ok(()) }
        }
    }

    fn gpu(ordinal: u32, free: Option<u64>) -> Gpu {
        let memory = free.map(|free| Memory { free, total: 100 });
        Gpu {
            ordinal,
            name: "Fake".into(),
            uuid: format!("uuid-{ordinal}"),
            compute_capability: (9, 0),
            memory: memory.ok_or_else(|| "no NVML".into()),
        }
    }

    fn auto(gpus: Vec<Gpu>) -> Chosen {
        choose(&Request::Auto, 0.5, &Fake { gpus, ..Fake::default() }).unwrap()
    }

    #[test]
    fn requests_are_parsed() {
        assert_eq!("cuda:0,1".parse(), Ok(Request::Cuda(vec![0, 1])));
        assert_eq!("cuda: 3".parse(), Ok(Request::Cuda(vec![3])));
        assert_eq!("cuda".parse(), Ok(Request::Cuda(vec![])));
        assert!("cuda:x".parse::<Request>().is_err() && "cuda:".parse::<Request>().is_err());
        assert!("cuda:1,0,1".parse::<Request>().unwrap_err().contains("device 1 is named twice"));
        assert!("gpu".parse::<Request>().unwrap_err().contains("cuda:0,1"));
    }

    #[test]
    fn names_of_devices() {
        assert_eq!(name(&[Device::Cpu]), "cpu");
        assert_eq!(name(&[Device::Cuda(0), Device::Cuda(0), Device::Cuda(3)]), "cuda:0,3");
        assert_eq!(Device::Cuda(2).to_string(), "cuda:2");
    }

    #[test]
    fn auto_takes_gpus_with_free_memory_and_says_why_others_are_left() {
        let chosen = auto(vec![gpu(0, Some(20)), gpu(1, Some(50)), gpu(2, None)]);
        assert_eq!(chosen.devices, [Device::Cuda(1)]);
        let note = chosen.note.as_deref().unwrap();
        assert!(note.contains("cuda:0 has 20 %") && note.contains("cuda:2 is unknown"), "{note}");
        assert_eq!(auto(vec![gpu(0, Some(100))]).note, None);
        let busy = auto(vec![gpu(0, Some(1))]);
        assert_eq!(busy.devices, [Device::Cpu]);
        assert!(busy.note.unwrap().contains("--min-free-ratio"));
    }

    #[test]
    fn auto_falls_back_and_cuda_does_not() {
        for (machine, says) in [
            (Fake { no_driver: true, ..Fake::default() }, "no driver"),
            (Fake { no_provider: true, ..Fake::default() }, "no provider library"),
        ] {
            let chosen = choose(&Request::Auto, 0.5, &machine).unwrap();
            assert_eq!(chosen.devices, [Device::Cpu]);
            assert!(chosen.note.unwrap().contains(says));
            let error = choose(&Request::Cuda(vec![]), 0.5, &machine).unwrap_err().to_string();
            assert!(error.contains(says) && error.contains("--device cpu"), "{error}");
            // The CPU asks nothing of the machine.
            assert_eq!(choose(&Request::Cpu, 0.5, &machine).unwrap(), Chosen::cpu(None));
        }
    }

    #[test]
    fn named_devices_are_taken_in_the_order_given_however_full() {
        let machine =
            Fake { gpus: vec![gpu(0, Some(1)), gpu(1, Some(90)), gpu(2, None)], ..Fake::default() };
        let chosen = choose(&Request::Cuda(vec![1, 0]), 0.5, &machine).unwrap();
        assert_eq!(chosen.devices, [Device::Cuda(1), Device::Cuda(0)]);
        assert_eq!(chosen.gpu(Device::Cuda(1)).unwrap().uuid, "uuid-1");
        let all = choose(&Request::Cuda(vec![]), 0.5, &machine).unwrap();
        assert_eq!(all.devices.len(), 3);
        assert!(all.note.unwrap().contains("no NVML"));
        let error = choose(&Request::Cuda(vec![7]), 0.5, &machine).unwrap_err().to_string();
        assert!(error.contains("no device 7") && error.contains("0, 1, 2"), "{error}");
    }

    #[test]
    fn real_fp8_needs_the_tensor_cores() {
        let there = || Ok(());
        let unasked = || panic!("the library does not matter here");
        assert!(nvfp8_unavailable(None, &unasked).unwrap().contains("CUDA"));
        let old = Gpu { compute_capability: (8, 6), ..gpu(0, None) };
        assert!(nvfp8_unavailable(Some(&old), &unasked).unwrap().contains("has 8.6"));
        for capability in [(8, 9), (9, 0), (12, 0)] {
            let new = Gpu { compute_capability: capability, ..gpu(0, None) };
            assert_eq!(nvfp8_unavailable(Some(&new), &there), None);
            let reason = nvfp8_unavailable(Some(&new), &|| Err("libcublasLt: not found".into()));
            assert!(reason.unwrap().contains("cuBLASLt: libcublasLt: not found"));
        }
    }
}
