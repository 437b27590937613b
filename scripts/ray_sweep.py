"""Runs the tasks of a plan (mxeval plan) on a Ray cluster, then merges them.

    python scripts/ray_sweep.py out/plan.json --address auto --gpus 1

The plan, its models and text, and the output folder lie on a folder that every machine sees. Tasks
that are done are not run again, so the same command goes on after any interruption. Progress goes to
stderr, the merged table to stdout.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time

try:
    import ray
except ImportError:
    sys.exit("error: Ray is not installed here: pip install ray (in an environment of your own)")


def say(text):
    print(text, file=sys.stderr, flush=True)


def is_done(plan, out, task):
    """Whether the task's file ends with a record of this plan that is no failure."""
    path = os.path.join(out, "tasks", task + ".jsonl")
    try:
        with open(path, "rb") as file:
            last = file.read().rsplit(b"\n", 2)
        if len(last) < 2 or last[-1]:
            return False
        end = json.loads(last[-2])["end"]
        return end.get("plan") == plan["id"] and end["record"]["status"] != "failed"
    except (OSError, ValueError, KeyError, TypeError):
        return False


def run_task(mxeval, plan_path, task, more):
    """In a worker: does one task. A worker that dies takes mxeval with it, so no second one waits."""
    import ctypes
    import signal

    def die_with_parent():
        # PR_SET_PDEATHSIG: else mxeval would hold the task's lock after its worker is gone.
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)

    command = [mxeval, "run-task", plan_path, task, *more]
    before = die_with_parent if sys.platform == "linux" else None
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=before)
    return done.returncode, os.getpid(), done.stderr[-4000:]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("plan", help="what mxeval plan wrote")
    parser.add_argument("--address", help="of the cluster, as in ray.init; else Ray on this machine")
    parser.add_argument("--mxeval", default="mxeval", help="the command, the same on every machine")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs of one task [0]")
    parser.add_argument("--cpus", type=float, default=1, help="CPUs of one task [1]")
    parser.add_argument("--retries", type=int, default=3, help="when a worker dies or a task fails [3]")
    parser.add_argument("--local-cpus", type=int, help="CPUs of a Ray on this machine")
    parser.add_argument("--out", help="another output folder than the plan's")
    return parser.parse_args()


def sweep(args, plan, out, todo, more):
    """Runs the tasks in `todo`; returns those that failed for good."""
    # Ray itself starts a task anew whose worker died; a task that ended badly is tried again here.
    remote = ray.remote(run_task).options(
        num_cpus=args.cpus, num_gpus=args.gpus, max_retries=args.retries
    )
    start = lambda task: remote.remote(args.mxeval, os.path.abspath(args.plan), task, more)
    running = {start(task): task for task in todo}
    tries, failed, began = dict.fromkeys(todo, 0), {}, time.monotonic()
    while running:
        ready, _ = ray.wait(list(running), num_returns=1)
        task = running.pop(ready[0])
        try:
            code, _, stderr = ray.get(ready[0])
        except ray.exceptions.RayError as error:
            code, stderr = -1, str(error)
        if code == 0 and is_done(plan, out, task):
            left = f"{len(running)} left, {time.monotonic() - began:.0f} s"
            say(f"{task}: done ({left})")
            continue
        if code == 0:
            say(f"error: {task} ended well on its worker, but its file is not seen here: {out} has to "
                "be a folder that all machines share")
            failed[task] = "not seen"
            continue
        tries[task] += 1
        # 2 is a usage error: the same everywhere.
        if code != 2 and tries[task] <= args.retries:
            say(f"{task}: exit code {code}, again ({tries[task]} of {args.retries})")
            running[start(task)] = task
            continue
        say(f"error: {task}: exit code {code}\n{stderr}")
        failed[task] = stderr
    return failed


def main():
    args = arguments()
    with open(args.plan, encoding="utf-8") as file:
        plan = json.load(file)
    found = shutil.which(args.mxeval)
    if not found:
        sys.exit(f"error: no {args.mxeval}: pass --mxeval PATH, the same on every machine")
    args.mxeval = os.path.abspath(found)
    out = os.path.abspath(args.out) if args.out else os.path.join(plan["folder"], plan["out"])
    more = ["--out", out] if args.out else []
    ids = [task["id"] for task in plan["tasks"]]
    todo = [task for task in ids if not is_done(plan, out, task)]
    say(f"{len(ids)} tasks, {len(ids) - len(todo)} done already")
    failed = {}
    if todo:
        local = {} if args.address else {"num_cpus": args.local_cpus, "include_dashboard": False}
        ray.init(address=args.address, log_to_driver=False, **local)
        try:
            failed = sweep(args, plan, out, todo, more)
        finally:
            ray.shutdown()
    unseen = [task for task, why in failed.items() if why == "not seen"]
    if unseen:
        sys.exit(1)
    # A failed stage is a record with its reason; what did not end at all is named by merge.
    merged = subprocess.run([args.mxeval, "merge", os.path.abspath(args.plan), *more])
    sys.exit(merged.returncode)


if __name__ == "__main__":
    main()
