#!/usr/bin/env python3
"""Writes a large file of small documents: what scripts/check_stream.py reads the beginning of.

  scripts/make_big_parquet.py out/big.parquet                       one row group of 1,000,000 documents
  scripts/make_big_parquet.py out/many.parquet --row-group 10000    a hundred row groups
  scripts/make_big_parquet.py out/big.jsonl.zst                     JSON Lines (needs pyarrow's zstd only)
"""

import argparse
import json
import os
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

SUBSETS = ["Github", "PhilPapers", "StackExchange", "Wikipedia (en)"]
WORDS = "the of and to in a is that for it as was with be by on not he his but at are this have from or had an they which".split()
CHUNK = 10_000


def documents(count, words, seed):
    """Batches of (texts, subsets); every text is another one."""
    rng = random.Random(seed)
    for first in range(0, count, CHUNK):
        numbers = range(first, min(first + CHUNK, count))
        yield [f"{n}: " + " ".join(rng.choices(WORDS, k=words)) for n in numbers], [SUBSETS[n % len(SUBSETS)] for n in numbers]


def write_parquet(path, args):
    meta = pa.struct([("pile_set_name", pa.string())])
    schema = pa.schema([("text", pa.string()), ("meta", meta)])
    # write_table cuts row groups to the size asked for; one group needs the table as a whole.
    batches = [
        pa.record_batch([pa.array(texts), pa.array([{"pile_set_name": s} for s in subsets], meta)], schema=schema)
        for texts, subsets in documents(args.count, args.words, args.seed)
    ]
    pq.write_table(pa.Table.from_batches(batches, schema), path, row_group_size=args.row_group or args.count, compression=args.compression)


def write_lines(path, args):
    compressed = ".zst" in path.suffixes
    with pa.OSFile(str(path), "wb") as file, (pa.CompressedOutputStream(file, "zstd") if compressed else file) as out:
        for texts, subsets in documents(args.count, args.words, args.seed):
            lines = (json.dumps({"text": t, "meta": {"pile_set_name": s}}) + "\n" for t, s in zip(texts, subsets))
            out.write("".join(lines).encode())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help=".parquet, .jsonl or .jsonl.zst")
    parser.add_argument("--count", type=int, default=1_000_000, help="documents")
    parser.add_argument("--words", type=int, default=30, help="words of a document")
    parser.add_argument("--row-group", type=int, help="documents of a row group [default: all]")
    parser.add_argument("--compression", default="snappy")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    temporary = args.out.with_name(args.out.name + ".part")
    try:
        (write_parquet if args.out.suffix == ".parquet" else write_lines)(temporary, args)
        os.replace(temporary, args.out)
    finally:
        temporary.unlink(missing_ok=True)
    print(f"{args.out}: {args.count} documents, {args.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
