"""Judges `mxrewrite --lower qdq` (standard operators) by the NumPy emulation, for check_zoo.py.

onnx's reference evaluator runs the rewritten file; ONNX Runtime 1.31 loads none. Per site, the nodes from X
to Y are cut out of the file and run on X as the original model makes it (random numbers where ONNX Runtime
cannot run the original); end to end, the whole file against the original graph with fake quantised operands.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

import mx_emulation as emu
import mx_tools as tools

ELEMENT = {
    "fp8_e4m3": TensorProto.FLOAT8E4M3FN,
    "fp8_e5m2": TensorProto.FLOAT8E5M2,
    "fp6_e3m2": TensorProto.FLOAT6E3M2,
    "fp6_e2m3": TensorProto.FLOAT6E2M3,
    "fp4_e2m1": TensorProto.FLOAT4E2M1,
}


@dataclass
class Site:
    """A replaced linear: its node, the value X that is quantised, and how."""

    node: onnx.NodeProto
    x: str
    weight: emu.Spec
    activation: emu.Spec | None
    codes: onnx.TensorProto
    scales: onnx.TensorProto


def plan(model: onnx.ModelProto) -> dict:
    return json.loads({p.key: p.value for p in model.metadata_props}["mx.plan"])


def sites(model: onnx.ModelProto) -> list[Site]:
    """From the plan in the metadata and the nodes that feed each planned node."""
    producer = {o: n for n in model.graph.node for o in n.output}
    inits = {t.name: t for t in model.graph.initializer}
    nodes = {n.name: n for n in model.graph.node}
    recipe = plan(model)["recipe"]["rules"]
    out = []
    for planned in plan(model)["sites"]:
        if planned["node"] not in nodes:
            continue  # of the other branch
        node = nodes[planned["node"]]
        rule = next(r for r in recipe if r["weight_format"] == planned["weight_format"])
        spec = lambda fmt: emu.Spec(fmt, planned["block_size"], rule["rounding"], rule["scale_rule"])  # noqa: E731
        act = spec(planned["activation_format"]) if planned["activation_format"] != "none" else None
        source = producer[node.input[1]]
        if source.op_type == "Transpose":
            source = producer[source.input[0]]
        x = node.input[0]
        if act:
            x = producer[producer[x].input[0]].input[0]
        # The Cast of a half-precision X.
        maker = producer.get(x)
        if maker is not None and ".qdq_fp32" in x:
            x = maker.input[0]
        out.append(Site(node, x, spec(planned["weight_format"]), act, inits[source.input[0]], inits[source.input[1]]))
    return out


def check_bytes(found: list[Site], original, asked: str) -> list[str]:
    wrong = []
    for site in found:
        name, fmt = site.node.name, site.weight.format
        if name not in original.nodes:
            wrong.append(f"{name}: no such node in the original")
            continue
        w = original.linear(original.nodes[name])[0].T
        if fmt != asked or site.codes.data_type != ELEMENT[fmt] or tuple(site.codes.dims) != w.shape:
            wrong.append(f"{name}: {fmt} codes of type {site.codes.data_type}, {list(site.codes.dims)}; the weight is {w.shape}, asked {asked}")
            continue
        q, s = emu.quantize(w, site.weight)
        q = np.where(np.isnan(q), 0.0, q).reshape(len(w), -1)[:, : w.shape[1]]
        bits = emu.ELEMENTS[fmt].bits
        if len(site.codes.raw_data) != -(-w.size * bits // 8):
            wrong.append(f"{name}: {len(site.codes.raw_data)} bytes of codes")
        codes = numpy_helper.to_array(site.codes).astype(np.float64)
        scales = numpy_helper.to_array(site.scales).view(np.uint8)
        for what, got, want in (("codes", codes, q), ("scales", scales, s)):
            if got.shape != want.shape or (got != want).any():
                wrong.append(f"{name}: {what} differ")
    return wrong


def check_validity(rewritten: onnx.ModelProto, original: onnx.ModelProto) -> list[str]:
    """onnx's checker and shape inference, where they accept the original."""
    try:
        onnx.checker.check_model(original, full_check=True)
    except Exception:  # operators of ONNX Runtime's own
        return []
    try:
        onnx.checker.check_model(rewritten, full_check=True)
    except Exception as e:
        return [f"onnx.checker: {str(e)[:400]}"]
    return []


def cut(model: onnx.ModelProto, site: Site, data_type: int) -> onnx.ModelProto:
    """The nodes between a site's X, of a type, and its Y."""
    producer = {o: i for i, n in enumerate(model.graph.node) for o in n.output}
    wanted, pending = set(), [site.node.output[0]]
    while pending:
        value = pending.pop()
        index = producer.get(value)
        if value == site.x or index is None or index in wanted:
            continue
        wanted.add(index)
        pending += model.graph.node[index].input
    nodes = [model.graph.node[i] for i in sorted(wanted)]
    used = {i for n in nodes for i in n.input}
    graph = helper.make_graph(
        nodes,
        "site",
        [onnx.ValueInfoProto(name=site.x, type=helper.make_tensor_type_proto(data_type, None))],
        [onnx.ValueInfoProto(name=site.node.output[0], type=helper.make_tensor_type_proto(TensorProto.FLOAT, None))],
        [t for t in model.graph.initializer if t.name in used],
    )
    return helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)


def values_of_x(original: onnx.ModelProto, found: list[Site], feeds: dict, rng) -> dict[str, np.ndarray]:
    """X of every site as ONNX Runtime computes it in the original; empty where it cannot."""
    copy = onnx.ModelProto()
    copy.CopyFrom(original)
    names = list(dict.fromkeys(s.x for s in found))
    have = {o.name for o in copy.graph.output}
    copy.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names if n not in have)
    try:
        return dict(zip(names, tools.session(copy.SerializeToString(), None).run(names, feeds)))
    except Exception:  # bfloat16 on the CPU
        return {}


def check_sites(rewritten: onnx.ModelProto, found: list[Site], original, feeds: dict, rng) -> tuple[list[str], float, str]:
    wrong, worst = [], 0.0
    known = values_of_x(original.model, found, feeds, rng)
    for site in found:
        b, alpha, beta, c = original.linear(original.nodes[site.node.name])
        x = known.get(site.x)
        if x is None:
            declared = {v.name: v.type.tensor_type.elem_type for v in original.model.graph.value_info}
            dtype = helper.tensor_dtype_to_np_dtype(declared.get(site.x, original_type(original)))
            x = rng.standard_normal((3, 5, b.shape[0])[-2 if site.node.op_type == "Gemm" else -3 :]).astype(dtype)
        data_type = helper.np_dtype_to_tensor_dtype(x.dtype)
        y = ReferenceEvaluator(cut(rewritten, site, data_type)).run(None, {site.x: x})[0]
        x = tools.to_float32(x)
        xq = emu.fake_quantize(x, site.activation) if site.activation else x.astype(np.float64)
        wq = emu.fake_quantize(b.T, site.weight)
        bias = None if c is None or beta == 0 else c.astype(np.float64)
        exact = alpha * (xq @ wq.T) + (0.0 if bias is None else beta * bias)
        room = 1e-5 * abs(alpha) * (np.abs(xq) @ np.abs(wq).T)
        if bias is not None:
            room = room + np.abs(exact) * 2.0**-23
        with np.errstate(all="ignore"):
            same = (y == exact) | (np.isnan(y) & np.isnan(exact))
            ratio = np.where(same, 0.0, np.nan_to_num(np.abs(y - exact) / room, nan=np.inf)).max()
        worst = max(worst, float(ratio))
        if y.shape != exact.shape or y.dtype != np.float32 or ratio > 1:
            wrong.append(f"{site.node.name}: {y.dtype}, |Y - emulated| is {ratio:.3g} times the bound")
    return wrong, worst, "" if known else " (random X)"


def original_type(original) -> int:
    kinds = [t.data_type for t in original.model.graph.initializer if len(t.dims) == 2]
    return max(set(kinds), key=kinds.count)


def check_end_to_end(rewritten: onnx.ModelProto, found: list[Site], emulated: onnx.ModelProto, fake, feeds: dict) -> tuple[list[str], str]:
    """The file by the reference evaluator against the emulated original by the same."""
    first = emulated.graph.output[0].name
    copy = onnx.ModelProto()
    copy.CopyFrom(rewritten)
    names = list(dict.fromkeys([first, *(s.x for s in found)]))
    have = {o.name for o in copy.graph.output}
    copy.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names if n not in have)
    got = dict(zip(names, ReferenceEvaluator(copy).run(names, feeds)))
    want = ReferenceEvaluator(emulated, new_ops=[fake]).run([first], feeds)[0].astype(np.float64)
    off = float(np.abs(got[first] - want).max() / np.ptp(want))
    codes = 0
    for site in (s for s in found if s.activation):
        a, b = emu.quantize(got[site.x], site.activation), fake.seen[site.node.name]
        codes += sum(int((p != q).sum()) for p, q in zip(a, b))
    note = f"end to end {off:.2e} of range" + (f", {codes} activation codes differ" if codes else "")
    bad = not np.isfinite(off) or (off > 1e-4 and not codes)
    return ([f"end to end: off by {off:.2e} of the logits' range and no code differs"] if bad else []), note
