//! Weights in the order in which the packed kernels read them.
//!
//! A panel is sixteen rows (output features); along k it goes in blocks of 32. One register of 64
//! bytes holds four k of each row, a row in each lane of four bytes, so that four products of every
//! row are one instruction, and neither a shuffle nor a sum across lanes is left for the inner loop.
//!
//! Within a lane byte p belongs to k + [`ORDER`]`[p]`: even and odd bytes, taken apart to be widened to
//! sixteen bits, are then pairs of neighbours.
//!
//! | bits | a block of a panel |
//! |---|---|
//! | 8 | eight registers, register g for k from 4g on |
//! | 4 | four registers, c for k from 8c on: low nibbles the first four k, high nibbles the next |
//! | 6 | the low four bits as with 4; then two registers, h for k from 16h on: bits 2q and 2q + 1 of a byte are the two high bits of k from 16h + 4q on |

use super::{super::panel::PANEL, tables};
use crate::{
    formats::ElementFormat,
    parallel::Parallel,
    scale::{self, SCALE_NAN, ScaleKind},
    tensor::PackedWeight,
};

/// k of a block; a larger block of the file is several with the same scale.
pub(crate) const BLOCK: usize = 32;
/// k behind the four bytes of a lane, relative to the first.
pub(crate) const ORDER: [usize; 4] = [0, 2, 1, 3];
/// Exponents of the scales of x that the packed kernels take: elements with their scale are normal
/// bfloat16, and no sum of products overflows that ends within f32.
pub(crate) const X_WINDOW: std::ops::RangeInclusive<i32> = -100..=40;
/// The same for a weight, whose rows may first be shifted, see [`Layout::shifts`]. A row with other blocks
/// is computed in f64.
const WINDOW: std::ops::RangeInclusive<i32> = -40..=40;
/// Exponents with which a row is taken as it is.
const UNSHIFTED: std::ops::RangeInclusive<i32> = -40..=20;
/// Least sum of the smallest exponents of both operands: with it no product of two elements is flushed,
/// nor is the product of two scales. Below, [`crate::linear`] has its own ways.
pub(crate) const LOWEST: i32 = -80;
/// Alignment of codes, the register's size.
const LINE: usize = 64;

/// What becomes of a row of a weight or of x.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Row {
    /// The kernels compute it.
    Plain,
    /// Scales too far apart, or a code that is infinite or no number: computed in f64.
    Exact,
    /// A block of NaN: so is every product.
    Nan,
}

/// Bytes of a block of a panel.
pub(crate) const fn block_bytes(format: ElementFormat) -> usize {
    PANEL * BLOCK * format.bits() as usize / 8
}

/// A panel from some block on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PanelAt {
    /// Codes, aligned to 64 bytes.
    pub codes: *const u8,
    /// Sixteen scale bytes a block.
    pub scales: *const u8,
    /// Whether each block holds small magnitudes; only for floats of eight bits.
    pub small: *const u8,
}

/// A weight in panels.
#[derive(Debug)]
pub(crate) struct Layout {
    /// Backing store of the codes, which start at `start`.
    bytes: Vec<u8>,
    start: usize,
    /// [panel][block][16]; neutral where a block is zero or its row is not [`Row::Plain`].
    pub scales: Vec<u8>,
    /// [panel][block]: whether a float of eight bits is subnormal or zero; a byte a panel for others.
    small: Vec<u8>,
    /// Powers of two that rows are multiplied by, so that rows of very small or very large numbers, which
    /// training leaves behind, are ordinary ones; empty where there are none.
    pub shifts: Vec<i16>,
    /// One for each row.
    pub rows: Vec<Row>,
    /// Whether any row is not plain.
    pub special: bool,
    /// Smallest exponent of a block of a plain row that is not zero; 0 where there is none below.
    pub low: i32,
    /// Blocks of 32 along k.
    pub blocks: usize,
    block_bytes: usize,
    /// Of a code.
    pub bits: usize,
}

impl Layout {
    /// Whether the layout can hold such a weight.
    pub(crate) fn fits(w: &PackedWeight<'_>) -> bool {
        let spec = w.spec();
        spec.scale == ScaleKind::E8M0 && spec.block_size.is_multiple_of(BLOCK)
    }

    /// `w` in panels; rows past n are zeros.
    pub(crate) fn new(w: &PackedWeight<'_>, par: &dyn Parallel) -> Self {
        let (n, k) = (w.n(), w.k());
        let (panels, blocks) = (n.div_ceil(PANEL), k.div_ceil(BLOCK));
        let block_bytes = block_bytes(w.spec().format);
        let len = panels * blocks * block_bytes;
        let mut bytes = vec![0_u8; len + LINE];
        let start = bytes.as_ptr().align_offset(LINE).min(LINE);
        let mut scales = vec![127_u8; panels * blocks * PANEL];
        let mut rows = vec![(Row::Plain, 0_i16); panels * PANEL];
        let below = tables::words(w.spec().format).small;
        // Never empty, so that it can be cut in pieces.
        let mut small = vec![0_u8; panels * if below > 0 { blocks } else { 1 }];
        let tasks: Vec<_> = bytes[start..start + len]
            .chunks_exact_mut(blocks * block_bytes)
            .zip(scales.chunks_exact_mut(blocks * PANEL))
            .zip(rows.chunks_exact_mut(PANEL))
            .zip(small.chunks_exact_mut(if below > 0 { blocks } else { 1 }))
            .map(std::sync::Mutex::new)
            .collect();
        par.run(tasks.len(), &|panel| {
            // Every task is run once, so the lock is never contended; a poisoned one is never read.
            let Ok(mut task) = tasks[panel].lock() else { return };
            let (((codes, scales), rows), small) = &mut *task;
            for (r, row) in rows.iter_mut().enumerate().take(n - (panel * PANEL).min(n)) {
                *row = pack_row(w, panel * PANEL + r, codes, scales, small);
            }
        });
        drop(tasks);
        rows.truncate(n);
        let shifted = rows.iter().any(|&(_, shift)| shift != 0);
        let shifts = if shifted { rows.iter().map(|&(_, s)| s).collect() } else { Vec::new() };
        let rows: Vec<Row> = rows.into_iter().map(|(row, _)| row).collect();
        let special = rows.iter().any(|&row| row != Row::Plain);
        // Blocks of zeros have the scale 2^0.
        let low = scales.iter().min().map_or(0, |&byte| i32::from(byte) - 127).min(0);
        let bits = w.spec().format.bits() as usize;
        Self { bytes, start, scales, small, shifts, rows, special, low, blocks, block_bytes, bits }
    }

    /// Panel `p` from block `b` on.
    pub(crate) fn at(&self, p: usize, b: usize) -> PanelAt {
        let block = p * self.blocks + b;
        PanelAt {
            codes: self.bytes[self.start + block * self.block_bytes..].as_ptr(),
            scales: self.scales[block * PANEL..].as_ptr(),
            small: self.small.get(block..).unwrap_or_default().as_ptr(),
        }
    }

    /// Takes the shifts of the rows from `n0` on out of their sums.
    #[inline]
    pub(crate) fn unshift(&self, n0: usize, sums: &mut [f32]) {
        if self.shifts.is_empty() {
            return;
        }
        for (sum, &shift) in sums.iter_mut().zip(&self.shifts[n0..]) {
            if shift != 0 {
                *sum = (f64::from(*sum) * scale::exp2_f64(-i32::from(shift))) as f32;
            }
        }
    }

    /// Bytes in memory.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes.len() + self.scales.len() + self.small.len() + self.rows.len()
    }
}

/// Packs row `n` of `w` into its panel; returns what becomes of it and its shift.
fn pack_row(
    w: &PackedWeight<'_>,
    n: usize,
    codes: &mut [u8],
    scales: &mut [u8],
    small: &mut [u8],
) -> (Row, i16) {
    let (spec, k, r) = (w.spec(), w.k(), n % PANEL);
    let below = tables::words(spec.format).small;
    let (row_bytes, file_blocks) = (spec.row_bytes(k), spec.blocks(k));
    let bits = spec.format.bits() as usize;
    let file = BLOCK * bits / 8;
    let bytes = block_bytes(spec.format);
    let row = &w.codes()[n * row_bytes..][..row_bytes];
    let row_scales = &w.scales()[n * file_blocks..][..file_blocks];
    let (mut kind, mut least, mut most) = (Row::Plain, i32::MAX, i32::MIN);
    for (b, out) in codes.chunks_exact_mut(bytes).enumerate() {
        let mut unpacked = [0_u8; BLOCK];
        unpack(bits, &row[b * file..][..file], &mut unpacked);
        // Imported weights may hold anything behind the row's end.
        let left = k - b * BLOCK;
        if left < BLOCK {
            unpacked[left..].fill(0);
        }
        // Behind the row's end x is zero, whatever it is multiplied by.
        if unpacked[..left.min(BLOCK)].iter().any(|code| code & 0x7f < below) {
            small[b] = 1;
        }
        let byte = row_scales[b * BLOCK / spec.block_size];
        let largest = largest(spec.format, &unpacked);
        let scale = &mut scales[b * PANEL + r];
        *scale = 127;
        if byte == SCALE_NAN {
            kind = Row::Nan;
        } else if largest > 0 {
            let e = i32::from(byte) - 127;
            (least, most) = (least.min(e), most.max(e));
            *scale = byte;
            if is_special(spec.format, largest) && kind != Row::Nan {
                kind = Row::Exact;
            }
        }
        place(bits, &unpacked, r, out);
    }
    settle(kind, least, most, scales.iter_mut().skip(r).step_by(PANEL))
}

/// Shifts the scales of a row whose blocks' exponents are `least` to `most`, or makes them neutral where
/// the kernels do not compute the row.
fn settle<'a>(
    mut kind: Row,
    least: i32,
    most: i32,
    scales: impl Iterator<Item = &'a mut u8>,
) -> (Row, i16) {
    // Nothing but zeros has no exponents.
    let ordinary = least > most || UNSHIFTED.contains(&least) && UNSHIFTED.contains(&most);
    let shift = if ordinary { 0 } else { -most };
    if kind == Row::Plain && !ordinary && !WINDOW.contains(&(least + shift)) {
        kind = Row::Exact;
    }
    if kind != Row::Plain {
        scales.for_each(|scale| *scale = 127);
        return (kind, 0);
    }
    if shift != 0 {
        // A scale of 127 that stands for a block of zeros may be shifted with the others.
        scales.for_each(|scale| *scale = (i32::from(*scale) + shift).clamp(87, 167) as u8);
    }
    (kind, shift as i16)
}

/// Largest magnitude among the codes of a block, as a code.
fn largest(format: ElementFormat, codes: &[u8; BLOCK]) -> u8 {
    let sign = 1_u8 << (format.bits() - 1);
    let mask = if format == ElementFormat::MxInt8 { 0xff } else { sign - 1 };
    codes.iter().map(|&code| code & mask).max().unwrap_or(0)
}

/// Whether a magnitude's code is infinite or no number.
fn is_special(format: ElementFormat, largest: u8) -> bool {
    match format {
        ElementFormat::Fp8E4M3 => largest == 0x7f,
        ElementFormat::Fp8E5M2 => largest >= 0x7c,
        _ => false,
    }
}

/// The 32 codes in `bytes`, one a byte.
fn unpack(bits: usize, bytes: &[u8], codes: &mut [u8; BLOCK]) {
    match bits {
        4 => {
            for (pair, byte) in codes.chunks_exact_mut(2).zip(bytes) {
                pair[0] = byte & 0xf;
                pair[1] = byte >> 4;
            }
        }
        6 => {
            for (quad, b) in codes.chunks_exact_mut(4).zip(bytes.chunks_exact(3)) {
                let word = u32::from_le_bytes([b[0], b[1], b[2], 0]);
                let spread = word & 0x3f | word << 2 & 0x3f00 | word << 4 & 0x3f_0000;
                quad.copy_from_slice(&(spread | word << 6 & 0x3f00_0000).to_le_bytes());
            }
        }
        _ => codes.copy_from_slice(bytes),
    }
}

/// Puts a row's block into lane `r`.
fn place(bits: usize, codes: &[u8; BLOCK], r: usize, out: &mut [u8]) {
    let quad = |g: usize| -> u32 {
        let quad = ORDER.map(|o| codes[4 * g + o]);
        u32::from_le_bytes(quad)
    };
    let mut put = |register: usize, value: u32| {
        out[register * LINE + r * 4..][..4].copy_from_slice(&value.to_le_bytes());
    };
    if bits == 8 {
        for g in 0..8 {
            put(g, quad(g));
        }
        return;
    }
    for c in 0..4 {
        put(c, quad(2 * c) & 0x0f0f_0f0f | (quad(2 * c + 1) & 0x0f0f_0f0f) << 4);
    }
    if bits == 6 {
        for h in 0..2 {
            let high = |q: usize| (quad(4 * h + q) >> 4 & 0x0303_0303) << (2 * q);
            put(4 + h, high(0) | high(1) | high(2) | high(3));
        }
    }
}
