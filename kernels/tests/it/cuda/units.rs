//! Every unit compiles for every architecture; no GPU is needed, only NVRTC.

use std::sync::{
    Mutex,
    atomic::{AtomicUsize, Ordering},
};

use mx_kernels::cuda::{Arch, CudaError, Unit, compile, units};

use crate::common::required;

/// Whether NVRTC is there; prints why not.
fn nvrtc() -> bool {
    match compile::nvrtc_version() {
        Ok((major, minor)) => {
            println!("NVRTC {major}.{minor}");
            true
        }
        Err(e) => {
            println!("skipped: {e}");
            assert!(!required("nvrtc"), "MX_REQUIRE names nvrtc");
            false
        }
    }
}

#[test]
fn every_unit_compiles_for_every_architecture() {
    if !nvrtc() {
        return;
    }
    let jobs: Vec<(Unit, Arch)> = Arch::TESTED
        .into_iter()
        .flat_map(|a| units::all(a).into_iter().map(move |u| (u, a)))
        .collect();
    let next = AtomicUsize::new(0);
    let failures = Mutex::new(Vec::new());
    // Two threads: what continuous integration has; each compilation takes seconds.
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some((unit, arch)) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let start = std::time::Instant::now();
                    match compile::cubin(unit, *arch) {
                        Ok(cubin) => {
                            assert!(cubin.starts_with(b"\x7fELF"));
                            println!(
                                "{} {arch}: {} bytes, {:.1} s",
                                unit.stem(),
                                cubin.len(),
                                start.elapsed().as_secs_f32()
                            );
                        }
                        Err(e) => failures.lock().unwrap().push(e.to_string()),
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().unwrap();
    assert!(failures.is_empty(), "{}", failures.join("\n\n"));
}

#[test]
fn what_does_not_compile_says_where_and_why() {
    if !nvrtc() {
        return;
    }
    // A macro that turns a type's name into nonsense.
    let broken = Unit { name: "scores", defines: &[("u32", 1)] };
    let Err(CudaError::Compile { unit, arch, log }) = compile::cubin(&broken, Arch::TESTED[0])
    else {
        panic!("nonsense compiled");
    };
    assert_eq!((unit.as_str(), arch.as_str()), ("scores-u32=1", "sm_80"));
    assert!(log.contains("error") && log.contains("types.cuh"), "{log}");
    let unknown = Arch { major: 99, minor: 0, specific: true };
    let error = compile::cubin(&units::all(Arch::TESTED[0])[0], unknown).unwrap_err().to_string();
    assert!(error.contains("sm_990a") && error.contains("NVRTC"), "{error}");
    let error = compile::cubin(&Unit::plain("nothing"), Arch::TESTED[0]).unwrap_err().to_string();
    assert!(error.contains("no such source"), "{error}");
}
