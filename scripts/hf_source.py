"""Where export_hf.py takes models and tokenizers from: the hub, a directory, a GGUF file, models.toml."""

import sys
from pathlib import Path

from exported_onnx import ExportError

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
# GGUF pre-tokenizers that are GPT-2's with every digit on its own.
DIGITS_APART = ("smollm", "starcoder", "refact", "command-r", "codeshell")


def load_named(name, models_file):
    """The row `name` of models.toml."""
    try:
        import tomllib
    except ModuleNotFoundError:
        raise ExportError("--name needs Python 3.11 or newer (tomllib); pass the hub id instead")
    try:
        with open(models_file, "rb") as file:
            rows = tomllib.load(file).get("models", {})
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ExportError(f"{models_file}: {error}")
    row = rows.get(name)
    if row is None:
        raise ExportError(f"{models_file} has no model {name!r}; it has: {', '.join(rows)}")
    if "hub" not in row:
        raise ExportError(f"{models_file}: model {name!r} has no 'hub'")
    return row


def check_directory(source):
    """Refuses a local path that cannot be a model, with a plainer reason than transformers gives."""
    path = Path(source)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ExportError(f"{source} has no config.json: not a Hugging Face model directory")
    elif path.exists():
        raise ExportError(f"{source} is a file: pass the model's directory, or --gguf for a GGUF file")
    elif source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ExportError(f"{source}: no such directory")


def explain_load_failure(what, source, error):
    text = f"{type(error).__name__}: {error}".strip()
    lowered = text.lower()
    first = text.splitlines()[0]
    offline = ("connect", "resolve", "offline", "max retries", "timed out", "localentrynotfound", "cached files")
    if "gated" in lowered or "401" in lowered or "403" in lowered:
        hint = "the repository is gated: accept its terms on the hub and log in, or pass a local directory"
    elif any(word in lowered for word in offline):
        hint = (
            "the hub cannot be reached: pass a local directory that holds config.json, the *.safetensors "
            "and tokenizer.json, or set HF_HOME to a cache that has the model"
        )
    elif "trust_remote_code" in lowered:
        hint = "the model brings its own code: read it, then pass --trust-remote-code"
    elif what == "tokenizer" and Path(source).is_dir() and not (Path(source) / "tokenizer.json").is_file():
        first = "it has no tokenizer.json, and no other vocabulary that one can be made from"
        hint = "put one there, or pass --tokenizer with a model that has the same vocabulary"
    else:
        hint = None
    return ExportError(f"cannot load the {what} of {source}: {first}" + (f"; {hint}" if hint else ""))


def load_model(source, dtype, gguf=None, trust_remote_code=False):
    """A causal language model in eval mode, eager attention, weights in `dtype` (a key of DTYPES)."""
    import torch
    from transformers import AutoModelForCausalLM

    kwargs = {
        "dtype": getattr(torch, DTYPES[dtype]),
        "attn_implementation": "eager",
        "trust_remote_code": trust_remote_code,
    }
    if gguf:
        source, kwargs["gguf_file"] = str(gguf.parent), gguf.name
    try:
        model = AutoModelForCausalLM.from_pretrained(source, **kwargs)
    except Exception as error:  # transformers raises many kinds here
        raise explain_load_failure("model", gguf or source, error) from error
    return (without_gguf(model) if gguf else model).eval()


def without_gguf(model):
    """The same model built from a plain configuration: one loaded from GGUF calls itself quantised."""
    from transformers import AutoModelForCausalLM

    config = type(model.config).from_dict(
        {k: v for k, v in model.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    )
    plain = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=model.dtype)
    plain.load_state_dict(model.state_dict())
    plain.tie_weights()
    return plain


def save_tokenizer(source, out, gguf=None, trust_remote_code=False):
    """Writes out/tokenizer.json and returns the tokenizer."""
    from transformers import AutoTokenizer

    kwargs = {"trust_remote_code": trust_remote_code}
    if gguf:
        source, kwargs["gguf_file"] = str(gguf.parent), gguf.name
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **kwargs)
    except Exception as error:
        raise explain_load_failure("tokenizer", gguf or source, error) from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ExportError(
            f"{gguf or source} has no tokenizer.json and its tokenizer ({type(tokenizer).__name__}) has no fast "
            "form to make one from; pass --tokenizer with a model that has the same vocabulary and a tokenizer.json"
        )
    if gguf:
        restore_pre_tokenizer(backend, gguf)
    # Truncation and padding are the evaluator's business, and a byte count needs every token.
    backend.no_truncation()
    backend.no_padding()
    backend.save(str(out / "tokenizer.json"))
    check_round_trip(tokenizer, out / "tokenizer.json")
    return tokenizer


def restore_pre_tokenizer(backend, gguf):
    """transformers drops the GGUF's pre-tokenizer name; without its digit rule "  12" splits differently."""
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers

    field = GGUFReader(str(gguf)).fields.get("tokenizer.ggml.pre")
    name = field.contents() if field else "default"
    if name in DIGITS_APART:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif name not in ("default", "gpt-2"):
        print(f"note: {gguf}: pre-tokenizer {name!r} is left as transformers converts it", file=sys.stderr)


def check_round_trip(tokenizer, path):
    """Decoding must give the text back up to the normaliser's changes; a broken vocabulary shows here."""
    from tokenizers import Tokenizer

    text = "Gravity is a force.\n\tdef f(x): return x**2  # 12345, \u00e9t\u00e9, \u65e5\u672c"
    fast = Tokenizer.from_file(str(path))
    ids = fast.encode(text, add_special_tokens=False).ids
    if ids != tokenizer(text, add_special_tokens=False).input_ids:
        raise ExportError(f"{path}: the saved tokenizer splits text differently from the loaded one")
    back = fast.decode(ids)
    if "".join(back.split()).lower() != "".join(text.split()).lower():
        print(f"note: tokenizer round trip is lossy: {text!r} -> {back!r}", file=sys.stderr)
