#!/usr/bin/env python3
"""mxeval on GPUs against mxeval on the CPU, on the fixture that needs no download.

    tests/python/gpu_eval.py --mxeval target/release/mxeval --ort-lib .../libonnxruntime.so.1.31.1

Needs Python alone. The ONNX Runtime is a build with the CUDA provider; its libraries have to be
found by the loader (LD_LIBRARY_PATH). Checks, each on a line of its own:

- a sweep on cuda:0: every stage ok, mean loss within 1e-3 of the CPU's and two standard errors of the
  difference; again: the same bits;
- two workers on one device, documents sharded, two devices: the same bits as one worker;
- base types bf16 and fp16; batches halved after running out of memory; --resume; a device that is
  not there.

Exit code 77 and the reason where there is no GPU (1 with MX_REQUIRE=cuda).
"""

import argparse
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
FIGURES = ("docs", "tokens", "bytes", "xent", "ppl", "entropy", "bits_per_byte")
# Between devices, or between kernels of one device.
XENT = 1e-3
FAILURES = []


def check(name, good, detail=""):
    print(f"{'ok  ' if good else 'FAIL'} {name}{': ' + str(detail) if detail != '' else ''}", flush=True)
    if not good:
        FAILURES.append(name)


class Runs:
    def __init__(self, arguments, folder):
        self.arguments, self.folder = arguments, folder

    def command(self, name, *more):
        arguments = self.arguments
        return [
            arguments.mxeval, "--sweep", arguments.model, "--tokenizer", arguments.tokenizer,
            "--data", arguments.data, "--max-samples", str(arguments.max_samples),
            "--seq-len", str(arguments.seq_len), "--ort-lib", arguments.ort_lib,
            "--out", str(self.folder / name), "--json", *more,
        ]

    def sweep(self, name, *more, environment=None, keep=False):
        """Records by stage, seconds of the whole command, run.json."""
        out = self.folder / name
        if not keep:
            shutil.rmtree(out, ignore_errors=True)
        start = time.monotonic()
        done = subprocess.run(
            self.command(name, *more), capture_output=True, text=True,
            env={**os.environ, **(environment or {})},
        )
        seconds = time.monotonic() - start
        if done.returncode not in (0, 1) or not done.stdout:
            check(f"{name} runs", False, done.stderr[-2000:])
            return {}, seconds, {}, done.stderr
        records = [json.loads(line) for line in done.stdout.splitlines()]
        run = json.loads((out / "run.json").read_text())
        for record in records:
            if record["status"] == "failed":
                check(f"{name}: {record['stage']}", False, record["reason"])
        return {record["stage"]: record for record in records}, seconds, run, done.stderr


def same_bits(name, one, other):
    differing = [
        f"{stage}.{field}: {one[stage][field]} {other.get(stage, {}).get(field)}"
        for stage in one for field in ("status", *FIGURES)
        if one[stage][field] != other.get(stage, {}).get(field)
    ]
    check(f"{name}: the same bits as one worker on one device", not differing, "; ".join(differing[:4]))


def near(name, one, other, bound, stages=None):
    for stage in stages or one:
        a, b = one[stage]["xent"], other.get(stage, {}).get("xent")
        if a is None:
            continue
        difference = math.inf if b is None else abs(a - b)
        check(f"{name}: {stage} xent {b} within {bound:g} of {a:.6f}", difference <= bound, f"{difference:.2e}")


def details(run, record):
    return run["stages"].get(f"{record['model']} {record['stage']}", {})


def standard_error(one, other):
    """Of the difference of two mean losses over the same documents, where both runs kept them."""
    if not (one and other) or one["tokens"] != other["tokens"]:
        return None
    pairs = [(a - b, tokens) for a, b, tokens in zip(one["nll"], other["nll"], one["tokens"]) if tokens]
    whole = sum(tokens for _, tokens in pairs)
    mean = sum(difference for difference, _ in pairs) / whole
    squares = sum((difference - tokens * mean) ** 2 for difference, tokens in pairs)
    return (squares * len(pairs) / max(len(pairs) - 1, 1)) ** 0.5 / whole


def near_the_cpu(cpu, known, gpu, run):
    """Sums in another order turn the rounding of some activations, which every later layer sees: the more
    tokens, the less it shows in the mean. So the bound grows by two standard errors of the difference."""
    for stage, record in cpu.items():
        pair = [details(known, record).get("documents"), details(run, gpu[stage]).get("documents")]
        if record["xent"] is None:
            continue
        error = standard_error(*pair)
        check(f"cuda: {stage} keeps every document's loss", error is not None)
        near("cuda", {stage: record}, gpu, XENT + 2 * (error or 0.0))


def speed(records, run):
    for record in records.values():
        more = details(run, record)
        if record["seconds"]:
            share = more["outside_run_seconds"] / record["seconds"]
            print(
                f"     {record['stage']:16} {record['tokens_per_second']:9.0f} tok/s, outside the run {share:6.1%}, "
                f"load {more['load_seconds']:.2f} s, rewrite {more['rewrite_seconds']:.2f} s, "
                f"loaded {more.get('loaded_device_bytes', 0) / 1e6:.1f} MB, "
                f"peak {(record['peak_memory_bytes'] or 0) / 1e6:.1f} MB"
            )


def against_the_cpu(runs):
    cpu, _, known, _ = runs.sweep("cpu", "--device", "cpu", "--documents")
    one, seconds, run, _ = runs.sweep("one", "--device", "cuda:0", "--documents")
    if not one:
        return cpu, one, seconds
    capability = tuple(map(int, run["gpus"][0]["compute_capability"].split(".")))
    for stage, record in one.items():
        expected = "skipped" if stage == "nvfp8" and capability < (8, 9) else "ok"
        check(f"cuda: {stage} is {expected}", record["status"] == expected, record["reason"] or "")
        check(f"cuda: {stage} says where it ran", record["device"] == "cuda:0", record["device"])
    near_the_cpu(cpu, known, one, run)
    if one["nvfp8"]["status"] == "ok":
        near("real against emulated", {"nvfp8": one["nvfp8-emu-e4m3"]}, one, 0.05)
    speed(one, run)
    same_bits("cuda again", one, runs.sweep("again", "--device", "cuda:0")[0])
    return cpu, one, seconds


def divisions_of_labour(runs, one, seconds, count):
    two = ("--workers-per-device", "2")
    same_bits("two workers", one, runs.sweep("workers", "--device", "cuda:0", *two)[0])
    sharded = runs.sweep("sharded", "--device", "cuda:0", "--shard-documents", *two)[0]
    same_bits("sharded over two workers", one, sharded)
    if count < 2:
        print("     skipped: two devices (this machine has one)")
        return
    both, faster, _, _ = runs.sweep("both", "--device", "cuda:0,1")
    same_bits("two devices", one, both)
    places = {record["device"] for record in both.values()}
    check("two devices: both worked", places == {"cuda:0", "cuda:1"}, places)
    print(f"     {seconds:.1f} s on one device, {faster:.1f} s on two: {seconds / faster:.2f} x")
    same_bits("sharded over two devices", one, runs.sweep("shards", "--device", "cuda:0,1", "--shard-documents")[0])


def base_types(runs, one):
    stages = "baseline,bf16,mx-fp8_e4m3,mx-fp4_e2m1,int8,nvfp8"
    for base in ("bf16", "fp16", "fp32"):
        records = runs.sweep(base, "--device", "cuda:0", "--base-dtype", base, "--stages", stages)[0]
        kept = [stage for stage in records if one[stage]["status"] == "ok"]
        near(f"base {base}", {stage: one[stage] for stage in kept}, records, 0.05 if base != "fp32" else 1e-6)


def memory(runs, one):
    stages = ("--stages", "baseline,mx-fp8_e4m3")
    # Logits, attention and weights of 64 rows do not fit, those of some rows do.
    limit = {"MX_GPU_MEM_LIMIT": str(runs.arguments.memory_limit)}
    small, _, _, said = runs.sweep(
        "small", "--device", "cuda:0", "--batch-size", "64", *stages, environment=limit
    )
    for stage, record in small.items():
        halved = "out of memory" in (record["reason"] or "") and "ran out of memory" in said
        check(f"little memory: {stage} is halved and ok", record["status"] == "ok" and halved, record["reason"])
    # Batches of other extents run in other kernels, which add in another order. The baseline's loss keeps
    # its digits; where activations are quantised, one beside a rounding boundary goes to the neighbouring
    # code, which every later layer sees: as between the CPU and a GPU, and with the same bound.
    near("little memory", one, small, 1e-5, ["baseline"])
    near("little memory", one, small, XENT, ["mx-fp8_e4m3"])


def folder_and_faults(runs, one):
    again, _, _, said = runs.sweep("one", "--device", "cuda:0", "--documents", "--resume", keep=True)
    same_bits("--resume", one, again)
    check("--resume measures nothing twice", "kept from an earlier run" in said)
    done = subprocess.run(runs.command("nowhere", "--device", "cuda:99"), capture_output=True, text=True)
    check("a device that is not there", done.returncode == 1 and "no device 99" in done.stderr, done.stderr.strip())


def gpus(runs):
    """Names of the GPUs mxeval sees, or why it sees none."""
    command = runs.command("probe", "--device", "cuda", "--stages", "baseline")
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0 and "--device cuda:" in done.stderr:
        return [], done.stderr.strip().splitlines()[-1]
    run = runs.folder / "probe" / "run.json"
    found = json.loads(run.read_text())["gpus"] if run.is_file() else []
    return [gpu["name"] for gpu in found], done.stderr


def main():
    fixture = ROOT / "fixtures"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mxeval", required=True)
    parser.add_argument("--ort-lib", default=os.environ.get("ORT_DYLIB_PATH"))
    parser.add_argument("--model", default=str(fixture / "tinylm/dynamo/model.onnx"))
    parser.add_argument("--tokenizer", default=str(fixture / "tinylm/tokenizer.json"))
    parser.add_argument("--data", default=str(fixture / "mini_pile.parquet"))
    parser.add_argument("--max-samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--memory-limit", type=int, default=64 << 20, help="bytes that hold some rows")
    arguments = parser.parse_args()
    if not arguments.ort_lib:
        parser.error("--ort-lib or ORT_DYLIB_PATH is needed")
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(arguments, pathlib.Path(folder))
        names, said = gpus(runs)
        if not names:
            print(f"skipped: {said}")
            return 1 if "cuda" in os.environ.get("MX_REQUIRE", "").split(",") else 77
        print(f"     {len(names)} x {names[0]}")
        _, one, seconds = against_the_cpu(runs)
        if one:
            divisions_of_labour(runs, one, seconds, len(names))
            base_types(runs, one)
            memory(runs, one)
            folder_and_faults(runs, one)
    print(f"{len(FAILURES)} failures" if FAILURES else "all good")
    return 1 if FAILURES else 0


if __name__ == "__main__":
    sys.exit(main())
