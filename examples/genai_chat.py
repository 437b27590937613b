#!/usr/bin/env python3
"""Chat with a model folder of ONNX Runtime GenAI, as its builder or `mxrewrite --genai` wrote it.

    python examples/genai_chat.py DIR                                  # a conversation; an empty line or Ctrl-D ends it
    python examples/genai_chat.py DIR --prompt "Name three rivers." --max-tokens 64
    python examples/genai_chat.py DIR -e cuda --temperature 0.7 --top-p 0.9 --seed 1

It needs onnxruntime-genai and onnxruntime (for -e cuda: onnxruntime-genai-cuda and onnxruntime-gpu[cuda,cudnn]). A rewritten
folder names its operator library itself, so nothing here is about MX. The tokenizer's chat template makes the prompt;
--raw takes the text as it is. Answers go to stdout as they are made, tokens a second to stderr.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np


class UserError(Exception):
    """Something that whoever called can change."""


def load(folder, provider, threads):
    """The module and the model. `follow` takes the provider that the folder's configuration names."""
    if not (folder / "genai_config.json").is_file():
        raise UserError(f"{folder}: no genai_config.json there; make the folder with onnxruntime_genai's builder")
    try:
        import onnxruntime

        if provider == "cuda" and hasattr(onnxruntime, "preload_dlls"):
            onnxruntime.preload_dlls()
        import onnxruntime_genai as og
    except ImportError as error:
        raise UserError(f"{error}: pip install onnxruntime-genai (or onnxruntime-genai-cuda)") from error
    config = og.Config(str(folder))
    if provider != "follow":
        config.clear_providers()
        if provider == "cuda":
            config.append_provider("cuda")
    if threads:
        # Left alone, GenAI takes half the machine's logical processors, 16 at most.
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    try:
        return og, og.Model(config)
    except Exception as error:
        raise UserError(f"{folder}: {error}") from error


def context_length(folder):
    return json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"].get("context_length", 2048)


class Chat:
    """A model, its tokenizer and what was said so far."""

    def __init__(self, args):
        self.args = args
        self.og, self.model = load(args.folder, args.execution_provider, args.threads)
        self.tokenizer = self.og.Tokenizer(self.model)
        self.context = context_length(args.folder)
        self.messages = [{"role": "system", "content": args.system}] if args.system else []

    def prompt(self, text):
        """Ids of the conversation up to the place where the answer begins."""
        self.messages.append({"role": "user", "content": text})
        if self.args.raw:
            return self.tokenizer.encode(text)
        try:
            full = self.tokenizer.apply_chat_template(json.dumps(self.messages), add_generation_prompt=True)
        except Exception as error:
            raise UserError(f"the tokenizer's chat template: {error}; --raw does without") from error
        return self.tokenizer.encode(full)

    def options(self, length):
        args = self.args
        options = {"max_length": min(length + args.max_tokens, self.context), "do_sample": args.temperature > 0}
        if args.temperature > 0:
            options |= {"temperature": args.temperature, "top_p": args.top_p, "top_k": 0, "random_seed": args.seed}
        return options

    def answer(self, text):
        """Prints the answer token by token."""
        ids = np.asarray(self.prompt(text), np.int32)
        if len(ids) >= self.context:
            raise UserError(f"the conversation has {len(ids)} tokens, the model takes {self.context}")
        params = self.og.GeneratorParams(self.model)
        params.set_search_options(**self.options(len(ids)))
        generator = self.og.Generator(self.model, params)
        stream, said, count = self.tokenizer.create_stream(), [], 0
        start = time.perf_counter()
        generator.append_tokens(ids)
        first = None
        while not generator.is_done():
            generator.generate_next_token()
            first = first or time.perf_counter()
            said.append(stream.decode(int(generator.get_next_tokens()[0])))
            print(said[-1], end="", flush=True)
            count += 1
        end = time.perf_counter()
        print(flush=True)
        self.messages.append({"role": "assistant", "content": "".join(said)})
        note = f"prompt: {len(ids)} tokens in {first - start:.2f} s"
        if count > 1:
            note += f"; answer: {count} tokens, {(count - 1) / (end - first):.1f} tokens/s"
        print(note, file=sys.stderr)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder with genai_config.json")
    parser.add_argument("-e", "--execution-provider", choices=("follow", "cpu", "cuda"), default="follow",
                        help="follow (default): the one in genai_config.json")
    parser.add_argument("--prompt", help="one question; without it, a conversation; - reads it from stdin")
    parser.add_argument("--system", help="a system message")
    parser.add_argument("--raw", action="store_true", help="no chat template")
    parser.add_argument("--max-tokens", type=int, default=256, metavar="N", help="of an answer")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy (default)")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.temperature < 0 or not 0 < args.top_p <= 1 or args.max_tokens < 1:
        parser.error("--temperature is 0 or more, --top-p above 0 and at most 1, --max-tokens positive")
    return args


def main():
    args = arguments()
    try:
        chat = Chat(args)
        if args.prompt is not None:
            chat.answer(sys.stdin.read() if args.prompt == "-" else args.prompt)
            return 0
        while text := input("> "):
            chat.answer(text)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except EOFError:
        print()
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
