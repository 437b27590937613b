//! Products in fp32 for machines without a bfloat16 dot product: AVX2 and FMA.
//!
//! A float of few bits is a bfloat16 with zeros below, so codes become the upper halves of floats, two in
//! each lane of 32 bits: tables of bytes give codes of four and six bits, shifts those of eight. A mask
//! and a shift then take a lane apart. A conversion would take a cycle for eight and share pipes with the rest.
#![allow(unsafe_code)]
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;

use super::{
    super::panel::PANEL,
    integer::DotArgs,
    layout::{BLOCK, PanelAt, block_bytes},
    tables::{Tables, words},
    x86_bf16::Format,
};

/// Rows of half a panel, what eight lanes hold.
const HALF: usize = PANEL / 2;

/// Whether a vector of [`floats`] is one k of eight rows, or else two k of four rows.
const fn one_k<C: Format>() -> bool {
    C::FORMAT.bits() == 8
}

/// Sixteen k of a block.
#[derive(Clone, Copy)]
struct Piece {
    codes: *const u8,
    /// The high bits of codes of six.
    high: *const u8,
}

/// k of a [`Piece`].
const PIECE: usize = BLOCK / 2;

impl Piece {
    /// Half `i` of a block.
    #[inline(always)]
    unsafe fn new<C: Format>(block: *const u8, i: usize) -> Self {
        let codes = if C::FORMAT.bits() == 8 { 256 } else { 128 };
        // SAFETY: the caller vouches for the block.
        unsafe { Self { codes: block.add(codes * i), high: block.wrapping_add(256 + 64 * i) } }
    }
}

/// A table of sixteen bytes in both halves of a register.
#[inline(always)]
unsafe fn table(bytes: &[u8], first: usize) -> __m256i {
    // SAFETY: the slice has sixteen bytes from `first` on, or this does not get past it.
    unsafe {
        _mm256_broadcastsi128_si256(_mm_loadu_si128(bytes[first..first + 16].as_ptr().cast()))
    }
}

/// Low and high bytes of 32 codes as bfloat16: four k of eight rows, `h` 0 or 1, of a piece's register `i`.
#[inline(always)]
unsafe fn looked_up<C: Format>(tables: &Tables, piece: Piece, i: usize, h: usize) -> [__m256i; 2] {
    // SAFETY: the caller vouches for the piece.
    unsafe {
        let mut four = _mm256_load_si256(piece.codes.add(64 * (i / 2) + 32 * h).cast());
        if i % 2 == 1 {
            four = _mm256_srli_epi16::<4>(four);
        }
        four = _mm256_and_si256(four, _mm256_set1_epi8(0xf));
        if C::FORMAT.bits() == 4 {
            let (low, high) = (table(&tables.low, 0), table(&tables.high, 0));
            return [_mm256_shuffle_epi8(low, four), _mm256_shuffle_epi8(high, four)];
        }
        // The sign and the highest bit of the magnitude, each moved to where a blend looks for it.
        let high = _mm256_load_si256(piece.high.add(32 * h).cast());
        let (sign, bit) = match i {
            0 => (_mm256_slli_epi16::<6>(high), _mm256_slli_epi16::<7>(high)),
            1 => (_mm256_slli_epi16::<4>(high), _mm256_slli_epi16::<5>(high)),
            2 => (_mm256_slli_epi16::<2>(high), _mm256_slli_epi16::<3>(high)),
            _ => (high, _mm256_slli_epi16::<1>(high)),
        };
        let sign = _mm256_and_si256(sign, _mm256_set1_epi8(-128));
        let low = either(&tables.low, four, bit);
        [low, _mm256_or_si256(either(&tables.high, four, bit), sign)]
    }
}

/// Codes of five bits looked up: four in `four`, the highest where a blend looks for it in `bit`.
#[inline(always)]
unsafe fn either(bytes: &[u8], four: __m256i, bit: __m256i) -> __m256i {
    // SAFETY: tables have 32 bytes.
    unsafe {
        let first = _mm256_shuffle_epi8(table(bytes, 0), four);
        _mm256_blendv_epi8(first, _mm256_shuffle_epi8(table(bytes, 16), four), bit)
    }
}

/// Codes in the upper bytes of words as upper halves of floats.
#[inline(always)]
unsafe fn place<C: Format>(codes: __m256i) -> __m256i {
    // SAFETY: register operations only.
    unsafe {
        let words = const { words(C::FORMAT) };
        // The arithmetic shift leaves the sign in place, the mask takes its copies out.
        let moved = match words.shift {
            4 => _mm256_srai_epi16::<4>(codes),
            _ => _mm256_srai_epi16::<3>(codes),
        };
        let fields = _mm256_and_si256(moved, _mm256_set1_epi16(words.mask as i16));
        _mm256_or_si256(fields, _mm256_set1_epi16(words.exponent as i16))
    }
}

/// 32 codes of eight bits as the upper halves of floats, times 2^-[`shift`]: k and k + 1 of each row, then
/// k + 2 and k + 3. With `SMALL`, there may be subnormal ones and zeros among them.
#[inline(always)]
unsafe fn shifted<C: Format, const SMALL: bool>(tables: &Tables, codes: __m256i) -> [__m256i; 2] {
    // SAFETY: register operations only.
    unsafe {
        let words = const { words(C::FORMAT) };
        let even = place::<C>(_mm256_slli_epi16::<8>(codes));
        let odd = place::<C>(codes);
        if !SMALL {
            return [even, odd];
        }
        // Larger magnitudes have bit 7 set after the addition, for which a look-up gives 0.
        let magnitudes = _mm256_and_si256(codes, _mm256_set1_epi8(0x7f));
        let index = _mm256_adds_epu8(magnitudes, _mm256_set1_epi8((128 - words.small) as i8));
        let high = _mm256_shuffle_epi8(table(&tables.mend_high, 0), index);
        let low = _mm256_shuffle_epi8(table(&tables.mend_low, 0), index);
        let upper = _mm256_set1_epi16(0xff00_u16 as i16);
        let mend_even =
            _mm256_or_si256(_mm256_slli_epi16::<8>(high), _mm256_andnot_si256(upper, low));
        let mend_odd = _mm256_or_si256(_mm256_and_si256(upper, high), _mm256_srli_epi16::<8>(low));
        [_mm256_xor_si256(even, mend_even), _mm256_xor_si256(odd, mend_odd)]
    }
}

/// The floats of 32 codes, times 2^-[`shift`]: of each k eight rows (`one_k`); or of rows 0, 1, 4 and 5 two
/// k side by side, the next two, and the same of rows 2, 3, 6 and 7.
#[inline(always)]
unsafe fn floats<C: Format, const SMALL: bool>(
    tables: &Tables,
    piece: Piece,
    i: usize,
    h: usize,
) -> [__m256; 4] {
    // SAFETY: the caller vouches for the piece.
    unsafe {
        let [first, second] = if one_k::<C>() {
            let codes = _mm256_load_si256(piece.codes.add(64 * i + 32 * h).cast());
            shifted::<C, SMALL>(tables, codes)
        } else {
            let [low, high] = looked_up::<C>(tables, piece, i, h);
            [_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high)]
        };
        let mask = _mm256_set1_epi32(0xffff_0000_u32 as i32);
        [
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(first)),
            _mm256_castsi256_ps(_mm256_and_si256(first, mask)),
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(second)),
            _mm256_castsi256_ps(_mm256_and_si256(second, mask)),
        ]
    }
}

/// Scales of eight rows from their bytes, as bits of floats, times 2^`shift`.
#[inline(always)]
unsafe fn scales<C: Format>(from: *const u8) -> __m256i {
    // SAFETY: the caller vouches for eight bytes.
    unsafe {
        let bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(from.cast()));
        let scales = _mm256_slli_epi32::<23>(bytes);
        match const { words(C::FORMAT).left_out << 23 } {
            0 => scales,
            left_out => _mm256_add_epi32(scales, _mm256_set1_epi32(left_out)),
        }
    }
}

/// The sums over a block of `HS` halves of a panel from half `h` on, without the scales: of all k, or (see
/// [`floats`]) of even and of odd k, of four rows and of the other four.
#[inline(always)]
unsafe fn block_sums<C: Format, const MR: usize, const HS: usize, const SMALL: bool>(
    tables: &Tables,
    w: *const u8,
    x: *const f32,
    h: usize,
    two: usize,
) -> [[[__m256; 2]; HS]; MR] {
    // SAFETY: the caller vouches for a block of w and MR rows of x.
    unsafe {
        // An addition waits four cycles for the one before it: few rows take four chains each.
        let chains = match MR {
            1 | 2 => 4,
            _ if MR > 4 && one_k::<C>() => 1,
            _ => 2,
        };
        let mut acc = [[[_mm256_setzero_ps(); 4]; HS]; MR];
        for half in 0..two {
            let piece = Piece::new::<C>(w, half);
            for part in 0..4 {
                for s in 0..HS {
                    let values = floats::<C, SMALL>(tables, piece, part, h + s);
                    for r in 0..MR {
                        let x = x.add(r * BLOCK + PIECE * half + 4 * part);
                        for (i, value) in values.into_iter().enumerate() {
                            let (x, chain) = if one_k::<C>() {
                                (_mm256_broadcast_ss(&*x.add(i)), i % chains)
                            } else {
                                let two = &*x.add(2 * (i % 2)).cast::<f64>();
                                let x = _mm256_castpd_ps(_mm256_broadcast_sd(two));
                                (x, if chains == 4 { i } else { i / 2 })
                            };
                            let sum = &mut acc[r][s][chain];
                            *sum = _mm256_fmadd_ps(value, x, *sum);
                        }
                    }
                }
            }
        }
        let mut sums = [[[_mm256_setzero_ps(); 2]; HS]; MR];
        for r in 0..MR {
            for s in 0..HS {
                let [mut first, mut second, c, d] = acc[r][s];
                if chains == 4 {
                    (first, second) = (_mm256_add_ps(first, second), _mm256_add_ps(c, d));
                }
                if one_k::<C>() && chains > 1 {
                    first = _mm256_add_ps(first, second);
                }
                sums[r][s] = [first, second];
            }
        }
        sums
    }
}

/// c[MR][16] (+)= x * w over the blocks, straight from the codes; x in f32.
///
/// # Safety
/// avx2 and fma are there; everything in `args` holds MR rows and `args.blocks` blocks.
#[inline(always)]
pub(crate) unsafe fn dot<C: Format, const MR: usize, const HS: usize>(args: &DotArgs) {
    // SAFETY: all offsets stay within what the caller vouches for.
    unsafe {
        let tables = &*args.tables;
        // Unrolled, the loops become one stretch that the compiler reorders until no register is left.
        let two = std::hint::black_box(2);
        let mut sums = [[[_mm256_setzero_ps(); 2]; 2]; MR];
        for b in 0..args.blocks {
            let w = args.panel.codes.add(b * block_bytes(C::FORMAT));
            let x = args.x.add(b * MR * 4 * BLOCK).cast::<f32>();
            for line in 0..block_bytes(C::FORMAT) / 64 {
                _mm_prefetch::<_MM_HINT_T0>(w.wrapping_add(2048 + line * 64).cast());
            }
            let small = one_k::<C>() && *args.panel.small.add(b) != 0;
            let steps = if HS == 2 { 1 } else { two };
            for step in 0..steps {
                let acc = match small {
                    true => block_sums::<C, MR, HS, true>(tables, w, x, step, two),
                    false => block_sums::<C, MR, HS, false>(tables, w, x, step, two),
                };
                for s in 0..HS {
                    let h = step + s;
                    let scales = scales::<C>(args.panel.scales.add(b * PANEL + h * HALF));
                    for r in 0..MR {
                        let x_scale = _mm256_set1_epi32(*args.x_scales.add(b * MR + r));
                        let scale = _mm256_castsi256_ps(_mm256_add_epi32(scales, x_scale));
                        let ([first, second], sums) = (acc[r][s], &mut sums[r][h]);
                        if one_k::<C>() {
                            sums[0] = _mm256_fmadd_ps(first, scale, sums[0]);
                        } else {
                            let (low, high) = (
                                _mm256_unpacklo_ps(scale, scale),
                                _mm256_unpackhi_ps(scale, scale),
                            );
                            sums[0] = _mm256_fmadd_ps(first, low, sums[0]);
                            sums[1] = _mm256_fmadd_ps(second, high, sums[1]);
                        }
                    }
                }
            }
        }
        for r in 0..MR {
            for h in 0..2 {
                let [first, second] = sums[r][h];
                let rows = if one_k::<C>() { first } else { _mm256_hadd_ps(first, second) };
                let c = args.c.add(r * args.ldc + HALF * h);
                let rows = if args.add { _mm256_add_ps(_mm256_loadu_ps(c), rows) } else { rows };
                _mm256_storeu_ps(c, rows);
            }
        }
    }
}

/// Decodes `blocks` blocks of a panel with their scales to f32: [k][16 rows].
///
/// # Safety
/// avx2 is there; `out` holds 2048 bytes a block.
#[inline(always)]
pub(crate) unsafe fn decode<C: Format>(
    tables: *const Tables,
    panel: PanelAt,
    blocks: usize,
    out: *mut u8,
) {
    // SAFETY: the caller vouches for the blocks and the tables.
    unsafe {
        for b in 0..blocks {
            let w = panel.codes.add(b * block_bytes(C::FORMAT));
            let scales = panel.scales.add(b * PANEL);
            let out = out.add(b * BLOCK * PANEL * 4).cast();
            match one_k::<C>() && *panel.small.add(b) == 0 {
                true => decode_block::<C, false>(&*tables, w, scales, out),
                false => decode_block::<C, true>(&*tables, w, scales, out),
            }
        }
    }
}

/// # Safety
/// As [`decode`], for one block.
#[inline(always)]
unsafe fn decode_block<C: Format, const SMALL: bool>(
    tables: &Tables,
    w: *const u8,
    scale_bytes: *const u8,
    out: *mut f32,
) {
    let two = std::hint::black_box(2);
    // SAFETY: the caller vouches for the block.
    unsafe {
        for h in 0..two {
            let factors = scales::<C>(scale_bytes.add(h * HALF));
            let low = _mm256_castsi256_ps(_mm256_unpacklo_epi32(factors, factors));
            let high = _mm256_castsi256_ps(_mm256_unpackhi_epi32(factors, factors));
            for half in 0..two {
                let piece = Piece::new::<C>(w, half);
                for part in 0..4 {
                    let values = floats::<C, SMALL>(tables, piece, part, h);
                    let out = out.add((PIECE * half + 4 * part) * PANEL + HALF * h);
                    if one_k::<C>() {
                        for (i, value) in values.into_iter().enumerate() {
                            let value = _mm256_mul_ps(value, _mm256_castsi256_ps(factors));
                            _mm256_storeu_ps(out.add(i * PANEL), value);
                        }
                    } else {
                        for i in 0..2 {
                            let a = _mm256_mul_ps(values[i], low);
                            let b = _mm256_mul_ps(values[2 + i], high);
                            let out = out.add(2 * i * PANEL);
                            _mm256_storeu_ps(out, _mm256_shuffle_ps::<0b10_00_10_00>(a, b));
                            let second = _mm256_shuffle_ps::<0b11_01_11_01>(a, b);
                            _mm256_storeu_ps(out.add(PANEL), second);
                        }
                    }
                }
            }
        }
    }
}
