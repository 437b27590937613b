//! What this machine can run, and which kernels a product takes: for people and run records.

use super::{Kernels, PreparedWeight, kernels, linear::DOT_ROWS, packed::Path, runnable, variants};
use crate::{
    formats::ElementFormat,
    tensor::{LinearProblem, QuantSpec},
};

/// The processor as this crate sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CpuInfo {
    /// What the processor calls itself; the architecture where it does not say.
    pub processor: String,
    /// Logical processors that this process may use.
    pub threads: usize,
    /// The variant in use.
    pub chosen: &'static str,
    /// Every variant of this build, the best first.
    pub variants: Vec<VariantInfo>,
    /// Ways of `MxMatMul` in the variant in use.
    pub products: Vec<ProductInfo>,
}

/// One variant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VariantInfo {
    /// Its name, as `MX_CPU_VARIANT` takes it.
    pub name: &'static str,
    /// Instructions that it needs beyond the architecture's baseline.
    pub needs: &'static [&'static str],
    /// Whether this machine has them.
    pub runs: bool,
}

/// How rows of x are multiplied with a repacked weight.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProductInfo {
    /// Format of the weight.
    pub weight: ElementFormat,
    /// Format of x; `None` for a float32 x that is not quantised.
    pub activation: Option<ElementFormat>,
    /// Rows of x from which on, and what multiplies them.
    pub ways: Vec<(usize, &'static str)>,
}

/// Most rows of x for which the way is looked up; more take what these take.
const ROWS: usize = 64;

/// What this machine can run and what is in use.
pub fn info() -> CpuInfo {
    let chosen = kernels();
    let mut variants: Vec<VariantInfo> = Vec::new();
    for &kernels in variants::ALL {
        let found = runnable().iter().find(|found| found.name == kernels.name);
        // Two tables of one name serve different machines: the one that runs here has the place.
        let other = found.is_some_and(|&found| !std::ptr::eq(found, kernels));
        if !other && variants.iter().all(|v| v.name != kernels.name) {
            let runs = found.is_some();
            variants.push(VariantInfo { name: kernels.name, needs: kernels.needs, runs });
        }
    }
    let formats = ElementFormat::ALL.into_iter().filter_map(|format| QuantSpec::mx(format).ok());
    let products = formats
        .flat_map(|spec| [Some(spec), None].map(|activation| product(chosen, spec, activation)))
        .collect();
    CpuInfo {
        processor: processor(),
        threads: std::thread::available_parallelism().map_or(1, usize::from),
        chosen: chosen.name,
        variants,
        products,
    }
}

/// What multiplies m rows of x with a repacked weight.
fn way(kernels: &Kernels, problem: &LinearProblem, m: usize) -> &'static str {
    match kernels.packed.choose(problem, m) {
        Some(Path::Integer) => "exact integers",
        Some(Path::Split) => "exact integers, two an element",
        Some(Path::Words) => "panels of exact integers of sixteen bits",
        Some(Path::Planes) => "exact integers, x in four planes",
        Some(Path::Bf16Codes(1)) => "bfloat16 from the codes",
        Some(Path::Bf16Codes(_)) => "two bfloat16 from the codes",
        Some(Path::Bf16Panels(1)) => "panels of bfloat16",
        Some(Path::Bf16Panels(_)) => "panels of bfloat16, twice",
        Some(Path::FloatCodes) => "fp32 from the codes",
        Some(Path::FloatPanels) if m <= DOT_ROWS => "fp32 from the file's layout",
        Some(Path::FloatPanels) => "panels of fp32",
        None => "fp32, not repacked",
    }
}

impl PreparedWeight {
    /// What multiplies one row of x with the weight, in words; more rows may take another way.
    pub fn way(&self, problem: &LinearProblem) -> &'static str {
        way(kernels(), problem, 1)
    }
}

fn product(kernels: &Kernels, weight: QuantSpec, activation: Option<QuantSpec>) -> ProductInfo {
    let problem = LinearProblem { n: 4096, k: 4096, weight, activation, alpha: 1.0, beta: 1.0 };
    let way = |m: usize| way(kernels, &problem, m);
    let mut ways: Vec<(usize, &'static str)> = (1..=ROWS).map(|m| (m, way(m))).collect();
    ways.dedup_by_key(|(_, way)| *way);
    ProductInfo { weight: weight.format, activation: activation.map(|spec| spec.format), ways }
}

#[cfg(target_arch = "x86_64")]
fn processor() -> String {
    let bytes: Vec<u8> = (0x8000_0002..=0x8000_0004_u32)
        .flat_map(cpuid)
        .flat_map(u32::to_le_bytes)
        .take_while(|&b| b != 0)
        .collect();
    String::from_utf8_lossy(&bytes).trim().to_owned()
}

#[cfg(not(target_arch = "x86_64"))]
fn processor() -> String {
    std::env::consts::ARCH.to_owned()
}

/// Whether the processor is Intel's, whose vector instruction for bfloat16 is slower than its multiply-add
/// of fp32 (docs/performance.md has Sapphire Rapids).
#[cfg(target_arch = "x86_64")]
pub(super) fn is_intel() -> bool {
    let [_, b, c, d] = cpuid(0);
    [b, d, c].map(u32::to_le_bytes).concat() == b"GenuineIntel"
}

/// eax, ebx, ecx and edx of a leaf's first subleaf.
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code, unused_unsafe)]
pub(super) fn cpuid(leaf: u32) -> [u32; 4] {
    // SAFETY: every x86-64 processor has the instruction; older compilers want to be told so.
    let r = unsafe { std::arch::x86_64::__cpuid_count(leaf, 0) };
    [r.eax, r.ebx, r.ecx, r.edx]
}
