"""Builds ONNX models of single mx operators for the tests, and runs them in ONNX Runtime.

The weights are quantised by scripts/mx_emulation.py, not by the library under test.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import mx_emulation as emu  # noqa: E402

LIBRARY = os.environ["MX_CUSTOM_OPS"]
ONNX_TYPE = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
# Significand bits of the types, the implicit one included.
PRECISION = {"float32": 24, "float16": 11, "bfloat16": 8}


def to_bits(x: np.ndarray, dtype: str) -> np.ndarray:
    """float64 -> the bits of `dtype`, rounded half to even; float32 as it is."""
    x = np.asarray(x, np.float32)
    if dtype == "float32":
        return x
    if dtype == "float16":
        return x.astype(np.float16)
    q = emu.round_element(x.astype(np.float64), "bf16", "even")
    return (q.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def from_bits(x: np.ndarray, dtype: str) -> np.ndarray:
    """The bits of `dtype` -> float64."""
    if dtype == "bfloat16":
        return (x.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return x.astype(np.float64)


def tensor(name: str, value: np.ndarray, onnx_type: int) -> onnx.TensorProto:
    t = onnx.TensorProto(name=name, data_type=onnx_type)
    t.dims.extend(value.shape)
    t.raw_data = np.ascontiguousarray(value).tobytes()
    return t


@dataclass
class Case:
    """One MxMatMul node."""

    n: int = 48
    k: int = 100
    weight: str = "fp8_e4m3"
    activation: str = "fp8_e4m3"
    scale: str = "e8m0"
    block: int = 32
    rounding: str = "even"
    rule: str = "floor"
    alpha: float = 1.0
    beta: float = 1.0
    bias: bool = False
    dtype: str = "float32"
    shape: tuple = (2, 3)
    seed: int = 0
    spread: float = 3.0  # binary orders of magnitude that rows and columns vary over
    drop: tuple = field(default=())

    def spec(self, fmt: str) -> emu.Spec:
        return emu.Spec(fmt, self.block, self.rounding, self.rule, self.scale)

    def attributes(self) -> dict:
        return dict(
            k=self.k,
            n=self.n,
            weight_format=self.weight,
            activation_format=self.activation,
            block_size=self.block,
            scale=self.scale,
            rounding=self.rounding,
            scale_rule=self.rule,
            alpha=float(self.alpha),
            beta=float(self.beta),
            layout=1,
        )

    def data(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """x (values that dtype can hold), w, bias; float64."""
        rng = np.random.default_rng(self.seed)
        scatter = lambda *s: rng.standard_normal(s) * np.exp2(rng.uniform(-self.spread, self.spread, s))
        x = from_bits(to_bits(scatter(*self.shape, self.k), self.dtype), self.dtype)
        w = scatter(self.n, self.k).astype(np.float32).astype(np.float64)
        bias = from_bits(to_bits(scatter(self.n) * 10, self.dtype), self.dtype)
        return x, w, bias

    def model(self) -> onnx.ModelProto:
        _, w, bias = self.data()
        codes, scales = emu.packed(w, self.spec(self.weight))
        onnx_type = ONNX_TYPE[self.dtype]
        inits = [tensor("W.codes", codes, TensorProto.UINT8)]
        inputs = ["X", "W.codes"]
        if self.scale != "none":
            kind = TensorProto.UINT8 if self.scale == "e8m0" else TensorProto.FLOAT
            inits.append(tensor("W.scales", scales, kind))
            inputs.append("W.scales")
        if self.bias:
            inputs += [""] * (3 - len(inputs)) + ["bias"]
            inits.append(tensor("bias", to_bits(bias, self.dtype), onnx_type))
        node = helper.make_node("MxMatMul", inputs, ["Y"], name="layer.0/MxMatMul", domain="mx", **self.attributes())
        lead = [f"d{i}" for i in range(len(self.shape))]
        return model(
            [node],
            [helper.make_tensor_value_info("X", onnx_type, [*lead, self.k])],
            [helper.make_tensor_value_info("Y", onnx_type, [*lead, self.n])],
            inits,
        )

    def feed(self) -> np.ndarray:
        return to_bits(self.data()[0], self.dtype)

    def expected(self) -> tuple[np.ndarray, np.ndarray]:
        """(Y in float64 before the cast to dtype, sum of |x_i w_i| times |alpha|, plus |beta bias|)."""
        x, w, bias = self.data()
        if x.size == 0:
            return (np.zeros((*self.shape, self.n)),) * 2
        wq = emu.fake_quantize(w, self.spec(self.weight))
        xq = x if self.activation == "none" else emu.fake_quantize(x, self.spec(self.activation))
        alpha, beta = float(np.float32(self.alpha)), float(np.float32(self.beta))
        y = alpha * (xq @ wq.T)
        size = abs(alpha) * (np.abs(xq) @ np.abs(wq).T)
        if self.bias:
            y = y + beta * bias
            size = size + abs(beta * bias)
        return y, size

    def tolerance(self, y: np.ndarray, size: np.ndarray) -> np.ndarray:
        """design.md, "Numbers": accumulation, plus half a unit of the type that Y is cast to."""
        smallest = {"float32": 2.0**-126, "float16": 2.0**-24, "bfloat16": 2.0**-126}[self.dtype]
        accumulate = (self.k / 16 + 32) * 2.0**-23 * size
        return accumulate + np.abs(y) * 2.0 ** -PRECISION[self.dtype] + smallest

    def replace(self, **changes) -> "Case":
        return replace(self, **changes)


@dataclass
class ActCase:
    """One MxActMatMul node: shapes as NumPy's matmul takes them (B's last two exchanged for transpose)."""

    a: tuple = (2, 3, 100)
    b: tuple = (2, 100, 17)
    a_format: str = "fp8_e4m3"
    b_format: str = "fp8_e4m3"
    scale: str = "e8m0"
    block: int = 32
    rounding: str = "even"
    rule: str = "floor"
    transpose: bool = False
    alpha: float = 1.0
    dtype: str = "float32"
    seed: int = 0
    spread: float = 3.0

    def spec(self, fmt: str) -> emu.Spec:
        return emu.Spec(fmt, self.block, self.rounding, self.rule, self.scale)

    def attributes(self) -> dict:
        names = dict(block_size=self.block, scale=self.scale, rounding=self.rounding, scale_rule=self.rule)
        formats = dict(a_format=self.a_format, b_format=self.b_format)
        return {**formats, **names, "transpose_b": int(self.transpose), "alpha": float(self.alpha)}

    def data(self) -> tuple[np.ndarray, np.ndarray]:
        """A and B in float64, values that dtype can hold; B as MatMul has it, not transposed."""
        rng = np.random.default_rng(self.seed)
        scatter = lambda s: rng.standard_normal(s) * np.exp2(rng.uniform(-self.spread, self.spread, s))
        cast = lambda v: from_bits(to_bits(v, self.dtype), self.dtype)
        return cast(scatter(self.a)), cast(scatter(self.b))

    def feeds(self) -> dict[str, np.ndarray]:
        a, b = self.data()
        if self.transpose and b.ndim > 1:
            b = np.swapaxes(b, -1, -2)
        return {"A": to_bits(a, self.dtype), "B": np.ascontiguousarray(to_bits(b, self.dtype))}

    def values(self) -> dict[str, ort.OrtValue]:
        return {name: value(bits, self.dtype) for name, bits in self.feeds().items()}

    def model(self, declared: dict | None = None) -> onnx.ModelProto:
        """With the shapes of the operands declared, or those of `declared` (None: unknown)."""
        onnx_type = ONNX_TYPE[self.dtype]
        shapes = {name: list(bits.shape) for name, bits in self.feeds().items()} if declared is None else declared
        node = helper.make_node("MxActMatMul", ["A", "B"], ["Y"], name="layer.0/MxActMatMul", domain="mx", **self.attributes())
        infos = [helper.make_tensor_value_info(name, onnx_type, shapes[name]) for name in ("A", "B")]
        out = helper.make_empty_tensor_value_info("Y")
        out.type.tensor_type.elem_type = onnx_type
        return model([node], infos, [out], [])

    def expected(self) -> tuple[np.ndarray, np.ndarray]:
        """As Case.expected."""
        a, b = self.data()
        if a.size == 0 or b.size == 0:
            return (np.matmul(a, b),) * 2
        aq = emu.fake_quantize(a, self.spec(self.a_format))
        turned = b if b.ndim == 1 else np.swapaxes(b, -1, -2)
        bq = emu.fake_quantize(np.ascontiguousarray(turned), self.spec(self.b_format))
        bq = bq if b.ndim == 1 else np.swapaxes(bq, -1, -2)
        alpha = float(np.float32(self.alpha))
        return alpha * np.matmul(aq, bq), abs(alpha) * np.matmul(np.abs(aq), np.abs(bq))

    def tolerance(self, y: np.ndarray, size: np.ndarray) -> np.ndarray:
        return Case(k=self.a[-1], dtype=self.dtype).tolerance(y, size)

    def replace(self, **changes) -> "ActCase":
        return replace(self, **changes)


def model(nodes, inputs, outputs, initializers) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "test", inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("mx", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def options(threads: int = 1) -> ort.SessionOptions:
    so = ort.SessionOptions()
    so.intra_op_num_threads = threads
    so.log_severity_level = 4
    so.register_custom_ops_library(LIBRARY)
    return so


def session(m, threads: int = 1) -> ort.InferenceSession:
    data = m if isinstance(m, bytes) else m.SerializeToString()
    return ort.InferenceSession(data, options(threads), providers=["CPUExecutionProvider"])


def value(array: np.ndarray, dtype: str) -> ort.OrtValue:
    if dtype == "bfloat16":
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(np.ascontiguousarray(array), TensorProto.BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))


def run(s: ort.InferenceSession, feeds: dict[str, ort.OrtValue], dtypes: list[str]) -> list[np.ndarray]:
    """Runs and returns float64 (or int64) arrays; `dtypes` are those of the outputs.

    onnxruntime's Python API cannot turn a bfloat16 output into NumPy, so outputs are bound.
    """
    outs = s.run_with_ort_values(None, feeds)
    result = []
    for out, dtype in zip(outs, dtypes):
        if dtype == "bfloat16":
            import ctypes

            count = int(np.prod(out.shape()))
            raw = (ctypes.c_uint16 * count).from_address(out.data_ptr()) if count else b""
            result.append(from_bits(np.frombuffer(raw, np.uint16).reshape(out.shape()).copy(), dtype))
        else:
            result.append(out.numpy() if dtype == "int64" else out.numpy().astype(np.float64))
    return result


def run_case(case: Case, threads: int = 1) -> np.ndarray:
    s = session(case.model(), threads)
    return run(s, {"X": value(case.feed(), case.dtype)}, [case.dtype])[0]
