"""`mxrewrite --lower qdq` on small layers, by onnx's reference evaluator against the NumPy emulation.

    MX_REWRITE=target/debug/mxrewrite python tests/python/test_qdq.py FORMAT...

For each format: MatMul and Gemm (transposed operands, alpha, beta, C), float32 and float16, whole and cut
blocks, every scale rule and block size, weight-only; X and W with blocks of zeros, NaN, Inf, subnormals and
the numbers at which an exponent changes. Quantised activations are the emulation's exactly, Y is within
1e-5 * sum |x w|. Run by tests/it/lowerings.rs. Exit code 0 means that every check passed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import mx_emulation as emu
import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

REWRITE = os.environ["MX_REWRITE"]


@dataclass
class Layer:
    """One linear layer; X is [m, k] or, under transA, [k, m]."""

    k: int = 64
    n: int = 6
    op: str = "MatMul"
    dtype: type = np.float32
    attributes: dict = field(default_factory=dict)
    bias: bool = False
    block: int = 32
    rule: str = "floor"
    weight_only: bool = False


CASES = (
    *(Layer(rule=rule) for rule in emu.SCALE_RULES),
    *(Layer(k=300, block=block) for block in emu.BLOCK_SIZES),
    Layer(k=77),
    Layer(k=5, rule="rceil"),
    Layer(k=77, weight_only=True),
    Layer(k=77, op="Gemm", bias=True, attributes={"alpha": 0.75, "beta": -2.0}),
    Layer(k=77, op="Gemm", bias=True, attributes={"transA": 1, "transB": 1, "alpha": 3.0}),
    Layer(op="Gemm", attributes={"transA": 1}, weight_only=True),
    Layer(k=77, dtype=np.float16),
    Layer(op="Gemm", bias=True, dtype=np.float16, attributes={"transB": 1, "beta": 0.5}),
    Layer(k=77, dtype=np.float16, weight_only=True),
)


def values(rng: np.random.Generator, rows: int, k: int, fmt: str, dtype: type) -> np.ndarray:
    """Rows of ordinary numbers, and rows that hold what is special."""
    x = rng.standard_normal((rows, k)).astype(dtype)
    x[0] = 0
    x[1, : k // 2] = 0
    x[2, -1] = np.nan
    x[3, 0] = np.inf
    x[4] *= dtype(1e-7 if dtype is np.float16 else 1e-40)
    if dtype is np.float32:
        # The last number below the exponent that E8M0 clamps to, and its neighbours.
        edge = np.float32((2 - 2.0**-23) * 2.0 ** (emu.ELEMENTS[fmt].emax - 127))
        x[5] = 0
        x[5, 0] = edge
        x[6] = 0
        x[6, -1] = np.nextafter(edge, np.float32(1))
        # In each binade the thresholds of the scale rules.
        x[7] = 0
        x[7, ::32] = np.resize(np.float32([1.75, 1.5, 1.9375, 1.875, -1.96875, 1.0]), x[7, ::32].shape)
    return x


def model(case: Layer, w: np.ndarray, bias: np.ndarray) -> onnx.ModelProto:
    kind = TensorProto.FLOAT16 if case.dtype is np.float16 else TensorProto.FLOAT
    inits = [numpy_helper.from_array(np.ascontiguousarray(w if case.attributes.get("transB") else w.T), "w")]
    inputs = ["x", "w"]
    if case.bias:
        inits.append(numpy_helper.from_array(bias, "c"))
        inputs.append("c")
    node = helper.make_node(case.op, inputs, ["y"], "linear", **case.attributes)
    shape = [case.k, "m"] if case.attributes.get("transA") else ["m", case.k]
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("y", kind, ["m", case.n])],
        inits,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def rewrite(folder: str, source: onnx.ModelProto, case: Layer, fmt: str) -> tuple[onnx.ModelProto, dict]:
    path, out = Path(folder) / "in.onnx", Path(folder) / "out.onnx"
    onnx.save(source, path)
    flags = ["--all-linears", "--lower", "qdq", "--format", fmt, "--block-size", str(case.block), "--scale-rule", case.rule]
    flags += ["--activation-format", "none"] if case.weight_only else []
    done = subprocess.run([REWRITE, path, "-o", out, "--force", "--json", *flags], check=True, capture_output=True, text=True)
    report = json.loads(done.stdout)
    assert report["lowering"] == "qdq" and len(report["notes"]) == 1, report["notes"]
    assert "does not load" in report["notes"][0] and report["notes"][0] in done.stderr, done.stderr
    rewritten = onnx.load(out)
    onnx.checker.check_model(rewritten, full_check=True)
    return rewritten, report


def run(rewritten: onnx.ModelProto, x: np.ndarray, weight_only: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """Y and, unless weight-only, the layer's quantised X."""
    linear = next(n for n in rewritten.graph.node if n.name == "linear")
    names = ["y"] if weight_only else ["y", linear.input[0]]
    rewritten.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names[1:])
    got = ReferenceEvaluator(rewritten).run(names, {"x": x})
    return got[0], None if weight_only else got[1]


def check(folder: str, case: Layer, fmt: str, rng: np.random.Generator) -> float:
    x, w = values(rng, 12, case.k, fmt, case.dtype), values(rng, case.n + 8, case.k, fmt, case.dtype)
    case = Layer(**{**case.__dict__, "n": len(w)})
    bias = rng.standard_normal(case.n).astype(case.dtype)
    rewritten, _ = rewrite(folder, model(case, w, bias), case, fmt)
    y, rounded = run(rewritten, x.T.copy() if case.attributes.get("transA") else x, case.weight_only)
    spec = emu.Spec(fmt, case.block, "even", case.rule)
    xq = x.astype(np.float64) if case.weight_only else emu.fake_quantize(x, spec)
    if rounded is not None:
        assert rounded.dtype == np.float32 and np.array_equal(rounded, xq, equal_nan=True), f"{fmt} {case}: X differs"
    wq = emu.fake_quantize(w, spec)
    alpha, beta = case.attributes.get("alpha", 1.0), case.attributes.get("beta", 1.0)
    exact = alpha * (xq @ wq.T) + (beta * bias.astype(np.float64) if case.bias else 0)
    room = 1e-5 * abs(alpha) * (np.abs(xq) @ np.abs(wq).T) + np.abs(exact) * 2.0**-23 + 2.0**-149
    if case.dtype is np.float16:
        exact = np.where(np.abs(exact) > 65519, np.copysign(np.inf, exact), exact)
        room = room + np.abs(exact) * 2.0**-11 + 2.0**-24
    assert y.dtype == case.dtype and y.shape == exact.shape, f"{fmt} {case}: {y.dtype} {y.shape}"
    same = (y == exact) | (np.isnan(y) & np.isnan(exact))
    ratio = np.where(same, 0.0, np.nan_to_num(np.abs(y - exact) / room, nan=np.inf)).max()
    assert ratio <= 1, f"{fmt} {case}: {ratio:.3g} times the bound"
    # NaN of X takes its row, that of W its column, and nothing else is NaN.
    bad = ~np.isfinite(exact)
    assert bad.any() and not bad.all(), f"{fmt} {case}: the check of NaN is void"
    return float(ratio)


def check_note(folder: str) -> None:
    """What the note says of ONNX Runtime 1.31 is so."""
    if not ort.__version__.startswith("1.31."):
        return
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        ort.InferenceSession(str(Path(folder) / "out.onnx"), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        assert "NOT_IMPLEMENTED" in str(error) or "Unsupported model IR version" in str(error), error
    else:
        raise AssertionError("ONNX Runtime loads the file: the note is wrong")


if __name__ == "__main__":
    np.seterr(all="ignore")
    for name in sys.argv[1:]:
        if name.startswith("fp6") and onnx.defs.onnx_opset_version() < 28:
            print(f"qdq {name}: skipped, onnx {onnx.__version__} knows no FLOAT6 (opset 28)")
            continue
        with tempfile.TemporaryDirectory() as folder:
            worst = max(check(folder, case, name, np.random.default_rng(i)) for i, case in enumerate(CASES))
            check_note(folder)
        print(f"qdq {name}: {len(CASES)} layers, worst {worst:.3f} of the bound")
