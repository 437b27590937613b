"""`mxrewrite verify` and `--check` against NumPy and stock onnxruntime, and on models that were tampered with.

    MX_REWRITE=target/debug/mxrewrite MX_CUSTOM_OPS=target/debug/libmx_custom_ops.so \
        python tests/python/test_verify.py AREA [MODEL...]

AREA: layers, tampered, missing, outputs (on models), merged, plain, checkpoint, kinds, halfway (on graphs made here). Run by
tests/it/verify.rs. Exit code 0 means that every check passed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

KERNELS = tuple([name] for name in ("amx", "avx512bf16", "avx512vnni", "avx512", "avxvnni", "avx2", "neondotprod", "neon", "scalar"))

REWRITE = os.environ["MX_REWRITE"]


def rewrite(model: Path, out: Path, *more: str, code: int = 0) -> subprocess.CompletedProcess:
    done = subprocess.run([REWRITE, model, "-o", out, "--force", *more], capture_output=True, text=True)
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    return done


def verify(a: Path, b: Path, *more: str, code: int = 0) -> dict:
    done = subprocess.run([REWRITE, "verify", a, b, "--json", *more], capture_output=True, text=True)
    assert done.returncode == code, (done.returncode, done.stdout[-3000:], done.stderr)
    return json.loads(done.stdout)


def run(model: onnx.ModelProto, feed: dict[str, np.ndarray], wanted: list[str]) -> list[np.ndarray]:
    """The values `wanted`, whether they are outputs or not."""
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    known = {o.name for o in shown.graph.output}
    shown.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted if name not in known)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.register_custom_ops_library(os.environ["MX_CUSTOM_OPS"])
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = ort.InferenceSession(shown.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = {i.name for i in session.get_inputs()}
    return session.run(wanted, {k: v for k, v in feed.items() if k in names})


def sqnr(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(10 * np.log10((a * a).sum() / ((b - a) ** 2).sum()))


def tokens(folder: Path) -> tuple[Path, dict[str, np.ndarray]]:
    ids = np.random.default_rng(7).integers(3, 400, (2, 24))
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    feed["position_ids"] = np.broadcast_to(np.arange(24), ids.shape).copy()
    save_file(feed, str(folder / "inputs.safetensors"))
    return folder / "inputs.safetensors", feed


def mx_nodes(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    return {n.name: n for n in model.graph.node if n.domain == "mx"}


def layers(path: Path, folder: Path) -> None:
    """Outputs, and every layer in the model and by itself, are what NumPy makes of stock runs."""
    out = folder / "out.onnx"
    rewrite(path, out, "--tier-a", "--format", "fp4_e2m1")
    data, feed = tokens(folder)
    report = verify(path, out, "--layers", "--data", str(data))
    a, b = onnx.load(path), onnx.load(out)
    nodes = mx_nodes(b)
    assert len(report["layers"]) == len(nodes) > 0 and report["failures"] == []
    (logits_a,), (logits_b,) = run(a, feed, ["logits"]), run(b, feed, ["logits"])
    (output,) = report["outputs"]["both"]
    error = np.abs(logits_b.astype(np.float64) - logits_a)
    close(output["max_abs_error"], error.max())
    close(output["mean_abs_error"], error.mean())
    close(output["relative_to_range"], error.max() / float(logits_a.max() - logits_a.min()))
    close(output["sqnr_db"], sqnr(logits_a, logits_b))
    close(output["top1_agreement"], float((logits_a.argmax(-1) == logits_b.argmax(-1)).mean()))
    for layer in report["layers"]:
        node = nodes[layer["node"]]
        x, y = run(a, feed, [node.input[0], node.output[0]])
        (in_model,) = run(b, feed, [node.output[0]])
        close(layer["accumulated"]["sqnr_db"], sqnr(y, in_model))
        alone = helper.make_model(
            helper.make_graph(
                [node],
                "alone",
                [helper.make_tensor_value_info(node.input[0], TensorProto.FLOAT, x.shape)],
                [helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, y.shape)],
                [t for t in b.graph.initializer if t.name in node.input],
            ),
            opset_imports=b.opset_import,
            ir_version=b.ir_version,
        )
        (by_itself,) = run(alone, {node.input[0]: x}, [node.output[0]])
        close(layer["local"]["sqnr_db"], sqnr(y, by_itself))
        close(layer["local"]["max_abs_error"], float(np.abs(by_itself.astype(np.float64) - y).max()))
        assert 8 < layer["local"]["sqnr_db"] < 30, layer
    for node in report["placement"]["mx_nodes"]:
        assert node["provider"] == "CPUExecutionProvider" and node["runs"] == 1, node
        assert node["kernels"] in KERNELS, node


def close(found: float, wanted: float) -> None:
    assert abs(found - wanted) <= 1e-4 * abs(wanted) + 1e-7, (found, wanted)


def tampered(path: Path, folder: Path) -> None:
    """A changed scale shows in its own layer, and passes no bound that the honest model passes."""
    out = folder / "out.onnx"
    rewrite(path, out, "--tier-a")
    honest = verify(path, out, "--layers")
    bound = honest["outputs"]["both"][0]["max_abs_error"] * 1.01
    verify(path, out, "--max-error", str(bound), "--min-sqnr", "0")
    b = onnx.load(out)
    victim = list(mx_nodes(b).values())[4]
    scales = next(t for t in b.graph.initializer if t.name == victim.input[2])
    changed = numpy_helper.to_array(scales).copy()
    changed[3:9] += 3
    scales.CopyFrom(numpy_helper.from_array(changed, scales.name))
    onnx.save(b, folder / "tampered.onnx")
    report = verify(path, folder / "tampered.onnx", "--layers", "--max-error", str(bound), code=1)
    assert any("--max-error" in failure for failure in report["failures"]), report["failures"]
    for before, after in zip(honest["layers"], report["layers"], strict=True):
        fell = before["local"]["sqnr_db"] - after["local"]["sqnr_db"]
        assert (fell > 10) if after["node"] == victim.name else (abs(fell) < 1e-9), (after, fell)
    report = verify(path, folder / "tampered.onnx", "--layers", "--min-sqnr", "20", code=1)
    path_of = next(layer["module_path"] for layer in report["layers"] if layer["node"] == victim.name)
    assert any(f"layer {path_of}: SQNR" in failure for failure in report["failures"]), report["failures"]
    # A block scale of 0xff is NaN.
    changed[:] = 255
    scales.CopyFrom(numpy_helper.from_array(changed, scales.name))
    onnx.save(b, folder / "nan.onnx")
    report = verify(path, folder / "nan.onnx", code=1)
    assert any("NaN in B" in failure for failure in report["failures"]), report["failures"]
    assert report["outputs"]["both"][0]["max_abs_error"] is None


def missing(path: Path, folder: Path) -> None:
    """A layer that was put back, or that runs as something else, is named."""
    out = folder / "out.onnx"
    rewrite(path, out, "--tier-a")
    a, b = onnx.load(path), onnx.load(out)
    name = list(mx_nodes(b))[2]
    original = next(n for n in a.graph.node if n.name == name)
    next(n for n in b.graph.node if n.name == name).CopyFrom(original)
    made = {o: n for n in a.graph.node for o in n.output}
    have = {o for n in b.graph.node for o in n.output} | {t.name for t in b.graph.initializer}
    # The weight, and a Transpose on its way.
    while original.input[1] not in have:
        if original.input[1] in made:
            original = made[original.input[1]]
            b.graph.node.insert(0, original)
            original = onnx.NodeProto(input=["", original.input[0]])
        else:
            b.graph.initializer.append(next(t for t in a.graph.initializer if t.name == original.input[1]))
            break
    onnx.save(b, folder / "missing.onnx")
    report = verify(path, folder / "missing.onnx", code=1)
    assert len(report["failures"]) == 1 and f"'{name}'" in report["failures"][0], report["failures"]
    assert "no MX node" in report["failures"][0]
    products_put_back(path, folder)
    # Without the plan nothing says that it should be one, and no layer is compared.
    del b.metadata_props[:]
    onnx.save(b, folder / "missing.onnx")
    report = verify(path, folder / "missing.onnx", "--layers")
    assert report["layers"] == [] and "was not made by mxrewrite" in report["notes"][0]
    report = verify(path, folder / "missing.onnx", "--layers", "--min-sqnr", "0", code=1)
    assert "was not made by mxrewrite" in report["failures"][0] and report["notes"] == [], report


def products_put_back(path: Path, folder: Path) -> None:
    """A product of attention that is not quantised any more is named too, by its path."""
    out = folder / "products.onnx"
    rewrite(path, out, "--tier-a", "--attention")
    report = verify(path, out)
    shown = [n for n in report["placement"]["mx_nodes"] if n["op"] == "MxActMatMul"]
    assert shown and all(n["weight_format"] == n["activation_format"] == "fp8_e4m3" for n in shown), shown
    model = onnx.load(out)
    plain = {n.name for n in mx_nodes(model).values() if n.op_type == "MxActMatMul"}
    node = next(n for n in model.graph.node if n.name in plain and not transposes(n))
    del node.attribute[:]
    node.op_type, node.domain = "MatMul", ""
    onnx.save(model, out)
    report = verify(path, out, code=1)
    assert len(report["failures"]) == 1 and f"'{node.name}'" in report["failures"][0], report["failures"]
    assert "self_attn) is planned as MxActMatMul" in report["failures"][0], report["failures"]


def transposes(node: onnx.NodeProto) -> bool:
    return any(a.name == "transpose_b" and a.i for a in node.attribute)


def outputs(path: Path, folder: Path) -> None:
    """Outputs that are missing, extra or of another shape; a model without layers; text as data."""
    report = verify(path, path, "--layers")
    assert report["outputs"]["both"][0]["identical"] and report["placement"]["mx_nodes"] == []
    renamed = onnx.load(path)
    source = renamed.graph.output[0].name
    renamed.graph.node.append(helper.make_node("Identity", [source], ["other"], "renaming"))
    renamed.graph.output[0].name = "other"
    onnx.save(renamed, folder / "renamed.onnx")
    report = verify(path, folder / "renamed.onnx", code=1)
    assert report["outputs"]["only_in_a"] == ["logits"] and report["outputs"]["only_in_b"] == ["other"]
    assert "B has no output `logits`" in report["failures"][0]
    cut = onnx.load(path)
    for node in cut.graph.node:
        node.output[:] = ["whole" if o == "logits" else o for o in node.output]
    axes = numpy_helper.from_array(np.array([2]), "cut.axes")
    start, end = (numpy_helper.from_array(np.array([v]), f"cut.{v}") for v in (0, 100))
    cut.graph.initializer.extend([axes, start, end])
    cut.graph.node.append(helper.make_node("Slice", ["whole", "cut.0", "cut.100", "cut.axes"], ["logits"], "cut"))
    cut.graph.output[0].type.tensor_type.shape.dim[2].dim_value = 100
    onnx.save(cut, folder / "cut.onnx")
    report = verify(path, folder / "cut.onnx", code=1)
    assert "in A and" in report["failures"][0] and "100] in B" in report["failures"][0], report["failures"]
    # Two rewrites: A has no layer that B's plan could name.
    fp8, fp4 = folder / "fp8.onnx", folder / "fp4.onnx"
    rewrite(path, fp8, "--tier-a")
    rewrite(path, fp4, "--tier-a", "--format", "fp4_e2m1")
    report = verify(fp8, fp4, "--layers")
    assert report["layers"] == [] and "15 of 15 layers of B are not found in A" in report["notes"][0], report["notes"]
    report = verify(fp8, fp4, "--layers", "--min-sqnr", "-100", code=1)
    assert "are not found in A" in report["failures"][0], report["failures"]
    text = ["--data", "fixtures/mini_pile.parquet", "--tokenizer", "fixtures/tinylm/tokenizer.json"]
    report = verify(path, fp8, *text, "--samples", "3", "--seq-len", "20")
    assert report["runs"] == 3 and report["inputs"].startswith("3 documents of"), report["inputs"]


def merged(folder: Path) -> None:
    """A decoder in two branches: both run, layers of both are compared; other inputs leave one out."""
    path, out = folder / "merged.onnx", folder / "out.onnx"
    onnx.save(merged_decoder(), path)
    rewrite(path, out, "--all-linears")
    report = verify(path, out, "--layers", "--seq-len", "12")
    assert report["runs"] == 4 and report["failures"] == [] and report["notes"] == [], report
    assert [o["name"] for o in report["outputs"]["both"]] == ["logits", "present.0.key"]
    nodes = report["placement"]["mx_nodes"]
    assert len(nodes) == 2 and all(n["runs"] == 2 and "branch of If" in n["body"] for n in nodes), nodes
    assert len({n["node"] for n in nodes}) == 2
    local = [layer["local"] for layer in report["layers"]]
    # 2 samples: the first branch sees 11 tokens of each, the other one.
    assert sorted(l["elements"] for l in local) == [2 * 1 * 32, 2 * 11 * 32], local
    assert all(25 < l["sqnr_db"] < 35 for l in local), local
    rng = np.random.default_rng(3)
    feed = {
        "input_ids": rng.integers(0, 50, (1, 5)),
        "past_key_values.0.key": rng.standard_normal((1, 2, 3, 16), dtype=np.float32),
        "use_cache_branch": np.array([True]),
    }
    save_file(feed, str(folder / "inputs.safetensors"))
    report = verify(path, out, "--layers", "--data", str(folder / "inputs.safetensors"))
    assert len(report["notes"]) == 1 and "else_branch" in report["notes"][0], report["notes"]
    assert [l["note"] for l in report["layers"]].count("did not run with these inputs") == 1
    bounded = verify(path, out, "--layers", "--min-sqnr", "0", "--data", str(folder / "inputs.safetensors"), code=1)
    (failure,) = bounded["failures"]
    assert "no SQNR alone (did not run with these inputs)" in failure, failure
    del feed["use_cache_branch"]
    save_file(feed, str(folder / "inputs.safetensors"))
    done = subprocess.run(
        [REWRITE, "verify", path, out, "--data", folder / "inputs.safetensors"], capture_output=True, text=True
    )
    assert done.returncode == 1 and "no tensor `use_cache_branch`" in done.stderr, done.stderr


def merged_decoder() -> onnx.ModelProto:
    rng = np.random.default_rng(5)

    def weight(name: str, *shape: int) -> TensorProto:
        return numpy_helper.from_array(rng.standard_normal(shape, dtype=np.float32), name)

    def value(name: str, kind: int, *shape: int | str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, shape)

    def branch(title: str, tensor: str) -> onnx.GraphProto:
        y = f"{title}.y"
        # Both branches give their node the same name, as optimum does.
        node = helper.make_node("MatMul", ["hidden", tensor], [y], "/model/layers.0/mlp/up_proj/MatMul")
        return helper.make_graph([node], title, [], [value(y, TensorProto.FLOAT, "b", "s", 32)])

    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["hidden"], "embed"),
        helper.make_node(
            "If",
            ["use_cache_branch"],
            ["chosen"],
            "cached",
            then_branch=branch("then", "w.then"),
            else_branch=branch("else", "w.else"),
        ),
        helper.make_node("Tanh", ["chosen"], ["bent"], "bend"),
        helper.make_node("MatMul", ["bent", "w.head"], ["logits"], "/lm_head/MatMul"),
        helper.make_node("Reshape", ["chosen", "split"], ["heads"], "split"),
        helper.make_node("Transpose", ["heads"], ["keys"], "turn", perm=[0, 2, 1, 3]),
        helper.make_node("Concat", ["past_key_values.0.key", "keys"], ["present.0.key"], "grow", axis=2),
    ]
    graph = helper.make_graph(
        nodes,
        "merged",
        [
            value("input_ids", TensorProto.INT64, "b", "s"),
            value("past_key_values.0.key", TensorProto.FLOAT, "b", 2, "p", 16),
            value("use_cache_branch", TensorProto.BOOL, 1),
        ],
        [
            value("logits", TensorProto.FLOAT, "b", "s", 50),
            value("present.0.key", TensorProto.FLOAT, "b", 2, "t", 16),
        ],
        [
            weight("table", 50, 64),
            weight("w.then", 64, 32),
            weight("w.else", 64, 32),
            weight("w.head", 32, 50),
            numpy_helper.from_array(np.array([0, 0, 2, 16]), "split"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def plain(folder: Path) -> None:
    """A graph that is no language model; one that ONNX Runtime does not load; --check on both."""
    path = folder / "plain.onnx"

    def save(activation: onnx.NodeProto, *more: onnx.OperatorSetIdProto) -> None:
        rng = np.random.default_rng(5)
        weight = numpy_helper.from_array(rng.standard_normal((64, 48), dtype=np.float32), "w")
        shapes = {"x": ["rows", 64], "y": ["rows", 48]}
        x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items())
        nodes = [helper.make_node("MatMul", ["x", "w"], ["h"], "/mlp/fc1/MatMul"), activation]
        graph = helper.make_graph(nodes, "plain", [x], [y], [weight])
        opsets = [helper.make_opsetid("", 17), *more]
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)

    save(helper.make_node("Tanh", ["h"], ["y"], "tanh"))
    done = json.loads(rewrite(path, folder / "out.onnx", "--check", "--json").stdout)
    assert done["sites"] == 1 and done["check"]["failures"] == [] and done["check"]["runs"] == 2
    assert "normally distributed" in done["check"]["inputs"]
    text = rewrite(path, folder / "out.onnx", "--check").stdout
    assert "1 of 1 candidates" in text and "MxMatMul" in text and text.endswith("ok\n"), text
    report = verify(path, folder / "out.onnx", "--seed", "4", "--layers")
    again = verify(path, folder / "out.onnx", "--seed", "4", "--layers")
    other = verify(path, folder / "out.onnx", "--seed", "5", "--layers")
    assert report == again != other
    # A graph that is float16 throughout: so is what its layers are fed.
    rewrite(path, folder / "half.onnx", "--lower", "fp16")
    report = verify(path, folder / "half.onnx", "--layers", "--min-sqnr", "50")
    assert [l["note"] for l in report["layers"]] == [None], report["layers"]
    encoder = merged_decoder()
    del encoder.graph.node[1:], encoder.graph.input[1:], encoder.graph.output[:]
    encoder.graph.node.append(helper.make_node("MatMul", ["hidden", "w.then"], ["out"], "/mlp/fc1/MatMul"))
    encoder.graph.node.append(helper.make_node("ReduceMean", ["out"], ["pooled"], "pool", axes=[1], keepdims=0))
    for name, rank in [("out", 3), ("hidden", 3), ("pooled", 2)]:
        encoder.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * rank))
    onnx.save(encoder, folder / "encoder.onnx")
    rewrite(folder / "encoder.onnx", folder / "out.onnx", "--check", "--all-linears")
    report = verify(folder / "encoder.onnx", folder / "out.onnx")
    assert [o["name"] for o in report["outputs"]["both"]] == ["out", "hidden", "pooled"]
    assert "random tokens" in report["inputs"] and report["outputs"]["both"][1]["identical"]
    save(helper.make_node("Unheard", ["h"], ["y"], "odd", domain="nowhere"), helper.make_opsetid("nowhere", 1))
    done = rewrite(path, folder / "odd.onnx", "--check", code=1)
    for text in ["--check:", "does not load it on cpu", "Unheard", "stays as written"]:
        assert text in done.stderr, done.stderr
    assert (folder / "odd.onnx").is_file() and "1 of 1 candidates" in done.stdout
    done = rewrite(path, folder / "odd.onnx", "--check", "--json", code=1)
    found = json.loads(done.stdout)
    assert found["sites"] == 1 and "does not load it on cpu" in found["check"]["error"], found
    assert "--check:" in done.stderr, done.stderr


def kinds(folder: Path) -> None:
    """Outputs of whole numbers are compared but are no signal; strings are a note; another kind fails."""

    def save(name: str, shift: int, word: bool, text: bool = True) -> Path:
        """Outputs `x` * 2, uint32 and uint16 of it plus `shift`, and words."""
        rng = np.random.default_rng(2)
        kinds = [("u64", TensorProto.UINT64), ("u32", TensorProto.UINT32), ("u16", TensorProto.UINT16)]
        kinds += [("i16", TensorProto.INT16), ("i64", TensorProto.INT64)]
        tensors = [numpy_helper.from_array(rng.integers(1, 100, 8) + shift, "n")]
        nodes = [helper.make_node("Add", ["x", "x"], ["y"], "double")]
        outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b"])]
        for kind, element in kinds:
            nodes.append(helper.make_node("Cast", ["n"], [kind], f"cast.{kind}", to=element))
            outputs.append(helper.make_tensor_value_info(kind, element, [8]))
        if word:
            element = TensorProto.STRING if text else TensorProto.FLOAT
            nodes.append(helper.make_node("Cast", ["n"], ["words"], "cast.words", to=element))
            outputs.append(helper.make_tensor_value_info("words", element, [8]))
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b"])
        graph = helper.make_graph(nodes, "kinds", [x], outputs, tensors)
        onnx.save(
            helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / name
        )
        return folder / name

    a, other = save("a.onnx", 0, True), save("other.onnx", 50, True)
    report = verify(a, a)
    assert [o["name"] for o in report["outputs"]["both"]] == ["y", "u64", "u32", "u16", "i16", "i64"]
    assert all(o["identical"] for o in report["outputs"]["both"])
    assert len(report["notes"]) == 1 and "`words`" in report["notes"][0], report["notes"]
    report = verify(a, other, "--min-sqnr", "60")
    assert [o["max_abs_error"] for o in report["outputs"]["both"]] == [0, 50, 50, 50, 50, 50]
    assert len(verify(a, other, "--max-error", "49", code=1)["failures"]) == 5
    (failure,) = verify(a, save("number.onnx", 0, True, text=False), code=1)["failures"]
    assert "`words`" in failure and "float32 in B" in failure, failure
    # Inputs of a type that cannot hold what the file says.
    gather = helper.make_graph(
        [helper.make_node("Gather", ["table", "at"], ["y"], "pick")],
        "gather",
        [helper.make_tensor_value_info("at", TensorProto.INT32, [2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])],
        [numpy_helper.from_array(np.arange(4, dtype=np.float32), "table")],
    )
    path, data = folder / "gather.onnx", folder / "inputs.safetensors"
    onnx.save(helper.make_model(gather, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    for values, code in [([1.0, 3.0], 0), ([1.0, 2.5], 1), ([1.0, float("nan")], 1), ([1.0, 2.0**33], 1)]:
        save_file({"at": np.array(values)}, str(data))
        done = subprocess.run([REWRITE, "verify", path, path, "--data", data], capture_output=True, text=True)
        assert done.returncode == code, (values, done.stdout, done.stderr)
        assert code == 0 or ("`at`" in done.stderr and "Int32" in done.stderr), done.stderr


def halfway(folder: Path) -> None:
    """Samples that A refuses in their decode step are drawn anew and not counted, their first run either."""
    model = merged_decoder()
    graph = model.graph
    del graph.input[2:], graph.node[1]
    graph.node.insert(1, helper.make_node("MatMul", ["hidden", "w.then"], ["chosen"], "up"))
    for node in graph.node:
        node.output[:] = ["all" if o == "logits" else o for o in node.output]
    # Behind a cache, a last token of 25 and more is out of range.
    constants = {"axis": 2, "one": 1, "last": [-1], "few": np.zeros((25, 1, 1), np.float32)}
    graph.initializer.extend(numpy_helper.from_array(np.array(v), n) for n, v in constants.items())
    graph.node.extend(
        [
            helper.make_node("Shape", ["past_key_values.0.key"], ["shape"], "shape"),
            helper.make_node("Gather", ["shape", "axis"], ["past"], "past"),
            helper.make_node("Min", ["past", "one"], ["cached"], "cached"),
            helper.make_node("Gather", ["input_ids", "last"], ["end"], "end", axis=1),
            helper.make_node("Mul", ["end", "cached"], ["which"], "which"),
            helper.make_node("Squeeze", ["which", "one_axis"], ["row"], "row"),
            helper.make_node("Gather", ["few", "row"], ["zero"], "zero"),
            helper.make_node("Add", ["all", "zero"], ["logits"], "logits"),
        ]
    )
    graph.initializer.append(numpy_helper.from_array(np.array([1]), "one_axis"))
    path, out = folder / "halfway.onnx", folder / "out.onnx"
    onnx.save(model, path)
    rewrite(path, out, "--all-linears")
    report = verify(path, out, "--samples", "4", "--seq-len", "12")
    assert "A itself fails on" in report["notes"][0] and report["runs"] == 8, report
    logits = next(o for o in report["outputs"]["both"] if o["name"] == "logits")
    assert logits["elements"] == 4 * 12 * 50, logits


def two_layers(path: Path, folder: Path) -> None:
    """A model whose names say nothing, and the checkpoint that it comes from."""
    rng = np.random.default_rng(11)
    weights = [rng.standard_normal((64, 96), dtype=np.float32), rng.standard_normal((96, 64), dtype=np.float32)]
    names = [f"model.layers.0.mlp.{name}.weight" for name in ("up_proj", "down_proj")]
    save_file({n: np.ascontiguousarray(w.T) for n, w in zip(names, weights, strict=True)}, folder / "c.safetensors")
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"], "n0"),
        helper.make_node("Tanh", ["h"], ["t"], "n1"),
        helper.make_node("MatMul", ["t", "b"], ["y"], "n2"),
    ]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["rows", 64]) for n in "xy")
    tensors = [numpy_helper.from_array(w, n) for n, w in zip("ab", weights, strict=True)]
    graph = helper.make_graph(nodes, "two", [x], [y], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def checkpoint(folder: Path) -> None:
    """What was named by a checkpoint is compared without it, layer by layer."""
    path, out = folder / "two.onnx", folder / "out.onnx"
    two_layers(path, folder)
    for more in [[], ["--format", "fp8_e4m3"]]:
        rewrite(path, out, "--tier-a", "--checkpoint", str(folder / "c.safetensors"), *more)
        report = verify(path, out, "--layers", "--min-sqnr", "20")
        shown = [(l["module_path"], l["node"], l["weight_format"], l["activation_format"]) for l in report["layers"]]
        named = [(f"model.layers.0.mlp.{n}", node) for n, node in [("up_proj", "n0"), ("down_proj", "n2")]]
        assert shown == [(*one, "fp8_e4m3", "fp8_e4m3") for one in named], shown
        assert all(25 < l["local"]["sqnr_db"] < 35 for l in report["layers"]), report["layers"]
        assert report["notes"] == [], report["notes"]
        report = verify(path, out, "--layers", "--min-sqnr", "50", code=1)
        assert len(report["failures"]) == 3 and "layer model.layers.0.mlp" in report["failures"][1], report["failures"]


def main() -> None:
    area, *models = sys.argv[1:]
    check = globals()[area]
    for model in models or [None]:
        with tempfile.TemporaryDirectory() as folder:
            check(Path(model), Path(folder)) if model else check(Path(folder))
        print(f"{area} {model or ''}: as expected")


if __name__ == "__main__":
    main()
