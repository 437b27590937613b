#!/usr/bin/env python3
"""Writes what fuzzing starts from into fuzz/corpus/<target>: small models that reach every pattern, and the built-in recipes.

    python3 fuzz/seeds.py [--mxrewrite target/release/mxrewrite]        needs onnx and numpy

The hostile files of tests/it/hostile.rs are seeds too: MX_HOSTILE_DIR=fuzz/corpus/model cargo test --test it hostile
"""

import argparse
import struct
import subprocess
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

CORPUS = Path(__file__).parent / "corpus"


def weight(name, *shape, dtype=np.float32):
    values = np.random.default_rng(sum(map(ord, name))).standard_normal(shape)
    return numpy_helper.from_array(values.astype(dtype), name)


def model(nodes, weights, functions=(), opset=18):
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["rows", 4]) for n in ("x", "y")]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], weights)
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("local", 1), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=imports, functions=list(functions), ir_version=8)


def models():
    node = helper.make_node
    path = "/model/layers.0/mlp/up_proj/MatMul"
    w = weight("layers.0.mlp.up_proj.weight", 4, 4)
    yield "matmul", model([node("MatMul", ["x", w.name], ["y"], name=path)], [w])
    bias = weight("bias", 4)
    added = [node("MatMul", ["x", w.name], ["m"], name=path), node("Add", ["m", "bias"], ["y"])]
    yield "bias", model(added, [w, bias])
    gemm = node("Gemm", ["x", w.name, "bias"], ["y"], transB=1, alpha=0.5, beta=2.0)
    yield "gemm", model([gemm], [w, bias])
    turned = [node("Transpose", [w.name], ["t"], perm=[1, 0]), node("Cast", ["t"], ["c"], to=1), node("MatMul", ["x", "c"], ["y"])]
    yield "transposed", model(turned, [w])
    half = weight("half", 4, 4, dtype=np.float16)
    yield "half", model([node("Cast", ["half"], ["c"], to=1), node("MatMul", ["x", "c"], ["y"])], [half])
    fused = node("FusedMatMul", ["x", w.name], ["y"], domain="com.microsoft", transB=1, alpha=0.5)
    yield "fused", model([fused], [w])
    stack = weight("experts", 2, 4, 4)
    parts = [node("Split", ["experts"], ["a", "b"], axis=0), node("Squeeze", ["b", "axes"], ["s"]), node("MatMul", ["x", "s"], ["y"])]
    yield "experts", model(parts, [stack, numpy_helper.from_array(np.array([0]), "axes")])
    attention = [node("Transpose", ["x"], ["k"], perm=[1, 0]), node("MatMul", ["x", "k"], ["s"]), node("Softmax", ["s"], ["p"])]
    yield "attention", model([*attention, node("MatMul", ["p", "x"], ["y"])], [])
    out = [helper.make_tensor_value_info("b", TensorProto.FLOAT, None)]
    branch = helper.make_graph([node("MatMul", ["x", w.name], ["b"])], "branch", [], out)
    yield "branches", model([node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)], [w, numpy_helper.from_array(np.array(True), "c")])
    body = [node("MatMul", ["x", "w"], ["y"])]
    function = helper.make_function("local", "f", ["x", "w"], ["y"], body, [helper.make_opsetid("", 18)])
    yield "function", model([node("f", ["x", w.name], ["y"], domain="local")], [w], [function])


def put(target, name, content):
    (CORPUS / target).mkdir(parents=True, exist_ok=True)
    (CORPUS / target / name).write_bytes(content)


def with_data(m):
    """The same model with its weights in a data file `d`."""
    data = b""
    for tensor in m.graph.initializer:
        if tensor.data_type in (TensorProto.FLOAT, TensorProto.FLOAT16):
            raw = tensor.raw_data
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", "d"), ("offset", str(len(data))), ("length", str(len(raw)))):
                tensor.external_data.add(key=key, value=value)
            data += raw
    content = m.SerializeToString()
    return struct.pack("<H", len(content)) + content + data


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mxrewrite", default="target/release/mxrewrite")
    args = parser.parse_args()
    for name, m in models():
        onnx.checker.check_model(m) if "fused" not in name else None
        put("model", name, m.SerializeToString())
        put("external", name, with_data(m))
    for name in ("tier-a", "tier-c", "w4a8", "w4a16", "all-linears"):
        for flags in ([], ["--json"]):
            text = subprocess.run([args.mxrewrite, "--print-recipe", name, *flags], check=True, capture_output=True).stdout
            put("recipe", name + "".join(flags), text)
    mixed = '[[rules]]\nrole = ["head", "expert"]\nlayers = ["first 2", "4-7", -1]\ninclude = \'mlp\\.\'\nweight_format = "keep"\n'
    put("recipe", "mixed", mixed.encode())
    print(f"wrote {sum(1 for p in CORPUS.rglob('*') if p.is_file())} files to {CORPUS}")


if __name__ == "__main__":
    main()
