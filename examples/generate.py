#!/usr/bin/env python3
"""Generates text with plain ONNX Runtime and a KV cache: models of ONNX Runtime GenAI's builder and of Optimum, rewritten or not.

    python examples/generate.py model_dir --prompt "The capital of France is"
    python examples/generate.py model.onnx --prompt - --temperature 0.8 --top-p 0.95 --seed 1 < question.txt
    python examples/generate.py model_dir --device cuda --cuda-graph --benchmark 128

It needs numpy, onnxruntime (onnxruntime-gpu for CUDA) and, for text, tokenizers. Text goes to stdout as it is made, figures
to stderr; --benchmark prints one JSON object to stdout. Prompts are taken as they are, without a chat template:
examples/genai_chat.py applies one.

The graph takes input_ids and, where it has them, attention_mask, position_ids, use_cache_branch and the caches: every input
past*N*key/value belongs to the output present*N*key/value of the same number. Caches stay on the device in their own type
(float32, float16, bfloat16). Where genai_config.json says past_present_share_buffer, past and present are one buffer of the
whole length, into which GroupQueryAttention writes in place; attention_mask then says how much of it is filled.
"""

import argparse
import ctypes
import json
import math
import re
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort

# ONNX's number of a type, and the NumPy type that holds its bytes.
TYPES = {
    "tensor(float)": (1, np.float32),
    "tensor(float16)": (10, np.float16),
    "tensor(bfloat16)": (16, np.uint16),
    "tensor(int32)": (6, np.int32),
    "tensor(int64)": (7, np.int64),
    "tensor(bool)": (9, np.bool_),
}
NO_CAPTURE, DECODE_GRAPH = "-1", "1"


class UserError(Exception):
    """Something that whoever called can change."""


def to_float32(array):
    """Logits as float32; bfloat16 comes as uint16."""
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def on_host(value, dtype):
    """The elements of an OrtValue in host memory, without a copy: OrtValue.numpy() knows no bfloat16."""
    shape = value.shape()
    kind = np.dtype(dtype)
    size = math.prod(shape) * kind.itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(value.data_ptr()), kind).reshape(shape)


class Buffer:
    """Memory on the device that is bound by its address, and so keeps it from run to run."""

    def __init__(self, type_name, shape, device):
        self.onnx_type, dtype = TYPES[type_name]
        self.shape, self.device = list(shape), device
        # Memory of no bytes has no address.
        self.value = ort.OrtValue.ortvalue_from_numpy(np.zeros([max(1, n) for n in shape], dtype), device, 0)

    def bind(self, bind, name):
        bind(name, self.device, 0, self.onnx_type, self.shape, self.value.data_ptr())


class Files:
    """A model file and what lies beside it."""

    def __init__(self, path):
        folder = path if path.is_dir() else path.parent
        self.genai = self.read(folder / "genai_config.json")
        self.config = self.read(folder / "config.json")
        self.generation = self.read(folder / "generation_config.json")
        self.decoder = self.genai.get("model", {}).get("decoder", {})
        self.model = folder / self.decoder.get("filename", "model.onnx") if path.is_dir() else path
        self.tokenizer = folder / "tokenizer.json"
        if not self.model.is_file():
            raise UserError(f"{self.model}: no such file")
        # The configuration is of its own decoder, not of any file beside it.
        named = folder / self.decoder.get("filename", "")
        if named.resolve() != self.model.resolve():
            self.genai, self.decoder = {}, {}
        library = self.decoder.get("session_options", {}).get("custom_ops_library")
        self.library = folder / library if library else None

    @staticmethod
    def read(path):
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: {error}") from error

    def eos(self):
        """Ids that end a text."""
        for source in (self.genai.get("model", {}), self.generation, self.config):
            ids = source.get("eos_token_id")
            if ids is not None:
                return set(ids if isinstance(ids, list) else [ids])
        return set()

    def context_length(self):
        return self.genai.get("model", {}).get("context_length") or self.config.get("max_position_embeddings")

    def heads(self):
        """Number and size of the cache's heads, None where nothing says it."""
        config = self.decoder or self.config
        queries = config.get("num_attention_heads")
        size = config.get("head_size") or config.get("head_dim")
        if not size and queries and config.get("hidden_size"):
            size = config["hidden_size"] // queries
        return config.get("num_key_value_heads") or queries, size

    def shares_buffers(self):
        return bool(self.genai.get("search", {}).get("past_present_share_buffer"))


class Decoder:
    """A session and its cache, for one sequence."""

    def __init__(self, session, device, length, shared=False, graph=False, heads=(None, None)):
        """`length`: tokens that the cache must hold. `shared`: past and present are one buffer. `graph`: decoding steps are
        captured as a CUDA graph, which needs `shared`. `heads`: number and size of the cache's, where the graph does not say."""
        self.heads = heads
        self.session, self.device, self.length, self.shared, self.graph = session, device, length, shared, graph
        self.inputs = {i.name: i for i in session.get_inputs()}
        self.outputs = {o.name: o for o in session.get_outputs()}
        if "logits" not in self.outputs or "input_ids" not in self.inputs:
            raise UserError(f"the model has no input_ids or no logits, but {[*self.inputs]} -> {[*self.outputs]}")
        self.pairs = self.find_pairs()
        known = {"input_ids", "attention_mask", "position_ids", "use_cache_branch", *self.pairs}
        unknown = [name for name in self.inputs if name not in known]
        if unknown:
            raise UserError(f"the model has inputs that this program does not know: {', '.join(unknown)}")
        if not self.pairs:
            raise UserError("the model has no KV cache: no inputs named past*.N.key and outputs present*.N.key")
        self.steps = {}
        self.reset()

    def find_pairs(self):
        """Name of a past -> name of its present."""

        def place(name):
            layers, parts = re.findall(r"\d+", name), re.findall("key|value", name)
            return (layers[-1], parts[-1]) if layers and parts else None

        presents = {place(name): name for name in self.outputs if name.startswith("present")}
        pasts = {name: presents.get(place(name)) for name in self.inputs if name.startswith("past") and place(name)}
        alone = [name for name, present in pasts.items() if present is None]
        if alone:
            raise UserError(f"no output present* belongs to the input {alone[0]}")
        return pasts

    def cache_shape(self, name, length):
        shape = self.inputs[name].shape
        if len(shape) != 4:
            raise UserError(f"{name} has shape {shape} instead of [batch, heads, length, size]")
        said = [size if isinstance(size, int) else other for size, other in zip(shape[1::2], self.heads)]
        if None in said:
            raise UserError(f"{name} has shape {shape}, and neither genai_config.json nor config.json says heads and size")
        return [1, said[0], length, said[1]]

    def reset(self):
        """Forgets all tokens."""
        self.total = 0
        if self.shared and getattr(self, "cache", None):
            return  # What lies behind the filled part is never read.
        length = self.length if self.shared else 0
        self.cache = {n: Buffer(self.inputs[n].type, self.cache_shape(n, length), self.device) for n in self.pairs}

    def step(self, ids):
        """Appends tokens; returns the logits that follow the last one, float32 [vocabulary]."""
        count = len(ids)
        self.total += count
        if self.total > self.length:
            raise UserError(f"{self.total} tokens do not fit into the cache of {self.length}")
        if self.graph and count == 1:
            return self.replay(ids)
        binding = self.session.io_binding()
        # One length at prefill, more at every step.
        feeds = self.feeds(ids, self.total)
        for name, array in feeds.items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array, self.device, 0))
        self.bind_cache(binding)
        binding.bind_output("logits", "cpu")
        options = ort.RunOptions()
        if self.graph:
            options.add_run_config_entry("gpu_graph_id", NO_CAPTURE)
        self.session.run_with_iobinding(binding, options)
        outputs = binding.get_outputs()
        if not self.shared:
            self.cache = dict(zip(self.pairs, outputs[: len(self.pairs)]))
        logits = on_host(outputs[-1], TYPES[self.outputs["logits"].type][1])
        return to_float32(logits[0, -1])

    def feeds(self, ids, length):
        """Inputs but the cache; the mask has `length` columns."""
        count, dtype = len(ids), lambda name: TYPES[self.inputs[name].type][1]
        feeds = {"input_ids": np.array([ids], dtype("input_ids"))}
        if "attention_mask" in self.inputs:
            feeds["attention_mask"] = (np.arange(length) < self.total).astype(dtype("attention_mask"))[None]
        if "position_ids" in self.inputs:
            feeds["position_ids"] = np.arange(self.total - count, self.total, dtype=dtype("position_ids"))[None]
        if "use_cache_branch" in self.inputs:
            feeds["use_cache_branch"] = np.array([self.total > count])
        return feeds

    def bind_cache(self, binding):
        for past, present in self.pairs.items():
            if isinstance(self.cache[past], Buffer):
                self.cache[past].bind(binding.bind_input, past)
            else:
                binding.bind_ortvalue_input(past, self.cache[past])
            if self.shared:
                self.cache[past].bind(binding.bind_output, present)
            else:
                binding.bind_output(present, self.device, 0)

    def replay(self, ids):
        """One token by the captured graph: all addresses and shapes stay, and the mask is as long as the cache."""
        feeds = self.feeds(ids, self.length)
        if not self.steps:
            vocabulary = self.outputs["logits"].shape[-1]
            if not isinstance(vocabulary, int):
                raise UserError("a CUDA graph needs a model whose logits have a fixed vocabulary size")
            buffers = {name: Buffer(self.inputs[name].type, array.shape, self.device) for name, array in feeds.items()}
            logits = Buffer(self.outputs["logits"].type, [1, 1, vocabulary], self.device)
            binding, options = self.session.io_binding(), ort.RunOptions()
            for name, buffer in buffers.items():
                buffer.bind(binding.bind_input, name)
            self.bind_cache(binding)
            logits.bind(binding.bind_output, "logits")
            options.add_run_config_entry("gpu_graph_id", DECODE_GRAPH)
            self.steps = {"buffers": buffers, "logits": logits, "binding": binding, "options": options}
        for name, array in feeds.items():
            self.steps["buffers"][name].value.update_inplace(array)
        self.session.run_with_iobinding(self.steps["binding"], self.steps["options"])
        return to_float32(self.steps["logits"].value.numpy()[0, 0])


class Sampler:
    """Chooses a token: the likeliest at temperature 0, else one of the smallest set whose probabilities reach top_p."""

    def __init__(self, temperature=0.0, top_p=1.0, seed=0):
        self.temperature, self.top_p, self.random = temperature, top_p, np.random.default_rng(seed)

    def __call__(self, logits):
        if not np.isfinite(logits).any():
            raise UserError("the model's logits are no numbers")
        if self.temperature == 0:
            return int(np.nanargmax(logits))
        scaled = logits.astype(np.float64) / self.temperature
        p = np.exp(scaled - np.nanmax(scaled))
        order = np.argsort(-p, kind="stable")
        p = p[order] / p.sum()
        kept = int(np.searchsorted(np.cumsum(p), self.top_p)) + 1
        p = p[:kept] / p[:kept].sum()
        return int(order[min(int(np.searchsorted(np.cumsum(p), self.random.random())), kept - 1)])


def generate(decoder, prompt, count, choose, eos=()):
    """Yields up to `count` tokens that follow the prompt; ends after one of `eos`."""
    decoder.reset()
    logits = decoder.step(prompt)
    for index in range(count):
        token = choose(logits)
        yield token
        if token in eos or index + 1 == count:
            return
        logits = decoder.step([token])


class TextStream:
    """Text of tokens as they come: one that ends within a character is held back until the next."""

    def __init__(self, tokenizer, ids):
        self.tokenizer, self.ids = tokenizer, list(ids)
        self.shown = tokenizer.decode(self.ids)

    def add(self, token):
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids)
        if text.endswith("\ufffd") or not text.startswith(self.shown):
            return ""
        new, self.shown = text[len(self.shown) :], text
        return new


def benchmark(decoder, prompt, count, repeat):
    """Tokens a second of prefill and of decoding, medians over `repeat` runs after one that is not counted."""
    prefill, decode, ids = [], [], []
    choose = Sampler()
    for run in range(repeat + 1):
        decoder.reset()
        start = time.perf_counter()
        logits = decoder.step(prompt)
        middle = time.perf_counter()
        ids = []
        for _ in range(count):
            ids.append(choose(logits))
            logits = decoder.step(ids[-1:])
        end = time.perf_counter()
        if run:
            prefill.append(len(prompt) / (middle - start))
            decode.append(count / (end - middle))
    return {
        "prompt_tokens": len(prompt),
        "new_tokens": count,
        "prefill_tokens_per_s": round(statistics.median(prefill), 2),
        "decode_tokens_per_s": round(statistics.median(decode), 2),
        "decode_runs": [round(rate, 2) for rate in decode],
        "ids": ids[:16],
    }


def library(args, files):
    """The custom-op library: the option's, the GenAI folder's, the Python package's, or none."""
    if args.ops_library:
        return args.ops_library
    if files.library:
        return files.library
    try:
        import mxrewrite
    except ImportError:
        return None
    return mxrewrite.library_path()


def open_session(args, files):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if args.threads:
        options.intra_op_num_threads = args.threads
    operators = library(args, files)
    if operators:
        options.register_custom_ops_library(str(operators))
    providers = ["CPUExecutionProvider"]
    if args.device == "cuda":
        if "CUDAExecutionProvider" not in ort.get_available_providers():
            raise UserError("this onnxruntime has no CUDA: pip install onnxruntime-gpu[cuda,cudnn]")
        ort.preload_dlls()
        cuda = {"device_id": 0, "use_tf32": 0, "enable_cuda_graph": int(args.cuda_graph)}
        providers = [("CUDAExecutionProvider", cuda)]
    try:
        session = ort.InferenceSession(str(files.model), options, providers=providers, enable_fallback=0)
    except Exception as error:
        hint = "" if operators else " (a rewritten model needs --ops-library libmx_custom_ops.so)"
        raise UserError(f"{files.model}: {error}{hint}") from error
    # A provider whose libraries are missing is left out with a line of log alone.
    if args.device == "cuda" and "CUDAExecutionProvider" not in session.get_providers():
        raise UserError("ONNX Runtime left CUDA out: CUDA, cuDNN or the driver is missing; its log says which")
    return session


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="an .onnx file, or a folder with genai_config.json or model.onnx")
    parser.add_argument("--prompt", help="text to continue; - reads it from stdin")
    parser.add_argument("--ids", help="the prompt as token ids, 1,2,3; ids are printed then, and no tokenizer is needed")
    parser.add_argument("--tokenizer", type=Path, help="default: tokenizer.json beside the model")
    parser.add_argument("--max-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy (default)")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eos", help="ids that end the text (default: the configuration's); none: no id does")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="of ONNX Runtime's pool")
    parser.add_argument("--ops-library", type=Path, metavar="PATH", help="libmx_custom_ops.so (default: the GenAI folder's or the package's)")
    parser.add_argument("--shared-cache", choices=("auto", "yes", "no"), default="auto", help="past and present in one buffer")
    parser.add_argument("--cuda-graph", action="store_true", help="capture decoding as a CUDA graph; needs a shared cache")
    parser.add_argument("--benchmark", type=int, metavar="N", help="measure prefill and N decoding steps, print JSON")
    parser.add_argument("--prompt-tokens", type=int, default=64, metavar="P", help="with --benchmark and no prompt: P tokens")
    parser.add_argument("--repeat", type=int, default=3, metavar="R", help="with --benchmark: runs to take medians of")
    args = parser.parse_args(argv)
    if args.cuda_graph and args.device != "cuda":
        parser.error("--cuda-graph needs --device cuda")
    if args.prompt is not None and args.ids is not None:
        parser.error("--prompt and --ids are two prompts")
    if args.prompt is None and args.ids is None and not args.benchmark:
        parser.error("--prompt or --ids is missing")
    if args.temperature < 0 or not 0 < args.top_p <= 1 or args.max_tokens < 1 or args.repeat < 1 or args.prompt_tokens < 1:
        parser.error("--temperature is 0 or more, --top-p above 0 and at most 1, counts are positive")
    return args


def numbers(option, text):
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"{option} {text}: ids are numbers with commas between") from error


def read_prompt(args, files):
    """Ids of the prompt, and the tokenizer when there is text."""
    if args.ids is not None:
        return numbers("--ids", args.ids), None
    if args.prompt is None:
        return [3 + i % 97 for i in range(args.prompt_tokens)], None
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise UserError("text needs the tokenizers package: pip install tokenizers (or give --ids)") from error
    path = args.tokenizer or files.tokenizer
    if not path.is_file():
        raise UserError(f"{path}: no such file; name one with --tokenizer")
    tokenizer = Tokenizer.from_file(str(path))
    ids = tokenizer.encode(sys.stdin.read() if args.prompt == "-" else args.prompt).ids
    if not ids:
        raise UserError("the prompt has no tokens")
    return ids, tokenizer


def run(args):
    files = Files(args.model)
    prompt, tokenizer = read_prompt(args, files)
    length = len(prompt) + (args.benchmark or args.max_tokens)
    limit = files.context_length()
    if limit and length > limit:
        raise UserError(f"{length} tokens are more than the model's {limit}: take less with --max-tokens")
    shared = files.shares_buffers() if args.shared_cache == "auto" else args.shared_cache == "yes"
    if args.cuda_graph and not shared:
        raise UserError("--cuda-graph needs one buffer for past and present (--shared-cache yes, if the graph can)")
    start = time.perf_counter()
    decoder = Decoder(open_session(args, files), args.device, length, shared, args.cuda_graph, files.heads())
    loaded = time.perf_counter() - start
    if args.benchmark:
        figures = {"model": str(files.model), "device": args.device, "shared_cache": shared, "cuda_graph": args.cuda_graph}
        figures |= {"load_s": round(loaded, 2)} | benchmark(decoder, prompt, args.benchmark, args.repeat)
        print(json.dumps(figures))
        return
    eos = files.eos() if args.eos is None else set() if args.eos == "none" else set(numbers("--eos", args.eos))
    choose = Sampler(args.temperature, args.top_p, args.seed)
    stream = TextStream(tokenizer, prompt) if tokenizer else None
    count, start = 0, time.perf_counter()
    for token in generate(decoder, prompt, args.max_tokens, choose, eos):
        if stream is None:
            print(token, end=" ", flush=True)
        elif token not in eos:
            print(stream.add(token), end="", flush=True)
        count += 1
    seconds = time.perf_counter() - start
    print(flush=True)
    print(f"{count} tokens in {seconds:.2f} s, {count / seconds:.1f} tokens/s with the prompt's {len(prompt)}", file=sys.stderr)


def main():
    args = arguments()
    try:
        run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
