"""scripts/make_llama.py: a tiny model in onnxruntime against a NumPy forward pass, and what mxrewrite finds in it.

    MX_REWRITE=target/debug/mxrewrite python tests/python/test_make_llama.py

Run by tests/it/lowerings.rs. Exit code 0 means that every check passed.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import numpy_helper

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "make_llama.py"
LAYERS, HIDDEN, WIDE, HEADS, KV, VOCAB = 2, 64, 96, 4, 2, 300
SHAPE = ["--layers", LAYERS, "--hidden", HIDDEN, "--intermediate", WIDE, "--heads", HEADS, "--kv-heads", KV]
SHAPE += ["--vocab", VOCAB, "--positions", 64, "--table", 100003, "--rope-theta", 10000]


def make(folder, *more):
    command = [sys.executable, SCRIPT, "--out", folder, *map(str, SHAPE), *map(str, more)]
    subprocess.run(command, check=True, capture_output=True)
    return Path(folder) / "model.onnx"


def rms_norm(x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)


def rotate(x):
    """x is [heads, sequence, size]; halves, as Hugging Face rotates."""
    half = x.shape[-1] // 2
    angles = np.outer(np.arange(x.shape[1]), 10000.0 ** (-np.arange(half) / half))
    cos, sin = np.cos(angles), np.sin(angles)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def forward(w, ids):
    """Logits of one sequence without padding."""
    x = w["model.embed_tokens.weight"][ids]
    size, length = HIDDEN // HEADS, len(ids)
    causal = np.where(np.tril(np.ones((length, length))) == 1, 0, -np.inf)
    for layer in range(LAYERS):
        path = f"model.layers.{layer}"
        weight = lambda name: w[f"{path}.{name}.MatMul.weight"]
        n = rms_norm(x)
        split = lambda v, count: v.reshape(length, count, size).swapaxes(0, 1)
        q = rotate(split(n @ weight("self_attn.q_proj"), HEADS))
        k = np.repeat(rotate(split(n @ weight("self_attn.k_proj"), KV)), HEADS // KV, 0)
        v = np.repeat(split(n @ weight("self_attn.v_proj"), KV), HEADS // KV, 0)
        scores = q @ k.swapaxes(1, 2) / np.sqrt(size) + causal
        p = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (p / p.sum(-1, keepdims=True)) @ v
        x = x + mixed.swapaxes(0, 1).reshape(length, HIDDEN) @ weight("self_attn.o_proj")
        n = rms_norm(x)
        gate = n @ weight("mlp.gate_proj")
        x = x + (gate / (1 + np.exp(-gate)) * (n @ weight("mlp.up_proj"))) @ weight("mlp.down_proj")
    return rms_norm(x) @ w["lm_head.MatMul.weight"]


def check(attention):
    with tempfile.TemporaryDirectory() as folder:
        path = make(folder, "--dtype", "fp32", "--attention", attention)
        weights = {t.name: numpy_helper.to_array(t).astype(np.float64) for t in onnx.load(path).graph.initializer}
        session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        rng = np.random.default_rng(3)
        ids = rng.integers(0, VOCAB, (3, 17))
        mask = np.ones_like(ids)
        lengths = [17, 9, 1]
        for row, length in enumerate(lengths):
            mask[row, length:] = 0
        got = session.run(None, {"input_ids": ids, "attention_mask": mask})[0]
        assert np.isfinite(got).all(), "padding gives NaN"
        worst = 0.0
        for row, length in enumerate(lengths):
            want = forward(weights, ids[row, :length])
            worst = max(worst, float(np.abs(got[row, :length] - want).max() / want.std()))
        assert worst < 1e-4, f"{attention}: {worst:.3g} of the logits' deviation"
        first = path.with_name("model.onnx.data").read_bytes()
        make(folder, "--dtype", "fp32", "--attention", attention)
        assert path.with_name("model.onnx.data").read_bytes() == first, "the same seed gives other bytes"
        sites = plan(path)
        paths = [site["module_path"] for site in sites]
        names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
        names += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
        assert paths == [f"model.layers.{i}.{name}" for i in range(LAYERS) for name in names], paths
    return f"{attention}: worst {worst:.1e} of the logits' deviation, {len(sites)} layers at tier b"


def plan(path):
    command = [os.environ["MX_REWRITE"], path, "--tier", "b", "--plan", "--json"]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)["sites"]


def sixteen_bits():
    """bf16 and fp16 files hold the fp32 file's numbers, rounded."""
    with tempfile.TemporaryDirectory() as folder:
        load = lambda path: {t.name: t for t in onnx.load(path).graph.initializer}
        wide = load(make(folder, "--dtype", "fp32"))
        for dtype, bound in (("bf16", 2.0**-8), ("fp16", 2.0**-10)):
            narrow = load(make(folder, "--dtype", dtype))
            for name, tensor in wide.items():
                a, b = (numpy_helper.to_array(t).astype(np.float64) for t in (tensor, narrow[name]))
                assert a.shape == b.shape and (np.abs(a - b) <= bound * np.abs(a) + 1e-7).all(), (dtype, name)
    return "bf16 and fp16: the same numbers, rounded"


if __name__ == "__main__":
    for line in (check("gqa"), check("plain"), sixteen_bits()):
        print(line)
