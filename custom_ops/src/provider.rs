//! Which execution provider an operator is registered for, and what its kernels hold of it.

use std::sync::Arc;

use mx_kernels::cuda::{Gpu, Stream};
use ort::operator::ComputeContext;

use crate::{
    census,
    guard::OpError,
    host::{self, Node, Scratch, ScratchPool},
};

/// Where an operator's kernels run. Both kinds share names, attributes, types and checks; ONNX
/// Runtime picks by the providers of a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Provider {
    Cpu,
    Cuda,
}

impl Provider {
    pub(crate) const ALL: [Self; 2] = [Self::Cpu, Self::Cuda];

    /// ONNX Runtime's name of the provider; its default for `None` is the CPU.
    pub(crate) fn name(self) -> Option<&'static str> {
        match self {
            Self::Cpu => None,
            Self::Cuda => Some("CUDAExecutionProvider"),
        }
    }

    /// What the kernel of `node` needs to run here; counts it. The first node on a GPU sets it up.
    pub(crate) fn device(self, node: &Node<'_, '_>) -> Result<Device, OpError> {
        match self {
            Self::Cpu => {
                census::cpu();
                Ok(Device::Cpu)
            }
            Self::Cuda => {
                let device = GpuDevice::of(node)?;
                census::cuda();
                Ok(Device::Gpu(device))
            }
        }
    }
}

/// The device of a kernel.
pub(crate) enum Device {
    Cpu,
    Gpu(GpuDevice),
}

/// A GPU and ONNX Runtime's memory on it.
pub(crate) struct GpuDevice {
    pub gpu: &'static Gpu,
    scratch: Arc<ScratchPool>,
}

impl GpuDevice {
    fn of(node: &Node<'_, '_>) -> Result<Self, OpError> {
        let scratch = ScratchPool::of(node)?;
        Ok(Self { gpu: Gpu::get(scratch.ordinal())?, scratch })
    }

    /// The device's number.
    pub(crate) fn ordinal(&self) -> u32 {
        self.scratch.ordinal()
    }

    /// The stream of a running kernel, and scratch memory for work on it.
    pub(crate) fn enqueue_on(
        &self,
        ctx: &ComputeContext,
        scratch_bytes: usize,
    ) -> Result<(Stream, Scratch<'_>), OpError> {
        let stream = host::stream(ctx)?;
        Ok((stream, self.scratch.lend(stream, scratch_bytes)?))
    }
}
