//! Packed bytes: the only place that knows their order.
//!
//! fp8 and MXINT8 take a byte a code; fp6 four codes in three bytes, as a little-endian bit stream;
//! fp4 two codes a byte, low nibble first; bfloat16 two bytes, little-endian. fp4 and fp8 are as
//! ONNX packs them in its tensors.

use crate::formats::ElementFormat;

/// Packs codes, a multiple of four of them, into `out` (`codes.len() * bits / 8` bytes).
///
/// Bits of a code above the format's width are ignored.
pub fn pack(format: ElementFormat, codes: &[u16], out: &mut [u8]) {
    debug_assert_eq!(codes.len() * format.bits() as usize / 8, out.len());
    match format.bits() {
        4 => {
            for (pair, byte) in codes.chunks_exact(2).zip(out) {
                *byte = (pair[0] & 0xf | (pair[1] & 0xf) << 4) as u8;
            }
        }
        6 => {
            for (quad, bytes) in codes.chunks_exact(4).zip(out.chunks_exact_mut(3)) {
                let word = quad.iter().rev().fold(0_u32, |w, &c| w << 6 | u32::from(c & 0x3f));
                bytes.copy_from_slice(&word.to_le_bytes()[..3]);
            }
        }
        8 => {
            for (&code, byte) in codes.iter().zip(out) {
                *byte = code as u8;
            }
        }
        _ => {
            for (&code, bytes) in codes.iter().zip(out.chunks_exact_mut(2)) {
                bytes.copy_from_slice(&code.to_le_bytes());
            }
        }
    }
}

/// [`pack`] for codes of at most eight bits, one a byte, none with bits above the format's width.
///
/// Inlined, so that each CPU variant compiles it for its own instructions.
#[inline(always)]
pub fn pack_bytes(format: ElementFormat, codes: &[u8], out: &mut [u8]) {
    debug_assert_eq!(codes.len() * format.bits() as usize / 8, out.len());
    match format.bits() {
        4 => {
            for (pair, byte) in codes.chunks_exact(2).zip(out) {
                // As one word the pair vectorises: shift, or, narrow.
                let word = u16::from_le_bytes([pair[0], pair[1]]);
                *byte = (word | word >> 4) as u8;
            }
        }
        6 => pack_sixes(codes, out),
        _ => out.copy_from_slice(codes),
    }
}

/// Six-bit codes by eights where there are as many: fields of 6, 12, 24, then 48 bits.
#[inline(always)]
fn pack_sixes(codes: &[u8], out: &mut [u8]) {
    let whole = codes.len() / 8;
    let (eights, four) = codes.split_at(whole * 8);
    let (sixes, three) = out.split_at_mut(whole * 6);
    for (eight, six) in eights.chunks_exact(8).zip(sixes.chunks_exact_mut(6)) {
        let mut word = 0_u64;
        for (i, &code) in eight.iter().enumerate() {
            word |= u64::from(code) << (8 * i);
        }
        let word = word & 0x003f_003f_003f_003f | (word & 0x3f00_3f00_3f00_3f00) >> 2;
        let word = word & 0x0000_0fff_0000_0fff | (word & 0x0fff_0000_0fff_0000) >> 4;
        let word = word & 0x00ff_ffff | (word >> 32 & 0x00ff_ffff) << 24;
        six.copy_from_slice(&word.to_le_bytes()[..6]);
    }
    for (quad, bytes) in four.chunks_exact(4).zip(three.chunks_exact_mut(3)) {
        bytes[0] = quad[0] | quad[1] << 6;
        bytes[1] = quad[1] >> 2 | quad[2] << 4;
        bytes[2] = quad[2] >> 4 | quad[3] << 2;
    }
}

/// The inverse of [`pack`]: fills `codes` from `codes.len() * bits / 8` bytes.
pub fn unpack(format: ElementFormat, bytes: &[u8], codes: &mut [u16]) {
    debug_assert_eq!(codes.len() * format.bits() as usize / 8, bytes.len());
    match format.bits() {
        4 => {
            for (pair, byte) in codes.chunks_exact_mut(2).zip(bytes) {
                pair[0] = u16::from(byte & 0xf);
                pair[1] = u16::from(byte >> 4);
            }
        }
        6 => {
            for (quad, bytes) in codes.chunks_exact_mut(4).zip(bytes.chunks_exact(3)) {
                let mut word = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], 0]);
                for code in quad {
                    *code = (word & 0x3f) as u16;
                    word >>= 6;
                }
            }
        }
        8 => {
            for (code, &byte) in codes.iter_mut().zip(bytes) {
                *code = u16::from(byte);
            }
        }
        _ => {
            for (code, bytes) in codes.iter_mut().zip(bytes.chunks_exact(2)) {
                *code = u16::from_le_bytes([bytes[0], bytes[1]]);
            }
        }
    }
}

/// A `tensor` scale as its four bytes.
pub fn tensor_scale_to_bytes(scale: f32) -> [u8; 4] {
    scale.to_le_bytes()
}

/// A `tensor` scale from its four bytes; anything else than four reads as NaN.
pub fn tensor_scale_from_bytes(bytes: &[u8]) -> f32 {
    bytes.try_into().map_or(f32::NAN, f32::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layout_is_the_documented_one() {
        let mut out = [0; 2];
        pack(ElementFormat::Fp4E2M1, &[1, 2, 3, 0xf], &mut out);
        assert_eq!(out, [0x21, 0xf3]);
        let mut out = [0; 3];
        pack(ElementFormat::Fp6E3M2, &[0x3f, 0, 1, 0x20], &mut out);
        // Bit stream: code i takes bits 6i..6i+6 of the little-endian word.
        assert_eq!(out, [0x3f, 0x10, 0x80]);
        let mut out = [0; 8];
        pack(ElementFormat::Bf16, &[0x3f80, 0x1234, 0, 1], &mut out);
        assert_eq!(out, [0x80, 0x3f, 0x34, 0x12, 0, 0, 1, 0]);
    }

    #[test]
    fn every_code_at_every_position_round_trips() {
        for format in ElementFormat::ALL {
            for code in 0..format.code_count() {
                // Eight codes at a time and the four that are left.
                for position in 0..12 {
                    let mut codes = [0_u16; 12];
                    codes[position] = code as u16;
                    let mut bytes = vec![0xaa; 12 * format.bits() as usize / 8];
                    pack(format, &codes, &mut bytes);
                    if format.bits() <= 8 {
                        let mut again = vec![0xaa; bytes.len()];
                        pack_bytes(format, &codes.map(|c| c as u8), &mut again);
                        assert_eq!(bytes, again, "{format}");
                    }
                    let mut back = [0xffff; 12];
                    unpack(format, &bytes, &mut back);
                    assert_eq!(codes, back, "{format}");
                }
            }
        }
    }
}
