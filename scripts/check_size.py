#!/usr/bin/env python3
"""Rewrites a model that is larger than the memory it may use, and judges what came out.

    scripts/check_size.py [--folder DIR] [--layers 18] [--format fp8_e4m3] [--threads 2] [--limit-mb 1024] [--sites 100]

Makes a Llama-shaped model in float32 (hidden 4096, intermediate 14336, vocabulary 128256; 18 layers are 20 GB) by make_llama.py,
which looks at the free space first, unless the folder holds it already. Then mxrewrite runs with its private memory limited
(RLIMIT_DATA), and its peak is sampled: RssAnon, which is all private memory of a process that maps its input read-only. Last, sites
drawn at random are quantised again by mx_emulation.py, from the input's bytes, and compared byte for byte.
"""

import argparse
import os
import resource
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import onnx

import mx_emulation as emu

HERE = Path(__file__).parent
# float64 work of the emulation: 64 MB a temporary.
PIECE = 8 << 20


def peak_private(process):
    """Highest RssAnon in bytes, sampled until the process ends."""
    peak = 0
    while process.poll() is None:
        try:
            for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                if line.startswith("RssAnon:"):
                    peak = max(peak, int(line.split()[1]) * 1024)
        except OSError:
            pass
        time.sleep(0.02)
    return peak


def rewrite(args, model, out):
    command = [args.mxrewrite, model, "-o", out, "--force", "--format", args.format, "--threads", str(args.threads), *args.options]
    limit = args.limit_mb << 20
    start = time.monotonic()
    process = subprocess.Popen(command, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)))
    peak = peak_private(process)
    if process.returncode:
        raise SystemExit(f"error: {command} ended with {process.returncode}")
    return time.monotonic() - start, peak


def mapped(folder, tensor):
    """The bytes of an external tensor as an array, not read yet."""
    place = {e.key: e.value for e in tensor.external_data}
    dtype = np.dtype("<f4") if tensor.data_type == onnx.TensorProto.FLOAT else np.uint8
    return np.memmap(folder / place["location"], dtype, "r", int(place.get("offset", 0)), tuple(tensor.dims))


def judge(job):
    """How many bytes of one site differ from the emulation, and how many there are."""
    name, weight, codes, scales, spec = job
    weight, codes, scales = (mapped(*part) for part in (weight, codes, scales))
    rows = max(1, PIECE // weight.shape[0])
    different = 0
    for first in range(0, weight.shape[1], rows):
        part = slice(first, first + rows)
        want_codes, want_scales = emu.packed(np.ascontiguousarray(weight[:, part].T), spec)
        different += int((codes[part] != want_codes).sum()) + int((scales[part] != want_scales).sum())
    return name, different, codes.size + scales.size


def jobs(args, model, out):
    source, rewritten = onnx.load(model, load_external_data=False), onnx.load(out, load_external_data=False)
    before = {t.name: t for t in source.graph.initializer}
    after = {t.name: t for t in rewritten.graph.initializer}
    weights = {n.name: before[n.input[1]] for n in source.graph.node if n.op_type == "MatMul" and n.input[1] in before}
    sites = [n for n in rewritten.graph.node if n.op_type == "MxMatMul"]
    chosen = np.random.default_rng(args.seed).permutation(len(sites))[: args.sites]
    spec = emu.Spec(args.format)
    for node in (sites[i] for i in chosen):
        parts = (after[node.input[1]], after[node.input[2]])
        yield node.name, (model.parent, weights[node.name]), *((out.parent, part) for part in parts), spec


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("out/size"))
    parser.add_argument("--layers", type=int, default=18)
    parser.add_argument("--format", default="fp8_e4m3")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit-mb", type=int, default=1024)
    parser.add_argument("--most-mb", type=int, default=330, help="more private memory than this is a failure")
    parser.add_argument("--sites", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mxrewrite", default="target/release/mxrewrite")
    args, args.options = parser.parse_known_args()
    model, out = args.folder / "model.onnx", args.folder / "rewritten" / "model.onnx"
    if not model.exists():
        make = [sys.executable, HERE / "make_llama.py", "--out", args.folder, "--layers", str(args.layers), "--dtype", "fp32"]
        subprocess.run(make, check=True)
    out.parent.mkdir(exist_ok=True)
    seconds, peak = rewrite(args, model, out)
    size = sum(f.stat().st_size for f in args.folder.glob("model.onnx*"))
    print(f"{size / 1e9:.1f} GB in {seconds:.0f} s, {args.threads} threads, peak private {peak / 1e6:.0f} MB", flush=True)
    wrong = 0
    with ProcessPoolExecutor(max(1, (os.cpu_count() or 2))) as pool:
        results = list(pool.map(judge, jobs(args, model, out)))
    for name, different, of in results:
        if different:
            wrong += 1
            print(f"{name}: {different} of {of} bytes differ")
    print(f"{len(results) - wrong} of {len(results)} sites equal to quantising them in memory")
    if wrong or len(results) < args.sites or peak > args.most_mb * 1e6:
        raise SystemExit("failed")


if __name__ == "__main__":
    main()
