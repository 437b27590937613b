#!/usr/bin/env python3
"""The Python package, as a user meets it: `PYTHONPATH` leads to a folder with `mxrewrite/` in it (or it is installed).

    python3 tests/python/test_package.py [PART ...]
"""

from __future__ import annotations

import gc
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
import mx_emulation as emu  # noqa: E402

import mxrewrite  # noqa: E402

MODEL = ROOT / "fixtures/tinylm/dynamo/model.onnx"
PILE = ROOT / "fixtures/mini_pile.parquet"
FEED = {"input_ids": np.array([[1, 15, 27, 3]], np.int64), "attention_mask": np.ones((1, 4), np.int64)}


def raises(kind: type[Exception], needle: str, call) -> Exception:
    """The exception of a call that has to fail with it."""
    try:
        result = call()
    except Exception as error:
        assert type(error) is kind, f"{type(error).__name__} in place of {kind.__name__}: {error}"
        assert needle in str(error), f"{needle!r} is not in: {error}"
        assert "\n" not in str(error), error
        return error
    raise AssertionError(f"no {kind.__name__}, but {result!r}")


def test_import() -> None:
    """Importing is cheap: no onnxruntime, no subprocess."""
    code = "import sys, mxrewrite; sys.exit('onnxruntime' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    missing = [name for name in mxrewrite.__all__ if not hasattr(mxrewrite, name)]
    assert not missing, missing
    undocumented = [n for n in mxrewrite.__all__ if callable(getattr(mxrewrite, n)) and not getattr(mxrewrite, n).__doc__]
    assert not undocumented, undocumented


def test_plan() -> None:
    plan = mxrewrite.plan(MODEL, tier="a", format="fp4_e2m1")
    assert len(plan.sites) == 15 and all(".mlp." in (site.module_path or "") for site in plan.sites)
    site = plan.sites[0]
    assert (site.weight_format, site.activation_format) == ("fp4_e2m1", "fp4_e2m1")
    assert site.bytes_after == site.n * -(-site.k // 32) * 17 and site.bytes_before == site.n * site.k * 4
    assert plan.bytes_after == sum(s.bytes_after for s in plan.sites) < plan.bytes_before
    assert site.expected_sqnr_db is None and plan.skipped and all(s.reason for s in plan.skipped)
    measured = mxrewrite.plan(MODEL, tier="a", format="fp4_e2m1", sqnr=True)
    assert 10 < (measured.sites[0].expected_sqnr_db or 0) < 30, measured.sites[0]
    fewer = mxrewrite.plan(MODEL, tier="a", exclude=[r"layers\.0\."])
    assert len(fewer.sites) == 12


def test_rewrite(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = mxrewrite.rewrite(
        MODEL, folder / "m.onnx", tier="a", activation_format="none", progress=lambda done, total: seen.append((done, total))
    )
    assert report.output == folder / "m.onnx" and report.sites == 15 == len(report.plan.sites)
    assert report.weight_bytes_after < report.weight_bytes_before and report.bytes > report.weight_bytes_after
    assert report.data and report.data.is_file()
    totals = {total for _, total in seen}
    assert len(totals) == 1 and seen[0][0] == 0 and len(seen) > 30, seen[:3]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen) and seen[-1][0] == totals.pop()
    # A recipe out of a plan makes the same bytes.
    again = mxrewrite.rewrite(MODEL, folder / "again.onnx", recipe=report.plan.recipe)
    assert again.data and again.data.read_bytes() == report.data.read_bytes()
    by_file = mxrewrite.rewrite(MODEL, folder / "by_file.onnx", recipe=report.output)
    assert by_file.data and by_file.data.read_bytes() == report.data.read_bytes()
    default = mxrewrite.rewrite(_copy(folder / "in"), tier="d")
    assert default.output == folder / "in/model.d-mx.onnx" and default.output.is_file()


def _copy(folder: Path) -> Path:
    folder.mkdir()
    for name in ("model.onnx", "model.onnx.data"):
        (folder / name).write_bytes((MODEL.parent / name).read_bytes())
    return folder / "model.onnx"


def test_errors(folder: Path) -> None:
    raises(mxrewrite.UsageError, "fp9", lambda: mxrewrite.plan(MODEL, format="fp9"))
    raises(mxrewrite.UsageError, "tier", lambda: mxrewrite.plan(MODEL, tier="z"))
    raises(mxrewrite.UsageError, "recipe", lambda: mxrewrite.plan(MODEL, tier="a", recipe="tier-c"))
    raises(mxrewrite.UsageError, "(", lambda: mxrewrite.plan(MODEL, include=["("]))
    raises(mxrewrite.UsageError, "list", lambda: mxrewrite.plan(MODEL, include="lm_head"))
    raises(mxrewrite.UsageError, "tier c", lambda: mxrewrite.plan(MODEL, tier="c", format="fp4_e2m1"))
    nothing = raises(mxrewrite.NothingToReplaceError, "nothing", lambda: mxrewrite.plan(MODEL, tier="a", exclude=["."]))
    assert len(nothing.candidates) == 46 and nothing.candidates[0].keys() >= {"node", "op", "reason"}
    assert pickle.loads(pickle.dumps(nothing)).candidates == nothing.candidates
    assert not mxrewrite.plan(MODEL, tier="a", exclude=["."], allow_empty=True).sites
    raises(mxrewrite.ModelError, "gone.onnx", lambda: mxrewrite.plan(folder / "gone.onnx"))
    (folder / "text.onnx").write_text("not a model")
    raises(mxrewrite.ModelError, "text.onnx", lambda: mxrewrite.rewrite(folder / "text.onnx"))
    (folder / "there.onnx").write_text("mine")
    raises(mxrewrite.ModelError, "exists", lambda: mxrewrite.rewrite(MODEL, folder / "there.onnx"))
    assert (folder / "there.onnx").read_text() == "mine"

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise RuntimeError("enough")

    raises(RuntimeError, "enough", lambda: mxrewrite.rewrite(MODEL, folder / "stopped.onnx", progress=stop))
    left = sorted(path.name for path in folder.iterdir())
    assert left == ["text.onnx", "there.onnx"], left


def test_interrupt(folder: Path) -> None:
    """Ctrl-C is KeyboardInterrupt, also where Python code does not run, and leaves nothing."""
    code = (
        "import os, signal, sys, mxrewrite\n"
        # Python leaves the signal ignored where it was started so, as by a shell in the background.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def once(done, total):\n"
        "    if done == 0: os.kill(os.getpid(), signal.SIGINT)\n"
        "try:\n"
        "    mxrewrite.rewrite(sys.argv[1], sys.argv[2], progress=once)\n"
        "except KeyboardInterrupt:\n"
        "    sys.exit(42)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(MODEL), str(folder / "out.onnx")])
    assert done.returncode == 42, done
    assert not list(folder.iterdir()), list(folder.iterdir())


def test_numbers() -> None:
    """Codes, scales and values against the NumPy emulation, which shares no code with the kernels."""
    rng = np.random.default_rng(int.from_bytes(os.urandom(4), "little"))
    checked = 0
    for fmt in mxrewrite.FORMATS:
        for block, rounding, rule in ((32, "even", "floor"), (16, "nearest", "ceil"), (64, "floor", "rceil")):
            x = rng.standard_normal((2, 3, 77)).astype(np.float32) * np.exp2(rng.integers(-60, 60, (2, 3, 77)) / 8)
            x = x.astype(np.float32)
            x[0, 0, :16] = 0
            x[1, 2, 5] = np.nan
            spec = emu.Spec(fmt, block, rounding, rule)
            codes, scales = emu.packed(x.reshape(6, 77), spec)
            made = mxrewrite.quantize(x, fmt, block_size=block, rounding=rounding, scale_rule=rule)
            assert made.shape == x.shape and made.codes.shape[:-1] == (2, 3) and made.codes.dtype == np.uint8
            assert np.array_equal(made.codes.reshape(6, -1), codes), (fmt, block)
            assert np.array_equal(made.scales.reshape(6, -1), scales), (fmt, block)
            expected = emu.fake_quantize(x.reshape(6, 77), spec)
            assert np.array_equal(made.dequantize().reshape(6, 77), expected, equal_nan=True), (fmt, block)
            unpacked = emu.unpack(codes, fmt).reshape(6, -1)[:, :77]
            assert np.array_equal(made.unpacked().reshape(6, 77), unpacked), (fmt, block)
            checked += x.size
    half = rng.standard_normal((4, 64)).astype(np.float16)
    a, b = mxrewrite.quantize(half, "fp8_e4m3"), mxrewrite.quantize(half.astype(np.float32), "fp8_e4m3")
    assert np.array_equal(a.codes, b.codes) and np.array_equal(a.scales, b.scales)
    strided = rng.standard_normal((64, 8)).astype(np.float32)
    a, b = mxrewrite.quantize(strided.T, "fp4_e2m1"), mxrewrite.quantize(strided.T.copy(), "fp4_e2m1")
    assert np.array_equal(a.codes, b.codes)
    assert mxrewrite.quantize(np.ones(32, np.float32), "fp4_e2m1").nbytes == 17
    whole = mxrewrite.dequantize(a.codes, a.scales, "fp4_e2m1")
    assert np.array_equal(whole, a.dequantize())
    for scale, size in (("none", 0), ("tensor", 4)):
        made = mxrewrite.quantize(strided.T, "fp8_e4m3", scale=scale)
        assert made.scales.size == size
        assert np.abs(made.dequantize() - strided.T).max() < 0.3
    raises(mxrewrite.UsageError, "float64", lambda: mxrewrite.quantize(np.ones(32), "fp8_e4m3"))
    raises(mxrewrite.UsageError, "shape", lambda: mxrewrite.quantize(np.float32(1), "fp8_e4m3"))
    raises(mxrewrite.UsageError, "fp7", lambda: mxrewrite.quantize(np.ones(32, np.float32), "fp7"))
    raises(mxrewrite.UsageError, "33", lambda: mxrewrite.quantize(np.ones(32, np.float32), "fp8_e4m3", block_size=33))
    raises(mxrewrite.UsageError, "codes", lambda: mxrewrite.dequantize(a.codes, a.scales, "fp4_e2m1", k=65))
    raises(mxrewrite.UsageError, "k: ", lambda: mxrewrite.dequantize(a.codes, a.scales, "fp4_e2m1", k=2**62))
    raises(mxrewrite.UsageError, "scales", lambda: mxrewrite.dequantize(a.codes, a.scales[:2], "fp4_e2m1"))
    raises(mxrewrite.UsageError, "uint8", lambda: mxrewrite.dequantize(a.codes.astype(np.int8), a.scales, "fp4_e2m1"))
    print(f"numbers: {checked} values in {len(mxrewrite.FORMATS)} formats")


def test_gil() -> None:
    """Other threads run while Rust computes."""
    values = np.random.default_rng(0).standard_normal((4096, 4096)).astype(np.float32)
    done = threading.Event()

    def work() -> None:
        for _ in range(3):
            mxrewrite.quantize(values, "fp6_e3m2").dequantize()
        done.set()

    thread = threading.Thread(target=work)
    longest, last = 0.0, time.perf_counter()
    begin = last
    thread.start()
    while not done.is_set():
        time.sleep(0.0005)
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    thread.join()
    took = time.perf_counter() - begin
    # Held, the longest pause is a whole call: a sixth of it all.
    assert longest < took / 8, f"paused for {longest:.3f} of {took:.3f} s"


def test_session(folder: Path) -> None:
    import onnxruntime as ort

    report = mxrewrite.rewrite(MODEL, folder / "a.onnx", tier="a", format="fp4_e2m1")
    other = mxrewrite.rewrite(MODEL, folder / "b.onnx", tier="full", activation_format="none")
    session = mxrewrite.session(report.output)
    weight_only = mxrewrite.session(other.output)
    nodes = mxrewrite.describe(session)
    assert [node.node for node in nodes] == [site.node for site in report.plan.sites], nodes
    assert {(n.provider, n.weight_format, n.activation_format) for n in nodes} == {("CPU", "fp4_e2m1", "fp4_e2m1")}
    assert [(n.n, n.k, n.block_size) for n in nodes] == [(s.n, s.k, 32) for s in report.plan.sites]
    assert all(node.kernel for node in nodes)
    assert {node.activation_format for node in mxrewrite.describe(weight_only)} == {"none"}
    assert len(mxrewrite.describe(weight_only)) == other.sites
    # Somebody else's session, with one line added.
    options = ort.SessionOptions()
    assert mxrewrite.register(options) is options
    mxrewrite.register(options)
    options.register_custom_ops_library(mxrewrite.library_path())
    assert len({hash(node) for node in nodes}) == len(nodes) == len({*report.plan.sites})
    own = ort.InferenceSession(str(report.output), options, providers=["CPUExecutionProvider"])
    assert [n.node for n in mxrewrite.describe(own)] == [n.node for n in nodes]
    assert np.array_equal(own.run(None, FEED)[0], session.run(None, FEED)[0])
    plain = ort.InferenceSession(str(MODEL), providers=["CPUExecutionProvider"])
    assert mxrewrite.describe(plain) == [] and mxrewrite.describe(mxrewrite.session(MODEL)) == []
    assert not np.array_equal(plain.run(None, FEED)[0], session.run(None, FEED)[0])
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        cuda = lambda: mxrewrite.session(MODEL, providers=["CUDAExecutionProvider"])  # noqa: E731
        raises(mxrewrite.RuntimeVersionError, "no CUDA", cuda)
    from_bytes = ort.InferenceSession(MODEL.parent.parent.joinpath("torchscript/model.onnx").read_bytes(), options)
    raises(mxrewrite.UsageError, "mxrewrite.session", lambda: mxrewrite.describe(from_bytes))
    del session, own, nodes
    gc.collect()
    import mxrewrite._runtime as runtime

    assert len(runtime._kernels()) == other.sites, "kernels of sessions that are gone"
    # Several sessions made at once are still told apart.
    made: dict[str, list] = {}

    def make(name: str, path: Path) -> None:
        made[name] = mxrewrite.describe(mxrewrite.session(path))

    threads = [threading.Thread(target=make, args=(f"{p.name}{i}", p)) for i in range(3) for p in (report.output, other.output)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {name: len(nodes) for name, nodes in made.items()} == {
        f"{n}{i}": s for n, s in (("a.onnx", report.sites), ("b.onnx", other.sites)) for i in range(3)
    }


def test_evaluate(folder: Path) -> None:
    found = mxrewrite.evaluate(
        sweep=MODEL, data=PILE, tokenizer=ROOT / "fixtures/tinylm/tokenizer.json", stages=["baseline", "mx-fp8_e4m3"],
        tier="a", max_samples=4, seq_len=64, device="cpu", out=folder / "results",
    )
    assert [record["stage"] for record in found.records] == ["baseline", "mx-fp8_e4m3"], found
    assert 1 < found["baseline"]["ppl"] < found["mx-fp8_e4m3"]["ppl"] * 1.2
    assert (folder / "results/report.html").is_file() and found.out == folder / "results"
    raises(mxrewrite.UsageError, "tokenizer", lambda: mxrewrite.evaluate(_copy(folder / "alone"), data=PILE))
    raises(mxrewrite.UsageError, "no-such-option", lambda: mxrewrite.evaluate(MODEL, data=PILE, no_such_option=1))
    gone = raises(
        mxrewrite.EvaluationError, "gone.parquet",
        lambda: mxrewrite.evaluate(MODEL, data=folder / "gone.parquet", tokenizer=ROOT / "fixtures/tinylm/tokenizer.json"),
    )
    assert gone.returncode == 1 and pickle.loads(pickle.dumps(gone)).returncode == 1


def test_commands(folder: Path) -> None:
    """The commands find ONNX Runtime's library by themselves."""
    variables = {k: v for k, v in os.environ.items() if k not in ("ORT_DYLIB_PATH", "MX_PYTHON")}
    run = lambda *args: subprocess.run(  # noqa: E731
        [sys.executable, "-c", f"from mxrewrite._commands import {args[0]} as c; c()", *map(str, args[1:])],
        env=variables, cwd=folder, capture_output=True, text=True,
    )
    assert run("mxrewrite", "--version").stdout == f"mxrewrite {mxrewrite.__version__}\n"
    done = run("mxrewrite", MODEL, "--tier-a", "-o", folder / "m.onnx", "--check")
    assert done.returncode == 0, done.stderr
    done = run("mxeval", MODEL, folder / "m.onnx", "--tokenizer", ROOT / "fixtures/tinylm/tokenizer.json", "--data", PILE,
               "--max-samples", 2, "--seq-len", 32, "--device", "cpu", "--out", folder / "out")
    assert done.returncode == 0, done.stderr
    run_json = (folder / "out/run.json").read_text()
    assert '"-c"' not in run_json and "mxeval" in run_json
    assert run("mxrewrite", "--tier", "z", "m.onnx").returncode == 2
    assert run("mxrewrite", "gone.onnx").returncode == 1
    module = subprocess.run([sys.executable, "-m", "mxrewrite", "--version"], capture_output=True, text=True, env=variables)
    assert module.stdout.startswith("mxrewrite ")


def test_library() -> None:
    assert Path(mxrewrite.library_path()).is_file()
    os.environ["MX_OPS_LIBRARY"] = "/nowhere/lib.so"
    try:
        raises(mxrewrite.MxError, "/nowhere/lib.so", mxrewrite.library_path)
    finally:
        del os.environ["MX_OPS_LIBRARY"]
    import onnxruntime

    version, onnxruntime.__version__ = onnxruntime.__version__, "1.21.1"
    try:
        error = raises(mxrewrite.RuntimeVersionError, "1.21.1", lambda: mxrewrite.session(MODEL))
        assert "1.22" in str(error)
    finally:
        onnxruntime.__version__ = version


def main() -> int:
    parts = sys.argv[1:]
    ran = []
    for name, test in list(globals().items()):
        part = name.removeprefix("test_")
        if not name.startswith("test_") or (parts and part not in parts):
            continue
        if test.__code__.co_argcount:
            with tempfile.TemporaryDirectory() as folder:
                test(Path(folder).resolve())
        else:
            test()
        ran.append(part)
    assert ran and (not parts or len(ran) == len(parts)), f"no such part: {parts}"
    print(f"package {mxrewrite.__version__} ({Path(mxrewrite.__file__).parent}): {', '.join(ran)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
