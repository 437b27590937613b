//! The packed kernels of each machine as function pointers.
#![allow(unsafe_code)]

use super::{integer::Dot, layout::PanelAt, tables::Tables};
use crate::formats::ElementFormat;

pub(crate) type Unpack = super::integer::Unpack;
/// Some blocks of a panel to bfloat16 pairs or floats.
pub(crate) type Decode = unsafe fn(*const Tables, PanelAt, usize, *mut u8);
/// A tile of some rows and all panels that the kernel spans, so many bytes apart.
pub(crate) type Tile = unsafe fn(&super::integer::DotArgs, usize);

/// A kernel that takes some panels in turns.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Together {
    pub panels: usize,
    pub dot: Dot,
}

/// What a machine has; all of it optional.
///
/// The functions may only be called where the variant that lists them was detected.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct PackedKernels {
    /// Whether memory is read faster from several panels at once.
    pub together: bool,
    pub integer: Option<&'static IntegerKernels>,
    /// Panels of sixteen-bit integers, for e3m2.
    pub words: Option<&'static WordKernels>,
    pub bf16: Option<&'static Bf16Kernels>,
    pub float: Option<&'static FloatKernels>,
}

/// See `integer`.
#[derive(Debug)]
pub(crate) struct IntegerKernels {
    /// Whether sums of two products may need more than sixteen bits.
    pub wide: bool,
    /// From codes: by [`code_index`], by [`super::room`], by rows of x. Those of
    /// e3m2 may be missing.
    pub codes: [[&'static [Dot]; 3]; 4],
    /// The same of several panels, where sums have 32 bits; may be fewer.
    pub together: [&'static [Together]; 4],
    /// From unpacked panels, by the latter two.
    pub panels: [&'static [Dot]; 3],
    pub unpack: [Unpack; 3],
}

/// See `integer`.
#[derive(Debug)]
pub(crate) struct WordKernels {
    /// By rows of x.
    pub tiles: &'static [Dot],
    /// By [`code_index`].
    pub unpack: [Unpack; 4],
}

/// See `x86_bf16`.
#[derive(Debug)]
pub(crate) struct Bf16Kernels {
    /// From codes, by [`float_index`], by rows of x; x in one part. Empty where fp32 is faster for a few rows.
    pub one: [&'static [Dot]; 5],
    /// The same for x in two parts.
    pub two: [&'static [Dot]; 5],
    pub decode: [Decode; 5],
    /// Panels that a tile spans.
    pub panels: usize,
    /// By rows of x.
    pub tiles: &'static [Tile],
    /// Most rows of x that codes are multiplied with directly, and that integers are.
    pub code_rows: usize,
    pub integer_rows: usize,
    /// Whether tiles take x in two parts.
    pub parts: bool,
}

/// See `x86_float`.
#[derive(Debug)]
pub(crate) struct FloatKernels {
    /// From codes, by [`float_index`], by rows of x in a tile; may be empty.
    pub dots: [&'static [Dot]; 5],
    /// The same of several panels; may be fewer.
    pub together: [&'static [Together]; 5],
    /// Most rows of x that codes are multiplied with directly.
    pub code_rows: usize,
    /// To panels of f32, [k][16].
    pub decode: [Decode; 5],
}

/// Place of a format in the tables of integer kernels.
pub(crate) const fn integer_index(format: ElementFormat) -> Option<usize> {
    match format {
        ElementFormat::Fp4E2M1 => Some(0),
        ElementFormat::Fp6E2M3 => Some(1),
        ElementFormat::MxInt8 => Some(2),
        _ => None,
    }
}

/// Place of e3m2 in the table of integer kernels from the codes.
pub(crate) const SPLIT: usize = 3;

/// Place of a format in the table of integer kernels from the codes: also e3m2, which is two integers.
pub(crate) const fn code_index(format: ElementFormat) -> Option<usize> {
    match format {
        ElementFormat::Fp6E3M2 => Some(SPLIT),
        _ => integer_index(format),
    }
}

/// Place of a format in the tables of floating-point kernels.
pub(crate) const fn float_index(format: ElementFormat) -> Option<usize> {
    match format {
        ElementFormat::Fp8E4M3 => Some(0),
        ElementFormat::Fp8E5M2 => Some(1),
        ElementFormat::Fp6E3M2 => Some(2),
        ElementFormat::Fp6E2M3 => Some(3),
        ElementFormat::Fp4E2M1 => Some(4),
        ElementFormat::MxInt8 | ElementFormat::Bf16 => None,
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) mod x86 {
    use super::{
        super::{
            integer::{self, ALL, Codes, DotArgs, E2M1, E2M3, E3M2 as I3M2, Int8, Unpacked},
            x86_amx,
            x86_bf16::{self, E2M1 as FE2M1, E2M3 as FE2M3, E3M2, E4M3, E5M2, Format},
            x86_e2m3, x86_float, x86_float512,
            x86_integer::{AvxVnni, Maddubs, Vnni512},
            x86_words::{Words512, WordsAvx2, WordsVnni},
        },
        *,
    };

    macro_rules! integer_kernels {
        ($module:ident, $machine:ty, $words:ty, $wide:literal, [$($mr:literal),+], [$($split:literal),*],
         [$(($rows:literal, $panels:literal)),*], [$($feature:literal),*]) => {
            pub(crate) mod $module {
                use super::*;

                $(#[target_feature(enable = $feature)])*
                pub(super) unsafe fn dot<
                    W: integer::Source<$machine>,
                    const MR: usize,
                    const NP: usize,
                    const ROOM: usize,
                >(
                    args: &DotArgs,
                ) {
                    // SAFETY: the caller's promise is passed on.
                    unsafe { integer::dot::<$machine, W, MR, NP, ROOM>(args) }
                }

                $(#[target_feature(enable = $feature)])*
                unsafe fn unpack<C: integer::IntFormat>(
                    tables: *const Tables,
                    codes: *const u8,
                    blocks: usize,
                    out: *mut u8,
                ) {
                    // SAFETY: the caller's promise is passed on.
                    unsafe { integer::unpack::<$machine, C>(tables, codes, blocks, out) }
                }

                $(#[target_feature(enable = $feature)])*
                unsafe fn words<const MR: usize>(args: &DotArgs) {
                    // SAFETY: the caller's promise is passed on.
                    unsafe { integer::dot::<$words, Unpacked, MR, 1, ALL>(args) }
                }

                $(#[target_feature(enable = $feature)])*
                unsafe fn unpack_words<C: integer::IntFormat>(
                    tables: *const Tables,
                    codes: *const u8,
                    blocks: usize,
                    out: *mut u8,
                ) {
                    // SAFETY: the caller's promise is passed on.
                    unsafe { integer::unpack_words::<$words, C>(tables, codes, blocks, out) }
                }

                pub(crate) static WORDS: WordKernels = WordKernels {
                    tiles: &[$(words::<$mr>),+],
                    unpack: [
                        unpack_words::<E2M1>,
                        unpack_words::<E2M3>,
                        unpack_words::<Int8>,
                        unpack_words::<I3M2>,
                    ],
                };

                struct Of<W>(std::marker::PhantomData<W>);
                impl<W: integer::Source<$machine>> Of<W> {
                    const DOTS: [&'static [Dot]; 3] = [
                        &[$(dot::<W, $mr, 1, { if $wide { 1 } else { ALL } }>),+],
                        &[$(dot::<W, $mr, 1, { if $wide { 2 } else { ALL } }>),+],
                        &[$(dot::<W, $mr, 1, ALL>),+],
                    ];
                    const TOGETHER: &'static [Together] =
                        &[$(Together { panels: $panels, dot: dot::<W, $rows, $panels, ALL> }),*];
                }

                pub(crate) const KERNELS: IntegerKernels = IntegerKernels {
                    wide: $wide,
                    codes: [
                        Of::<Codes<E2M1>>::DOTS,
                        Of::<Codes<E2M3>>::DOTS,
                        Of::<Codes<Int8>>::DOTS,
                        [&[$(dot::<Codes<I3M2>, $split, 1, ALL>),*]; 3],
                    ],
                    together: [
                        Of::<Codes<E2M1>>::TOGETHER,
                        Of::<Codes<E2M3>>::TOGETHER,
                        Of::<Codes<Int8>>::TOGETHER,
                        Of::<Codes<I3M2>>::TOGETHER,
                    ],
                    panels: Of::<Unpacked>::DOTS,
                    unpack: [unpack::<E2M1>, unpack::<E2M3>, unpack::<Int8>],
                };
            }
        };
    }

    // Where sums of pairs are 32 bits wide, all kinds of kernel are the same one.
    integer_kernels!(
        vnni512,
        Vnni512,
        Words512,
        false,
        [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12],
        [1, 2, 3, 4, 5, 6, 7, 8],
        [(1, 4), (2, 4), (3, 2), (4, 2)],
        ["avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vbmi", "avx512vnni", "avx2", "fma"]
    );
    integer_kernels!(
        avx_vnni,
        AvxVnni,
        WordsVnni,
        false,
        [1, 2, 3, 4, 5, 6],
        // Two look-ups of six bits take longer than floats do.
        [],
        [],
        ["avx2", "fma", "f16c", "avxvnni"]
    );
    integer_kernels!(
        maddubs,
        Maddubs,
        WordsAvx2,
        true,
        [1, 2, 3, 4],
        [],
        [],
        ["avx2", "fma", "f16c"]
    );

    /// AVX2's, with a kernel of its own for one row of x and a weight of e2m3.
    pub(crate) static MADDUBS: IntegerKernels = {
        #[target_feature(enable = "avx2,fma")]
        unsafe fn one(args: &DotArgs) {
            // SAFETY: the caller's promise is passed on.
            unsafe { x86_e2m3::dot_one(args) }
        }
        type W = Codes<E2M3>;
        use maddubs::dot;
        let mut kernels = maddubs::KERNELS;
        kernels.codes[1] = [
            &[one, dot::<W, 2, 1, 1>, dot::<W, 3, 1, 1>, dot::<W, 4, 1, 1>],
            &[one, dot::<W, 2, 1, 2>, dot::<W, 3, 1, 2>, dot::<W, 4, 1, 2>],
            &[one, dot::<W, 2, 1, ALL>, dot::<W, 3, 1, ALL>, dot::<W, 4, 1, ALL>],
        ];
        kernels
    };

    pub(crate) mod bf16 {
        use super::*;

        macro_rules! avx512_bf16 {
            ($($function:item)+) => { $(
                #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512bf16")]
                $function
            )+ };
        }
        avx512_bf16! {
            unsafe fn dot<C: Format, const MR: usize, const P: usize>(args: &DotArgs) {
                // SAFETY: the caller's promise is passed on.
                unsafe { x86_bf16::dot::<C, MR, P>(args) }
            }
            unsafe fn tile<const MR: usize>(args: &DotArgs, panel_stride: usize) {
                // SAFETY: the caller's promise is passed on.
                unsafe { x86_bf16::tile::<MR, 2>(args, panel_stride) }
            }
        }

        const fn one<C: Format>() -> &'static [Dot] {
            &[
                dot::<C, 1, 1>,
                dot::<C, 2, 1>,
                dot::<C, 3, 1>,
                dot::<C, 4, 1>,
                dot::<C, 5, 1>,
                dot::<C, 6, 1>,
                dot::<C, 7, 1>,
                dot::<C, 8, 1>,
            ]
        }
        const fn two<C: Format>() -> &'static [Dot] {
            &[dot::<C, 1, 2>, dot::<C, 2, 2>, dot::<C, 3, 2>, dot::<C, 4, 2>]
        }

        const KERNELS: Bf16Kernels = Bf16Kernels {
            one: [one::<E4M3>(), one::<E5M2>(), one::<E3M2>(), one::<FE2M3>(), one::<FE2M1>()],
            two: [two::<E4M3>(), two::<E5M2>(), two::<E3M2>(), two::<FE2M3>(), two::<FE2M1>()],
            decode: float512::decoders::<false>(),
            panels: 2,
            tiles: &[
                tile::<1>, tile::<2>, tile::<3>, tile::<4>, tile::<5>, tile::<6>, tile::<7>,
                tile::<8>, tile::<9>, tile::<10>, tile::<11>, tile::<12>,
            ],
            code_rows: 8,
            integer_rows: usize::MAX,
            parts: false,
        };

        pub(crate) static AVX512: Bf16Kernels = KERNELS;

        /// With AMX's tiles. Intel's vector instruction for bfloat16 is slower than its multiply-add, so
        /// a few rows take that.
        pub(crate) static AMX: Bf16Kernels = Bf16Kernels {
            tiles: &[
                x86_amx::tile::<1>,
                x86_amx::tile::<2>,
                x86_amx::tile::<3>,
                x86_amx::tile::<4>,
                x86_amx::tile::<5>,
                x86_amx::tile::<6>,
                x86_amx::tile::<7>,
                x86_amx::tile::<8>,
                x86_amx::tile::<9>,
                x86_amx::tile::<10>,
                x86_amx::tile::<11>,
                x86_amx::tile::<12>,
                x86_amx::tile::<13>,
                x86_amx::tile::<14>,
                x86_amx::tile::<15>,
                x86_amx::tile::<16>,
                x86_amx::tile::<17>,
                x86_amx::tile::<18>,
                x86_amx::tile::<19>,
                x86_amx::tile::<20>,
                x86_amx::tile::<21>,
                x86_amx::tile::<22>,
                x86_amx::tile::<23>,
                x86_amx::tile::<24>,
                x86_amx::tile::<25>,
                x86_amx::tile::<26>,
                x86_amx::tile::<27>,
                x86_amx::tile::<28>,
                x86_amx::tile::<29>,
                x86_amx::tile::<30>,
                x86_amx::tile::<31>,
                x86_amx::tile::<32>,
            ],
            one: [&[]; 5],
            two: [&[]; 5],
            code_rows: 0,
            integer_rows: 8,
            parts: true,
            ..KERNELS
        };
    }

    pub(crate) mod float512 {
        use super::*;

        macro_rules! avx512_vbmi {
            ($($function:item)+) => { $(
                #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")]
                $function
            )+ };
        }
        avx512_vbmi! {
            unsafe fn dot<C: Format, const MR: usize, const NP: usize>(args: &DotArgs) {
                // SAFETY: the caller's promise is passed on.
                unsafe { x86_float512::dot::<C, MR, NP>(args) }
            }
            unsafe fn decode<C: Format, const F32: bool>(
                tables: *const Tables,
                panel: PanelAt,
                blocks: usize,
                out: *mut u8,
            ) {
                // SAFETY: the caller's promise is passed on.
                unsafe { x86_bf16::decode::<C, F32>(tables, panel, blocks, out) }
            }
        }

        /// To bfloat16 or to floats.
        pub(crate) const fn decoders<const F32: bool>() -> [Decode; 5] {
            [
                decode::<E4M3, F32>,
                decode::<E5M2, F32>,
                decode::<E3M2, F32>,
                decode::<FE2M3, F32>,
                decode::<FE2M1, F32>,
            ]
        }

        const fn dots<C: Format>() -> &'static [Dot] {
            &[dot::<C, 1, 1>, dot::<C, 2, 1>, dot::<C, 3, 1>, dot::<C, 4, 1>]
        }
        const fn together<C: Format>() -> &'static [Together] {
            &[
                Together { panels: 4, dot: dot::<C, 1, 4> },
                Together { panels: 4, dot: dot::<C, 2, 4> },
                Together { panels: 2, dot: dot::<C, 3, 2> },
                Together { panels: 2, dot: dot::<C, 4, 2> },
            ]
        }

        pub(crate) static FLOATS: FloatKernels = FloatKernels {
            dots: [
                dots::<E4M3>(),
                dots::<E5M2>(),
                dots::<E3M2>(),
                dots::<FE2M3>(),
                dots::<FE2M1>(),
            ],
            together: [
                together::<E4M3>(),
                together::<E5M2>(),
                together::<E3M2>(),
                together::<FE2M3>(),
                together::<FE2M1>(),
            ],
            code_rows: 4,
            decode: decoders::<true>(),
        };
    }

    pub(crate) mod avx2 {
        use super::*;

        #[target_feature(enable = "avx2,fma")]
        unsafe fn dot<C: Format, const MR: usize, const HS: usize>(args: &DotArgs) {
            // SAFETY: the caller's promise is passed on.
            unsafe { x86_float::dot::<C, MR, HS>(args) }
        }
        #[target_feature(enable = "avx2,fma")]
        unsafe fn decode<C: Format>(
            tables: *const Tables,
            panel: PanelAt,
            blocks: usize,
            out: *mut u8,
        ) {
            // SAFETY: the caller's promise is passed on.
            unsafe { x86_float::decode::<C>(tables, panel, blocks, out) }
        }
        /// Up to so many rows of x a tile's sums and a step's values fit the registers.
        macro_rules! dots {
            ($format:ident, 1 $(, $rows:literal)*; $hs:literal) => {
                &[dot::<$format, 1, $hs> $(, dot::<$format, $rows, 1>)*]
            };
        }

        /// A single row of x shares its loads between both halves of a panel, but for tables of six bits
        /// this takes more registers than there are.
        pub(crate) const DOTS: [&[Dot]; 5] = [
            dots!(E4M3, 1, 2, 3, 4, 5, 6, 7, 8; 2),
            dots!(E5M2, 1, 2, 3, 4, 5, 6, 7, 8; 2),
            dots!(E3M2, 1, 2, 3, 4, 5, 6; 1),
            dots!(FE2M3, 1, 2, 3, 4, 5, 6; 1),
            dots!(FE2M1, 1, 2, 3, 4, 5; 1),
        ];

        const KERNELS: FloatKernels = FloatKernels {
            dots: DOTS,
            together: [&[]; 5],
            code_rows: 8,
            decode: [
                decode::<E4M3>,
                decode::<E5M2>,
                decode::<E3M2>,
                decode::<FE2M3>,
                decode::<FE2M1>,
            ],
        };

        pub(crate) static FLOATS: FloatKernels = KERNELS;

        /// Where AVX-512 has panels of fp32 for more rows.
        pub(crate) static FEW_ROWS: FloatKernels = FloatKernels { code_rows: 4, ..KERNELS };
    }
}
