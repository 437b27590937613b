#!/usr/bin/env python3
"""Writes a Llama-shaped causal language model with random weights as ONNX, for measurements of speed and memory.

    python scripts/make_llama.py --out models/llama8b                   # the shape of Llama 3.1 8B, 16 GB
    python scripts/make_llama.py --out models/tiny --layers 2 --hidden 64 --intermediate 96 --heads 4 --kv-heads 2 \\
        --vocab 256 --dtype fp32

It needs numpy and onnx only. Inputs are those of a Hugging Face export (input_ids, attention_mask; padding on the
right), module paths stand in the node names as a TorchScript export has them, and every operator has a CUDA kernel in
the chosen type. `--attention gqa` (flash attention on CUDA; float32 on the CPU only) computes attention in one
com.microsoft::GroupQueryAttention a layer, `--attention plain` in MatMul and Softmax.

`--kv-cache` (with gqa) adds the inputs past_key_values.N.key and .value and the outputs present.N.key and .value, all
[batch, kv_heads, length, head], as the builder of ONNX Runtime GenAI makes them, and writes genai_config.json.
attention_mask then counts past and new tokens, and past and present may be one buffer.

Weights are normal numbers of standard deviation 1/sqrt(fan in), taken from one table that every tensor enters at
another place: 16 GB are written at the speed of memory and disk, and the same seed gives the same bytes. They go to
several data files, because a file system lets one thread at a time write to a file.
"""

import argparse
import json
import math
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

TYPES = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
# Prime, so that no row of any matrix is the start of another one.
TABLE = 67_108_859
ALIGNMENT = 4096
THREADS = min(16, os.cpu_count() or 1)


def encode(values, dtype):
    """float32 -> the bytes' integer or float type, half to even."""
    if dtype == "fp32":
        return values
    if dtype == "fp16":
        return values.astype(np.float16)
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


class Weights:
    """Random tensors, laid out one behind the other in the data files."""

    def __init__(self, dtype, seed, shards, table=TABLE):
        self.dtype = dtype
        self.sizes = {"model.onnx.data" + (f".{i}" if shards > 1 else ""): 0 for i in range(shards)}
        self.places = []  # (file, offset, elements, standard deviation, place in the table)
        self.next = np.random.default_rng(seed)
        self.seed, self.table = seed, table

    def add(self, name, shape, deviation):
        tensor = TensorProto(name=name, data_type=TYPES[self.dtype], dims=shape)
        elements = math.prod(shape)
        length = elements * (4 if self.dtype == "fp32" else 2)
        tensor.data_location = TensorProto.EXTERNAL
        shard = min(self.sizes, key=self.sizes.get)
        offset = self.sizes[shard]
        for key, value in (("location", shard), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        self.places.append((shard, offset, elements, deviation, int(self.next.integers(self.table))))
        self.sizes[shard] = -(-(offset + length) // ALIGNMENT) * ALIGNMENT
        return tensor

    def size(self):
        return sum(self.sizes.values())

    def tables(self):
        """deviation -> the table of numbers with it."""
        unit = np.empty(self.table, np.float32)
        parts = np.array_split(unit, 64)
        rngs = [np.random.default_rng(s) for s in np.random.SeedSequence(self.seed).spawn(len(parts))]
        deviations = sorted({place[3] for place in self.places})
        out = {d: np.empty(self.table, encode(unit[:1], self.dtype).dtype) for d in deviations}
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(lambda rng, part: rng.standard_normal(dtype=np.float32, out=part), rngs, parts))

            def scale(job):
                deviation, part = job
                start = (part.ctypes.data - unit.ctypes.data) // 4
                out[deviation][start : start + len(part)] = encode(part * np.float32(deviation), self.dtype)

            list(pool.map(scale, [(d, part) for d in deviations for part in parts]))
        return out

    def write(self, folder):
        tables = self.tables()

        def write_shard(shard):
            with open(folder / shard, "wb") as file:
                for name, offset, elements, deviation, start in self.places:
                    if name == shard:
                        file.seek(offset)
                        put(file, tables[deviation], start, elements)
                file.truncate(self.sizes[shard])

        def put(file, table, start, elements):
            done = 0
            while done < elements:
                at = (start + done) % self.table
                count = min(elements - done, self.table - at)
                file.write(memoryview(table[at : at + count]).cast("B"))
                done += count

        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(write_shard, self.sizes))


class Builder:
    """The graph, node by node."""

    def __init__(self, args):
        self.args = args
        self.type = TYPES[args.dtype]
        self.weights = Weights(args.dtype, args.seed, args.shards, args.table)
        self.nodes, self.initializers = [], []
        self.pasts, self.presents = [], []
        self.head = args.hidden // args.heads

    def node(self, op, name, inputs, outputs=1, domain="", **attributes):
        """One node; returns its output, or the names of its outputs when they are given."""
        names = [f"{name}_output_0"] if outputs == 1 else outputs
        self.nodes.append(helper.make_node(op, inputs, names, name, domain=domain, **attributes))
        return names[0] if outputs == 1 else names

    def constant(self, name, values, data_type=None):
        data_type = data_type or self.type
        if data_type == self.type:
            array = encode(np.asarray(values, np.float32), self.args.dtype)
        else:
            array = np.asarray(values, helper.tensor_dtype_to_np_dtype(data_type))
        self.initializers.append(helper.make_tensor(name, data_type, array.shape, array.tobytes(), raw=True))
        return name

    def ints(self, name, values):
        return self.constant(name, values, TensorProto.INT64)

    def linear(self, path, x, fan_in, fan_out):
        weight = f"{path}.MatMul.weight"
        self.initializers.append(self.weights.add(weight, [fan_in, fan_out], 1 / math.sqrt(fan_in)))
        return self.node("MatMul", "/" + slashes(path) + "/MatMul", [x, weight])

    def norm(self, path, x, residual=None):
        """RMSNorm of x (+ residual); returns it and the sum."""
        weight = self.constant(f"{path}.weight", np.ones(self.args.hidden))
        name = "/" + slashes(path)
        if residual is None:
            name += "/SimplifiedLayerNormalization"
            inputs = [x, weight]
            return self.node("SimplifiedLayerNormalization", name, inputs, axis=-1, epsilon=1e-5, stash_type=1), x
        name += "/SkipSimplifiedLayerNormalization"
        outputs = [f"{name}_output_0", "", "", f"{name}_output_3"]
        inputs = [residual, x, weight]
        op = "SkipSimplifiedLayerNormalization"
        normed, _, _, total = self.node(op, name, inputs, outputs, "com.microsoft", epsilon=1e-5)
        return normed, total

    def rotary_tables(self):
        inverse = self.args.rope_theta ** (-np.arange(0, self.head, 2, dtype=np.float64) / self.head)
        angles = np.outer(np.arange(self.args.positions), inverse)
        return self.constant("cos_cache", np.cos(angles)), self.constant("sin_cache", np.sin(angles))

    def attention_inputs(self):
        """What all layers share."""
        self.cos, self.sin = self.rotary_tables()
        name = "/model/attn_mask_reformat"
        if self.args.attention == "gqa":
            total = self.node("ReduceSum", f"{name}/ReduceSum", ["attention_mask", self.ints("axis_1", [1])], keepdims=0)
            last = self.node("Sub", f"{name}/Sub", [total, self.ints("one", 1)])
            self.seqlens = self.node("Cast", f"{name}/Cast", [last], to=TensorProto.INT32)
            shape = self.node("Shape", f"{name}/Shape", ["attention_mask"])
            length = self.node("Gather", f"{name}/Gather", [shape, self.ints("index_1", 1)])
            self.total = self.node("Cast", f"{name}/Cast_1", [length], to=TensorProto.INT32)
            return
        shape = self.node("Shape", f"{name}/Shape", ["input_ids"])
        length = self.node("Gather", f"{name}/Gather", [shape, self.ints("index_1", 1)])
        places = self.node("Range", f"{name}/Range", [self.ints("zero", 0), length, self.ints("one", 1)])
        rows = self.node("Unsqueeze", f"{name}/Unsqueeze", [places, self.ints("axis_1", [1])])
        causal = self.node("GreaterOrEqual", f"{name}/GreaterOrEqual", [rows, places])
        real = self.node("Cast", f"{name}/Cast", ["attention_mask"], to=TensorProto.BOOL)
        real = self.node("Unsqueeze", f"{name}/Unsqueeze_1", [real, self.ints("axes_12", [1, 2])])
        seen = self.node("And", f"{name}/And", [causal, real])
        lowest = -65504.0 if self.args.dtype == "fp16" else -3.0e38
        inputs = [seen, self.constant("visible", [0.0]), self.constant("hidden", [lowest])]
        self.mask = self.node("Where", f"{name}/Where", inputs)

    def cache(self, index):
        """Adds a layer's cache to the model's inputs and outputs; names of past key, past value, present key, present value."""
        names = []
        for where, values in (("past_key_values", self.pasts), ("present", self.presents)):
            length = "past_length" if where == "past_key_values" else "total_length"
            shape = ["batch", self.args.kv_heads, length, self.head]
            for part in ("key", "value"):
                names.append(f"{where}.{index}.{part}")
                values.append(helper.make_tensor_value_info(names[-1], self.type, shape))
        return names

    def group_query_attention(self, index, name, q, k, v):
        name += "/GroupQueryAttention"
        pasts, presents = ["", ""], [f"{name}_present_key", f"{name}_present_value"]
        if self.args.kv_cache:
            *pasts, presents[0], presents[1] = self.cache(index)
        inputs = [q, k, v, *pasts, self.seqlens, self.total, self.cos, self.sin]
        outputs = [f"{name}_output_0", *presents]
        attributes = {"num_heads": self.args.heads, "kv_num_heads": self.args.kv_heads, "do_rotary": 1}
        return self.node("GroupQueryAttention", name, inputs, outputs, "com.microsoft", **attributes)[0]

    def plain_attention(self, _index, name, q, k, v):
        start = self.shared_ints("start", [0])

        def rotate(x, which):
            inputs = [x, start, self.cos, self.sin]
            return self.node("RotaryEmbedding", f"{name}/{which}_rotary/RotaryEmbedding", inputs, domain="com.microsoft")

        def heads(x, which, count):
            shape = self.shared_ints(f"heads_{count}", [0, 0, count, self.head])
            x = self.node("Reshape", f"{name}/{which}/Reshape", [x, shape])
            return self.node("Transpose", f"{name}/{which}/Transpose", [x], perm=[0, 2, 1, 3])

        def repeat(x, which):
            if self.args.heads == self.args.kv_heads:
                return x
            x = self.node("Unsqueeze", f"{name}/{which}/Unsqueeze", [x, self.shared_ints("axis_2", [2])])
            ones = self.shared_ints("repeats", [1, 1, self.args.heads // self.args.kv_heads, 1, 1])
            x = self.node("Expand", f"{name}/{which}/Expand", [x, ones])
            shape = self.shared_ints("repeated", [0, self.args.heads, -1, self.head])
            return self.node("Reshape", f"{name}/{which}/Reshape_1", [x, shape])

        q = heads(rotate(q, "q"), "q", self.args.heads)
        k = repeat(heads(rotate(k, "k"), "k", self.args.kv_heads), "k")
        v = repeat(heads(v, "v", self.args.kv_heads), "v")
        k = self.node("Transpose", f"{name}/k/Transpose_1", [k], perm=[0, 1, 3, 2])
        scores = self.node("MatMul", f"{name}/MatMul", [q, k])
        if "scale" not in {t.name for t in self.initializers}:
            self.constant("scale", 1 / math.sqrt(self.head))
        scores = self.node("Mul", f"{name}/Mul", [scores, "scale"])
        scores = self.node("Add", f"{name}/Add", [scores, self.mask])
        weights = self.node("Softmax", f"{name}/Softmax", [scores], axis=-1)
        out = self.node("MatMul", f"{name}/MatMul_1", [weights, v])
        out = self.node("Transpose", f"{name}/Transpose", [out], perm=[0, 2, 1, 3])
        return self.node("Reshape", f"{name}/Reshape", [out, self.shared_ints("joined", [0, 0, self.args.hidden])])

    def shared_ints(self, name, values):
        if name not in {t.name for t in self.initializers if t.data_type == TensorProto.INT64}:
            self.ints(name, values)
        return name

    def layer(self, index, x, residual):
        path = f"model.layers.{index}"
        hidden, wide, narrow = self.args.hidden, self.args.intermediate, self.args.kv_heads * self.head
        normed, total = self.norm(f"{path}.input_layernorm", x, residual)
        q = self.linear(f"{path}.self_attn.q_proj", normed, hidden, hidden)
        k = self.linear(f"{path}.self_attn.k_proj", normed, hidden, narrow)
        v = self.linear(f"{path}.self_attn.v_proj", normed, hidden, narrow)
        attention = self.group_query_attention if self.args.attention == "gqa" else self.plain_attention
        mixed = attention(index, f"/model/layers.{index}/self_attn", q, k, v)
        out = self.linear(f"{path}.self_attn.o_proj", mixed, hidden, hidden)
        normed, total = self.norm(f"{path}.post_attention_layernorm", out, total)
        gate = self.linear(f"{path}.mlp.gate_proj", normed, hidden, wide)
        up = self.linear(f"{path}.mlp.up_proj", normed, hidden, wide)
        name = f"/model/layers.{index}/mlp"
        sigmoid = self.node("Sigmoid", f"{name}/act_fn/Sigmoid", [gate])
        gate = self.node("Mul", f"{name}/act_fn/Mul", [gate, sigmoid])
        product = self.node("Mul", f"{name}/Mul", [gate, up])
        return self.linear(f"{path}.mlp.down_proj", product, wide, hidden), total

    def model(self):
        args = self.args
        table = self.weights.add("model.embed_tokens.weight", [args.vocab, args.hidden], 1.0)
        self.initializers.append(table)
        x = self.node("Gather", "/model/embed_tokens/Gather", [table.name, "input_ids"])
        self.attention_inputs()
        residual = None
        for index in range(args.layers):
            x, residual = self.layer(index, x, residual)
        normed, _ = self.norm("model.norm", x, residual)
        self.linear("lm_head", normed, args.hidden, args.vocab)
        self.nodes[-1].output[0] = "logits"
        lengths = {"input_ids": "sequence", "attention_mask": "total_length" if args.kv_cache else "sequence"}
        ids = [helper.make_tensor_value_info(n, TensorProto.INT64, ["batch", length]) for n, length in lengths.items()]
        logits = helper.make_tensor_value_info("logits", self.type, ["batch", "sequence", args.vocab])
        graph = helper.make_graph(self.nodes, "main_graph", ids + self.pasts, [logits] + self.presents, self.initializers)
        imports = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=imports, ir_version=10, producer_name="make_llama.py")


def slashes(path):
    """model.layers.0.mlp.up_proj -> model/layers.0/mlp/up_proj, as TorchScript names its nodes."""
    head, *rest = path.split(".")
    out = [head]
    for part in rest:
        out.append(part) if not part.isdigit() else out.__setitem__(-1, f"{out[-1]}.{part}")
    return "/".join(out)


def genai_config(args):
    """What ONNX Runtime GenAI needs to know. Ids are those of a tokenizer that the model does not have."""
    cache = {f"past_{part}_names": f"past_key_values.%d.{part}" for part in ("key", "value")}
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": "model.onnx",
        "head_size": args.hidden // args.heads,
        "hidden_size": args.hidden,
        "inputs": {"input_ids": "input_ids", "attention_mask": "attention_mask"} | cache,
        "outputs": {"logits": "logits", "present_key_names": "present.%d.key", "present_value_names": "present.%d.value"},
        "num_attention_heads": args.heads,
        "num_hidden_layers": args.layers,
        "num_key_value_heads": args.kv_heads,
    }
    model = {"bos_token_id": 1, "context_length": args.positions, "decoder": decoder, "eos_token_id": 2}
    model |= {"pad_token_id": 0, "type": "llama", "vocab_size": args.vocab}
    search = {"do_sample": False, "max_length": args.positions, "past_present_share_buffer": True}
    return {"model": model, "search": search}


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for model.onnx, its data files and config.json")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=14336)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--positions", type=int, default=4096, help="rows of the rotary tables")
    parser.add_argument("--rope-theta", type=float, default=500000.0)
    parser.add_argument("--dtype", choices=TYPES, default="bf16")
    parser.add_argument("--attention", choices=("gqa", "plain"), default="gqa")
    parser.add_argument("--kv-cache", action="store_true", help="inputs and outputs for keys and values; needs --attention gqa")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shards", type=int, help="data files (default: 16 for more than 2^30 weights, else 1)")
    parser.add_argument("--table", type=int, default=TABLE, help="random numbers to draw weights from")
    args = parser.parse_args(argv)
    if args.hidden % args.heads or args.heads % args.kv_heads or args.hidden // args.heads % 2:
        parser.error("--hidden must be a multiple of --heads, --heads of --kv-heads, and a head's size even")
    if min(args.layers, args.intermediate, args.vocab, args.positions) < 1 or args.table < 1:
        parser.error("sizes must be positive")
    if args.kv_cache and args.attention != "gqa":
        parser.error("--kv-cache needs --attention gqa")
    if not args.shards:
        layer = args.hidden * (2 * args.hidden + 2 * args.hidden // args.heads * args.kv_heads + 3 * args.intermediate)
        args.shards = 16 if args.layers * layer + 2 * args.vocab * args.hidden > 1 << 30 else 1
    return args


def main():
    args = arguments()
    start = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    builder = Builder(args)
    model = builder.model()
    free = os.statvfs(args.out)
    if free.f_bavail * free.f_frsize < builder.weights.size():
        sys.exit(f"error: {args.out} has {free.f_bavail * free.f_frsize} bytes left, {builder.weights.size()} are needed")
    builder.weights.write(args.out)
    (args.out / "model.onnx").write_bytes(model.SerializeToString())
    config = {"model_type": "llama", "vocab_size": args.vocab, "hidden_size": args.hidden}
    config |= {"num_attention_heads": args.heads, "num_key_value_heads": args.kv_heads, "num_hidden_layers": args.layers}
    (args.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if args.kv_cache:
        (args.out / "genai_config.json").write_text(json.dumps(genai_config(args), indent=4) + "\n")
    count = sum(place[2] for place in builder.weights.places)
    print(f"wrote {args.out}/model.onnx: {count} weights, {builder.weights.size()} bytes, {time.monotonic() - start:.1f} s")


if __name__ == "__main__":
    main()
