"""Exported models on ONNX Runtime's CUDA provider, judged layer by layer as scripts/check_zoo.py does on the CPU. Needs a GPU.

    MX_REWRITE=.gpu/bin/mxrewrite MX_CUSTOM_OPS=.gpu/bin/libmx_custom_ops.so python tests/python/gpu_zoo.py MODEL.onnx ...
        [--formats fp8_e4m3,fp4_e2m1]

For graphs in bfloat16, which the CPU provider cannot run: X and Y of every MxMatMul leave the graph through a Cast to float32, because
Python has no bfloat16; |Y - emulated| <= 1e-5 * sum |x w| and the rounding of Y. ONNX Runtime's profile says that all of them ran on the
CUDA provider. Exit code 0 means that every check passed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import check_zoo
import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper


def widened(model: onnx.ModelProto, names: list[str]) -> bytes:
    for name in names:
        model.graph.node.append(helper.make_node("Cast", [name], [f"{name}.widened"], to=TensorProto.FLOAT))
        model.graph.output.append(onnx.ValueInfoProto(name=f"{name}.widened"))
    return model.SerializeToString()


def check(path: Path, asked: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.onnx"
        command = [os.environ["MX_REWRITE"], path, "-o", out, "--all-linears", "--include", "lm_head", "--format", asked]
        subprocess.run(command, check=True, capture_output=True)
        source, rewritten = onnx.load(path), onnx.load(out)
    original = check_zoo.Original(source)
    nodes = check_zoo.mx_nodes(rewritten)
    wrong = check_zoo.check_bytes(rewritten, original, asked)
    names = list(dict.fromkeys(v for n in nodes for v in (n.input[0], n.output[0])))
    options = ort.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(Path(tempfile.gettempdir()) / "gpu_zoo")
    options.log_severity_level = 3
    options.register_custom_ops_library(os.environ["MX_CUSTOM_OPS"])
    session = ort.InferenceSession(widened(rewritten, names), options, providers=["CUDAExecutionProvider", "CPUExecutionProvider"])
    feeds = check_zoo.feeds_for(source, np.random.default_rng(7))
    values = session.run([f"{name}.widened" for name in names], feeds)
    events = json.loads(Path(session.end_profiling()).read_text())
    ran = [e["args"]["provider"] for e in events if e.get("args", {}).get("op_name") == "MxMatMul" and e["name"].endswith("_kernel_time")]
    assert ran.count("CUDAExecutionProvider") == len(ran) == len(nodes), f"{len(nodes)} MX nodes, which ran on {ran}"
    half = source.graph.output[0].type.tensor_type.elem_type != TensorProto.FLOAT
    more, worst, _ = check_zoo.check_sites(rewritten, original, dict(zip(names, values)), half)
    assert nodes and not wrong + more, "\n".join(wrong + more)
    return f"{asked}: {len(nodes)} layers, worst {worst:.3f} of the bound"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--formats", default="fp8_e4m3,fp8_e5m2,fp6_e3m2,fp6_e2m3,fp4_e2m1")
    args = parser.parse_args()
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        sys.exit("this onnxruntime has no CUDA provider")
    for path in args.models:
        print(f"ok {path}: {'; '.join(check(path, asked) for asked in args.formats.split(','))}", flush=True)


if __name__ == "__main__":
    main()
