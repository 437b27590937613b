#!/usr/bin/env python3
"""Tokens a second of a Llama-shaped model in bfloat16 and rewritten: scripts/gpu_generate.sh says what the parts are and calls them.

    python scripts/gpu_generate.py model --bin .gpu/bin --work DIR
    python scripts/gpu_generate.py plain --bin .gpu/bin --work DIR --tokens 128 --variants bf16,fp4,fp8
    python scripts/gpu_generate.py plain --bin target/debug --work DIR --device cpu --shape tiny      # a try without a GPU

Each model runs in a process of its own, bf16 first and again last. A table of tokens a second and the ratios to the mean of
the two bf16 runs go to stdout, and as generate-PART.json to --records.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Folder -> options of mxrewrite; None is the model itself.
VARIANTS = {
    "bf16": None,
    "fp4": ["--format", "fp4_e2m1", "--activation-format", "none"],
    "fp4-head": ["--format", "fp4_e2m1", "--activation-format", "none", "--include", "lm_head"],
    "fp4-both": ["--format", "fp4_e2m1"],
    "fp8": ["--format", "fp8_e4m3", "--activation-format", "none"],
    "fp8-both": ["--format", "fp8_e4m3"],
}
SHAPES = {
    "llama8b": ["--dtype", "bf16"],
    "tiny": ["--layers", "2", "--hidden", "64", "--intermediate", "96", "--heads", "4", "--kv-heads", "2", "--vocab", "300",
             "--table", "100003", "--dtype", "fp32"],
}
# The project's promise: fp4 decodes at least this many times as fast as bf16 at batch 1.
TARGET = 1.5


def call(command):
    """Standard output; the command and its errors are shown."""
    command = [str(part) for part in command]
    print("$", " ".join(command), file=sys.stderr)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    if done.returncode != 0:
        raise RuntimeError(f"exit code {done.returncode}: {' '.join(command)}")
    return done.stdout


def make(args):
    """The model and its rewritten folders, those that are not there."""
    args.work.mkdir(parents=True, exist_ok=True)
    base = args.work / "bf16"
    if not (base / "genai_config.json").exists():
        shape = [*SHAPES[args.shape], "--positions", args.context]
        print(call([sys.executable, "scripts/make_llama.py", "--out", base, "--kv-cache", *shape]), end="")
    for name in args.variants:
        options, out = VARIANTS[name], args.work / name
        if options is None or out.exists():
            continue
        command = [args.bin / "mxrewrite", "--genai", base, "-o", out, *options]
        print(call([*command, "--ops-library", args.bin / "libmx_custom_ops.so"]), end="")


def measure(args, name):
    folder = args.work / name
    if not folder.exists():
        raise RuntimeError(f"{folder} is missing: the part 'model' makes it")
    more = ["--device", args.device, "--prompt-tokens", args.prompt_tokens, "--repeat", args.repeat]
    if args.part.endswith("graph"):
        more += ["--cuda-graph"]
    if args.part.startswith("genai"):
        command = ["scripts/genai_run.py", folder, "--new", args.tokens, *more]
    else:
        command = ["examples/generate.py", folder, "--benchmark", args.tokens, *more]
    return json.loads(call([sys.executable, *command]).splitlines()[-1])


def run(args):
    """Measures every variant; returns 1 when one failed or fp4 is too slow."""
    names = [name for name in args.variants if name != "bf16"]
    figures, failed = [], 0
    for name in ["bf16", *names, "bf16"]:
        try:
            figures.append({"variant": name} | measure(args, name))
        except (RuntimeError, ValueError) as error:
            # The others are worth knowing all the same.
            print(f"error: {name}: {error}", file=sys.stderr)
            failed = 1
    if args.records:
        args.records.mkdir(parents=True, exist_ok=True)
        (args.records / f"generate-{args.part}.json").write_text(json.dumps(figures, indent=2) + "\n")
    base = [f["decode_tokens_per_s"] for f in figures if f["variant"] == "bf16"]
    if not base:
        return 1
    mean = sum(base) / len(base)
    print(f"{'variant':10} {'decode tok/s':>12} {'/ bf16':>7} {'ms/token':>9} {'prefill tok/s':>13}")
    for f in figures:
        rate = f["decode_tokens_per_s"]
        print(f"{f['variant']:10} {rate:12.1f} {rate / mean:7.2f} {1000 / rate:9.2f} {f['prefill_tokens_per_s']:13.0f}")
    best = max((f["decode_tokens_per_s"] / mean for f in figures if f["variant"].startswith("fp4")), default=None)
    if best is not None:
        kept = best >= TARGET
        print(f"bar {args.part}: {'kept' if kept else 'MISSED'}; fp4 decodes {best:.2f} times as fast as bf16, {TARGET} asked for")
        failed |= not kept and args.device == "cuda"
    return int(failed)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("model", "plain", "graph", "genai", "genai-graph"))
    parser.add_argument("--bin", type=Path, required=True, help="folder of mxrewrite and libmx_custom_ops.so")
    parser.add_argument("--work", type=Path, required=True, help="folder of the models")
    parser.add_argument("--records", type=Path)
    parser.add_argument("--variants", default=",".join(VARIANTS), help=f"default: {','.join(VARIANTS)}")
    parser.add_argument("--shape", choices=SHAPES, default="llama8b")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    args = parser.parse_args()
    args.variants = args.variants.split(",")
    unknown = set(args.variants) - set(VARIANTS)
    if unknown:
        parser.error(f"--variants {','.join(sorted(unknown))}: no such variant")
    args.bin, args.work = args.bin.resolve(), args.work.resolve()
    try:
        if args.part == "model":
            make(args)
            return 0
        return run(args)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
