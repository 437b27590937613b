#!/usr/bin/env python3
"""What the project promises of GPUs, measured: scripts/gpu_bars.sh says what the parts are and calls them.

    tests/python/gpu_bars.py smollm2 --model DIR/model.onnx --data FILE --cpu DIR --bin .gpu/bin --ort-lib LIB
    tests/python/gpu_bars.py llama8b --model DIR ...
    tests/python/gpu_bars.py devices --model DIR/model.onnx --data FILE ...
    tests/python/gpu_bars.py python ...

Every part prints its table last, then a line `bar ...` a promise, and leaves the records and run.json of mxeval as
one JSON file in --records. Exit code 0: all promises are kept.
"""

import argparse
import json
import math
import os
import pathlib
import random
import re
import subprocess
import sys
import tempfile
from types import SimpleNamespace

from gpu_eval import FAILURES, FIGURES, ROOT, XENT, Runs, check, details, standard_error

MX = ["mx-fp8_e4m3", "mx-fp8_e5m2", "mx-fp6_e3m2", "mx-fp6_e2m3", "mx-fp4_e2m1"]
STAGES = ["baseline", "bf16", "bfp16", "nvfp8-emu-e4m3", "nvfp8-emu-e5m2", *MX, "int8", "nvfp8"]
BARS = []


def bar(name, good, detail):
    BARS.append(f"bar {name}: {'kept' if good else 'MISSED'}; {detail}")
    if not good:
        FAILURES.append(name)


def table(head, rows):
    cells = [head, *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for row in cells:
        print("  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]))


def number(value, form):
    return "-" if value is None else format(value, form)


class Bench:
    """mxeval on one model and text, as gpu_eval.py calls it."""

    def __init__(self, args, model, tokenizer, data, max_samples, seq_len):
        self.args, self.work = args, pathlib.Path(args.work)
        self.work.mkdir(parents=True, exist_ok=True)
        mxeval = str(pathlib.Path(args.bin) / "mxeval")
        self.runs = Runs(
            SimpleNamespace(mxeval=mxeval, model=str(model), tokenizer=str(tokenizer), data=str(data),
                            max_samples=max_samples, seq_len=seq_len, ort_lib=args.ort_lib),
            self.work,
        )

    def sweep(self, name, *more):
        """Records by stage, seconds of the command, run.json; both are kept as NAME.json."""
        # Tokenising comes before everything else: it must not be what a short run measures.
        loaders = str(min(16, os.cpu_count() or 1))
        records, seconds, run, said = self.runs.sweep(name, "--loader-workers", loaders, *more)
        print("".join(f"     {line}\n" for line in said.splitlines() if "..." not in line), end="", flush=True)
        kept = pathlib.Path(self.args.records)
        kept.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"command_seconds": seconds, "records": list(records.values()), "run": run}, indent=1)
        (kept / f"{name}.json").write_text(text + "\n")
        return records, seconds, run


# -------------------------------------------------------------------------------------------- smollm2


def read_run(folder):
    """Records by stage and run.json of a folder that mxeval wrote."""
    lines = (folder / "results.jsonl").read_text().splitlines()
    return {record["stage"]: record for record in map(json.loads, lines)}, json.loads((folder / "run.json").read_text())


def smollm2(args):
    folder = pathlib.Path(args.cpu)
    cpu, known = read_run(folder)
    documents = {stage: details(known, record).get("documents") for stage, record in cpu.items()}
    # nvfp8 is no stage of a CPU's sweep: its graph, measured there by name, may lie beside.
    if (folder / "nvfp8").is_dir():
        records, other = read_run(folder / "nvfp8")
        cpu |= records
        documents |= {stage: details(other, record).get("documents") for stage, record in records.items()}
    options, batch = known["options"], known["models"][0]["batch_size"]
    tokenizer = args.tokenizer or pathlib.Path(args.model).parent / "tokenizer.json"
    bench = Bench(args, args.model, tokenizer, args.data, options["max_samples"], options["seq_len"])
    how = ["--tier", options["tier"], "--batch-size", str(batch), "--device", args.device, "--documents"]
    gpu, seconds, run = bench.sweep("smollm2", *how)
    for what, one, other in (
        ("text", known["data"]["sha256"], run["data"]["sha256"]),
        ("model", known["models"][0]["sha256"], run["models"][0]["sha256"]),
        ("tokenizer", known["models"][0]["tokenizer"]["sha256"], run["models"][0]["tokenizer"]["sha256"]),
    ):
        check(f"the CPU's {what}", one == other, "" if one == other else f"{one} there, {other} here")
    rows, far, noise = [], [], []
    for stage in STAGES:
        record, reference = gpu.get(stage, {}), cpu.get(stage, {})
        pair = (record.get("xent"), reference.get("xent"))
        off = None if None in pair else pair[0] - pair[1]
        same = record.get("tokens") == reference.get("tokens") if off is not None else True
        error = None if off is None else standard_error(details(run, record).get("documents"), documents.get(stage))
        if off is None or abs(off) > XENT or not same:
            far.append(stage)
            noise += [stage] * bool(error and same and abs(off) <= XENT + 2 * error)
        figures = ((pair[1], ".6f"), (pair[0], ".6f"), (off, "+.1e"), (error, ".1e"))
        speed = ((record.get("tokens_per_second"), ".0f"), (record.get("seconds"), ".2f"))
        rows.append([stage, record.get("status", "absent"), *(number(*pair) for pair in (*figures, *speed))])
    table(["stage", "status", "xent CPU", "xent GPU", "difference", "its error", "tokens/s", "s"], rows)
    ok = [stage for stage in STAGES if gpu.get(stage, {}).get("status") == "ok"]
    first = next(iter(gpu.values()), {})
    bar("3a", ok == STAGES, f"{len(ok)} of {len(STAGES)} stages are ok, {seconds:.1f} s")
    bar("3b", not far, f"xent within {XENT:g} of the CPU's, {first.get('docs')} documents, {first.get('tokens')} tokens"
        + (f"; not: {', '.join(far)}" if far else "")
        + (f"; of these by no more than two standard errors: {', '.join(noise)}" if noise else ""))


# -------------------------------------------------------------------------------------------- llama8b


def random_text(path, documents, characters):
    """Words of random letters: the tokenizer of a small model has enough tokens of each."""
    rng = random.Random(1)
    with open(path, "w") as file:
        for _ in range(documents):
            letters = "".join(rng.choices("etaoinshrdlu      ", k=characters))
            file.write(json.dumps({"text": letters.strip()}) + "\n")


def replaced_bytes(args, model):
    """What the layers that tier b replaces take at 16 bits a weight."""
    command = [pathlib.Path(args.bin) / "mxrewrite", model, "--tier", "b", "--plan", "--json"]
    plan = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return sum(2 * site["n"] * site["k"] for site in plan["sites"])


def llama8b(args):
    folder = pathlib.Path(args.model)
    model = folder / "model.onnx"
    if not model.is_file():
        command = [sys.executable, ROOT / "scripts/make_llama.py", "--out", folder, "--dtype", args.dtype, *args.shape.split()]
        subprocess.run(command, check=True)
    with tempfile.TemporaryDirectory() as text:
        data = pathlib.Path(text) / "random.jsonl"
        random_text(data, args.batches * args.batch_size, 8 * args.seq_len)
        tokenizer = ROOT / "fixtures/tinylm/tokenizer.json"
        bench = Bench(args, model, tokenizer, data, args.batches * args.batch_size, args.seq_len)
        base = ["--base-dtype", args.dtype] if args.device != "cpu" else []
        how = ["--tier", "b", "--stages", args.stages, "--batch-size", str(args.batch_size), "--device", args.device, *base]
        records, seconds, run = bench.sweep("llama8b", *how)
    llama8b_table(args, records, run, replaced_bytes(args, model), seconds)


def llama8b_table(args, records, run, replaced, seconds):
    baseline = records.get("baseline", {"status": "absent"})
    if baseline["status"] != "ok":
        return bar("5a", False, f"the baseline is {baseline['status']}: {baseline.get('reason')}")
    whole = details(run, baseline).get("loaded_device_bytes")
    rows, times, shares, sizes = [], {}, {}, {}
    for stage in [stage for stage in STAGES if stage in records]:
        record, more = records[stage], details(run, records[stage])
        if record["status"] != "ok":
            rows.append([stage, record["status"], *["-"] * 10])
            continue
        times[stage], shares[stage] = record["seconds"] / baseline["seconds"], more["outside_run_share"]
        loaded = more.get("loaded_device_bytes")
        if loaded and whole and stage in MX:
            # What is not replaced takes the same in both.
            sizes[stage] = (loaded / whole, (loaded - (whole - replaced)) / replaced)
        memory = [loaded and loaded / 1e6, loaded and (loaded - record["model_bytes"]) / 1e6, *sizes.get(stage, (None, None))]
        rows.append([
            stage, record["status"], f"{record['seconds']:.2f}", f"{times[stage]:.3f}", f"{record['tokens_per_second']:.0f}",
            f"{shares[stage]:.2%}", f"{more['load_seconds']:.1f}", f"{more['rewrite_seconds']:.1f}",
            *(number(value, form) for value, form in zip(memory, (".1f", "+.1f", ".2%", ".2%"))),
        ])
        expected = args.batches * args.batch_size * (args.seq_len - 1)
        check(f"{stage}: every document fills its window", record["tokens"] == expected, record["tokens"])
    head = ["stage", "status", "s", "of baseline", "tokens/s", "outside", "load s", "rewrite s", "loaded MB", "less file"]
    table([*head, "in all", "replaced"], rows)
    print(f"     the whole command: {seconds:.1f} s; the replaced layers take {replaced / 1e6:.1f} MB in 16 bits")
    mx = {stage: times.get(stage, math.inf) for stage in MX if stage in records}
    slow = ", ".join(stage for stage, ratio in mx.items() if ratio > 1.3)
    detail = f"each MX stage within 1.3 times the {args.dtype} baseline: at most {max(mx.values(), default=math.inf):.3f}"
    bar("5a", bool(mx) and not slow, detail + (f"; not: {slow}" if slow else ""))
    worst = max(shares.values())
    bar("5b", worst < 0.10, f"outside the session's run under 10 %: at most {worst:.2%}")
    if args.device != "cpu":
        in_all, part = sizes.get("mx-fp4_e2m1", (math.inf, math.inf))
        detail = f"fp4 in device memory: {in_all:.2%} of {args.dtype}'s in all (below 38 %), {part:.2%} of the replaced layers'"
        bar("5c", in_all < 0.38 and part < 0.27, detail + " (below 27 %)")


# -------------------------------------------------------------------------------------------- devices


def pieces(path, characters, wanted):
    """The documents' text cut into pieces of about that many characters, at spaces; round again until there are enough."""
    if path.suffix == ".parquet":
        import pyarrow.parquet

        texts = pyarrow.parquet.read_table(path, columns=["text"]).column("text").to_pylist()
    else:
        texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    found = []
    for text in texts:
        found += re.findall(rf"(?s)\S.{{{characters - 1}}}\S*", text)
    if not found:
        raise SystemExit(f"error: {path} has no document of {characters} characters")
    return [found[index % len(found)] for index in range(wanted)]


def devices(args):
    ordinals = args.devices.split(",")
    with tempfile.TemporaryDirectory() as text:
        data = pathlib.Path(text) / "pieces.jsonl"
        documents = pieces(pathlib.Path(args.data), 6 * args.seq_len, args.documents)
        data.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
        tokenizer = args.tokenizer or pathlib.Path(args.model).parent / "tokenizer.json"
        bench = Bench(args, args.model, tokenizer, data, args.documents, args.seq_len)
        names = ["cpu", "cpu"] if args.device == "cpu" else [f"cuda:{ordinals[0]}", f"cuda:{args.devices}"]
        # The first command of a machine also reads files and compiles kernels.
        bench.runs.arguments.max_samples = 16
        bench.sweep("devices_warm", "--device", names[1])
        bench.runs.arguments.max_samples = args.documents
        one = bench.sweep("devices_one", "--device", names[0])
        all_of = bench.sweep("devices_all", "--device", names[1])
    if not (one[0] and all_of[0]):
        return bar("6a", False, "a command failed")
    devices_table(one, all_of)
    ratio = one[1] / all_of[1]
    detail = f"the whole command: {one[1]:.1f} s on one, {all_of[1]:.1f} s on {len(ordinals)}: {ratio:.2f} x (1.7)"
    bar("6a", ratio >= 1.7 and len(ordinals) > 1, detail)
    differing = [
        f"{stage}.{field}" for stage, record in one[0].items() for field in ("status", *FIGURES)
        if record[field] != all_of[0].get(stage, {}).get(field)
    ]
    reasons = {record["stage"]: record["reason"] or "" for run in (one, all_of) for record in run[0].values()}
    halved = [stage for stage, reason in reasons.items() if "out of memory" in reason]
    detail = f"{len(one[0])} stages, results identical to the bit" + (f"; not: {', '.join(differing[:6])}" if differing else "")
    detail += f"; halved after running out of memory: {', '.join(halved)}" if halved else ""
    bar("6b", not differing and not halved and list(one[0]) == STAGES, detail)


def devices_table(one, all_of):
    """Where the time went in a sweep on one device and in one on several."""
    rows, busy = [], ({}, {})
    for stage in [stage for stage in STAGES if stage in one[0] and stage in all_of[0]]:
        cells = [stage, one[0][stage]["status"]]
        for (records, _, run), spent in zip((one, all_of), busy):
            record, more = records[stage], details(run, records[stage])
            times = more.get("rewrite_seconds", 0), more.get("load_seconds", 0), record["seconds"] or 0
            spent[record["device"]] = spent.get(record["device"], 0) + times[1] + times[2]
            cells += [record["device"], *(f"{time:.2f}" for time in times)]
        loss, other = one[0][stage]["xent"], all_of[0][stage]["xent"]
        rows.append([*cells, number(loss, ".6f"), "same" if loss == other else "DIFFER"])
    table(["stage", "status", *["device", "rewrite", "load", "score"] * 2, "xent", "bits"], rows)
    alone, longest = (max(spent.values()) for spent in busy)
    print(f"     loading and scoring: {alone:.1f} s on one, at most {longest:.1f} s on each of several: {alone / longest:.2f} x")


# -------------------------------------------------------------------------------------------- python


def rewritten(args, folder):
    """Models for gpu_ops.py; the first is the one that docs/cuda.md speaks of."""
    models = []
    for export, fmt in (("dynamo", "fp4_e2m1"), ("dynamo", "fp8_e4m3"), ("torchscript", "fp6_e2m3")):
        out = folder / ("model.b-fp4_e2m1.onnx" if not models else f"{export}.b-{fmt}.onnx")
        model = ROOT / f"fixtures/tinylm/{export}/model.onnx"
        command = [pathlib.Path(args.bin) / "mxrewrite", model, "--tier", "b", "--format", fmt]
        subprocess.run([*command, "-o", out], check=True, capture_output=True)
        models.append(out)
    return models


def python(args):
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        models = rewritten(args, folder)
        text = (ROOT / "docs/cuda.md").read_text()
        program = re.search(r"## From Python\n.*?```python\n(.*?)```", text, re.DOTALL)[1]
        library = folder / "target/release/libmx_custom_ops.so"
        library.parent.mkdir(parents=True)
        library.symlink_to((pathlib.Path(args.bin) / library.name).resolve())
        program += "print(session.get_providers(), logits.shape, np.isfinite(logits).all())\n"
        done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True)
        said = (done.stdout if done.returncode == 0 else done.stderr).strip()
        print(said, flush=True)
        good = done.returncode == 0 and said.splitlines()[-1].startswith("['CUDAExecutionProvider'") and said.endswith("True")
        bar("7a", good, f"the program of docs/cuda.md: {said.splitlines()[-1][:120] if said else 'no output'}")
        more = [word for model in models for word in ("--model", str(model))]
        command = [sys.executable, ROOT / "tests/python/gpu_ops.py", *args.areas.split(), "--devices", args.devices, *more]
        done = subprocess.run(command, env={**os.environ, "MX_CUSTOM_OPS": str(pathlib.Path(args.bin).resolve() / library.name)})
        bar("7b", done.returncode == 0, "gpu_ops.py, fallback off, rewritten models included")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(dest="part", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--bin", required=True, help="folder with mxeval, mxrewrite, libmx_custom_ops.so")
    common.add_argument("--ort-lib", required=True)
    common.add_argument("--work", required=True, help="folder for rewritten models")
    common.add_argument("--records", required=True, help="folder for the records")
    common.add_argument("--device", default="cuda:0")

    part = parts.add_parser("smollm2", parents=[common])
    part.add_argument("--model", required=True)
    part.add_argument("--tokenizer", help="default: beside the model")
    part.add_argument("--data", required=True)
    part.add_argument("--cpu", required=True, help="folder of the CPU's sweep; nvfp8.jsonl in it: nvfp8's graph, measured there")

    part = parts.add_parser("llama8b", parents=[common])
    part.add_argument("--model", required=True, help="folder; the model is made there when it is not there")
    part.add_argument("--shape", default="", help="options of scripts/make_llama.py, in one argument")
    part.add_argument("--dtype", default="bf16")
    part.add_argument("--stages", default=",".join(["baseline", *MX]))
    part.add_argument("--batches", type=int, default=32)
    part.add_argument("--batch-size", type=int, default=8)
    part.add_argument("--seq-len", type=int, default=512)

    part = parts.add_parser("devices", parents=[common])
    part.add_argument("--model", required=True)
    part.add_argument("--tokenizer", help="default: beside the model")
    part.add_argument("--data", required=True, help=".parquet or .jsonl; its documents are cut into pieces")
    part.add_argument("--documents", type=int, default=1200)
    part.add_argument("--seq-len", type=int, default=512)
    part.add_argument("--devices", default="0,1")

    part = parts.add_parser("python", parents=[common])
    part.add_argument("--areas", default="", help="areas of gpu_ops.py, in one argument; all by default")
    part.add_argument("--devices", default="0")
    return parser.parse_args()


def main():
    args = arguments()
    {"smollm2": smollm2, "llama8b": llama8b, "devices": devices, "python": python}[args.part](args)
    for name in FAILURES:
        print(f"failed: {name}")
    print("\n".join(BARS))
    return 1 if FAILURES else 0


if __name__ == "__main__":
    sys.exit(main())
