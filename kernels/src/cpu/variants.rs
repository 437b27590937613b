//! The kernels of each variant as function pointers, all made by one macro.
#![allow(unsafe_code)]

use super::{
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
    pub detect: fn() -> bool,
    /// Panels that a tile spans.
    pub panels: usize,
    /// Tile kernels by rows of x: 1, 2, ...
    pub tiles: &'static [Tile],
    /// Panel decoders in the order of `ElementFormat::ALL`.
    pub decode: [Decode; 7],
    /// Dot products in the order of `ElementFormat::ALL`.
    pub dots: [DotsOfFormat; 7],
    pub fake_row: unsafe fn(&RowQuant, &[f32], f32, &mut [f32]) -> bool,
    pub code_row: unsafe fn(&RowQuant, &[f32], &mut [u8], &mut [u8]),
    pub code_columns: unsafe fn(&RowQuant, &Strip<'_>, &mut Scratch, &mut [u8], &mut [u8; 16]),
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

macro_rules! variant {
    ($module:ident, $name:literal, $simd:ty, $panels:literal, [$($mr:literal),+],
     [$($feature:literal),*], $detect:expr) => {
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
                scratch: &mut Scratch,
                out: &mut [u8],
                scales: &mut [u8; 16],
            ) {
                // SAFETY: the caller's promise is passed on.
                unsafe { quantize_columns::code_columns::<$simd>(q, strip, scratch, out, scales) }
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

            pub(super) static TABLE: Kernels = Kernels {
                name: $name,
                detect: $detect,
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

variant!(scalar_kernels, "scalar", Scalar, 1, [1, 2, 3, 4], [], || true);

#[cfg(target_arch = "x86_64")]
variant!(
    avx2_kernels,
    "avx2",
    super::super::avx2::Avx2,
    1,
    [1, 2, 3, 4, 5, 6],
    ["avx2", "fma", "f16c"],
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
    || {
        std::arch::is_x86_feature_detected!("avx512f")
            && std::arch::is_x86_feature_detected!("avx512bw")
            && std::arch::is_x86_feature_detected!("avx512vl")
            && std::arch::is_x86_feature_detected!("avx512dq")
            && (avx2_kernels::TABLE.detect)()
    }
);

/// All variants of this build, the best first.
#[cfg(target_arch = "x86_64")]
pub(crate) static ALL: &[&Kernels] =
    &[&avx512_kernels::TABLE, &avx2_kernels::TABLE, &scalar_kernels::TABLE];
/// All variants of this build, the best first.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) static ALL: &[&Kernels] = &[&scalar_kernels::TABLE];
