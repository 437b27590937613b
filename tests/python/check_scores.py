"""What mxeval says about a variant against its baseline, computed again in float64 from dumped logits.

Runs both graphs in plain onnxruntime, one window at a time, and prints the figures of `statistics.all` as
JSON: mean, median, percentiles and maximum of KL(baseline || variant), agreement of the most probable
tokens, mean and root mean square of the change of p(correct), differences of xent and bits per byte.
"""

import argparse
import json

import numpy as np
import onnxruntime as ort


def session(path, library):
    options = ort.SessionOptions()
    options.register_custom_ops_library(library)
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def log_p(model, ids):
    row = np.array([ids], dtype=np.int64)
    feeds = {"input_ids": row, "attention_mask": np.ones_like(row)}
    wanted = {entry.name for entry in model.get_inputs()}
    logits = model.run(["logits"], {k: v for k, v in feeds.items() if k in wanted})[0][0]
    logits = logits.astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("baseline")
    parser.add_argument("variant")
    parser.add_argument("windows", help='JSON: [{"ids": [...], "first_scored": 1, "bytes": 10}, ...]')
    parser.add_argument("--library", required=True)
    args = parser.parse_args()
    baseline, variant = session(args.baseline, args.library), session(args.variant, args.library)
    kl, agree, delta_p, nll, other, bytes_ = [], [], [], [], [], 0
    for window in json.load(open(args.windows)):
        ids, first = window["ids"], window["first_scored"]
        labels = np.array(ids[first:])
        places = np.arange(first - 1, len(ids) - 1)
        p, q = log_p(baseline, ids)[places], log_p(variant, ids)[places]
        kl.append((np.exp(p) * (p - q)).sum(-1))
        agree.append(p.argmax(-1) == q.argmax(-1))
        rows = np.arange(len(labels))
        other.append(-p[rows, labels])
        nll.append(-q[rows, labels])
        delta_p.append(np.exp(q[rows, labels]) - np.exp(p[rows, labels]))
        bytes_ += window["bytes"]
    kl, agree, delta_p = map(np.concatenate, (kl, agree, delta_p))
    nll, other = np.concatenate(nll), np.concatenate(other)
    median, p90, p99, p999 = np.percentile(kl, [50, 90, 99, 99.9])
    print(json.dumps({
        "tokens": len(kl),
        "kl": {"mean": kl.mean(), "median": median, "p90": p90, "p99": p99, "p999": p999, "max": kl.max()},
        "agreement": agree.mean(),
        "delta_p_mean": delta_p.mean(),
        "delta_p_rms": np.sqrt((delta_p**2).mean()),
        "delta_xent": (nll - other).mean(),
        "delta_bits_per_byte": (nll - other).sum() / np.log(2) / bytes_,
        "xent": nll.mean(),
    }))


if __name__ == "__main__":
    main()
