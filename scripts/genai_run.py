#!/usr/bin/env python3
"""Greedy generation by ONNX Runtime GenAI, for scripts: ids in, ids and tokens a second out, as one JSON object.

    python scripts/genai_run.py DIR --ids 1,5,9 --new 64 --threads 2 [--device cuda] [--logits first.npy]

DIR is a folder with genai_config.json, rewritten or not. Needs onnxruntime-genai (onnxruntime-genai-cuda) and numpy; no
tokenizer. --logits saves the float32 logits that follow the prompt. The first run warms up; the median of --repeat more is
reported. A step is generate_next_token; the prompt's is append_tokens.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np


def load(folder, device, threads=None, cuda_graph=False):
    """The model, with threads and provider instead of the configuration's."""
    import onnxruntime

    if device == "cuda":
        onnxruntime.preload_dlls()
    import onnxruntime_genai as og

    config = og.Config(folder)
    config.clear_providers()
    if device == "cuda":
        config.append_provider("cuda")
        config.set_provider_option("cuda", "enable_cuda_graph", str(int(cuda_graph)))
        config.set_provider_option("cuda", "use_tf32", "0")
    # The end of a text is no end of a measurement: the last id of a vocabulary is as good as never generated.
    vocabulary = json.loads((Path(folder) / "genai_config.json").read_text())["model"]["vocab_size"]
    config.overlay(json.dumps({"model": {"eos_token_id": vocabulary - 1}}))
    if threads:
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    return og, og.Model(config)


def generate(og, model, prompt, new):
    """Ids, seconds of the prompt, seconds of the steps after the first token, first logits."""
    params = og.GeneratorParams(model)
    params.set_search_options(do_sample=False, max_length=len(prompt) + new)
    generator = og.Generator(model, params)
    start = time.perf_counter()
    generator.append_tokens(np.array(prompt, np.int32))
    logits = np.asarray(generator.get_logits(), np.float32).reshape(-1, generator.get_logits().shape[-1])[-1].copy()
    middle = time.perf_counter()
    generator.generate_next_token()
    first = time.perf_counter()
    while not generator.is_done():
        generator.generate_next_token()
    end = time.perf_counter()
    ids = [int(i) for i in generator.get_sequence(0)][len(prompt) :]
    return ids, middle - start, end - first, logits


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--ids", help="the prompt as ids with commas between (default: --prompt-tokens of them)")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--cuda-graph", action="store_true")
    parser.add_argument("--logits", help="save the logits that follow the prompt here (.npy)")
    args = parser.parse_args()
    prompt = [int(i) for i in args.ids.split(",")] if args.ids else [3 + i % 97 for i in range(args.prompt_tokens)]
    start = time.perf_counter()
    og, model = load(args.folder, args.device, args.threads, args.cuda_graph)
    loaded = time.perf_counter() - start
    runs = [generate(og, model, prompt, args.new) for _ in range(args.repeat + 1)]
    ids, _, _, logits = runs[0]
    if any(run[0] != ids for run in runs):
        print("note: runs gave different tokens", file=sys.stderr)
    if args.logits:
        np.save(args.logits, logits)
    rates = [(len(ids) - 1) / run[2] for run in runs[1:]]
    figures = {"model": args.folder, "device": model.device_type, "cuda_graph": args.cuda_graph, "load_s": round(loaded, 2)}
    figures |= {"prompt_tokens": len(prompt), "new_tokens": len(ids)}
    figures["prefill_tokens_per_s"] = round(statistics.median(len(prompt) / run[1] for run in runs[1:]), 2)
    figures["decode_tokens_per_s"] = round(statistics.median(rates), 2)
    figures |= {"decode_runs": [round(rate, 2) for rate in rates], "ids": ids}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
