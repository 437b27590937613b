//! The kernels of each variant as function pointers, all made by one macro.
#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
use super::{info::is_intel, packed::kernels::x86};
use super::{
    packed::{
        kernels::PackedKernels,
        layout::{PanelAt, Row},
        planes::{self, Rest},
        tables::Tables,
        x::{self, Place, XForm},
    },
    panel::{PANEL, Weight},
    quantize_columns::{self, Scratch, Strip},
    rows::{self, RowQuant},
    scalar::Scalar,
    simd::{self, Codec, Simd},
    tile::{self, XPanel},
};
use crate::{
    formats::ElementFormat,
    pack,
    quantize::FloatType,
    scores::{Distribution, Divergence},
    tensor::Float,
};

type Decode = unsafe fn(&Weight<'_>, usize, usize, usize, *mut f32, &mut [bool; PANEL]);
type Tile = unsafe fn(*const f32, *const f32, usize, usize, *mut f32, usize, bool);
type Dots = unsafe fn(&Weight<'_>, XPanel, usize, usize, &mut [f32], &mut [bool]);

/// Dot-product kernels of one format, by rows of x: [1, 2, 3, 4], and by rows of w: a bunch of
/// [`BUNCH`] of them or a single one.
pub(crate) type DotsOfFormat = [[Dots; 2]; 4];

/// Rows of w that a dot-product kernel takes at once, for 1, 2, 3 and 4 rows of x.
pub(crate) const BUNCH: [usize; 4] = [4, 2, 1, 1];

/// Everything that is compiled once for each set of instructions.
///
/// The functions may only be called on a machine for which `detect` says yes; see the functions of
/// the same names in `panel`, `tile`, `rows`, `quantize_columns`, `pack`, `softmax` and `divergence`.
pub(crate) struct Kernels {
    pub name: &'static str,
    /// Instructions beyond the architecture's baseline.
    pub needs: &'static [&'static str],
    pub detect: fn() -> bool,
    /// Panels that a tile spans.
    pub panels: usize,
    /// Tile kernels by rows of x: 1, 2, ...
    pub tiles: &'static [Tile],
    /// Panel decoders in the order of `ElementFormat::ALL`.
    pub decode: [Decode; 7],
    /// Dot products in the order of `ElementFormat::ALL`.
    pub dots: [DotsOfFormat; 7],
    /// What works on repacked weights.
    pub packed: PackedKernels,
    pub pack_x: unsafe fn(&XForm, &[f32], &Place) -> (Row, i32),
    pub add_rest: unsafe fn(&Tables, usize, PanelAt, Rest, &mut [f32; PANEL]),
    pub fake_row: unsafe fn(&RowQuant, &[f32], f32, &mut [f32]) -> bool,
    pub code_row: unsafe fn(&RowQuant, &[f32], &mut [u8], &mut [u8]),
    pub code_columns: unsafe fn(&RowQuant, &Strip<'_>, usize, &mut Scratch),
    pub load_row: unsafe fn(FloatType, &[u8], &mut [f32]),
    pub pack_row: unsafe fn(ElementFormat, &[u8], &mut [u8]),
    pub scale_row: unsafe fn(&[f32], f64, &[f64], &mut [f32]),
    pub softmax: unsafe fn(&Float<'_>) -> Option<Distribution>,
    pub divergence: unsafe fn(&Float<'_>, &Float<'_>) -> Option<Divergence>,
}

/// out = factor * c + bias, rounded once.
#[inline(always)]
fn scale_row_impl(c: &[f32], factor: f64, bias: &[f64], out: &mut [f32]) {
    for ((o, &c), &b) in out.iter_mut().zip(c).zip(bias) {
        *o = (f64::from(c) * factor + b) as f32;
    }
}

/// Nothing that works on repacked weights.
const NO_PACKED: PackedKernels =
    PackedKernels { together: false, integer: None, words: None, bf16: None, float: None };

macro_rules! variant {
    ($module:ident, $name:literal, $simd:ty, $panels:literal, [$($mr:literal),+],
     [$($feature:literal),*], $packed:expr, $detect:expr) => {
        mod $module {
            use super::*;

            $(#[target_feature(enable = $feature)])*
            unsafe fn decode<C: Codec>(
                w: &Weight<'_>,
                n0: usize,
                k0: usize,
                kc: usize,
                out: *mut f32,
                bad: &mut [bool; PANEL],
            ) {
                // SAFETY: the caller's promise is passed on.
                unsafe { super::super::panel::decode_panel::<$simd, C>(w, n0, k0, kc, out, bad) }
            }

            $(#[target_feature(enable = $feature)])*
            unsafe fn tile<const MR: usize>(
                x: *const f32,
                panels: *const f32,
                panel_stride: usize,
                kc: usize,
                c: *mut f32,
                ldc: usize,
                add: bool,
            ) {
                // SAFETY: the caller's promise is passed on.
                unsafe {
                    tile::tile::<$simd, MR, $panels>(x, panels, panel_stride, kc, c, ldc, add);
                }
            }

            $(#[target_feature(enable = $feature)])*
            unsafe fn dots<C: Codec, const MB: usize, const NB: usize>(
                w: &Weight<'_>,
                x: XPanel,
                m0: usize,
                n0: usize,
                out: &mut [f32],
                bad: &mut [bool],
            ) {
                // SAFETY: the caller's promise is passed on.
                unsafe { tile::dots::<$simd, C, MB, NB>(w, x, m0, n0, out, bad) }
            }

            $(#[target_feature(enable = $feature)])*
            unsafe fn fake_row(q: &RowQuant, x: &[f32], divisor: f32, out: &mut [f32]) -> bool {
                rows::fake_row(q, x, divisor, out)
            }

            $(#[target_feature(enable = $feature)])*
            unsafe fn code_row(q: &RowQuant, x: &[f32], out: &mut [u8], scales: &mut [u8]) {
                rows::code_row(q, x, out, scales)
            }

            $(#[target_feature(enable = $feature)])*
            unsafe fn code_columns(
                q: &RowQuant,
                strip: &Strip<'_>,
                slot: usize,
                scratch: &mut Scratch,
            ) {
                // SAFETY: the caller's promise is passed on.
                unsafe { quantize_columns::code_columns::<$simd>(q, strip, slot, scratch) }
            }

            $(#[target_feature(enable = $feature)])*
            unsafe fn load_row(float_type: FloatType, bytes: &[u8], out: &mut [f32]) {
                quantize_columns::load(float_type, bytes, out)
            }

            $(#[target_feature(enable = $feature)])*
            unsafe fn pack_row(format: ElementFormat, codes: &[u8], out: &mut [u8]) {
                pack::pack_bytes(format, codes, out)
            }

            $(#[target_feature(enable = $feature)])*
            unsafe fn scale_row(c: &[f32], factor: f64, bias: &[f64], out: &mut [f32]) {
                scale_row_impl(c, factor, bias, out)
            }

            $(#[target_feature(enable = $feature)])*
            unsafe fn softmax(row: &Float<'_>) -> Option<Distribution> {
                // SAFETY: the caller's promise is passed on.
                unsafe { <$simd as Simd>::softmax(row) }
            }

            $(#[target_feature(enable = $feature)])*
            unsafe fn divergence(base: &Float<'_>, this: &Float<'_>) -> Option<Divergence> {
                // SAFETY: the caller's promise is passed on.
                unsafe { <$simd as Simd>::divergence(base, this) }
            }

            const fn dots_of<C: Codec>() -> DotsOfFormat {
                [
                    [dots::<C, 1, { BUNCH[0] }>, dots::<C, 1, 1>],
                    [dots::<C, 2, { BUNCH[1] }>, dots::<C, 2, 1>],
                    [dots::<C, 3, { BUNCH[2] }>, dots::<C, 3, 1>],
                    [dots::<C, 4, { BUNCH[3] }>, dots::<C, 4, 1>],
                ]
            }

            $(#[target_feature(enable = $feature)])*
            unsafe fn pack_x(form: &XForm, x: &[f32], place: &Place) -> (Row, i32) {
                // SAFETY: the caller's promise is passed on.
                unsafe { x::pack_row(form, x, place) }
            }

            $(#[target_feature(enable = $feature)])*
            unsafe fn add_rest(
                tables: &Tables,
                bits: usize,
                panel: PanelAt,
                rest: Rest,
                sums: &mut [f32; PANEL],
            ) {
                // SAFETY: the caller's promise is passed on.
                unsafe { planes::add_rest(tables, bits, panel, rest, sums) }
            }

            pub(super) const TABLE: Kernels = Kernels {
                name: $name,
                needs: &[$($feature),*],
                detect: $detect,
                packed: $packed,
                pack_x,
                add_rest,
                panels: $panels,
                tiles: &[$(tile::<$mr>),+],
                decode: [
                    decode::<simd::Fp8E4M3>,
                    decode::<simd::Fp8E5M2>,
                    decode::<simd::Fp6E3M2>,
                    decode::<simd::Fp6E2M3>,
                    decode::<simd::Fp4E2M1>,
                    decode::<simd::MxInt8>,
                    decode::<simd::Bf16>,
                ],
                dots: [
                    dots_of::<simd::Fp8E4M3>(),
                    dots_of::<simd::Fp8E5M2>(),
                    dots_of::<simd::Fp6E3M2>(),
                    dots_of::<simd::Fp6E2M3>(),
                    dots_of::<simd::Fp4E2M1>(),
                    dots_of::<simd::MxInt8>(),
                    dots_of::<simd::Bf16>(),
                ],
                fake_row,
                code_row,
                code_columns,
                load_row,
                pack_row,
                scale_row,
                softmax,
                divergence,
            };
        }
    };
}

variant!(scalar_kernels, "scalar", Scalar, 1, [1, 2, 3, 4], [], NO_PACKED, || true);

#[cfg(target_arch = "x86_64")]
variant!(
    avx2_kernels,
    "avx2",
    super::super::avx2::Avx2,
    1,
    [1, 2, 3, 4, 5, 6],
    ["avx2", "fma", "f16c"],
    PackedKernels {
        together: false,
        integer: Some(&x86::MADDUBS),
        words: Some(&x86::maddubs::WORDS),
        bf16: None,
        float: Some(&x86::avx2::FLOATS),
    },
    || {
        std::arch::is_x86_feature_detected!("avx2")
            && std::arch::is_x86_feature_detected!("fma")
            && std::arch::is_x86_feature_detected!("f16c")
    }
);

#[cfg(target_arch = "x86_64")]
variant!(
    avx512_kernels,
    "avx512",
    super::super::avx512::Avx512,
    2,
    [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14],
    ["avx512f", "avx512bw", "avx512vl", "avx512dq", "avx2", "fma", "f16c"],
    // Sixteen-bit products of 256 bits are slower than fp32's of 512.
    PackedKernels { words: None, float: Some(&x86::avx2::FEW_ROWS), ..avx2_kernels::TABLE.packed },
    || {
        std::arch::is_x86_feature_detected!("avx512f")
            && std::arch::is_x86_feature_detected!("avx512bw")
            && std::arch::is_x86_feature_detected!("avx512vl")
            && std::arch::is_x86_feature_detected!("avx512dq")
            && (avx2_kernels::TABLE.detect)()
    }
);

#[cfg(target_arch = "aarch64")]
variant!(
    neon_kernels,
    "neon",
    super::super::neon::Neon,
    1,
    [1, 2, 3, 4, 5, 6],
    ["neon"],
    NO_PACKED,
    || std::arch::is_aarch64_feature_detected!("neon")
);

/// AVX2 with the dot products of AVX-VNNI.
#[cfg(target_arch = "x86_64")]
static AVX_VNNI: Kernels = Kernels {
    name: "avxvnni",
    needs: &["avx2", "fma", "f16c", "avxvnni"],
    packed: PackedKernels {
        integer: Some(&x86::avx_vnni::KERNELS),
        words: Some(&x86::avx_vnni::WORDS),
        ..avx2_kernels::TABLE.packed
    },
    detect: || std::arch::is_x86_feature_detected!("avxvnni") && (avx2_kernels::TABLE.detect)(),
    ..avx2_kernels::TABLE
};

#[cfg(target_arch = "x86_64")]
const AVX512_VNNI_NEEDS: &[&str] = &[
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512dq",
    "avx512vbmi",
    "avx512vnni",
    "avx2",
    "fma",
    "f16c",
];
#[cfg(target_arch = "x86_64")]
const AVX512_BF16_NEEDS: &[&str] = &[
    "avx512bf16",
    "avx512vnni",
    "avx512vbmi",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512dq",
    "avx2",
    "fma",
    "f16c",
];

/// AVX-512 with VNNI's integer dot products and VBMI's tables.
#[cfg(target_arch = "x86_64")]
static AVX512_VNNI: Kernels = Kernels {
    name: "avx512vnni",
    needs: AVX512_VNNI_NEEDS,
    packed: PackedKernels {
        together: true,
        integer: Some(&x86::vnni512::KERNELS),
        words: Some(&x86::vnni512::WORDS),
        bf16: None,
        float: Some(&x86::float512::FLOATS),
    },
    detect: || {
        std::arch::is_x86_feature_detected!("avx512vnni")
            && std::arch::is_x86_feature_detected!("avx512vbmi")
            && (avx512_kernels::TABLE.detect)()
    },
    ..avx512_kernels::TABLE
};

/// The same with bfloat16 dot products.
#[cfg(target_arch = "x86_64")]
const AVX512_BF16_TABLE: Kernels = Kernels {
    name: "avx512bf16",
    needs: AVX512_BF16_NEEDS,
    packed: PackedKernels {
        together: false,
        integer: Some(&x86::vnni512::KERNELS),
        words: None,
        bf16: Some(&x86::bf16::AVX512),
        float: Some(&x86::float512::FLOATS),
    },
    detect: || std::arch::is_x86_feature_detected!("avx512bf16") && (AVX512_VNNI.detect)(),
    ..avx512_kernels::TABLE
};

#[cfg(target_arch = "x86_64")]
static AVX512_BF16: Kernels =
    Kernels { detect: || (AVX512_BF16_TABLE.detect)() && !is_intel(), ..AVX512_BF16_TABLE };

/// The same where it is slower than [`AVX512_VNNI`], which comes first: for those who ask for it, and for tests.
#[cfg(target_arch = "x86_64")]
static AVX512_BF16_INTEL: Kernels =
    Kernels { detect: || (AVX512_BF16_TABLE.detect)() && is_intel(), ..AVX512_BF16_TABLE };

/// The same with AMX's tiles of bfloat16.
#[cfg(target_arch = "x86_64")]
static AMX: Kernels = Kernels {
    name: "amx",
    needs: &[
        "amx-tile",
        "amx-bf16",
        "avx512bf16",
        "avx512vnni",
        "avx512vbmi",
        "avx512f",
        "avx512bw",
        "avx512vl",
        "avx512dq",
        "avx2",
        "fma",
        "f16c",
    ],
    packed: PackedKernels {
        together: true,
        integer: Some(&x86::vnni512::KERNELS),
        words: None,
        bf16: Some(&x86::bf16::AMX),
        float: Some(&x86::float512::FLOATS),
    },
    detect: || (AVX512_BF16_TABLE.detect)() && super::packed::x86_amx::detect(),
    ..avx512_kernels::TABLE
};

#[cfg(target_arch = "x86_64")]
static AVX512: Kernels = avx512_kernels::TABLE;
#[cfg(target_arch = "x86_64")]
static AVX2: Kernels = avx2_kernels::TABLE;
#[cfg(target_arch = "aarch64")]
static NEON: Kernels = neon_kernels::TABLE;
/// NEON with the dot products of Armv8.2.
#[cfg(target_arch = "aarch64")]
static NEON_DOTPROD: Kernels = Kernels {
    name: "neondotprod",
    needs: &["neon", "dotprod"],
    packed: PackedKernels { integer: Some(&super::neon_integer::KERNELS), ..NO_PACKED },
    detect: || super::neon_dot::has_dotprod() && (neon_kernels::TABLE.detect)(),
    ..neon_kernels::TABLE
};
static SCALAR: Kernels = scalar_kernels::TABLE;

/// All variants of this build, the best first.
#[cfg(target_arch = "x86_64")]
pub(crate) static ALL: &[&Kernels] =
    &[&AMX, &AVX512_BF16, &AVX512_VNNI, &AVX512_BF16_INTEL, &AVX512, &AVX_VNNI, &AVX2, &SCALAR];
/// All variants of this build, the best first.
#[cfg(target_arch = "aarch64")]
pub(crate) static ALL: &[&Kernels] = &[&NEON_DOTPROD, &NEON, &SCALAR];
/// All variants of this build, the best first.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
pub(crate) static ALL: &[&Kernels] = &[&SCALAR];
