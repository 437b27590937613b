#!/usr/bin/env python3
"""Golden MX vectors through mxrewrite and the MxMatMul operator, bit for bit (from Python).

For every vector `<format>.<rounding>.b<block>.<case>` of a golden safetensors file, and for more cases of
the same kinds whose answer is `mx_emulation.py`'s:

* weight side: MatMul with weight = the input's transpose [K, R], rewritten with `--activation-format none`,
  run with X = identity [K, K]: the output is the quantised weight, transposed;
* activation side: MatMul with an identity weight [K, K] (exact in every format), run with X = the input:
  the output is the quantised activation.

-0 == 0 and NaN == NaN; results below 2^-126 may be flushed to zero. The cases of one (format, rounding,
block size) share one model and one session.

    python3 scripts/check_golden.py fixtures/golden/*.safetensors [--mxrewrite BIN] [--library SO]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import mx_emulation as emu
import mx_tools as tools


def build(cases: list[tuple[str, np.ndarray]], side: str) -> bytes:
    """One MatMul per case: X_<i> [M, K] @ weight_<i> [K, N] -> y_<i>."""
    nodes, inputs, outputs, weights = [], [], [], []
    for i, (_, x) in enumerate(cases):
        k = x.shape[1]
        w = np.ascontiguousarray(x.T) if side == "weight" else np.eye(k, dtype=np.float32)
        weights.append(numpy_helper.from_array(w, f"weight_{i}"))
        inputs.append(helper.make_tensor_value_info(f"x_{i}", TensorProto.FLOAT, ["m", k]))
        outputs.append(helper.make_tensor_value_info(f"y_{i}", TensorProto.FLOAT, ["m", w.shape[1]]))
        nodes.append(helper.make_node("MatMul", [f"x_{i}", f"weight_{i}"], [f"y_{i}"], name=f"case_{i}"))
    graph = helper.make_graph(nodes, "golden", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    return model.SerializeToString()


def build_direct(cases: list[tuple[str, np.ndarray]], side: str, spec: emu.Spec) -> bytes:
    """The same products as MxMatMul nodes packed by the emulation: judges the operator without mxrewrite."""
    model = onnx.load_model_from_string(build(cases, side))
    weights = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    del model.graph.initializer[:]
    for i, node in enumerate(model.graph.node):
        w = weights[node.input[1]].T
        codes, scales = emu.packed(w, spec)
        model.graph.initializer.extend([numpy_helper.from_array(codes, f"codes_{i}"), numpy_helper.from_array(scales, f"scales_{i}")])
        node.CopyFrom(helper.make_node(
            "MxMatMul", [f"x_{i}", f"codes_{i}", f"scales_{i}"], list(node.output), name=node.name, domain="mx",
            k=w.shape[1], n=w.shape[0], weight_format=spec.format, activation_format="none" if side == "weight" else spec.format,
            block_size=spec.block_size, scale=spec.scale, rounding=spec.rounding, scale_rule=spec.scale_rule,
            alpha=1.0, beta=1.0, layout=1))
    model.opset_import.append(helper.make_opsetid("mx", 1))
    return model.SerializeToString()


def expected_product(side: str, x: np.ndarray, q: np.ndarray) -> np.ndarray:
    """What Y must be when q [R, K] is the quantised input: q, or NaN wherever 0 * NaN enters the sum."""
    nan_rows = np.isnan(q).any(axis=1)
    y = np.where(nan_rows[:, None], np.nan, q)
    return y.T if side == "weight" else y


def flags(spec: emu.Spec, side: str) -> list[str]:
    out = ["--all-linears", "--rounding", spec.rounding, "--block-size", str(spec.block_size), "--scale-rule", spec.scale_rule]
    out += ["--format", spec.format]
    return out + (["--activation-format", "none"] if side == "weight" else [])


def check_group(args, spec: emu.Spec, side: str, cases: list, folder: Path) -> list[str]:
    """cases: (name, x [R, K], expected quantised [R, K]); returns what is wrong, in words."""
    source, out = folder / "in.onnx", folder / "out.onnx"
    inputs = [(n, x) for n, x, _ in cases]
    try:
        if args.direct:
            out.write_bytes(build_direct(inputs, side, spec))
        else:
            source.write_bytes(build(inputs, side))
            tools.rewrite(args, source, out, *flags(spec, side))
    except tools.RewriteFailed as e:
        return [f"{n} {side}: {e}" for n, _, _ in cases]
    replaced = {n.name for n in onnx.load(out).graph.node if n.op_type == "MxMatMul" and n.domain == "mx"}
    run = tools.session(out, args.library)
    feeds = {f"x_{i}": np.eye(x.shape[1], dtype=np.float32) if side == "weight" else x for i, (_, x, _) in enumerate(cases)}
    results = run.run([f"y_{i}" for i in range(len(cases))], feeds)
    wrong = []
    for i, ((name, x, q), y) in enumerate(zip(cases, results)):
        if f"case_{i}" not in replaced:
            wrong.append(f"{name} {side}: the node was not replaced")
            continue
        expect = expected_product(side, x, q)
        bad = ~emu.same(y, expect.astype(np.float32), flush=True)
        if y.shape != expect.shape or bad.any():
            at = tuple(np.argwhere(bad)[0])
            src = x.T[at] if side == "weight" else x[at]
            wrong.append(f"{name} {side}: {int(bad.sum())} of {bad.size} differ, first at {tuple(map(int, at))}: "
                         f"{float(src)!r} -> {float(y[at])!r}, expected {float(expect[at])!r}")
    return wrong


def extra_cases(rng: np.random.Generator):
    """More inputs of the golden kinds, and rows that hold NaN and Inf."""
    x = rng.standard_normal((6, 96)).astype(np.float32)
    heavy = (rng.standard_normal((6, 77)) * np.exp(2.5 * rng.standard_normal((6, 77)))).astype(np.float32)
    scaled = (rng.standard_normal((8, 300)) * np.exp2(rng.integers(-149, 121, (8, 300)))).astype(np.float32)
    pow2 = np.exp2(rng.integers(-140, 120, (4, 64))).astype(np.float32)
    edges = np.stack([np.nextafter(pow2, np.float32(np.inf)), np.nextafter(pow2, np.float32(0))]).reshape(8, 64)
    broken = x.copy()
    broken[1, 40], broken[3, 95], broken[4, 0] = np.nan, np.inf, -np.inf
    return [("normal", x), ("heavy", heavy), ("scaled", scaled), ("pow2", pow2), ("edges", edges), ("nan_inf", broken), ("k1", x[:, :1].copy())]


def extra_groups():
    """Every scale rule, the block sizes that the golden file lacks, and mxint8."""
    cases = extra_cases(np.random.default_rng(11))
    specs = [emu.Spec(f, 32, r, s) for f in (*emu.MX_FORMATS, "mxint8") for r in emu.ROUNDINGS for s in emu.SCALE_RULES]
    specs += [emu.Spec(f, b) for f in (*emu.MX_FORMATS, "mxint8") for b in (16, 64, 128, 256)]
    for spec in specs:
        with np.errstate(all="ignore"):
            group = [(f"extra {spec.format}.{spec.rounding}.{spec.scale_rule}.b{spec.block_size}.{n}", x, emu.fake_quantize(x, spec).astype(np.float32)) for n, x in cases]
        yield spec, group


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("golden", nargs="+", type=Path)
    p.add_argument("--no-extra", action="store_true", help="only the vectors of the files")
    p.add_argument("--direct", action="store_true", help="pack by the emulation, not by mxrewrite: judges the operator alone")
    tools.add_arguments(p)
    args = p.parse_args()
    groups = defaultdict(list)
    for path in args.golden:
        for key, x, expect, spec in emu.golden_cases(path):
            groups[spec].append((key, x.copy(), expect))
    work = [("golden", spec, cases) for spec, cases in groups.items()]
    if not args.no_extra:
        work += [("extra", spec, cases) for spec, cases in extra_groups()]
    start, count, wrong = time.time(), defaultdict(int), []
    with tempfile.TemporaryDirectory() as folder:
        for kind, spec, cases in work:
            for side in ("weight", "activation"):
                bad = check_group(args, spec, side, cases, Path(folder))
                count[kind, side, "all"] += len(cases)
                count[kind, side, "ok"] += len(cases) - len(bad)
                wrong += bad
    for line in wrong[:40]:
        print(line)
    for kind in ("golden",) if args.no_extra else ("golden", "extra"):
        for side in ("weight", "activation"):
            print(f"{kind} {side} side: {count[kind, side, 'ok']} of {count[kind, side, 'all']} bit-exact")
    print(f"{time.time() - start:.1f} s")
    return 1 if wrong or not groups else 0


if __name__ == "__main__":
    sys.exit(main())
