#!/usr/bin/env python3
"""Cuts the golden MX vectors down to the subset that lives in fixtures/golden (at most 1.5 MB).

    python3 scripts/golden_subset.py mx_golden.safetensors fixtures/golden/mx_golden_subset.safetensors

Quantisation is row by row, so a vector is cut by taking every n-th row, the same rows of its input. All
formats, roundings and block sizes stay for the small cases; `ties` (every mid-point) stays whole at block
32, and the large random cases stay at block 32.
"""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import numpy as np

from mx_emulation import read_safetensors

#: case -> (rows kept: every n-th, block sizes kept)
KEEP = {
    "short": (1, (16, 32, 64)), "tail17": (1, (16, 32, 64)), "zeros": (1, (16, 32, 64)), "tiny": (2, (16, 32, 64)),
    "small": (2, (16, 32, 64)), "huge": (2, (16, 32, 64)), "pow2": (4, (16, 32, 64)), "ties": (1, (32,)),
    "normal": (4, (32,)), "heavy": (4, (32,)), "outlier": (4, (32,)),
}


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    header, blobs, at = {}, [], 0
    for name, t in sorted(tensors.items()):
        data = np.ascontiguousarray(t, "<f4").tobytes()
        header[name] = {"dtype": "F32", "shape": list(t.shape), "data_offsets": [at, at + len(data)]}
        blobs.append(data)
        at += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blobs))


def main() -> int:
    if len(sys.argv) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    out = {}
    for name, t in read_safetensors(Path(sys.argv[1])).items():
        case = name.rsplit(".", 1)[1]
        step, blocks = KEEP[case]
        if name.startswith("input.") or int(name.split(".")[2][1:]) in blocks:
            out[name] = t[::step]
    path = Path(sys.argv[2])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(path, out)
    print(f"{path}: {sum(not n.startswith('input.') for n in out)} vectors, {path.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
