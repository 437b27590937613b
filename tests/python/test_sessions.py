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
# Growth that is no leak: pages that the allocator keeps for itself. One kept copy of a weight below is more than
# 500 KiB, so a leak of every fifth session shows.
ALLOWED_MIB = 4.0
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


def own_growth(provider: str) -> float:
    """What ONNX Runtime keeps without us, MiB: 1.31's CUDA provider some 0.15 a session."""
    if provider == "CPUExecutionProvider":
        return 0.0
    info = mx.helper.make_tensor_value_info
    weight = mx.onnx.numpy_helper.from_array(np.ones((1024, 1024), np.float32), "W")
    node = mx.helper.make_node("MatMul", ["X", "W"], ["Y"])
    model = mx.model([node], [info("X", 1, ["m", 1024])], [info("Y", 1, ["m", 1024])], [weight]).SerializeToString()
    memory = []
    for _ in range(SESSIONS):
        plain = mx.ort.InferenceSession(model, providers=[provider])
        plain.run(None, {"X": np.ones((3, 1024), np.float32)})
        del plain
        memory.append(private_mib())
    print(f"{provider}: a plain MatMul, private MiB {memory[WARM - 1]:.1f} at {WARM}, {memory[-1]:.1f} at {SESSIONS}")
    return max(0.0, memory[-1] - memory[WARM - 1])


def lifetime(provider: str) -> None:
    """Fifty sessions made, run and gone."""
    case = Case(n=1024, k=1024, weight="fp4_e2m1", activation="fp8_e4m3")
    want = session(case, provider).run(None, {"X": case.feed()})[0].tobytes()
    memory = []
    for i in range(SESSIONS):
        if session(case, provider).run(None, {"X": case.feed()})[0].tobytes() != want:
            FAILED.append(f"{provider}: session {i} computes something else")
        memory.append(private_mib())
    growth = memory[-1] - memory[WARM - 1] - own_growth(provider)
    print(f"{provider}: {SESSIONS} sessions, private MiB {memory[0]:.1f} at 1, {memory[WARM - 1]:.1f} at {WARM}, {memory[-1]:.1f} at {SESSIONS}")
    if growth > ALLOWED_MIB:
        FAILED.append(f"{provider}: private memory grew by {growth:.1f} MiB after session {WARM}, allowed: {ALLOWED_MIB}")


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
