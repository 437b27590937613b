//! From the head of a tensor to its elements.

use super::error::{Error, Result};
use super::external::ExternalFiles;
use super::proto::DataType;
use super::tensor::{Storage, TensorInfo, TensorView, element_bits};
use super::wire::{self, Value};
use bytes::Bytes;

/// Reads a tensor. Raw, external and packed fixed-width data are slices of the mapped file.
pub(crate) fn view(info: &TensorInfo, files: &ExternalFiles) -> Result<TensorView> {
    let expected = info.byte_len()?;
    let dims = info.dims.iter().map(|&d| usize::try_from(d)).collect::<Result<Vec<_>, _>>();
    let dims = dims.map_err(|_| Error::tensor(&info.name, "shape does not fit this machine"))?;
    let data_type = info.data_type().expect("byte_len knows the type");
    let bytes = match &info.storage {
        Storage::Raw(bytes) => bytes.clone(),
        Storage::External(reference) => files.read(&info.name, reference, expected)?,
        Storage::New(payload) => payload.get(&info.name)?,
        Storage::Typed => typed(info, data_type)?,
    };
    if bytes.len() as u64 != expected {
        let what = format!(
            "holds {} bytes, but shape {:?} of {data_type:?} takes {expected}",
            bytes.len(),
            info.dims
        );
        return Err(Error::tensor(&info.name, what));
    }
    Ok(TensorView { name: info.name.clone(), dims, data_type, bytes })
}

/// The elements of the typed field that belongs to `data_type`, laid out as `raw_data` would be.
fn typed(info: &TensorInfo, data_type: DataType) -> Result<Bytes> {
    use DataType as T;
    let (number, kind) = match data_type {
        T::Float | T::Complex64 => (4, Kind::Fixed(4)),
        T::Double | T::Complex128 => (10, Kind::Fixed(8)),
        T::Int64 => (7, Kind::Varint(8)),
        T::Uint32 => (11, Kind::Varint(4)),
        T::Uint64 => (11, Kind::Varint(8)),
        // Types narrower than a byte are packed into bytes first, one byte an int32.
        other => (5, Kind::Varint((element_bits(other).unwrap_or(8) as usize).div_ceil(8))),
    };
    let mut out = Vec::new();
    let mut only: Option<Bytes> = None;
    for field in wire::fields(&info.message, info.offset) {
        let field = field?;
        if field.number != number {
            continue;
        }
        let bad = |what: &str| {
            Error::malformed(
                format!("tensor '{}': {what}", info.name),
                info.offset + field.payload.start as u64,
            )
        };
        if let Some(first) = only.take() {
            out.extend_from_slice(&first);
        }
        match (kind, field.value) {
            (Kind::Fixed(width), Value::Len(packed)) => {
                if packed.len() % width != 0 {
                    return Err(bad("packed data ends inside an element"));
                }
                if out.is_empty() {
                    only = Some(info.message.slice(field.payload));
                } else {
                    out.extend_from_slice(packed);
                }
            }
            (Kind::Fixed(4), Value::Fixed32(value)) => out.extend_from_slice(&value),
            (Kind::Fixed(8), Value::Fixed64(value)) => out.extend_from_slice(&value),
            (Kind::Varint(width), Value::Varint(value)) => {
                out.extend_from_slice(&value.to_le_bytes()[..width]);
            }
            (Kind::Varint(width), Value::Len(mut packed)) => {
                while !packed.is_empty() {
                    let Some((value, used)) = wire::read_varint(packed) else {
                        return Err(bad("packed data ends inside an element"));
                    };
                    out.extend_from_slice(&value.to_le_bytes()[..width]);
                    packed = &packed[used..];
                }
            }
            _ => return Err(bad("data has an unexpected wire type")),
        }
    }
    Ok(only.unwrap_or_else(|| out.into()))
}

#[derive(Clone, Copy)]
enum Kind {
    Fixed(usize),
    Varint(usize),
}
