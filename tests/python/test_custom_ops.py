"""The operators of libmx_custom_ops.so as Python users meet them, one area a call.

    MX_CUSTOM_OPS=target/debug/libmx_custom_ops.so python tests/python/test_custom_ops.py AREA

AREA: values, special, inputs, act-matmul, scores, errors, compute-errors, threads, lifetime. Run by
tests/it/custom_ops.rs. Exit code 0 means that every check passed.
"""

from __future__ import annotations

import gc
import itertools
import sys
import threading

import mx_nodes as mx
import numpy as np
import onnx
from broken_models import broken_models
from mx_nodes import ActCase, Case, emu
from onnx import TensorProto, helper

FORMATS = (*emu.MX_FORMATS, "mxint8")
DTYPES = ("float32", "float16", "bfloat16")
FAILURES: list[str] = []
CHECKS = 0


def check(good: bool, what: str) -> None:
    global CHECKS
    CHECKS += 1
    if not good:
        FAILURES.append(what)
        print(f"FAILED: {what}", flush=True)


def check_case(case: Case, threads: int = 2) -> float:
    y, (want, size) = mx.run_case(case, threads), case.expected()
    check(y.shape == want.shape, f"shape {y.shape}, expected {want.shape}: {case}")
    if y.shape != want.shape or y.size == 0:
        return 0.0
    ratio = float((np.abs(y - want) / case.tolerance(want, size)).max())
    check(ratio <= 1.0, f"off by {ratio:.3g} tolerances: {case}")
    return ratio


# ------------------------------------------------------------------------------------------- values


def value_cases() -> list[Case]:
    """Every format, rounding, scale rule, block size, type and tail."""
    cases = []
    for i, (fmt, dtype) in enumerate(itertools.product(FORMATS, DTYPES)):
        base = Case(weight=fmt, activation=fmt, dtype=dtype, seed=i)
        cases += [base, base.replace(activation="none"), base.replace(bias=True, alpha=-0.375, beta=2.5)]
    for i, (rounding, rule, block) in enumerate(itertools.product(emu.ROUNDINGS, emu.SCALE_RULES, emu.BLOCK_SIZES)):
        fmt = FORMATS[i % len(FORMATS)]
        cases.append(Case(weight=fmt, activation=fmt, rounding=rounding, rule=rule, block=block, seed=i, k=300))
    for i, (k, fmt) in enumerate(itertools.product((1, 2, 15, 31, 32, 33, 64, 65, 127, 200), FORMATS)):
        cases.append(Case(weight=fmt, activation=fmt, k=k, n=(1, 5, 16, 33)[i % 4], seed=i, shape=(1 + i % 9,)))
    for dtype, fmt, activation in itertools.product(DTYPES, ("bf16", "fp8_e4m3", "fp8_e5m2"), (True, False)):
        activation = fmt if activation else "none"
        cases.append(Case(weight=fmt, activation=activation, scale="none", dtype=dtype, bias=True, beta=0.5))
    for fmt, activation in (("fp8_e4m3", "fp8_e4m3"), ("fp8_e5m2", "none")):
        cases.append(Case(weight=fmt, activation=activation, scale="tensor", bias=True))
    for weight, activation in itertools.permutations(FORMATS, 2):
        cases.append(Case(weight=weight, activation=activation))
    for shape in ((), (1,), (0,), (2, 0, 3), (1, 1, 2, 1, 3), (70,)):
        cases += [Case(shape=shape, dtype=dtype, bias=True) for dtype in DTYPES]
    # Big enough for every blocked path of the kernels: several tiles along m, n and k, with tails.
    for fmt in FORMATS:
        cases.append(Case(weight=fmt, activation=fmt, n=301, k=1100, shape=(67,), spread=1.0))
    return cases


def values() -> None:
    """Every case against float64 emulation."""
    cases = value_cases()
    worst = max(check_case(case) for case in cases)
    print(f"{len(cases)} cases, worst {worst:.3f} of the tolerance")


def special() -> None:
    """NaN, infinities, zeros, overflow and underflow; the same bits for any number of threads."""
    case = Case(n=8, k=96, shape=(4,))
    x = case.data()[0].copy()
    x[0, 40], x[1, 0], x[2, :] = np.nan, np.inf, 0.0
    s = mx.session(case.model())
    y = mx.run(s, {"X": mx.value(mx.to_bits(x, "float32"), "float32")}, ["float32"])[0]
    check(np.isnan(y[0]).all() and np.isnan(y[1]).all(), "a block with NaN or Inf makes its row NaN")
    check((y[2] == 0).all(), "zeros give zeros")
    check(np.isfinite(y[3]).all(), "NaN stays in its row")

    half = Case(dtype="float16", alpha=2.0**15)
    y = mx.run_case(half)
    want = half.expected()[0]
    check(np.isinf(y[np.abs(want) > 70000]).all(), "results past float16's range are infinite")

    # 2^(ex + ew) far outside of what one fp32 factor holds, while the product fits.
    for up in (100, -100):
        big = Case(k=64)
        x, w, _ = big.data()
        codes, scales = emu.packed(np.ldexp(w, -up), big.spec(big.weight))
        m = big.model()
        m.graph.initializer[0].raw_data = codes.tobytes()
        m.graph.initializer[1].raw_data = scales.tobytes()
        feeds = {"X": mx.value(np.ldexp(x, up).astype(np.float32), "float32")}
        y = mx.run(mx.session(m), feeds, ["float32"])[0]
        want, size = big.expected()
        ok = (np.abs(y - want) <= big.tolerance(want, size)).all()
        check(ok, f"scales of 2^{up} and 2^{-up} cancel without overflow")

    for fmt, rows in itertools.product(("fp8_e4m3", "fp4_e2m1", "fp6_e2m3"), (1, 65)):
        case = Case(weight=fmt, activation=fmt, n=513, k=640, shape=(rows,))
        first = mx.run_case(case, 1)
        for threads in (1, 2, 3):
            check((mx.run_case(case, threads) == first).all(), f"{fmt}, m = {rows}: same bits on {threads} threads")


def dynamic_model(case: Case, declared: dict) -> onnx.ModelProto:
    """The case's model with its constants as graph inputs of the declared shapes (None: no shape)."""
    m = case.model()
    for init in list(m.graph.initializer):
        shape = declared.get(init.name, list(init.dims))
        m.graph.input.append(helper.make_tensor_value_info(init.name, init.data_type, shape))
    del m.graph.initializer[:]
    return m


def inputs() -> None:
    """Weights that are no constants, declared with and without shapes; fewer declared facts."""
    case = Case(bias=True)
    # By kernels of their own: what is no constant is not repacked.
    want, size = case.expected()
    bound = case.tolerance(want, size)
    feeds = {"X": case.feed()}
    for init in case.model().graph.initializer:
        dtype = np.float32 if init.data_type == TensorProto.FLOAT else np.uint8
        feeds[init.name] = np.frombuffer(init.raw_data, dtype).reshape(list(init.dims))
    for declared in ({}, {n: None for n in feeds}, {"W.codes": ["a", "b"], "W.scales": ["c", "d"], "bias": ["e"]}):
        m = dynamic_model(case, declared)
        if declared:
            m.graph.input[0].CopyFrom(helper.make_tensor_value_info("X", TensorProto.FLOAT, None))
            m.graph.output[0].CopyFrom(helper.make_tensor_value_info("Y", TensorProto.FLOAT, None))
        y = mx.session(m).run(None, feeds)[0]
        check(bool((np.abs(y - want) <= bound).all()), f"dynamic weights, declared {declared}")

    # Shape inference: the symbolic dimensions of X reach Y.
    m = case.model()
    m.graph.output[0].CopyFrom(helper.make_empty_tensor_value_info("Y"))
    m.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT
    out = mx.session(m).get_outputs()[0]
    # On 1.22 and 1.23 the operator has no shape inference (custom_ops/src/older.rs).
    older = tuple(map(int, mx.ort.__version__.split(".")[:2])) < (1, 24)
    check(out.shape == ([] if older else ["d0", "d1", case.n]), f"inferred shape is {out.shape}")
    for dtype in DTYPES:
        c = Case(dtype=dtype)
        m = c.model()
        m.graph.node.append(helper.make_node("Cast", ["Y"], ["Z"], to=TensorProto.FLOAT))
        m.graph.output[0].CopyFrom(helper.make_tensor_value_info("Z", TensorProto.FLOAT, None))
        y = mx.run(mx.session(m), {"X": mx.value(c.feed(), dtype)}, ["float32"])[0]
        check((y == mx.run_case(c)).all(), f"{dtype}: Y's type is inferred as X's")

    # Unnamed unknown dimensions: a Reshape whose target is computed from Y's shape must still load.
    plain = Case()
    m = plain.model()
    m.graph.input[0].CopyFrom(helper.make_tensor_value_info("X", TensorProto.FLOAT, [None, None, plain.k]))
    m.graph.output[0].CopyFrom(helper.make_tensor_value_info("Z", TensorProto.FLOAT, None))
    m.graph.initializer.append(mx.tensor("lead", np.array([0, 1], np.int64), TensorProto.INT64))
    m.graph.initializer.append(mx.tensor("heads", np.array([4, plain.n // 4], np.int64), TensorProto.INT64))
    m.graph.node.extend(
        [
            helper.make_node("Shape", ["Y"], ["shape"]),
            helper.make_node("Gather", ["shape", "lead"], ["kept"]),
            helper.make_node("Concat", ["kept", "heads"], ["target"], axis=0),
            helper.make_node("Reshape", ["Y", "target"], ["Z"]),
        ]
    )
    z = mx.session(m).run(None, {"X": plain.feed()})[0]
    check(z.shape == (2, 3, 4, plain.n // 4), f"reshaped by a computed shape: {z.shape}")

    m = case.replace(bias=False).model()
    m.graph.node[0].input.append("")
    check(mx.session(m).run(None, {"X": case.feed()})[0].shape == want.shape, "a trailing absent bias")


# --------------------------------------------------------------------------------------- act-matmul


def run_act(case: ActCase, declared: dict | None = None) -> np.ndarray:
    s = mx.session(case.model(declared), 2)
    return mx.run(s, case.values(), [case.dtype])[0]


SHAPES = (
    ((3, 100), (100, 17)),
    ((100,), (100, 17)),
    ((3, 100), (100,)),
    ((64,), (64,)),
    ((70,), (5, 70, 4)),
    ((5, 2, 70), (70,)),
    ((2, 4, 5, 64), (2, 4, 64, 33)),
    ((2, 4, 5, 64), (1, 64, 33)),
    ((2, 1, 5, 33), (3, 33, 8)),
    ((3, 40), (2, 1, 40, 8)),
    ((5, 1, 1), (5, 1, 1)),
    ((0, 3, 32), (32, 4)),
    ((2, 0, 32), (2, 32, 4)),
    ((2, 3, 32), (2, 32, 0)),
)


def act_cases() -> list[ActCase]:
    """Formats, types, NumPy's shapes, both ways round."""
    cases = [ActCase(a=a, b=b, transpose=turn, seed=i) for i, (a, b) in enumerate(SHAPES) for turn in (False, True)]
    for i, (fmt, dtype) in enumerate(itertools.product(FORMATS, DTYPES)):
        cases.append(ActCase(a_format=fmt, b_format=FORMATS[(i + 1) % len(FORMATS)], dtype=dtype, seed=i, alpha=0.125))
    for i, (rounding, rule, block) in enumerate(itertools.product(emu.ROUNDINGS, emu.SCALE_RULES, emu.BLOCK_SIZES)):
        fmt = FORMATS[i % len(FORMATS)]
        cases.append(ActCase(a_format=fmt, b_format=fmt, rounding=rounding, rule=rule, block=block, seed=i, transpose=i % 2))
    for fmt in ("bf16", "fp8_e4m3", "fp8_e5m2"):
        cases.append(ActCase(a_format=fmt, b_format=fmt, scale="none"))
    cases.append(ActCase(a=(2, 6, 67, 128), b=(2, 6, 128, 90), transpose=True, spread=1.0))
    return cases


def act_matmul() -> None:
    """MxActMatMul against float64 emulation; shape inference; errors."""
    cases = act_cases()
    worst = 0.0
    for case in cases:
        y, (want, size) = run_act(case), case.expected()
        check(y.shape == want.shape, f"shape {y.shape}, expected {want.shape}: {case}")
        if y.shape == want.shape and y.size:
            ratio = float((np.abs(y - want) / case.tolerance(want, size)).max())
            check(ratio <= 1.0, f"off by {ratio:.3g} tolerances: {case}")
            worst = max(worst, ratio)
        unknown = run_act(case, {"A": None, "B": None})
        check(np.array_equal(y, unknown), f"the same without declared shapes: {case}")
    print(f"{len(cases)} products, worst {worst:.3f} of the tolerance")

    # Shape inference: names go where the dimensions go.
    for a, b, turn, want in (
        (["n", "h", "s", 64], ["n", "h", 64, "t"], False, ["n", "h", "s", "t"]),
        (["n", "h", "s", 64], ["n", 1, "t", 64], True, ["n", "h", "s", "t"]),
        (["n", "s", 64], [64, 8], False, ["n", "s", 8]),
        ([64], ["n", 64, "t"], False, ["n", "t"]),
    ):
        got = mx.session(ActCase(transpose=turn).model({"A": a, "B": b})).get_outputs()[0].shape
        check(got == want, f"inferred shape {got}, expected {want}")

    for what, model, word in bad_act_models():
        try:
            mx.session(model)
            check(False, f"{what}: accepted")
        except Exception as error:  # noqa: BLE001
            check("layer.0/MxActMatMul" in str(error) and word in str(error), f"{what}: {error}")
    s = mx.session(ActCase().model({"A": None, "B": None}))
    good = ActCase().feeds()
    want = s.run(None, good)[0]
    for a, b in (((3, 5), (6, 4)), ((), (5,)), ((5,), ()), ((2, 0), (0, 3)), ((2, 3, 5), (3, 5, 4)), ((4,), (3,))):
        try:
            s.run(None, {"A": np.ones(a, np.float32), "B": np.ones(b, np.float32)})
            check(False, f"A {a} x B {b} was accepted")
        except Exception as error:  # noqa: BLE001
            check("layer.0/MxActMatMul" in str(error), f"A {a} x B {b}: {error}")
        check((s.run(None, good)[0] == want).all(), f"after A {a} x B {b}")


def bad_act_models():
    """(what, model, word of the message) for nodes that break the contract."""
    for name, value, word in (
        ("a_format", "fp7", "a_format"),
        ("a_format", None, "a_format"),
        ("a_format", 3, "a_format"),
        ("b_format", "bf16", "b_format"),
        ("block_size", 24, "block_size"),
        ("scale", "tensor", "scale"),
        ("rounding", "up", "rounding"),
        ("transpose_b", 2, "transpose_b"),
        ("transpose_b", "yes", "transpose_b"),
        ("alpha", float("inf"), "alpha"),
    ):
        m = ActCase().model()
        node = m.graph.node[0]
        kept = [a for a in node.attribute if a.name != name]
        del node.attribute[:]
        node.attribute.extend(kept)
        if value is not None:
            node.attribute.append(helper.make_attribute(name, value))
        yield f"{name} = {value}", m, word
    for what, shapes in {
        "another k": {"A": [2, 32], "B": [33, 4]},
        "batches that do not broadcast": {"A": [2, 2, 32], "B": [3, 32, 4]},
    }.items():
        yield what, ActCase().model(shapes), "B"


# ------------------------------------------------------------------------------------------- scores


def scores_model(dtype: str, baseline: bool, outputs: int, shape=("b", "s", "v")) -> onnx.ModelProto:
    t = mx.ONNX_TYPE[dtype]
    names = ["nll", "entropy", "top1", "kl", "baseline_nll"][:outputs]
    ins = ["logits", "labels"] + ["baseline"] * baseline
    infos = [
        helper.make_tensor_value_info(n, TensorProto.INT64 if n == "labels" else t, shape and (shape[:2] if n == "labels" else shape))
        for n in ins
    ]
    outs = [helper.make_tensor_value_info(n, TensorProto.INT64 if n == "top1" else TensorProto.FLOAT, None) for n in names]
    node = helper.make_node("TokenScores", ins, names, name="scores", domain="mx")
    return mx.model([node], infos, outs, [])


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def scores() -> None:
    """TokenScores against float64, masked rows, both forms, every type."""
    rng = np.random.default_rng(7)
    for dtype, v, baseline in itertools.product(DTYPES, (1, 7, 1000, 50257), (False, True)):
        shape = (2, 5, v)
        draw = lambda: mx.from_bits(mx.to_bits(rng.standard_normal(shape) * 4, dtype), dtype)
        logits, base = draw(), draw()
        labels = rng.integers(0, v, shape[:2])
        labels[0, 0], labels[1, 3:] = -100, -100
        keep = labels != -100
        s = mx.session(scores_model(dtype, baseline, 5 if baseline else 3), 2)
        feeds = {"logits": mx.value(mx.to_bits(logits, dtype), dtype), "labels": mx.value(labels, "int64")}
        if baseline:
            feeds["baseline"] = mx.value(mx.to_bits(base, dtype), dtype)
        kinds = ["float32", "float32", "int64", "float32", "float32"][: 5 if baseline else 3]
        got = mx.run(s, feeds, kinds)
        lp, lb = log_softmax(logits), log_softmax(base)
        at = np.where(keep, labels, 0)[..., None]
        want = [
            -np.take_along_axis(lp, at, -1)[..., 0],
            -(np.exp(lp) * lp).sum(-1),
            logits.argmax(-1),
            (np.exp(lb) * (lb - lp)).sum(-1),
            -np.take_along_axis(lb, at, -1)[..., 0],
        ]
        for name, g, w in zip(["nll", "entropy", "top1", "kl", "baseline_nll"], got, want):
            w = np.where(keep, w, 0)
            close = (g == w).all() if name == "top1" else np.allclose(g, w, rtol=2e-6, atol=2e-6)
            check(close, f"{name}, {dtype}, v = {v}: off by {np.abs(g - w).max():.3g}")
    # Without the last output, and nothing to score.
    feeds = {"logits": logits.astype(np.float32), "baseline": base.astype(np.float32), "labels": labels}
    got = mx.session(scores_model("float32", True, 4)).run(None, feeds)
    check(np.allclose(got[3], np.where(keep, want[3], 0), rtol=1e-2, atol=1e-2), "four outputs")
    none = mx.session(scores_model("float32", False, 3)).run(
        None, {"logits": np.zeros((0, 4, 9), np.float32), "labels": np.zeros((0, 4), np.int64)}
    )
    check(none[0].shape == (0, 4), "an empty batch")
    s = mx.session(scores_model("float32", False, 3, ("batch", 5, 11)))
    check(s.get_outputs()[0].shape == ["batch", 5], f"inferred shape is {s.get_outputs()[0].shape}")


# ------------------------------------------------------------------------------------------- errors


def errors() -> None:
    """Corrupt models: an exception that names the node, and the process lives on."""
    good, want = Case(), mx.run_case(Case())
    count = 0
    for what, m, word in broken_models():
        count += 1
        try:
            s = mx.session(m)
            s.run(None, {"X": Case(bias=True).feed()})
        except Exception as error:  # noqa: BLE001 - onnxruntime raises several types without a common base
            text = str(error)
            check("layer.0/MxMatMul" in text, f"{what}: the message does not name the node: {text[:300]}")
            check(word in text, f"{what}: the message does not speak of {word!r}: {text[:300]}")
            check(len(text) < 6000, f"{what}: a message of {len(text)} characters")
        else:
            check(False, f"{what}: accepted")
        check((mx.run_case(good) == want).all(), f"after {what}: a good model no longer runs")
    print(f"{count} corrupt models")


def compute_errors() -> None:
    """What only shows at run time: named, and the session goes on."""
    case = Case(k=32, n=4)
    m = case.model()
    m.graph.input[0].CopyFrom(helper.make_tensor_value_info("X", TensorProto.FLOAT, None))
    m.graph.output[0].CopyFrom(helper.make_tensor_value_info("Y", TensorProto.FLOAT, None))
    s = mx.session(m, 2)
    want = mx.run_case(case)
    for bad in (np.zeros((2, 31)), np.zeros((2, 33)), np.zeros(()), np.zeros((3, 0)), np.zeros((32, 1))):
        try:
            s.run(None, {"X": bad.astype(np.float32)})
            check(False, f"X of shape {bad.shape} was accepted")
        except Exception as error:  # noqa: BLE001
            check("layer.0/MxMatMul" in str(error) and "X" in str(error), f"X {bad.shape}: {error}")
        check((s.run(None, {"X": case.feed()})[0] == want).all(), f"after X {bad.shape}")

    d = dynamic_model(case, {"W.codes": None, "W.scales": None})
    s = mx.session(d)
    good = {"X": case.feed(), "W.codes": np.zeros((4, 32), np.uint8), "W.scales": np.zeros((4, 1), np.uint8)}
    s.run(None, good)
    for name, bad in (("W.codes", (4, 31)), ("W.codes", (3, 32)), ("W.codes", (128,)), ("W.codes", ()), ("W.codes", (0, 32)),
                      ("W.scales", (4,)), ("W.scales", (4, 2)), ("W.scales", (0, 0)), ("W.scales", ())):
        try:
            s.run(None, {**good, name: np.zeros(bad, np.uint8)})
            check(False, f"{name} of shape {bad} was accepted")
        except Exception as error:  # noqa: BLE001
            check("layer.0/MxMatMul" in str(error) and name[2:] in str(error), f"{name} {bad}: {error}")

    s = mx.session(scores_model("float32", False, 3, None))
    logits, labels = np.zeros((2, 3, 5), np.float32), np.zeros((2, 3), np.int64)
    for what, feeds in {
        "label past the vocabulary": {"labels": labels + 5},
        "negative label": {"labels": labels - 1},
        "smallest label": {"labels": labels + np.iinfo(np.int64).min},
        "labels of another shape": {"labels": np.zeros((3, 2), np.int64)},
        "labels of another rank": {"labels": np.zeros(6, np.int64)},
        "logits of another rank": {"logits": np.zeros((6, 5), np.float32)},
        "no vocabulary": {"logits": np.zeros((2, 3, 0), np.float32)},
    }.items():
        try:
            s.run(None, {"logits": logits, "labels": labels, **feeds})
            check(False, f"TokenScores: {what} was accepted")
        except Exception as error:  # noqa: BLE001
            check("scores" in str(error), f"{what}: {error}")
    check(np.allclose(s.run(None, {"logits": logits, "labels": labels})[0], np.log(5)), "TokenScores goes on")
    for baseline, outputs in ((False, 5), (False, 4)):
        try:
            mx.session(scores_model("float32", baseline, outputs)).run(None, {"logits": logits, "labels": labels})
            check(False, "kl without a baseline was accepted")
        except Exception as error:  # noqa: BLE001
            check("scores" in str(error) and "baseline" in str(error), f"kl without a baseline: {error}")


# ------------------------------------------------------------------------------------------ threads


def threads() -> None:
    """Eight threads on one session, errors among them; two sessions at once."""
    case = Case(n=200, k=320, shape=(9,))
    m = case.model()
    m.graph.input[0].CopyFrom(helper.make_tensor_value_info("X", TensorProto.FLOAT, ["m", "k"]))
    sessions = [mx.session(m, 2), mx.session(m, 1)]
    feeds = [case.replace(seed=i).feed() for i in range(8)]
    want = [sessions[0].run(None, {"X": x})[0] for x in feeds]
    wrong: list[str] = []

    def work(i: int) -> None:
        for turn in range(60):
            j = (i + turn) % 8
            s = sessions[(i * turn) % 2 if turn % 3 else 0]
            if (s.run(None, {"X": feeds[j]})[0] != want[j]).any():
                wrong.append(f"thread {i}, turn {turn}")
            if turn % 10 == i:
                try:
                    s.run(None, {"X": np.zeros((2, 7), np.float32)})
                    wrong.append("a wrong k was accepted")
                except Exception as error:  # noqa: BLE001
                    if "layer.0/MxMatMul" not in str(error):
                        wrong.append(str(error))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    check(not wrong, f"{len(wrong)} results differ: {wrong[:3]}")


def lifetime() -> None:
    """Options and sessions come and go; the library stays; threads end after the last session."""
    case, want = Case(), mx.run_case(Case())
    for _ in range(20):
        so = mx.options(2)
        data = case.model().SerializeToString()
        a = mx.ort.InferenceSession(data, so)
        b = mx.ort.InferenceSession(data, so)
        del so, a
        gc.collect()
        got = b.run(None, {"X": case.feed()})[0]
        check((got == want).all(), "a session outlives its options and its sibling")
        ended = threading.Thread(target=lambda: b.run(None, {"X": case.feed()}))
        ended.start()
        del b
        ended.join()
        gc.collect()
    # Twice on one options object, which ONNX Runtime would refuse: the library leaves it at once.
    so = mx.options()
    so.register_custom_ops_library(mx.LIBRARY)
    twice = mx.ort.InferenceSession(case.model().SerializeToString(), so)
    check((twice.run(None, {"X": case.feed()})[0] == want).all(), "registered twice")


AREAS = {
    "act-matmul": act_matmul,
    "values": values,
    "special": special,
    "inputs": inputs,
    "scores": scores,
    "errors": errors,
    "compute-errors": compute_errors,
    "threads": threads,
    "lifetime": lifetime,
}


def main() -> int:
    for area in sys.argv[1:] or AREAS:
        AREAS[area]()
    print(f"{CHECKS} checks, {len(FAILURES)} failed (onnxruntime {mx.ort.__version__})")
    return 1 if FAILURES or not CHECKS else 0


if __name__ == "__main__":
    sys.exit(main())
