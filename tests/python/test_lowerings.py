"""What mxrewrite's other targets compute in stock onnxruntime, against NumPy, one area a call.

    MX_REWRITE=target/debug/mxrewrite MX_CUSTOM_OPS=target/debug/libmx_custom_ops.so \
        python tests/python/test_lowerings.py AREA MODEL...

AREA: int8, bf16, fp16, unscaled, nvfp8. Run by tests/it/lowerings.rs. Exit code 0 means that every check passed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import mx_emulation as emu
import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

REWRITE = os.environ["MX_REWRITE"]


def rewrite(model: Path, lowering: str, folder: str, *more: str) -> Path:
    out = Path(folder) / f"{lowering}.onnx"
    subprocess.run([REWRITE, model, "-o", out, "--lower", lowering, *more], check=True, capture_output=True)
    return out


def plan(model: Path) -> list[dict]:
    command = [REWRITE, model, "--plan", "--json", "--all-linears", "--include", "lm_head"]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)["sites"]


def run(model: Path | bytes, feed: dict | None = None) -> np.ndarray:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.register_custom_ops_library(os.environ["MX_CUSTOM_OPS"])
    # Without it ONNX Runtime fuses DequantizeLinear and MatMul into an operator that quantises X too.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    source = model if isinstance(model, bytes) else str(model)
    session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    if feed is None:
        ids = np.random.default_rng(1).integers(3, 400, (2, 40))
        known = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        known["position_ids"] = np.broadcast_to(np.arange(40), ids.shape).copy()
        feed = {i.name: known[i.name] for i in session.get_inputs()}
    return session.run(None, feed)[0]


def int8(model: Path) -> str:
    """The file's logits against those of the original graph with dequantised float32 weights."""
    original = onnx.load(model)
    weights = {t.name: t for t in original.graph.initializer}
    nodes = {n.name: n for n in original.graph.node}
    sites = plan(model)
    for site in sites:
        tensor = weights[site["initializer"]]
        w = numpy_helper.to_array(tensor)
        direct = site["initializer"] in nodes[site["node"]].input
        # A weight that the MatMul reads itself is [k, n]; behind a Transpose it is [n, k].
        rows = emu.int8_per_channel(w.T if direct else w).astype(np.float32)
        assert rows.shape == (site["n"], site["k"]), site
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(rows.T if direct else rows), tensor.name))
    with tempfile.TemporaryDirectory() as folder:
        got = run(rewrite(model, "int8", folder, "--all-linears", "--include", "lm_head"))
    # The embedding shares the head's weight and stays as it is in the rewritten file.
    gathers = [n for n in original.graph.node if n.op_type == "Gather" and n.input[0] in {s["initializer"] for s in sites}]
    for node in gathers:
        source = onnx.load(model)
        table = next(t for t in source.graph.initializer if t.name == node.input[0])
        table.name += ".embedding"
        original.graph.initializer.append(table)
        node.input[0] = table.name
    want = run(original.SerializeToString())
    worst = float(np.abs(got - want).max() / np.ptp(want))
    assert worst <= 1e-5, f"{worst:.3g} of the range of the logits"
    assert np.abs(run(model) - want).max() > 1e-3, "int8 changes nothing: the check is void"
    return f"{len(sites)} layers, worst {worst:.2e} of the logits' range"


def bf16(model: Path) -> str:
    """Logits are bfloat16 values near the original's; so is every float tensor between the layers."""
    with tempfile.TemporaryDirectory() as folder:
        path = rewrite(model, "bf16", folder)
        rounded = onnx.load(path)
        got = run(path)
    assert not (got.view(np.uint32) & 0xFFFF).any(), "a logit is no bfloat16 value"
    want = run(model)
    worst = float(np.abs(got - want).max() / np.ptp(want))
    assert 1e-5 < worst < 0.05, f"{worst:.3g} of the range of the logits"
    wide = 0
    for tensor in rounded.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype == np.float32 and values.ndim == 2:
            assert not (values.view(np.uint32) & 0xFFFF).any(), f"{tensor.name} is not rounded"
            wide += 1
    return f"{wide} matrices rounded, logits within {worst:.2e} of their range"


def fp16(model: Path) -> str:
    """Weights are float16, inputs and outputs keep their types, logits stay near the original's."""
    with tempfile.TemporaryDirectory() as folder:
        path = rewrite(model, "fp16", folder)
        converted = onnx.load(path)
        got = run(path)
    want, original = run(model), onnx.load(model)
    for after, before in zip((*converted.graph.input, *converted.graph.output), (*original.graph.input, *original.graph.output)):
        assert after == before, after.name
    wide = [t.name for t in converted.graph.initializer if t.data_type == TensorProto.FLOAT and np.prod(t.dims) > 4096]
    assert not wide, f"still float32: {wide}"
    worst = float(np.abs(got - want).max() / np.ptp(want))
    assert got.dtype == np.float32 and 1e-6 < worst < 5e-3, f"{worst:.3g} of the range of the logits"
    return f"logits within {worst:.2e} of their range"


def unscaled(_: Path) -> str:
    """bfp16 and the fp8 emulations on one biased layer, against a float64 product of rounded operands."""
    rng = np.random.default_rng(5)
    w = rng.normal(0, 1, (75, 20)).astype(np.float32)
    w[0, 0] = 1e6  # saturates in fp8
    bias = rng.normal(0, 1, 20).astype(np.float32)
    x = rng.normal(0, 30, (9, 75)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["h"], "linear"), helper.make_node("Add", ["h", "b"], ["y"])],
        "unscaled",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", 75])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", 20])],
        [numpy_helper.from_array(w, "w"), numpy_helper.from_array(bias, "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    worst = 0.0
    formats = {"bfp16": "bf16", "nvfp8-emu-e4m3": "fp8_e4m3", "nvfp8-emu-e5m2": "fp8_e5m2"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(model, path)
        for lowering, fmt in formats.items():
            got = run(rewrite(path, lowering, folder, "--all-linears"), {"x": x})
            a, b = (emu.round_element(v.astype(np.float64), fmt, "even") for v in (x, w))
            bound = 1e-5 * (np.abs(a) @ np.abs(b) + np.abs(bias))
            error = float((np.abs(got - (a @ b + bias)) / bound).max())
            assert error <= 1, f"{lowering}: {error:.3g} of the bound"
            worst = max(worst, error)
    return f"{len(formats)} lowerings, worst {worst:.3f} of the bound"


def nvfp8(model: Path) -> str:
    """One scale a tensor for both operands: biased layers against float64, then a model's logits."""
    rng = np.random.default_rng(6)
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for n, k in ((20, 75), (64, 128), (3, 32)):
            w = rng.normal(0, 1, (k, n)).astype(np.float32)
            w[0, 0] = -9.5
            bias = rng.normal(0, 1, n).astype(np.float32)
            x = rng.normal(0, 3, (2, 5, k)).astype(np.float32)
            x[0, 1, 2] = 40
            graph = helper.make_graph(
                [helper.make_node("MatMul", ["x", "w"], ["h"], "linear"), helper.make_node("Add", ["h", "b"], ["y"])],
                "nvfp8",
                [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", "m", k])],
                [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", "m", n])],
                [numpy_helper.from_array(w, "w"), numpy_helper.from_array(bias, "b")],
            )
            path = Path(folder) / f"layer{n}.onnx"
            onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
            got = run(rewrite(path, "nvfp8", folder, "--all-linears", "--force"), {"x": x})

            def scaled(v: np.ndarray) -> np.ndarray:
                scale = np.float32(np.abs(v).max() / np.float32(448))
                return emu.round_element((v / scale).astype(np.float64), "fp8_e4m3", "even") * np.float64(scale)

            a, b = scaled(x), scaled(w)
            bound = 1e-5 * (np.abs(a) @ np.abs(b) + np.abs(bias))
            error = float((np.abs(got - (a @ b + bias)) / bound).max())
            assert error <= 1, f"{n} x {k}: {error:.3g} of the bound"
            assert (np.abs(got - (x @ w + bias)) > bound).any(), "nothing is rounded: the check is void"
            worst = max(worst, error)
        if model.suffix != ".onnx":
            return f"worst {worst:.3f} of the bound"
        want = run(model)
        got = run(rewrite(model, "nvfp8", folder, "--all-linears", "--force"))
        spread = float(np.abs(got - want).max() / np.ptp(want))
        assert 1e-5 < spread < 0.2, f"{spread:.3g} of the range of the logits"
    return f"worst {worst:.3f} of the bound, logits within {spread:.2e} of their range"


if __name__ == "__main__":
    areas = {"int8": int8, "bf16": bf16, "fp16": fp16, "unscaled": unscaled, "nvfp8": nvfp8}
    for name in sys.argv[2:]:
        print(f"{sys.argv[1]} {name}: {areas[sys.argv[1]](Path(name))}")
