"""Models of one MxMatMul node that break the operator contract, one thing each."""

from __future__ import annotations

import mx_nodes as mx
import numpy as np
import onnx
from mx_nodes import Case
from onnx import TensorProto, helper


def attribute(m: onnx.ModelProto, name: str, new) -> None:
    node = m.graph.node[0]
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend(kept)
    if new is not None:
        node.attribute.append(helper.make_attribute(name, new))


def broken_models():
    """(what, model, a word that the message must hold)."""

    def broken(what: str, word: str, change, case: Case = Case(bias=True)):
        m = case.model()
        change(m)
        return what, m, word

    def init(m, i, array, onnx_type=TensorProto.UINT8):
        m.graph.initializer[i].CopyFrom(mx.tensor(m.graph.initializer[i].name, array, onnx_type))

    u8 = lambda *s: np.zeros(s, np.uint8)
    node = lambda m: m.graph.node[0]
    yield broken("codes too short", "codes", lambda m: init(m, 0, u8(48, 127)))
    yield broken("codes with a row too few", "codes", lambda m: init(m, 0, u8(47, 128)))
    yield broken("codes empty", "codes", lambda m: init(m, 0, u8(0)))
    yield broken("codes of another rank", "codes", lambda m: init(m, 0, u8(48 * 128)))
    yield broken("codes scalar", "codes", lambda m: init(m, 0, u8()))
    yield broken("codes of another type", "", lambda m: init(m, 0, np.zeros((48, 128), np.int8), TensorProto.INT8))
    yield broken("codes missing", "", lambda m: node(m).input.__setitem__(1, ""))
    yield broken("wrong k", "k", lambda m: attribute(m, "k", 101))
    yield broken("another k with the same padding", "X", lambda m: attribute(m, "k", 99))
    yield broken("wrong n", "codes", lambda m: attribute(m, "n", 49))
    yield broken("scales missing", "scales", lambda m: node(m).input.__setitem__(2, ""))
    yield broken("scales not listed", "scales", lambda m: node(m).input.__delitem__(slice(2, 4)))
    yield broken("scales too short", "scales", lambda m: init(m, 1, u8(48, 3)))
    yield broken("scales of another type", "scales", lambda m: init(m, 1, np.zeros((48, 4), np.float32), TensorProto.FLOAT))
    yield broken("scales where there are none", "scales", lambda m: attribute(m, "scale", "none"))
    yield broken("bias too short", "bias", lambda m: init(m, 2, np.zeros(47, np.float32), TensorProto.FLOAT))
    yield broken("bias of another type", "", lambda m: init(m, 2, np.zeros(48, np.float16), TensorProto.FLOAT16))
    yield broken("too many inputs", "", lambda m: node(m).input.append("bias"))
    yield broken("no inputs", "", lambda m: node(m).input.__delitem__(slice(0, 4)))
    for name, bad in (
        ("block_size", (0, -32, 33, 2**40, 32.0, "32", [32])),
        ("k", (0, -1, 2**31, 2**63 - 1, -(2**63), 100.0, "100")),
        ("n", (0, -5, 2**62, [48])),
        ("layout", (0, 2, -1, "1")),
        ("weight_format", ("fp9", "", "FP8_E4M3", "bf16", "x" * 100000, 8, b"\xff\xfe", "fp8\0e4m3", "fp6_e3m2")),
        ("activation_format", ("int4", "bf16", 1.0, ["fp8_e4m3"])),
        ("scale", ("e8m1", "tensor", 1, b"\x80")),
        ("rounding", ("stochastic", 3)),
        ("scale_rule", ("round", 2.0)),
        ("alpha", (float("nan"), float("inf"), 1, "1")),
        ("beta", (float("-inf"), 2, [1.0])),
    ):
        for value in bad:
            shown = repr(value)[:20]
            # A format that only makes the codes wrong is told by the codes; a k that only breaks X, by X.
            word = {"fp6_e3m2": "codes", "tensor": "scales"}.get(value if isinstance(value, str) else "", name)
            yield broken(f"{name} = {shown}", word, lambda m, n=name, v=value: attribute(m, n, v))
    for name in ("k", "n", "weight_format", "activation_format"):
        yield broken(f"{name} absent", name, lambda m, n=name: attribute(m, n, None))
    small = Case(n=4, k=32)
    yield broken("X of another size", "X", lambda m: m.graph.input[0].type.tensor_type.shape.dim[2].__setattr__("dim_value", 31), small)
