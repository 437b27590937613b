//! A row of floats as four rows of small integers, for the integer kernels: products of weights alone.
//!
//! A block's floats become multiples of 2^-26 of its largest one's power of two, cut into planes of seven
//! bits with a sign: x = 2^e (p0 + p1 / 128 + p2 / 128^2 + p3 / 128^3). Each plane is a row of x to the kernels
//! and its sums are exact. What is lost is little beside the block's largest element and may be much of a small
//! one, whose weight may be the only one that is not zero: such elements leave a rest, which is added by itself.
//! So the bound of a dot product in fp32 holds for any data.
//!
//! Four integer products take fewer and other instructions than making floats of the codes and multiplying those.
#![allow(unsafe_code)]

use super::{
    super::{panel::PANEL, rows},
    layout::{BLOCK, ORDER, PanelAt, Row},
    tables::Tables,
    x::{HUGE, Place, store_integers},
};

/// Planes of a row.
pub(crate) const PLANES: usize = 4;
/// Bits of a plane. With eight, sums of a block would not fit the sixteen bits of AVX2.
const BITS: i32 = 7;
/// Largest magnitude of a plane's integers.
pub(crate) const LARGEST: i32 = 1 << (BITS - 1);

/// The part of an element that may be lost with k elements: so many units of 2^-23.
///
/// The bound of a sum is k/16 + 32 units. Magnitudes of an element's planes are at most three times its own, so
/// k/32 additions of each plane's sums of blocks, half a unit each, cost 3k/64 at most; joining the planes and the
/// rests, 4 with the rounding of y. An element with a rest loses less than a unit itself, and k/16 additions of
/// rests to a sum of their own make 4k/64 with the planes'.
#[inline(always)]
fn part(k: usize) -> f32 {
    (k / 64 + 28) as f32 * power(-23)
}

/// What the planes lack of an element.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rest {
    pub k: usize,
    pub value: f32,
}

/// 2^e of a normal float.
#[inline(always)]
fn power(e: i32) -> f32 {
    f32::from_bits(((e + 127) as u32) << 23)
}

/// Writes the planes of a row; see [`super::x::pack_row`]. `offset` is the weight's, `shift` its power of two.
/// [`Row::Exact`] where more than one element in sixteen leaves a rest.
///
/// # Safety
/// `place` has room for ceil(k / 32) blocks of [`PLANES`] rows.
#[inline(always)]
pub(crate) unsafe fn pack(x: &[f32], offset: i32, shift: i32, place: &Place) -> (Row, i32) {
    // SAFETY: the caller vouches for the list, which is this row's.
    let rests = unsafe { &mut *place.rests };
    rests.clear();
    let part = part(x.len());
    let most = x.len() / 16;
    let (mut row, mut low) = (Row::Plain, 0);
    for (b, block) in x.chunks(BLOCK).enumerate() {
        let mut values = [0.0_f32; BLOCK];
        values[..block.len()].copy_from_slice(block);
        let (mut largest, mut smallest) = (0_u32, u32::MAX);
        for v in values {
            let bits = v.to_bits() & 0x7fff_ffff;
            largest = largest.max(bits);
            // Zeros wrap round.
            smallest = smallest.min(bits.wrapping_sub(1));
        }
        if largest > rows::INFINITY {
            row = Row::Nan;
        } else if largest >= HUGE && row == Row::Plain {
            row = Row::Exact;
        }
        let mut exponent = (largest >> 23) as i32 - 127;
        if smallest != u32::MAX {
            low = low.min(((smallest + 1) >> 23) as i32 - 127).min(exponent - PLANES as i32 * BITS);
        }
        // Nothing of such a block is used, nor of a row with a smaller `low` than the kernels take.
        if largest >= HUGE || exponent < -100 {
            (values, exponent) = ([0.0; BLOCK], 0);
        }
        // SAFETY: the caller vouches for every block of the row.
        unsafe { planes(&mut values, exponent, offset, shift, b, place) };
        let mut lost = false;
        for (v, &x) in values.iter().zip(block) {
            lost |= v.abs() > x.abs() * part;
        }
        if lost {
            for (i, (&value, &x)) in values.iter().zip(block).enumerate() {
                if value.abs() > x.abs() * part {
                    rests.push(Rest { k: b * BLOCK + i, value });
                }
            }
            if rests.len() > most {
                rests.clear();
                return (Row::Exact, low);
            }
        }
    }
    if row != Row::Plain {
        rests.clear();
    }
    (row, low)
}

/// Block `b` in planes; what they lack stays in `values`, all of which are below 2^(exponent + 1).
///
/// # Safety
/// `place` has a block `b`.
#[inline(always)]
unsafe fn planes(
    values: &mut [f32; BLOCK],
    exponent: i32,
    offset: i32,
    shift: i32,
    b: usize,
    place: &Place,
) {
    for p in 0..PLANES {
        let unit = exponent + 2 - BITS * (p as i32 + 1);
        let (one, inverse) = (power(unit), power(-unit));
        let mut bytes = [0_u8; BLOCK];
        let mut sum = 0;
        for (byte, v) in bytes.iter_mut().zip(values.iter_mut()) {
            let rounded = (*v * inverse).round_ties_even();
            // Exact: both are multiples of the smaller of v's last place and the unit.
            *v -= rounded * one;
            // SAFETY: the magnitude is at most LARGEST.
            let integer = unsafe { rounded.to_int_unchecked::<i32>() };
            sum += integer;
            *byte = integer as u8;
        }
        // SAFETY: the caller vouches for the block.
        unsafe {
            let at = b * place.rows + p;
            store_integers(&bytes, place.data.add(at * BLOCK));
            *place.scales.add(at) = (unit - shift) << 23;
            *place.sums.add(at) = -offset * sum;
        }
    }
}

/// Adds `rest` times its weights to the sums of a panel of codes of four or six bits; `panel` starts at the
/// block that holds its k.
///
/// # Safety
/// The block has its codes and its sixteen scales.
#[inline(always)]
pub(crate) unsafe fn add_rest(
    tables: &Tables,
    bits: usize,
    panel: PanelAt,
    rest: Rest,
    sums: &mut [f32; PANEL],
) {
    let k = rest.k % BLOCK;
    // See `layout`: eight k a register, low nibbles first, the middle bytes of a lane in each other's place.
    let byte = 8 * ORDER[k % 4];
    let bit = byte + 4 * (k / 4 % 2);
    // SAFETY: the caller vouches for the block; a register is sixteen lanes.
    let (lanes, high, scales) = unsafe {
        let register = |i: usize| panel.codes.add(64 * i).cast::<[u32; PANEL]>().read_unaligned();
        // Of six bits the two high ones: sixteen k a register, two bits for each four of them.
        let high = if bits == 6 { register(4 + k / 16) } else { [0; PANEL] };
        (register(k / 8), high, panel.scales.cast::<[u8; PANEL]>().read_unaligned())
    };
    let high_bit = byte + 2 * (k / 4 % 4);
    for i in 0..PANEL {
        let code = (lanes[i] >> bit & 0xf | (high[i] >> high_bit & 3) << 4) as usize;
        let value = u32::from(tables.high[code]) << 24 | u32::from(tables.low[code]) << 16;
        let weight = f32::from_bits(value) * f32::from_bits(u32::from(scales[i]) << 23);
        sums[i] += weight * rest.value;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Planes and rests are x, to the last part that is promised.
    #[test]
    fn planes_and_rests_are_the_row() {
        let blocks = 65;
        let k = BLOCK * blocks - 5;
        let mut state = 1_u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 40) as f32 / (1 << 24) as f32 - 0.5
        };
        for (spread, fits) in [(0, true), (3, true), (40, false)] {
            let mut x: Vec<f32> =
                (0..k).map(|_| next() * (next() * spread as f32).exp2()).collect();
            (x[3], x[37], x[38]) = (0.0, 1e4, 1e-9);
            let mut data = vec![0_u8; blocks * PLANES * BLOCK];
            let (mut scales, mut sums) = (vec![0_i32; blocks * PLANES], vec![0; blocks * PLANES]);
            let mut rests = Vec::new();
            let place = Place {
                data: data.as_mut_ptr(),
                scales: scales.as_mut_ptr(),
                sums: sums.as_mut_ptr(),
                rows: PLANES,
                rests: &mut rests,
            };
            // SAFETY: everything has room for all blocks.
            let (row, _) = unsafe { pack(&x, 12, 1, &place) };
            assert_eq!(row == Row::Plain, fits, "{spread}: {} rests", rests.len());
            if !fits {
                assert!(rests.is_empty());
                continue;
            }
            let mut got = vec![0.0_f64; blocks * BLOCK];
            for (i, got) in got.iter_mut().enumerate() {
                let (b, within) = (i / BLOCK, i % BLOCK);
                for p in 0..PLANES {
                    let row = b * PLANES + p;
                    let byte = data[row * BLOCK + within / 4 * 4 + ORDER[within % 4]] as i8;
                    assert!(i32::from(byte).abs() <= LARGEST);
                    *got += f64::from(byte) * f64::from((scales[row] >> 23) + 1).exp2();
                }
            }
            for (row, &sum) in sums.iter().enumerate() {
                let bytes = &data[row * BLOCK..][..BLOCK];
                assert_eq!(sum, -12 * bytes.iter().map(|&b| i32::from(b as i8)).sum::<i32>());
            }
            for rest in &rests {
                got[rest.k] += f64::from(rest.value);
            }
            for (i, (&got, &x)) in got.iter().zip(&x).enumerate() {
                let error = (got - f64::from(x)).abs();
                assert!(error <= f64::from(x).abs() * f64::from(part(k)), "{i}: {got}, not {x}");
            }
            assert!(got[k..].iter().all(|&v| v == 0.0));
            assert!(rests.iter().any(|rest| rest.k == 38), "beside 1e4, 1e-9 is nothing");
        }
    }

    /// Every code at every k of a block, with both widths.
    #[test]
    fn a_rest_meets_its_own_weights() {
        use crate::{
            PackedWeight, QuantSpec, Serial, cpu::packed::layout::Layout, formats::ElementFormat,
        };
        for format in [ElementFormat::Fp4E2M1, ElementFormat::Fp6E2M3, ElementFormat::Fp6E3M2] {
            let (n, k) = (2 * PANEL, 2 * BLOCK);
            let spec = QuantSpec::mx(format).unwrap();
            let tables = Tables::new(format);
            for shift in 0..format.code_count() {
                let code =
                    |r: usize, i: usize| ((r * 7 + i * 5) as u32 + shift) % format.code_count();
                let bits = format.bits() as usize;
                let mut codes = vec![0_u8; spec.codes_len(n, k)];
                for (row, bytes) in codes.chunks_mut(spec.row_bytes(k)).enumerate() {
                    for i in 0..k {
                        for bit in (0..bits).filter(|bit| code(row, i) >> bit & 1 == 1) {
                            bytes[(i * bits + bit) / 8] |= 1 << ((i * bits + bit) % 8);
                        }
                    }
                }
                let scales: Vec<u8> = (0..n * 2).map(|i| 120 + (i % 11) as u8).collect();
                let w = PackedWeight::new(spec, n, k, &codes, &scales).unwrap();
                let layout = Layout::new(&w, &Serial);
                for at in 0..k {
                    let (panel, b) = (at % 2, at / BLOCK);
                    let mut sums = [1.5_f32; PANEL];
                    let rest = Rest { k: at, value: 0.75 };
                    // SAFETY: the panel has the block.
                    unsafe { add_rest(&tables, bits, layout.at(panel, b), rest, &mut sums) };
                    for (r, sum) in sums.into_iter().enumerate() {
                        let row = panel * PANEL + r;
                        let scale = power(i32::from(scales[row * 2 + b]) - 127);
                        let want = format.decode(code(row, at)) * scale * 0.75 + 1.5;
                        assert_eq!(sum, want, "{format} {shift} {at} {r}");
                    }
                }
            }
        }
    }
}
