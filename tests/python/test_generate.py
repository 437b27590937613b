"""examples/generate.py: tokens with a KV cache are those of a loop without one over the same weights.

    MX_REWRITE=target/debug/mxrewrite MX_CUSTOM_OPS=target/debug/libmx_custom_ops.so python tests/python/test_generate.py

Run by tests/it/genai.rs, without torch and without a tokenizer. Exit code 0 means that every check passed.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime as ort

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))
import generate  # noqa: E402

SHAPE = "--layers 2 --hidden 64 --intermediate 96 --heads 4 --kv-heads 2 --vocab 300 --positions 64 --table 100003 --dtype fp32"
PROMPT, COUNT = [1, 5, 9], 20


def run(*command, code=0):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == code, f"{command}: exit {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout if code == 0 else done.stderr


def make(folder, *more):
    run(sys.executable, ROOT / "scripts/make_llama.py", "--out", folder, *SHAPE.split(), *more)
    return folder


def example(*arguments, code=0):
    return run(sys.executable, ROOT / "examples/generate.py", *arguments, code=code)


def ids(text):
    return [int(part) for part in text.split()]


def session(path, library=None):
    options = ort.SessionOptions()
    if library:
        options.register_custom_ops_library(library)
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def without_cache(path, library=None):
    """Greedy tokens, the whole sequence run at every step."""
    model, sequence, gaps = session(path, library), list(PROMPT), []
    for _ in range(COUNT):
        feed = np.array([sequence], np.int64)
        logits = model.run(["logits"], {"input_ids": feed, "attention_mask": np.ones_like(feed)})[0][0, -1]
        second, first = np.sort(logits)[-2:]
        gaps.append(first - second)
        sequence.append(int(logits.argmax()))
    return sequence[len(PROMPT) :], min(gaps)


def check_tokens(folder, plain, library):
    want, gap = without_cache(plain / "model.onnx", library)
    # Sums of other lengths round otherwise; a tie would make the comparison one of chances.
    assert gap > 1e-4, f"{folder}: the two likeliest tokens are {gap:.2g} apart, choose another seed"
    for shared in ("yes", "no"):
        prompt = ["--ids", ",".join(map(str, PROMPT))]
        got = ids(example(folder, *prompt, "--max-tokens", COUNT, "--eos", "none", "--shared-cache", shared))
        assert got == want, f"{folder}, shared {shared}: {got} instead of {want}"
    return want


def check_fixed_shapes(folder):
    """The buffers of a CUDA graph, on the CPU: a mask as long as the cache gives the same tokens."""
    files = generate.Files(folder)
    tokens = []
    for graph in (False, True):
        decoder = generate.Decoder(session(files.model), "cpu", 40, True, graph, files.heads())
        # A second text in the same buffers sees nothing of the first.
        tokens.append([list(generate.generate(decoder, p, 12, generate.Sampler())) for p in ([7] * 9, PROMPT)])
    assert tokens[0] == tokens[1], tokens


def check_sampling(folder):
    arguments = [folder, "--ids", "1,5,9", "--max-tokens", COUNT, "--eos", "none", "--temperature", 1.5]
    first = example(*arguments, "--seed", 1)
    assert first == example(*arguments, "--seed", 1), "one seed gives two texts"
    assert first != example(*arguments, "--seed", 2), "two seeds give one text"
    greedy = example(folder, "--ids", "1,5,9", "--max-tokens", COUNT, "--eos", "none")
    assert example(*arguments, "--top-p", 1e-6) == greedy, "the smallest set is the likeliest token"
    # Shares of a known distribution.
    logits, sampler = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32)), generate.Sampler(1.0, 0.75, 3)
    counts = np.bincount([sampler(logits) for _ in range(4000)], minlength=4)
    assert counts[2] == counts[3] == 0 and abs(counts[0] / 4000 - 0.625) < 0.04, counts


def check_ends(folder, want):
    stop = want[4]
    got = ids(example(folder, "--ids", "1,5,9", "--max-tokens", COUNT, "--eos", stop))
    assert got == want[: want.index(stop) + 1], got
    figures = json.loads(example(folder, "--benchmark", 8, "--prompt-tokens", 5, "--repeat", 2))
    assert figures["prompt_tokens"] == 5 and figures["decode_tokens_per_s"] > 0 and len(figures["decode_runs"]) == 2, figures
    assert figures["shared_cache"] is True, "genai_config.json is not followed"


def check_errors(folder, plain):
    assert "no KV cache" in example(plain, "--ids", "1", code=1)
    assert "more than the model's 64" in example(folder, "--ids", "1", "--max-tokens", 64, code=1)
    assert "no such file" in example(plain / "gone.onnx", "--ids", "1", code=1)
    assert "--ids a" in example(folder, "--ids", "a", code=1)
    assert "--prompt or --ids" in example(folder, code=2)


def main():
    rewrite, library = os.environ["MX_REWRITE"], os.environ["MX_CUSTOM_OPS"]
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        cached, plain = make(work / "cached", "--kv-cache"), make(work / "plain")
        want = check_tokens(cached, plain, None)
        check_fixed_shapes(cached)
        check_sampling(cached)
        check_ends(cached, want)
        check_errors(cached, plain)
        # A rewritten folder brings its library along.
        out, single = work / "out", plain.with_name("rewritten")
        options = ["--format", "fp8_e4m3", "--activation-format", "none"]
        run(rewrite, "--genai", cached, "-o", out, "--ops-library", library, *options)
        single.mkdir()
        run(rewrite, plain / "model.onnx", "-o", single / "model.onnx", *options)
        rewritten = check_tokens(out, single, library)
        assert rewritten != want, "the rewritten model gives the tokens of the original: was it rewritten?"
    print("all checks passed: tokens, fixed shapes, sampling, ends, errors, a rewritten folder")


if __name__ == "__main__":
    main()
