#!/usr/bin/env python3
"""Exports a Hugging Face causal language model to ONNX, with its tokenizer.json beside it.

    export_hf.py MODEL_ID_OR_DIR OUT                 OUT/model.onnx (+ model.onnx.data), OUT/tokenizer.json
    export_hf.py --name llama-3.1-8b OUT             a row of models.toml
    export_hf.py --gguf FILE.gguf OUT                a GGUF file, dequantised

Inputs of the graph: input_ids and attention_mask, int64 [batch, sequence]; with --position-ids also
position_ids; with --kv-cache also past_key_values.N.key/value [batch, kv heads, past, head size], and
attention_mask covers past + sequence. Outputs: logits [batch, sequence, vocabulary]; with --kv-cache
also present.N.key/value.

Attention is "eager", so that the graph holds plain MatMuls. Stack traces and build paths are removed from
the metadata; name scopes, class hierarchy, fx node and graph signature stay: mxrewrite reads module paths
from them. The export is compared with PyTorch on a padded batch of another shape than the traced one.

Needs torch, transformers and, for the dynamo exporter, onnxscript; onnxruntime for the comparison;
accelerate and gguf for --gguf.
"""

import argparse
import inspect
import sys
import tempfile
from pathlib import Path

import exported_onnx
from exported_onnx import ExportError
from hf_source import DTYPES, check_directory, load_model, load_named, save_tokenizer
from moe_experts import unstack_experts

# Absolute bound, as a part of the logits' range, on |ONNX Runtime - PyTorch|.
TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1}
# protobuf's limit for one message; beyond it weights must be external data.
PROTOBUF_LIMIT = 2**31 - 2**20


# --------------------------------------------------------------------------------------------- flat form


def cache_shapes(config):
    """(kv heads, head size) of every layer's cache."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    return [(kv_heads, size)] * text.num_hidden_layers


def flatten_forward(model, position_ids, kv_cache):
    """Gives the model a forward of tensors in, tensors out, without wrapping it.

    A wrapper module would put its own component before every module path; a subclass does not.
    """
    from transformers import DynamicCache

    base = type(model)
    layers = len(cache_shapes(model.config)) if kv_cache else 0

    def call(self, input_ids, attention_mask, positions, past):
        kwargs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": kv_cache}
        if positions is not None:
            kwargs["position_ids"] = positions
        if kv_cache:
            pairs = [(past[2 * i], past[2 * i + 1]) for i in range(layers)]
            kwargs["past_key_values"] = DynamicCache(pairs)
        out = base.forward(self, **kwargs, return_dict=True)
        if not kv_cache:
            return out.logits
        present = []
        for layer in out.past_key_values.layers:
            present += [layer.keys, layer.values]
        return (out.logits, *present)

    if position_ids:

        def forward(self, input_ids, attention_mask, position_ids, *past):
            return call(self, input_ids, attention_mask, position_ids, past)
    else:

        def forward(self, input_ids, attention_mask, *past):
            return call(self, input_ids, attention_mask, None, past)

    flat = type(base.__name__, (base,), {"forward": forward, "__module__": base.__module__})
    flat.__qualname__ = base.__qualname__
    model.__class__ = flat


def root_cause(error):
    """The exporters wrap the reason in advice: the innermost cause says what happened."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text[:300]}"


def make_inputs(model, batch, past, length, position_ids, kv_cache, pad=0, seed=0):
    """Sample inputs by name, in the graph's order. The last row's last `pad` tokens are padding."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    config = model.config.get_text_config()
    inputs = {
        "input_ids": torch.randint(0, config.vocab_size, (batch, length), generator=generator),
        "attention_mask": torch.ones(batch, past + length, dtype=torch.int64),
    }
    if pad:
        inputs["attention_mask"][-1, -pad:] = 0
    if position_ids:
        inputs["position_ids"] = torch.arange(past, past + length).repeat(batch, 1)
    if kv_cache:
        dtype = next(model.parameters()).dtype
        for i, (heads, size) in enumerate(cache_shapes(config)):
            for part in ("key", "value"):
                values = torch.randn(batch, heads, past, size, generator=generator)
                inputs[f"past_key_values.{i}.{part}"] = values.to(dtype)
    return inputs


def output_names(model, kv_cache):
    names = ["logits"]
    if kv_cache:
        for i in range(len(cache_shapes(model.config))):
            names += [f"present.{i}.key", f"present.{i}.value"]
    return names


def dynamic_axes(name, kv_cache):
    """Names of the free axes of an input or output."""
    if name.startswith("past_key_values."):
        return {0: "batch", 2: "past"}
    if name.startswith("present."):
        return {0: "batch", 2: "total"}
    if name == "attention_mask" and kv_cache:
        return {0: "batch", 1: "total"}
    return {0: "batch", 1: "sequence"}


# --------------------------------------------------------------------------------------------- export


def export(model, path, exporter="dynamo", opset=None, position_ids=False, kv_cache=False, external=None):
    """Writes `path` (and `path`.data). The model's forward must be flat (`flatten_forward`)."""
    import torch

    past = 5 if kv_cache else 0
    # Sizes are distinct and above 1, so that no axis is taken for another or for a constant.
    inputs = make_inputs(model, 2, past, 7, position_ids, kv_cache)
    names, outputs = list(inputs), output_names(model, kv_cache)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    kwargs = {"input_names": names, "output_names": outputs}
    if opset:
        kwargs["opset_version"] = opset
    if exporter == "dynamo":
        axes = [dynamic_axes(name, kv_cache) for name in names]
        fixed = 3 if position_ids else 2
        auto = [{axis: torch.export.Dim.DYNAMIC for axis in one} for one in axes]
        shapes = tuple(auto[:fixed]) + ((tuple(auto[fixed:]),) if kv_cache else ())
        kwargs |= {"dynamo": True, "dynamic_shapes": shapes, "external_data": True, "verbose": False}
        kwargs |= {"report": False, "optimize": True}
    else:
        dynamic = {name: dynamic_axes(name, kv_cache) for name in names + outputs}
        kwargs |= {"dynamo": False, "dynamic_axes": dynamic, "do_constant_folding": True}
    with torch.no_grad(), tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as scratch:
        raw = Path(scratch) / path.name
        try:
            torch.onnx.export(model, tuple(inputs.values()), str(raw), **kwargs)
        except Exception as error:
            other = "torchscript" if exporter == "dynamo" else "dynamo"
            raise ExportError(
                f"torch.onnx.export ({exporter}) failed: {root_cause(error)}; --exporter {other} may work"
            ) from error
        if external is None:
            external = exporter == "dynamo" or size > PROTOBUF_LIMIT
        exported_onnx.finish(raw, path, external, lambda name: dynamic_axes(name, kv_cache))


# --------------------------------------------------------------------------------------------- check


def compare(model, path, position_ids, kv_cache, pad=3):
    """Runs `path` in ONNX Runtime beside PyTorch; returns (max |difference|, logits' range).

    The last row is padded; its padding's own logits mean nothing and are left out.
    """
    import numpy
    import onnxruntime
    import torch

    past, length = (6 if kv_cache else 0), 33
    inputs = make_inputs(model, 3, past, length, position_ids, kv_cache, pad=pad, seed=1)
    with torch.no_grad():
        want = model(*inputs.values())
    want = [want] if isinstance(want, torch.Tensor) else list(want)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    got = session.run(None, {name: to_numpy(value) for name, value in inputs.items()})
    worst = 0.0
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        a, b = a.astype(numpy.float64), b.double().numpy()
        if a.shape != b.shape:
            raise ExportError(f"output {index}: ONNX Runtime gives shape {a.shape}, PyTorch {b.shape}")
        if index == 0:
            a[-1, -pad:] = b[-1, -pad:] = 0
            spread = float(b.max() - b.min())
        worst = max(worst, float(numpy.abs(a - b).max()))
    return worst, spread


def to_numpy(tensor):
    import torch

    if tensor.dtype == torch.bfloat16:
        import ml_dtypes

        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def report_check(model, path, dtype, position_ids, kv_cache):
    """Prints the difference from PyTorch; raises when it is beyond the type's tolerance."""
    try:
        import onnxruntime  # noqa: F401
    except ModuleNotFoundError:
        print("not compared with PyTorch: onnxruntime is not installed", file=sys.stderr)
        return
    try:
        worst, spread = compare(model, path, position_ids, kv_cache)
    except ExportError:
        raise
    except Exception as error:
        if dtype == "fp32":
            raise ExportError(f"{path}: ONNX Runtime cannot run it: {str(error).splitlines()[0]}") from error
        print(f"not compared with PyTorch: ONNX Runtime's CPU provider: {str(error).splitlines()[0]}", file=sys.stderr)
        return
    print(f"max |ONNX Runtime - PyTorch| = {worst:.3g}, logits' range {spread:.3g}")
    if not worst <= TOLERANCE[dtype] * spread:
        raise ExportError(
            f"{path} differs from PyTorch by {worst:.3g}, more than {TOLERANCE[dtype]:g} of the logits' range; "
            "the other exporter may be right for this model"
        )


# --------------------------------------------------------------------------------------------- command


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="MODEL is omitted with --name or --gguf."
    )
    parser.add_argument("paths", nargs="+", metavar="MODEL OUT", help="hub id or directory; output directory")
    parser.add_argument("--name", help="a model of models.toml, in place of MODEL")
    parser.add_argument("--models", type=Path, default=Path(__file__).with_name("models.toml"), metavar="FILE")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="a GGUF file, in place of MODEL")
    parser.add_argument("--exporter", choices=("dynamo", "torchscript"), default="dynamo")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="default fp32, or the model's row in models.toml")
    parser.add_argument("--kv-cache", action="store_true", help="past_key_values inputs and present outputs")
    parser.add_argument("--position-ids", action="store_true", help="a position_ids input")
    parser.add_argument("--opset", type=int, help="ONNX opset (default: the exporter's)")
    parser.add_argument("--tokenizer", metavar="MODEL", help="take the tokenizer from another model")
    parser.add_argument("--save-hf", type=Path, metavar="DIR", help="also save the PyTorch model and tokenizer")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that the model brings along")
    parser.add_argument("--no-check", action="store_true", help="do not compare with PyTorch")
    args = parser.parse_args(argv)
    given = [bool(args.name), bool(args.gguf), len(args.paths) == 2]
    if sum(given) != 1 or len(args.paths) > 2:
        parser.error("give MODEL OUT, or --name NAME OUT, or --gguf FILE OUT")
    if args.gguf and not args.gguf.is_file():
        parser.error(f"--gguf: no such file: {args.gguf}")
    return args


def run(args):
    row = load_named(args.name, args.models) if args.name else {}
    source = row.get("hub") or (None if args.gguf else args.paths[0])
    dtype = args.dtype or row.get("dtype", "fp32")
    if dtype not in DTYPES:
        raise ExportError(f"{args.models}: dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    trust = args.trust_remote_code
    if source:
        check_directory(source)
    out = Path(args.paths[-1])
    out.mkdir(parents=True, exist_ok=True)
    # The tokenizer first: it is quick, and without it the export is of no use.
    other = args.tokenizer or row.get("tokenizer")
    tokenizer = save_tokenizer(other or source, out, None if other else args.gguf, trust)
    model = load_model(source, dtype, args.gguf, trust)
    if args.save_hf:
        model.save_pretrained(args.save_hf)
        tokenizer.save_pretrained(args.save_hf)
    accepts = inspect.signature(model.forward).parameters
    if args.position_ids and "position_ids" not in accepts:
        raise ExportError(f"--position-ids: {type(model).__name__} takes no position_ids")
    experts = unstack_experts(model)
    if experts:
        print(f"note: {experts} layers of stacked experts exported as Linear layers w1, w3, w2", file=sys.stderr)
    flatten_forward(model, args.position_ids, args.kv_cache)
    path = out / "model.onnx"
    export(model, path, args.exporter, args.opset, args.position_ids, args.kv_cache)
    print(f"wrote {path} ({args.exporter}, {dtype}, torch {sys.modules['torch'].__version__})")
    if not args.no_check:
        report_check(model, path, dtype, args.position_ids, args.kv_cache)


def main(argv=None):
    args = parse_arguments(argv)
    try:
        import torch  # noqa: F401
        import transformers

        transformers.utils.logging.disable_progress_bar()
    except ModuleNotFoundError as error:
        print(f"error: {error.name} is not installed: pip install torch transformers onnxscript", file=sys.stderr)
        return 1
    try:
        run(args)
    except ExportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
