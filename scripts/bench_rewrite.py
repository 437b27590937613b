#!/usr/bin/env python3
"""Times the rewrite of a model against reading its input and copying its output, and its peak memory.

    scripts/bench_rewrite.py MODEL.onnx [--format fp8_e4m3] [--threads 2] [--runs 3] [--mxrewrite target/release/mxrewrite]

`share` is the time of the slower of (copy of the output, read of the input) divided by that of the rewrite, medians of the runs,
which alternate. Memory is private dirty memory, sampled; input pages that still wait to be written would count, so it syncs first.
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


def rewrite(args, output):
    command = [args.mxrewrite, args.model, "-o", output, "--format", args.format, "--threads", str(args.threads)]
    start, peak = time.monotonic(), 0
    process = subprocess.Popen(command + args.options, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, private_dirty(process.pid))
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"error: {command} ended with {process.returncode}")
    return time.monotonic() - start, peak


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
    args, args.options = parser.parse_known_args()
    inputs = sorted(args.model.parent.glob(args.model.name + "*"))
    rewrites, reads, copies, peaks = [], [], [], []
    for _ in range(args.runs):
        with tempfile.TemporaryDirectory(dir=args.model.parent) as folder:
            out = Path(folder, "out")
            out.mkdir()
            os.sync()
            seconds, peak = rewrite(args, out / "model.onnx")
            rewrites.append(seconds)
            peaks.append(peak)
            os.sync()
            copies.append(timed(lambda: shutil.copytree(out, Path(folder, "copy"))))
            reads.append(timed(lambda: read(inputs)))
            size = sum(f.stat().st_size for f in out.iterdir())
    total = sum(f.stat().st_size for f in inputs)
    median = statistics.median
    print(f"input {total / 1e9:.2f} GB, output {size / 1e9:.2f} GB, {args.format}, {args.threads} threads")
    for name, times in (("rewrite", rewrites), ("read of the input", reads), ("copy of the output", copies)):
        print(f"{name:20} {median(times):7.2f} s   ({', '.join(f'{t:.2f}' for t in times)})")
    print(f"share {100 * max(median(reads), median(copies)) / median(rewrites):.0f} %, peak private {max(peaks) / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
