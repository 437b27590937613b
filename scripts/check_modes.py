#!/usr/bin/env python3
"""Figures of mxeval's modes against other code: rolling against lm-eval's own functions, the others
against a direct computation. Every log-probability here comes from plain ONNX Runtime's logits.

Needs lm-eval, tokenizers, onnxruntime, numpy and pyarrow, in a venv of its own (not in CI):

    python3 -m venv V && V/bin/pip install lm-eval tokenizers onnxruntime numpy pyarrow
    V/bin/python scripts/check_modes.py --mxeval target/release/mxeval --model M/model.onnx \\
        --tokenizer HF/tokenizer.json --data documents.parquet --max-samples 8 --seq-len 512

For --device cuda both need ONNX Runtime with CUDA. The exit code is 1 where a figure differs by more
than --bound, relatively.

Where the model runs on another machine, without lm-eval: --dump-windows writes rolling's windows,
scripts/score_windows.py scores them there by PyTorch, and --sums and --record take its sums and mxeval's
results.jsonl:

    check_modes.py ... --modes rolling --dump-windows windows.json
    score_windows.py HF_DIR windows.json sums.json                             # there, beside mxeval --mode rolling
    check_modes.py ... --modes rolling --sums sums.json --record results.jsonl
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile

import numpy as np
import onnxruntime as ort
import pyarrow.parquet as pq
import tokenizers
from lm_eval.api.metrics import bits_per_byte, weighted_perplexity
from lm_eval.api.task import Task
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

MODES = ["per-document", "rolling", "stride", "concat", "second-half"]


class Model:
    """Log-probabilities by plain ONNX Runtime, one window at a time."""

    def __init__(self, path, device):
        providers = ["CPUExecutionProvider"]
        if device.startswith("cuda"):
            ort.preload_dlls()
            ordinal = int(device.partition(":")[2] or 0)
            cuda = {"device_id": ordinal, "use_tf32": 0}
            providers = [("CUDAExecutionProvider", cuda), *providers]
        self.session = ort.InferenceSession(path, providers=providers)
        self.inputs = {value.name for value in self.session.get_inputs()}
        self.cache = {}

    def log_p(self, ids):
        """At each position of `ids` but the last: log p of the token that follows it."""
        key = tuple(ids)
        if key not in self.cache:
            # The last window alone: modes with equal windows do not follow each other.
            self.cache = {key: self._log_p(np.array([ids[:-1]], dtype=np.int64), ids[1:])}
        return self.cache[key]

    def _log_p(self, row, labels):
        feeds = {"input_ids": row}
        if "attention_mask" in self.inputs:
            feeds["attention_mask"] = np.ones_like(row)
        if "position_ids" in self.inputs:
            feeds["position_ids"] = np.arange(row.shape[1], dtype=np.int64)[None]
        unknown = self.inputs - feeds.keys()
        if unknown:
            sys.exit(f"does not know what to feed {', '.join(sorted(unknown))}; export without a cache")
        logits = self.session.run(["logits"], feeds)[0][0]
        result = np.empty(len(labels))
        for start in range(0, len(labels), 64):
            part = logits[start : start + 64].astype(np.float64)
            part -= part.max(-1, keepdims=True)
            chosen = part[np.arange(len(part)), labels[start : start + 64]]
            result[start : start + 64] = chosen - np.log(np.exp(part).sum(-1))
        return result

    def score(self, context, continuation):
        """Sum of log p of `continuation` after `context`, as lm-eval's models return it."""
        return float(self.log_p(context + continuation)[-len(continuation) :].sum())


class Text:
    """The documents, and the token that begins a text."""

    def __init__(self, args):
        self.tokenizer = tokenizers.Tokenizer.from_file(args.tokenizer)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.texts = pq.read_table(args.data, columns=["text"])["text"].to_pylist()[: args.max_samples]
        folder = os.path.dirname(args.tokenizer)
        with open(os.path.join(folder, "tokenizer_config.json"), encoding="utf-8") as file:
            config = json.load(file)
        names = [config.get("bos_token"), config.get("eos_token")]
        names = [name["content"] if isinstance(name, dict) else name for name in names]
        # lm-eval's prefix_token_id: BOS, else EOS.
        self.prefix = next(self.tokenizer.token_to_id(name) for name in names if name is not None)

    def ids(self, text, special=False):
        return self.tokenizer.encode(text, add_special_tokens=special).ids


def rolling_windows(text, document, args):
    """lm-eval's windows of a document: context and continuation of each."""
    ids = text.ids(document)
    windows = get_rolling_token_windows(
        token_list=ids, prefix_token=text.prefix, max_seq_len=args.seq_len, context_len=1
    )
    return ids, [make_disjoint_window(window) for window in windows]


def rolling(model, text, args):
    """lm-eval: its windows, its counts of bytes and its aggregation."""
    items, tokens = [], 0
    sums = json.load(open(args.sums, encoding="utf-8"))["log_p"] if args.sums else None
    for number, document in enumerate(text.texts):
        ids, pairs = rolling_windows(text, document, args)
        log_p = sums[number] if sums else sum(model.score(*pair) for pair in pairs)
        items.append((log_p, Task.count_bytes(document)))
        tokens += len(ids)
    nll = -sum(item[0] for item in items)
    byte_perplexity = weighted_perplexity(items)
    bits = bits_per_byte(items)
    assert math.isclose(math.log2(byte_perplexity), bits, rel_tol=1e-12)
    return {"bits_per_byte": bits, "xent": nll / tokens, "tokens": tokens,
            "bytes": sum(item[1] for item in items)}


def per_document(model, text, args):
    sums = []
    for document in text.texts:
        ids = text.ids(document, special=True)[: args.seq_len]
        if len(ids) > 1:
            sums.append((-model.log_p(ids).sum(), len(ids) - 1))
    return totals(sums)


def stride(model, text, args):
    """The loop of Hugging Face's page, with sums in place of its means of means."""
    step = args.stride or args.seq_len // 2
    sums = []
    for document in text.texts:
        ids = text.ids(document, special=True)
        previous_end = 0
        for begin in range(0, len(ids), step):
            end = min(begin + args.seq_len, len(ids))
            target = end - previous_end
            # Labels are shifted: the first token of a window has no prediction.
            target = min(target, end - begin - 1)
            if target > 0:
                sums.append((-model.log_p(ids[begin:end])[-target:].sum(), target))
            previous_end = end
            if end == len(ids):
                break
    return totals(sums)


def stream(text):
    return text.ids("\n\n".join(text.texts), special=True)


def concat(model, text, args):
    """GPTQ: windows of the stream, of each all tokens but the first."""
    ids = np.array(stream(text))
    windows = ids[: len(ids) // args.seq_len * args.seq_len].reshape(-1, args.seq_len)
    return totals((-model.log_p(row.tolist()).sum(), args.seq_len - 1) for row in windows)


def second_half(model, text, args):
    """llama.cpp's perplexity(): logits from n_ctx / 2 on predict the tokens after them."""
    with_special, plain = text.ids("a", special=True), text.ids("a")
    adds_bos = with_special != plain and with_special[0] != plain[0]
    ids, n_ctx = stream(text), args.seq_len
    first = n_ctx // 2
    sums = []
    for chunk in range(len(ids) // n_ctx):
        row = ids[chunk * n_ctx : (chunk + 1) * n_ctx]
        if adds_bos:
            row[0] = with_special[0]
        # log_p[i] is of token i + 1, given those up to i.
        sums.append((-model.log_p(row)[first : n_ctx - 1].sum(), n_ctx - first - 1))
    return totals(sums)


def totals(sums):
    sums = list(sums)
    nll, tokens = (math.fsum(part) for part in zip(*sums))
    return {"xent": nll / tokens, "tokens": int(tokens)}


def mxeval(args, mode):
    command = [args.mxeval, args.model, "--tokenizer", args.tokenizer, "--data", args.data,
               "--max-samples", str(args.max_samples), "--seq-len", str(args.seq_len),
               "--device", args.device, "--batch-size", str(args.batch_size), "--mode", mode, "--json"]
    if mode == "stride" and args.stride:
        command += ["--stride", str(args.stride)]
    with tempfile.TemporaryDirectory() as out:
        done = subprocess.run([*command, "--out", out], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"mxeval --mode {mode} ended with {done.returncode}")
    return json.loads(done.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--mxeval", default="target/release/mxeval")
    parser.add_argument("--model", help="not needed with --dump-windows, or with --sums and --record")
    parser.add_argument("--tokenizer", required=True, help="with tokenizer_config.json beside it")
    parser.add_argument("--data", required=True, help="a parquet file with a column `text`")
    parser.add_argument("--max-samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--stride", type=int)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--bound", type=float, default=1e-5)
    parser.add_argument("--dump-windows", help="write rolling's windows as JSON, and end")
    parser.add_argument("--sums", help="what score_windows.py made of them")
    parser.add_argument("--record", help="results.jsonl of mxeval, in place of running it")
    args = parser.parse_args()

    text = Text(args)
    if args.dump_windows:
        windows = [rolling_windows(text, document, args)[1] for document in text.texts]
        with open(args.dump_windows, "w", encoding="utf-8") as file:
            json.dump({"documents": windows}, file)
        return 0
    model = None if args.sums else Model(args.model, args.device)
    references = dict(zip(MODES, [per_document, rolling, stride, concat, second_half]))
    worst = 0.0
    for mode in args.modes.split(","):
        if args.record:
            with open(args.record, encoding="utf-8") as file:
                record = json.loads(file.readline())
        else:
            record = mxeval(args, mode)
        expected = references[mode](model, text, args)
        for name, value in expected.items():
            difference = abs(record[name] / value - 1)
            exact = name in ("tokens", "bytes")
            worst = max(worst, math.inf if exact and record[name] != value else difference)
            print(f"{mode:12} {name:14} {record[name]:<20} {value:<20} {difference:.1e}", flush=True)
    print(f"largest relative difference {worst:.1e}, bound {args.bound:.0e}")
    return int(worst > args.bound)


if __name__ == "__main__":
    sys.exit(main())
