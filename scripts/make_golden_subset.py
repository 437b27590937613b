#!/usr/bin/env python3
"""Writes fixtures/golden/mx_golden_subset.safetensors from the full golden vectors.

Usage: make_golden_subset.py FULL.safetensors [OUT.safetensors]

The full file (about 500 float32 tensors that microsoft/microxcaling computed) is too large to keep.
The subset holds every case for every format, rounding and block size, but only the first rows of
each; the `ties` (each mid-point between codes and its two float neighbours) are whole for block 32.
Needs numpy and safetensors.
"""

import sys
from pathlib import Path

from safetensors.numpy import load_file, save_file

ROWS = 4
OUT = Path(__file__).resolve().parent.parent / "fixtures/golden/mx_golden_subset.safetensors"


def rows_to_keep(key: str) -> int | None:
    """Rows of a tensor that the subset keeps; None for all."""
    case = key.rsplit(".", 1)[-1]
    whole = case == "ties" and (key.startswith("input.") or ".b32." in key)
    return None if whole else ROWS


def main() -> None:
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    out = Path(sys.argv[2]) if len(sys.argv) == 3 else OUT
    full = load_file(sys.argv[1])
    subset = {key: full[key][: rows_to_keep(key)].copy() for key in sorted(full)}
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(subset, out)
    print(f"{out}: {len(subset)} tensors, {out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
