"""`mxeval` from Python."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Union

from ._errors import EvaluationError, UsageError
from ._models import PathLike

Value = Union[str, int, float, bool, PathLike, Sequence[Union[str, PathLike]], None]


@dataclass(frozen=True)
class Evaluation:
    """What was measured."""

    records: list[dict[str, Any]]
    """One dict a stage or graph, the lines of results.jsonl: `stage`, `status` (`ok`, `skipped`, `failed`), `reason`,
    `xent` and `entropy` (nats a token), `ppl`, `bits_per_byte`, `tokens_per_second`, `statistics` (95 % intervals,
    divergence from the baseline), ..."""
    out: Path | None
    """The folder with report.html and the rest, if one was asked for."""
    _by_stage: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False)

    def __getitem__(self, stage: str) -> dict[str, Any]:
        """The record of a stage (`baseline`, `mx-fp8_e4m3`, ...) or of a graph's name."""
        return self._by_stage[stage]


def evaluate(
    *graphs: PathLike,
    sweep: PathLike | None = None,
    data: PathLike | Sequence[PathLike] | None = None,
    dataset: str | None = None,
    tokenizer: PathLike | None = None,
    out: PathLike | None = None,
    progress: bool = False,
    **options: Value,
) -> Evaluation:
    """Measures perplexity, entropy, divergence and speed on text, by the command `mxeval` in a process of its own: its
    memory is given back at the end, and the ONNX Runtime of this process is left alone.

    Args:
        graphs: .onnx files to measure as they are; the first is the baseline.
        sweep: a model to rewrite and measure in every stage, in place of graphs.
        data: .parquet or .jsonl[.zst] with a `text` column, or .txt; one, or several, or quoted globs.
        dataset: `pile`, `wikitext` or `OWNER/NAME` of the Hugging Face hub, in place of data.
        tokenizer: tokenizer.json (default: beside the model).
        out: folder for report.html, results.jsonl and scores (default: none is kept).
        progress: mxeval's progress on this process's stderr.
        options: every other option of `mxeval`, dashes as underscores: `tier="a"`, `mx_format=["fp4_e2m1"]`,
            `max_samples=100`, `seq_len=512`, `device="cuda:0"`, `skip_int8=True`, ... True gives a flag; a list gives
            the option once for each value.

    Raises:
        UsageError: options that `mxeval` does not take.
        EvaluationError: mxeval failed. Stages that failed by themselves are records with `status` `failed`.
        KeyboardInterrupt: Ctrl-C; mxeval gets it as well and writes what it has.
    """
    with tempfile.TemporaryDirectory(prefix="mxeval-") as scratch:
        folder = Path(scratch) / "out" if out is None else Path(out)
        given = {"sweep": sweep, "data": data, "dataset": dataset, "tokenizer": tokenizer, **options}
        arguments = [*_arguments(given), "--out", os.fspath(folder), "--json", "--", *(os.fspath(graph) for graph in graphs)]
        lines = _run(arguments, progress)
    records = [json.loads(line) for line in lines.splitlines() if line.strip()]
    by_stage = {record["stage"]: record for record in records}
    return Evaluation(records, None if out is None else folder, by_stage)


def _arguments(given: dict[str, Value]) -> list[str]:
    """Keyword arguments as options of the command."""
    arguments: list[str] = []
    for name, value in given.items():
        option = "--" + name.replace("_", "-")
        if value is None or value is False:
            continue
        if value is True:
            arguments.append(option)
        elif isinstance(value, (list, tuple)):
            arguments += [f"{option}={os.fspath(item)}" for item in value]
        elif isinstance(value, (int, float)):
            arguments.append(f"{option}={value}")
        else:
            arguments.append(f"{option}={os.fspath(value)}")  # type: ignore[arg-type]
    return arguments


def _run(arguments: list[str], progress: bool) -> str:
    command = [sys.executable, "-c", "from mxrewrite._commands import mxeval; mxeval()", *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=None if progress else subprocess.PIPE, text=True
    ) as process:
        try:
            stdout, told = process.communicate()
        except KeyboardInterrupt:
            # The terminal has told mxeval, too, which ends its batch and writes what it has.
            process.communicate()
            raise
    code, stderr = process.returncode, told or ""
    if code == 2:
        raise UsageError(_message(stderr) or "mxeval refused its options; its message is on stderr")
    # A stage that failed is a record like any other, and the exit code is 1 then.
    if code != 0 and not (code == 1 and stdout.strip()):
        message = _message(stderr) or f"mxeval ended with {code}; its message is on stderr"
        raise EvaluationError(message, code, stderr)
    return stdout


def _message(stderr: str) -> str:
    """mxeval's own error line."""
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    return errors[-1].removeprefix("error: ") if errors else ""
