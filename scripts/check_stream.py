#!/usr/bin/env python3
"""How soon and in how little memory mxeval begins on a large file: `--max-samples 100` of 1,000,000
documents, on tinylm. Fails where the first batch takes 2 s or more from the start of the process
(loading ONNX Runtime and the tokenizer included, loading the session apart), or where the
process ever holds 300 MB or more.

  scripts/check_stream.py                     makes the files in out/stream and measures them all
  scripts/check_stream.py --data big.parquet  measures a file of yours
"""

import argparse
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TINYLM = ROOT / "fixtures/tinylm"
FILES = {"one_group.parquet": [], "groups_of_10000.parquet": ["--row-group", "10000"], "lines.jsonl.zst": []}


def status(pid, field):
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(rf"^{field}:\s*(\d+) kB", text, re.M)
    return int(found[1]) * 1024 if found else 0


def watch(process, peak):
    while process.poll() is None:
        peak[0] = max(peak[0], status(process.pid, "VmHWM"))
        time.sleep(0.01)


def measure(args, data, options):
    """Seconds to the first batch as mxeval and as we count them, resident memory then and at most."""
    with tempfile.TemporaryDirectory() as out:
        command = [args.mxeval, TINYLM / "dynamo/model.onnx", "--tokenizer", TINYLM / "tokenizer.json", "--data", data]
        command += ["--max-samples", str(args.max_samples), "--device", "cpu", "--out", out, *options]
        start = time.monotonic()
        process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        peak = [0]
        watcher = threading.Thread(target=watch, args=(process, peak))
        watcher.start()
        said, ready, resident, errors = None, None, 0, []
        for line in process.stderr:
            errors.append(line)
            if found := re.match(r"first batch ready after ([\d.]+) s", line):
                said, ready, resident = float(found[1]), time.monotonic() - start, status(process.pid, "VmRSS")
        process.wait()
        watcher.join()
        if process.returncode or ready is None:
            raise SystemExit(f"error: {command} ended with {process.returncode}\n{''.join(errors)}")
    return said, ready, resident, peak[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, action="append")
    parser.add_argument("--folder", type=Path, default=Path("out/stream"))
    parser.add_argument("--max-samples", type=int, default=100)
    parser.add_argument("--mxeval", default="target/release/mxeval")
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--megabytes", type=float, default=300)
    args = parser.parse_args()
    files = args.data or [args.folder / name for name in FILES]
    for path in files:
        if not args.data and not path.exists():
            subprocess.run([sys.executable, ROOT / "scripts/make_big_parquet.py", path, *FILES[path.name]], check=True)
    failed = False
    for path in files:
        lines = ".jsonl" in path.suffixes
        # A sample of JSON Lines has to read all of it; the bar is for parquet.
        for options in [[]] if lines else [[], ["--shuffle", "--seed", "1"]]:
            said, ready, resident, peak = measure(args, path, options)
            good = ready < args.seconds and peak < args.megabytes * 1e6
            failed |= not good
            print(
                f"{'ok' if good else 'FAILED'}: {path.name} {' '.join(options)}: first batch after {ready:.2f} s "
                f"(mxeval says {said:.2f}), {resident / 1e6:.0f} MB resident then, {peak / 1e6:.0f} MB at most",
                flush=True,
            )
    if failed:
        raise SystemExit(f"failed: the bars are {args.seconds} s and {args.megabytes} MB")


if __name__ == "__main__":
    main()
