//! Arguments of the kernels, laid out as in `kernels/cuda/*.cu`.
//!
//! Widest fields first, so that neither compiler pads inside; `_pad` makes the size a multiple of 8
//! as both want it. The driver tells a kernel's argument sizes, which every launch checks.

use bytemuck::NoUninit;

use super::DevicePtr;
use crate::{ElementFormat, QuantSpec, Rounding, ScaleKind, ScaleRule};

/// `Quant` of `formats.cuh`.
#[repr(C)]
#[derive(Debug, Clone, Copy, NoUninit)]
pub(super) struct Quant {
    pub kind: i32,
    pub format: i32,
    pub bits: i32,
    pub mantissa: i32,
    pub emin: i32,
    pub emax: i32,
    pub largest: f32,
    pub block: i32,
    pub rounding: i32,
    pub rule: i32,
}

impl Quant {
    /// Values that are taken as they are; `block` only says how far a walk goes at a time.
    pub fn as_is() -> Self {
        Self {
            kind: 0,
            format: ElementFormat::Bf16 as i32,
            bits: 0,
            mantissa: 0,
            emin: 0,
            emax: 0,
            largest: 0.0,
            block: 32,
            rounding: 0,
            rule: 0,
        }
    }

    pub fn of(spec: &QuantSpec) -> Self {
        let row = spec.format.row();
        Self {
            kind: match spec.scale {
                ScaleKind::E8M0 => 1,
                ScaleKind::None => 2,
                ScaleKind::Tensor => 3,
            },
            format: spec.format as i32,
            bits: row.bits as i32,
            mantissa: row.mantissa_bits as i32,
            emin: row.emin(),
            emax: row.emax,
            largest: row.largest,
            block: spec.block_size as i32,
            rounding: match spec.rounding {
                Rounding::Even => 0,
                Rounding::Nearest => 1,
                Rounding::Floor => 2,
            },
            rule: match spec.scale_rule {
                ScaleRule::Floor => 0,
                ScaleRule::Ceil => 1,
                ScaleRule::Even => 2,
                ScaleRule::Rceil => 3,
            },
        }
    }
}

/// `Fold` of `fold.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy, NoUninit)]
pub(super) struct Fold {
    pub x: DevicePtr,
    pub out: DevicePtr,
    pub bad: DevicePtr,
    pub amax: DevicePtr,
    pub scale: DevicePtr,
    pub any_bad: DevicePtr,
    pub x_batch: i64,
    pub out_batch: i64,
    pub amax_count: i32,
    pub m: i32,
    pub k: i32,
    pub kind: i32,
    pub rows: i32,
    pub width: i32,
    pub terms: i32,
    pub order: i32,
    pub layout: i32,
    pub shift: i32,
    pub parts: i32,
    pub quant: Quant,
    pub _pad: i32,
}

/// `FoldB` of `fold.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy, NoUninit)]
pub(super) struct FoldB {
    pub b: DevicePtr,
    pub out: DevicePtr,
    pub b_batch: i64,
    pub n: i32,
    pub k: i32,
    pub kind: i32,
    pub width: i32,
    pub quant: Quant,
}

/// `Linear` of `linear.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy, NoUninit)]
pub(super) struct Linear {
    pub codes: DevicePtr,
    pub scales: DevicePtr,
    pub x: DevicePtr,
    pub y: DevicePtr,
    pub bias: DevicePtr,
    pub bad_n: DevicePtr,
    pub any_bad: DevicePtr,
    pub x_batch: i64,
    pub w_batch: i64,
    pub n: i32,
    pub row_bytes: i32,
    pub blocks: i32,
    pub block_shift: i32,
    pub steps: i32,
    pub splits: i32,
    pub rows: i32,
    pub tiles: i32,
    pub copy_bytes: i32,
    pub partial: i32,
    pub kind: i32,
    pub w_constant: i32,
    pub alpha: f32,
    pub beta: f32,
    pub batches: Batches,
}

/// `Wide` of `wide.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy, NoUninit)]
pub(super) struct WideArgs {
    pub codes: DevicePtr,
    pub scales: DevicePtr,
    pub x: DevicePtr,
    pub y: DevicePtr,
    pub bias: DevicePtr,
    pub bad_n: DevicePtr,
    pub any_bad: DevicePtr,
    pub n: i32,
    pub row_bytes: i32,
    pub blocks: i32,
    pub steps: i32,
    pub splits: i32,
    pub rows: i32,
    pub padded: i32,
    pub tiles_m: i32,
    pub groups_n: i32,
    pub partial: i32,
    pub kind: i32,
    pub alpha: f32,
    pub beta: f32,
    pub _pad: i32,
}

/// Layouts of `fold`'s output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FoldLayout {
    /// Row-major.
    Rows = 0,
    /// What `linear.cu` reads.
    Fragments = 1,
    /// Row-major, NaN where nothing fits.
    RowsNan = 2,
    /// What `wide.cu` reads.
    Tiles = 3,
}

/// `Dequantise` of `linear.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy, NoUninit)]
pub(super) struct Dequantise {
    pub codes: DevicePtr,
    pub scales: DevicePtr,
    pub out: DevicePtr,
    pub bad_n: DevicePtr,
    pub any_bad: DevicePtr,
    pub n: i32,
    pub k: i32,
    pub row_bytes: i32,
    pub blocks: i32,
    pub block_shift: i32,
    pub width: i32,
}

/// `Fp8` of `fp8.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy, NoUninit)]
pub(super) struct Fp8Codes {
    pub x: DevicePtr,
    pub codes: DevicePtr,
    pub amax: DevicePtr,
    pub scale_w: DevicePtr,
    pub scales: DevicePtr,
    pub bad: DevicePtr,
    pub any_bad: DevicePtr,
    pub amax_count: i32,
    pub m: i32,
    pub k: i32,
    pub pitch: i32,
    pub kind: i32,
    pub alpha: f32,
    pub quant: Quant,
}

/// `Batches` of `finish.cu`: extents of Y's leading dimensions and, for each, how far A's and B's
/// matrix index moves (0 where the operand is broadcast).
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, NoUninit)]
pub(super) struct Batches {
    pub dims: [i32; 4],
    pub a: [i32; 4],
    pub b: [i32; 4],
}

impl Batches {
    /// One matrix of each.
    pub const ONE: Self = Self { dims: [1; 4], a: [0; 4], b: [0; 4] };
}

/// `Operand` of `finish.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy, NoUninit)]
pub(super) struct Operand {
    pub values: DevicePtr,
    pub codes: DevicePtr,
    pub scales: DevicePtr,
    pub scale: DevicePtr,
    pub batch: i64,
    pub row_stride: i64,
    pub k_stride: i64,
    pub row_bytes: i32,
    pub kind: i32,
    pub quant: Quant,
}

/// `Finish` of `finish.cu`.
#[repr(C)]
#[derive(Debug, Clone, Copy, NoUninit)]
pub(super) struct Finish {
    pub partial: DevicePtr,
    pub y: DevicePtr,
    pub bias: DevicePtr,
    pub bad_m: DevicePtr,
    pub bad_n: DevicePtr,
    pub factor_x: DevicePtr,
    pub factor_w: DevicePtr,
    pub any_bad: DevicePtr,
    pub kind: i32,
    pub m: i32,
    pub n: i32,
    pub k: i32,
    pub splits: i32,
    pub terms: i32,
    pub parts_m: i32,
    pub parts_n: i32,
    pub alpha: f32,
    pub beta: f32,
    pub x: Operand,
    pub w: Operand,
    pub batches: Batches,
}
