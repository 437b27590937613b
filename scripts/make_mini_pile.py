#!/usr/bin/env python3
"""Build fixtures/mini_pile.parquet from the texts in fixtures/mini_pile/.

The table has the two columns of The Pile, `text` (string) and
`meta` (struct<pile_set_name: string>). The order of the documents takes one
document of every subset in turn, so that any prefix is a fair mixture. The same
texts and the same pyarrow give the same bytes.

    python scripts/make_mini_pile.py            # write the table
    python scripts/make_mini_pile.py --check    # compare it with the texts, write nothing

Exits with 1 and one line per fault if the texts break a rule below.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent / "fixtures"
SOURCES = ROOT / "mini_pile"
TABLE = ROOT / "mini_pile.parquet"

# Folder of the texts -> the name that The Pile gives the subset.
SUBSETS = {
    "pile-cc": "Pile-CC",
    "github": "Github",
    "wikipedia-en": "Wikipedia (en)",
    "stackexchange": "StackExchange",
    "dm-mathematics": "DM Mathematics",
    "pubmed-abstracts": "PubMed Abstracts",
    "arxiv": "ArXiv",
    "uspto-backgrounds": "USPTO Backgrounds",
    "freelaw": "FreeLaw",
    "ubuntu-irc": "Ubuntu IRC",
    "gutenberg-pg-19": "Gutenberg (PG-19)",
    "bookcorpus2": "BookCorpus2",
    "opensubtitles": "OpenSubtitles",
    "enron-emails": "Enron Emails",
    "hackernews": "HackerNews",
}

MIN_DOCUMENTS = 60
MIN_PER_SUBSET = 5
MIN_CHARS, MAX_CHARS = 800, 3000
MAX_BYTES = 300_000

SCHEMA = pa.schema(
    [
        pa.field("text", pa.string(), nullable=False),
        pa.field("meta", pa.struct([pa.field("pile_set_name", pa.string())]), nullable=False),
    ]
)


class Faults(Exception):
    """The texts break one or more rules; `args[0]` lists them."""


def read_text(path: Path) -> str:
    """Return the document: UTF-8, without the newline that ends the file."""
    # read_bytes, because read_text would silently turn \r\n into \n.
    return path.read_bytes().decode("utf-8").removesuffix("\n")


def read_sources() -> dict[str, list[str]]:
    """Return the documents of every subset in file order, or raise Faults."""
    faults: list[str] = []
    found: dict[str, list[str]] = {}
    seen: dict[str, Path] = {}
    for folder in sorted(p.name for p in SOURCES.iterdir() if p.is_dir()):
        if folder not in SUBSETS:
            faults.append(f"{folder}: not the folder of a known subset")
    for slug in SUBSETS:
        paths = sorted((SOURCES / slug).glob("*.txt"))
        found[slug] = []
        for path in paths:
            name = f"{slug}/{path.name}"
            try:
                text = read_text(path)
            except UnicodeDecodeError as error:
                faults.append(f"{name}: not UTF-8 at byte {error.start}")
                continue
            if not MIN_CHARS <= len(text) <= MAX_CHARS:
                faults.append(f"{name}: {len(text)} characters, not {MIN_CHARS} to {MAX_CHARS}")
            if "\r" in text or "\0" in text:
                faults.append(f"{name}: holds a carriage return or a NUL")
            if text != text.strip("\n"):
                faults.append(f"{name}: begins or ends with an empty line")
            if text in seen:
                faults.append(f"{name}: the same text as {seen[text]}")
            seen[text] = Path(name)
            found[slug].append(text)
        if len(paths) < MIN_PER_SUBSET:
            faults.append(f"{slug}: {len(paths)} documents, fewer than {MIN_PER_SUBSET}")
    if len(seen) < MIN_DOCUMENTS:
        faults.append(f"{len(seen)} documents in all, fewer than {MIN_DOCUMENTS}")
    size = sum(len(text.encode("utf-8")) for text in seen)
    if size > MAX_BYTES:
        faults.append(f"{size} bytes in all, more than {MAX_BYTES}")
    if faults:
        raise Faults(faults)
    return found


def interleave(found: dict[str, list[str]]) -> list[dict]:
    """Return the rows, one document of every subset per round."""
    rows = []
    for turn in range(max(len(texts) for texts in found.values())):
        for slug, texts in found.items():
            if turn < len(texts):
                rows.append({"text": texts[turn], "meta": {"pile_set_name": SUBSETS[slug]}})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare the table with the texts, write nothing")
    args = parser.parse_args()
    try:
        rows = interleave(read_sources())
    except Faults as error:
        print("\n".join(error.args[0]), file=sys.stderr)
        return 1
    if args.check:
        if not TABLE.is_file() or pq.read_table(TABLE).to_pylist() != rows:
            print(f"{TABLE.name} is not what the texts give; run {Path(__file__).name}", file=sys.stderr)
            return 1
    else:
        # Several row groups, so that readers meet more than one.
        table = pa.Table.from_pylist(rows, schema=SCHEMA)
        pq.write_table(table, TABLE, compression="zstd", row_group_size=32)
    lengths = [len(row["text"]) for row in rows]
    subsets = {row["meta"]["pile_set_name"] for row in rows}
    print(
        f"{TABLE.name}: {len(rows)} documents of {len(subsets)} subsets, "
        f"{min(lengths)} to {max(lengths)} characters, {sum(lengths)} in all, "
        f"{TABLE.stat().st_size} bytes"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
