"""MxExpertMatMul, the product with experts chosen at run time, in stock onnxruntime, against NumPy.

    MX_REWRITE=target/debug/mxrewrite MX_CUSTOM_OPS=target/debug/libmx_custom_ops.so python tests/python/test_experts.py [AREA...]

AREA: values, shapes, errors (the operator), models (what mxrewrite makes of all forms). Run by tests/it/experts.rs. Exit code 0 means that every check passed.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import mx_nodes as mx  # also puts scripts/ on the path
import check_zoo
import mx_tools as tools
import numpy as np
import onnx
from mx_nodes import Case, emu
from onnx import TensorProto, helper, numpy_helper

FORMATS = (*emu.MX_FORMATS, "mxint8")
DTYPES = ("float32", "float16", "bfloat16")
NODE = "layer.0/MxExpertMatMul"
FAILURES: list[str] = []
CHECKS = 0


def check(good: bool, what: str) -> None:
    global CHECKS
    CHECKS += 1
    if not good:
        FAILURES.append(what)
        print(f"FAILED: {what}", flush=True)


@dataclass
class ExpertCase:
    """One MxExpertMatMul node: X [*lead, k], index, a stack of `experts` weights [n, k]."""

    experts: int = 5
    n: int = 24
    k: int = 100
    x: tuple = (3, 2)  # without k
    index: tuple = (3,)
    weight: str = "fp8_e4m3"
    activation: str = "fp8_e4m3"
    scale: str = "e8m0"
    block: int = 32
    rounding: str = "even"
    rule: str = "floor"
    alpha: float = 1.0
    dtype: str = "float32"
    kind: str = "int64"
    seed: int = 0
    rank: int | None = None  # attribute index_rank

    def spec(self, fmt: str) -> emu.Spec:
        return emu.Spec(fmt, self.block, self.rounding, self.rule, self.scale)

    def data(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """X (values that dtype can hold) and the stack, float64; the index, of both signs."""
        rng = np.random.default_rng(self.seed)
        scatter = lambda *s: rng.standard_normal(s) * np.exp2(rng.uniform(-2, 2, s))
        x = mx.from_bits(mx.to_bits(scatter(*self.x, self.k), self.dtype), self.dtype)
        stack = scatter(self.experts, self.n, self.k).astype(np.float32).astype(np.float64)
        return x, stack, rng.integers(-self.experts, self.experts, self.index).astype(self.kind)

    def feeds(self) -> dict:
        x, _, index = self.data()
        # mx.value would make a vector of a scalar.
        chosen = mx.ort.OrtValue.ortvalue_from_numpy(np.array(index, self.kind))
        return {"X": mx.value(mx.to_bits(x, self.dtype), self.dtype), "I": chosen}

    def model(self, declared: dict | None = None) -> onnx.ModelProto:
        _, stack, _ = self.data()
        codes, scales = emu.packed(stack.reshape(-1, self.k), self.spec(self.weight))
        shaped = lambda array: array.reshape(self.experts, self.n, -1)
        inits = [mx.tensor("W.codes", shaped(codes), TensorProto.UINT8)]
        if self.scale == "e8m0":
            inits.append(mx.tensor("W.scales", shaped(scales), TensorProto.UINT8))
        attributes = Case(
            n=self.n, k=self.k, weight=self.weight, activation=self.activation, scale=self.scale, block=self.block,
            rounding=self.rounding, rule=self.rule, alpha=self.alpha,
        ).attributes()  # fmt: skip
        del attributes["beta"]
        rank = {} if self.rank is None else {"index_rank": self.rank}
        node = helper.make_node(
            "MxExpertMatMul", ["X", "I", *(t.name for t in inits)], ["Y"], name=NODE, domain="mx",
            experts=self.experts, **rank, **attributes,
        )  # fmt: skip
        shapes = {"X": [*self.x, self.k], "I": list(self.index)} if declared is None else declared
        types = {"X": mx.ONNX_TYPE[self.dtype], "I": getattr(TensorProto, self.kind.upper())}
        infos = [helper.make_tensor_value_info(name, types[name], shapes[name]) for name in ("X", "I")]
        out = helper.make_empty_tensor_value_info("Y")
        out.type.tensor_type.elem_type = types["X"]
        return mx.model([node], infos, [out], inits)

    def expected(self) -> tuple[np.ndarray, np.ndarray]:
        """(Y in float64 before the cast to dtype, sum of |x_i w_i| times |alpha|)."""
        x, stack, index = self.data()
        wq = emu.fake_quantize(stack, self.spec(self.weight))[index]
        wq = np.swapaxes(wq, -1, -2)
        if x.size == 0 or wq.size == 0:
            return (np.matmul(x, wq),) * 2
        xq = x if self.activation == "none" else emu.fake_quantize(x, self.spec(self.activation))
        alpha = float(np.float32(self.alpha))
        return alpha * np.matmul(xq, wq), abs(alpha) * np.matmul(np.abs(xq), np.abs(wq))

    def replace(self, **changes) -> "ExpertCase":
        return replace(self, **changes)


def run(case: ExpertCase, declared: dict | None = None, threads: int = 2) -> np.ndarray:
    return mx.run(mx.session(case.model(declared), threads), case.feeds(), [case.dtype])[0]


def check_case(case: ExpertCase, declared: dict | None = None) -> float:
    y, (want, size) = run(case, declared), case.expected()
    check(y.shape == want.shape, f"shape {y.shape}, expected {want.shape}: {case}")
    if y.shape != want.shape or y.size == 0:
        return 0.0
    ratio = float((np.abs(y - want) / Case(k=case.k, dtype=case.dtype).tolerance(want, size)).max())
    check(ratio <= 1.0, f"off by {ratio:.3g} tolerances: {case}")
    return ratio


def value_cases() -> list[ExpertCase]:
    """Formats, types, scales, blocks, roundings, factors, many rows an expert."""
    cases = []
    for i, (fmt, dtype) in enumerate(itertools.product(FORMATS, DTYPES)):
        base = ExpertCase(weight=fmt, activation=fmt, dtype=dtype, seed=i, kind=("int64", "int32")[i % 2])
        cases += [base, base.replace(activation="none"), base.replace(alpha=-0.375, activation=FORMATS[i % 5])]
    for i, (rounding, rule, block) in enumerate(itertools.product(emu.ROUNDINGS, emu.SCALE_RULES, emu.BLOCK_SIZES)):
        fmt = FORMATS[i % len(FORMATS)]
        cases.append(ExpertCase(weight=fmt, activation=fmt, rounding=rounding, rule=rule, block=block, seed=i, k=130))
    for dtype, fmt, activation in itertools.product(DTYPES, ("bf16", "fp8_e4m3", "fp8_e5m2"), (True, False)):
        cases.append(ExpertCase(weight=fmt, activation=fmt if activation else "none", scale="none", dtype=dtype))
    for k, n in itertools.product((1, 31, 32, 33, 65), (1, 5, 16, 33)):
        cases.append(ExpertCase(k=k, n=n, weight="fp6_e3m2", activation="fp8_e4m3", seed=k))
    # One row a token, several hundred tokens an expert, work for several threads.
    cases.append(ExpertCase(experts=3, n=200, k=320, x=(1100, 1), index=(1100,)))
    cases.append(ExpertCase(experts=8, n=200, k=320, x=(9, 130), index=(9,), weight="fp4_e2m1"))
    return cases


def values() -> None:
    """Every case against float64 emulation."""
    cases = value_cases()
    worst = max(check_case(case) for case in cases)
    case = cases[-2]
    first = run(case, threads=1)
    check(all((run(case, threads=t) == first).all() for t in (2, 3)), "the same bits for any number of threads")
    print(f"{len(cases)} cases, worst {worst:.3f} of the tolerance")


SHAPES = (
    ((4,), ()),
    ((), ()),
    ((2, 7), ()),
    ((), (3,)),
    ((3, 1), (3,)),
    ((1, 4), (3,)),
    ((4,), (2, 3)),
    ((2, 1, 4), (3,)),
    ((2, 1, 4), (2, 3)),
    ((2, 3, 1), (1, 3)),
    ((4,), (1,)),
    ((0, 3), ()),
    ((3, 0), (3,)),
    ((0, 2), (0,)),
    ((1, 2), (0,)),
    ((2,), (0, 3)),
)


def shapes() -> None:
    """MatMul's broadcasting, scalars, vectors, nothing chosen; declared and unknown; inference."""
    for x, index in SHAPES:
        case = ExpertCase(x=x, index=index, seed=len(x))
        check_case(case)
        want = run(case)
        unknown = case.replace(rank=len(index))
        check(np.array_equal(want, run(unknown, {"X": None, "I": None})), f"the same without declared shapes: {case}")

    def inferred(x, index, rank, **case):
        made = ExpertCase(**case, rank=rank).model({"X": x, "I": index})
        made.graph.node.append(helper.make_node("Identity", ["Y"], ["Z"], name="after"))
        made.graph.output[0].name = "Z"
        return mx.session(made).get_outputs()[0].shape

    for x, index, rank, want in (
        (["t", 100], [], 0, ["t", 24]),
        (["t", 1, 100], ["t"], None, ["t", 1, 24]),
        (["b", 1, "s", 100], ["b", 3], 2, ["b", 3, "s", 24]),
        ([100], ["i"], 1, ["i", 24]),
    ):
        got = inferred(x, index, rank)
        check(got == want, f"inferred shape {got}, expected {want}")
    got = inferred(["t", 100], [], 0, dtype="float16")
    check(got == ["t", 24], f"inferred shape of float16 {got}")

    # The stack may be computed, too.
    case = ExpertCase()
    m = case.model()
    feeds = case.feeds()
    for init in list(m.graph.initializer):
        m.graph.input.append(helper.make_tensor_value_info(init.name, init.data_type, None))
        feeds[init.name] = mx.value(np.frombuffer(init.raw_data, np.uint8).reshape(list(init.dims)), "uint8")
    del m.graph.initializer[:]
    # Not repacked, and so by other kernels.
    y, (want, size) = mx.run(mx.session(m), feeds, ["float32"])[0], case.expected()
    bound = Case(k=case.k, dtype=case.dtype).tolerance(want, size)
    check(bool((np.abs(y - want) <= bound).all()), "a stack that is no constant")


def bad_models():
    """(what, model, word of the message) for nodes that break the contract."""
    for name, value, word in (
        ("experts", None, "experts"),
        ("experts", 0, "experts"),
        ("experts", -2, "experts"),
        ("experts", 2**40, "experts"),
        ("experts", 4, "codes"),
        ("experts", "two", "experts"),
        ("index_rank", 2, "index_rank"),
        ("index_rank", -2, "index_rank"),
        ("index_rank", 63, "index_rank"),
        ("scale", "tensor", "scale"),
        ("scale", "none", "scales"),
        ("weight_format", "fp7", "weight_format"),
        ("n", 25, "codes"),
        ("n", 2**31 - 1, "codes"),
        ("k", 0, "attribute k"),
        ("k", 500, "X"),
        ("layout", 2, "layout"),
    ):
        m = ExpertCase().model()
        node = m.graph.node[0]
        kept = [a for a in node.attribute if a.name != name]
        del node.attribute[:]
        node.attribute.extend(kept)
        if value is not None:
            node.attribute.append(helper.make_attribute(name, value))
        yield f"{name} = {value}", m, word
    for what, shapes, word in (
        ("another k", {"X": [3, 2, 99], "I": [3]}, "X"),
        ("leading dimensions that do not broadcast", {"X": [4, 2, 100], "I": [3]}, "index"),
    ):
        yield what, ExpertCase().model(shapes), word
    m = ExpertCase().model()
    del m.graph.node[0].input[3]
    yield "no scales", m, "scales"
    m = ExpertCase().model()
    m.graph.initializer[0].dims[:] = [5 * 24, 128]
    yield "codes of rank 2", m, "codes"
    m = ExpertCase().model()
    m.graph.initializer[1].dims[:] = [5, 4, 24]
    yield "scales of another shape", m, "scales"


def errors() -> None:
    """Corrupt nodes and indices: an exception that names the node, and the session goes on."""
    for what, m, word in bad_models():
        try:
            mx.session(m)
            check(False, f"{what}: accepted")
        except Exception as error:  # noqa: BLE001 - onnxruntime raises several types without a common base
            check(NODE in str(error) and word in str(error), f"{what}: {error}")
    case = ExpertCase()
    for kind in ("int64", "int32"):
        case = case.replace(kind=kind)
        s, good = mx.session(case.model({"X": None, "I": None})), case.feeds()
        want = mx.run(s, good, ["float32"])[0]
        limits = np.iinfo(kind)
        for index in ([5], [-6], [0, 1, 7], [limits.max], [limits.min]):
            feeds = {**good, "I": mx.value(np.array(index, kind), kind)}
            feeds["X"] = mx.value(np.zeros((1, 100), np.float32), "float32")
            try:
                s.run_with_ort_values(None, feeds)
                check(False, f"index {index} was accepted")
            except Exception as error:  # noqa: BLE001
                named = NODE in str(error) and str(index[-1]) in str(error) and "-5 to 4" in str(error)
                check(named, f"index {index}: {error}")
            check((mx.run(s, good, ["float32"])[0] == want).all(), f"after index {index}")
        for x, index in (((2, 99), (2,)), ((), ()), ((4, 2, 100), (3,)), ((0,), (1,))):
            made = (np.ones(x, np.float32), np.zeros(index, kind))
            feeds = dict(zip("XI", map(mx.ort.OrtValue.ortvalue_from_numpy, made)))
            try:
                s.run_with_ort_values(None, feeds)
                check(False, f"X {x}, index {index} were accepted")
            except Exception as error:  # noqa: BLE001
                check(NODE in str(error), f"X {x}, index {index}: {error}")


# ------------------------------------------------------------------------------------------ models


@dataclass
class Form:
    """One way to write a product with chosen experts, its stack and what it is fed."""

    name: str
    stack: np.ndarray  # [experts, n, k]
    x: np.ndarray
    index: np.ndarray
    stored_kn: bool = False  # the initialiser is [experts, k, n]
    left: bool = False  # the weight is operand A
    points: bool = False  # the index input has a last axis of one
    steps: tuple = ()  # operators between the stack and the product, see build

    @property
    def initializer(self) -> str:
        return f"model.layers.{self.name}.mlp.experts.down_proj"

    def emulated(self, weight: emu.Spec, activation: emu.Spec | None) -> tuple[np.ndarray, np.ndarray]:
        """(the product, sum of |x w|), float64, as MatMul of the original graph has it."""
        turn = lambda v: np.swapaxes(v, -1, -2)
        wq = emu.fake_quantize(self.stack, weight)[self.index]
        x = turn(self.x) if self.left else self.x
        xq = emu.fake_quantize(x, activation) if activation else x.astype(np.float64)
        y, size = np.matmul(xq, turn(wq)), np.matmul(np.abs(xq), np.abs(turn(wq)))
        return (turn(y), turn(size)) if self.left else (y, size)


def forms(dtype: str) -> list[Form]:
    rng = np.random.default_rng(11)
    draw = lambda *shape: rng.standard_normal(shape).astype(dtype).astype(np.float32)
    pick = lambda *shape: rng.integers(-4, 4, shape)
    stack = lambda: draw(4, 24, 72)
    return [
        Form("0", stack(), draw(5, 72), pick(), steps=("Gather", (1, 0))),
        Form("1", stack(), draw(2, 5, 72), pick(), stored_kn=True, steps=("Gather",)),
        Form("2", stack(), draw(6, 1, 72), pick(6), steps=("Gather", (0, 2, 1))),
        Form("3", stack(), draw(2, 1, 3, 72), pick(2, 6), stored_kn=True, steps=("Gather",)),
        Form("4", stack(), draw(6, 72, 1), pick(6), left=True, steps=("Gather",)),
        Form("5", stack(), draw(6, 72, 2), pick(6), left=True, steps=("GatherND+Unsqueeze",)),
        Form("6", stack(), draw(6, 1, 72), pick(6), points=True, steps=("GatherND", (0, 2, 1))),
        Form("7", stack(), draw(1, 3, 72), pick(6), steps=((0, 2, 1), "Identity", "Gather")),
        Form("8", stack(), draw(72, 2), pick(3), left=True, stored_kn=True, steps=((0, 2, 1), "Gather")),
    ]


def build(made: list[Form], dtype: str) -> onnx.ModelProto:
    """The forms side by side, and a router whose own choice picks the experts of one more product."""
    onnx_type, nodes, inputs, outputs, inits = mx.ONNX_TYPE[dtype], [], [], [], []
    inits.append(mx.tensor("last", np.array([-1], np.int64), TensorProto.INT64))
    for form in made:
        stored = np.swapaxes(form.stack, 1, 2) if form.stored_kn else form.stack
        inits.append(mx.tensor(form.initializer, stored.astype(dtype), onnx_type))
        x, i, y, current = (f"{kind}{form.name}" for kind in ("x", "i", "y", "w"))
        index_shape = [*form.index.shape, *([1] if form.points else [])]
        x_dims = [f"{x}_{axis}" if extent != 72 else 72 for axis, extent in enumerate(form.x.shape)]
        inputs.append(helper.make_tensor_value_info(x, onnx_type, x_dims))
        inputs.append(helper.make_tensor_value_info(i, TensorProto.INT64, index_shape))
        outputs.append(helper.make_empty_tensor_value_info(y))
        outputs[-1].type.tensor_type.elem_type = onnx_type
        current = form.initializer
        for number, step in enumerate(form.steps):
            before, current = current, f"{form.name}_{number}"
            if isinstance(step, tuple):
                nodes.append(helper.make_node("Transpose", [before], [current], perm=list(step)))
            elif step == "GatherND+Unsqueeze":
                nodes.append(helper.make_node("Unsqueeze", [i, "last"], [f"{i}_points"]))
                nodes.append(helper.make_node("GatherND", [before, f"{i}_points"], [current]))
            else:
                nodes.append(helper.make_node(step, [before] + [i] * step.startswith("Gather"), [current]))
        operands = [current, x] if form.left else [x, current]
        nodes.append(helper.make_node("MatMul", operands, [y], name=f"product_{form.name}"))
    return mx.model(nodes, inputs, outputs, inits)


def add_router(m: onnx.ModelProto, dtype: str) -> None:
    """TopK of a router picks two experts a token; their results are summed with the router's weights."""
    rng, onnx_type, path = np.random.default_rng(3), mx.ONNX_TYPE[dtype], "model.layers.9.mlp"
    m.graph.initializer.extend(
        [
            mx.tensor(f"{path}.gate.weight", rng.standard_normal((72, 4)).astype(dtype), onnx_type),
            mx.tensor(f"{path}.experts.up_proj", rng.standard_normal((4, 24, 72)).astype(dtype), onnx_type),
            mx.tensor("two", np.array([2], np.int64), TensorProto.INT64),
            mx.tensor("back", np.array([-2], np.int64), TensorProto.INT64),
            mx.tensor("one", np.array([1], np.int64), TensorProto.INT64),
        ]
    )
    m.graph.node.extend(
        [
            helper.make_node("MatMul", ["tokens", f"{path}.gate.weight"], ["scores"], name="router"),
            helper.make_node("Softmax", ["scores"], ["shares"], axis=-1),
            helper.make_node("TopK", ["shares", "two"], ["top", "chosen"], axis=-1),
            helper.make_node("Gather", [f"{path}.experts.up_proj", "chosen"], ["picked"]),
            helper.make_node("Transpose", ["picked"], ["turned"], perm=[0, 1, 3, 2]),
            helper.make_node("Unsqueeze", ["tokens", "one"], ["each"]),
            helper.make_node("Unsqueeze", ["each", "back"], ["rows"]),
            helper.make_node("MatMul", ["rows", "turned"], ["of_experts"], name="moe"),
            helper.make_node("Squeeze", ["of_experts", "back"], ["flat"]),
            helper.make_node("Unsqueeze", ["top", "last"], ["weights"]),
            helper.make_node("Mul", ["flat", "weights"], ["weighted"]),
            helper.make_node("ReduceSum", ["weighted", "one"], ["mixed"], keepdims=0),
        ]
    )
    m.graph.input.append(helper.make_tensor_value_info("tokens", onnx_type, ["t", 72]))
    m.graph.output.append(helper.make_tensor_value_info("mixed", onnx_type, ["t", 24]))


def rewrite(path: Path, out: Path, *flags: str) -> dict:
    command = [os.environ["MX_REWRITE"], path, "-o", out, "--force", "--json", *flags]
    done = subprocess.run(command, capture_output=True)
    if done.returncode:
        raise RuntimeError(f"{flags}: exit {done.returncode}: {done.stderr.decode()}")
    return json.loads(done.stdout)


def feeds_of(made: list[Form], dtype: str) -> dict:
    feeds = {"tokens": np.random.default_rng(5).standard_normal((7, 72)).astype(dtype)}
    for form in made:
        feeds[f"x{form.name}"] = form.x.astype(dtype)
        feeds[f"i{form.name}"] = form.index[..., None] if form.points else np.asarray(form.index)
    return feeds


def judge(made: list[Form], out: Path, dtype: str) -> float:
    """Every product of a rewritten model against the emulation; the worst, as a multiple of the bound."""
    model = onnx.load(out)
    nodes = {n.name: n for n in model.graph.node if n.op_type == "MxExpertMatMul"}
    names = [f"product_{form.name}" for form in made] + ["moe"]
    check(sorted(nodes) == sorted(names), f"{out.name}: MxExpertMatMul nodes are {sorted(nodes)}")
    left = Counter(n.op_type for n in model.graph.node)
    check(left["Gather"] + left["GatherND"] == 0, f"{out.name}: what chose the weights is still there: {left}")
    check({"router"} == {n.name for n in model.graph.node if n.op_type == "MatMul"}, f"{out.name}: the router")
    check(not any(len(t.dims) == 3 and t.data_type != TensorProto.UINT8 for t in model.graph.initializer), f"{out.name}: stacks")
    values = ["tokens", "chosen", "of_experts"]
    session = tools.session(check_zoo.expose(model, values[1:]), Path(mx.LIBRARY))
    outputs = [f"y{form.name}" for form in made] + values[1:]
    feeds = feeds_of(made, dtype)
    got = dict(zip(outputs, session.run(outputs, feeds)))
    stack = numpy_helper.to_array(next(t for t in onnx.load(out.parent / "model.onnx").graph.initializer if t.name.endswith("up_proj")))
    moe = Form("9", tools.to_float32(stack), tools.to_float32(feeds["tokens"])[:, None, None], got["chosen"])
    worst = 0.0
    for form, node, y in [(f, nodes[f"product_{f.name}"], got[f"y{f.name}"]) for f in made] + [(moe, nodes["moe"], got["of_experts"])]:
        exact, size = form.emulated(check_zoo.spec_of(node, "weight"), check_zoo.spec_of(node, "activation"))
        room = 1e-5 * size + (np.abs(exact) * 2.0**-10 + 2.0**-24 if dtype == "float16" else 0)
        check(y.shape == exact.shape, f"{out.name}, form {form.name}: shape {y.shape}, expected {exact.shape}")
        if y.shape == exact.shape:
            worst = max(worst, float((np.abs(tools.to_float32(y) - exact) / room).max()))
    check(worst <= 1, f"{out.name}: {worst:.3g} times the bound")
    return worst


def bodies() -> None:
    """A product in a branch of an If whose weight is chosen outside, by points that are squeezed inside."""
    form = next(form for form in forms("float32") if form.left)
    empty = lambda name: onnx.ValueInfoProto(name=name)
    then = helper.make_graph([helper.make_node("MatMul", ["e", "x"], ["a"], name="product")], "then", [], [empty("a")])
    other = helper.make_graph([helper.make_node("MatMul", ["e", "x"], ["b"], name="negated"), helper.make_node("Neg", ["b"], ["c"])], "else", [], [empty("c")])
    nodes = [
        helper.make_node("GatherND", [form.initializer, "points"], ["e"]),
        helper.make_node("If", ["which"], ["y"], then_branch=then, else_branch=other, name="if"),
    ]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["s", 72, 1]),
        helper.make_tensor_value_info("points", TensorProto.INT64, ["s", 1]),
        helper.make_tensor_value_info("which", TensorProto.BOOL, []),
    ]
    made = mx.model(nodes, inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["s", 24, 1])], [mx.tensor(form.initializer, form.stack, TensorProto.FLOAT)])
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / "model.onnx", Path(folder) / "out.onnx"
        onnx.save(made, path)
        report = rewrite(path, out, "--tier-a")
        check(report["sites"] == 2, f"in bodies: {report['plan']}")
        rewritten = onnx.load(out)
        check([n.op_type for n in rewritten.graph.node] == ["If"], "the choice outside is gone")
        check(len({t.name for t in rewritten.graph.initializer if t.data_type == TensorProto.UINT8}) == 2, "one stack for both branches")
        spec = emu.Spec("fp8_e4m3")
        exact, size = form.emulated(spec, spec)
        session = tools.session(out, Path(mx.LIBRARY))
        for which, sign in ((True, 1), (False, -1)):
            y = session.run(None, {"x": form.x, "points": form.index[:, None], "which": np.array(which)})[0]
            check((np.abs(sign * y - exact) <= 1e-5 * size).all(), f"in branch {which}")


def models() -> None:
    """All forms through mxrewrite and onnxruntime, site by site."""
    bodies()
    for dtype in ("float32", "float16"):
        made = forms(dtype)
        with tempfile.TemporaryDirectory() as folder:
            path, worst = Path(folder) / "model.onnx", 0.0
            original = build(made, dtype)
            add_router(original, dtype)
            onnx.save(original, path)
            flags = {fmt: ["--tier-a", "--format", fmt] for fmt in ("fp8_e4m3", "fp6_e2m3", "fp4_e2m1")}
            flags["weight-only"] = ["--all-linears", "--format", "fp4_e2m1", "--activation-format", "none"]
            flags |= {low: ["--all-linears", "--lower", low] for low in ("bfp16", "nvfp8-emu-e4m3", "nvfp8-emu-e5m2")}
            for name, options in flags.items():
                plan = rewrite(path, Path(folder) / f"{name}.onnx", *options)["plan"]
                check({(s["role"], s["experts"], s["n"], s["k"]) for s in plan["sites"]} == {("expert", 4, 24, 72)}, f"{name}: {plan['sites']}")
                check([s["node"] for s in plan["skipped"]] == ["router"], f"{name}: {plan['skipped']}")
                worst = max(worst, judge(made, Path(folder) / f"{name}.onnx", dtype))
            recipe = Path(folder) / "experts.toml"
            recipe.write_text('[[rules]]\nrole = "expert"\nweight_format = "fp8_e4m3"\n')
            rewrite(path, Path(folder) / "recipe.onnx", "--recipe", str(recipe))
            same = [onnx.load(Path(folder) / f"{n}.onnx").graph for n in ("recipe", "fp8_e4m3")]
            check(same[0] == same[1], "a rule for role expert makes what the tier makes")
            rewrite(path, Path(folder) / "again.onnx", "--recipe", str(Path(folder) / "fp4_e2m1.onnx"))
            same = [onnx.load(Path(folder) / f"{n}.onnx").graph for n in ("again", "fp4_e2m1")]
            check(same[0] == same[1], "the recipe of a rewritten model makes the same model")
            rewrite(path, Path(folder) / "base.onnx", *flags["weight-only"], "--base-dtype", "fp16")
            base = tools.session(Path(folder) / "base.onnx", Path(mx.LIBRARY)).run(None, feeds_of(made, dtype))
            full = tools.session(Path(folder) / "weight-only.onnx", Path(mx.LIBRARY)).run(None, feeds_of(made, dtype))
            off = max(np.abs(a.astype(np.float64) - b).max() / np.abs(b).max() for a, b in zip(base[:-1], full[:-1]))
            check(off < 2e-3, f"--base-dtype fp16: {off:.3g} of the range off")
            for lowering in ("int8", "nvfp8", "qdq"):
                try:
                    rewrite(path, Path(folder) / "none.onnx", "--all-linears", "--lower", lowering)
                    check(False, f"--lower {lowering} replaced experts")
                except RuntimeError as error:
                    check("exit 1" in str(error) and f"--lower {lowering} has no form" in str(error), str(error))
        print(f"{len(made) + 1} forms in {dtype}, {len(flags)} targets, worst {worst:.3f} of the bound")


AREAS = {"values": values, "shapes": shapes, "errors": errors, "models": models}


def main() -> int:
    for area in sys.argv[1:] or AREAS:
        AREAS[area]()
    print(f"{CHECKS} checks, {len(FAILURES)} failed (onnxruntime {mx.ort.__version__})")
    return 1 if FAILURES or not CHECKS else 0


if __name__ == "__main__":
    sys.exit(main())
