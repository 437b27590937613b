//! The same operators on an NVIDIA GPU.
//!
//! ```text
//! cuda/*.cu(h) --NVRTC, once a device--> cubin (on disk, in memory) --> Gpu --> plans --> a caller's stream
//! ```
//!
//! Nothing of CUDA is linked: the driver, NVRTC and cuBLASLt are looked for when a [`Gpu`] is first
//! asked for. A call enqueues work on the stream it is given and returns; it never waits for the
//! device and never allocates device memory: what it needs, its plan states
//! ([`LinearPlan::scratch_bytes`]) and the caller provides.
//!
//! Pointers to device memory are plain addresses ([`DevicePtr`]); the caller answers for their
//! lengths, which follow from the shapes, and for their lifetime on the stream.

mod act_matmul;
mod batches;
pub mod blas;
mod cache;
mod choice;
pub mod compile;
mod devices;
mod driver;
mod error;
mod fp8;
mod gpu;
mod launch;
mod linear;
mod params;
mod quantize;
mod scores;
mod tiles;
pub mod units;
mod wide;

pub use act_matmul::{ActMatMulBuffers, ActMatMulPlan};
pub use choice::Choice;
pub use devices::{DeviceInfo, devices};
pub use error::CudaError;
pub use fp8::PATH as FP8_PATH;
pub use gpu::{Attributes, Gpu, Stream};
pub use launch::{Args, Function, Launch};
pub use linear::{LinearBuffers, LinearPlan};
pub use quantize::{QUANTIZE_SCRATCH, QuantizeBuffers, quantize_rows};
pub use scores::{ScoresBuffers, ScoresPlan};
pub use units::{Arch, Unit};

/// An address in device memory.
pub type DevicePtr = u64;

/// Element type of a float tensor in device memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FloatType {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
}

impl FloatType {
    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }
}
