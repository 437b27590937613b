#!/usr/bin/env python3
"""Log-probabilities of windows by PyTorch: the part of scripts/check_modes.py that needs a model.

    python3 scripts/score_windows.py MODEL_DIR windows.json sums.json [--device cuda]

windows.json: `check_modes.py --dump-windows`: of every document its windows, each [context, continuation].
sums.json: `log_p`, of every document the sum over its continuations. float32, TF32 off; log-softmax in float64.
Needs torch and transformers only.
"""

import argparse
import json

import torch
from transformers import AutoModelForCausalLM


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("model", help="Hugging Face model folder")
    parser.add_argument("windows")
    parser.add_argument("sums")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, attn_implementation="eager")
    model = model.eval().to(args.device)
    with open(args.windows, encoding="utf-8") as file:
        documents = json.load(file)["documents"]
    sums = []
    with torch.inference_mode():
        for windows in documents:
            total = 0.0
            for context, continuation in windows:
                ids = torch.tensor([context + continuation], device=args.device)
                logits = model(input_ids=ids[:, :-1], use_cache=False).logits[0, -len(continuation) :]
                # A part at a time: 2,048 rows of a vocabulary in float64 are gigabytes.
                for start in range(0, len(continuation), 256):
                    log_p = torch.log_softmax(logits[start : start + 256].double(), dim=-1)
                    labels = ids[0, -len(continuation) :][start : start + 256]
                    total += log_p.gather(1, labels[:, None]).sum().item()
            sums.append(total)
    with open(args.sums, "w", encoding="utf-8") as file:
        json.dump({"log_p": sums}, file)
    print(f"{len(sums)} documents, sum of log p {sum(sums):.6f}")


if __name__ == "__main__":
    main()
