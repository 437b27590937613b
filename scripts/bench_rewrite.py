#!/usr/bin/env python3
"""Times the rewrite of a model against reading its input and copying its output, and its peak memory.

    scripts/bench_rewrite.py MODEL.onnx [--format fp8_e4m3] [--threads 2] [--runs 3] [--mxrewrite target/release/mxrewrite]
        [--nbits PYTHON]

`share` is the time of the slower of (copy of the output, read of the input) divided by that of the rewrite, medians of the runs,
which alternate: once as the commands end, with the output in the page cache, and once with both synced to the disk. Memory is private
dirty memory, sampled; input pages that still wait to be written would count, so it syncs first. `--nbits` names a Python with
onnxruntime and onnx_ir: its matmul_nbits_quantizer (4 bits, block 32) quantises the same model in the same run.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path


def private_dirty(pid):
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Private_Dirty:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


# 4 bits, symmetric, blocks of 32: what mxrewrite's fp4 is compared with.
NBITS = """
import sys, onnx
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
quantizer = MatMulNBitsQuantizer(onnx.load(sys.argv[1]), block_size=32, is_symmetric=True)
quantizer.process()
quantizer.model.save_model_to_file(sys.argv[2], use_external_data_format=True)
"""


def watched(command):
    """Seconds, and the most private dirty memory."""
    start, peak = time.monotonic(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, private_dirty(process.pid))
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"error: {command} ended with {process.returncode}")
    return time.monotonic() - start, peak


def rewrite(args, output):
    command = [args.mxrewrite, args.model, "-o", output, "--format", args.format, "--threads", str(args.threads)]
    return watched(command + args.options)


def timed(work):
    start = time.monotonic()
    work()
    return time.monotonic() - start


def read(files):
    for file in files:
        with open(file, "rb", buffering=0) as f:
            while f.read(8 << 20):
                pass


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--format", default="fp8_e4m3")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--mxrewrite", default="target/release/mxrewrite")
    parser.add_argument("--nbits", metavar="PYTHON", help="compare with the matmul_nbits_quantizer of this Python's onnxruntime")
    args, args.options = parser.parse_known_args()
    inputs = sorted(args.model.parent.glob(args.model.name + "*"))
    times, peaks = {}, {}

    def note(name, seconds):
        times.setdefault(name, []).append(seconds)
        return seconds

    for run in range(args.runs):
        with tempfile.TemporaryDirectory(dir=args.model.parent) as folder:
            out = Path(folder, "out")
            out.mkdir()
            os.sync()
            seconds, peak = rewrite(args, out / "model.onnx")
            note("rewrite, synced", note("rewrite", seconds) + timed(os.sync))
            peaks["rewrite"] = max(peak, peaks.get("rewrite", 0))
            seconds = note("copy", timed(lambda: shutil.copytree(out, Path(folder, "copy"))))
            note("copy, synced", seconds + timed(os.sync))
            note("read", timed(lambda: read(inputs)))
            size = sum(f.stat().st_size for f in out.iterdir())
            # It takes minutes, and one measurement tells enough of a factor of its size.
            if args.nbits and run == 0:
                seconds, peak = watched([args.nbits, "-c", NBITS, args.model, Path(folder, "nbits.onnx")])
                note("matmul_nbits_quantizer", seconds)
                peaks["matmul_nbits_quantizer"] = peak
    total = sum(f.stat().st_size for f in inputs)
    median = {name: statistics.median(list) for name, list in times.items()}
    print(f"input {total / 1e9:.2f} GB, output {size / 1e9:.2f} GB, {args.format}, {args.threads} threads")
    for name, list in times.items():
        print(f"{name:24} {median[name]:7.2f} s   ({', '.join(f'{t:.2f}' for t in list)})")
    for suffix in ("", ", synced"):
        share = max(median["read"], median["copy" + suffix]) / median["rewrite" + suffix]
        print(f"share{suffix} {100 * share:.0f} %")
    print("peak private " + ", ".join(f"{name} {peak / 1e6:.0f} MB" for name, peak in peaks.items()))
    if args.nbits:
        print(f"matmul_nbits_quantizer takes {median['matmul_nbits_quantizer'] / median['rewrite']:.0f} times as long")


if __name__ == "__main__":
    main()
