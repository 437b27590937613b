//! What the tests on a GPU share: the device, memory on it, streams and graphs.
#![allow(unsafe_code)]

use bytemuck::Pod;
use cudarc::driver::sys;
use mx_kernels::cuda::{CudaError, DevicePtr, Gpu, Stream};

use crate::common::required;

/// Bytes before and after a buffer that no kernel may touch.
const MARGIN: usize = 512;
const CANARY: u8 = 0xa5;

/// The first device, or `None` with the reason printed. `MX_REQUIRE=cuda` turns that into a
/// failure.
pub fn gpu() -> Option<&'static Gpu> {
    gpu_number(0)
}

/// The device with this number; see [`gpu`].
pub fn gpu_number(ordinal: u32) -> Option<&'static Gpu> {
    match Gpu::get(ordinal) {
        Ok(gpu) => {
            gpu.bind().unwrap();
            Some(gpu)
        }
        Err(e) => {
            println!("skipped: {e}");
            assert!(!required("cuda") || ordinal > 0, "MX_REQUIRE names cuda: {e}");
            None
        }
    }
}

/// Whether the suite is to be short: under compute-sanitizer, which slows kernels a hundredfold.
pub fn quick() -> bool {
    std::env::var("MX_GPU_QUICK").is_ok_and(|v| !v.is_empty() && v != "0")
}

fn ok(code: sys::CUresult) {
    assert_eq!(code, sys::CUresult::CUDA_SUCCESS);
}

/// Device memory, freed on drop. Writes beside it are found by [`Buffer::read`]; the quick suite
/// allocates it bare, so that compute-sanitizer sees accesses beside it.
#[derive(Debug)]
pub struct Buffer {
    base: DevicePtr,
    bytes: usize,
    margin: usize,
}

impl Buffer {
    /// Memory whose bytes are all 0xff: NaN in every float type, -1 in every integer.
    pub fn poisoned(bytes: usize) -> Self {
        let margin = if quick() { 0 } else { MARGIN };
        let mut base = 0;
        let all = bytes + 2 * margin;
        // SAFETY: memory of our own, as long as the lengths say.
        unsafe {
            ok(sys::cuMemAlloc_v2(&mut base, all.max(1)));
            ok(sys::cuMemsetD8_v2(base, CANARY, all.max(1)));
            if bytes > 0 {
                ok(sys::cuMemsetD8_v2(base + margin as u64, 0xff, bytes));
            }
            // Memsets run in the background, and non-blocking streams do not wait for them.
            ok(sys::cuStreamSynchronize(std::ptr::null_mut()));
        }
        Self { base, bytes, margin }
    }

    /// A copy of `values`.
    pub fn of<T: Pod>(values: &[T]) -> Self {
        let buffer = Self::poisoned(size_of_val(values));
        buffer.write(values);
        buffer
    }

    /// Its address, aligned to 256.
    pub fn ptr(&self) -> DevicePtr {
        self.base + self.margin as u64
    }

    /// Overwrites its beginning.
    pub fn write<T: Pod>(&self, values: &[T]) {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        assert!(bytes.len() <= self.bytes);
        if !bytes.is_empty() {
            // SAFETY: within the allocation.
            unsafe {
                ok(sys::cuMemcpyHtoD_v2(self.ptr(), bytes.as_ptr().cast(), bytes.len()));
                // It returns once the bytes are staged, and non-blocking streams do not wait.
                ok(sys::cuStreamSynchronize(std::ptr::null_mut()));
            }
        }
    }

    /// Fills it with a byte.
    pub fn fill(&self, byte: u8) {
        if self.bytes > 0 {
            // SAFETY: within the allocation.
            unsafe {
                ok(sys::cuMemsetD8_v2(self.ptr(), byte, self.bytes));
                ok(sys::cuStreamSynchronize(std::ptr::null_mut()));
            }
        }
    }

    /// Its content. The caller has waited for the streams that write it.
    pub fn read<T: Pod>(&self) -> Vec<T> {
        let mut all = vec![0u8; self.bytes + 2 * self.margin];
        if !all.is_empty() {
            // SAFETY: within the allocation.
            ok(unsafe { sys::cuMemcpyDtoH_v2(all.as_mut_ptr().cast(), self.base, all.len()) });
        }
        let (before, rest) = all.split_at(self.margin);
        let (bytes, after) = rest.split_at(self.bytes);
        assert!(before.iter().all(|&b| b == CANARY), "written in front of the buffer");
        assert!(after.iter().all(|&b| b == CANARY), "written behind the buffer");
        bytes.chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned).collect()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: allocated once, freed once; a failure here has been seen elsewhere.
        let _ = unsafe { sys::cuMemFree_v2(self.base) };
    }
}

/// A stream that does not wait for the default one.
#[derive(Debug)]
pub struct OwnStream(sys::CUstream);

impl OwnStream {
    pub fn new() -> Self {
        let mut stream = std::ptr::null_mut();
        // SAFETY: stores a stream.
        ok(unsafe {
            sys::cuStreamCreate(&mut stream, sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32)
        });
        Self(stream)
    }

    pub fn get(&self) -> Stream {
        Stream(self.0.cast())
    }

    pub fn synchronize(&self) {
        // SAFETY: a live stream.
        ok(unsafe { sys::cuStreamSynchronize(self.0) });
    }

    /// Captures what `work` enqueues on this stream into a graph.
    pub fn capture(&self, work: impl FnOnce(Stream) -> Result<(), CudaError>) -> Graph {
        let mut graph = std::ptr::null_mut();
        let mut exec = std::ptr::null_mut();
        // SAFETY: a live stream; graph and executable are our own.
        unsafe {
            // Thread-local: other tests allocate meanwhile, which the global mode forbids.
            let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
            ok(sys::cuStreamBeginCapture_v2(self.0, mode));
            let done = work(self.get());
            ok(sys::cuStreamEndCapture(self.0, &mut graph));
            done.unwrap();
            ok(sys::cuGraphInstantiateWithFlags(&mut exec, graph, 0));
            ok(sys::cuGraphDestroy(graph));
        }
        Graph(exec)
    }
}

impl Drop for OwnStream {
    fn drop(&mut self) {
        // SAFETY: created once, destroyed once.
        let _ = unsafe { sys::cuStreamDestroy_v2(self.0) };
    }
}

/// A captured graph, ready to run.
#[derive(Debug)]
pub struct Graph(sys::CUgraphExec);

impl Graph {
    pub fn launch(&self, stream: &OwnStream) {
        // SAFETY: a live graph and stream.
        ok(unsafe { sys::cuGraphLaunch(self.0, stream.0) });
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: instantiated once, destroyed once.
        let _ = unsafe { sys::cuGraphExecDestroy(self.0) };
    }
}
