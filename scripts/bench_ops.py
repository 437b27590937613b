#!/usr/bin/env python3
"""MxMatMul against ONNX Runtime's own fp32 MatMul: one operator a model, all in one process, in turns.

    python3 scripts/bench_ops.py --library target/release/libmx_custom_ops.so
        [--m 1,64,512] [--k 4096] [--n 14336] [--threads 1,2] [--formats fp8_e4m3,fp4_e2m1]
        [--weight-only] [--dtype float32] [--rounds 15] [--max-ratio 2.0]

X is quantised to the weight's format on the fly unless --weight-only. Each round runs every contender once,
so that a slow moment of the machine hits all of them; the table shows medians. With m = 1 the weights stream
from memory: each contender then owns several copies and takes them in turn, so that none stays in a cache.
With --max-ratio the exit code is 1 when a median at m >= 64 is more than that many times the fp32 one.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

BITS = {"fp8_e4m3": 8, "fp8_e5m2": 8, "fp6_e3m2": 6, "fp6_e2m3": 6, "fp4_e2m1": 4, "mxint8": 8}
BLOCK = 32
# Weight copies for m = 1: together larger than any cache that one process gets.
COPIES = 3


def tensor(name: str, array: np.ndarray, onnx_type: int) -> onnx.TensorProto:
    t = onnx.TensorProto(name=name, data_type=onnx_type)
    t.dims.extend(array.shape)
    t.raw_data = array.tobytes()
    return t


def model(node, initializers, dtype: int, k: int, n: int) -> bytes:
    graph = helper.make_graph(
        [node],
        "bench",
        [helper.make_tensor_value_info("X", dtype, ["m", k])],
        [helper.make_tensor_value_info("Y", dtype, ["m", n])],
        initializers,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("mx", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def fp32_model(k: int, n: int, rng: np.random.Generator) -> bytes:
    w = rng.standard_normal((k, n), dtype=np.float32) / np.float32(np.sqrt(k))
    node = helper.make_node("MatMul", ["X", "W"], ["Y"], name="fp32")
    return model(node, [tensor("W", w, TensorProto.FLOAT)], TensorProto.FLOAT, k, n)


def mx_model(fmt: str, activation: str, dtype: int, k: int, n: int, rng: np.random.Generator) -> bytes:
    """Random codes stand for a weight: speed does not depend on them as long as none is NaN or Inf."""
    blocks = -(-k // BLOCK)
    codes = rng.integers(0, 256, (n, blocks * BLOCK * BITS[fmt] // 8), dtype=np.uint8)
    if BITS[fmt] == 8:
        codes &= 0xBF  # the largest exponents, with E4M3's NaN and E5M2's Inf among them, stay away
    scales = rng.integers(118, 124, (n, blocks), dtype=np.uint8)
    attributes = dict(k=k, n=n, weight_format=fmt, activation_format=activation, block_size=BLOCK, scale="e8m0")
    attributes |= dict(rounding="even", scale_rule="floor", alpha=1.0, beta=1.0, layout=1)
    node = helper.make_node("MxMatMul", ["X", "codes", "scales"], ["Y"], name=fmt, domain="mx", **attributes)
    inits = [tensor("codes", codes, TensorProto.UINT8), tensor("scales", scales, TensorProto.UINT8)]
    return model(node, inits, dtype, k, n)


class Contender:
    """Sessions of one model and X; several sessions, each with its own weights, for streaming."""

    def __init__(self, data: bytes, copies: int, threads: int, library: Path, x):
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        options.register_custom_ops_library(str(library))
        self.sessions = [ort.InferenceSession(data, options, providers=["CPUExecutionProvider"]) for _ in range(copies)]
        self.bindings = []
        for s in self.sessions:
            binding = s.io_binding()
            binding.bind_ortvalue_input("X", x)
            binding.bind_output("Y", "cpu")
            self.bindings.append(binding)
        self.turn = 0
        self.seconds: list[float] = []

    def run(self, keep: bool = True) -> None:
        i = self.turn % len(self.sessions)
        self.turn += 1
        start = time.perf_counter()
        self.sessions[i].run_with_iobinding(self.bindings[i])
        if keep:
            self.seconds.append(time.perf_counter() - start)


def bench(args, models: dict[str, bytes], m: int, threads: int, rng) -> dict[str, float]:
    copies = COPIES if m == 1 else 1
    contenders = {}
    for name, data in models.items():
        dtype = TensorProto.FLOAT if name == "fp32" else args.onnx_type
        x = rng.standard_normal((m, args.k), dtype=np.float32)
        if dtype == TensorProto.BFLOAT16:
            bits = (x.view(np.uint32) >> 16).astype(np.uint16)
            value = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, dtype)
        else:
            value = ort.OrtValue.ortvalue_from_numpy(x.astype(np.float16) if dtype == TensorProto.FLOAT16 else x)
        contenders[name] = Contender(data, copies, threads, args.library, value)
    for _ in range(2 * copies):
        for c in contenders.values():
            c.run(keep=False)
    for _ in range(args.rounds * (4 if m == 1 else 1)):
        for c in contenders.values():
            c.run()
    return {name: statistics.median(c.seconds) for name, c in contenders.items()}


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    find = lambda key: next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), "")
    flags = find("flags").split()
    shown = [f for f in ("avx2", "fma", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_int8") if f in flags]
    return f"{find('model name')}, {os.cpu_count()} logical CPUs, {' '.join(shown)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    numbers = lambda text: [int(v) for v in text.split(",")]
    parser.add_argument("--library", type=Path, default=os.environ.get("MX_CUSTOM_OPS", "target/release/libmx_custom_ops.so"))
    parser.add_argument("--m", type=numbers, default=[1, 64, 512])
    parser.add_argument("--k", type=int, default=4096)
    parser.add_argument("--n", type=int, default=14336)
    parser.add_argument("--threads", type=numbers, default=[1, 2])
    parser.add_argument("--formats", type=lambda text: text.split(","), default=["fp8_e4m3", "fp4_e2m1"])
    parser.add_argument("--weight-only", action="store_true")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="X of MxMatMul")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--max-ratio", type=float)
    args = parser.parse_args()
    args.onnx_type = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}[args.dtype]

    rng = np.random.default_rng(0)
    models = {"fp32": fp32_model(args.k, args.n, rng)}
    for fmt in args.formats:
        activation = "none" if args.weight_only else fmt
        models[fmt] = mx_model(fmt, activation, args.onnx_type, args.k, args.n, rng)

    operands = "weight only" if args.weight_only else "both operands"
    print(f"k = {args.k}, n = {args.n}, X {args.dtype}, {operands}; median of {args.rounds} rounds (m = 1: {4 * args.rounds})")
    print(f"{processor()}; {platform.platform()}")
    forced = os.environ.get("MX_CPU_VARIANT")
    print(f"onnxruntime {ort.__version__}, {args.library}{f', MX_CPU_VARIANT={forced}' if forced else ''}, {datetime.date.today()}")
    print()
    print("| m | threads | fp32 MatMul, ms |" + "".join(f" {f}, ms | ratio |" for f in args.formats))
    print("|--:|--:|--:|" + "--:|--:|" * len(args.formats))
    worst = 0.0
    for m in args.m:
        for threads in args.threads:
            got = bench(args, models, m, threads, rng)
            row = f"| {m} | {threads} | {got['fp32'] * 1e3:.2f} |"
            for fmt in args.formats:
                ratio = got[fmt] / got["fp32"]
                worst = max(worst, ratio if m >= 64 else 0.0)
                row += f" {got[fmt] * 1e3:.2f} | {ratio:.2f} |"
            print(row, flush=True)
    if args.max_ratio and worst > args.max_ratio:
        print(f"\nworst ratio at m >= 64 is {worst:.2f}, more than {args.max_ratio}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
