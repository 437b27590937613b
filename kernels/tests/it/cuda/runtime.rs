//! Devices, modules and launches.
#![allow(unsafe_code)]

use mx_kernels::cuda::{Args, CudaError, Gpu, Launch, Stream, Unit, units};

use super::common::{Buffer, OwnStream, gpu, gpu_number};

const SCORES: Unit = Unit::plain("scores");
const DEFAULT_STREAM: Stream = Stream(std::ptr::null_mut());

#[test]
fn a_device_is_set_up_once() {
    let Some(gpu) = gpu() else { return };
    assert!(std::ptr::eq(gpu, Gpu::get(0).unwrap()));
    let a = gpu.attributes();
    println!("{a:?}, kernels for {}", gpu.arch());
    assert!(a.multiprocessors > 0 && a.shared_per_block >= 96 << 10 && a.capability >= (8, 0));
    let none = Gpu::get(Gpu::count().unwrap()).unwrap_err();
    assert!(matches!(none, CudaError::Device { .. }), "{none}");
}

#[test]
fn every_unit_loads() {
    let Some(gpu) = gpu() else { return };
    for unit in units::all(gpu.arch()) {
        // The module loads; the kernel is then not found in it, and the error names both.
        let error = gpu.function(unit, "no_such_kernel").unwrap_err().to_string();
        assert!(error.contains("no_such_kernel") && error.contains("NOT_FOUND"), "{error}");
        assert!(error.contains(&unit.stem()), "{error}");
    }
}

#[test]
fn a_kernel_is_found_once_from_every_thread() {
    let Some(gpu) = gpu() else { return };
    std::thread::scope(|scope| {
        for _ in 0..4 {
            // These threads have no current device.
            scope.spawn(|| {
                for name in ["token_scores", "token_scores_baseline"] {
                    let function = gpu.function(SCORES, name).unwrap();
                    assert!(function.registers().unwrap() > 16);
                    assert_eq!(function.local_bytes().unwrap(), 0, "{name} spills");
                    assert!(function.blocks_per_multiprocessor(512, 0).unwrap() >= 1);
                }
            });
        }
    });
}

#[test]
fn launches_that_cannot_be_say_why() {
    let Some(gpu) = gpu() else { return };
    let function = gpu.function(SCORES, "token_scores").unwrap();
    let args = || {
        let pointers = Args::new().with(0_u64).with(0_u64).with(0_u64).with(0_u64).with(0_u64);
        pointers.with(1_u32).with(0_i32)
    };
    let launch = |shape: &Launch, mut args: Args| {
        // SAFETY: none of these launches reaches the device.
        unsafe { function.launch(shape, DEFAULT_STREAM, &mut args) }
    };
    let nothing = Launch::linear(0, 512);
    launch(&nothing, args()).unwrap();
    let error = launch(&Launch::linear(1, 4096), args()).unwrap_err().to_string();
    assert!(error.contains("token_scores") && error.contains("CUDA_ERROR"), "{error}");
    match launch(&nothing, args().with(1_u8)) {
        Err(e) => assert!(e.to_string().contains("token_scores"), "{e}"),
        Ok(()) => println!("this driver does not tell arguments' sizes"),
    }
    let mut many = args();
    (0..Args::MOST).for_each(|_| many.push(0_u8));
    assert!(launch(&nothing, many).is_err());
    assert!(function.allow_shared(gpu.attributes().shared_per_block + 1024).is_err());
    function.allow_shared(64 << 10).unwrap();
}

#[test]
fn the_current_device_stays_what_it_was() {
    let (Some(first), Some(second)) = (gpu(), gpu_number(1)) else { return };
    first.bind().unwrap();
    let current = || {
        let mut context = std::ptr::null_mut();
        // SAFETY: stores a context.
        let code = unsafe { cudarc::driver::sys::cuCtxGetCurrent(&mut context) };
        assert_eq!(code, cudarc::driver::sys::CUresult::CUDA_SUCCESS);
        context.cast::<std::ffi::c_void>()
    };
    assert_eq!(current(), first.context());
    second.function(SCORES, "token_scores").unwrap();
    assert_eq!(current(), first.context());
    second
        .with_current(|| {
            assert_eq!(current(), second.context());
            Ok(())
        })
        .unwrap();
    assert_eq!(current(), first.context());
}

#[test]
fn buffers_of_the_tests_find_what_is_written_beside_them() {
    if gpu().is_none() {
        return;
    }
    let stream = OwnStream::new();
    let buffer = Buffer::of(&[1_u32, 2, 3]);
    assert_eq!(buffer.read::<u32>(), [1, 2, 3]);
    buffer.fill(0);
    assert_eq!(buffer.read::<u32>(), [0; 3]);
    assert_eq!(Buffer::poisoned(4).read::<i32>(), [-1]);
    stream.synchronize();
}
