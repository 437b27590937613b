#!/usr/bin/env python3
"""Exported models through mxrewrite and ONNX Runtime, judged site by site by a NumPy emulation.

For each model folder (a zoo folder with truth.json beside it, or any folder or .onnx file given):

1. plan: `--all-linears`, the same with `--include lm_head`, and `--tier-a` against truth.json, where there
   is one: the node names of every linear but routers and heads, with the heads, only the MLP ones;
2. bytes: per site, codes and scales of the rewritten file equal the emulation's, byte for byte, and take
   N * ceil(K / block) * (block * bits / 8 + 1) bytes;
3. sites: X and Y of every MxMatMul are exposed as outputs; |Y - emulated| <= 1e-5 * sum |x w| per element,
   the product in float64, from the weight, bias, alpha and beta of the original file;
4. end to end: the original graph run by onnx's reference evaluator with both operands of each site fake
   quantised; the outputs agree within 1e-4 of the range of the logits unless an activation code differs
   between the two runs, and then the sites and counts are printed.

A merged decoder (one If) is judged along each of its branches, and the file itself has to give the
logits of the branch that it is told to take.

    python3 scripts/check_zoo.py --zoo DIR [--only REGEX] [--formats fp8_e4m3,fp4_e2m1 | all]
    python3 scripts/check_zoo.py fixtures/tinylm/model-dynamo.onnx ...
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

import check_qdq as qdq
import mx_emulation as emu
import mx_tools as tools

MLP = {"gate_proj", "up_proj", "down_proj", "gate_up_proj", "fc1", "fc2", "w1", "w2", "w3", "c_fc", "dense_h_to_4h", "dense_4h_to_h"}
NUMPY_FLOAT = {onnx.TensorProto.FLOAT: np.float32, onnx.TensorProto.FLOAT16: np.float16}


class FakeQuant(OpRun):
    """The emulation as an operator of the reference evaluator; `seen` keeps each site's codes."""

    op_domain = "mxemu"
    specs: dict[str, emu.Spec] = {}
    seen: dict[str, tuple] = {}

    def _run(self, x, site=None):
        spec = FakeQuant.specs[site]
        q, s = emu.quantize(x, spec)
        FakeQuant.seen[site] = (q, s)
        return (emu.dequantize(q, s, spec, x.shape[-1]).astype(np.float32),)


# ------------------------------------------------------------------------------------------ truth


def role(linear: dict, linears: list[dict]) -> str:
    """head | router | mlp | other, from the checkpoint's parameter name alone."""
    parts = linear["parameter"].split(".")
    if parts[-2] in ("lm_head", "embed_out", "wte", "embed_tokens", "embed_in"):
        return "head"
    if parts[-2] == "gate":
        return "router"
    mlp = set(parts) & MLP or ("c_proj" in parts and "mlp" in parts) or "experts" in parts or any(p.startswith(("gate_up_proj", "down_proj")) for p in parts)
    return "mlp" if mlp else "other"


def expected_nodes(truth: dict, roles: tuple[str, ...]) -> Counter:
    linears = [t for t in truth["linears"] if t["op"] in ("MatMul", "Gemm", "FusedMatMul")]
    return Counter(t["node"] for t in linears if role(t, linears) in roles)


def check_plan(args, model: Path, truth: dict) -> list[str]:
    wrong = []
    for flags, roles in (
        (["--all-linears"], ("mlp", "other")),
        (["--all-linears", "--include", "lm_head"], ("mlp", "other", "head")),
        (["--tier-a"], ("mlp",)),
    ):
        try:
            plan = tools.rewrite(args, model, None, *flags)
        except tools.RewriteFailed as e:
            wrong.append(f"plan {' '.join(flags)}: {e}")
            continue
        want, got = expected_nodes(truth, roles), Counter(s["node"] for s in plan["sites"])
        for label, diff in (("missed", want - got), ("wrongly taken", got - want)):
            if diff:
                wrong.append(f"plan {' '.join(flags)}: {label} {sum(diff.values())}: {sorted(diff)[:6]}")
    return wrong


# ------------------------------------------------------------------------------- the original graph


class Original:
    """The unrewritten model: per linear its operand B [K, N], bias, alpha and beta."""

    def __init__(self, model: onnx.ModelProto):
        self.model = model
        g = self.model.graph
        self.inits = {t.name: t for t in g.initializer}
        self.producer = {o: n for n in g.node for o in n.output}
        self.nodes = {n.name: n for n in g.node}
        self.users: dict[str, list] = {}
        for n in g.node:
            for i in n.input:
                self.users.setdefault(i, []).append(n)

    def constant(self, name: str) -> np.ndarray | None:
        if name in self.inits:
            return tools.to_float32(numpy_helper.to_array(self.inits[name]))
        node = self.producer.get(name)
        if node is None:
            return None
        if node.op_type == "Constant":
            return tools.to_float32(numpy_helper.to_array(tools.attributes(node)["value"]))
        if node.op_type not in ("Transpose", "Identity", "Cast", "Split", "Squeeze"):
            return None
        source, a = self.constant(node.input[0]), tools.attributes(node)
        if source is None or node.op_type in ("Identity", "Cast"):
            return source
        if node.op_type == "Transpose":
            return source.transpose(a.get("perm", list(range(source.ndim))[::-1]))
        if node.op_type == "Squeeze":
            return source.squeeze(tuple(self.integers(node.input[1])))
        axis, part = a.get("axis", 0), list(node.output).index(name)
        sizes = self.integers(node.input[1]) if len(node.input) > 1 else None
        if sizes is None:
            return np.array_split(source, len(node.output), axis)[part]
        return np.split(source, np.cumsum(sizes)[:-1], axis)[part]

    def integers(self, name: str) -> list[int]:
        return [int(i) for i in np.atleast_1d(self.constant(name))]

    def linear(self, node: onnx.NodeProto):
        """(B [K, N] float32, alpha, beta, bias or None)."""
        a, b = tools.attributes(node), self.constant(node.input[1])
        if b is None:
            raise ValueError(f"{node.name}: operand B is not a constant")
        if node.op_type != "Gemm":
            return b, 1.0, 1.0, None
        if a.get("transA", 0):
            raise ValueError(f"{node.name}: transA = 1 is not emulated")
        b = b.T if a.get("transB", 0) else b
        c = self.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        return b, a.get("alpha", 1.0), a.get("beta", 1.0), c

    def added_bias(self, node: onnx.NodeProto) -> np.ndarray | None:
        """The rank-1 constant of the Add that follows."""
        for user in self.users.get(node.output[0], []):
            if user.op_type == "Add":
                for i in user.input:
                    v = self.constant(i)
                    if v is not None and v.ndim == 1:
                        return v
        return None


def branches(model: onnx.ModelProto) -> list[str | None]:
    """The ways through a model: a merged decoder has two, anything else one."""
    return ["then_branch", "else_branch"] if any(n.op_type == "If" for n in model.graph.node) else [None]


def along(model: onnx.ModelProto, branch: str | None) -> onnx.ModelProto:
    """The model with each top-level If replaced by one of its branches."""
    if branch is None:
        return model
    m = onnx.ModelProto()
    m.CopyFrom(model)
    nodes = []
    for node in m.graph.node:
        if node.op_type != "If":
            nodes.append(node)
            continue
        body = tools.attributes(node)[branch]
        nodes += body.node
        m.graph.initializer.extend(body.initializer)
        for inner, outer in zip(body.output, node.output):
            if inner.name != outer:
                nodes.append(helper.make_node("Identity", [inner.name], [outer]))
    del m.graph.node[:]
    m.graph.node.extend(nodes)
    del m.graph.value_info[:]
    return m


def feeds_for(model: onnx.ModelProto, rng: np.random.Generator, batch: int = 2, length: int = 13) -> dict:
    """Random tokens below 256, and whatever else a causal LM's export asks for (empty past)."""
    out = {}
    inits = {t.name for t in model.graph.initializer}
    for v in model.graph.input:
        if v.name in inits:
            continue
        t = v.type.tensor_type
        dims = [d.dim_value for d in t.shape.dim]
        if v.name == "input_ids":
            batch, length = dims[0] or batch, dims[1] or length
    for v in model.graph.input:
        if v.name in inits:
            continue
        t = v.type.tensor_type
        dtype = helper.tensor_dtype_to_np_dtype(t.elem_type)
        dims = [d.dim_value for d in t.shape.dim]
        if v.name == "input_ids":
            out[v.name] = rng.integers(3, 256, (batch, length)).astype(dtype)
        elif v.name == "attention_mask":
            out[v.name] = np.ones((batch, length), dtype)
        elif v.name == "position_ids":
            out[v.name] = np.tile(np.arange(length), (batch, 1)).astype(dtype)
        elif v.name.startswith("past_key_values"):
            # The head size of exports that leave it open is 16 in the zoo.
            out[v.name] = np.zeros((batch, dims[1] or 2, 0, dims[3] or 16), dtype)
        elif v.name == "use_cache_branch":
            out[v.name] = np.zeros([1], bool)
        else:
            raise ValueError(f"no rule for graph input {v.name}")
    return out


# ------------------------------------------------------------------------------------------ sites


def mx_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [n for n in model.graph.node if n.op_type == "MxMatMul" and n.domain == "mx"]


def spec_of(node: onnx.NodeProto, which: str) -> emu.Spec | None:
    a = tools.attributes(node)
    fmt = a["weight_format" if which == "weight" else "activation_format"]
    if fmt == "none":
        return None
    return emu.Spec(fmt, a["block_size"], a["rounding"], a["scale_rule"], a["scale"])


def expose(model: onnx.ModelProto, names: list[str]) -> bytes:
    have = {o.name for o in model.graph.output}
    for name in dict.fromkeys(names):
        if name not in have:
            model.graph.output.append(onnx.ValueInfoProto(name=name))
    return model.SerializeToString()


def check_bytes(rewritten: onnx.ModelProto, original: Original, asked: str) -> list[str]:
    inits = {t.name: t for t in rewritten.graph.initializer}
    wrong = []
    for node in mx_nodes(rewritten):
        source = original.nodes.get(node.name)
        if source is None:
            wrong.append(f"{node.name}: no such node in the original")
            continue
        w = original.linear(source)[0].T
        spec, a = spec_of(node, "weight"), tools.attributes(node)
        if (a["n"], a["k"]) != w.shape or spec.format != asked:
            wrong.append(f"{node.name}: n, k, format {a['n']}, {a['k']}, {spec.format}; the original is {w.shape}, asked {asked}")
            continue
        codes, scales = emu.packed(w, spec)
        for what, name, want in (("codes", node.input[1], codes), ("scales", node.input[2], scales)):
            got = numpy_helper.to_array(inits[name])
            if got.shape != want.shape:
                wrong.append(f"{node.name}: {what} have shape {got.shape}, expected {want.shape}")
            elif (got != want).any():
                wrong.append(f"{node.name}: {int((got != want).sum())} of {want.size} bytes of {what} differ")
    return wrong


def check_sites(rewritten: onnx.ModelProto, original: Original, values: dict, half: bool = False) -> tuple[list[str], float, dict]:
    """Per site |Y - emulated| against 1e-5 * sum |x w|; returns wrong, worst ratio, X by site. `half`: values were rounded to 16 bits."""
    wrong, worst, xs = [], 0.0, {}
    for node in mx_nodes(rewritten):
        source = original.nodes[node.name]
        b, alpha, beta, c = original.linear(source)
        x, y = (tools.to_float32(values[n]) for n in (node.input[0], node.output[0]))
        absorbed = len(node.input) > 3 and node.input[3] != ""
        bias = c if source.op_type == "Gemm" else (original.added_bias(source) if absorbed else None)
        if absorbed and bias is None:
            wrong.append(f"{node.name}: carries a bias that the original does not have")
            continue
        act = spec_of(node, "activation")
        xq = emu.fake_quantize(x, act) if act else x.astype(np.float64)
        wq = emu.fake_quantize(b.T, spec_of(node, "weight"))
        exact = alpha * (xq @ wq.T) + (beta * bias.astype(np.float64) if bias is not None else 0.0)
        room = 1e-5 * abs(alpha) * (np.abs(xq) @ np.abs(wq).T)
        if half or values[node.output[0]].dtype != np.float32:
            room = room + np.abs(exact) * 2.0**-8  # the cast to the graph's 16-bit type
        elif bias is not None:
            room = room + np.abs(exact) * 2.0**-23  # the last fp32 addition
        with np.errstate(all="ignore"):
            ratio = np.nan_to_num(np.abs(y - exact) / room, nan=0.0 if np.array_equal(y, exact) else np.inf).max()
        worst = max(worst, float(ratio))
        if y.shape != exact.shape or ratio > 1:
            wrong.append(f"{node.name}: |Y - emulated| is {ratio:.3g} times the bound")
        xs[node.name] = (x, act)
    return wrong, worst, xs


# ------------------------------------------------------------------------------------ end to end


def emulated_model(original: Original, sites: dict) -> onnx.ModelProto:
    """The original graph with both operands of every replaced linear fake quantised; by node name, the
    specifications of weight and activation."""
    m = onnx.ModelProto()
    m.CopyFrom(original.model)
    del m.graph.value_info[:]
    nodes = []
    FakeQuant.specs = {}
    for node in m.graph.node:
        if node.name in sites:
            weight, act = sites[node.name]
            b, _, _, _ = original.linear(original.nodes[node.name])
            wq = emu.fake_quantize(b.T, weight).T.astype(np.float32)
            m.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(wq), f"emulated.{node.name}"))
            node.input[1] = f"emulated.{node.name}"
            for a in node.attribute:
                if a.name == "transB":
                    a.i = 0
            if act:
                FakeQuant.specs[node.name] = act
                quantised = f"quantised.{node.name}"
                nodes.append(helper.make_node("FakeQuant", [node.input[0]], [quantised], domain="mxemu", site=node.name))
                node.input[0] = quantised
        nodes.append(node)
    del m.graph.node[:]
    m.graph.node.extend(nodes)
    m.opset_import.append(helper.make_opsetid("mxemu", 1))
    return m


def differing_codes(xs: dict) -> dict[str, int]:
    """Per site, how many activation codes or scales differ between ONNX Runtime's X and the emulation's."""
    out = {}
    for site, (x, act) in xs.items():
        if act is None or site not in FakeQuant.seen:
            continue
        q, s = emu.quantize(x, act)
        q2, s2 = FakeQuant.seen[site]
        count = int((q != q2).sum()) + int((s != s2).sum())
        if count:
            out[site] = count
    return out


def check_end_to_end(original: Original, rewritten, feeds: dict, logits: np.ndarray, xs: dict) -> tuple[list[str], str]:
    FakeQuant.seen = {}
    specs = {n.name: (spec_of(n, "weight"), spec_of(n, "activation")) for n in mx_nodes(rewritten)}
    reference = ReferenceEvaluator(emulated_model(original, specs), new_ops=[FakeQuant])
    want = reference.run([original.model.graph.output[0].name], feeds)[0].astype(np.float64)
    span = float(want.max() - want.min())
    off = float(np.abs(logits - want).max()) / span
    codes = differing_codes(xs)
    note = f"end to end {off:.2e} of range"
    if codes:
        note += f", {sum(codes.values())} activation codes differ at {len(codes)} of {len(xs)} sites (first {next(iter(codes))})"
    if off > 1e-4 and not codes:
        return [f"end to end: off by {off:.2e} of the logits' range and no code differs"], note
    return [], note


# ------------------------------------------------------------------------------------------ driver


def check_format(args, path: Path, source: onnx.ModelProto, fmt: str, flags: list[str], folder: Path) -> tuple[list[str], str]:
    out = folder / "out.onnx"
    for old in folder.glob("out.onnx*"):
        old.unlink()
    tools.rewrite(args, path, out, "--lower", args.lower, "--format", fmt, *args.activation, *flags)
    rewritten = onnx.load(out)
    if args.lower == "qdq":
        all_wrong, notes = [], []
        for branch in branches(source):
            wrong, note = check_qdq_branch(args, Original(along(source, branch)), along(rewritten, branch), fmt)
            label = f"{branch}: " if branch else ""
            all_wrong += [label + w for w in wrong]
            notes.append(label + note)
        return all_wrong, "; ".join(notes)
    file = tools.session(out, args.library)  # as a user loads it, with its external data
    all_wrong, notes = [], []
    for branch in branches(source):
        wrong, note = check_branch(args, Original(along(source, branch)), along(rewritten, branch), fmt, (file, branch))
        label = f"{branch}: " if branch else ""
        all_wrong += [label + w for w in wrong]
        notes.append(label + note)
    return all_wrong, "; ".join(notes)


def check_branch(args, original: Original, rewritten: onnx.ModelProto, fmt: str, whole: tuple) -> tuple[list[str], str]:
    sites = mx_nodes(rewritten)
    if not sites:
        return ["no MX node"], ""
    wrong = check_bytes(rewritten, original, fmt)
    if wrong:
        return wrong, ""
    first = original.model.graph.output[0].name
    names = [first] + [v for n in sites for v in (n.input[0], n.output[0])]
    run = tools.session(expose(rewritten, names), args.library)
    feeds = feeds_for(original.model, np.random.default_rng(7))
    names = list(dict.fromkeys(names))
    values = dict(zip(names, run.run(names, feeds)))
    wrong, worst, xs = check_sites(rewritten, original, values)
    file, branch = whole
    if branch:
        feeds["use_cache_branch"] = np.array([branch == "then_branch"])
        logits = file.run([first], feeds)[0]
        off = np.abs(logits - values[first]).max() / np.ptp(logits)
        if off > 1e-5:
            wrong.append(f"the file's own {first} differs by {off:.2e} of its range from its {branch}'s")
    note = f"{len(sites)} sites, worst {worst:.3f} of the bound"
    if not args.no_end_to_end:
        try:
            more, text = check_end_to_end(original, rewritten, feeds, values[first], xs)
        except Exception as e:  # the reference evaluator lacks com.microsoft and 16-bit operators
            more, text = [], f"end to end not emulated: {type(e).__name__}: {str(e).splitlines()[0][:120]}"
            if args.require_end_to_end:
                more = [text]
        wrong, note = wrong + more, f"{note}; {text}"
    return wrong, note


def check_qdq_branch(args, original: Original, rewritten: onnx.ModelProto, fmt: str) -> tuple[list[str], str]:
    found = qdq.sites(rewritten)
    if not found:
        return ["no site"], ""
    wrong = qdq.check_bytes(found, original, fmt)
    wrong += qdq.check_validity(rewritten, original.model)
    if wrong:
        return wrong, ""
    rng = np.random.default_rng(7)
    feeds = feeds_for(original.model, rng)
    wrong, worst, how = qdq.check_sites(rewritten, found, original, feeds, rng)
    note = f"{len(found)} sites, worst {worst:.3f} of the bound{how}"
    if not args.no_end_to_end:
        FakeQuant.seen = {}
        try:
            emulated = emulated_model(original, {s.node.name: (s.weight, s.activation) for s in found})
            more, text = qdq.check_end_to_end(rewritten, found, emulated, FakeQuant, feeds)
        except Exception as e:  # the reference evaluator lacks com.microsoft and 16-bit operators
            more, text = [], f"end to end not run: {type(e).__name__}: {str(e).splitlines()[0][:120]}"
            if args.require_end_to_end:
                more = [text]
        wrong, note = wrong + more, f"{note}; {text}"
    return wrong, note


def check_model(args, name: str, path: Path, truth: dict | None) -> tuple[list[str], list[str]]:
    wrong, notes = [], []
    if truth is not None:
        bad = check_plan(args, path, truth)
        wrong += bad
        notes.append("plan ok" if not bad else "plan WRONG")
    if args.plan_only:
        return wrong, notes
    source = onnx.load(path)
    with tempfile.TemporaryDirectory() as folder:
        for fmt in args.formats:
            for flags in (["--all-linears"], ["--all-linears", "--include", "lm_head"]):
                try:
                    bad, note = check_format(args, path, source, fmt, flags, Path(folder))
                except Exception as e:
                    bad, note = [f"{type(e).__name__}: {str(e)[:600]}"], ""
                label = fmt + (" +head" if "--include" in flags else "")
                wrong += [f"{label}: {b}" for b in bad]
                notes.append(f"{label}: {note or 'FAILED'}")
    return wrong, notes


def models(args) -> list[tuple[str, Path, dict | None]]:
    out = [(str(p), p / "model.onnx" if p.is_dir() else p, None) for p in args.models]
    if args.zoo:
        truth = json.loads((args.zoo / "truth.json").read_text())
        out += [(n, args.zoo / n / "model.onnx", truth[n]) for n in sorted(truth)]
    return [m for m in out if re.search(args.only, m[0])]


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("models", nargs="*", type=Path, help="model folders or .onnx files without a truth.json")
    p.add_argument("--zoo", type=Path, help="folder of model folders with truth.json")
    p.add_argument("--only", default="", help="regular expression searched in the model's name")
    p.add_argument("--barred", action="store_true", help="of the zoo only <arch>-dynamo, <arch>-ts and mixtral-ts28")
    p.add_argument("--formats", default="fp8_e4m3,fp4_e2m1", help="comma-separated, or all")
    p.add_argument("--lower", default="mx", choices=("mx", "qdq"), help="the lowering to judge; qdq by onnx's reference evaluator")
    p.add_argument("--weight-only", action="store_true", help="with --activation-format none")
    p.add_argument("--plan-only", action="store_true")
    p.add_argument("--no-end-to-end", action="store_true")
    p.add_argument("--require-end-to-end", action="store_true", help="fail where the reference evaluator cannot run the graph")
    tools.add_arguments(p)
    args = p.parse_args()
    args.activation = ["--activation-format", "none"] if args.weight_only else []
    args.formats = (*emu.MX_FORMATS, "mxint8") if args.formats == "all" else tuple(args.formats.split(","))
    chosen = models(args)
    if args.barred:
        chosen = [m for m in chosen if m[2] is None or re.search(r"^[a-z0-9]+-(dynamo|ts)$|^mixtral-ts28$", m[0])]
    start, failed = time.time(), []
    for name, path, truth in chosen:
        wrong, notes = check_model(args, name, path, truth)
        print(f"{'FAIL' if wrong else 'ok  '} {name}")
        for line in notes:
            print(f"       {line}")
        for line in wrong:
            print(f"  WRONG {line}")
        failed += [name] if wrong else []
        sys.stdout.flush()
    print(f"{len(chosen) - len(failed)} of {len(chosen)} models right, {time.time() - start:.0f} s")
    return 1 if failed or not chosen else 0


if __name__ == "__main__":
    sys.exit(main())
