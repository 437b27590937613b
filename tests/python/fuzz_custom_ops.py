"""Seeded random mutations of models with mx nodes: any answer but a crash or a hang is fine.

    MX_CUSTOM_OPS=... python tests/python/fuzz_custom_ops.py [--count 2000] [--seed 0]
    MX_CUSTOM_OPS=... python tests/python/fuzz_custom_ops.py --only SEED      (one mutation, in this process)

Each seed makes one model, mutates attributes, input and output lists, tensor shapes, types and bytes, and
tries to load and to run it. Batches run in processes of their own with a time limit; after a crash or hang
the seed at fault is printed and the batch goes on behind it.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import mx_nodes as mx
import numpy as np
import onnx
from mx_nodes import Case, emu
from onnx import TensorProto, helper

FORMATS = (*emu.MX_FORMATS, "mxint8")
INTS = (0, 1, -1, 2, 7, 16, 31, 32, 33, 48, 64, 100, 128, 255, 256, 2**31 - 1, 2**31, 2**32, 2**40, 2**63 - 1, -(2**63))
FLOATS = (0.0, -0.0, 1.0, -2.5, 1e-45, 3e38, float("inf"), float("-inf"), float("nan"))
WORDS = (*FORMATS, "bf16", "none", "tensor", "e8m0", "even", "nearest", "floor", "ceil", "rceil", "", "\0", "é", "x" * 5000)
MEMORY = 6 << 30
BATCH_SECONDS = 240


def base(rng: random.Random) -> tuple[onnx.ModelProto, dict]:
    """A valid model of two MxMatMul nodes and one TokenScores, and its feeds."""
    dtype = rng.choice(("float32", "float32", "float16", "bfloat16"))

    def case(n, k, seed):
        unscaled = rng.random() < 0.2
        weight = rng.choice(("bf16", "fp8_e4m3", "fp8_e5m2") if unscaled else FORMATS)
        activation = rng.choice(("none", weight))
        scale = "none" if unscaled else "tensor" if weight.startswith("fp8") and rng.random() < 0.2 else "e8m0"
        block = rng.choice((16, 32, 32, 64))
        return Case(n, k, weight, activation, scale, block, bias=rng.random() < 0.5, dtype=dtype, shape=(2, 3), seed=seed)

    first, second = case(40, 70, 1), case(24, 40, 2)
    m, other = first.model(), second.model()
    node = other.graph.node[0]
    renamed = {n: f"second.{n}" for n in node.input if n}
    renamed["X"] = "Y"
    for i, n in enumerate(node.input):
        node.input[i] = renamed.get(n, n)
    node.output[0], node.name = "logits", "layer.1/MxMatMul"
    for init in other.graph.initializer:
        init.name = renamed[init.name]
    m.graph.initializer.extend(other.graph.initializer)
    names = ["nll", "entropy", "top1"]
    ins = ["logits", "labels"]
    if rng.random() < 0.3:
        ins, names = [*ins, "logits"], [*names, "kl", "baseline_nll"]
    m.graph.node.extend([node, helper.make_node("TokenScores", ins, names, name="scores", domain="mx")])
    m.graph.input.append(helper.make_tensor_value_info("labels", TensorProto.INT64, [2, 3]))
    for name in names:
        kind = TensorProto.INT64 if name == "top1" else TensorProto.FLOAT
        m.graph.output.append(helper.make_tensor_value_info(name, kind, None))
    return m, {"X": (first.feed(), dtype), "labels": (np.arange(6).reshape(2, 3) % 24, "int64")}


def random_attribute(rng: random.Random, name: str) -> onnx.AttributeProto:
    value = rng.choice(
        (
            lambda: rng.choice(INTS),
            lambda: rng.choice(INTS),
            lambda: rng.choice(FLOATS),
            lambda: rng.choice(WORDS),
            lambda: rng.choice(WORDS),
            lambda: bytes(rng.randrange(256) for _ in range(rng.randrange(1, 20))),
            lambda: [rng.choice(INTS) for _ in range(rng.randrange(1, 4))],
            lambda: [rng.choice(FLOATS)],
            lambda: [rng.choice(WORDS)],
            lambda: mx.tensor("t", np.zeros(3, np.float32), TensorProto.FLOAT),
        )
    )()
    return helper.make_attribute(name, value)


def mutate_attribute(rng, m) -> None:
    node = rng.choice(m.graph.node)
    names = list(Case().attributes())
    if node.attribute and rng.random() < 0.25:
        del node.attribute[rng.randrange(len(node.attribute))]
        return
    name = rng.choice(names)
    for i, a in enumerate(node.attribute):
        if a.name == name and rng.random() < 0.97:
            del node.attribute[i]
            break
    node.attribute.append(random_attribute(rng, name))


def values_of(m) -> list[str]:
    names = [i.name for i in m.graph.initializer] + [i.name for i in m.graph.input]
    return names + [o for n in m.graph.node for o in n.output] + ["", "nowhere"]


def mutate_inputs(rng, m) -> None:
    node = rng.choice(m.graph.node)
    count = len(node.input)
    what = rng.randrange(6)
    if what == 0 and count:
        node.input[rng.randrange(count)] = ""
    elif what == 1 and count:
        del node.input[rng.randrange(count)]
    elif what == 2 and count:
        i, j = rng.randrange(count), rng.randrange(count)
        node.input[i], node.input[j] = node.input[j], node.input[i]
    elif what == 3 and count:
        node.input[rng.randrange(count)] = rng.choice(values_of(m))
    elif what == 4:
        node.input.extend(rng.choice(values_of(m)) for _ in range(rng.randrange(1, 5)))
    elif count:
        names = list(node.input)
        rng.shuffle(names)
        node.input[:] = names


def mutate_outputs(rng, m) -> None:
    node = rng.choice(m.graph.node)
    what = rng.randrange(4)
    if what == 0 and node.output:
        del node.output[rng.randrange(len(node.output))]
    elif what == 1:
        node.output.append(rng.choice(("extra", "", "Y")))
    elif what == 2 and node.output:
        node.output[rng.randrange(len(node.output))] = rng.choice(("", "other", "X"))
    elif m.graph.output:
        del m.graph.output[rng.randrange(len(m.graph.output))]


def mutate_dims(rng, m) -> None:
    init = rng.choice(m.graph.initializer)
    dims, what = list(init.dims), rng.randrange(6)
    if what == 0 and dims:
        dims[rng.randrange(len(dims))] = rng.choice(INTS)
    elif what == 1:
        dims.insert(rng.randrange(len(dims) + 1), rng.choice((0, 1, 2)))
    elif what == 2 and dims:
        del dims[rng.randrange(len(dims))]
    elif what == 3 and len(dims) > 1:
        dims.reverse()
    elif what == 4:
        dims = [int(np.prod(dims))]
    elif dims:
        i = rng.randrange(len(dims))
        dims[i] = max(0, dims[i] + rng.choice((-1, 1, 16, -16)))
    if rng.random() < 0.7:  # bytes that fit the new shape, so that it is the operator that must notice
        count = int(np.prod([float(d) for d in dims])) if all(d >= 0 for d in dims) else 0
        size = {TensorProto.UINT8: 1, TensorProto.FLOAT: 4}.get(init.data_type, 2)
        if count * size < 1 << 20:
            init.raw_data = (init.raw_data * (1 + count * size // max(1, len(init.raw_data))))[: count * size]
    del init.dims[:]
    init.dims.extend(dims)


def mutate_type(rng, m) -> None:
    init = rng.choice(m.graph.initializer)
    init.data_type = rng.randrange(0, 27)
    if rng.random() < 0.7:
        sizes = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 16: 2, 17: 1, 18: 1, 19: 1, 20: 1}
        want = int(np.prod(init.dims)) * sizes.get(init.data_type, 1)
        init.raw_data = (init.raw_data * 9)[:want] if len(init.raw_data) * 9 >= want else init.raw_data


def mutate_bytes(rng, m) -> None:
    init = rng.choice(m.graph.initializer)
    raw, what = bytearray(init.raw_data), rng.randrange(4)
    if what == 0:
        for _ in range(rng.randrange(1, 20)):
            if raw:
                raw[rng.randrange(len(raw))] = rng.randrange(256)
    elif what == 1:
        raw = raw[: rng.randrange(len(raw) + 1)]
    elif what == 2:
        raw += bytes(rng.randrange(1, 100))
    else:
        raw = bytearray(rng.randbytes(len(raw)))
    init.raw_data = bytes(raw)


def mutate_node(rng, m) -> None:
    node = rng.choice(m.graph.node)
    what = rng.randrange(6)
    if what == 0:
        node.op_type = rng.choice(("MxMatMul", "TokenScores", "MxActMatMul", "MxExpertMatMul", "MatMul", ""))
    elif what == 1:
        node.domain = rng.choice(("", "mx", "com.microsoft"))
    elif what == 2:
        node.name = rng.choice(("", "a\0b", "%s%n", "\n", "é" * 3000))
    elif what == 3:
        del m.opset_import[:]
        m.opset_import.extend([helper.make_opsetid("", 21), helper.make_opsetid("mx", rng.choice((0, 1, 2, 1000, 2**31)))])
    elif what == 4:
        m.graph.node.append(node)
    else:
        m.graph.node.remove(node)


def mutate_declared(rng, m) -> None:
    info = rng.choice(list(m.graph.input) + list(m.graph.output))
    kind = info.type.tensor_type.elem_type
    if rng.random() < 0.5:
        shape = [rng.choice((None, "m", 0, 1, 2, 3, 70)) for _ in range(rng.randrange(5))]
        info.CopyFrom(helper.make_tensor_value_info(info.name, kind, rng.choice((None, shape))))
    elif rng.random() < 0.3 and m.graph.initializer:
        init = m.graph.initializer.pop(rng.randrange(len(m.graph.initializer)))
        m.graph.input.append(helper.make_tensor_value_info(init.name, init.data_type, None))
    else:
        info.type.tensor_type.elem_type = rng.choice((1, 2, 3, 6, 7, 8, 9, 10, 11, 16))


MUTATIONS = (
    *(mutate_attribute,) * 4,
    *(mutate_inputs,) * 3,
    *(mutate_dims,) * 3,
    mutate_type,
    mutate_bytes,
    mutate_node,
    mutate_outputs,
    mutate_declared,
)


def feeds_for(rng, s, feeds: dict) -> dict:
    """The feeds, for whatever inputs the session has now; sometimes of another shape."""
    result = {}
    for info in s.get_inputs():
        array, dtype = feeds.get(info.name, (np.zeros((40, 96), np.uint8), "uint8"))
        if rng.random() < 0.15:
            shape = [rng.choice((0, 1, 2, 3, 69, 70, 128)) for _ in range(rng.randrange(5))]
            array = np.resize(array, shape)
        result[info.name] = mx.value(array, dtype)
    return result


def one(seed: int) -> str:
    rng = random.Random(seed)
    m, feeds = base(rng)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        rng.choice(MUTATIONS)(rng, m)
    try:
        s = mx.session(m, rng.choice((1, 2)))
    except Exception:  # noqa: BLE001 - a refusal, of whatever kind, is what we ask for
        return "refused at load"
    try:
        s.run_with_ort_values(None, feeds_for(rng, s, feeds))
    except Exception:  # noqa: BLE001
        return "refused at run"
    return "ran"


def batch(start: int, count: int, progress: Path) -> int:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    outcomes = collections.Counter()
    for seed in range(start, start + count):
        progress.write_text(f"{seed}")
        outcomes[one(seed)] += 1
    print(*(f"{outcome}:{n}" for outcome, n in outcomes.items()), sep="\n")
    return 0


def supervise(seed: int, count: int) -> int:
    outcomes, faults = collections.Counter(), []
    end, step = seed + count, 500
    with tempfile.TemporaryDirectory() as folder:
        progress = Path(folder) / "seed"
        while seed < end:
            size = min(step, end - seed)
            command = [sys.executable, __file__, "--batch", str(seed), str(size), str(progress)]
            try:
                done = subprocess.run(command, timeout=BATCH_SECONDS, capture_output=True, text=True)
                reason = f"exit status {done.returncode}: {done.stderr[-2000:]}" if done.returncode else None
            except subprocess.TimeoutExpired:
                reason = f"no end within {BATCH_SECONDS} s"
            if reason is None:
                outcomes.update({k: int(v) for k, v in (line.split(":") for line in done.stdout.splitlines())})
                seed += size
                continue
            at = int(progress.read_text()) if progress.exists() else seed
            faults.append(at)
            print(f"FAILED: seed {at}: {reason}\n  again with: --only {at}", flush=True)
            outcomes["at fault"] += 1
            if len(faults) == 10:
                break
            seed, end = at + 1, end
    print(f"{count} mutations: {dict(outcomes)}")
    # A mutator that never gets past loading, or never breaks anything, tests nothing.
    useful = all(outcomes[o] > count // 50 for o in ("refused at load", "ran")) and outcomes["refused at run"] > 0
    if not useful:
        print("FAILED: the mutations do not reach every outcome")
    return 1 if faults or not useful else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int)
    parser.add_argument("--batch", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.batch:
        return batch(int(args.batch[0]), int(args.batch[1]), Path(args.batch[2]))
    if args.only is not None:
        print(one(args.only))
        return 0
    return supervise(args.seed, args.count)


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.exit(main())
