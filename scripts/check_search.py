#!/usr/bin/env python3
"""Is a searched mixture of formats better than one format, and than chance?

Measures with mxeval, on documents that the search has not seen: the found recipe, uniform fp4_e2m1,
uniform fp6_e2m3 and random recipes of equal bits, each against the baseline, document by document. Passes
when the found recipe's difference of cross-entropy lies below the straight line between the two uniform
formats at the recipe's own bits, and below each random recipe, every paired 95 % interval (bootstrap over
documents) excluding zero.

    scripts/check_search.py MODEL.onnx --data FILE.parquet [--bits 5.0] [--device cuda] [--out DIR]
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
COARSE, FINE = "fp4_e2m1", "fp6_e2m3"


def run(command):
    print("+", " ".join(map(str, command)), file=sys.stderr)
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE)
    if done.returncode:
        sys.exit(f"error: {command[0]} ended with {done.returncode}")


def option(site, name):
    return site["formats"][name]


def random_assignment(sites, formats, budget, rng):
    """Formats drawn layer by layer, then moved one step at a time towards `budget` bytes.

    Layers and formats are drawn without looking at what they cost; a step that goes beyond the budget
    is not taken, so the result has the budget's bytes to within the smallest layer.
    """
    formats = sorted(formats, key=lambda name: option(sites[0], name)["bits_per_weight"])
    chosen = rng.integers(len(formats), size=len(sites))
    size = lambda index, place: option(sites[index], formats[place])["bytes"]
    total = sum(size(index, place) for index, place in enumerate(chosen))
    # Down at random until it fits, then up at random where it still fits.
    while total > budget:
        index = rng.choice(np.flatnonzero(chosen > 0))
        total += size(index, chosen[index] - 1) - size(index, chosen[index])
        chosen[index] -= 1
    while True:
        fits = [
            index
            for index, place in enumerate(chosen)
            if place + 1 < len(formats)
            and total + size(index, place + 1) - size(index, place) <= budget
        ]
        if not fits:
            break
        index = rng.choice(fits)
        total += size(index, chosen[index] + 1) - size(index, chosen[index])
        chosen[index] += 1
    return [formats[place] for place in chosen], total


def recipe_text(sensitivity, assignment, name):
    """A recipe that gives each layer its format, a rule a format."""
    lines = [f'name = "{name}"', 'lowering = "mx"']
    for format in sensitivity["formats"]:
        own = [s for s, f in zip(sensitivity["sites"], assignment) if f == format]
        if not own:
            continue
        patterns = ", ".join("'^" + escape(s["module_path"] or s["node"]) + "$'" for s in own)
        lines += [
            "",
            "[[rules]]",
            f"include = [{patterns}]",
            f'weight_format = "{format}"',
            f'activation_format = "{option(own[0], format)["activation_format"]}"',
            f"block_size = {sensitivity['block_size']}",
            f'rounding = "{sensitivity["rounding"]}"',
            f'scale_rule = "{sensitivity["scale_rule"]}"',
        ]
    return "\n".join(lines) + "\n"


def escape(text):
    return "".join("\\" + c if c in r".^$*+?()[]{}|\\" else c for c in text)


def interval(losses, tokens, rng, resamples=10_000):
    """Ratio of sums over documents with its bootstrap interval."""
    losses, tokens = np.asarray(losses), np.asarray(tokens, dtype=float)
    value = losses.sum() / tokens.sum()
    ratios = []
    for start in range(0, resamples, 500):
        picked = rng.integers(len(losses), size=(min(500, resamples - start), len(losses)))
        ratios.append(losses[picked].sum(1) / tokens[picked].sum(1))
    low, high = np.percentile(np.concatenate(ratios), [2.5, 97.5])
    return value, low, high


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--tokenizer")
    parser.add_argument("--bits", type=float, default=5.0)
    parser.add_argument("--tier", default="b")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--samples", default="20")
    parser.add_argument("--heldout-samples", default="200")
    parser.add_argument("--seq-len", default="512")
    parser.add_argument("--batch-size", default="8")
    parser.add_argument("--random", type=int, default=10, help="random recipes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mxeval", default=ROOT / "target/release/mxeval")
    parser.add_argument("--sensitivity", help="a sensitivity.json that is there already")
    parser.add_argument("--out", default="check_search_out")
    return parser.parse_args()


def main():
    args = arguments()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    text = ["--data", args.data, "--seq-len", args.seq_len, "--batch-size", args.batch_size]
    text += ["--device", args.device, "--out", out]
    if args.tokenizer:
        text += ["--tokenizer", args.tokenizer]
    measured = Path(args.sensitivity) if args.sensitivity else out / "sensitivity.json"
    if not args.sensitivity:
        more = ["--samples", args.samples, "--tier", args.tier, "--resume"]
        run([args.mxeval, "sensitivity", args.model, *text, *more])
    sensitivity = json.loads(measured.read_text())
    search = ["search", args.model, "--sensitivity", measured, "--budget-bits", args.bits, *text]
    search += ["--heldout-samples", args.heldout_samples]

    # Once for the recipe's own bytes, which the random ones get as well; the figures come later.
    run([args.mxeval, *search[:-1], "2", "--no-uniform"])
    found = json.loads((out / "search.json").read_text())["found"]
    rng = np.random.default_rng(args.seed)
    also = []
    for number in range(args.random):
        assignment, total = random_assignment(
            sensitivity["sites"], sensitivity["formats"], found["bytes"], rng
        )
        path = out / f"random-{number}.toml"
        path.write_text(recipe_text(sensitivity, assignment, path.stem))
        also += ["--also", path]
        print(f"{path.stem}: {total} bytes, the recipe {found['bytes']}", file=sys.stderr)
    run([args.mxeval, *search, *also])
    sys.exit(0 if verdict(json.loads((out / "search.json").read_text()), sensitivity, rng) else 1)


def verdict(result, sensitivity, rng):
    base, measured = result["baseline"], result["measured"]
    tokens = base["tokens"]
    delta = lambda one: np.array(one["documents"]["nll"]) - np.array(base["nll"])
    found = measured[0]
    uniform = {one["name"]: one for one in measured}
    coarse, fine = uniform[f"uniform {COARSE}"], uniform[f"uniform {FINE}"]
    part = (found["bits_per_weight"] - coarse["bits_per_weight"]) / (
        fine["bits_per_weight"] - coarse["bits_per_weight"]
    )
    line = (1 - part) * delta(coarse) + part * delta(fine)
    print(f"{len(tokens)} held-out documents, {sum(tokens)} tokens, baseline xent {result['baseline_xent']:.5f}")
    print(f"{'recipe':22} {'bits/w':>7} {'dxent':>9} {'95 %':>21}   found - this, paired 95 %")
    rows = [(one["name"], one["bits_per_weight"], delta(one)) for one in measured]
    rows.append((f"line {COARSE}-{FINE}", found["bits_per_weight"], line))
    passed = True
    for name, bits, own in rows:
        value, low, high = interval(own, tokens, rng)
        cells = f"{name:22} {bits:7.4f} {value:+9.5f} [{low:+9.5f},{high:+9.5f}]"
        held = name.startswith(("random", "line"))
        if name != found["name"]:
            value, low, high = interval(delta(found) - own, tokens, rng)
            cells += f"   {value:+.5f} [{low:+.5f},{high:+.5f}]"
            if held:
                passed &= high < 0
                cells += "  below" if high < 0 else "  NOT BELOW"
        print(cells)
    cost = sensitivity["cost"]
    share, of_200 = cost["evaluations_per_choice"], cost["evaluations_of_200_documents"]
    cheap = share <= 0.6 and of_200 < 40
    print(
        f"sensitivity: {cost['choices']} layers x formats, {share:.3f} evaluations each (bar 0.6), "
        f"{of_200:.1f} evaluations of 200 documents (bar 40); by the clock "
        f"{cost['seconds'] / cost['evaluation_seconds']:.1f} evaluations, "
        f"{cost['prepare_seconds'] + cost['load_seconds']:.1f} s to prepare and load"
    )
    print("PASS" if passed and cheap else "FAIL")
    return passed and cheap


if __name__ == "__main__":
    main()
