//! Lists what an ahead-of-time build of the GPU kernels compiles, for `scripts/build_cubins.sh`.
//!
//! ```text
//! cargo run -p mx-kernels --example cuda_units -- [ARCH...]
//! ```
//!
//! One line for each unit and architecture: file stem, architecture, key, source, compiler options.
#![allow(clippy::print_stdout, clippy::print_stderr)]

use mx_kernels::cuda::{Arch, units};

fn main() {
    let mut archs = Vec::new();
    for name in std::env::args().skip(1) {
        let Some(arch) = Arch::parse(&name) else {
            eprintln!("error: '{name}' is no architecture; write sm_80, sm_90a, ...");
            std::process::exit(2);
        };
        archs.push(arch);
    }
    if archs.is_empty() {
        archs.extend(Arch::TESTED);
    }
    for arch in archs {
        for unit in units::all(arch) {
            println!(
                "{} {arch} {} kernels/cuda/{}.cu {}",
                unit.stem(),
                unit.key(arch),
                unit.name,
                unit.options(arch).join(" ")
            );
        }
    }
}
