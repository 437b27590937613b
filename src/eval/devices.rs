//! Where a stage runs.

use super::error::{Error, Result};
use std::fmt;
use std::str::FromStr;

/// A device named on the command line.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Request {
    /// The best this build and machine offer.
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
                let ordinals = ordinals.split(',').map(|n| n.trim().parse());
                Ok(Self::Cuda(
                    ordinals.collect::<std::result::Result<_, _>>().map_err(|_| unknown())?,
                ))
            }
        }
    }
}

/// A device that sessions are made on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    /// ONNX Runtime's CPU provider.
    Cpu,
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
        }
    }
}

/// The device for a request.
///
/// # Errors
/// CUDA, which this version does not have.
pub fn choose(request: &Request) -> Result<Device> {
    match request {
        Request::Auto | Request::Cpu => Ok(Device::Cpu),
        Request::Cuda(_) => Err(Error::Device(
            "--device cuda: this version of mxeval runs on the CPU only; pass --device cpu".into(),
        )),
    }
}

/// Why real NV-FP8 does not run on `device`.
pub fn nvfp8_unavailable(device: Device) -> String {
    format!("real NV-FP8 (fp8 tensor cores with tensor scales) needs CUDA; this run is on {device}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_parsed_and_cuda_is_refused_plainly() {
        assert_eq!("cuda:0,1".parse(), Ok(Request::Cuda(vec![0, 1])));
        assert_eq!("cuda".parse(), Ok(Request::Cuda(vec![])));
        assert!("cuda:x".parse::<Request>().is_err());
        assert!("gpu".parse::<Request>().unwrap_err().contains("cuda:0,1"));
        assert_eq!(choose(&"auto".parse().unwrap()).unwrap(), Device::Cpu);
        let error = choose(&Request::Cuda(vec![])).unwrap_err().to_string();
        assert!(error.contains("--device cpu"));
    }
}
