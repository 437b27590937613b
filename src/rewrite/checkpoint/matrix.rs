//! A matrix of a checkpoint, float or packed, read line by line as the values that it stands for.

use std::{
    path::PathBuf,
    sync::{Arc, LazyLock},
};

use bytes::Bytes;
use half::{bf16, f16};
use mx_kernels::ElementFormat;

use crate::onnx::DataType;

/// Elements that share a scale in the packed checkpoints that are known.
pub(super) const BLOCK: usize = 32;

/// The scale byte that makes its block NaN.
const NAN_SCALE: u8 = 0xff;

/// A whole rank-2 tensor, or one of a stack.
#[derive(Clone, Debug)]
pub(super) struct Matrix {
    /// The parameter without `.weight` and the like.
    pub module: Arc<str>,
    /// Which of the stack it is, when it is of one.
    pub expert: Option<usize>,
    /// The tensor's full name, for messages.
    pub tensor: Arc<str>,
    /// Its file.
    pub path: Arc<PathBuf>,
    /// Extents as stored, codes counted one by one.
    pub rows: usize,
    pub cols: usize,
    pub values: Values,
}

/// How the numbers are stored, row-major.
#[derive(Clone, Debug)]
pub(super) enum Values {
    /// As floats, little-endian.
    Float { float: FloatKind, bytes: Bytes },
    /// As MX codes along the columns, packed as `mx_kernels::pack` does, and E8M0 scales.
    Packed { format: ElementFormat, codes: Bytes, scales: Bytes },
}

/// Float types of checkpoints and of the graphs that are matched with them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum FloatKind {
    F32,
    F16,
    Bf16,
}

impl Values {
    /// Values `first .. first + count` of them, whole blocks where there are blocks.
    pub fn part(&self, first: usize, count: usize) -> Self {
        let of =
            |bytes: &Bytes, bits: usize| bytes.slice(first * bits / 8..(first + count) * bits / 8);
        match self {
            Self::Float { float, bytes } => {
                Self::Float { float: *float, bytes: of(bytes, 8 * float.width()) }
            }
            Self::Packed { format, codes, scales } => Self::Packed {
                format: *format,
                codes: of(codes, format.bits() as usize),
                scales: scales.slice(first / BLOCK..(first + count) / BLOCK),
            },
        }
    }
}

impl FloatKind {
    /// The type of a graph's weight.
    pub fn of(data_type: DataType) -> Option<Self> {
        match data_type {
            DataType::Float => Some(Self::F32),
            DataType::Float16 => Some(Self::F16),
            DataType::Bfloat16 => Some(Self::Bf16),
            _ => None,
        }
    }

    fn width(self) -> usize {
        if self == Self::F32 { 4 } else { 2 }
    }

    /// `value` as this type holds it, rounded half to even.
    fn round(self, value: f32) -> f32 {
        match self {
            Self::F32 => value,
            Self::F16 => f16::from_f32(value).to_f32(),
            Self::Bf16 => bf16::from_f32(value).to_f32(),
        }
    }

    /// All of `bytes` as float32, a loop a type.
    fn widen(self, bytes: &[u8], out: &mut [f32]) {
        let words = |out: &mut [f32], widen: fn([u8; 2]) -> f32| {
            for (out, raw) in out.iter_mut().zip(bytes.as_chunks().0) {
                *out = widen(*raw);
            }
        };
        match self {
            Self::F32 => {
                for (out, raw) in out.iter_mut().zip(bytes.as_chunks().0) {
                    *out = f32::from_le_bytes(*raw);
                }
            }
            Self::F16 => words(out, |raw| f16::from_le_bytes(raw).to_f32()),
            Self::Bf16 => words(out, |raw| bf16::from_le_bytes(raw).to_f32()),
        }
    }

    fn read(self, bytes: &[u8]) -> f32 {
        match (self, bytes) {
            (Self::F32, &[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]),
            (Self::F16, &[a, b]) => f16::from_le_bytes([a, b]).to_f32(),
            (Self::Bf16, &[a, b]) => bf16::from_le_bytes([a, b]).to_f32(),
            _ => f32::NAN,
        }
    }
}

/// The bits by which values are compared: both zeros are one value, and so are all NaN.
pub(super) fn bits(value: f32) -> u32 {
    if value == 0.0 {
        0
    } else if value.is_nan() {
        f32::NAN.to_bits()
    } else {
        value.to_bits()
    }
}

/// Whether two rows are the same values.
pub(super) fn equal(a: &[f32], b: &[f32]) -> bool {
    // Equal bits, compared without a branch a value, are what there is nearly always.
    let same = |(a, b): (&[f32], &[f32])| {
        let differing = a.iter().zip(b).fold(0, |d, (a, b)| d | (a.to_bits() ^ b.to_bits()));
        differing == 0 || a.iter().zip(b).all(|(&a, &b)| bits(a) == bits(b))
    };
    a.chunks(64).zip(b.chunks(64)).all(same)
}

/// Whether a row is one value, repeated.
pub(super) fn is_one_value(row: &[f32]) -> bool {
    row.windows(2).all(|pair| bits(pair[0]) == bits(pair[1]))
}

impl Matrix {
    /// Lines of one orientation, and their length: the rows, or the columns.
    pub fn lines(&self, columns: bool) -> (usize, usize) {
        if columns { (self.cols, self.rows) } else { (self.rows, self.cols) }
    }

    /// Whether its columns may be lines of a weight. Blocks lie along the rows of packed ones.
    pub fn has_columns(&self) -> bool {
        matches!(self.values, Values::Float { .. })
    }

    /// The bytes that values are read from.
    pub fn bytes(&self) -> &[u8] {
        match &self.values {
            Values::Float { bytes, .. } => bytes,
            Values::Packed { codes, .. } => codes,
        }
    }

    /// One value, as a graph of type `target` holds it.
    pub fn at(&self, row: usize, col: usize, target: FloatKind) -> f32 {
        let index = row * self.cols + col;
        let value = match &self.values {
            Values::Float { float, bytes } => {
                let width = float.width();
                bytes.get(index * width..(index + 1) * width).map_or(f32::NAN, |b| float.read(b))
            }
            Values::Packed { format, codes, scales } => {
                let code = match format.bits() {
                    4 => codes[index / 2] >> (4 * (index % 2)) & 0xf,
                    _ => codes[index],
                };
                decoded(*format)[usize::from(code)] * scale(scales[index / BLOCK])
            }
        };
        target.round(value)
    }

    /// Value `at` of a line.
    pub fn at_line(&self, columns: bool, line: usize, at: usize, target: FloatKind) -> f32 {
        if columns { self.at(at, line, target) } else { self.at(line, at, target) }
    }

    /// Lines `first`, `first + step` ..., as many as `out` takes, as a graph of type `target` holds
    /// them.
    pub fn read(
        &self,
        columns: bool,
        (first, step): (usize, usize),
        target: FloatKind,
        out: &mut [f32],
    ) {
        let (_, length) = self.lines(columns);
        if columns {
            let count = out.len() / length;
            for at in 0..length {
                for line in 0..count {
                    out[line * length + at] = self.at(at, first + line * step, target);
                }
            }
            return;
        }
        for (line, out) in out.chunks_exact_mut(length).enumerate() {
            self.read_row(first + line * step, target, out);
        }
    }

    fn read_row(&self, row: usize, target: FloatKind, out: &mut [f32]) {
        match &self.values {
            Values::Float { float, bytes } => {
                let width = float.width();
                let bytes = &bytes[row * self.cols * width..][..self.cols * width];
                float.widen(bytes, out);
                if target != FloatKind::F32 && target != *float {
                    out.iter_mut().for_each(|value| *value = target.round(*value));
                }
            }
            Values::Packed { format, codes, scales } => {
                let decoded = decoded(*format);
                let scales = &scales[row * (self.cols / BLOCK)..][..self.cols / BLOCK];
                for (block, (out, &byte)) in out.chunks_exact_mut(BLOCK).zip(scales).enumerate() {
                    let (first, scale) = (row * self.cols + block * BLOCK, scale(byte));
                    for (index, out) in (first..).zip(out) {
                        let code = match format.bits() {
                            4 => codes[index / 2] >> (4 * (index % 2)) & 0xf,
                            _ => codes[index],
                        };
                        *out = target.round(decoded[usize::from(code)] * scale);
                    }
                }
            }
        }
    }

    /// The first block of a row whose scale is NaN.
    pub fn nan_block(&self, row: usize) -> Option<usize> {
        let Values::Packed { scales, .. } = &self.values else { return None };
        let blocks = self.cols / BLOCK;
        scales[row * blocks..][..blocks].iter().position(|&byte| byte == NAN_SCALE)
    }
}

/// The scale that an E8M0 byte stands for; exact in float32, subnormal for 0.
fn scale(byte: u8) -> f32 {
    mx_kernels::scale::scale_value(byte) as f32
}

fn table_of(format: ElementFormat) -> [f32; 256] {
    std::array::from_fn(|code| format.decode(code as u32 & (format.code_count() - 1)))
}

/// The value of every code of one of the two packed formats.
fn decoded(format: ElementFormat) -> &'static [f32; 256] {
    static FOUR: LazyLock<[f32; 256]> = LazyLock::new(|| table_of(ElementFormat::Fp4E2M1));
    static EIGHT: LazyLock<[f32; 256]> = LazyLock::new(|| table_of(ElementFormat::Fp8E4M3));
    if format == ElementFormat::Fp4E2M1 { &FOUR } else { &EIGHT }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packed(format: ElementFormat, codes: Vec<u8>, scales: Vec<u8>, rows: usize) -> Matrix {
        Matrix {
            module: "m".into(),
            expert: None,
            tensor: "m.weight".into(),
            path: Arc::new(PathBuf::new()),
            rows,
            cols: scales.len() / rows * BLOCK,
            values: Values::Packed { format, codes: codes.into(), scales: scales.into() },
        }
    }

    #[test]
    fn packed_rows_are_what_the_kernels_dequantise() {
        for format in [ElementFormat::Fp4E2M1, ElementFormat::Fp8E4M3] {
            let bytes = 2 * 64 * format.bits() as usize / 8;
            let codes: Vec<u8> = (0..bytes).map(|i| (i * 37 + i / 16) as u8).collect();
            let scales = vec![0, 127, 130, 254];
            let matrix = packed(format, codes.clone(), scales.clone(), 2);
            let spec = mx_kernels::QuantSpec::mx(format).unwrap();
            let mut expected = vec![0.0; 128];
            mx_kernels::dequantize_rows(&spec, &codes, &scales, 2, 64, &mut expected).unwrap();
            let mut found = vec![0.0; 128];
            matrix.read(false, (0, 1), FloatKind::F32, &mut found);
            let as_bits = |v: &[f32]| v.iter().map(|&v| bits(v)).collect::<Vec<_>>();
            assert_eq!(as_bits(&found), as_bits(&expected), "{format}");
            for (index, &value) in expected.iter().enumerate() {
                let found = matrix.at(index / 64, index % 64, FloatKind::F32);
                assert_eq!(bits(found), bits(value), "{format} {index}");
            }
        }
    }

    #[test]
    fn both_orientations_and_steps() {
        let bytes: Vec<u8> = (0..12_u8).flat_map(|v| f32::from(v).to_le_bytes()).collect();
        let matrix = Matrix {
            rows: 4,
            cols: 3,
            values: Values::Float { float: FloatKind::F32, bytes: bytes.into() },
            ..packed(ElementFormat::Fp4E2M1, vec![0; 16], vec![0], 1)
        };
        let mut rows = [0.0; 6];
        matrix.read(false, (1, 2), FloatKind::F32, &mut rows);
        assert_eq!(rows, [3.0, 4.0, 5.0, 9.0, 10.0, 11.0]);
        let mut columns = [0.0; 8];
        matrix.read(true, (0, 2), FloatKind::F32, &mut columns);
        assert_eq!(columns, [0.0, 3.0, 6.0, 9.0, 2.0, 5.0, 8.0, 11.0]);
        assert_eq!(matrix.at_line(true, 2, 1, FloatKind::F32), 5.0);
    }

    #[test]
    fn values_are_compared_as_values() {
        assert_eq!(bits(-0.0), bits(0.0));
        assert_eq!(bits(-f32::NAN), bits(f32::NAN));
        assert_ne!(bits(1.0), bits(-1.0));
        let mut row = [1.5; 130];
        row[128] = 0.0;
        let mut other = row;
        other[128] = -0.0;
        assert!(equal(&row, &other));
        other[129] = f32::NAN;
        assert!(!equal(&row, &other));
        assert_eq!(FloatKind::F16.round(1e6), f32::INFINITY);
        assert_eq!(FloatKind::Bf16.round(1.0 + 1.0 / 512.0), 1.0);
    }
}
