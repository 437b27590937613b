"""One session in many threads, and many sessions one after the other: the same bits, and no memory kept.

    test_sessions.py threads lifetime        # MX_SOAK=60: so many seconds of threads, 3 without

Runs on the CPU, and on CUDA where this onnxruntime has the provider and a GPU (MX_REQUIRE=cuda: it must).
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import threading
import time

import numpy as np

import mx_nodes as mx
from mx_nodes import Case

THREADS = 32
SESSIONS = 50
# Sessions after which memory must not grow: by then every cache and arena has been made.
WARM = 10
# Growth that is no leak, MiB: pages that the allocator keeps for itself. A weight below is more than 500 KiB.
ALLOWED_PAGES = 4.0
# The same of bytes in use, which are counted and not estimated: 1 KiB a session.
ALLOWED_IN_USE = (SESSIONS - WARM) / 1024
# And of the GPU's memory, which other processes take and give back as well.
ALLOWED_GPU = 8.0
SOAK = float(os.environ.get("MX_SOAK", "3"))
LIBC = ctypes.CDLL(None)
FAILED: list[str] = []


def providers() -> list[str]:
    found = ["CPUExecutionProvider"]
    if "CUDAExecutionProvider" in mx.ort.get_available_providers():
        found.append("CUDAExecutionProvider")
    else:
        assert "cuda" not in os.environ.get("MX_REQUIRE", "").split(","), "MX_REQUIRE=cuda, but there is no CUDA provider"
        print("skipped: CUDA: this onnxruntime has no CUDA provider")
    return found


def session(case: Case, provider: str) -> mx.ort.InferenceSession:
    # One thread: thirty-two callers bring their own, and results do not depend on their number.
    return mx.ort.InferenceSession(case.model().SerializeToString(), mx.options(1), providers=[provider])


def threads(provider: str) -> None:
    """Thirty-two threads, one session, inputs of several lengths."""
    case = Case(n=512, k=1024, weight="fp4_e2m1", activation="fp8_e4m3", bias=True)
    shared = session(case, provider)
    feeds = [case.replace(shape=(1, 1 + i % 5), seed=1).feed() + np.float32(i) for i in range(8)]
    alone = [shared.run(None, {"X": x})[0] for x in feeds]
    wrong: list[str] = []
    runs = [0] * THREADS
    end = time.monotonic() + SOAK

    def work(thread: int) -> None:
        turn = thread
        while not runs[thread] or (time.monotonic() < end and not wrong):
            j = turn % len(feeds)
            if shared.run(None, {"X": feeds[j]})[0].tobytes() != alone[j].tobytes():
                wrong.append(f"thread {thread}, run {runs[thread]}")
            runs[thread] += 1
            turn += 1

    workers = [threading.Thread(target=work, args=(i,)) for i in range(THREADS)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if wrong:
        FAILED.append(f"{provider}: {len(wrong)} results differ ({wrong[:3]})")
    print(f"{provider}: {THREADS} threads, {SOAK:g} s, {sum(runs)} runs (fewest of a thread {min(runs)}), {len(wrong)} differ")


class Mallinfo(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    ]


def private_mib() -> float:
    """Memory that this process wrote and nobody shares, MiB, after what is free went back to the system.

    Clean pages do not count: those of a library become private when the last other process that has it loaded ends.
    """
    gc.collect()
    if hasattr(LIBC, "malloc_trim"):
        LIBC.malloc_trim(0)
    with open("/proc/self/smaps_rollup") as rollup:
        fields = dict(line.split()[:2] for line in rollup if line.endswith("kB\n"))
    return (int(fields["Private_Dirty:"]) + int(fields.get("Swap:", 0))) / 1024


def in_use_mib() -> float:
    """What was allocated and not freed, MiB, whoever did it; NaN without glibc 2.33."""
    if not hasattr(LIBC, "mallinfo2"):
        return float("nan")
    LIBC.mallinfo2.restype = Mallinfo
    info = LIBC.mallinfo2()
    return (info.uordblks + info.hblkhd) / 2**20


def device_mib(provider: str) -> float:
    """Memory of the GPU that is taken, MiB, by whomever."""
    if provider == "CPUExecutionProvider":
        return 0.0
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    # The driver, in the context that ONNX Runtime works in.
    cuda, context = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p()
    assert cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0) == 0 and cuda.cuCtxSetCurrent(context) == 0
    assert cuda.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)) == 0
    return (total.value - free.value) / 2**20


def growth(provider: str, what: str, use) -> np.ndarray:
    """MiB by which pages, bytes in use and device memory grew after session WARM. `use` makes, runs and drops a session."""
    measured = []
    for i in range(SESSIONS):
        use(i)
        measured.append([private_mib(), in_use_mib(), device_mib(provider)])
    first, last = np.array(measured[WARM - 1]), np.array(measured[-1])
    shown = ", ".join(f"{name} {a:.2f} -> {b:.2f}" for name, a, b in zip(("pages", "in use", "GPU"), first, last))
    print(f"{provider}: {what}, MiB after session {WARM} -> {SESSIONS}: {shown}")
    return last - first


def lifetime(provider: str) -> None:
    """Fifty sessions made, run and gone.

    ONNX Runtime's CUDA provider keeps some 150 KiB a session itself, of any model: what a plain MatMul's sessions keep
    is taken off there. Pages are told and not judged with CUDA, whose driver gives and takes tens of MiB.
    """
    case = Case(n=1024, k=1024, weight="fp4_e2m1", activation="fp8_e4m3")
    want = session(case, provider).run(None, {"X": case.feed()})[0].tobytes()

    def ours(i: int) -> None:
        if session(case, provider).run(None, {"X": case.feed()})[0].tobytes() != want:
            FAILED.append(f"{provider}: session {i} computes something else")

    info = mx.helper.make_tensor_value_info
    weight = mx.onnx.numpy_helper.from_array(np.ones((1024, 1024), np.float32), "W")
    node = mx.helper.make_node("MatMul", ["X", "W"], ["Y"])
    model = mx.model([node], [info("X", 1, ["m", 1024])], [info("Y", 1, ["m", 1024])], [weight]).SerializeToString()

    def plain(_: int) -> None:
        options = mx.ort.SessionOptions()
        options.intra_op_num_threads = 1
        mx.ort.InferenceSession(model, options, providers=[provider]).run(None, {"X": np.ones((3, 1024), np.float32)})

    allowed = np.array([ALLOWED_PAGES, ALLOWED_IN_USE, ALLOWED_GPU])
    if provider != "CPUExecutionProvider":
        allowed[0] = np.inf
    # What is made once, however late, does not grow again; a leak does.
    for _ in range(2):
        more = growth(provider, f"{SESSIONS} sessions", ours)
        if provider != "CPUExecutionProvider":
            more -= np.maximum(growth(provider, "a plain MatMul", plain), 0)
        if not (more > allowed).any():
            break
    for name, mib, most in zip(("pages", "bytes in use", "GPU memory"), more, allowed):
        if np.isnan(mib):
            print(f"skipped: {name}: no mallinfo2 in this C library")
        elif mib > most:
            FAILED.append(f"{provider}: {name} grew by {mib:.3f} MiB after session {WARM}, allowed: {most:.3f}")


AREAS = {"threads": threads, "lifetime": lifetime}


def main() -> int:
    for provider in providers():
        for area in sys.argv[1:] or AREAS:
            AREAS[area](provider)
    for failure in FAILED:
        print("FAILED:", failure)
    return 1 if FAILED else 0


if __name__ == "__main__":
    sys.exit(main())
