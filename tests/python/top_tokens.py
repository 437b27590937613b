#!/usr/bin/env python3
"""What the examples in other languages have to print: the largest logits of the last position.

    top_tokens.py MODEL LIBRARY IDS     (IDS separated by commas)
"""

import sys

import numpy as np
import onnxruntime as ort

model, library, ids = sys.argv[1:]
options = ort.SessionOptions()
options.register_custom_ops_library(library)
session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
tokens = np.array([[int(token) for token in ids.split(",")]], np.int64)
logits = session.run(["logits"], {"input_ids": tokens, "attention_mask": np.ones_like(tokens)})[0][0, -1]
for token in np.argsort(-logits, kind="stable")[:5]:
    print(token, logits[token])
