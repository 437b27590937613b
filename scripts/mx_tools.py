"""What the check scripts share: finding the built artifacts, calling mxrewrite, opening sessions.

Only NumPy, onnx and onnxruntime are needed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

ROOT = Path(__file__).resolve().parent.parent


class RewriteFailed(RuntimeError):
    """mxrewrite ended with a status other than 0; the text is its standard error."""


def add_arguments(p: argparse.ArgumentParser) -> None:
    target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    p.add_argument("--mxrewrite", type=Path, default=target / "release/mxrewrite", help="the command to judge")
    p.add_argument("--library", type=Path, default=target / "release/libmx_custom_ops.so", help="the custom-op library to judge")


def rewrite(args, model: Path, out: Path | None, *flags: str) -> dict | None:
    """Runs mxrewrite; with out None runs `--plan --json` and returns the plan."""
    command = [str(args.mxrewrite), str(model), *flags]
    command += ["--plan", "--json"] if out is None else ["-o", str(out), "--force"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        raise RewriteFailed(f"exit {done.returncode}: {' '.join(command)}\n{done.stderr.strip()[:600]}")
    return json.loads(done.stdout) if out is None else None


def session(model: Path | bytes, library: Path | None, threads: int = 1, optimize: bool = True) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if library is not None:
        options.register_custom_ops_library(str(library))
    source = model if isinstance(model, bytes) else str(model)
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def attributes(node: onnx.NodeProto) -> dict:
    out = {}
    for a in node.attribute:
        v = onnx.helper.get_attribute_value(a)
        out[a.name] = v.decode() if isinstance(v, bytes) else v
    return out


def to_float32(x: np.ndarray) -> np.ndarray:
    return np.asarray(x).astype(np.float32)


def graphs(graph: onnx.GraphProto):
    """The graph and every subgraph of it."""
    yield graph
    for node in graph.node:
        for a in node.attribute:
            for g in [a.g] if a.type == onnx.AttributeProto.GRAPH else a.graphs:
                yield from graphs(g)
