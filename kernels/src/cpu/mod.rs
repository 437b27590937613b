//! The fast CPU kernels: one text, compiled once for each set of instructions, chosen at run time.
//!
//! `Kernels` is a table of function pointers; `kernels` picks the best that the machine can run
//! (or the one that `MX_CPU_VARIANT` names) once. `linear` drives them.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod buffers;
#[cfg(target_arch = "x86_64")]
mod columns_avx2;
mod divergence;
mod info;
mod lanes;
mod linear;
#[cfg(target_arch = "aarch64")]
mod neon;
#[cfg(target_arch = "aarch64")]
mod neon_dot;
#[cfg(target_arch = "aarch64")]
mod neon_integer;
pub(crate) mod packed;
mod panel;
mod quantize;
mod quantize_columns;
mod quantize_weight;
mod rows;
mod scalar;
mod scratch;
mod simd;
mod softmax;
mod tile;
mod variants;

#[doc(hidden)]
pub mod forced;

use std::sync::OnceLock;

pub use info::{CpuInfo, ProductInfo, VariantInfo, info};
pub(crate) use linear::linear;
pub use packed::PreparedWeight;
pub(crate) use quantize::{fake_quantize_rows, quantize_rows};
pub(crate) use quantize_weight::quantize_weight;
pub(crate) use variants::Kernels;

/// Every variant that this build knows and this machine can run, the best first.
fn runnable() -> &'static [&'static Kernels] {
    static RUNNABLE: OnceLock<Vec<&'static Kernels>> = OnceLock::new();
    RUNNABLE.get_or_init(|| variants::ALL.iter().copied().filter(|k| (k.detect)()).collect())
}

/// Names of the variants that this machine can run, the best first: of `amx`, `avx512bf16`, `avx512vnni` (on Intel in
/// the other order), `avx512`, `avxvnni`, `avx2`; `neondotprod`, `neon`; `scalar`.
pub fn available_variants() -> Vec<&'static str> {
    runnable().iter().map(|k| k.name).collect()
}

/// The variant in use: the best available, or the one that the environment variable
/// `MX_CPU_VARIANT` names (read once; a name that is not available changes nothing).
pub fn variant() -> &'static str {
    kernels().name
}

/// The table in use.
pub(crate) fn kernels() -> &'static Kernels {
    static CHOSEN: OnceLock<&'static Kernels> = OnceLock::new();
    CHOSEN.get_or_init(|| {
        let wish = std::env::var("MX_CPU_VARIANT").unwrap_or_default();
        by_name(&wish).unwrap_or(runnable()[0])
    })
}

/// The table of a variant, when this machine can run it.
pub(crate) fn by_name(name: &str) -> Option<&'static Kernels> {
    runnable().iter().copied().find(|k| k.name == name)
}
