//! One register of floats, for kernels that are bound by arithmetic and keep all they use in
//! registers (the scores of tokens); [`super::simd::Simd`]'s unit of sixteen takes two of AVX2's.
#![allow(unsafe_code)]

use half::{bf16, f16};

use super::quantize_columns::widen;

/// The operations on a register.
///
/// # Safety
/// Every method may only run on a machine with the instructions, and pointers must be good for
/// [`Lanes::N`] values.
pub(crate) trait Lanes {
    /// N floats.
    type V: Copy;
    /// At most 16, a divisor of 16.
    const N: usize;
    /// Whether [`Lanes::fma`] rounds once.
    const FUSED: bool;
    /// Powers of two from one integer power to the next that [`Lanes::step`] knows: 1, or 8 where an
    /// instruction looks them up.
    const STEPS: f64 = 1.0;

    /// Asks for the cache line of an address, which need not be valid.
    unsafe fn prefetch(_address: *const u8) {}
    unsafe fn splat(value: f32) -> Self::V;
    unsafe fn load(from: *const f32) -> Self::V;
    /// From float16.
    unsafe fn load_f16(from: *const u16) -> Self::V;
    /// From bfloat16.
    unsafe fn load_bf16(from: *const u16) -> Self::V;
    unsafe fn store(to: *mut f32, v: Self::V);
    /// Adds the lanes to N sums.
    unsafe fn add_to(sums: &mut [f64; 16], v: Self::V);
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    /// a * b + c.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The larger of each pair, b where one is NaN.
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    /// Whether a > b anywhere.
    unsafe fn any_above(a: Self::V, b: Self::V) -> bool;
    /// 2^(i / STEPS - 127), where i is the lowest nine bits of v and those of a step (three for
    /// eighths); 0 for i = 0, and for other powers below 2^-126 something below it.
    unsafe fn step(v: Self::V) -> Self::V;
    /// v where p is above zero, 0 elsewhere.
    unsafe fn where_positive(p: Self::V, v: Self::V) -> Self::V;
    /// near where |d| <= 1, far elsewhere, NaN included.
    unsafe fn by_size(d: Self::V, near: Self::V, far: Self::V) -> Self::V;
}

/// A type of logits.
///
/// # Safety
/// `load` is called for N values that are there, on a machine with the instructions of `L`.
pub(crate) trait Logit: Copy {
    fn widen(self) -> f32;
    unsafe fn load<L: Lanes>(from: *const Self) -> L::V;
}

impl Logit for f32 {
    fn widen(self) -> f32 {
        self
    }

    #[inline(always)]
    unsafe fn load<L: Lanes>(from: *const Self) -> L::V {
        // SAFETY: the caller's promise is passed on.
        unsafe { L::load(from) }
    }
}

impl Logit for f16 {
    fn widen(self) -> f32 {
        self.to_f32()
    }

    #[inline(always)]
    unsafe fn load<L: Lanes>(from: *const Self) -> L::V {
        // SAFETY: the caller's promise is passed on.
        unsafe { L::load_f16(from.cast()) }
    }
}

impl Logit for bf16 {
    fn widen(self) -> f32 {
        self.to_f32()
    }

    #[inline(always)]
    unsafe fn load<L: Lanes>(from: *const Self) -> L::V {
        // SAFETY: the caller's promise is passed on.
        unsafe { L::load_bf16(from.cast()) }
    }
}

/// Arrays that the compiler makes vectors of, where the target has any.
pub(crate) struct Portable;

type P = [f32; 8];

#[inline(always)]
fn zip(a: P, b: P, f: impl Fn(f32, f32) -> f32) -> P {
    std::array::from_fn(|i| f(a[i], b[i]))
}

impl Lanes for Portable {
    type V = P;
    const N: usize = 8;
    // Elsewhere a fused multiply-add is a slow library call.
    const FUSED: bool = cfg!(any(target_arch = "aarch64", target_feature = "fma"));

    #[inline(always)]
    unsafe fn splat(value: f32) -> P {
        [value; 8]
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> P {
        // SAFETY: the caller vouches for N floats.
        unsafe { from.cast::<P>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> P {
        // SAFETY: the caller vouches for N values.
        unsafe { from.cast::<[u16; 8]>().read_unaligned() }.map(widen)
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> P {
        // SAFETY: the caller vouches for N values.
        let half = unsafe { from.cast::<[u16; 8]>().read_unaligned() };
        half.map(|bits| f32::from_bits(u32::from(bits) << 16))
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, v: P) {
        // SAFETY: the caller vouches for N floats.
        unsafe { to.cast::<P>().write_unaligned(v) }
    }

    #[inline(always)]
    unsafe fn add_to(sums: &mut [f64; 16], v: P) {
        for (s, v) in sums.iter_mut().zip(v) {
            *s += f64::from(v);
        }
    }

    #[inline(always)]
    unsafe fn add(a: P, b: P) -> P {
        zip(a, b, |a, b| a + b)
    }

    #[inline(always)]
    unsafe fn sub(a: P, b: P) -> P {
        zip(a, b, |a, b| a - b)
    }

    #[inline(always)]
    unsafe fn mul(a: P, b: P) -> P {
        zip(a, b, |a, b| a * b)
    }

    #[inline(always)]
    unsafe fn fma(a: P, b: P, c: P) -> P {
        let one =
            |i: usize| if Self::FUSED { a[i].mul_add(b[i], c[i]) } else { a[i] * b[i] + c[i] };
        std::array::from_fn(one)
    }

    #[inline(always)]
    unsafe fn max(a: P, b: P) -> P {
        zip(a, b, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    unsafe fn any_above(a: P, b: P) -> bool {
        a.iter().zip(&b).fold(false, |any, (a, b)| any | (a > b))
    }

    #[inline(always)]
    unsafe fn step(v: P) -> P {
        v.map(|v| f32::from_bits(v.to_bits() << 23))
    }

    #[inline(always)]
    unsafe fn where_positive(p: P, v: P) -> P {
        zip(p, v, |p, v| if p > 0.0 { v } else { 0.0 })
    }

    #[inline(always)]
    unsafe fn by_size(d: P, near: P, far: P) -> P {
        std::array::from_fn(|i| if d[i].abs() <= 1.0 { near[i] } else { far[i] })
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Ymm, Zmm};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::Lanes;

    /// Needs avx2, fma and f16c.
    pub(crate) struct Ymm;

    /// Needs avx512f, avx512bw, avx512vl and avx512dq.
    pub(crate) struct Zmm;

    /// Methods of one expression.
    macro_rules! methods {
        ($($(#[$doc:meta])* fn $name:ident($($arg:ident: $ty:ty),*) -> $out:ty { $body:expr })+) => { $(
            #[inline(always)]
            unsafe fn $name($($arg: $ty),*) -> $out {
                // SAFETY: register operations, and loads and stores of N values that the caller
                // vouches for.
                unsafe { $body }
            }
        )+ };
    }

    /// Mantissas of 2^(i / 8), rounded, less i << 20.
    #[repr(align(32))]
    struct Eighths([i32; 8]);

    static EIGHTHS: Eighths = {
        let mut eighths =
            [0, 0x0b_95c2, 0x18_37f0, 0x25_fed7, 0x35_04f3, 0x45_672a, 0x57_44fd, 0x6a_c0c7];
        let mut i = 0;
        while i < 8 {
            eighths[i] -= (i as i32) << 20;
            i += 1;
        }
        Eighths(eighths)
    };

    impl Lanes for Ymm {
        type V = __m256;
        const N: usize = 8;
        const FUSED: bool = true;
        const STEPS: f64 = 8.0;

        methods! {
            fn prefetch(address: *const u8) -> () { _mm_prefetch::<_MM_HINT_T0>(address.cast()) }
            fn splat(value: f32) -> __m256 { _mm256_set1_ps(value) }
            fn load(from: *const f32) -> __m256 { _mm256_loadu_ps(from) }
            fn load_f16(from: *const u16) -> __m256 { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) }
            fn load_bf16(from: *const u16) -> __m256 {{
                let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
            }}
            fn store(to: *mut f32, v: __m256) -> () { _mm256_storeu_ps(to, v) }
            fn add_to(sums: &mut [f64; 16], v: __m256) -> () {{
                let parts = [_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v)];
                for (sums, part) in sums.as_chunks_mut::<4>().0.iter_mut().zip(parts) {
                    let sum = _mm256_add_pd(_mm256_loadu_pd(sums.as_ptr()), _mm256_cvtps_pd(part));
                    _mm256_storeu_pd(sums.as_mut_ptr(), sum);
                }
            }}
            fn add(a: __m256, b: __m256) -> __m256 { _mm256_add_ps(a, b) }
            fn sub(a: __m256, b: __m256) -> __m256 { _mm256_sub_ps(a, b) }
            fn mul(a: __m256, b: __m256) -> __m256 { _mm256_mul_ps(a, b) }
            fn fma(a: __m256, b: __m256, c: __m256) -> __m256 { _mm256_fmadd_ps(a, b, c) }
            fn max(a: __m256, b: __m256) -> __m256 { _mm256_max_ps(a, b) }
            fn any_above(a: __m256, b: __m256) -> bool {
                _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_GT_OQ>(a, b)) != 0
            }
            fn step(v: __m256) -> __m256 {{
                let v = _mm256_castps_si256(v);
                // vpermd takes the lowest three bits; the shift leaves them above the mantissa's 20.
                let table = _mm256_load_si256(EIGHTHS.0.as_ptr().cast());
                let eighth = _mm256_permutevar8x32_epi32(table, v);
                _mm256_castsi256_ps(_mm256_add_epi32(eighth, _mm256_slli_epi32::<20>(v)))
            }}
            fn where_positive(p: __m256, v: __m256) -> __m256 {
                _mm256_and_ps(_mm256_cmp_ps::<_CMP_GT_OQ>(p, _mm256_setzero_ps()), v)
            }
            fn by_size(d: __m256, near: __m256, far: __m256) -> __m256 {{
                let size = _mm256_andnot_ps(_mm256_set1_ps(-0.0), d);
                let small = _mm256_cmp_ps::<_CMP_LE_OQ>(size, _mm256_set1_ps(1.0));
                _mm256_blendv_ps(far, near, small)
            }}
        }
    }

    impl Lanes for Zmm {
        type V = __m512;
        const N: usize = 16;
        const FUSED: bool = true;

        methods! {
            fn prefetch(address: *const u8) -> () { _mm_prefetch::<_MM_HINT_T0>(address.cast()) }
            fn splat(value: f32) -> __m512 { _mm512_set1_ps(value) }
            fn load(from: *const f32) -> __m512 { _mm512_loadu_ps(from) }
            fn load_f16(from: *const u16) -> __m512 {
                _mm512_cvtph_ps(_mm256_loadu_si256(from.cast()))
            }
            fn load_bf16(from: *const u16) -> __m512 {{
                let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
            }}
            fn store(to: *mut f32, v: __m512) -> () { _mm512_storeu_ps(to, v) }
            fn add_to(sums: &mut [f64; 16], v: __m512) -> () {{
                let parts = [_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v)];
                for (sums, part) in sums.as_chunks_mut::<8>().0.iter_mut().zip(parts) {
                    let sum = _mm512_add_pd(_mm512_loadu_pd(sums.as_ptr()), _mm512_cvtps_pd(part));
                    _mm512_storeu_pd(sums.as_mut_ptr(), sum);
                }
            }}
            fn add(a: __m512, b: __m512) -> __m512 { _mm512_add_ps(a, b) }
            fn sub(a: __m512, b: __m512) -> __m512 { _mm512_sub_ps(a, b) }
            fn mul(a: __m512, b: __m512) -> __m512 { _mm512_mul_ps(a, b) }
            fn fma(a: __m512, b: __m512, c: __m512) -> __m512 { _mm512_fmadd_ps(a, b, c) }
            fn max(a: __m512, b: __m512) -> __m512 { _mm512_max_ps(a, b) }
            fn any_above(a: __m512, b: __m512) -> bool {
                _mm512_cmp_ps_mask::<_CMP_GT_OQ>(a, b) != 0
            }
            fn step(v: __m512) -> __m512 {
                _mm512_castsi512_ps(_mm512_slli_epi32::<23>(_mm512_castps_si512(v)))
            }
            fn where_positive(p: __m512, v: __m512) -> __m512 {
                _mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_GT_OQ>(p, _mm512_setzero_ps()), v)
            }
            fn by_size(d: __m512, near: __m512, far: __m512) -> __m512 {{
                let small = _mm512_cmp_ps_mask::<_CMP_LE_OQ>(_mm512_abs_ps(d), _mm512_set1_ps(1.0));
                _mm512_mask_blend_ps(small, far, near)
            }}
        }
    }
}
