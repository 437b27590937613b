"""Checks scripts/ray_sweep.py: two local Ray workers, one killed (kill -9) in the middle of a task.

    python scripts/check_ray.py --mxeval target/debug/mxeval

The merged figures and windows must be those of a single process, to the last bit. Needs Ray and, as
mxeval, ONNX Runtime (ORT_DYLIB_PATH).
"""

import argparse
import glob
import json
import os
import signal
import subprocess
import sys
import tempfile
import time

CLOCKS = ["seconds", "tokens_per_second", "load_seconds", "peak_memory_bytes",
          "peak_resident_bytes", "peak_device_bytes", "speed_ratio"]
RUN = ["--sweep", "fixtures/tinylm/dynamo/model.onnx", "--tokenizer",
       "fixtures/tinylm/tokenizer.json", "--data", "fixtures/mini_pile.parquet", "--device", "cpu",
       "--stages", "baseline,mx-fp4_e2m1,int8,nvfp8", "--threads", "1", "--batch-size", "1",
       "--seq-len", "128", "--max-samples"]


def figures(out):
    with open(os.path.join(out, "results.jsonl"), encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    return [{k: v for k, v in record.items() if k not in CLOCKS} for record in records]


def windows(out):
    found = {}
    for path in glob.glob(os.path.join(out, "scores", "*.jsonl")):
        with open(path, encoding="utf-8") as file:
            lines = [json.loads(line) for line in file]
        for line in lines:
            if "batch" in line:
                for window in line["windows"]:
                    found[os.path.basename(path), window["window"]] = window
    return found


def parent(pid):
    with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
        return int(file.read().rsplit(")", 1)[1].split()[1])


def victim(out):
    """The Ray worker of the first mxeval run-task that has written two batches of this `out`."""
    for path in glob.glob("/proc/[0-9]*/cmdline"):
        try:
            with open(path, "rb") as file:
                command = file.read().decode(errors="replace").split("\0")
            if "run-task" not in command or not any(out in part for part in command):
                continue
            task = command[command.index("run-task") + 2]
            with open(os.path.join(out, "tasks", task + ".jsonl"), "rb") as file:
                text = file.read()
            if text.count(b"\n") < 3 or b'{"end"' in text:
                continue
            return task, parent(int(path.split("/")[2]))
        except (OSError, ValueError, IndexError):
            continue
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mxeval", required=True)
    parser.add_argument("--max-samples", default="200")
    args = parser.parse_args()
    mxeval = os.path.abspath(args.mxeval)
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    os.chdir(root)
    run = [*RUN, args.max_samples]
    with tempfile.TemporaryDirectory() as folder:
        single, shared = os.path.join(folder, "single"), os.path.join(folder, "shared")
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run([mxeval, *run, "--out", single], check=True, **quiet)
        plan = [mxeval, "plan", *run, "--out", shared, "--shards", "3"]
        subprocess.run(plan, check=True, **quiet)
        sweep = subprocess.Popen(
            [sys.executable, "scripts/ray_sweep.py", os.path.join(shared, "plan.json"), "--mxeval",
             mxeval, "--local-cpus", "2"])
        killed = None
        while sweep.poll() is None:
            if killed is None and (killed := victim(shared)):
                os.kill(killed[1], signal.SIGKILL)
                print(f"killed worker process {killed[1]} in the middle of {killed[0]}", flush=True)
            time.sleep(0.005)
        if sweep.returncode != 0 or killed is None:
            sys.exit(f"error: ray_sweep.py ended with {sweep.returncode}; killed: {killed}")
        one, other = figures(single), figures(shared)
        if not one or one != other:
            sys.exit(f"error: the records differ\n{one}\n{other}")
        print(f"{len(one)} records equal: " + ", ".join(f"{r['stage']} {r['xent']}" for r in one))
        one, other = windows(single), windows(shared)
        if not one or one != other:
            sys.exit("error: the windows' sums differ")
        print(f"{len(one)} windows' sums equal to the last bit")


if __name__ == "__main__":
    main()
