"""Fenced blocks of the documentation run as they are printed.

Every block needs a language. `python` and `sh` run in a fresh folder that looks like a checkout in which a model was
put: `model.onnx`, `tokenizer.json`, `documents.parquet` (tinylm and DOCUMENTS short documents), `checkpoint/` (its weights
as safetensors), `target/release`, `scripts`, `examples`, `fixtures` (this checkout's). `mxrewrite`, `mxeval` and `python3`
are on the PATH, the package `mxrewrite` can be imported. `toml` is parsed, and planned when it is a recipe; `json` is parsed;
`text` is output or a usage line. Comments right above a block say what is different:

    <!-- snippet: skip (REASON) -->            is not run; REASON is one of REASONS
    <!-- snippet: continues -->                in the folder, and with the Python variables, of the block before
    <!-- snippet: alternatives -->             each command in a folder of its own, as it was before the block
    <!-- snippet: file NAME -->                the block is the file NAME of its folder (and is not run)
    <!-- snippet: before COMMAND -->           what a reader has done before
    <!-- snippet: env NAME=VALUE -->           in the environment
    <!-- snippet: with 'A' = 'B' -->           A stands for B
    <!-- snippet: exit N -->                   the last command ends with N
    <!-- snippet: output -->                   `text`: the standard output of the block before
    <!-- snippet: usage -->                    `text`: a usage line, whose options exist
    <!-- snippet: from PATH -->                any language: lines of a file of this repository that another test runs; a
                                               line `// ...` leaves some out
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

from docs_markdown import ROOT, Block, Page

REASONS = (
    "needs a GPU",
    "needs a network",
    "needs a cluster",
    "needs PyTorch",
    "needs Olive",
    "needs ONNX Runtime GenAI",
    "needs other files",
    "installs software",
    "builds from source",
    "takes minutes",
)
RUN = {"python", "sh"}
OTHERS = {"toml", "json", "text", "bash", "yaml", "c", "c++", "cmake", "rust"}
KINDS = {"skip", "continues", "alternatives", "file", "before", "env", "with", "exit", "output", "usage", "from"}
SECONDS = 120
DOCUMENTS, LETTERS = 40, 120


@dataclass
class Outcome:
    """What became of a page's blocks."""

    wrong: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    ran: dict[str, int] = field(default_factory=dict)
    slow: list[tuple[float, str]] = field(default_factory=list)


def commands(text: str) -> list[str]:
    """The lines of shell, those that end with a backslash joined with the next."""
    joined = re.sub(r"\\\n\s*", " ", text)
    return [line for line in (_bare(line) for line in joined.splitlines()) if line]


def _bare(line: str) -> str:
    """A line without its comment."""
    quote = ""
    for place, letter in enumerate(line):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter == "#" and (place == 0 or line[place - 1].isspace()):
            return line[:place].strip()
    return line.strip()


def check_markers(block: Block) -> str | None:
    """What is wrong with how a block is marked."""
    if block.language not in RUN | OTHERS:
        return f"language {block.language or 'missing'}: use one of {', '.join(sorted(RUN | OTHERS))}"
    if unknown := [text for text in block.markers if text.split()[0] not in KINDS]:
        return f"unknown marker {unknown[0]!r}"
    for reason in block.values("skip"):
        if reason.strip("()") not in REASONS:
            return f"skipped {reason}, which is none of: {', '.join(REASONS)}"
    ways = block.has("skip") or block.has("from") or block.has("file")
    if block.language not in RUN | {"toml", "json", "text"} and not ways:
        return "this language is not run here: mark it `from PATH` or `skip (REASON)`"
    return None


class Folders:
    """Folders that blocks run in."""

    def __init__(self, prepared: Path, scratch: Path) -> None:
        self._prepared, self._scratch, self._count = prepared, scratch, 0

    def new(self, like: Path | None = None) -> Path:
        """A copy of the prepared folder, or of another one. Files are linked: nothing changes a file in place."""
        self._count += 1
        folder = self._scratch / str(self._count)
        shutil.copytree(like or self._prepared, folder, symlinks=True, copy_function=os.link)
        return folder


class Runner:
    """Runs the blocks of one page, in order."""

    def __init__(self, page: Page, folders: Folders) -> None:
        self.page, self.folders, self.outcome = page, folders, Outcome()
        self._folder: Path | None = None
        self._names: dict[str, object] = {}
        self._printed = ""

    def run(self) -> Outcome:
        for block in self.page.blocks:
            began = time.perf_counter()
            try:
                reason = check_markers(block) or self._block(block)
            except Exception:
                reason = traceback.format_exc()
            if reason:
                self.outcome.wrong.append(f"{block}: {reason}")
            self.outcome.slow.append((time.perf_counter() - began, str(block)))
        return self.outcome

    def _count(self, what: str) -> None:
        self.outcome.ran[what] = self.outcome.ran.get(what, 0) + 1

    def _block(self, block: Block) -> str | None:
        if reasons := block.values("skip"):
            self.outcome.skipped.append(f"{block}: {reasons[0].strip('()')}")
            return _syntax(block)
        if paths := block.values("from"):
            self._count("from a file")
            return _part_of(block, ROOT / paths[0])
        if block.language == "text":
            if not block.has("output"):
                return None
            self._count("output")
            same = block.text.split() == self._printed.split()
            return None if same else f"the block before prints\n{self._printed}"
        if not block.has("continues") or self._folder is None:
            self._folder, self._names = self.folders.new(), {"__name__": "__main__"}
        text = _substituted(block)
        for name in block.values("file"):
            path = self._folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            path.write_text(text)
        environment = os.environ | dict(value.split("=", 1) for value in block.values("env"))
        for command in block.values("before"):
            if reason := self._shell(command, environment, 0):
                return f"before: {reason}"
        self._count(block.language)
        if block.language == "toml":
            return self._toml(text)
        if block.language == "json":
            json.loads(text)
            return None
        if block.has("file"):
            return None
        return self._python(block, text) if block.language == "python" else self._commands(block, text, environment)

    def _toml(self, text: str) -> str | None:
        import tomllib

        parsed = tomllib.loads(text)
        if "rules" not in parsed:
            return None
        (self._folder / "recipe.toml").write_text(text)
        return self._shell("mxrewrite model.onnx --recipe recipe.toml --plan --no-sqnr", dict(os.environ), 0)

    def _commands(self, block: Block, text: str, environment: dict[str, str]) -> str | None:
        lines = commands(text)
        expected = int(block.values("exit")[0]) if block.has("exit") else 0
        if not block.has("alternatives"):
            script = "\n".join(["set -euo pipefail", *lines])
            return self._shell(script, environment, expected)
        begun = self._folder
        for line in lines:
            self._folder = self.folders.new(begun)
            if reason := self._shell(f"set -euo pipefail\n{line}", environment, expected):
                return f"{line}: {reason}"
        return None

    def _shell(self, script: str, environment: dict[str, str], expected: int) -> str | None:
        try:
            done = subprocess.run(
                ["bash", "-c", script], cwd=self._folder, env=environment, capture_output=True, text=True,
                stdin=subprocess.DEVNULL, timeout=SECONDS,
            )
        except subprocess.TimeoutExpired:
            return f"takes more than {SECONDS} s"
        self._printed = done.stdout
        if done.returncode == expected:
            return None
        return f"exit code {done.returncode}, expected {expected}\n{script}\n{done.stdout[-1000:]}{done.stderr[-2000:]}"

    def _python(self, block: Block, text: str) -> str | None:
        printed = io.StringIO()
        os.chdir(self._folder)
        saved = dict(os.environ)
        os.environ.update(value.split("=", 1) for value in block.values("env"))
        try:
            code = compile(text, f"{block.page}:{block.line}", "exec")
            with contextlib.redirect_stdout(printed):
                exec(code, self._names)
        except Exception:
            return traceback.format_exc(limit=-3)
        finally:
            os.environ.clear()
            os.environ.update(saved)
            self._printed = printed.getvalue()
        return None


def _syntax(block: Block) -> str | None:
    """What is wrong with a block that is not run."""
    if block.language == "python":
        compile(block.text, str(block), "exec")
    if block.language in ("sh", "bash"):
        done = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True)
        return done.stderr or None
    return None


def _substituted(block: Block) -> str:
    text = block.text
    for value in block.values("with"):
        old, new = re.fullmatch(r"'(.*)' = '(.*)'", value).groups()
        if old not in text:
            raise ValueError(f"marker `with`: {old!r} is not in the block")
        text = text.replace(old, new)
    return text


def _part_of(block: Block, path: Path) -> str | None:
    """Whether the block's lines follow each other in a file, however deep they are indented there."""
    whole = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    at = 0
    for part in re.split(r"^\s*(?://|#) \.\.\.$", block.text, flags=re.MULTILINE):
        lines = [line.strip() for line in part.splitlines() if line.strip()]
        starts = (start for start in range(at, len(whole)) if whole[start : start + len(lines)] == lines)
        start = next(starts, None)
        if start is None:
            return f"not in {path.relative_to(ROOT)}, line after line: {lines[0]}"
        at = start + len(lines)
    return None


def prepare(folder: Path) -> None:
    """The folder that blocks begin with."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    tinylm = ROOT / "fixtures/tinylm"
    for source in (tinylm / "dynamo/model.onnx", tinylm / "dynamo/model.onnx.data", tinylm / "tokenizer.json"):
        shutil.copy(source, folder / source.name)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    rows = pq.read_table(ROOT / "fixtures/mini_pile.parquet").to_pylist()
    short = sorted(rows, key=lambda row: len(row["text"]))[:DOCUMENTS]
    for row in short:
        row["text"] = row["text"][:LETTERS]
    pq.write_table(pa.Table.from_pylist(short), folder / "documents.parquet")
    _checkpoint(folder)
    (folder / "target").mkdir()
    (folder / "target/release").symlink_to(Path(os.environ["MX_BINARIES"]))
    for name in ("scripts", "examples", "fixtures", "custom_ops"):
        (folder / name).symlink_to(ROOT / name)


def _checkpoint(folder: Path) -> None:
    """The model's Linears as a checkpoint has them: [n, k], by their module paths."""
    import numpy as np
    import onnx
    import safetensors.numpy

    command = ["mxrewrite", "model.onnx", "--plan", "--no-sqnr", "--json"]
    plan = json.loads(subprocess.run(command, cwd=folder, check=True, capture_output=True).stdout)
    graph = onnx.load(str(folder / "model.onnx")).graph
    values = {tensor.name: tensor for tensor in graph.initializer}
    weights = {}
    for site in plan["sites"]:
        array = onnx.numpy_helper.to_array(values[site["initializer"]])
        turned = array if array.shape == (site["n"], site["k"]) else array.T
        weights[f"{site['module_path']}.weight"] = np.ascontiguousarray(turned)
    (folder / "checkpoint").mkdir()
    safetensors.numpy.save_file(weights, folder / "checkpoint/model.safetensors")


def run_page(page: Page, prepared: Path) -> Outcome:
    """Runs a page in this process."""
    with tempfile.TemporaryDirectory(prefix="mx-docs-", dir=prepared.parent) as scratch:
        home = Path.cwd()
        try:
            return Runner(page, Folders(prepared, Path(scratch))).run()
        finally:
            os.chdir(home)


def main(path: str, prepared: str) -> int:
    """A page in a process of its own; the outcome as JSON on stdout."""
    from docs_markdown import read

    outcome = run_page(read(ROOT / path), Path(prepared))
    print(json.dumps(vars(outcome)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2]))
