//! Exact integer dot products: both operands are small integers times a power of two.
//!
//! e2m1, e2m3 and MXINT8 are integers once multiplied by 2, 8 and 64. A block's 32 products are summed
//! without error; only then come the scales, one multiply-add a block: at most k / 32 roundings.
//!
//! e3m2 is an integer of nine bits and a sign once multiplied by 16. Such a weight is two planes of small integers, v =
//! 16 a + b, each looked up; such an x is two rows. That is two or four products in place of one, all of them exact.
//! More rows take panels of sixteen-bit integers.
#![allow(unsafe_code)]
// Two or three arrays run along one index; an iterator over one of them would hide that.
#![allow(clippy::needless_range_loop)]

use super::{
    super::{panel::PANEL, simd::Simd},
    layout::{BLOCK, PanelAt, block_bytes},
    tables::{SPLIT_SHIFT, Tables, offset},
};
use crate::formats::ElementFormat;

/// What a kernel multiplies: some rows of x, all of one tile, with one panel over some blocks of k.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DotArgs {
    pub tables: *const Tables,
    /// From the first block on; codes may be what a decoder made of them.
    pub panel: PanelAt,
    /// [block][row][32] elements.
    pub x: *const u8,
    /// [block][row]: exponents of x in the place of a float's.
    pub x_scales: *const i32,
    /// [block][row]: what the sum starts with to take the weight's offset out.
    pub x_sums: *const i32,
    pub blocks: usize,
    /// bfloat16 that x is the sum of, for panels of bfloat16.
    pub parts: usize,
    /// Blocks of a whole panel: what lies between two panels of a kernel that takes several.
    pub panel_blocks: usize,
    /// Rows of sixteen sums, `ldc` floats apart; of several panels side by side.
    pub c: *mut f32,
    pub ldc: usize,
    /// Whether to add to `c`.
    pub add: bool,
}

pub(crate) type Dot = unsafe fn(&DotArgs);
/// Codes of some blocks of a panel, as [`Integers::load`] reads them.
pub(crate) type Unpack = unsafe fn(*const Tables, *const u8, usize, *mut u8);

/// A format as a type, as far as the integer kernels know it.
pub(crate) trait IntFormat {
    const FORMAT: ElementFormat;
    /// Integers that a code is looked up as: one, or the 16 times larger part and the rest.
    const PLANES: usize = 1;
}
pub(crate) struct E2M1;
impl IntFormat for E2M1 {
    const FORMAT: ElementFormat = ElementFormat::Fp4E2M1;
}
pub(crate) struct E2M3;
impl IntFormat for E2M3 {
    const FORMAT: ElementFormat = ElementFormat::Fp6E2M3;
}
pub(crate) struct E3M2;
impl IntFormat for E3M2 {
    const FORMAT: ElementFormat = ElementFormat::Fp6E3M2;
    const PLANES: usize = 2;
}
pub(crate) struct Int8;
impl IntFormat for Int8 {
    const FORMAT: ElementFormat = ElementFormat::MxInt8;
}

/// Sums of pairs in a block: all of them fit sixteen bits, or it makes no difference.
pub(crate) const ALL: usize = BLOCK / 2;

/// The operations of a machine.
///
/// # Safety
/// Every method may only run on a machine with the instructions, and pointers must be good for what
/// the method's name says.
pub(crate) trait Integers {
    /// Bytes of an integer: two bytes of x are multiplied where it is two, else four.
    const BYTES: usize = 1;
    type F: Simd;
    /// Four integers of each of sixteen rows.
    type W: Copy;
    /// Sums of sixteen rows.
    type Acc: Copy;

    /// A decoded register: 64 bytes.
    unsafe fn load(from: *const u8) -> Self::W;
    unsafe fn store(to: *mut u8, w: Self::W);
    /// Asks for `lines` lines of codes some way behind those at `from`.
    #[inline(always)]
    unsafe fn ask(from: *const u8, lines: usize) {
        for line in 0..lines {
            // SAFETY: a prefetch never faults.
            unsafe { Self::F::prefetch(from.wrapping_add(2048 + line * 64)) }
        }
    }
    /// Registers 2c and 2c + 1 of a block, of the only plane, or the first, or the `REST`.
    unsafe fn decode<C: IntFormat, const REST: bool>(
        tables: *const Tables,
        block: *const u8,
        c: usize,
    ) -> [Self::W; 2];
    /// The sum to start from: `sum` in every row.
    unsafe fn start(sum: *const i32) -> Self::Acc;
    unsafe fn zero() -> Self::Acc;
    /// The sum of two sums.
    unsafe fn join<const ROOM: usize>(a: Self::Acc, b: Self::Acc) -> Self::Acc;
    /// 16 a + b, both of 32 bits.
    unsafe fn join_planes(a: Self::Acc, b: Self::Acc) -> Self::Acc;
    /// acc + the products with four bytes of x, the same for every row. So many sums of pairs fit sixteen bits: one,
    /// two, or [`ALL`] of a block.
    unsafe fn dot<const ROOM: usize>(acc: Self::Acc, w: Self::W, x: *const u8) -> Self::Acc;
    /// The same with two registers and eight bytes of x, where `ROOM` is two.
    #[inline(always)]
    unsafe fn dot_two<const ROOM: usize>(
        acc: Self::Acc,
        w: [Self::W; 2],
        x: *const u8,
    ) -> Self::Acc {
        // SAFETY: the caller's promise is passed on.
        unsafe { Self::dot::<ROOM>(Self::dot::<ROOM>(acc, w[0], x), w[1], x.add(4)) }
    }
    /// Sixteen scale bytes, in the place of a float's exponent.
    type Scales: Copy;
    unsafe fn scales(from: *const u8) -> Self::Scales;
    /// sums + acc * 2^(scale + x scale); `sum` is what [`Integers::start`] had.
    unsafe fn scale_add<const ROOM: usize>(
        sums: <Self::F as Simd>::V,
        acc: Self::Acc,
        scales: Self::Scales,
        x_scale: *const i32,
        sum: *const i32,
    ) -> <Self::F as Simd>::V;
}

/// Machines that make sixteen-bit integers.
///
/// # Safety
/// As [`Integers`].
pub(crate) trait Widen: Integers {
    /// Bytes of four k to words of the first two and of the last two: less `offset`, and where there is a
    /// `rest` 16 times as large and with it.
    unsafe fn words(plane: Self::W, rest: Option<Self::W>, offset: i16) -> [Self::W; 2];
}

/// Where the registers of a block come from.
pub(crate) trait Source<S: Integers> {
    const BYTES: usize;
    const PLANES: usize;
    /// Whether they come from memory.
    const FAR: bool;
    /// See [`Integers::decode`].
    unsafe fn pair<const REST: bool>(
        tables: *const Tables,
        block: *const u8,
        c: usize,
    ) -> [S::W; 2];
}

/// Straight from the codes.
pub(crate) struct Codes<C>(std::marker::PhantomData<C>);
impl<S: Integers, C: IntFormat> Source<S> for Codes<C> {
    const BYTES: usize = block_bytes(C::FORMAT);
    const PLANES: usize = C::PLANES;
    const FAR: bool = true;
    #[inline(always)]
    unsafe fn pair<const REST: bool>(
        tables: *const Tables,
        block: *const u8,
        c: usize,
    ) -> [S::W; 2] {
        // SAFETY: the caller's promise is passed on.
        unsafe { S::decode::<C, REST>(tables, block, c) }
    }
}

/// From what [`unpack`] wrote.
pub(crate) struct Unpacked;
impl<S: Integers> Source<S> for Unpacked {
    const BYTES: usize = PANEL * BLOCK * S::BYTES;
    const PLANES: usize = 1;
    const FAR: bool = false;
    #[inline(always)]
    unsafe fn pair<const REST: bool>(_: *const Tables, block: *const u8, c: usize) -> [S::W; 2] {
        // SAFETY: a block has eight registers for each byte of an integer.
        unsafe { [S::load(block.add(128 * c)), S::load(block.add(128 * c + 64))] }
    }
}

/// Decodes `blocks` blocks of a panel into `out`, 512 bytes each.
///
/// # Safety
/// The machine has the instructions of `S`; both buffers hold as many blocks.
#[inline(always)]
pub(crate) unsafe fn unpack<S: Integers, C: IntFormat>(
    tables: *const Tables,
    codes: *const u8,
    blocks: usize,
    out: *mut u8,
) {
    for b in 0..blocks {
        for c in 0..4 {
            // SAFETY: the caller vouches for the blocks.
            unsafe {
                S::F::prefetch(codes.wrapping_add(b * block_bytes(C::FORMAT) + 2048 + c * 128));
                S::F::prefetch(codes.wrapping_add(b * block_bytes(C::FORMAT) + 2112 + c * 128));
                let [first, second] =
                    S::decode::<C, false>(tables, codes.add(b * block_bytes(C::FORMAT)), c);
                let out = out.add(b * PANEL * BLOCK + c * 128);
                S::store(out, first);
                S::store(out.add(64), second);
            }
        }
    }
}

/// Decodes `blocks` blocks of a panel into `out` as integers of sixteen bits, 1024 bytes each: pairs of k of all rows.
///
/// # Safety
/// As [`unpack`].
#[inline(always)]
pub(crate) unsafe fn unpack_words<S: Widen, C: IntFormat>(
    tables: *const Tables,
    codes: *const u8,
    blocks: usize,
    out: *mut u8,
) {
    let offset = const { offset(C::FORMAT) << if C::PLANES == 2 { SPLIT_SHIFT } else { 0 } };
    for b in 0..blocks {
        let block = codes.wrapping_add(b * block_bytes(C::FORMAT));
        for c in 0..4 {
            // SAFETY: the caller vouches for the blocks.
            unsafe {
                S::F::prefetch(block.wrapping_add(2048 + c * 128));
                S::F::prefetch(block.wrapping_add(2112 + c * 128));
                let planes = S::decode::<C, false>(tables, block, c);
                let mut rests = [None; 2];
                if C::PLANES == 2 {
                    let [first, second] = S::decode::<C, true>(tables, block, c);
                    rests = [Some(first), Some(second)];
                }
                for i in 0..2 {
                    let [first, second] = S::words(planes[i], rests[i], offset as i16);
                    let out = out.add((b * 16 + 4 * c + 2 * i) * 64);
                    S::store(out, first);
                    S::store(out.add(64), second);
                }
            }
        }
    }
}

/// c[MR][NP * 16] (+)= x * w over the blocks, of NP panels in turns.
///
/// # Safety
/// The machine has the instructions of `S`; everything in `args` holds MR rows, NP panels and `args.blocks` blocks.
#[inline(always)]
pub(crate) unsafe fn dot<
    S: Integers,
    W: Source<S>,
    const MR: usize,
    const NP: usize,
    const ROOM: usize,
>(
    args: &DotArgs,
) {
    // With few rows the sums of a block are two chains, as each waits for itself.
    let two = W::PLANES == 1 && MR * NP <= 2 && ROOM != 2;
    // SAFETY: all offsets stay within what the caller vouches for.
    unsafe {
        let mut sums = [[S::F::splat(0.0); NP]; MR];
        for b in 0..args.blocks {
            let x = args.x.add(b * MR * BLOCK * S::BYTES);
            let (x_sums, x_scales) = (args.x_sums.add(b * MR), args.x_scales.add(b * MR));
            if W::FAR {
                for p in 0..NP {
                    let w = args.panel.codes.add((p * args.panel_blocks + b) * W::BYTES);
                    S::ask(w, W::BYTES / 64);
                }
            }
            let mut acc = [[S::start(x_sums); NP]; MR];
            for r in 1..MR {
                acc[r] = [S::start(x_sums.add(r)); NP];
            }
            let mut other = [[S::zero(); NP]; MR];
            for c in 0..4 * S::BYTES {
                for p in 0..NP {
                    let w = args.panel.codes.add((p * args.panel_blocks + b) * W::BYTES);
                    let [first, second] = W::pair::<false>(args.tables, w, c);
                    if ROOM == 2 {
                        for r in 0..MR {
                            let x = x.add(r * BLOCK * S::BYTES + 8 * c);
                            acc[r][p] = S::dot_two::<ROOM>(acc[r][p], [first, second], x);
                        }
                        continue;
                    }
                    for r in 0..MR {
                        acc[r][p] =
                            S::dot::<ROOM>(acc[r][p], first, x.add(r * BLOCK * S::BYTES + 8 * c));
                    }
                    for r in 0..MR {
                        let sum = if two { &mut other[r][p] } else { &mut acc[r][p] };
                        *sum =
                            S::dot::<ROOM>(*sum, second, x.add(r * BLOCK * S::BYTES + 8 * c + 4));
                    }
                    if W::PLANES == 2 {
                        let [first, second] = W::pair::<true>(args.tables, w, c);
                        for r in 0..MR {
                            let sum = &mut other[r][p];
                            *sum = S::dot::<ROOM>(*sum, first, x.add(r * BLOCK * S::BYTES + 8 * c));
                            *sum = S::dot::<ROOM>(
                                *sum,
                                second,
                                x.add(r * BLOCK * S::BYTES + 8 * c + 4),
                            );
                        }
                    }
                }
            }
            for p in 0..NP {
                let scales = S::scales(args.panel.scales.add((p * args.panel_blocks + b) * PANEL));
                for r in 0..MR {
                    let sum = if W::PLANES == 2 {
                        S::join_planes(acc[r][p], other[r][p])
                    } else if two {
                        S::join::<ROOM>(acc[r][p], other[r][p])
                    } else {
                        acc[r][p]
                    };
                    let (x_scale, x_sum) = (x_scales.add(r), x_sums.add(r));
                    sums[r][p] = S::scale_add::<ROOM>(sums[r][p], sum, scales, x_scale, x_sum);
                }
            }
        }
        for r in 0..MR {
            for p in 0..NP {
                let c = args.c.add(r * args.ldc + p * PANEL);
                let sum = if args.add { S::F::add(S::F::load(c), sums[r][p]) } else { sums[r][p] };
                S::F::store(c, sum);
            }
        }
    }
}
