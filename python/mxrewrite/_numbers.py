"""MX formats on NumPy arrays, bit for bit as kernels and files have them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from . import _native
from ._errors import UsageError, translated

FORMATS: tuple[str, ...] = ("fp8_e4m3", "fp8_e5m2", "fp6_e3m2", "fp6_e2m3", "fp4_e2m1", "mxint8")
"""Element formats with block scales."""

_BITS = {"fp6_e3m2": 6, "fp6_e2m3": 6, "fp4_e2m1": 4}


@dataclass(frozen=True, eq=False)
class Quantized:
    """A quantised array: blocks of `block_size` values along the last axis share a power of two.

    value = element * 2**(scale - 127); a scale of 255 makes the block NaN.
    """

    codes: npt.NDArray[np.uint8]
    """Packed codes [..., ceil(k / block_size) * block_size * bits / 8]: fp4 two a byte, low nibble first; fp6 four in
    three bytes, little-endian; fp8 and mxint8 one a byte. The tail of the last block is zero codes."""
    scales: npt.NDArray[np.uint8]
    """E8M0 scales [..., ceil(k / block_size)]; empty for `scale="none"`, float32 [1] as bytes for `"tensor"`."""
    k: int
    """Values of a row."""
    format: str
    block_size: int = 32
    scale: str = "e8m0"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array that was quantised."""
        return (*self.codes.shape[:-1], self.k)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return int(self.codes.nbytes + self.scales.nbytes)

    def dequantize(self) -> npt.NDArray[np.float32]:
        """The values, float32, of `shape`."""
        return dequantize(
            self.codes, self.scales, self.format, k=self.k, block_size=self.block_size, scale=self.scale
        )

    def unpacked(self) -> npt.NDArray[np.uint8]:
        """The codes one a byte, of `shape`."""
        rows = np.ascontiguousarray(self.codes.reshape(-1, self.codes.shape[-1]))
        with translated():
            flat = _native.unpack(rows, self.format)
        codes = flat.reshape(rows.shape[0], -1)[:, : self.k].astype(np.uint8)
        return codes.reshape(self.shape)


def quantize(
    array: npt.ArrayLike,
    format: str,
    *,
    block_size: int = 32,
    rounding: str = "even",
    scale_rule: str = "floor",
    scale: str = "e8m0",
) -> Quantized:
    """Quantises along the last axis, as the OCP Microscaling specification v1.0 (section 6.3) does.

    Args:
        array: float32, float16 or bfloat16 (of `ml_dtypes`), at least one dimension, none of them zero. A weight
            is [n, k]. float64 has to be cast first: rounding twice would not be the format's rounding.
        format: one of `FORMATS`.
        block_size: 16, 32, 64, 128 or 256 values that share a scale; the last block of a row may be shorter.
        rounding: of elements: `even` (half to even), `nearest` (half away from zero), `floor` (toward zero).
        scale_rule: how a block's largest magnitude a becomes its exponent: `floor` = floor(log2 a) - emax (OCP), `ceil`,
            `even`, `rceil` = ceil(log2(a / largest)).
        scale: `e8m0`; `none` for unscaled fp8; `tensor` for fp8 with one float32 scale.

    Raises:
        UsageError: an unknown name, or another dtype.
    """
    values = _float32(array)
    if values.ndim == 0 or values.size == 0:
        raise UsageError(f"array: shape {values.shape}, but at least one dimension is needed and none may be 0")
    k = values.shape[-1]
    rows = np.ascontiguousarray(values.reshape(-1, k))
    with translated():
        codes, scales = _native.quantize(rows, _spec(format, block_size, rounding, scale_rule, scale))
    lead = values.shape[:-1]
    if scale == "e8m0":
        scales = scales.reshape(*lead, -1)
    return Quantized(codes.reshape(*lead, -1), scales, k, format, block_size, scale)


def dequantize(
    codes: npt.NDArray[np.uint8],
    scales: npt.NDArray[np.uint8],
    format: str,
    *,
    k: int | None = None,
    block_size: int = 32,
    scale: str = "e8m0",
) -> npt.NDArray[np.float32]:
    """The values of packed codes, float32 [..., k], each exact (but for those outside of float32's normal range).

    Args:
        codes: uint8 [..., ceil(k / block_size) * block_size * bits / 8], as `Quantized.codes`.
        scales: uint8 [..., ceil(k / block_size)], as `Quantized.scales`.
        format: one of `FORMATS`.
        k: values of a row (default: as many as whole blocks hold).
        block_size: values that share a scale.
        scale: `e8m0`, `none` or `tensor`.

    Raises:
        UsageError: arrays of another dtype or of shapes that do not go together.
    """
    for name, array in (("codes", codes), ("scales", scales)):
        if getattr(array, "dtype", None) != np.uint8:
            raise UsageError(f"{name}: uint8 is needed, not {getattr(array, 'dtype', type(array).__name__)}")
    if codes.ndim == 0 or codes.size == 0:
        raise UsageError(f"codes: shape {codes.shape}, but at least one dimension is needed and none may be 0")
    row_bytes = codes.shape[-1]
    k = row_bytes * 8 // _BITS.get(format, 8) if k is None else int(k)
    if k <= 0:
        raise UsageError(f"k: {k}, but a row has at least one value")
    if scale == "e8m0" and scales.shape[:-1] != codes.shape[:-1]:
        raise UsageError(f"scales: shape {scales.shape} does not go with codes of shape {codes.shape}")
    rows = np.ascontiguousarray(codes.reshape(-1, row_bytes))
    flat = np.ascontiguousarray(scales.reshape(-1))
    with translated():
        values = _native.dequantize(rows, flat, k, _spec(format, block_size, "even", "floor", scale))
    return values.reshape(*codes.shape[:-1], k)


def _float32(array: npt.ArrayLike) -> npt.NDArray[np.float32]:
    values = np.asarray(array)
    # ml_dtypes' bfloat16 is no type of NumPy's own and goes by its name.
    if values.dtype in (np.float32, np.float16) or values.dtype.name == "bfloat16":
        return values.astype(np.float32, copy=False)
    raise UsageError(f"array: {values.dtype}, but float32, float16 or bfloat16 is needed; cast it first")


def _spec(format: str, block_size: int, rounding: str, scale_rule: str, scale: str) -> dict[str, Any]:
    if format not in FORMATS:
        raise UsageError(f"format: {format!r} is unknown; known are {', '.join(FORMATS)}")
    return {
        "format": format,
        "scale": scale,
        "block_size": block_size,
        "rounding": rounding,
        "scale_rule": scale_rule,
    }
