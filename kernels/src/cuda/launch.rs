//! Kernels and their launches.
#![allow(unsafe_code)]

use std::ffi::{c_int, c_void};

use bytemuck::NoUninit;
use cudarc::driver::sys;

use super::{
    CudaError, Gpu, Stream,
    driver::{check, error_name, has_symbol},
    gpu::{c_name, leak},
    units::Unit,
};

/// Shared memory that a block may have without asking for it, in bytes.
const SHARED_BY_DEFAULT: u32 = 48 << 10;

/// A loaded kernel of a device. Copied freely; valid until the process ends.
#[derive(Debug, Clone, Copy)]
pub struct Function {
    gpu: &'static Gpu,
    raw: sys::CUfunction,
    name: &'static str,
    /// Bytes of each argument, where the driver tells them.
    arguments: Option<&'static [usize]>,
}

// SAFETY: functions may be launched from every thread.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

impl Function {
    /// Looks a kernel up. Its device is current.
    pub(super) fn of(
        gpu: &'static Gpu,
        module: sys::CUmodule,
        unit: &Unit,
        name: &str,
    ) -> Result<Self, CudaError> {
        let label = leak(format!("kernel {name} of {}", unit.stem()));
        let mut raw = std::ptr::null_mut();
        let c_name = c_name(name)?;
        // SAFETY: the module is loaded and never unloaded, the name is zero-terminated.
        check(label, unsafe { sys::cuModuleGetFunction(&mut raw, module, c_name.as_ptr()) })?;
        Ok(Self { gpu, raw, name: label, arguments: arguments_of(raw) })
    }

    /// The device it is loaded on.
    pub fn gpu(&self) -> &'static Gpu {
        self.gpu
    }

    /// Its name and its unit's, for messages.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Allows launches with up to `bytes` of dynamic shared memory. To be called once, when the
    /// kernel is looked up; costs nothing below the default.
    ///
    /// # Errors
    /// More than the device has.
    pub fn allow_shared(&self, bytes: u32) -> Result<(), CudaError> {
        if bytes <= SHARED_BY_DEFAULT {
            return Ok(());
        }
        use sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as MAX;
        let bytes = c_int::try_from(bytes).unwrap_or(c_int::MAX);
        self.gpu.with_current(|| {
            // SAFETY: the function is loaded.
            check(self.name, unsafe { sys::cuFuncSetAttribute(self.raw, MAX, bytes) })
        })
    }

    /// Registers of one thread.
    ///
    /// # Errors
    /// A driver that does not tell.
    pub fn registers(&self) -> Result<u32, CudaError> {
        self.attribute(sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_NUM_REGS)
    }

    /// Bytes of local memory of one thread: spilled registers and arrays indexed at run time.
    ///
    /// # Errors
    /// A driver that does not tell.
    pub fn local_bytes(&self) -> Result<u32, CudaError> {
        self.attribute(sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES)
    }

    /// Bytes of static shared memory of one block.
    ///
    /// # Errors
    /// A driver that does not tell.
    pub fn static_shared_bytes(&self) -> Result<u32, CudaError> {
        self.attribute(sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)
    }

    /// Blocks of `threads` threads and `shared` bytes of dynamic shared memory that one
    /// multiprocessor holds at a time.
    ///
    /// # Errors
    /// A driver that does not tell.
    pub fn blocks_per_multiprocessor(&self, threads: u32, shared: u32) -> Result<u32, CudaError> {
        let mut blocks = 0;
        let threads = c_int::try_from(threads).unwrap_or(c_int::MAX);
        self.gpu.with_current(|| {
            // SAFETY: the function is loaded.
            check(self.name, unsafe {
                sys::cuOccupancyMaxActiveBlocksPerMultiprocessor(
                    &mut blocks,
                    self.raw,
                    threads,
                    shared as usize,
                )
            })
        })?;
        Ok(u32::try_from(blocks).unwrap_or(0))
    }

    fn attribute(&self, attribute: sys::CUfunction_attribute) -> Result<u32, CudaError> {
        let mut value = 0;
        self.gpu.with_current(|| {
            // SAFETY: the function is loaded.
            check(self.name, unsafe { sys::cuFuncGetAttribute(&mut value, attribute, self.raw) })
        })?;
        Ok(u32::try_from(value).unwrap_or(0))
    }

    /// Enqueues the kernel on `stream`. Neither waits nor allocates, so that it may be captured
    /// into a CUDA graph. A grid with a dimension of 0 does nothing.
    ///
    /// # Safety
    /// The arguments are what the kernel declares, in order (their number and sizes are checked
    /// where the driver tells them); the device memory they point to is as long as the kernel
    /// expects and stays valid until the stream has run it; the stream is one of this device.
    ///
    /// # Errors
    /// Arguments whose number or sizes differ from the kernel's, and launches that CUDA refuses.
    pub unsafe fn launch(
        &self,
        shape: &Launch,
        stream: Stream,
        args: &mut Args,
    ) -> Result<(), CudaError> {
        self.check_arguments(args)?;
        if [shape.grid.0, shape.grid.1, shape.grid.2].contains(&0) {
            return Ok(());
        }
        let mut attributes = Vec::new();
        shape.attributes(self.gpu, &mut attributes);
        let config = sys::CUlaunchConfig {
            gridDimX: shape.grid.0,
            gridDimY: shape.grid.1,
            gridDimZ: shape.grid.2,
            blockDimX: shape.block.0,
            blockDimY: shape.block.1,
            blockDimZ: shape.block.2,
            sharedMemBytes: shape.shared,
            hStream: stream.0.cast(),
            attrs: attributes.as_mut_ptr(),
            numAttrs: attributes.len() as u32,
        };
        self.gpu.with_current(|| {
            let mut pointers = args.pointers();
            // SAFETY: config, attributes and arguments are alive; the rest the caller promises.
            let code = unsafe {
                sys::cuLaunchKernelEx(
                    &config,
                    self.raw,
                    pointers.as_mut_ptr(),
                    std::ptr::null_mut(),
                )
            };
            if code == sys::CUresult::CUDA_SUCCESS {
                return Ok(());
            }
            let reason = format!(
                "{}; grid {:?}, block {:?}, {} bytes of shared memory",
                error_name(code),
                shape.grid,
                shape.block,
                shape.shared
            );
            Err(CudaError::Call { call: self.name, reason })
        })
    }

    fn check_arguments(&self, args: &Args) -> Result<(), CudaError> {
        let fail = |reason: String| Err(CudaError::Call { call: self.name, reason });
        if args.overflow {
            return fail("too many arguments for the launcher".into());
        }
        let given = &args.slots[..args.count];
        match self.arguments {
            Some(want) if !given.iter().map(|(_, size)| *size).eq(want.iter().copied()) => {
                let given: Vec<usize> = given.iter().map(|(_, size)| *size).collect();
                fail(format!("arguments of {given:?} bytes, where it takes {want:?}"))
            }
            _ => Ok(()),
        }
    }
}

/// Sizes of a kernel's arguments; drivers before CUDA 12.4 do not tell.
fn arguments_of(function: sys::CUfunction) -> Option<&'static [usize]> {
    if !has_symbol(c"cuFuncGetParamInfo") {
        return None;
    }
    let mut sizes = Vec::new();
    loop {
        let (mut offset, mut size) = (0, 0);
        // SAFETY: the function is loaded; an index past the last argument is an error code.
        let code =
            unsafe { sys::cuFuncGetParamInfo(function, sizes.len(), &mut offset, &mut size) };
        match code {
            sys::CUresult::CUDA_SUCCESS if sizes.len() < Args::MOST => sizes.push(size),
            sys::CUresult::CUDA_ERROR_INVALID_VALUE => return Some(sizes.leak()),
            _ => return None,
        }
    }
}

/// Shape of a launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Launch {
    /// Blocks in x, y, z.
    pub grid: (u32, u32, u32),
    /// Threads of a block in x, y, z.
    pub block: (u32, u32, u32),
    /// Dynamic shared memory of a block, in bytes; see [`Function::allow_shared`].
    pub shared: u32,
    /// Blocks of a cluster in x; 1 for none. Needs compute capability 9.0.
    pub cluster: u32,
    /// Whether the kernel may start while the one before it in the stream still runs; it then
    /// waits itself (`griddepcontrol.wait`) before it touches that one's results. Without effect
    /// below compute capability 9.0.
    pub overlap: bool,
}

impl Launch {
    /// `grid` blocks of `block` threads, in x.
    pub const fn linear(grid: u32, block: u32) -> Self {
        Self::new((grid, 1, 1), (block, 1, 1))
    }

    /// A grid of blocks.
    pub const fn new(grid: (u32, u32, u32), block: (u32, u32, u32)) -> Self {
        Self { grid, block, shared: 0, cluster: 1, overlap: false }
    }

    /// With dynamic shared memory.
    pub const fn shared(self, bytes: u32) -> Self {
        Self { shared: bytes, ..self }
    }

    /// In clusters of `blocks` blocks.
    pub const fn cluster(self, blocks: u32) -> Self {
        Self { cluster: blocks, ..self }
    }

    /// Overlapping the end of the kernel before, where the device can.
    pub const fn overlap(self, overlap: bool) -> Self {
        Self { overlap, ..self }
    }

    fn attributes(&self, gpu: &Gpu, list: &mut Vec<sys::CUlaunchAttribute>) {
        use sys::CUlaunchAttributeID as Id;
        let mut push = |id, value| list.push(sys::CUlaunchAttribute { id, pad: [0; 4], value });
        if self.cluster > 1 {
            let mut value = sys::CUlaunchAttributeValue { pad: [0; 64] };
            value.clusterDim.x = self.cluster;
            value.clusterDim.y = 1;
            value.clusterDim.z = 1;
            push(Id::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION, value);
        }
        if self.overlap && gpu.attributes().capability >= (9, 0) {
            let mut value = sys::CUlaunchAttributeValue { pad: [0; 64] };
            value.programmaticStreamSerializationAllowed = 1;
            push(Id::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, value);
        }
    }
}

/// Arguments of one launch, by value, in the kernel's order.
#[derive(Debug)]
pub struct Args {
    bytes: Storage,
    /// Offset and size of each.
    slots: [(usize, usize); Self::MOST],
    count: usize,
    used: usize,
    overflow: bool,
}

/// Room for the values; aligned for the largest that CUDA asks for (tensor maps).
#[derive(Debug)]
#[repr(C, align(64))]
struct Storage([u8; 1024]);

impl Default for Args {
    fn default() -> Self {
        Self::new()
    }
}

impl Args {
    /// Most arguments of a launch.
    pub const MOST: usize = 32;

    /// No arguments yet.
    pub const fn new() -> Self {
        Self {
            bytes: Storage([0; 1024]),
            slots: [(0, 0); Self::MOST],
            count: 0,
            used: 0,
            overflow: false,
        }
    }

    /// Appends a value: a number, or a struct laid out as the kernel's.
    #[must_use]
    pub fn with<T: NoUninit>(mut self, value: T) -> Self {
        self.push(value);
        self
    }

    /// Appends a value: a number, or a struct laid out as the kernel's.
    pub fn push<T: NoUninit>(&mut self, value: T) {
        let bytes = bytemuck::bytes_of(&value);
        let start = self.used.next_multiple_of(align_of::<T>().max(8));
        let end = start + bytes.len();
        if self.count == Self::MOST || end > self.bytes.0.len() || align_of::<T>() > 64 {
            // The launch reports it; an argument is never dropped silently.
            self.overflow = true;
            return;
        }
        self.bytes.0[start..end].copy_from_slice(bytes);
        self.slots[self.count] = (start, bytes.len());
        self.count += 1;
        self.used = end;
    }

    fn pointers(&mut self) -> [*mut c_void; Self::MOST] {
        let base = self.bytes.0.as_mut_ptr();
        let mut pointers = [std::ptr::null_mut(); Self::MOST];
        for (pointer, (offset, _)) in pointers.iter_mut().zip(&self.slots[..self.count]) {
            *pointer = base.wrapping_add(*offset).cast();
        }
        pointers
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_keep_order_size_and_alignment() {
        let mut args = Args::new().with(7_u64).with(-3_i32).with(1.5_f32).with([1_u64, 2]);
        assert_eq!(args.slots[..args.count], [(0, 8), (8, 4), (16, 4), (24, 16)]);
        let pointers = args.pointers();
        // SAFETY: the pointers lead into `args`, aligned to 8.
        unsafe {
            assert_eq!(*pointers[0].cast::<u64>(), 7);
            assert_eq!(*pointers[1].cast::<i32>(), -3);
            assert_eq!(*pointers[2].cast::<f32>(), 1.5);
            assert_eq!(*pointers[3].cast::<[u64; 2]>(), [1, 2]);
        }
        assert!(pointers[4].is_null());
    }

    #[test]
    fn too_many_arguments_are_noticed() {
        let mut args = Args::new();
        for _ in 0..Args::MOST {
            args.push(0_u8);
        }
        assert!(!args.overflow);
        args.push(0_u8);
        assert!(args.overflow);
        assert!(Args::new().with([0_u64; 256]).overflow);
    }
}
