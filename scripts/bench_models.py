"""The contenders of bench_ops.py: each a model of `copies` nodes that read the same X and a weight of their own.

Weights are random; copy i has the rows of copy 0 moved on by some places, so that one set of random numbers
serves all and every byte is still read. `rows` dequantises single output features of a copy for the check.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx
from mx_emulation import ELEMENTS, Spec, decode, fake_quantize, packed, unpack
from onnx import TensorProto, helper

BLOCK = 32
# Different blocks of a weight.
POOL = 8192
FORMATS = ("fp8_e4m3", "fp8_e5m2", "fp6_e3m2", "fp6_e2m3", "fp4_e2m1", "mxint8")
FLOATS = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}


def _tensor(name: str, array: np.ndarray, kind: int) -> onnx.TensorProto:
    t = onnx.TensorProto(name=name, data_type=kind, raw_data=np.ascontiguousarray(array).tobytes())
    t.dims.extend(array.shape)
    return t


def widen(x: np.ndarray) -> np.ndarray:
    """bfloat16 bits, float16 or float32 -> float64."""
    return (x.astype(np.uint32) << 16).view(np.float32).astype(np.float64) if x.dtype == np.uint16 else x.astype(np.float64)


def narrow(x: np.ndarray, kind: str) -> np.ndarray:
    """float32 -> the array that an OrtValue of the type holds; bfloat16 as bits, cut off."""
    return (x.view(np.uint32) >> 16).astype(np.uint16) if kind == "bfloat16" else x.astype(kind)


@dataclass
class Contender:
    """One operator on one shape. `weight` holds arrays with a leading axis of n, in the order of the node's inputs."""

    name: str
    k: int
    n: int
    x_type: str = "float32"
    operands: str = "weight only"
    peer: bool = True
    # Root mean square of the error that the operator's own rounding of X leaves, over that of Y.
    tolerance: float = 1e-5
    weight: dict[str, tuple[np.ndarray, int]] = field(default_factory=dict)

    def bytes(self) -> int:
        """Of one copy of the weight as the model holds it."""
        return sum(a.nbytes for a, _ in self.weight.values())

    def shift(self, copy: int) -> int:
        return copy * (self.n // 7 | 1) % self.n

    def model(self, copies: int) -> bytes:
        nodes, initializers = [], []
        for copy in range(copies):
            names = []
            for name, (array, kind) in self.weight.items():
                names.append(f"{name}{copy}")
                initializers.append(_tensor(names[-1], self.stored(name, np.roll(array, -self.shift(copy), axis=0)), kind))
            nodes.append(self.node(names, f"Y{copy}"))
        kind = FLOATS[self.x_type]
        graph = helper.make_graph(
            nodes,
            "bench",
            [helper.make_tensor_value_info("X", kind, ["m", self.k])],
            [helper.make_tensor_value_info(f"Y{copy}", kind, ["m", self.n]) for copy in range(copies)],
            initializers,
        )
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("mx", 1), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()

    def expected(self, x: np.ndarray, copy: int, features: np.ndarray) -> np.ndarray:
        """Y at some output features, in float64."""
        return self.quantized(widen(x)) @ self.rows((features + self.shift(copy)) % self.n).T

    # What a kind of contender says about itself.

    def stored(self, name: str, array: np.ndarray) -> np.ndarray:
        return array

    def quantized(self, x: np.ndarray) -> np.ndarray:
        return x

    def node(self, names: list[str], out: str) -> onnx.NodeProto:
        raise NotImplementedError

    def rows(self, features: np.ndarray) -> np.ndarray:
        raise NotImplementedError


class MatMul(Contender):
    @classmethod
    def make(cls, k, n, rng):
        w = rng.standard_normal((n, k), dtype=np.float32) / np.float32(np.sqrt(k))
        return cls("MatMul fp32", k, n, operands="float32", weight={"W": (w, TensorProto.FLOAT)})

    def stored(self, name, array):
        return array.T

    def node(self, names, out):
        return helper.make_node("MatMul", ["X", *names], [out], name=out)

    def rows(self, features):
        return self.weight["W"][0][features].astype(np.float64)


class MatMulNBits(Contender):
    """Blocks of 32 with float32 scales, no zero points; accuracy level 4 rounds X to int8 by blocks."""

    @classmethod
    def make(cls, k, n, bits, rng):
        blocks = k // BLOCK
        codes = rng.integers(0, 256, (n, blocks, BLOCK * bits // 8), dtype=np.uint8)
        scales = rng.uniform(0.5, 1.0, (n, blocks)).astype(np.float32) / np.float32(2 ** (bits - 1) * np.sqrt(k))
        self = cls(f"MatMulNBits {bits}", k, n, operands="weight, X int8", tolerance=2e-2)
        self.weight = {"B": (codes, TensorProto.UINT8), "scales": (scales, TensorProto.FLOAT)}
        self.bits = bits
        return self

    def node(self, names, out):
        attributes = dict(K=self.k, N=self.n, bits=self.bits, block_size=BLOCK, accuracy_level=4)
        return helper.make_node("MatMulNBits", ["X", *names], [out], name=out, domain="com.microsoft", **attributes)

    def rows(self, features):
        codes, scales = (a[features] for a, _ in self.weight.values())
        if self.bits == 4:
            codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:2], BLOCK)
        v = (codes.astype(np.float64) - 2 ** (self.bits - 1)) * scales[..., None]
        return v.reshape(len(features), self.k)


class DynamicQuantizeMatMul(Contender):
    """int8 weight of 7 bits (with 8, AVX2's pairs of products saturate), one scale a column; X to uint8 with one
    scale for all of it."""

    @classmethod
    def make(cls, k, n, rng):
        w = rng.integers(-64, 64, (n, k), dtype=np.int8)
        scales = rng.uniform(0.5, 1.0, n).astype(np.float32) / np.float32(32 * np.sqrt(k))
        weight = {"B": (w, TensorProto.INT8), "scale": (scales, TensorProto.FLOAT)}
        return cls("DynamicQuantizeMatMul", k, n, operands="int8, X uint8", tolerance=5e-2, weight=weight)

    def stored(self, name, array):
        return array.T if name == "B" else array

    def node(self, names, out):
        return helper.make_node("DynamicQuantizeMatMul", ["X", *names], [out], name=out, domain="com.microsoft")

    def rows(self, features):
        w, scales = (a[features] for a, _ in self.weight.values())
        return w.astype(np.float64) * scales[:, None]


class MxMatMul(Contender):
    """Blocks of normally distributed values, quantised, in random order. Codes of any bytes would not do: AVX2 takes
    longer for blocks with subnormal fp8 codes, of which a quantised weight has few."""

    @classmethod
    def make(cls, fmt, k, n, both, x_type, rng):
        blocks, bits = -(-k // BLOCK), ELEMENTS[fmt].bits
        pool_codes, pool_scales = packed(rng.standard_normal((POOL, BLOCK)), Spec(fmt))
        chosen = rng.integers(0, POOL, (n, blocks))
        codes = pool_codes[chosen].reshape(n, blocks * BLOCK * bits // 8)
        scales = pool_scales.reshape(POOL)[chosen]
        self = cls(fmt, k, n, x_type, "both" if both else "weight only", peer=False)
        self.weight = {"codes": (codes, TensorProto.UINT8), "scales": (scales, TensorProto.UINT8)}
        self.tolerance = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 5e-3}[x_type]
        return self

    def node(self, names, out):
        activation = self.name if self.operands == "both" else "none"
        attributes = dict(k=self.k, n=self.n, weight_format=self.name, activation_format=activation, block_size=BLOCK)
        attributes |= dict(scale="e8m0", rounding="even", scale_rule="floor", alpha=1.0, beta=1.0, layout=1)
        return helper.make_node("MxMatMul", ["X", *names], [out], name=out, domain="mx", **attributes)

    def quantized(self, x):
        return fake_quantize(x, Spec(self.name)) if self.operands == "both" else x

    def rows(self, features):
        codes, scales = (a[features] for a, _ in self.weight.values())
        v = decode(unpack(codes, self.name), self.name).reshape(*scales.shape, BLOCK)
        return np.ldexp(v, scales[..., None].astype(np.int64) - 127).reshape(len(features), -1)[:, : self.k]
