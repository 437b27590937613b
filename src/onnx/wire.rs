//! The protobuf wire format, as far as the lossless shell needs it.
//!
//! Source: <https://protobuf.dev/programming-guides/encoding/>. Groups (wire types 3 and 4) do not
//! occur in ONNX and are refused.

use super::error::{Error, Result};
use bytes::Bytes;
use std::ops::Range;

/// Value of one field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Value<'a> {
    Varint(u64),
    Fixed64([u8; 8]),
    Len(&'a [u8]),
    Fixed32([u8; 4]),
}

impl Value<'_> {
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Varint(_) => "varint",
            Self::Fixed64(_) => "64-bit",
            Self::Len(_) => "length-delimited",
            Self::Fixed32(_) => "32-bit",
        }
    }
}

/// One field: its number, its value, and where it lies in the message.
#[derive(Clone, Debug)]
pub(crate) struct Field<'a> {
    pub number: u32,
    pub value: Value<'a>,
    /// Tag, length and payload.
    pub whole: Range<usize>,
    /// Payload alone.
    pub payload: Range<usize>,
}

impl<'a> Field<'a> {
    /// The payload of a length-delimited field; `what` names it in the error.
    pub(crate) fn expect_len(&self, what: &str, base: u64) -> Result<&'a [u8]> {
        match self.value {
            Value::Len(bytes) => Ok(bytes),
            other => Err(Error::malformed(
                format!(
                    "{what} (field {}) is a {} value, not length-delimited",
                    self.number,
                    other.kind()
                ),
                base + self.whole.start as u64,
            )),
        }
    }

    /// The value of a varint field.
    pub(crate) fn expect_varint(&self, what: &str, base: u64) -> Result<u64> {
        match self.value {
            Value::Varint(v) => Ok(v),
            other => Err(Error::malformed(
                format!("{what} (field {}) is a {} value, not a varint", self.number, other.kind()),
                base + self.whole.start as u64,
            )),
        }
    }

    /// A length-delimited field that must hold UTF-8.
    pub(crate) fn expect_str(&self, what: &str, base: u64) -> Result<&'a str> {
        std::str::from_utf8(self.expect_len(what, base)?).map_err(|_| {
            Error::malformed(format!("{what} is not UTF-8"), base + self.payload.start as u64)
        })
    }
}

/// Walks the fields of one message. `base` is the message's offset in the file.
pub(crate) struct Fields<'a> {
    bytes: &'a [u8],
    at: usize,
    base: u64,
}

/// The fields of `bytes`, a message that lies at `base` in the file.
pub(crate) fn fields(bytes: &[u8], base: u64) -> Fields<'_> {
    Fields { bytes, at: 0, base }
}

impl<'a> Fields<'a> {
    fn error<T>(&self, what: impl Into<String>, at: usize) -> Result<T> {
        Err(Error::malformed(what, self.base + at as u64))
    }

    fn varint(&mut self, what: &str) -> Result<u64> {
        let start = self.at;
        let Some((value, used)) = read_varint(&self.bytes[start..]) else {
            let problem =
                if self.bytes.len() - start < 10 { "is cut off" } else { "is longer than 64 bits" };
            return self.error(format!("{what} {problem}"), start);
        };
        self.at += used;
        Ok(value)
    }

    fn take(&mut self, len: u64, what: &str) -> Result<&'a [u8]> {
        let left = self.bytes.len() - self.at;
        match usize::try_from(len) {
            Ok(len) if len <= left => {
                let slice = &self.bytes[self.at..self.at + len];
                self.at += len;
                Ok(slice)
            }
            _ => self
                .error(format!("{what} of {len} bytes runs past the {left} bytes left"), self.at),
        }
    }

    fn field(&mut self) -> Result<Field<'a>> {
        let start = self.at;
        let tag = self.varint("field tag")?;
        let number = match u32::try_from(tag >> 3) {
            Ok(number) if (1..1 << 29).contains(&number) => number,
            _ => return self.error(format!("field number {} is out of range", tag >> 3), start),
        };
        let mut payload_start = self.at;
        let value = match tag & 7 {
            0 => Value::Varint(self.varint("varint")?),
            1 => Value::Fixed64(self.take(8, "64-bit value")?.try_into().expect("eight bytes")),
            2 => {
                let len = self.varint("field length")?;
                payload_start = self.at;
                Value::Len(self.take(len, &format!("field {number}"))?)
            }
            5 => Value::Fixed32(self.take(4, "32-bit value")?.try_into().expect("four bytes")),
            wire => {
                return self.error(
                    format!("wire type {wire} of field {number} is not used by ONNX"),
                    start,
                );
            }
        };
        Ok(Field { number, value, whole: start..self.at, payload: payload_start..self.at })
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = Result<Field<'a>>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.at >= self.bytes.len() {
            return None;
        }
        let field = self.field();
        if field.is_err() {
            self.at = self.bytes.len();
        }
        Some(field)
    }
}

/// Reads one varint; `None` when it is cut off or does not fit 64 bits.
pub(crate) fn read_varint(bytes: &[u8]) -> Option<(u64, usize)> {
    let mut value = 0u64;
    for (i, &byte) in bytes.iter().take(10).enumerate() {
        if i == 9 && byte > 1 {
            return None;
        }
        value |= u64::from(byte & 0x7f) << (7 * i);
        if byte & 0x80 == 0 {
            return Some((value, i + 1));
        }
    }
    None
}

/// Appends a varint.
pub(crate) fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Appends tag and length of a length-delimited field.
pub(crate) fn put_header(out: &mut Vec<u8>, number: u32, len: u64) {
    put_varint(out, u64::from(number) << 3 | 2);
    put_varint(out, len);
}

/// A whole length-delimited field.
pub(crate) fn len_field(number: u32, payload: &[u8]) -> Bytes {
    let mut out = Vec::with_capacity(payload.len() + 12);
    put_header(&mut out, number, payload.len() as u64);
    out.extend_from_slice(payload);
    out.into()
}

/// An encoded varint field.
pub(crate) fn varint_field(number: u32, value: u64) -> Bytes {
    let mut out = Vec::with_capacity(12);
    put_varint(&mut out, u64::from(number) << 3);
    put_varint(&mut out, value);
    out.into()
}

/// Offset of `inner`, a slice of `outer`, from the start of `outer`; 0 when it is not one.
pub(crate) fn offset_within(outer: &[u8], inner: &[u8]) -> u64 {
    let (start, at) = (outer.as_ptr() as usize, inner.as_ptr() as usize);
    if at >= start && at + inner.len() <= start + outer.len() { (at - start) as u64 } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn varints_round_trip() {
        for value in [0, 1, 127, 128, 300, u64::from(u32::MAX), u64::MAX] {
            let mut out = Vec::new();
            put_varint(&mut out, value);
            assert_eq!(read_varint(&out), Some((value, out.len())));
            assert_eq!(read_varint(&out[..out.len() - 1]), None);
        }
        assert_eq!(read_varint(&[0xff; 10]), None);
    }

    #[test]
    fn errors_name_the_byte() {
        let cases: [(&[u8], &str, u64); 5] = [
            (&[0x3a, 5, 1], "runs past", 102),
            (&[0x08, 0x80], "cut off", 101),
            (&[0x08, 0x01, 0x0b], "wire type 3", 102),
            (&[0x00], "field number 0", 100),
            (&[0x09, 1, 2], "64-bit value", 101),
        ];
        for (bytes, text, at) in cases {
            let error = fields(bytes, 100).find_map(Result::err).expect("malformed");
            let Error::Malformed { what, at: byte } = &error else { panic!("{error}") };
            assert!(what.contains(text), "{what}");
            assert_eq!(*byte, at, "{what}");
        }
    }
}
