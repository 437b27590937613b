#!/usr/bin/env python3
"""Writes the external data of an exported Llama-shaped model.onnx from the GGUF file that it was exported from.

    python scripts/smollm2_from_gguf.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf --graph model.onnx

An export from GGUF (scripts/export_hf.py --gguf) holds the dequantised weights in float32: 540 MB for a GGUF of 98 MB.
With the graph file (2 MB) and the GGUF the data file can be made again where PyTorch takes too long or is not
installed: it needs numpy and onnx. The same bytes come out that the export wrote.

The graph's own metadata (`pkg.torch.onnx.name_scopes`) says which module reads each tensor. llama.cpp's conversion of
Llama models interleaves the two halves of every head of q_proj and k_proj; this is undone here. A weight that a MatMul
reads directly is stored [k, n], the transpose of GGUF's rows.
"""

import argparse
import ast
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx

# GGUF type number -> (name, elements a block, bytes a block).
TYPES = {0: ("F32", 1, 4), 1: ("F16", 1, 2), 3: ("Q4_1", 32, 20), 8: ("Q8_0", 32, 34)}
MODULES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


class Failure(Exception):
    """What went wrong, with what to do."""


class Gguf:
    """Metadata and tensors of a GGUF file (version 2 or 3, little-endian)."""

    SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

    def __init__(self, path):
        self.path, self.at = path, 0
        self.bytes = np.memmap(path, np.uint8, "r")
        if bytes(self.bytes[:4]) != b"GGUF":
            raise Failure(f"{path} is no GGUF file")
        self.at = 4
        version, tensors, entries = self.take("I"), self.take("Q"), self.take("Q")
        if version not in (2, 3):
            raise Failure(f"{path}: GGUF version {version}; 2 and 3 are known")
        self.metadata = {}
        for _ in range(entries):
            key = self.text()
            self.metadata[key] = self.value(self.take("I"))
        self.heads = {}
        for _ in range(tensors):
            name = self.text()
            dims = [self.take("Q") for _ in range(self.take("I"))]
            self.heads[name] = (self.take("I"), dims[::-1], self.take("Q"))
        alignment = self.metadata.get("general.alignment", 32)
        self.base = -(-self.at // alignment) * alignment

    def take(self, code):
        size = struct.calcsize("<" + code)
        if self.at + size > len(self.bytes):
            raise Failure(f"{self.path} is cut off at byte {len(self.bytes)}")
        (value,) = struct.unpack("<" + code, self.bytes[self.at : self.at + size].tobytes())
        self.at += size
        return value

    def text(self):
        size = self.take("Q")
        value = self.bytes[self.at : self.at + size].tobytes().decode()
        self.at += size
        return value

    def value(self, kind):
        if kind == 8:
            return self.text()
        if kind == 9:
            inner = self.take("I")
            return [self.value(inner) for _ in range(self.take("Q"))]
        if kind not in self.SCALARS:
            raise Failure(f"{self.path}: metadata of unknown type {kind}")
        return self.take(self.SCALARS[kind])

    def tensor(self, name):
        """The tensor as float32, rows first."""
        if name not in self.heads:
            raise Failure(f"{self.path} has no tensor {name}")
        kind, dims, offset = self.heads[name]
        if kind not in TYPES:
            raise Failure(f"{self.path}: {name} has type {kind}; known are {', '.join(t[0] for t in TYPES.values())}")
        _, per_block, size = TYPES[kind]
        count = int(np.prod(dims))
        start = self.base + offset
        blocks = self.bytes[start : start + count // per_block * size].reshape(-1, size)
        if len(blocks) * per_block != count:
            raise Failure(f"{self.path} is cut off inside {name}")
        return dequantize(kind, blocks).reshape(dims)


def halves(block):
    return np.ascontiguousarray(block).view(np.float16).astype(np.float32)


def dequantize(kind, blocks):
    if kind == 0:
        return np.ascontiguousarray(blocks).view(np.float32)
    if kind == 1:
        return halves(blocks)
    if kind == 8:
        return np.ascontiguousarray(blocks[:, 2:]).view(np.int8).astype(np.float32) * halves(blocks[:, :2])
    codes = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1).astype(np.float32)
    return codes * halves(blocks[:, :2]) + halves(blocks[:, 2:4])


def tensor_name(module):
    """`model.layers.3.mlp.up_proj` -> `blk.3.ffn_up.weight`."""
    if module in ("model.embed_tokens", "lm_head"):
        return "token_embd.weight"
    if module == "model.norm":
        return "output_norm.weight"
    layer, _, rest = module.removeprefix("model.layers.").partition(".")
    if not layer.isdigit() or rest not in MODULES:
        raise Failure(f"no tensor is known for the module '{module}'")
    return f"blk.{layer}.{MODULES[rest]}.weight"


def readers(graph):
    """External tensor -> (its own module, operator) of the first node that reads it."""
    external = {t.name for t in graph.initializer if t.external_data}
    found = {}
    for node in graph.node:
        scopes = next((p.value for p in node.metadata_props if p.key == "pkg.torch.onnx.name_scopes"), "[]")
        scopes = ast.literal_eval(scopes)
        for name in external.intersection(node.input):
            if len(scopes) < 2:
                raise Failure(f"node {node.name} does not say which module it belongs to (no name_scopes metadata)")
            found.setdefault(name, (scopes[-2], node.op_type))
    missing = external - found.keys()
    if missing:
        raise Failure(f"no node reads {', '.join(sorted(missing))}")
    return found


def values(gguf, module, op, dims):
    """The tensor as the export holds it."""
    w = gguf.tensor(tensor_name(module))
    architecture = gguf.metadata["general.architecture"]
    for suffix, key in (("q_proj", "head_count"), ("k_proj", "head_count_kv")):
        if module.endswith(suffix):
            heads = gguf.metadata[f"{architecture}.attention.{key}"]
            half = w.shape[0] // heads // 2
            w = w.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(w.shape)
    if op == "MatMul" and w.ndim == 2:
        w = w.T
    if list(w.shape) != dims:
        raise Failure(f"{module}: the GGUF's shape is {list(w.shape)}, the graph's {dims}")
    return np.ascontiguousarray(w, np.float32)


def write(graph_path, gguf, out):
    graph = onnx.load(graph_path, load_external_data=False).graph
    read_by = readers(graph)
    places, size = [], 0
    for tensor in graph.initializer:
        if not tensor.external_data:
            continue
        place = {entry.key: entry.value for entry in tensor.external_data}
        if place["location"] != out.name:
            raise Failure(f"{tensor.name} lies in '{place['location']}', not in '{out.name}'")
        if tensor.data_type != onnx.TensorProto.FLOAT:
            raise Failure(f"{tensor.name} is no float32 tensor; export the model in fp32")
        offset = int(place.get("offset", 0))
        length = 4 * int(np.prod(tensor.dims))
        if int(place.get("length", length)) != length:
            raise Failure(f"{tensor.name}: {place['length']} bytes for shape {list(tensor.dims)}")
        places.append((tensor, offset))
        size = max(size, offset + length)
    temporary = out.with_name(out.name + ".partial")
    data = np.memmap(temporary, np.uint8, "w+", shape=(size,))

    def fill(place):
        tensor, offset = place
        array = values(gguf, *read_by[tensor.name], list(tensor.dims))
        data[offset : offset + array.nbytes] = array.reshape(-1).view(np.uint8)

    with ThreadPoolExecutor() as pool:
        list(pool.map(fill, places))
    data.flush()
    del data
    temporary.rename(out)
    return len(places), size


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gguf", type=Path, required=True, help="the file that the model was exported from")
    parser.add_argument("--graph", type=Path, required=True, help="the exported model.onnx, without its data file")
    parser.add_argument("--out", type=Path, help="data file to write (default: the graph's name and .data)")
    args = parser.parse_args()
    out = args.out or args.graph.with_name(args.graph.name + ".data")
    try:
        count, size = write(args.graph, Gguf(args.gguf), out)
    except (Failure, OSError, KeyError) as error:
        sys.exit(f"error: {error}")
    print(f"wrote {out}: {count} tensors, {size} bytes")


if __name__ == "__main__":
    main()
