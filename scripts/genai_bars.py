#!/usr/bin/env python3
"""What text generation with ONNX Runtime GenAI costs and gains on this CPU: models of its builder, rewritten and not.

    python -m onnxruntime_genai.models.builder -i HF_DIR -o WORK/fp32 -p fp32 -e cpu
    python -m onnxruntime_genai.models.builder -i HF_DIR -o WORK/int4 -p int4 -e cpu
    python scripts/genai_bars.py --work WORK --bin target/release --hf HF_DIR --threads 2

Rewrites WORK/fp32 by `mxrewrite --genai` to WORK/mx-* (again where that is older than the programs), and then

  logits  compares the logits after the prompt in GenAI with plain ONNX Runtime's on the same graph, bit by bit
  text    compares fp8 weight-only's greedy tokens with PyTorch's, whose weights are the packed codes read back
  speed   takes turns between all models, --rounds times, in one process: medians of tokens a second of decoding

It prints Markdown and, with --records FILE, writes JSON. Needs numpy, onnx, onnxruntime and onnxruntime-genai; `text` torch
and transformers. Exit code 0: logits and text are equal (speed is reported, not judged).
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime as ort

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "scripts")]
import generate  # noqa: E402
import genai_run  # noqa: E402

WEIGHT_ONLY = ["--activation-format", "none"]
HEAD = ["--include", "lm_head"]
VARIANTS = {
    "mx-fp8": ["--format", "fp8_e4m3", *WEIGHT_ONLY],
    "mx-fp8-head": ["--format", "fp8_e4m3", *WEIGHT_ONLY, *HEAD],
    "mx-fp4": ["--format", "fp4_e2m1", *WEIGHT_ONLY],
    "mx-fp4-head": ["--format", "fp4_e2m1", *WEIGHT_ONLY, *HEAD],
    # As MatMulNBits with accuracy level 4 does, which the builder's int4 has: activations of eight bits.
    "mx-fp4-int8": ["--format", "fp4_e2m1", "--activation-format", "mxint8"],
    "mx-fp4-int8-head": ["--format", "fp4_e2m1", "--activation-format", "mxint8", *HEAD],
    "mx-fp8-both": ["--format", "fp8_e4m3", "--activation-format", "fp8_e4m3"],
    "mx-fp8-both-head": ["--format", "fp8_e4m3", "--activation-format", "fp8_e4m3", *HEAD],
}
# "The capital of France is the city of Paris, which" in SmolLM2's tokens; any ids do.
PROMPT = [504, 3575, 282, 4649, 314, 260, 2679, 282, 7042, 28, 527]


def rewrite(args):
    programs = [args.bin / "mxrewrite", args.bin / "libmx_custom_ops.so"]
    newest = max(program.stat().st_mtime for program in programs)
    for name in args.variants:
        out = args.work / name
        if out.exists() and (out / "genai_config.json").stat().st_mtime > newest:
            continue
        command = [programs[0], "--genai", args.work / "fp32", "-o", out, "--force", "--ops-library", programs[1]]
        done = subprocess.run([str(part) for part in command] + VARIANTS[name], capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"error: {name}: {done.stderr}")


def plain_logits(folder, threads):
    """What plain ONNX Runtime computes for the prompt on the folder's graph, as GenAI does: past and present in one buffer."""
    files, options = generate.Files(folder), ort.SessionOptions()
    options.intra_op_num_threads = threads
    if files.library:
        options.register_custom_ops_library(str(files.library))
    session = ort.InferenceSession(str(files.model), options, providers=["CPUExecutionProvider"])
    length = len(PROMPT) + 1
    return generate.Decoder(session, "cpu", length, files.shares_buffers(), False, files.heads()).step(PROMPT)


def logits(args, loaded):
    """Model -> largest difference of the first logits, and whether all bits are the same."""
    out = {}
    # A process of its own: GenAI loads another copy of ONNX Runtime than Python does, and the operator library serves one.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as plain:
        for name, (og, model) in loaded.items():
            _, _, _, got = genai_run.generate(og, model, PROMPT, 1)
            want = plain.submit(plain_logits, args.work / name, args.threads).result()
            same = np.array_equal(got.view(np.uint32), want.view(np.uint32))
            out[name] = {"max_difference": float(np.abs(got - want).max()), "same_bits": bool(same), "top": int(want.argmax())}
    return out


def dequantised(path):
    """Weight name -> [n, k] float32, read back from the packed codes of a rewritten model."""
    import mx_emulation
    import onnx
    from onnx import numpy_helper

    model = onnx.load(path)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    out = {}
    for node in model.graph.node:
        if node.domain != "mx":
            continue
        said = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        spec = mx_emulation.Spec(said["weight_format"].decode(), said["block_size"])
        codes, scales = (numpy_helper.to_array(tensors[node.input[i]]) for i in (1, 2))
        values = mx_emulation.decode(mx_emulation.unpack(codes, spec.format), spec.format)
        blocks = values.reshape(len(codes), -1, spec.block_size)
        name = node.input[1].removesuffix(".mx_codes").removesuffix(".MatMul.weight")
        out[name] = mx_emulation.dequantize(blocks, scales, spec, said["k"]).astype(np.float32)
    return out


def torch_model(hf, weights):
    """The Hugging Face model in float32 with these Linear weights; the builder packs q, k and v into one."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32).eval()
    modules, left = dict(model.named_modules()), dict(weights)
    with torch.no_grad():
        for name, weight in weights.items():
            place = name.replace(".attn.", ".self_attn.")
            parts = {place: weight}
            if place.endswith("qkv_proj"):
                names = [place.removesuffix("qkv_proj") + f"{part}_proj" for part in "qkv"]
                ends = np.cumsum([modules[n].weight.shape[0] for n in names])[:-1]
                parts = dict(zip(names, np.split(weight, ends)))
            for part, value in parts.items():
                assert modules[part].weight.shape == value.shape, f"{part}: {value.shape}"
                # A new tensor: the head's may be the embedding's.
                modules[part].weight = torch.nn.Parameter(torch.from_numpy(np.ascontiguousarray(value)), requires_grad=False)
            del left[name]
    assert not left and len(weights) > 0
    return model


def torch_tokens(model, count):
    """Greedy tokens, and at each step the gap between the two likeliest."""
    import torch

    ids, cache, out, gaps = torch.tensor([PROMPT]), None, [], []
    with torch.no_grad():
        for _ in range(count):
            step = model(input_ids=ids, past_key_values=cache, use_cache=True)
            top = step.logits[0, -1].topk(2)
            out.append(int(top.indices[0]))
            gaps.append(float(top.values[0] - top.values[1]))
            ids, cache = torch.tensor([[out[-1]]]), step.past_key_values
    return out, gaps


def text(args, loaded):
    """fp8 weight-only (and fp4) in GenAI against PyTorch with the dequantised weights."""
    import torch

    torch.set_num_threads(args.threads)
    out = {}
    for name in ("fp32", "mx-fp8", "mx-fp8-head", "mx-fp4", "mx-fp4-head"):
        if name not in loaded:
            continue
        weights = {} if name == "fp32" else dequantised(args.work / name / "model.onnx")
        model = torch_model(args.hf, weights) if weights else plain_torch(args.hf)
        want, gaps = torch_tokens(model, args.tokens)
        got = genai_run.generate(*loaded[name], PROMPT, args.tokens)[0]
        first = next((i for i, (a, b) in enumerate(zip(got, want)) if a != b), None)
        out[name] = {"equal": got == want, "tokens": len(got), "smallest_gap": min(gaps)}
        if first is not None:
            out[name] |= {"first_difference": first, "gap_there": gaps[first]}
    return out


def plain_torch(hf):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32).eval()


def speed(args, loaded):
    """Tokens a second, all models in turns; one turn before is not counted."""
    rates = {name: {"decode": [], "prefill": []} for name in loaded}
    for turn in range(args.rounds + 1):
        for name, model in loaded.items():
            ids, prefill, steps, _ = genai_run.generate(*model, PROMPT, args.tokens)
            if turn:
                rates[name]["decode"].append((len(ids) - 1) / steps)
                rates[name]["prefill"].append(len(PROMPT) / prefill)
    return {n: {k: statistics.median(v) for k, v in r.items()} | {"decode_runs": r["decode"]} for n, r in rates.items()}


def ratio(a, b):
    """Median over the turns: other work on the machine comes and goes between them."""
    return f"{statistics.median(x / y for x, y in zip(a['decode_runs'], b['decode_runs'])):.2f}"


def machine():
    names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}"


def report(args, results):
    print(f"{machine()}; {args.threads} threads, {args.tokens} tokens, {args.rounds} turns; ONNX Runtime {ort.__version__}\n")
    if "logits" in results:
        print("| model | first logits against plain ONNX Runtime |\n|---|---|")
        for name, r in results["logits"].items():
            print(f"| {name} | {'the same bits' if r['same_bits'] else 'largest difference %.2e' % r['max_difference']} |")
        print()
    if "text" in results:
        print("| model | greedy tokens against PyTorch with the dequantised weights | smallest gap of the two likeliest |\n|---|---|---|")
        for name, r in results["text"].items():
            said = f"all {r['tokens']} equal"
            if not r["equal"]:
                said = f"differ from token {r['first_difference']} on, where PyTorch's two likeliest are {r['gap_there']:.2e} apart"
            print(f"| {name} | {said} | {r['smallest_gap']:.2e} |")
        print()
    if "speed" in results:
        rates = results["speed"]
        print("| model | tokens/s | / fp32 | / int4 | lowest to highest |\n|---|---:|---:|---:|---|")
        for name, r in rates.items():
            over = [ratio(r, rates[other]) if other in rates else "-" for other in ("fp32", "int4")]
            print(f"| {name} | {r['decode']:.1f} | {over[0]} | {over[1]} | {min(r['decode_runs']):.1f} to {max(r['decode_runs']):.1f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder with the builder's fp32 and int4")
    parser.add_argument("--bin", type=Path, default=ROOT / "target/release", help="folder of mxrewrite and libmx_custom_ops.so")
    parser.add_argument("--hf", type=Path, help="the Hugging Face folder, for `text`")
    parser.add_argument("--parts", default="logits,text,speed")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--records", type=Path)
    args = parser.parse_args()
    args.variants, args.parts = args.variants.split(","), args.parts.split(",")
    if "text" in args.parts and not args.hf:
        parser.error("the part text needs --hf")
    rewrite(args)
    names = [name for name in ("fp32", "int4", *args.variants) if (args.work / name).exists()]
    loaded = {name: genai_run.load(str(args.work / name), "cpu", args.threads) for name in names}
    results = {}
    for part, measure in (("logits", logits), ("text", text), ("speed", speed)):
        if part in args.parts:
            print(f"{part} ...", file=sys.stderr)
            results[part] = measure(args, loaded)
    report(args, results)
    if args.records:
        args.records.write_text(json.dumps(results, indent=2) + "\n")
    good = all(r["same_bits"] for r in results.get("logits", {}).values())
    judged = [r["equal"] for name, r in results.get("text", {}).items() if name.startswith("mx-fp8")]
    return 0 if good and all(judged) else 1


if __name__ == "__main__":
    sys.exit(main())
