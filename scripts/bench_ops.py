#!/usr/bin/env python3
"""MxMatMul against ONNX Runtime's own MatMul, MatMulNBits and DynamicQuantizeMatMul, all in one process, in turns.

    python3 scripts/bench_ops.py --library target/release/libmx_custom_ops.so
        [--m 1,8,64,512] [--shapes 4096x14336,14336x4096] [--threads 1,2] [--formats fp8_e4m3,fp4_e2m1,...|all]
        [--operands both,weight] [--x float32,float16,bfloat16] [--rounds 9] [--no-rotate] [--rotate-to 16]
        [--clock wall|cpu] [--cache BYTES] [--memory BYTES] [--no-peers] [--json FILE] [--check]

Shapes are KxN. A session has as many nodes as it takes for their weights to be four times the last cache level
(m up to --rotate-to, as far as --memory goes), one run calls them all and its time is divided by their number: so a
weight comes from memory, as a model's layers do. --no-rotate: one node, whatever the caches hold. Each round runs
every contender once, so that a slow moment of the machine hits all of them; the table shows medians.

Every session has the same options: its own threads, which stop spinning when a run is over. Peers take X in float32.
--clock cpu takes the CPU time of all threads over their number, the memory's bandwidth included: the figure for a
machine that others use too.
Ratios are the peer's time over ours: more than 1 is faster than the peer. Each contender's output is compared with
the product of its dequantised operands in float64 first, at 32 output features of every copy.

The memory's read bandwidth is what memchr reads of an array eight times the last cache level without a hit, one call
a thread, best of 8. --check: small shapes, a few seconds, for tests.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import os
import platform
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime as ort
from bench_models import FLOATS, FORMATS, Contender, DynamicQuantizeMatMul, MatMul, MatMulNBits, MxMatMul, narrow, widen

# What protobuf lets a model have, with some room.
MODEL_BYTES = 1_900_000_000


# ---------------------------------------------------------------------------------------------- machine


def cache_bytes() -> int:
    """Of the last cache level of CPU 0; 32 MiB where the system does not say."""
    found = [32 << 20]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        found.append(int(text[:-1]) << {"K": 10, "M": 20}.get(text[-1], 0))
    return found[-1] if len(found) == 1 else max(found[1:])


def available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 8 << 30


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    find = lambda key: next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), "")
    names = "avx2 fma avx512f avx512bw avx512vbmi avx512_vnni avx512_bf16 avx_vnni amx_bf16 amx_int8".split()
    flags = find("flags").split()
    return f"{find('model name') or platform.processor()}, {os.cpu_count()} logical CPUs, {' '.join(f for f in names if f in flags)}"


def since(start: tuple[float, float], clock: str, threads: int) -> float:
    """Seconds since `start`, a wall clock's and CPU seconds: of the wall clock, or of the CPU for each thread."""
    wall, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
    return wall if clock == "wall" else cpu / threads


def read_bandwidth(threads: int, size: int, clock: str) -> float:
    """Bytes a second that so many calls of memchr read at the same time, by the clock of the operators."""
    data = np.ones(size, np.uint8)
    memchr = ctypes.CDLL(None).memchr
    memchr.restype, memchr.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    share = size // threads
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(8):
            start = time.perf_counter(), time.process_time()
            calls = [pool.submit(memchr, data.ctypes.data + i * share, 7, share) for i in range(threads)]
            assert not any(c.result() for c in calls)
            best = min(best, since(start, clock, threads))
    return share * threads / best


# ---------------------------------------------------------------------------------------------- running


class Running:
    """A session of a contender with so many threads, and times by m."""

    def __init__(self, contender: Contender, data: bytes, copies: int, threads: int, library: Path):
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        # Otherwise the threads of the contender before are still spinning.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.register_custom_ops_library(str(library))
        self.session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        self.contender, self.copies, self.threads = contender, copies, threads

    def bind(self, x: np.ndarray) -> None:
        kind = FLOATS[self.contender.x_type]
        self.x = narrow(x, self.contender.x_type)
        # Touched before, and kept from run to run.
        self.y = [np.zeros((len(x), self.contender.n), self.x.dtype) for _ in range(self.copies)]
        value = lambda a: ort.OrtValue.ortvalue_from_numpy_with_onnx_type(a, kind)
        self.binding = self.session.io_binding()
        self.binding.bind_ortvalue_input("X", value(self.x))
        for i, y in enumerate(self.y):
            self.binding.bind_ortvalue_output(f"Y{i}", value(y))
        self.seconds: list[float] = []

    def run(self, clock: str, keep: bool = True) -> None:
        start = time.perf_counter(), time.process_time()
        self.session.run_with_iobinding(self.binding)
        seconds = since(start, clock, self.threads)
        if keep:
            self.seconds.append(seconds / self.copies)

    def check(self, rng) -> float:
        """Error of the bound outputs over their size, root mean square; raises where it is too large."""
        c, worst = self.contender, 0.0
        for copy, y in enumerate(self.y):
            features = rng.choice(c.n, 32, replace=False)
            want = c.expected(self.x, copy, features)
            got = widen(y[:, features])
            worst = max(worst, float(np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2))))
        if not worst <= c.tolerance:
            raise SystemExit(f"error: {c.name} ({c.operands}, {c.x_type}) is off by {worst:.2g}, more than {c.tolerance:g}")
        return worst


def contenders(args, k: int, n: int, rng) -> list[Contender]:
    out: list[Contender] = []
    if args.peers:
        out = [MatMul.make(k, n, rng), MatMulNBits.make(k, n, 4, rng), MatMulNBits.make(k, n, 8, rng), DynamicQuantizeMatMul.make(k, n, rng)]
    for fmt in args.formats:
        for operands in args.operands:
            out += [MxMatMul.make(fmt, k, n, operands == "both", x, rng) for x in args.x]
    return out


def copies_of(contender: Contender, args, count: int) -> int:
    """Copies whose weights make up four times the last cache level, as far as memory goes: a session may hold part
    of its weights a second time, packed its own way."""
    size = contender.bytes()
    room = min(args.memory / (1.6 * count * len(args.threads)), MODEL_BYTES)
    return max(1, min(-(-4 * args.cache // size), int(room / size)))


def bench_shape(args, k: int, n: int, rng, bandwidth: dict[int, float]) -> list[dict]:
    """Records of a shape, shown as they come. Sessions that rotate and those that do not live one after the other."""
    records = []
    rotated = [m for m in args.m if args.rotate and m <= args.rotate_to]
    for ms in (rotated, [m for m in args.m if m not in rotated]):
        if not ms:
            continue
        all_, running = contenders(args, k, n, rng), []
        for c in all_:
            copies = copies_of(c, args, len(all_)) if ms is rotated else 1
            data = c.model(copies)
            running += [Running(c, data, copies, t, args.library) for t in args.threads]
            del data
        for m in ms:
            x = rng.standard_normal((m, k), dtype=np.float32)
            for threads in args.threads:
                group = [r for r in running if r.threads == threads]
                errors = []
                for r in group:
                    r.bind(x)
                    r.run(args.clock, keep=False)
                    errors.append(r.check(rng))
                for _ in range(args.rounds):
                    for r in group:
                        r.run(args.clock)
                found = [record(r, m, e) for r, e in zip(group, errors)]
                table(found, bandwidth, args.cache)
                records += found
    return records


def record(r: Running, m: int, error: float) -> dict:
    c, s = r.contender, statistics.median(r.seconds)
    return dict(
        name=c.name, peer=c.peer, operands=c.operands, x=c.x_type, m=m, k=c.k, n=c.n, threads=r.threads, copies=r.copies,
        weight_bytes=c.bytes(), seconds=s, best_seconds=min(r.seconds), gflops=2 * m * c.k * c.n / s / 1e9,
        gbytes_per_second=c.bytes() / s / 1e9, error=error,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------- showing


def table(group: list[dict], bandwidth: dict[int, float], cache: int) -> None:
    """Records of one shape, m and number of threads."""
    peers = {r["name"]: r["seconds"] for r in group if r["peer"]}
    k, n, m, threads = (group[0][key] for key in ("k", "n", "m", "threads"))
    print(f"\nk = {k}, n = {n}, m = {m}, {threads} thread{'s' * (threads > 1)}\n")
    print("| operator | operands | X | copies | ms | GF/s | GB/s of weight | of memory |" + "".join(f" / {p} |" for p in peers))
    print("|---|---|---|--:|--:|--:|--:|--:|" + "--:|" * len(peers))
    for r in group:
        streamed = m == 1 and r["copies"] * r["weight_bytes"] >= 4 * cache
        share = f"{100e9 * r['gbytes_per_second'] / bandwidth[threads]:.0f} %" if streamed else ""
        cells = [r["name"], r["operands"], r["x"], r["copies"], f"{r['seconds'] * 1e3:.3f}", f"{r['gflops']:.1f}", f"{r['gbytes_per_second']:.1f}", share]
        print("| " + " | ".join(map(str, cells)) + " |" + "".join(f" {s / r['seconds']:.2f} |" for s in peers.values()), flush=True)


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    numbers = lambda text: [int(v) for v in text.split(",")]
    words = lambda allowed: lambda text: [w for w in (allowed if text == "all" else text.split(",")) if allowed.index(w) >= 0]
    shapes = lambda text: [tuple(int(v) for v in s.split("x")) for s in text.split(",")]
    p.add_argument("--library", type=Path, default=os.environ.get("MX_CUSTOM_OPS", "target/release/libmx_custom_ops.so"))
    p.add_argument("--m", type=numbers, default=[1, 8, 64, 512])
    p.add_argument("--shapes", type=shapes, default=[(4096, 14336)], metavar="KxN,...")
    p.add_argument("--threads", type=numbers, default=[1, 2])
    p.add_argument("--formats", type=words(FORMATS), default=list(FORMATS))
    p.add_argument("--operands", type=words(("both", "weight")), default=["both", "weight"])
    p.add_argument("--weight-only", action="store_const", dest="operands", const=["weight"])
    p.add_argument("--x", type=words(tuple(FLOATS)), default=["float32"])
    p.add_argument("--rounds", type=int, default=9)
    p.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    p.add_argument("--no-rotate", action="store_false", dest="rotate")
    p.add_argument("--rotate-to", type=int, default=16, help="the largest m whose weights rotate")
    p.add_argument("--cache", type=int, default=cache_bytes(), help="bytes of the last cache level")
    p.add_argument("--memory", type=int, default=available_bytes() * 7 // 10, help="bytes that all sessions together may take")
    p.add_argument("--no-peers", action="store_false", dest="peers")
    p.add_argument("--json", type=Path)
    p.add_argument("--check", action="store_true", help="small and quick, for tests")
    args = p.parse_args()
    if args.check:
        args.m, args.shapes, args.rounds, args.cache, args.x = [1, 20], [(128, 96)], 2, 1 << 16, list(FLOATS)
    return args


def main() -> int:
    args = arguments()
    rng = np.random.default_rng(0)
    bandwidth = {t: read_bandwidth(t, max(8 * args.cache, 64 << 20), args.clock) for t in args.threads}
    head = dict(
        machine=processor(), platform=platform.platform(), onnxruntime=ort.__version__, numpy=np.__version__, library=str(args.library),
        date=str(datetime.date.today()), MX_CPU_VARIANT=os.environ.get("MX_CPU_VARIANT"), rounds=args.rounds, clock=args.clock, cache_bytes=args.cache,
        memory_read_bytes_per_second=bandwidth, load=os.getloadavg()[0],
    )  # fmt: skip
    forced = f", MX_CPU_VARIANT={head['MX_CPU_VARIANT']}" if head["MX_CPU_VARIANT"] else ""
    print(f"{head['machine']}; {head['platform']}; last cache {args.cache >> 20} MiB")
    print(f"onnxruntime {ort.__version__}, {args.library}{forced}, {head['date']}; median of {args.rounds} rounds, {'wall clock' if args.clock == 'wall' else 'CPU time'}; load before {head['load']:.1f}")
    print("memory read by memchr: " + ", ".join(f"{t} thread{'s' * (t > 1)} {b / 1e9:.1f} GB/s" for t, b in bandwidth.items()))
    records = []
    for k, n in args.shapes:
        records += bench_shape(args, k, n, rng, bandwidth)
    # Against a machine that was busy at the start.
    after = {t: read_bandwidth(t, max(8 * args.cache, 64 << 20), args.clock) for t in args.threads}
    print("\nmemory read after: " + ", ".join(f"{t} thread{'s' * (t > 1)} {b / 1e9:.1f} GB/s" for t, b in after.items()))
    print(f"largest error against the dequantised product: ours {max((r['error'] for r in records if not r['peer']), default=0):.2g}", end="")
    print(f", peers {max((r['error'] for r in records if r['peer']), default=0):.2g} (they round X to 8 bits)")
    if args.json:
        args.json.write_text(json.dumps(head | dict(memory_read_after=after, results=records), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
