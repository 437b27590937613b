"""mxrewrite --base-dtype: converted graphs are valid, and compute what the original computes, one model a line.

    MX_REWRITE=target/debug/mxrewrite MX_CUSTOM_OPS=target/debug/libmx_custom_ops.so \\
        python tests/python/test_base_dtype.py MODEL...

For each type: the types of all values are inferred strictly by onnx, interface and names are compared, and the graph
runs in onnxruntime: float32 and float16 as they are, bfloat16 (for which the CPU provider has few kernels) as float32
with every bfloat16 result rounded. Run by tests/it/lowerings.rs. Exit code 0 means that every check passed.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

REWRITE = os.environ["MX_REWRITE"]
FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16}
WANTED = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
# Largest deviation of a logit, in deviations of all logits.
BOUNDS = {"fp32": 2e-2, "fp16": 2e-2, "bf16": 0.25}


def rewrite(model, out, *options):
    run = subprocess.run([REWRITE, model, "-o", out, "--force", *options], capture_output=True, text=True)
    assert run.returncode == 0, f"{model} {options}: {run.stderr}"
    return out


def interface(model):
    kind = lambda v: (v.name, v.type.tensor_type.elem_type)
    return [kind(v) for v in model.graph.input], [kind(v) for v in model.graph.output]


def graphs(graph):
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from graphs(attribute.g)


def value_types(model):
    """Element type of every value of the main graph that onnx can infer; mismatches raise."""
    known = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True).graph
    types = {t.name: t.data_type for t in known.initializer}
    for value in [*known.input, *known.output, *known.value_info]:
        types[value.name] = value.type.tensor_type.elem_type
    return types


def emulated(model):
    """A bfloat16 graph as a float32 one whose bfloat16 values are rounded."""
    types = value_types(model)
    out = onnx.ModelProto()
    out.CopyFrom(model)
    graph = out.graph
    del graph.value_info[:]
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.BFLOAT16:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    for value in [*graph.input, *graph.output]:
        if value.type.tensor_type.elem_type == TensorProto.BFLOAT16:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    nodes = list(graph.node)
    del graph.node[:]
    for node in nodes:
        for attribute in node.attribute:
            if attribute.t.data_type == TensorProto.BFLOAT16:
                array = numpy_helper.to_array(attribute.t).astype(np.float32)
                attribute.t.CopyFrom(numpy_helper.from_array(array))
            if node.op_type == "Cast" and attribute.i == TensorProto.BFLOAT16:
                attribute.i = TensorProto.FLOAT
        graph.node.append(node)
        for index, name in enumerate(node.output):
            if types.get(name) == TensorProto.BFLOAT16:
                node_out = graph.node[-1] if index == 0 else [n for n in graph.node if name in n.output][0]
                node_out.output[index] = f"{name}.exact"
                graph.node.append(helper.make_node("Cast", [f"{name}.exact"], [f"{name}.narrow"], to=TensorProto.BFLOAT16))
                graph.node.append(helper.make_node("Cast", [f"{name}.narrow"], [name], to=TensorProto.FLOAT))
    return out


def session(model):
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(os.environ["MX_CUSTOM_OPS"])
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def feed(model, vocabulary):
    rng = np.random.default_rng(7)
    ids = rng.integers(0, vocabulary, (2, 24))
    mask = np.ones_like(ids)
    mask[1, 17:] = 0
    out = {}
    for value in model.graph.input:
        if value.name in {t.name for t in model.graph.initializer}:
            continue
        dims = [d.dim_value if d.HasField("dim_value") else None for d in value.type.tensor_type.shape.dim]
        if value.name.startswith("past"):
            dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            out[value.name] = np.zeros([2, dims[1] or 2, 0, dims[3] or 16], dtype)
        elif value.name == "position_ids":
            out[value.name] = np.broadcast_to(np.arange(24), ids.shape).copy()
        elif value.name == "attention_mask":
            out[value.name] = mask
        elif value.name == "use_cache_branch":
            out[value.name] = np.array([False])
        else:
            out[value.name] = ids
    return out, mask.astype(bool)


def vocabulary(model):
    return next(v.type.tensor_type.shape.dim[-1].dim_value for v in model.graph.output if v.name == "logits") or 128


def loss(logits, ids, mask):
    logits = logits[:, :-1].astype(np.float64)
    labels, real = ids[:, 1:], mask[:, 1:]
    top = logits.max(-1, keepdims=True)
    log = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    return -np.take_along_axis(log, labels[..., None], -1)[..., 0][real].mean()


def logits_of(model, inputs):
    # NumPy has no bfloat16.
    model.graph.node.append(helper.make_node("Cast", ["logits"], ["logits.read"], to=TensorProto.FLOAT))
    model.graph.output.append(helper.make_tensor_value_info("logits.read", TensorProto.FLOAT, None))
    got = session(model).run(["logits.read"], inputs)[0]
    del model.graph.node[-1], model.graph.output[-1]
    return got


def wide_weights(model, data_type):
    """Matrices that are stored in a float type other than `data_type`."""
    found = []
    for graph in graphs(model.graph):
        for tensor in graph.initializer:
            rows = len(tensor.dims) >= 2 and np.prod(tensor.dims) > 2048
            if rows and tensor.data_type in FLOATS - {data_type}:
                found.append(tensor.name)
    return found


def check(path, folder):
    original = onnx.load(path)
    inputs, mask = feed(original, vocabulary(original))
    own = max(FLOATS, key=lambda t: sum(np.prod(i.dims) for i in original.graph.initializer if i.data_type == t))
    standard = all(n.domain in ("", "ai.onnx") and n.op_type != "SimplifiedLayerNormalization" for n in original.graph.node)
    has_bodies = len(list(graphs(original.graph))) > 1
    base = emulated(original) if own == TensorProto.BFLOAT16 else original
    want = logits_of(base, inputs)
    lines = []
    for name, data_type in WANTED.items():
        options = ["--base-dtype", name]
        converted = onnx.load(rewrite(path, folder / f"{name}.onnx", *options, "--exclude", ".*", "--allow-empty"))
        if any(n.op_type == "GroupQueryAttention" for n in original.graph.node):
            # A cache that one operator reads and writes has the new type.
            for value in converted.graph.input:
                if value.name.startswith("past"):
                    assert value.type.tensor_type.elem_type == data_type, value.name
                    if name != "bf16":
                        kind = helper.tensor_dtype_to_np_dtype(data_type)
                        inputs[value.name] = inputs[value.name].astype(kind)
        else:
            assert interface(converted) == interface(original), f"{name}: the interface changed"
        stale = wide_weights(converted, data_type)
        assert not stale, f"{name}: {stale} are stored in another type"
        if standard:
            onnx.checker.check_model(converted, full_check=True)
            value_types(converted)
        if name == "bf16":
            # onnxruntime checks all types before it finds that the CPU has no kernel.
            try:
                session(converted)
            except Exception as error:
                assert "NOT_IMPLEMENTED" in str(error), f"{name}: {error}"
        if not standard or has_bodies:
            # onnx does not know these operators, or the emulation does not reach into bodies.
            if name == "bf16":
                continue
        runnable = emulated(converted) if name == "bf16" else converted
        got = logits_of(runnable, inputs)
        worst = float(np.abs(got - want)[mask].max() / want[mask].std())
        ids = inputs["input_ids"]
        shift = abs(loss(got, ids, mask) - loss(want, ids, mask))
        assert np.isfinite(got[mask]).all(), f"{name}: NaN or infinity"
        # A rounding may send a token to another expert.
        routed = any(n.op_type == "TopK" for n in original.graph.node)
        bound = max(BOUNDS[name], BOUNDS["bf16"] if own == TensorProto.BFLOAT16 else 0)
        assert worst < bound or routed, f"{name}: worst {worst:.3g} of the logits' deviation"
        # A trained model is far from sure of random tokens, and a few dozen average little out.
        assert shift < (0.1 if name == "bf16" else 0.02), f"{name}: the loss moves by {shift:.3g}"
        if own != data_type:
            assert worst > 0 or own != TensorProto.FLOAT, f"{name}: nothing was rounded: the check is void"
        lines.append(f"{name} worst {worst:.1e} loss {shift:.1e}")
        # The layers in MX, everything else in the type; and weight-only int8.
        for lowering in ("mx", "int8"):
            replaced = folder / f"{name}-{lowering}.onnx"
            rewrite(path, replaced, *options, "--lower", lowering, "--allow-empty")
            model = onnx.load(replaced)
            if lowering == "mx":
                plain = onnx.load(rewrite(path, folder / "plain.onnx", "--allow-empty"))
                count = lambda m: sum(n.op_type == "MxMatMul" for g in graphs(m.graph) for n in g.node)
                assert count(model) == count(plain), f"{name}: layers got lost"
            elif standard and own != TensorProto.BFLOAT16:
                onnx.checker.check_model(model, full_check=True)
            if name != "bf16":
                assert np.isfinite(logits_of(model, inputs)[mask]).all(), f"{name} {lowering}"
    return ", ".join(lines)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as folder:
            print(f"{argument}: {check(Path(argument), Path(folder))}", flush=True)
