"""The operators of libmx_custom_ops.so on ONNX Runtime's CUDA provider, from Python. Needs a GPU.

    MX_CUSTOM_OPS=target/release/libmx_custom_ops.so python tests/python/gpu_ops.py [AREA ...]
        [--devices 0,1] [--model REWRITTEN.onnx ...]

Needs onnxruntime-gpu, numpy, onnx and torch (for streams and free memory); everything runs without a
network. Each area prints one line; exit code 0 means that every check passed. Fallback is off in
every session, so a node that the CUDA provider does not take is an error.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from onnx.compose import add_prefix

import mx_nodes as mx
import test_custom_ops as cpu_tests
import test_experts as expert_tests
from broken_models import broken_models
from mx_nodes import ActCase, Case, emu, ort

FAILURES: list[str] = []
CHECKS = 0
NOTES: list[str] = []
DEVICES = [0]
MODELS: list[Path] = []


def check(good: bool, what: str) -> None:
    global CHECKS
    CHECKS += 1
    if not good:
        FAILURES.append(what)
        print(f"FAILED: {what}", flush=True)


def note(text: str) -> None:
    NOTES.append(text)


def session(m, device: int | None = None, cpu_nodes: bool = False, free: dict | None = None, **provider) -> ort.InferenceSession:
    """On the CUDA provider, without fallback of any kind: neither of nodes nor of the session."""
    so = mx.options(1)
    if cpu_nodes:
        so.enable_profiling, so.profile_file_prefix = True, str(Path(tempfile.gettempdir()) / "gpu_ops")
    else:
        so.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    for name, size in (free or {}).items():
        so.add_free_dimension_override_by_name(name, size)
    options = {"device_id": str(DEVICES[0] if device is None else device), "use_tf32": "0", **provider}
    data = str(m) if isinstance(m, Path) else m.SerializeToString()
    s = ort.InferenceSession(data, so, providers=[("CUDAExecutionProvider", options)], enable_fallback=0)
    if s.get_providers()[0] != "CUDAExecutionProvider":
        raise RuntimeError(f"no CUDA provider: {s.get_providers()}")
    return s


def merged(models: list[onnx.ModelProto]) -> onnx.ModelProto:
    """Many one-node models side by side in one: creating a session costs more than running it."""
    whole = mx.model([], [], [], [])
    for i, m in enumerate(models):
        part = add_prefix(m, f"c{i}/").graph
        whole.graph.node.extend(part.node)
        whole.graph.input.extend(part.input)
        whole.graph.output.extend(part.output)
        whole.graph.initializer.extend(part.initializer)
    return whole


def prepare(cases: list) -> list[tuple[onnx.ModelProto, dict, list[str]]]:
    """The cases in groups: a merged model, its feeds as OrtValues in host memory, the outputs' types."""
    groups = []
    for start in range(0, len(cases), 40):
        part = cases[start : start + 40]
        feeds = {}
        for i, case in enumerate(part):
            own = case.values() if isinstance(case, ActCase) else {"X": mx.value(case.feed(), case.dtype)}
            feeds.update({f"c{i}/{name}": v for name, v in own.items()})
        groups.append((merged([case.model() for case in part]), feeds, [case.dtype for case in part]))
    return groups


def run_groups(groups: list, make=None) -> list[np.ndarray]:
    """Every case's result, in sessions that `make` makes of models."""
    return [y for m, feeds, dtypes in groups for y in mx.run((make or session)(m), feeds, dtypes)]


def run_merged(cases: list, make=None) -> list[np.ndarray]:
    return run_groups(prepare(cases), make)


def on_fp8_tensor_cores(case) -> float:
    """What docs/cuda.md, "Numbers", adds to a case's error where it runs on fp8 tensor cores, as a share of
    the sum of magnitudes; for zero-mean data."""
    if not isinstance(case, Case) or case.scale != "tensor" or (case.weight, case.activation) != ("fp8_e4m3",) * 2:
        return 0.0
    return 2.0**-9 if case.n % 16 == 0 and torch.cuda.get_device_capability(DEVICES[0]) >= (8, 9) else 0.0


def against_cpu_and_emulation(cases: list, what: str) -> tuple[list, list[np.ndarray], list]:
    """Holds every case against float64 emulation and the CPU provider, and notes the worst; what was
    prepared, the results and the expected values with their magnitudes."""
    groups = prepare(cases)
    gpu, cpu = run_groups(groups), run_groups(groups, lambda m: mx.session(m, 4))
    expected = [case.expected() for case in cases]
    worst = 0.0
    for case, y, host, (want, size) in zip(cases, gpu, cpu, expected):
        check(y.shape == want.shape, f"shape {y.shape}, expected {want.shape}: {case}")
        if y.shape != want.shape or y.size == 0:
            continue
        bound = case.tolerance(want, size) + on_fp8_tensor_cores(case) * size
        ratio = float(np.max(np.abs(y - want) / bound))
        check(ratio <= 1.0, f"off by {ratio:.3g} tolerances: {case}")
        check(bool((np.abs(y - host) <= 2 * bound).all()), f"CPU and GPU differ by more than both may err: {case}")
        worst = max(worst, ratio)
    note(f"{len(cases)} {what}, worst {worst:.3f} of the tolerance")
    return groups, gpu, expected


def in_threads(*work) -> list[BaseException]:
    """Runs the functions at the same time; the exceptions they end with."""
    raised: list[BaseException] = []

    def guarded(f):
        try:
            f()
        except BaseException as error:  # noqa: BLE001 - a thread's exception would vanish
            raised.append(error)

    threads = [threading.Thread(target=guarded, args=(f,)) for f in work]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return raised


def open_model(case: Case) -> onnx.ModelProto:
    """The case's model with no shape of X and Y declared."""
    m = case.model()
    kind = mx.ONNX_TYPE[case.dtype]
    m.graph.input[0].CopyFrom(helper.make_tensor_value_info("X", kind, None))
    m.graph.output[0].CopyFrom(helper.make_tensor_value_info("Y", kind, None))
    return m


# ---------------------------------------------------------------------------------------------- values


def matmul() -> None:
    """MxMatMul: all formats, types, blocks, roundings, rules, bias, factors, tails, empty X."""
    against_cpu_and_emulation(cpu_tests.value_cases(), "products")


def regimes() -> None:
    """Every regime of M, against the bound for zero-mean random data too; the same bits again."""
    shapes = ((96, 100), (576, 576), (100, 1536), (1536, 576))
    cases = []
    for i, (m, fmt) in enumerate(itertools.product((1, 2, 7, 16, 33, 64, 200, 1024), cpu_tests.FORMATS)):
        n, k = shapes[i % len(shapes)]
        dtype = cpu_tests.DTYPES[i % 3]
        base = Case(n=n, k=k, weight=fmt, activation=fmt, shape=(m,), spread=0.0, seed=i)
        cases += [base, base.replace(dtype=dtype, activation="none"), base.replace(dtype=dtype, bias=True)]
    groups, first, expected = against_cpu_and_emulation(cases, "products")
    tight = 0.0
    for case, y, (want, size) in zip(cases, first, expected):
        if case.dtype == "float32" and not case.bias:
            bound = 2.0**-18 * size + np.abs(want) * 2.0**-24 + 2.0**-126
            tight = max(tight, float(np.max(np.abs(y - want) / bound)))
    check(tight <= 1.0, f"zero-mean random data: {tight:.3g} times 2^-18 of the magnitudes")
    for turn in range(2):
        again = run_groups(groups)
        same = sum(np.array_equal(a, b) for a, b in zip(first, again))
        check(same == len(cases), f"repetition {turn}: {same} of {len(cases)} results have the same bits")
    note(f"random data {tight:.3f} of 2^-18")


def special() -> None:
    """NaN and Inf blocks, zeros, scales far outside of float32, float16's overflow."""
    for shape in ((4,), (40,), (300,)):
        for fmt in ("fp8_e4m3", "fp6_e3m2", "fp4_e2m1", "mxint8"):
            case = Case(n=40, k=96, shape=shape, weight=fmt, activation=fmt)
            x = case.data()[0].copy()
            x[0, 40], x[1, 0], x[2, :] = np.nan, np.inf, 0.0
            m = case.model()
            scales = np.frombuffer(m.graph.initializer[1].raw_data, np.uint8).reshape(40, 3).copy()
            scales[7, 1] = 255
            m.graph.initializer[1].raw_data = scales.tobytes()
            feeds = {"X": mx.value(mx.to_bits(x, "float32"), "float32")}
            y = mx.run(session(m), feeds, ["float32"])[0]
            host = mx.run(mx.session(m), feeds, ["float32"])[0]
            what = f"{fmt}, {shape[0]} rows"
            check(np.array_equal(np.isnan(y), np.isnan(host)), f"{what}: NaN where the CPU has it")
            check(np.isnan(y[:2]).all() and np.isnan(y[:, 7]).all(), f"{what}: NaN blocks of X and W")
            rest = np.delete(y[3:], 7, axis=1)
            check(bool(np.isfinite(rest).all() and (np.delete(y[2], 7) == 0).all()), f"{what}: NaN stays where it was")
    for up, rows in itertools.product((100, -100), (2, 70)):
        big = Case(k=64, shape=(rows,))
        x, w, _ = big.data()
        codes, scales = emu.packed(np.ldexp(w, -up), big.spec(big.weight))
        m = big.model()
        m.graph.initializer[0].raw_data, m.graph.initializer[1].raw_data = codes.tobytes(), scales.tobytes()
        feeds = {"X": mx.value(np.ldexp(x, up).astype(np.float32), "float32")}
        y = mx.run(session(m), feeds, ["float32"])[0]
        want, size = big.expected()
        ok = (np.abs(y - want) <= big.tolerance(want, size)).all()
        check(bool(ok), f"{rows} rows: scales of 2^{up} and 2^{-up} cancel")
    half = Case(dtype="float16", alpha=2.0**15)
    y, want = run_merged([half])[0], half.expected()[0]
    check(bool(np.isinf(y[np.abs(want) > 70000]).all()), "results past float16's range are infinite")


def act_matmul() -> None:
    """MxActMatMul: formats, types, NumPy's shapes, both ways round; the same bits again."""
    cases = cpu_tests.act_cases()
    groups, first, _ = against_cpu_and_emulation(cases, "products")
    again = run_groups(groups)
    check(all(np.array_equal(a, b) for a, b in zip(first, again)), "the same bits again")


def experts() -> None:
    """MxExpertMatMul: values and shapes against the emulation; stacks that cannot be addressed; bad indices."""
    cases = expert_tests.value_cases() + [expert_tests.ExpertCase(x=x, index=index) for x, index in expert_tests.SHAPES]
    worst, refused = 0.0, 0
    for case in cases:
        size = 4 if case.dtype == "float32" else 2
        bits = emu.ELEMENTS[case.weight].bits
        width = -(-case.k // case.block) * case.block
        codes, scales = case.n * width * bits // 8, case.n * -(-case.k // case.block) * (case.scale == "e8m0")
        if case.n * size % 16 or codes % 16 or scales % 4:
            refused += 1
            try:
                session(case.model())
                check(False, f"accepted: {case}")
            except Exception as error:  # noqa: BLE001
                check(expert_tests.NODE in str(error) and "multiples of 16" in str(error), f"{case}: {str(error)[:300]}")
            continue
        y, (want, total) = mx.run(session(case.model()), case.feeds(), [case.dtype])[0], case.expected()
        check(y.shape == want.shape, f"shape {y.shape}, expected {want.shape}: {case}")
        if y.shape == want.shape and y.size:
            ratio = float((np.abs(y - want) / Case(k=case.k, dtype=case.dtype).tolerance(want, total)).max())
            check(ratio <= 1.0, f"off by {ratio:.3g} tolerances: {case}")
            worst = max(worst, ratio)
    note(f"{len(cases) - refused} cases, worst {worst:.3f} of the tolerance, {refused} refused")
    case = expert_tests.ExpertCase()
    s, good = session(case.model()), case.feeds()
    first = mx.run(s, good, ["float32"])[0]
    try:
        s.run_with_ort_values(None, {**good, "I": mx.value(np.array([0, 5, 1]), "int64")})
        check(False, "index 5 of 5 experts was accepted")
    except Exception as error:  # noqa: BLE001
        check(expert_tests.NODE in str(error) and "-5 to 4" in str(error), f"index 5: {str(error)[:300]}")
    check(np.array_equal(mx.run(s, good, ["float32"])[0], first), "the same bits again, after an error")
    # An index that was computed on the device comes to the host by itself.
    m = case.model()
    m.graph.node[0].input[1] = "J"
    m.graph.node.insert(0, helper.make_node("Neg", ["I"], ["K"]))
    m.graph.node.insert(1, helper.make_node("Neg", ["K"], ["J"]))
    check(np.array_equal(mx.run(session(m), good, ["float32"])[0], first), "an index made on the device")


# ---------------------------------------------------------------------------------------------- scores


def scores() -> None:
    """TokenScores with logits that never leave the device, against float64; masks, baselines, NaN."""
    rng = np.random.default_rng(7)
    for dtype, v, baseline in itertools.product(cpu_tests.DTYPES, (1, 7, 1000, 50257), (False, True)):
        shape = (2, 5, v)
        draw = lambda: mx.to_bits(rng.standard_normal(shape) * 4, dtype)
        names = ["logits"] + ["baseline"] * baseline
        bits = {name: draw() for name in names}
        labels = rng.integers(0, v, shape[:2])
        labels[0, 0], labels[1, 3:] = -100, -100
        s = session(cpu_tests.scores_model(dtype, baseline, 5 if baseline else 3))
        io = s.io_binding()
        kept = [on_device(b, dtype) for b in bits.values()]
        for name, t in zip(names, kept):
            io.bind_input(name, "cuda", DEVICES[0], mx.ONNX_TYPE[dtype], list(t.shape), t.data_ptr())
        io.bind_ortvalue_input("labels", ort.OrtValue.ortvalue_from_numpy(labels, "cuda", DEVICES[0]))
        for out in s.get_outputs():
            io.bind_output(out.name, "cuda", DEVICES[0])
        s.run_with_iobinding(io)
        got = [out.numpy() for out in io.get_outputs()]
        host = mx.session(cpu_tests.scores_model(dtype, baseline, 5 if baseline else 3))
        feeds = {name: mx.value(b, dtype) for name, b in bits.items()} | {"labels": mx.value(labels, "int64")}
        kinds = ["float32", "float32", "int64", "float32", "float32"][: len(got)]
        for out, g, w in zip(s.get_outputs(), got, mx.run(host, feeds, kinds)):
            close = (g == w).all() if out.name == "top1" else np.allclose(g, w, rtol=2e-6, atol=2e-6)
            check(bool(close), f"{out.name}, {dtype}, v = {v}: off by {np.abs(g - w).max():.3g}")
    logits = np.zeros((1, 3, 9), np.float32)
    logits[0, 1, 4] = np.nan
    s = session(cpu_tests.scores_model("float32", False, 3))
    nll, entropy, top1 = s.run(None, {"logits": logits, "labels": np.array([[2, 2, 9]], np.int64)})
    check(bool(np.isfinite(nll[0, 0]) and np.isnan(nll[0, 1]) and np.isnan(entropy[0, 1])), "a row with NaN scores NaN")
    check(top1[0, 1] == -1 and np.isnan(nll[0, 2]), "a label outside the vocabulary scores NaN")
    none = s.run(None, {"logits": np.zeros((0, 4, 9), np.float32), "labels": np.zeros((0, 4), np.int64)})
    check(none[0].shape == (0, 4), "an empty batch")
    four = session(cpu_tests.scores_model("float32", True, 4))
    got = four.run(None, {"logits": logits, "baseline": logits, "labels": np.zeros((1, 3), np.int64)})
    check(bool(np.allclose(got[3][0, [0, 2]], 0, atol=1e-6)), "kl without the baseline's nll")


def on_device(bits: np.ndarray, dtype: str, device: int | None = None) -> torch.Tensor:
    """The bits as a torch tensor of the device; bfloat16 as its 16-bit pattern."""
    t = torch.from_numpy(np.ascontiguousarray(bits).view(np.int16) if dtype == "bfloat16" else np.ascontiguousarray(bits))
    return t.to(f"cuda:{DEVICES[0] if device is None else device}")


# ------------------------------------------------------------------------------------ streams and graphs


def graphs() -> None:
    """CUDA graphs: captured, replayed on new inputs, the same bits as without."""
    def ends(case, device):
        if isinstance(case, ActCase):
            y = case.expected()[0]
            return {n: on_device(b, case.dtype) for n, b in case.feeds().items()}, list(y.shape)
        return {"X": on_device(case.feed(), case.dtype)}, [*case.shape, case.n]

    cases: list = [Case(n=200, k=320, shape=(m,), weight=f, activation=f, bias=True, dtype=d)
                   for (m, f), d in zip(itertools.product((1, 5, 40, 200), ("fp8_e4m3", "fp4_e2m1", "fp6_e3m2")),
                                        itertools.cycle(cpu_tests.DTYPES))]
    cases += [ActCase(a=(4, 20, 64), b=(4, 64, 33), dtype=d) for d in cpu_tests.DTYPES]
    for case in cases:
        kind = mx.ONNX_TYPE[case.dtype]
        feeds, shape = ends(case, DEVICES[0])
        width = torch.float32 if case.dtype == "float32" else torch.int16
        y = torch.zeros(shape, dtype=width, device=f"cuda:{DEVICES[0]}")

        def bound(s):
            io = s.io_binding()
            for name, t in feeds.items():
                io.bind_input(name, "cuda", DEVICES[0], kind, list(t.shape), t.data_ptr())
            io.bind_output("Y", "cuda", DEVICES[0], kind, shape, y.data_ptr())
            return io

        as_bits = lambda t: (t.view(torch.int16) if t.element_size() == 2 else t)
        plain, graph = session(case.model()), session(case.model(), enable_cuda_graph="1")
        plain_io, graph_io = bound(plain), bound(graph)
        for turn in range(4):
            fresh = ends(case.replace(seed=turn), DEVICES[0])[0]
            for name, t in feeds.items():
                as_bits(t).copy_(as_bits(fresh[name]))
            torch.cuda.synchronize(DEVICES[0])
            plain.run_with_iobinding(plain_io)
            want = y.clone()
            y.fill_(-1)
            torch.cuda.synchronize(DEVICES[0])
            graph.run_with_iobinding(graph_io)
            torch.cuda.synchronize(DEVICES[0])
            check(bool((as_bits(y) == as_bits(want)).all()), f"graph, turn {turn}: {case}")
    note(f"{len(cases)} graphs, 4 turns each")


def threads() -> None:
    """One session in four threads, two sessions in two, with shapes that change: the same bits."""
    case = Case(n=320, k=640, shape=(9,), weight="fp6_e3m2", activation="fp8_e4m3")
    one, other = session(open_model(case)), session(open_model(case.replace(weight="fp4_e2m1")))
    rows = (1, 3, 9, 40, 70, 200, 300, 513)
    feeds = [case.replace(seed=i, shape=(m,)).feed() for i, m in enumerate(rows)]
    want = {id(s): [s.run(None, {"X": x})[0] for x in feeds] for s in (one, other)}
    wrong: list[str] = []

    def work(i: int, s) -> None:
        for turn in range(80):
            j = (i * 3 + turn) % len(feeds)
            if not np.array_equal(s.run(None, {"X": feeds[j]})[0], want[id(s)][j]):
                wrong.append(f"thread {i}, turn {turn}, {rows[j]} rows")

    raised = in_threads(*[lambda i=i: work(i, one) for i in range(4)])
    check(not wrong and not raised, f"one session, four threads: {wrong[:3]} {raised[:1]}")
    wrong.clear()
    raised = in_threads(lambda: work(0, one), lambda: work(1, other))
    check(not wrong and not raised, f"two sessions, two threads: {wrong[:3]} {raised[:1]}")


def streams() -> None:
    """A caller's stream: work is ordered on it without waiting; two sessions and two threads share it."""
    case = Case(n=256, k=512, shape=(64,), bias=True)
    device = f"cuda:{DEVICES[0]}"
    x = on_device(case.feed(), "float32")
    plain = session(case.model())
    stream = torch.cuda.Stream(device=device)
    own = {"user_compute_stream": str(stream.cuda_stream)}
    sessions = [session(case.model(), **own), session(case.model(), **own)]
    later = ort.RunOptions()
    later.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def product(s, x, y, options=None):
        io = s.io_binding()
        io.bind_input("X", "cuda", DEVICES[0], TensorProto.FLOAT, [64, 512], x.data_ptr())
        io.bind_output("Y", "cuda", DEVICES[0], TensorProto.FLOAT, [64, 256], y.data_ptr())
        s.run_with_iobinding(io, options)

    want = torch.zeros(64, 256, device=device)
    product(plain, 2 * x, want)
    torch.cuda.synchronize(DEVICES[0])
    slow = torch.randn(3000, 3000, device=device)

    def ordered(s, turns):
        good = True
        with torch.cuda.stream(stream):
            for _ in range(turns):
                y = torch.full((64, 256), -1.0, device=device)
                busy = slow @ slow @ slow
                # The input is computed on the stream, and still is while the product is enqueued.
                product(s, x * 2 + 0 * busy[0, 0].nan_to_num(0, 0, 0), y, later)
                good &= bool((y == want).all())
        return good

    stream.wait_stream(torch.cuda.current_stream(device))
    check(ordered(sessions[0], 5), "inputs and outputs are ordered on the caller's stream")
    results: list[bool] = []
    raised = in_threads(*[lambda s=s: results.append(ordered(s, 20)) for s in sessions + sessions[:1]])
    check(results == [True] * 3 and not raised, f"three threads share a stream: {results} {raised[:1]}")


def steady() -> None:
    """No device memory is allocated once every shape has been seen; sessions give theirs back."""
    case = Case(n=512, k=1024, shape=(1,), weight="fp4_e2m1")
    free = lambda: torch.cuda.mem_get_info(DEVICES[0])[0]
    feeds = [case.replace(shape=(m,)).feed() for m in (1, 16, 100, 400)]
    s = session(open_model(case))
    for x in feeds * 2:
        s.run(None, {"X": x})
    before = free()
    for x in feeds * 50:
        s.run(None, {"X": x})
    check(free() == before, f"200 runs took {before - free()} bytes")
    del s
    large = case.replace(shape=(6000,)).feed()
    levels = []
    for _ in range(4):
        s = session(open_model(case))
        s.run(None, {"X": large})
        del s
        levels.append(free())
    check(levels[-1] >= levels[0], f"four sessions in a row kept memory: {levels}")


def memory() -> None:
    """Out of memory at any point of a run is an exception, and the session goes on."""
    case = Case(n=64, k=4096, shape=(1,), weight="fp4_e2m1")
    small, failed, worked = case.feed(), 0, 0
    want = run_merged([case])[0]
    s = session(open_model(case), gpu_mem_limit=str(12 << 20), arena_extend_strategy="kSameAsRequested")
    for rows in range(16, 1500, 48):
        x = np.ones((rows, case.k), np.float32)
        try:
            s.run(None, {"X": x})
            worked += 1
        except Exception:  # noqa: BLE001 - the type is ONNX Runtime's choice
            failed += 1
        if rows % 5 == 0:
            check(np.array_equal(s.run(None, {"X": small})[0], want), f"after {rows} rows")
    check(worked > 0 and failed > 0, f"{worked} runs fit, {failed} did not")
    note(f"{worked} sizes fit into 12 MiB, {failed} did not")


# --------------------------------------------------------------------------------------------- errors


def errors() -> None:
    """Corrupt models and inputs: an exception that names the node, and the process lives on."""
    good = Case()
    want = run_merged([good])[0]
    count = 0
    models = [(w, m, "layer.0/MxMatMul") for w, m, _ in broken_models()]
    models += [(w, m, "layer.0/MxActMatMul") for w, m, _ in cpu_tests.bad_act_models()]
    for what, m, node in models:
        count += 1
        try:
            s = session(m)
            s.run(None, {i.name: np.zeros([2, 3, 100], np.float32) for i in s.get_inputs()})
        except Exception as error:  # noqa: BLE001
            check(node in str(error), f"{what}: the message does not name the node: {str(error)[:300]}")
        else:
            check(False, f"{what}: accepted")
    s = session(open_model(good))
    for bad in ((2, 99), (2, 101), (), (3, 0), (100, 1)):
        try:
            s.run(None, {"X": np.zeros(bad, np.float32)})
            check(False, f"X of shape {bad} was accepted")
        except Exception as error:  # noqa: BLE001
            check("layer.0/MxMatMul" in str(error) and "X" in str(error), f"X {bad}: {str(error)[:300]}")
        check(np.array_equal(s.run(None, {"X": good.feed()})[0], want), f"after X {bad}")
    s = session(cpu_tests.scores_model("float32", False, 3, None))
    for shapes in (((2, 3, 5), (3, 2)), ((6, 5), (2, 3)), ((2, 3, 0), (2, 3))):
        try:
            s.run(None, {"logits": np.zeros(shapes[0], np.float32), "labels": np.zeros(shapes[1], np.int64)})
            check(False, f"TokenScores: {shapes} was accepted")
        except Exception as error:  # noqa: BLE001
            check("scores" in str(error), f"TokenScores: {shapes}: {str(error)[:300]}")
    # An address between two vectors: refused, not a fault that ends the device's context.
    x = on_device(np.zeros(1000, np.float32), "float32")
    io = (s := session(open_model(good))).io_binding()
    io.bind_input("X", "cuda", DEVICES[0], TensorProto.FLOAT, [2, 100], x.data_ptr() + 4)
    io.bind_output("Y", "cuda", DEVICES[0])
    try:
        s.run_with_iobinding(io)
        note("X at an odd address runs")
    except Exception as error:  # noqa: BLE001
        check("aligned" in str(error) and "layer.0/MxMatMul" in str(error), f"an odd address: {str(error)[:300]}")
    check(np.array_equal(s.run(None, {"X": good.feed()})[0], want), "after an odd address")
    note(f"{count} corrupt models")


# -------------------------------------------------------------------------------------------- devices


def devices() -> None:
    """Every device gives the same bits, also when all of them work at once."""
    cases = [Case(n=300, k=640, shape=(m,), weight=f, activation=f, bias=True)
             for m, f in itertools.product((1, 8, 50, 300), cpu_tests.FORMATS)]
    cases += [ActCase(a=(4, 20, 64), b=(4, 64, 33))]
    results: dict[int, list[np.ndarray]] = {}
    raised = in_threads(*[lambda d=d: results.update({d: run_merged(cases, lambda m: session(m, d))}) for d in DEVICES])
    check(not raised, f"all devices at once: {raised[:1]}")
    for d, got in results.items():
        same = sum(np.array_equal(a, b) for a, b in zip(results[DEVICES[0]], got))
        check(same == len(cases), f"device {d}: {same} of {len(cases)} results have device {DEVICES[0]}'s bits")
    note(f"devices {DEVICES}" + ("" if len(DEVICES) > 1 else ": the comparison of two was skipped, one was given"))


def models() -> None:
    """Rewritten models: every node on the CUDA provider once the shapes are fixed, close to the CPU."""
    if not MODELS:
        note("skipped: no --model given")
    for path in MODELS:
        on_cpu = ort.InferenceSession(str(path), mx.options(4), providers=["CPUExecutionProvider"])
        sizes = {d: 1 if "batch" in d else 16 for i in on_cpu.get_inputs() for d in i.shape if isinstance(d, str)}
        rng, feeds = np.random.default_rng(1), {}
        for i in on_cpu.get_inputs():
            shape = [sizes.get(d, d) for d in i.shape]
            if "past" in i.name and len(shape) == 4:
                sizes.update({d: 0 for d in i.shape[2:3] if isinstance(d, str) and d not in ("batch_size", "sequence_length")})
                shape[2] = 0
            kind = {"tensor(int64)": np.int64, "tensor(float16)": np.float16, "tensor(bool)": np.bool_}.get(i.type, np.float32)
            if "ids" in i.name and "position" not in i.name:
                feeds[i.name] = rng.integers(0, 100, shape).astype(kind)
            elif "position" in i.name:
                feeds[i.name] = np.broadcast_to(np.arange(shape[-1]), shape).astype(kind)
            else:
                feeds[i.name] = np.ones(shape, kind)
        want = on_cpu.run(None, feeds)[0].astype(np.float64)
        for how, free in (("as it is", {}), ("with fixed shapes", sizes)):
            try:
                s = session(path, free=free)
                note(f"{path.name} {how}: every node on the GPU")
            except Exception as error:  # noqa: BLE001
                check("fallback" in str(error), f"{path.name}: {str(error)[:300]}")
                s = session(path, cpu_nodes=True, free=free)
                note(f"{path.name} {how}: on the CPU stay {cpu_nodes(s, feeds)}")
            got = s.run(None, feeds)[0].astype(np.float64)
            # Rounding of an activation may fall the other way, which moves single outputs.
            off = float(np.linalg.norm(got - want) / np.linalg.norm(want))
            check(off < 2e-2, f"{path.name} {how}: off by {off:.3g} of the CPU's output")
            note(f"off by {off:.2g} of the CPU's output")


def cpu_nodes(s: ort.InferenceSession, feeds: dict) -> str:
    """Kinds of nodes that a session runs on the CPU provider, with their number."""
    s.run(None, feeds)
    events = json.loads(Path(s.end_profiling()).read_text())
    kinds = Counter(e["args"]["op_name"] for e in events if e.get("args", {}).get("provider") == "CPUExecutionProvider")
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))


AREAS = dict(
    matmul=matmul,
    regimes=regimes,
    special=special,
    act_matmul=act_matmul,
    experts=experts,
    scores=scores,
    graphs=graphs,
    threads=threads,
    streams=streams,
    steady=steady,
    memory=memory,
    errors=errors,
    devices=devices,
    models=models,
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("areas", nargs="*", metavar="AREA", help=f"of {', '.join(AREAS)}; all when none is named")
    parser.add_argument("--devices", default="0", help="CUDA ordinals, the first does most of the work")
    parser.add_argument("--model", type=Path, action="append", default=[], help="a rewritten model to run")
    args = parser.parse_args()
    unknown = set(args.areas) - set(AREAS)
    if unknown:
        parser.error(f"no area {', '.join(sorted(unknown))}; there are {', '.join(AREAS)}")
    DEVICES[:] = [int(d) for d in args.devices.split(",")]
    MODELS[:] = args.model
    if hasattr(ort, "preload_dlls"):
        ort.preload_dlls()
    print(f"onnxruntime {ort.__version__}, {torch.cuda.get_device_name(DEVICES[0])}", flush=True)
    for area in args.areas or AREAS:
        checks, failed, start = CHECKS, len(FAILURES), time.monotonic()
        NOTES.clear()
        try:
            AREAS[area]()
        except Exception as error:  # noqa: BLE001 - the other areas still say something
            check(False, f"{area}: {type(error).__name__}: {str(error)[:2000]}")
        bad, seconds = len(FAILURES) - failed, time.monotonic() - start
        verdict = "ok" if bad == 0 else f"{bad} FAILED"
        print(f"{area}: {CHECKS - checks} checks, {verdict}, {seconds:.1f} s; {'; '.join(NOTES)}", flush=True)
    print(f"{CHECKS} checks, {len(FAILURES)} failed")
    return 1 if FAILURES or not CHECKS else 0


if __name__ == "__main__":
    sys.exit(main())
