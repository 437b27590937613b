#!/usr/bin/env python3
"""MX quantisation, written a second time: the judge of the Rust kernels.

Written from the OCP Microscaling Formats (MX) v1.0 specification (sections 5 and 6) and the project's
numerics contract alone; it shares nothing with `kernels/`. Two implementations:

* NumPy, in float64, where every step is exact (a float32 divided by a power of two between 2^-127 and
  2^127 is a float64, and so is every product with an element value);
* torch, vectorised, by float64 bit fields, so that it runs on a GPU; torch is imported only when used.

Shapes: the last axis is K, the contraction axis; blocks run along it and the last may be shorter.

    python3 scripts/mx_emulation.py [GOLDEN.safetensors ...] [--torch] [--device cpu]

self-tests: the vectors bit for bit, each code of each format there and back, and (with --torch) both
implementations against each other.
"""

from __future__ import annotations

import argparse
import json
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Element:
    """A row of the table of element formats (OCP MX v1.0, section 5.3)."""

    name: str
    bits: int
    exponent_bits: int  # 0 = fixed point
    mantissa_bits: int
    emax: int
    largest: float
    emin: int  # exponent of the smallest normal


ELEMENTS = {
    e.name: e
    for e in (
        Element("fp8_e4m3", 8, 4, 3, 8, 448.0, -6),
        Element("fp8_e5m2", 8, 5, 2, 15, 57344.0, -14),
        Element("fp6_e3m2", 6, 3, 2, 4, 28.0, -2),
        Element("fp6_e2m3", 6, 2, 3, 2, 7.5, 0),
        Element("fp4_e2m1", 4, 2, 1, 2, 6.0, 0),
        # One sign, one integer and six fraction bits with an implicit scale of 2^-6: every value has
        # the same step, so "emin" is the exponent of the integer bit.
        Element("mxint8", 8, 0, 6, 0, 127.0 / 64.0, 0),
        # emax and largest of bfloat16 serve its rounding only: it never takes a block scale.
        Element("bf16", 16, 8, 7, 127, float((2.0 - 2.0**-7) * 2.0**127), -126),
    )
}
MX_FORMATS = ("fp8_e4m3", "fp8_e5m2", "fp6_e3m2", "fp6_e2m3", "fp4_e2m1")
ROUNDINGS = ("even", "nearest", "floor")
SCALE_RULES = ("floor", "ceil", "even", "rceil")
BLOCK_SIZES = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Spec:
    """How one operand is quantised along K."""

    format: str
    block_size: int = 32
    rounding: str = "even"
    scale_rule: str = "floor"
    scale: str = "e8m0"  # e8m0 | none | tensor


# ------------------------------------------------------------------------------------------- NumPy


def _integer(x: np.ndarray, rounding: str) -> np.ndarray:
    """|x| to an integer. x is a non-negative float64 small enough that x + 0.5 is exact."""
    if rounding == "even":
        return np.rint(x)
    low = np.floor(x)
    # Not floor(x + 0.5): that sum can round up (0.49999999999999994).
    return low + (x - low >= 0.5) if rounding == "nearest" else low


def round_element(v: np.ndarray, fmt: str, rounding: str) -> np.ndarray:
    """float64 -> nearest value of the element format, subnormals included, saturating; NaN stays."""
    e = ELEMENTS[fmt]
    a = np.abs(v)
    finite = np.isfinite(a)
    m = np.where(finite, a, 0.0)
    _, p = np.frexp(m)
    p = np.maximum(p - 1, e.emin) if e.exponent_bits else np.zeros_like(p)
    step = np.ldexp(1.0, p - e.mantissa_bits)
    r = np.minimum(_integer(m / step, rounding) * step, e.largest)
    if fmt == "bf16" and rounding != "floor":
        # bfloat16 has an infinity and the cast is IEEE's, not a saturating one: past the middle between
        # the largest value and the next binade it overflows.
        r = np.where(_integer(m / step, rounding) * step > e.largest, np.inf, r)
    r = np.where(finite, r, np.where(np.isnan(a), np.nan, np.inf if fmt == "bf16" else e.largest))
    return np.copysign(r, v)


def _floor_log2(a: np.ndarray) -> np.ndarray:
    return np.frexp(a)[1] - 1


def shared_exponent(a: np.ndarray, fmt: str, rule: str) -> np.ndarray:
    """The block's exponent from its largest magnitude a > 0 (float64), clamped to E8M0's range."""
    e = ELEMENTS[fmt]
    p = _floor_log2(a)
    if rule == "floor":
        s = p - e.emax
    elif rule == "ceil":
        s = p + (np.ldexp(1.0, p) < a) - e.emax
    elif rule == "even":
        step = np.ldexp(1.0, p - e.mantissa_bits)
        s = _floor_log2(np.rint(a / step) * step) - e.emax
    elif rule == "rceil":
        # Smallest s with a <= largest * 2^s, without dividing.
        s = p - int(np.frexp(e.largest)[1] - 1)
        s = s + (a > np.ldexp(e.largest, s))
    else:
        raise ValueError(f"unknown scale rule {rule}")
    return np.clip(s, -127, 127).astype(np.int64)


def _blocks(x: np.ndarray, block: int) -> np.ndarray:
    """[..., K] -> [..., ceil(K / block), block], zero padded."""
    k = x.shape[-1]
    nb = -(-k // block)
    pad = [(0, 0)] * (x.ndim - 1) + [(0, nb * block - k)]
    return np.pad(x, pad).reshape(*x.shape[:-1], nb, block)


def quantize(x: np.ndarray, spec: Spec) -> tuple[np.ndarray, np.ndarray]:
    """x [..., K] -> (elements [..., blocks, block] float64, scale).

    `scale` is the E8M0 byte per block ([..., blocks] uint8), for `tensor` the fp32 scale, for `none` empty.
    """
    v = _blocks(np.asarray(x, dtype=np.float32).astype(np.float64), spec.block_size)
    if spec.scale == "none":
        return round_element(v, spec.format, spec.rounding), np.zeros(0, np.uint8)
    if spec.scale == "tensor":
        amax = np.abs(v).max(initial=0.0)
        s = np.float32(np.float32(amax) / np.float32(ELEMENTS[spec.format].largest))
        s = np.float32(1.0) if amax == 0 else max(s, np.float32(2.0**-126))
        # Unlike with E8M0 the quotient is inexact: it is a float32, as hardware casts take one.
        return round_element((v.astype(np.float32) / s).astype(np.float64), spec.format, spec.rounding), np.array([s], np.float32)
    a = np.abs(v).max(axis=-1)
    bad = ~np.isfinite(a)
    usable = ~bad & (a > 0)
    s = shared_exponent(np.where(usable, a, 1.0), spec.format, spec.scale_rule)
    s = np.where(usable, s, -127)
    q = round_element(np.ldexp(np.where(bad[..., None], 0.0, v), -s[..., None]), spec.format, spec.rounding)
    q = np.where(bad[..., None], np.nan, q)
    return q, np.where(bad, 255, s + 127).astype(np.uint8)


def dequantize(q: np.ndarray, scale: np.ndarray, spec: Spec, k: int) -> np.ndarray:
    """Elements and scales -> [..., K] float64; exact."""
    if spec.scale == "e8m0":
        q = np.where(scale[..., None] == 255, np.nan, np.ldexp(q, scale[..., None].astype(np.int64) - 127))
    elif spec.scale == "tensor":
        q = q * float(scale[0])
    return q.reshape(*q.shape[:-2], -1)[..., :k]


def fake_quantize(x: np.ndarray, spec: Spec) -> np.ndarray:
    """Quantise and dequantise along the last axis: float64, exactly representable in float32 for e8m0."""
    q, s = quantize(x, spec)
    return dequantize(q, s, spec, x.shape[-1])


# ------------------------------------------------------------------------------- codes and bytes


def encode(q: np.ndarray, fmt: str) -> np.ndarray:
    """Element values (float64, finite) -> codes as unsigned integers."""
    e = ELEMENTS[fmt]
    if fmt == "mxint8":
        return (np.rint(q * 64).astype(np.int64) & 0xFF).astype(np.uint16)
    if fmt == "bf16":
        return (q.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    a = np.abs(q)
    p = np.maximum(_floor_log2(np.where(a > 0, a, 1.0)), e.emin)
    whole = np.rint(np.ldexp(a, e.mantissa_bits - p)).astype(np.int64)  # implicit one included
    field = np.where(whole >= 1 << e.mantissa_bits, p - e.emin + 1, 0)
    code = (field << e.mantissa_bits) | (whole & ((1 << e.mantissa_bits) - 1))
    return (code | (np.signbit(q).astype(np.int64) << (e.bits - 1))).astype(np.uint16)


def decode(code: np.ndarray, fmt: str) -> np.ndarray:
    """Codes -> element values, float64, with E5M2's Inf and NaN and E4M3's NaN."""
    e = ELEMENTS[fmt]
    c = np.asarray(code).astype(np.int64)
    if fmt == "mxint8":
        return np.where(c >= 128, c - 256, c) / 64.0
    if fmt == "bf16":
        with np.errstate(invalid="ignore"):  # signalling NaN
            return (c.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    mant = c & ((1 << e.mantissa_bits) - 1)
    field = (c >> e.mantissa_bits) & ((1 << e.exponent_bits) - 1)
    normal = field > 0
    v = np.ldexp((mant + (normal << e.mantissa_bits)).astype(np.float64), np.where(normal, field - 1, 0) + e.emin - e.mantissa_bits)
    if fmt == "fp8_e5m2":
        v = np.where(field == 31, np.where(mant == 0, np.inf, np.nan), v)
    if fmt == "fp8_e4m3":
        v = np.where((field == 15) & (mant == 7), np.nan, v)
    return np.where((c >> (e.bits - 1)) & 1, -v, v)


def pack(codes: np.ndarray, fmt: str) -> np.ndarray:
    """Codes [..., L] (L a multiple of the block) -> bytes [..., L * bits / 8]."""
    bits = ELEMENTS[fmt].bits
    if bits == 8:
        return codes.astype(np.uint8)
    # One little-endian bit stream a row: bit i of code j is bit (j * bits + i) of the row.
    stream = (codes[..., None].astype(np.uint32) >> np.arange(bits)) & 1
    return np.packbits(stream.astype(np.uint8).reshape(*codes.shape[:-1], -1), axis=-1, bitorder="little")


def unpack(data: np.ndarray, fmt: str) -> np.ndarray:
    """Bytes [..., B] -> codes [..., B * 8 / bits]."""
    bits = ELEMENTS[fmt].bits
    stream = np.unpackbits(np.asarray(data, np.uint8), axis=-1, bitorder="little")
    stream = stream.reshape(*data.shape[:-1], -1, bits).astype(np.uint32)
    return (stream << np.arange(bits, dtype=np.uint32)).sum(axis=-1).astype(np.uint16)


def packed(x: np.ndarray, spec: Spec) -> tuple[np.ndarray, np.ndarray]:
    """x [N, K] -> (packed codes [N, row bytes], scales): what a rewritten model's initialisers hold."""
    q, s = quantize(x, spec)
    q = np.where(np.isnan(q), 0.0, q)
    return pack(encode(q, spec.format).reshape(*q.shape[:-2], -1), spec.format), s


def row_bytes(k: int, spec: Spec) -> int:
    return -(-k // spec.block_size) * spec.block_size * ELEMENTS[spec.format].bits // 8


def int8_per_channel(w: np.ndarray) -> np.ndarray:
    """w [N, K] -> weight-only int8, symmetric per output channel, dequantised (float32 arithmetic)."""
    w = np.asarray(w, np.float32)
    scale = np.abs(w).max(axis=1, keepdims=True) / np.float32(127)
    scale = np.where(scale == 0, np.float32(1), scale)
    return np.clip(np.rint(w / scale), -127, 127).astype(np.float32) * scale


# ------------------------------------------------------------------------------------------- torch


def torch_fake_quantize(x, spec: Spec):
    """torch, any device: x [..., K] float32 -> quantised and dequantised along K, float32.

    The same numbers as `fake_quantize`, got another way: exponents are read from and written into float64
    bit fields, where every float32, subnormals included, is normal.
    """
    import torch

    e = ELEMENTS[spec.format]
    bias, mbits = 1023, 52

    def power(p):
        return ((p + bias) << mbits).view(torch.float64)

    def exponent(v):
        return ((v.view(torch.int64) >> mbits) & 0x7FF) - bias

    def whole(v):
        if spec.rounding == "even":
            return torch.round(v)
        low = torch.floor(v)
        return low + (v - low >= 0.5).to(v.dtype) if spec.rounding == "nearest" else low

    if spec.format == "bf16":
        if spec.rounding != "even":
            raise ValueError("torch's bfloat16 cast rounds to even only")
        return x.to(torch.bfloat16).to(torch.float32)

    def element(v):
        a = v.abs()
        p = exponent(a).clamp(min=e.emin) if e.exponent_bits else torch.zeros_like(a, dtype=torch.int64)
        step = power(p - e.mantissa_bits)
        r = torch.clamp(whole(a / step) * step, max=e.largest)
        return torch.copysign(r, v)

    k = x.shape[-1]
    v = x.to(torch.float64)
    if spec.scale == "none":
        return element(v).to(torch.float32)
    if spec.scale != "e8m0":
        raise ValueError(f"scale {spec.scale} is not emulated in torch")
    nb = -(-k // spec.block_size)
    v = torch.nn.functional.pad(v, (0, nb * spec.block_size - k))
    v = v.reshape(*x.shape[:-1], nb, spec.block_size)
    a = v.abs().amax(dim=-1, keepdim=True)
    bad = ~torch.isfinite(a)
    usable = ~bad & (a > 0)
    a = torch.where(usable, a, torch.ones_like(a))
    p = exponent(a)
    if spec.scale_rule == "floor":
        s = p - e.emax
    elif spec.scale_rule == "ceil":
        s = p + (power(p) < a).to(p.dtype) - e.emax
    elif spec.scale_rule == "even":
        step = power(p - e.mantissa_bits)
        s = exponent(torch.round(a / step) * step) - e.emax
    else:
        s = p - (int(np.frexp(e.largest)[1]) - 1)
        s = s + (a > e.largest * power(s)).to(s.dtype)
    s = torch.where(usable, s.clamp(-127, 127), torch.full_like(s, -127))
    q = element(torch.where(bad, torch.zeros_like(v), v) / power(s)) * power(s)
    q = torch.where(bad, torch.full_like(q, float("nan")), q)
    return q.reshape(*x.shape[:-1], -1)[..., :k].to(torch.float32)


# --------------------------------------------------------------------------------------- self-test


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """float32 tensors of a safetensors file; NumPy only, so that CI needs no further package."""
    data = Path(path).read_bytes()
    (n,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + n])
    out = {}
    for name, t in header.items():
        if name == "__metadata__":
            continue
        if t["dtype"] != "F32":
            raise ValueError(f"{path}: tensor {name} is {t['dtype']}, not F32")
        begin, end = t["data_offsets"]
        out[name] = np.frombuffer(data[8 + n + begin : 8 + n + end], "<f4").reshape(t["shape"])
    return out


def golden_cases(path: Path):
    """(key, input [R, K], expected [R, K], Spec) for every vector of a golden file."""
    tensors = read_safetensors(path)
    for key in sorted(tensors):
        if key.startswith("input."):
            continue
        fmt, rounding, block, case = key.split(".", 3)
        # A cut file may keep fewer rows of a vector than of its input: rows are quantised one by one.
        x = tensors[f"input.{case}"][: len(tensors[key])]
        yield key, x, tensors[key], Spec(fmt, int(block[1:]), rounding)


def same(a: np.ndarray, b: np.ndarray, flush: bool = False) -> np.ndarray:
    """Element-wise equality with -0 == 0 and NaN == NaN; `flush`: a result below 2^-126 may be zero."""
    ok = (a == b) | (np.isnan(a) & np.isnan(b))
    return ok | ((a == 0) & (np.abs(b) < 2.0**-126)) if flush else ok


def _code_round_trips() -> int:
    """Every code of every format decodes, quantises to itself and packs back; returns failures."""
    bad = 0
    for fmt, e in ELEMENTS.items():
        codes = np.arange(1 << e.bits, dtype=np.uint16)
        v = decode(codes, fmt)
        use = np.isfinite(v) & (np.abs(v) <= e.largest)
        for rounding in ROUNDINGS:
            r = round_element(v[use], fmt, rounding)
            bad += int((r != v[use]).sum()) + int((encode(r, fmt) != codes[use]).sum())
        if e.bits <= 8:
            bad += int((unpack(pack(codes, fmt), fmt) != codes).sum())
    return bad


def _random_cases(rng) -> list[np.ndarray]:
    x = rng.standard_normal((40, 77)).astype(np.float32)
    wild = x * np.exp2(rng.integers(-150, 128, x.shape)).astype(np.float32)
    raw = rng.integers(0, 2**32, (200, 77), dtype=np.uint64).astype(np.uint32).view(np.float32)
    near = np.concatenate([np.ldexp(np.float32(m), np.arange(-140, 120)) for m in (1.75, 1.5, 1.984375, 1.9375, 1.875)])
    near = np.stack([np.nextafter(near, np.float32(d)) for d in (-np.inf, 0, np.inf)] + [near], axis=1).astype(np.float32)
    return [x, wild, raw, near]


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("golden", nargs="*", type=Path)
    p.add_argument("--torch", action="store_true", help="compare the torch implementation too")
    p.add_argument("--device", default="cpu")
    args = p.parse_args()
    failures = _code_round_trips()
    print(f"codes there and back: {'ok' if failures == 0 else f'{failures} wrong'}")
    if args.torch:
        import torch
    for path in args.golden:
        vectors = wrong = 0
        for key, x, expect, spec in golden_cases(path):
            vectors += 1
            got = {"numpy": fake_quantize(x, spec).astype(np.float32)}
            if args.torch:
                got["torch"] = torch_fake_quantize(torch.from_numpy(x.copy()).to(args.device), spec).cpu().numpy()
            for who, y in got.items():
                if not same(y, expect).all():
                    wrong += 1
                    i = np.argwhere(~same(y, expect))[0]
                    print(f"{key} {who} at {tuple(i)}: {x[tuple(i)]!r} -> {y[tuple(i)]!r}, golden {expect[tuple(i)]!r}")
        print(f"{path.name}: {vectors} vectors, {wrong} wrong")
        failures += wrong + (vectors == 0)
    if args.torch:
        compared = wrong = 0
        with np.errstate(all="ignore"):
            for x in _random_cases(np.random.default_rng(5)):
                t = torch.from_numpy(x).to(args.device)
                for fmt in (*MX_FORMATS, "mxint8"):
                    for rounding in ROUNDINGS:
                        for rule in SCALE_RULES:
                            for block in (16, 32, 256):
                                spec = Spec(fmt, block, rounding, rule)
                                a, b = fake_quantize(x, spec).astype(np.float32), torch_fake_quantize(t, spec).cpu().numpy()
                                compared, wrong = compared + 1, wrong + int(not same(a, b).all())
        print(f"numpy against torch: {compared} combinations, {wrong} wrong")
        failures += wrong
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
