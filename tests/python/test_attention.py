"""What `mxrewrite --attention` makes of attention's products, in stock onnxruntime, against NumPy.

    MX_REWRITE=target/debug/mxrewrite MX_CUSTOM_OPS=target/debug/libmx_custom_ops.so python tests/python/test_attention.py MODEL...

Per product and format: A, B and Y of every MxActMatMul are exposed as outputs; |Y - emulated| <= 1e-5 * sum |a b| for each element, the
product in float64. Run by tests/it/lowerings.rs. Exit code 0 means that every check passed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import check_zoo
import mx_emulation as emu
import mx_tools as tools
import numpy as np
import onnx

REWRITE = os.environ["MX_REWRITE"]
LIBRARY = Path(os.environ["MX_CUSTOM_OPS"])


def products(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [n for n in model.graph.node if n.op_type == "MxActMatMul" and n.domain == "mx"]


def check_product(node: onnx.NodeProto, asked: str, values: dict) -> float:
    """The worst deviation of one product, as a multiple of the bound."""
    a = tools.attributes(node)
    assert (a["a_format"], a["b_format"]) == (asked, asked), f"{node.name}: {a}"
    assert any(p.key == "mx.module_path" for p in node.metadata_props), f"{node.name} has no module path"
    spec = emu.Spec(asked, a["block_size"], a["rounding"], a["scale_rule"], a["scale"])
    left, right, y = (values[n] for n in (*node.input, node.output[0]))
    if not a["transpose_b"]:
        right = np.swapaxes(right, -1, -2)
    aq, bq = (emu.fake_quantize(tools.to_float32(v), spec) for v in (left, right))
    bq = np.swapaxes(bq, -1, -2)
    exact = a["alpha"] * (aq @ bq)
    room = 1e-5 * abs(a["alpha"]) * (np.abs(aq) @ np.abs(bq)) + (np.abs(exact) * 2.0**-8 if y.dtype != np.float32 else 0)
    off = np.abs(tools.to_float32(y) - exact)
    return float(np.where(off == 0, 0, off / np.maximum(room, 1e-300)).max())


def check(path: Path, asked: str, flags: list[str], folder: str) -> str:
    out = Path(folder) / "out.onnx"
    command = [REWRITE, path, "-o", out, "--force", "--attention", "--format", asked, "--json", *flags]
    report = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    model = onnx.load(out)
    nodes = products(model)
    planned = report["plan"]["products"]
    assert sorted(p["node"] for p in planned) == sorted(n.name for n in nodes), f"{path}: the plan names other nodes"
    layers = {p["module_path"] for p in planned}
    assert len(nodes) == 2 * len(layers) > 0, f"{path}: {len(nodes)} products in {len(layers)} attention modules"
    assert {p["role"] for p in planned} == {"product"}
    names = list(dict.fromkeys(v for n in nodes for v in (*n.input, n.output[0])))
    session = tools.session(check_zoo.expose(model, names), LIBRARY)
    values = dict(zip(names, session.run(names, check_zoo.feeds_for(model, np.random.default_rng(7)))))
    worst = max(check_product(node, asked, values) for node in nodes)
    assert worst <= 1, f"{path}, {asked}: a product is {worst:.3g} times the bound off"
    return f"{len(nodes)} products, worst {worst:.3f} of the bound"


def recipe_comes_back(path: Path, folder: str) -> None:
    """The plan of a rewritten model makes the same model again."""
    out = Path(folder) / "out.onnx"
    again = Path(folder) / "again.onnx"
    subprocess.run([REWRITE, path, "-o", again, "--force", "--recipe", out], check=True, capture_output=True)
    assert onnx.load(again).graph == onnx.load(out).graph, f"{path}: the recipe of a rewritten model makes another one"


def main() -> None:
    for path in map(Path, sys.argv[1:]):
        notes = []
        with tempfile.TemporaryDirectory() as folder:
            for asked, flags in (("fp8_e4m3", ["--tier-a"]), ("fp6_e2m3", []), ("fp4_e2m1", ["--block-size", "16"])):
                notes.append(f"{asked} {check(path, asked, flags, folder)}")
                recipe_comes_back(path, folder)
        print(f"ok {path}: {'; '.join(notes)}")


if __name__ == "__main__":
    main()
