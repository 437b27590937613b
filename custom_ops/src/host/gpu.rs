//! Device memory as ONNX Runtime hands it out: addresses, never slices.

use std::{
    collections::HashMap,
    ffi::c_void,
    ptr::{self, NonNull},
    sync::{Arc, Mutex, PoisonError, Weak},
};

use mx_kernels::cuda::{DevicePtr, Stream};
use ort::{AsPointer, operator::ComputeContext, sys};

use super::{ElementType, Node, TensorView, check, elements, output_view};
use crate::guard::OpError;

/// Address alignment that the kernels rely on, for vector loads.
const ALIGNMENT: u64 = 16;
/// Alignment of scratch memory; every CUDA allocator gives it.
const SCRATCH_ALIGNMENT: u64 = 256;
/// Smallest scratch block.
const SMALLEST: usize = 1 << 16;

/// Where some memory lies: the device type's number in the C API, and which device of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    device_type: i32,
    id: i32,
}

impl Place {
    /// # Safety
    /// `info` is a live memory description.
    unsafe fn of(info: *const sys::OrtMemoryInfo) -> Result<Self, OpError> {
        let api = ort::api();
        let (mut device_type, mut id) = (-1_i32, -1_i32);
        // SAFETY: `info` is live; the enumeration is an int in C and is received as one, because a
        // newer runtime may know devices that the Rust enumeration does not.
        unsafe {
            (api.MemoryInfoGetDeviceType)(info, (&raw mut device_type).cast());
            check("MemoryInfoGetId", (api.MemoryInfoGetId)(info, &mut id))?;
        }
        Ok(Self { device_type, id })
    }

    fn ordinal(self) -> Option<u32> {
        let gpu = sys::OrtMemoryInfoDeviceType::OrtMemoryInfoDeviceType_GPU as i32;
        (self.device_type == gpu).then(|| u32::try_from(self.id).ok())?
    }

    fn name(self) -> String {
        let kind = match self.device_type {
            0 => "host",
            1 => "GPU",
            2 => "FPGA",
            3 => "NPU",
            _ => "unknown",
        };
        format!("{kind} memory (device {})", self.id)
    }
}

/// The stream of ONNX Runtime that a kernel's work belongs on; null is CUDA's default stream.
pub(crate) fn stream(ctx: &ComputeContext) -> Result<Stream, OpError> {
    let mut raw = ptr::null_mut();
    // SAFETY: the context lives for the call.
    check("KernelContext_GetGPUComputeStream", unsafe {
        (ort::api().KernelContext_GetGPUComputeStream)(ctx.ptr(), &mut raw)
    })?;
    Ok(Stream(raw))
}

impl TensorView<'_> {
    /// The address of the elements in the memory of GPU `ordinal`; 0 for a tensor without elements.
    /// Memory of any other place is an error: a kernel would fault on it.
    pub(crate) fn device_ptr(&self, ordinal: u32) -> Result<DevicePtr, OpError> {
        if elements(self.dims())? == 0 {
            return Ok(0);
        }
        let mut info = ptr::null();
        // SAFETY: the value lives as long as the view; the description belongs to it.
        let place = unsafe {
            check("GetTensorMemoryInfo", (ort::api().GetTensorMemoryInfo)(self.value, &mut info))?;
            Place::of(info)?
        };
        if place.ordinal() != Some(ordinal) {
            return Err(OpError::Place { found: place.name(), ordinal });
        }
        let address = self.data as u64;
        if address == 0 {
            return Err(OpError::NoData);
        }
        if !address.is_multiple_of(ALIGNMENT) {
            return Err(OpError::Alignment { address, alignment: ALIGNMENT });
        }
        Ok(address)
    }
}

/// Allocates output `index` in the memory of GPU `ordinal`; `None` when the node leaves it out,
/// address 0 when it has no elements.
pub(crate) fn device_output(
    ctx: &ComputeContext,
    index: usize,
    element: ElementType,
    dims: &[i64],
    ordinal: u32,
) -> Result<Option<DevicePtr>, OpError> {
    output_view(ctx, index, element, dims)?.map(|view| view.device_ptr(ordinal)).transpose()
}

/// Scratch memory in ONNX Runtime's own arena of one device, kept for the stream it was used on.
///
/// The obvious calls do not do: `KernelContext_GetScratchBuffer`, which labels memory with the stream,
/// ends the process when memory runs out (it throws through a `noexcept` C function, 1.24 to 1.31),
/// and memory of `AllocatorAlloc` has no label: freed while the kernel still runs, the arena may
/// give it to another `Run` on another stream. So a block stays taken from the arena, is lent to
/// one call at a time and goes back to the blocks of its stream, where the stream's order protects
/// it. Two threads on one stream get two blocks. In the steady state nothing is allocated, and a
/// captured CUDA graph finds its scratch where it was. The blocks live as long as any kernel of the
/// arena's sessions, and their sizes are powers of two, so that growing shapes take at most four times
/// the largest need.
pub(crate) struct ScratchPool {
    allocator: NonNull<sys::OrtAllocator>,
    ordinal: u32,
    idle: Mutex<Vec<Block>>,
}

// SAFETY: ONNX Runtime's allocators may be used and released on any thread.
unsafe impl Send for ScratchPool {}
// SAFETY: as above; the list of blocks is behind a lock.
unsafe impl Sync for ScratchPool {}

/// Memory that was last used on `stream`.
struct Block {
    address: u64,
    bytes: usize,
    stream: usize,
}

/// One pool an arena, found by the address of the arena's description of itself.
static POOLS: Mutex<Option<HashMap<usize, Weak<ScratchPool>>>> = Mutex::new(None);

impl ScratchPool {
    /// The pool of the arena that serves the device of `node`'s provider.
    pub(crate) fn of(node: &Node<'_, '_>) -> Result<Arc<Self>, OpError> {
        let api = ort::api();
        let mut allocator = ptr::null_mut();
        // SAFETY: the node description lives as long as `node`; the allocator is the caller's.
        check("KernelInfoGetAllocator", unsafe {
            let default = sys::OrtMemType::OrtMemTypeDefault;
            (api.KernelInfoGetAllocator)(node.0.ptr(), default, &mut allocator)
        })?;
        let allocator = NonNull::new(allocator).ok_or(OpError::NoData)?;
        let mut pool = Self { allocator, ordinal: 0, idle: Mutex::new(Vec::new()) };
        let mut info = ptr::null();
        // SAFETY: the allocator is live and owns the description.
        let place = unsafe {
            let status = (api.AllocatorGetInfo)(allocator.as_ptr(), &mut info);
            check("AllocatorGetInfo", status)?;
            Place::of(info)?
        };
        pool.ordinal = place.ordinal().ok_or_else(|| OpError::NotOnGpu(place.name()))?;
        let mut pools = POOLS.lock().unwrap_or_else(PoisonError::into_inner);
        let pools = pools.get_or_insert_default();
        // A living pool holds its arena, so that the address cannot mean another one.
        if let Some(pool) = pools.get(&(info as usize)).and_then(Weak::upgrade) {
            return Ok(pool);
        }
        pools.retain(|_, pool| pool.strong_count() > 0);
        let pool = Arc::new(pool);
        pools.insert(info as usize, Arc::downgrade(&pool));
        Ok(pool)
    }

    /// The device's number.
    pub(crate) fn ordinal(&self) -> u32 {
        self.ordinal
    }

    /// Lends `bytes` bytes for work on `stream`; nothing for 0.
    pub(crate) fn lend(&self, stream: Stream, bytes: usize) -> Result<Scratch<'_>, OpError> {
        if bytes == 0 {
            return Ok(Scratch { pool: self, block: None });
        }
        let stream = stream.0 as usize;
        let found = take_smallest(&mut self.idle(), stream, bytes);
        let block = match found {
            Some(block) => block,
            None => {
                let rounded = bytes.max(SMALLEST).checked_next_power_of_two().unwrap_or(bytes);
                // The exact size may fit where the rounded one does not.
                let allocated = self.allocate(rounded).map(|address| (address, rounded));
                let exact = |_| self.allocate(bytes).map(|address| (address, bytes));
                let (address, bytes) = allocated.or_else(exact)?;
                Block { address, bytes, stream }
            }
        };
        Ok(Scratch { pool: self, block: Some(block) })
    }

    fn idle(&self) -> std::sync::MutexGuard<'_, Vec<Block>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn allocate(&self, bytes: usize) -> Result<u64, OpError> {
        let mut address = ptr::null_mut();
        // SAFETY: the allocator is live; unlike the allocator's own function, this one catches what
        // the arena throws.
        let status =
            unsafe { (ort::api().AllocatorAlloc)(self.allocator.as_ptr(), bytes, &mut address) };
        check("AllocatorAlloc", status)?;
        match address as u64 {
            0 => Err(OpError::NoData),
            address if !address.is_multiple_of(SCRATCH_ALIGNMENT) => {
                self.release(address);
                Err(OpError::Alignment { address, alignment: SCRATCH_ALIGNMENT })
            }
            address => Ok(address),
        }
    }

    fn release(&self, address: u64) {
        // SAFETY: the address came from this allocator and is given back once.
        let status =
            unsafe { (ort::api().AllocatorFree)(self.allocator.as_ptr(), address as *mut c_void) };
        // Nothing can be done about it, and nothing depends on it.
        let _ = check("AllocatorFree", status);
    }
}

impl Drop for ScratchPool {
    fn drop(&mut self) {
        let blocks = std::mem::take(&mut *self.idle());
        for block in blocks {
            self.release(block.address);
        }
        // SAFETY: the allocator was made for this pool and is released once.
        unsafe { (ort::api().ReleaseAllocator)(self.allocator.as_ptr()) };
    }
}

/// Takes the smallest block of `stream` that holds `bytes`.
fn take_smallest(idle: &mut Vec<Block>, stream: usize, bytes: usize) -> Option<Block> {
    let fits = |block: &Block| block.stream == stream && block.bytes >= bytes;
    let index = (0..idle.len()).filter(|&i| fits(&idle[i])).min_by_key(|&i| idle[i].bytes)?;
    Some(idle.swap_remove(index))
}

/// Scratch memory for one call; goes back to its stream's blocks when dropped, which must not be
/// before the work that uses it is enqueued.
pub(crate) struct Scratch<'a> {
    pool: &'a ScratchPool,
    block: Option<Block>,
}

impl Scratch<'_> {
    /// The address, aligned to 256 bytes; 0 where nothing was asked for.
    pub(crate) fn address(&self) -> DevicePtr {
        self.block.as_ref().map_or(0, |block| block.address)
    }
}

impl Drop for Scratch<'_> {
    fn drop(&mut self) {
        self.pool.idle().extend(self.block.take());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_gets_back_its_own_smallest_fitting_block() {
        let block = |address, bytes, stream| Block { address, bytes, stream };
        let mut idle = vec![block(1, 100, 7), block(2, 64, 7), block(3, 32, 7), block(4, 64, 8)];
        let mut take = |stream, bytes| take_smallest(&mut idle, stream, bytes).map(|b| b.address);
        assert_eq!(take(7, 50), Some(2));
        assert_eq!(take(7, 50), Some(1));
        assert_eq!(take(7, 50), None);
        assert_eq!(take(9, 1), None);
        assert_eq!(take(8, 64), Some(4));
        assert_eq!(take(7, 32), Some(3));
        assert!(idle.is_empty());
    }
}
