//! Tensors: what their messages say (`TensorInfo`) and their elements (`TensorView`).

use super::error::{Error, Result};
use super::proto::DataType;
use super::wire::{self, Value};
use bytes::Bytes;
use std::sync::Arc;

/// Makes the bytes of a tensor when they are written.
pub type Producer = Arc<dyn Fn() -> Result<Bytes> + Send + Sync>;

/// Where the bytes of a tensor go, piece by piece.
pub type Sink<'a> = dyn FnMut(Bytes) -> Result<()> + Send + 'a;
/// Makes the bytes of a tensor piece by piece when they are written.
pub type Streamer = Arc<dyn Fn(&mut Sink<'_>) -> Result<()> + Send + Sync>;

/// Bytes of a tensor that is added to a model: at hand, or made when the model is written so that no
/// more than one weight, or a part of one, is in memory.
#[derive(Clone)]
pub enum Payload {
    /// At hand.
    Bytes(Bytes),
    /// Made on demand; must give exactly `len` bytes.
    Lazy {
        /// Length in bytes.
        len: u64,
        /// Makes the bytes; may be called more than once.
        make: Producer,
    },
    /// Made on demand in pieces; must give exactly `len` bytes. For what may be large.
    Stream {
        /// Length in bytes.
        len: u64,
        /// Makes the bytes; may be called more than once.
        write: Streamer,
    },
}

impl Payload {
    /// Length in bytes.
    pub fn len(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::Lazy { len, .. } | Self::Stream { len, .. } => *len,
        }
    }

    /// True when there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// True when the bytes are at hand.
    pub fn is_made(&self) -> bool {
        matches!(self, Self::Bytes(_))
    }

    /// The bytes, all of them in memory, made now if need be.
    ///
    /// # Errors
    /// The producer's error, or a length that differs from the promised one.
    pub fn get(&self, tensor: &str) -> Result<Bytes> {
        match self {
            Self::Bytes(bytes) => Ok(bytes.clone()),
            Self::Lazy { len, make } => {
                let bytes = make()?;
                check_made(tensor, bytes.len() as u64, *len)?;
                Ok(bytes)
            }
            Self::Stream { .. } => {
                let mut out = Vec::new();
                self.write(tensor, &mut |bytes| {
                    out.extend_from_slice(&bytes);
                    Ok(())
                })?;
                Ok(out.into())
            }
        }
    }

    /// Gives the bytes to `sink`, piece by piece.
    ///
    /// # Errors
    /// As [`Payload::get`], and the sink's.
    pub(crate) fn write(&self, tensor: &str, sink: &mut Sink<'_>) -> Result<()> {
        let Self::Stream { len, write } = self else { return sink(self.get(tensor)?) };
        let mut made = 0;
        write(&mut |bytes| {
            made += bytes.len() as u64;
            sink(bytes)
        })?;
        check_made(tensor, made, *len)
    }
}

fn check_made(tensor: &str, made: u64, promised: u64) -> Result<()> {
    if made == promised {
        return Ok(());
    }
    let what = format!("{made} bytes were made, {promised} promised");
    Err(Error::Payload { tensor: tensor.to_owned(), what })
}

impl std::fmt::Debug for Payload {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Payload({} bytes)", self.len())
    }
}

/// Where external data lies: the entries of `external_data`, as written in the file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExternalRef {
    /// `location`: path relative to the model's folder.
    pub location: String,
    /// `offset` in bytes, 0 when absent.
    pub offset: u64,
    /// `length` in bytes; `None` = to the end of the file.
    pub length: Option<u64>,
}

/// Where the elements of a tensor are.
#[derive(Clone, Debug)]
pub enum Storage {
    /// `raw_data`, little-endian.
    Raw(Bytes),
    /// One of the typed repeated fields (`float_data`, `int32_data`, ...) or none at all.
    Typed,
    /// In another file.
    External(ExternalRef),
    /// A tensor added by this program.
    New(Payload),
}

/// Head of a `TensorProto`: everything but its elements, which are not copied.
#[derive(Clone, Debug)]
pub struct TensorInfo {
    /// Name.
    pub name: String,
    /// Shape.
    pub dims: Vec<i64>,
    /// Element type as in the file; see [`TensorInfo::data_type`].
    pub raw_type: i32,
    /// Where the elements are.
    pub storage: Storage,
    /// The encoded `TensorProto` (empty for an added tensor).
    pub(crate) message: Bytes,
    /// Offset of the message in its file.
    pub(crate) offset: u64,
}

impl TensorInfo {
    /// Reads the head of an encoded `TensorProto` that lies at `offset` in the file.
    ///
    /// # Errors
    /// A malformed message, with the byte.
    pub fn parse(message: Bytes, offset: u64) -> Result<Self> {
        let mut info = Self {
            name: String::new(),
            dims: Vec::new(),
            raw_type: 0,
            storage: Storage::Typed,
            message: message.clone(),
            offset,
        };
        let mut external = ExternalRef::default();
        let mut is_external = false;
        for field in wire::fields(&message, offset) {
            let field = field?;
            match field.number {
                1 => push_dims(&mut info.dims, &field, offset)?,
                2 => info.raw_type = field.expect_varint("data_type", offset)? as i32,
                8 => info.name = field.expect_str("tensor name", offset)?.to_owned(),
                9 => {
                    field.expect_len("raw_data", offset)?;
                    info.storage = Storage::Raw(message.slice(field.payload));
                }
                13 => {
                    let entry = field.expect_len("external_data", offset)?;
                    read_external_entry(&mut external, entry, offset + field.payload.start as u64)?;
                }
                14 => is_external = field.expect_varint("data_location", offset)? == 1,
                _ => {}
            }
        }
        if is_external {
            info.storage = Storage::External(external);
        }
        Ok(info)
    }

    /// Head of a new tensor.
    pub fn new(
        name: impl Into<String>,
        dims: Vec<i64>,
        data_type: DataType,
        payload: Payload,
    ) -> Self {
        Self {
            name: name.into(),
            dims,
            raw_type: data_type as i32,
            storage: Storage::New(payload),
            message: Bytes::new(),
            offset: 0,
        }
    }

    /// Element type, if it is one that this program knows.
    pub fn data_type(&self) -> Option<DataType> {
        DataType::try_from(self.raw_type).ok()
    }

    /// True for float32, float16, bfloat16 and float64.
    pub fn is_float(&self) -> bool {
        use DataType::{Bfloat16, Double, Float, Float16};
        matches!(self.data_type(), Some(Float | Float16 | Bfloat16 | Double))
    }

    /// True when the elements are in another file.
    pub fn is_external(&self) -> bool {
        matches!(self.storage, Storage::External(_))
    }

    /// Number of elements.
    ///
    /// # Errors
    /// A negative extent, or a product that overflows.
    pub fn elements(&self) -> Result<u64> {
        let mut product = 1u64;
        for &dim in &self.dims {
            let dim = u64::try_from(dim).map_err(|_| {
                Error::tensor(&self.name, format!("shape {:?} has a negative extent", self.dims))
            })?;
            product = product.checked_mul(dim).ok_or_else(|| {
                Error::tensor(&self.name, format!("shape {:?} overflows", self.dims))
            })?;
        }
        Ok(product)
    }

    /// Length of the elements in bytes, from shape and type.
    ///
    /// # Errors
    /// As [`Self::elements`]; a type without a fixed width (strings, unknown).
    pub fn byte_len(&self) -> Result<u64> {
        let bits = self.data_type().and_then(element_bits).ok_or_else(|| {
            Error::tensor(&self.name, format!("element type {} has no fixed width", self.raw_type))
        })?;
        let total = self.elements()?.checked_mul(bits);
        let bits = total
            .ok_or_else(|| Error::tensor(&self.name, format!("shape {:?} overflows", self.dims)))?;
        Ok(bits.div_ceil(8))
    }
}

fn push_dims(dims: &mut Vec<i64>, field: &wire::Field<'_>, base: u64) -> Result<()> {
    match field.value {
        Value::Varint(dim) => dims.push(dim as i64),
        Value::Len(mut packed) => {
            while !packed.is_empty() {
                let (dim, used) = wire::read_varint(packed).ok_or_else(|| {
                    Error::malformed("packed dims are cut off", base + field.payload.start as u64)
                })?;
                dims.push(dim as i64);
                packed = &packed[used..];
            }
        }
        other => {
            let what = format!("dims is a {} value", other.kind());
            return Err(Error::malformed(what, base + field.whole.start as u64));
        }
    }
    Ok(())
}

fn read_external_entry(external: &mut ExternalRef, entry: &[u8], base: u64) -> Result<()> {
    let (mut key, mut value) = ("", "");
    for field in wire::fields(entry, base) {
        let field = field?;
        match field.number {
            1 => key = field.expect_str("external_data key", base)?,
            2 => value = field.expect_str("external_data value", base)?,
            _ => {}
        }
    }
    let number = || {
        value.trim().parse::<u64>().map_err(|_| {
            Error::malformed(
                format!("external_data {key} '{value}' is not a length in bytes"),
                base,
            )
        })
    };
    match key {
        "location" => external.location = value.to_owned(),
        "offset" => external.offset = number()?,
        "length" => external.length = Some(number()?),
        // `checksum` and vendors' keys say nothing about where the bytes are.
        _ => {}
    }
    Ok(())
}

/// Bits of one element; `None` for strings and unset types.
pub fn element_bits(data_type: DataType) -> Option<u64> {
    use DataType as T;
    Some(match data_type {
        T::Undefined | T::String => return None,
        T::Uint2 | T::Int2 => 2,
        T::Uint4 | T::Int4 | T::Float4E2m1 => 4,
        T::Float6E2m3 | T::Float6E3m2 => 6,
        T::Uint8 | T::Int8 | T::Bool => 8,
        T::Float8E4m3fn | T::Float8E4m3fnuz | T::Float8E5m2 | T::Float8E5m2fnuz | T::Float8E8m0 => {
            8
        }
        T::Uint16 | T::Int16 | T::Float16 | T::Bfloat16 => 16,
        T::Float | T::Int32 | T::Uint32 => 32,
        T::Double | T::Int64 | T::Uint64 | T::Complex64 => 64,
        T::Complex128 => 128,
    })
}

/// The elements of a tensor, little-endian, without padding or alignment, as `raw_data` lays them out.
#[derive(Clone, Debug)]
pub struct TensorView {
    /// Name.
    pub name: String,
    /// Shape, all extents checked.
    pub dims: Vec<usize>,
    /// Element type.
    pub data_type: DataType,
    /// Elements; exactly as many bytes as shape and type say.
    pub bytes: Bytes,
}

impl TensorView {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.dims.iter().product()
    }

    /// Converts elements `start .. start + out.len()` to float32 (float32, float16, bfloat16, float64
    /// and integers up to 64 bits).
    ///
    /// # Errors
    /// A type that is not a number, or a range outside the tensor.
    pub fn read_f32(&self, start: usize, out: &mut [f32]) -> Result<()> {
        use DataType as T;
        let width = match self.data_type {
            T::Float | T::Int32 | T::Uint32 => 4,
            T::Double | T::Int64 | T::Uint64 => 8,
            T::Float16 | T::Bfloat16 | T::Int16 | T::Uint16 => 2,
            T::Int8 | T::Uint8 | T::Bool => 1,
            other => {
                return Err(Error::tensor(
                    &self.name,
                    format!("{other:?} cannot be read as float32"),
                ));
            }
        };
        let bytes = start
            .checked_mul(width)
            .zip(start.checked_add(out.len()).and_then(|end| end.checked_mul(width)))
            .and_then(|(from, to)| self.bytes.get(from..to))
            .ok_or_else(|| {
                let what =
                    format!("elements {start}..+{} are outside shape {:?}", out.len(), self.dims);
                Error::tensor(&self.name, what)
            })?;
        match self.data_type {
            T::Float => convert(bytes, out, f32::from_le_bytes),
            T::Float16 => convert(bytes, out, |b| half::f16::from_le_bytes(b).to_f32()),
            T::Bfloat16 => convert(bytes, out, |b| half::bf16::from_le_bytes(b).to_f32()),
            T::Double => convert(bytes, out, |b| f64::from_le_bytes(b) as f32),
            T::Int8 => convert(bytes, out, |b| f32::from(i8::from_le_bytes(b))),
            T::Uint8 | T::Bool => convert(bytes, out, |b: [u8; 1]| f32::from(b[0])),
            T::Int16 => convert(bytes, out, |b| f32::from(i16::from_le_bytes(b))),
            T::Uint16 => convert(bytes, out, |b| f32::from(u16::from_le_bytes(b))),
            T::Int32 => convert(bytes, out, |b| i32::from_le_bytes(b) as f32),
            T::Uint32 => convert(bytes, out, |b| u32::from_le_bytes(b) as f32),
            T::Int64 => convert(bytes, out, |b| i64::from_le_bytes(b) as f32),
            _ => convert(bytes, out, |b| u64::from_le_bytes(b) as f32),
        }
        Ok(())
    }

    /// All elements as float32: for small tensors.
    ///
    /// # Errors
    /// As [`Self::read_f32`].
    pub fn to_f32(&self) -> Result<Vec<f32>> {
        let mut out = vec![0.0; self.elements()];
        self.read_f32(0, &mut out)?;
        Ok(out)
    }

    /// All elements of an integer tensor: for shapes, axes and the like.
    ///
    /// # Errors
    /// A type other than int64 and int32.
    pub fn to_i64(&self) -> Result<Vec<i64>> {
        let chunk = |width| self.bytes.chunks_exact(width);
        match self.data_type {
            DataType::Int64 => {
                Ok(chunk(8).map(|b| i64::from_le_bytes(b.try_into().expect("8 bytes"))).collect())
            }
            DataType::Int32 => Ok(chunk(4)
                .map(|b| i32::from_le_bytes(b.try_into().expect("4 bytes")).into())
                .collect()),
            other => Err(Error::tensor(&self.name, format!("{other:?} cannot be read as int64"))),
        }
    }
}

fn convert<const W: usize>(bytes: &[u8], out: &mut [f32], f: impl Fn([u8; W]) -> f32) {
    for (value, raw) in out.iter_mut().zip(bytes.chunks_exact(W)) {
        *value = f(raw.try_into().expect("chunks have W bytes"));
    }
}
