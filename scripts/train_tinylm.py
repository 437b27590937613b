#!/usr/bin/env python3
"""Makes fixtures/tinylm: a small Llama, its tokenizer, and two ONNX exports of it. Four steps:

    train_tinylm.py corpus WORK           text from Debian packages -> tokenizer.json, train.npy, held.npy
    train_tinylm.py train WORK            -> tinylm.safetensors (some minutes on a GPU; --minutes or --steps)
    train_tinylm.py export WORK FIXTURES  -> FIXTURES/{dynamo,torchscript}/model.onnx, tokenizer.json
    train_tinylm.py evaluate WORK         held-out perplexity: unigram, fp32, MX formats (emulated)

`corpus` needs apt-get, numpy and tokenizers; `train` numpy, torch, transformers and safetensors, no
network; `export` also onnx, onnxscript and onnxruntime. tinylm_corpus.py lists the packages and licences.
"""

import argparse
import contextlib
import json
import math
import sys
import time
from pathlib import Path

import numpy

VOCABULARY = 1024
SEQUENCE = 512
# K = 144 is not a multiple of the 32-element block, K = 384 is; 6 query heads share 2 key/value heads.
CONFIG = {
    "vocab_size": VOCABULARY,
    "hidden_size": 144,
    "intermediate_size": 384,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": SEQUENCE,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
END = "<|endoftext|>"
MOST_TOKENS = 24_000_000  # 48 MB as uint16: what a GPU machine without a network takes along
HELD_OUT = 100  # one document in so many


# --------------------------------------------------------------------------------------------- corpus


def make_corpus(args):
    import tinylm_corpus

    args.work.mkdir(parents=True, exist_ok=True)
    versions = tinylm_corpus.fetch(args.work)
    found = tinylm_corpus.collect(args.work)
    train, held = [], []
    for documents in found.values():
        for document in documents:
            (held if tinylm_corpus.rank(document) // 7 % HELD_OUT == 0 else train).append(document)
    train.sort(key=tinylm_corpus.rank)
    held.sort(key=tinylm_corpus.rank)
    tokenizer = train_tokenizer(train)
    tokenizer.save(str(args.work / "tokenizer.json"))
    tokens = {name: encode(tokenizer, part) for name, part in (("train", train), ("held", held))}
    tokens["train"] = tokens["train"][:MOST_TOKENS]
    for name, ids in tokens.items():
        numpy.save(args.work / f"{name}.npy", ids)
    summary = {
        "packages": [
            {
                "package": source.package,
                "version": versions[source.package],
                "licence": source.licence,
                "documents": len(found[source.package]),
                "megabytes": round(sum(len(d.encode()) for d in found[source.package]) / 1e6, 2),
            }
            for source in tinylm_corpus.SOURCES
        ],
        "train_tokens": len(tokens["train"]),
        "held_tokens": len(tokens["held"]),
        "held_bytes": sum(len(d.encode()) for d in held),
    }
    (args.work / "corpus.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary, indent=1))


def train_tokenizer(documents):
    """Byte-level BPE without a normaliser: every text decodes to itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def encode(tokenizer, documents):
    end = tokenizer.token_to_id(END)
    rows = []
    for start in range(0, len(documents), 256):
        for one in tokenizer.encode_batch(documents[start : start + 256]):
            rows.append(numpy.array([end, *one.ids], dtype=numpy.uint16))
    return numpy.concatenate(rows)


# --------------------------------------------------------------------------------------------- model


def build(attention, seed=0):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM._from_config(LlamaConfig(**CONFIG), attn_implementation=attention)
    for name, weight in model.named_parameters():
        # As in GPT-2: what adds to the residual stream starts smaller the deeper the model is.
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.data /= math.sqrt(2 * CONFIG["num_hidden_layers"])
    return model


def load(work, attention="eager"):
    from safetensors.torch import load_file

    model = build(attention)
    missing, extra = model.load_state_dict(load_file(str(work / "tinylm.safetensors")), strict=False)
    if extra or set(missing) - {"lm_head.weight"}:
        raise SystemExit(f"error: tinylm.safetensors does not fit the configuration: {missing + extra}")
    model.tie_weights()
    return model.eval()


def windows(ids, length=SEQUENCE):
    """Whole windows without overlap, [rows, length]; the rest that fills no window is left out."""
    rows = len(ids) // length
    return ids[: rows * length].reshape(rows, length).astype(numpy.int64)


def unigram_nll(train, held):
    """Mean nll of the held-out windows' scored tokens (all but each window's first) by token counts."""
    counts = numpy.bincount(train, minlength=VOCABULARY) + 1.0
    scored = windows(held)[:, 1:]
    return float(-numpy.log(counts / counts.sum())[scored].mean())


def held_out_nll(model, held, device, batch=32):
    import torch

    rows, total, count = windows(held), 0.0, 0
    with torch.no_grad():
        for start in range(0, len(rows), batch):
            ids = torch.from_numpy(rows[start : start + batch]).to(device)
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
            total, count = total + loss.item(), count + ids[:, 1:].numel()
    return total / count


# --------------------------------------------------------------------------------------------- training


def train(args):
    import torch
    from safetensors.torch import save_file

    device = "cuda" if torch.cuda.is_available() else "cpu"
    began = time.time()
    train_ids = numpy.load(args.work / "train.npy")
    held_ids = numpy.load(args.work / "held.npy")
    torch.set_float32_matmul_precision("high")
    model = build("sdpa").to(device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(train_ids):,} training tokens, {device}")
    print(f"held-out unigram ppl {math.exp(unigram_nll(train_ids, held_ids)):.2f}", flush=True)
    out = args.out or args.work
    out.mkdir(parents=True, exist_ok=True)

    def save():
        state = {k: v.detach().float().cpu().contiguous() for k, v in model.state_dict().items()}
        state.pop("lm_head.weight")  # tied to the embedding
        save_file(state, str(out / "tinylm.safetensors"), metadata={"format": "pt"})

    steps = fit(args, model, torch.from_numpy(train_ids.astype(numpy.int32)).to(device), held_ids, device, save)
    save()
    nll = held_out_nll(model.eval(), held_ids, device)
    result = {"steps": steps, "batch": args.batch, "seed": args.seed, "held_out_ppl": math.exp(nll), "device": device}
    result |= {"learning_rate": args.learning_rate, "seconds": round(time.time() - began), "torch": torch.__version__}
    (out / "training.json").write_text(json.dumps(result) + "\n")
    print(json.dumps(result), flush=True)


def loss_function(model, device):
    import torch

    autocast = torch.autocast("cuda", torch.bfloat16) if device == "cuda" else contextlib.nullcontext()

    def loss(ids):
        with autocast:
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())

    return loss


def fit(args, model, tokens, held, device, save):
    """AdamW with warm-up and a cosine; the number of steps is given, or measured to fill --minutes."""
    import torch

    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95), fused=device == "cuda")
    loss_of = loss_function(model, device)
    if device == "cuda" and not args.no_compile:
        loss_of = torch.compile(loss_of)
    generator = torch.Generator(device).manual_seed(args.seed)
    offsets = torch.arange(SEQUENCE + 1, device=device)
    steps, began = args.steps, time.time()
    measured = 0.0
    step = 0
    while steps is None or step < steps:
        if step == 20:  # compilation and warm-up are over
            synchronize(device)
            measured = time.time()
        if step == 120 and steps is None:
            synchronize(device)
            each = (time.time() - measured) / 100
            steps = max(200, int(step + (args.minutes * 60 - (time.time() - began)) / each * 0.97))
            print(f"{each * 1e3:.1f} ms a step: {steps} steps, started {time.time() - began:.0f} s ago", flush=True)
        # Before the measurement the schedule is still warming up, whatever the total.
        rate = args.learning_rate * schedule(step, steps or 10**9)
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(len(tokens) - SEQUENCE - 1, (args.batch, 1), generator=generator, device=device)
        loss = loss_of(tokens[starts + offsets].long())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % args.report == 0:
            nll = held_out_nll(model, held, device)
            print(
                f"step {step} loss {loss.item():.4f} held-out ppl {math.exp(nll):.3f} {time.time() - began:.0f} s",
                flush=True,
            )
            save()
    return step


def synchronize(device):
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def schedule(step, steps, warmup=200, last=0.02):
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return last + (1 - last) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


# --------------------------------------------------------------------------------------------- export


def export_fixture(args):
    import export_hf

    tokenizer = args.work / "tokenizer.json"
    args.fixtures.mkdir(parents=True, exist_ok=True)
    (args.fixtures / "tokenizer.json").write_text(compact(tokenizer))
    for exporter in ("dynamo", "torchscript"):
        model = load(args.work)
        export_hf.flatten_forward(model, position_ids=False, kv_cache=False)
        folder = args.fixtures / exporter
        folder.mkdir(exist_ok=True)
        export_hf.export(model, folder / "model.onnx", exporter)
        export_hf.report_check(model, folder / "model.onnx", "fp32", False, False)
        check_padding(folder / "model.onnx")
        check_clean(folder)
        for file in sorted(folder.iterdir()):
            print(f"{file.stat().st_size:10,} {file.relative_to(args.fixtures)}")


def check_padding(path):
    """A row's logits must not depend on the padding after it nor on its neighbours."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    random = numpy.random.default_rng(0)
    ids = random.integers(0, VOCABULARY, (3, 64))
    lengths = (64, 41, 5)
    mask = (numpy.arange(64) < numpy.array(lengths)[:, None]).astype(numpy.int64)
    together = session.run(None, {"input_ids": ids, "attention_mask": mask})[0]
    worst = 0.0
    for row, length in enumerate(lengths):
        one = {"input_ids": ids[row : row + 1, :length], "attention_mask": mask[row : row + 1, :length]}
        alone = session.run(None, one)[0]
        worst = max(worst, float(numpy.abs(alone[0] - together[row, :length]).max()))
    print(f"max |padded in a batch - alone| = {worst:.3g}")
    if worst > 1e-3:
        raise SystemExit(f"error: {path}: padding changes the logits by {worst:.3g}")


def compact(path):
    return json.dumps(json.loads(path.read_text()), ensure_ascii=False, separators=(",", ":")) + "\n"


def check_clean(folder):
    """No path of the exporting machine may be in the fixture."""
    for file in folder.iterdir():
        raw = file.read_bytes()
        for word in (b"site-packages", b"stack_trace", b"/usr", b"/opt", b"/work", b"/home", b"/tmp", b".py"):
            if word in raw:
                raise SystemExit(f"error: {file} contains {word.decode()!r}")


# --------------------------------------------------------------------------------------------- evaluation

# name: (mantissa bits, smallest normal exponent, largest value, emax)
FORMATS = {
    "fp8_e4m3": (3, -6, 448.0, 8),
    "fp8_e5m2": (2, -14, 57344.0, 15),
    "fp6_e3m2": (2, -2, 28.0, 4),
    "fp6_e2m3": (3, 0, 7.5, 2),
    "fp4_e2m1": (1, 0, 6.0, 2),
}


def fake_quantize(x, mantissa, smallest, largest, emax, block=32):
    """OCP MX v1.0: blocks along the last axis, E8M0 scale by the floor rule, elements half to even."""
    import torch

    k = x.shape[-1]
    v = torch.nn.functional.pad(x, (0, -k % block)).unflatten(-1, (-1, block)).double()
    top = v.abs().amax(-1, keepdim=True)
    exponent = torch.where(top > 0, torch.frexp(top).exponent - 1 - emax, -127).clamp(-127, 127).double()
    scaled = v / torch.exp2(exponent)
    own = (torch.frexp(scaled.abs()).exponent - 1).clamp(min=smallest).double()
    step = torch.exp2(own - mantissa)
    rounded = (torch.round(scaled / step) * step).clamp(-largest, largest)
    return (rounded * torch.exp2(exponent)).flatten(-2)[..., :k].to(x.dtype)


def quantize_linears(model, row):
    """Both operands of every Linear but the head, as tier full does."""
    import torch

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.weight.data = fake_quantize(module.weight.data, *row)
            module.register_forward_pre_hook(lambda _, inputs: (fake_quantize(inputs[0], *row), *inputs[1:]))


def evaluate(args):
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    train_ids, held = numpy.load(args.work / "train.npy"), numpy.load(args.work / "held.npy")
    held = held[: args.tokens]
    print(f"unigram   ppl {math.exp(unigram_nll(train_ids, held)):9.4f}")
    base = held_out_nll(load(args.work).to(device), held, device, batch=8)
    print(f"fp32      ppl {math.exp(base):9.4f}", flush=True)
    for name, row in FORMATS.items():
        model = load(args.work).to(device)
        quantize_linears(model, row)
        nll = held_out_nll(model, held, device, batch=8)
        print(f"{name:9} ppl {math.exp(nll):9.4f}  xent {(nll / base - 1) * 100:+.3f} %", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    corpus = commands.add_parser("corpus", help="collect the text, train the tokenizer, tokenise")
    training = commands.add_parser("train", help="train the model")
    training.add_argument("--minutes", type=float, default=6.0, help="wall-clock time to fill, compilation included")
    training.add_argument("--steps", type=int, help="exact number of steps, in place of --minutes")
    training.add_argument("--batch", type=int, default=256, help="sequences of 512 tokens a step")
    training.add_argument("--learning-rate", type=float, default=4e-3)
    training.add_argument("--seed", type=int, default=1)
    training.add_argument("--report", type=int, default=1000, help="steps between reports")
    training.add_argument("--no-compile", action="store_true")
    training.add_argument("--out", type=Path, help="where the weights go (default: WORK)")
    exporting = commands.add_parser("export", help="write the fixture")
    evaluating = commands.add_parser("evaluate", help="perplexities of the held-out text")
    evaluating.add_argument("--tokens", type=int, default=100_000, help="how much of the held-out text")
    for command, function in (
        (corpus, make_corpus),
        (training, train),
        (exporting, export_fixture),
        (evaluating, evaluate),
    ):
        command.add_argument("work", type=Path)
        command.set_defaults(function=function)
    exporting.add_argument("fixtures", type=Path)
    args = parser.parse_args()
    args.function(args)


if __name__ == "__main__":
    sys.exit(main())
