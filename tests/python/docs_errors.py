"""Every error that the commands, the operator library and the Python package can give is on docs/troubleshooting.md.

Errors are found in the sources: the texts of `#[error("...")]`, the literals in constructors that take a whole message, and
Python's `raise`. What a text fills in is left out of the comparison: its fixed parts have to follow each other in one piece of code
on the page.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

from docs_markdown import ROOT, Page

PAGE = "docs/troubleshooting.md"
_ENUM = re.compile(r'#\[error\(\s*"((?:[^"\\]|\\.)*)"', re.DOTALL)
_WHOLE = re.compile(
    r"(?:Error::(?:Usage|Runtime|Device|Output|Dataset|NothingToScore)|OpError::usage|Failure::usage|CudaError::Unsupported|\bErr)"
    r'\(\s*(?:format!\(\s*)?"((?:[^"\\]|\\.)*)"',
    re.DOTALL,
)
_HOLE = re.compile(r"\{[^{}]*\}")
# Crates whose messages reach a user. Tests and benches are not among them.
SOURCES = ("src", "kernels/src", "custom_ops/src", "python/src")

# Texts that a user cannot meet by himself, by how they begin; with the reason.
ALLOWED = {
    "no product was planned for": "callers of the Rust crate alone: a launch of another plan",
    "kernel name": "callers of the Rust crate alone: a name with a NUL",
    "token scores planned with": "callers of the Rust crate alone: a launch of another plan",
}
# Files whose texts are no errors, with what they are.
OTHER = {
    "src/eval/report/plot": "why a report has no such plot",
    "src/eval/identity.rs": "why run.json has no digest of a file",
    "src/rewrite/patterns": "why the plan leaves a layer alone",
    "src/verify/bodies.rs": "why a layer is not compared, in verify's report",
    "src/verify/cut.rs": "why a layer is not compared, in verify's report",
    "src/verify/numbers.rs": "why an output is not compared, in verify's report",
}


def check(pages: list[Page]) -> list[str]:
    """What is not on the page, and what is allowed for nothing."""
    page = next(page for page in pages if page.path == PAGE)
    text = " ".join(line.strip() for _, line in page.prose)
    explained = [" ".join(span[1].replace("`", "").split()) for span in re.findall(r"(`+)(.+?)\1", text)]
    messages = _rust() + _python()
    wrong, unused = [], dict(ALLOWED)
    for place, message in messages:
        reason = next((start for start in ALLOWED if message.startswith(start)), None)
        if reason is not None:
            unused.pop(reason, None)
        elif not any(holds(span, fixed(message)) for span in explained):
            wrong.append(f"{place}: {message!r} is not on {PAGE}")
    wrong += [f"docs_errors.py allows {start!r}, which no message begins with" for start in unused]
    for start, reason in ALLOWED.items():
        print(f"not on the page: {start!r}: {reason}")
    for place, reason in OTHER.items():
        print(f"no errors: {place}: {reason}")
    print(f"errors: {len(messages)} messages, {len(explained)} pieces of code on {PAGE}")
    return wrong


def fixed(message: str) -> list[str]:
    """The parts of a text that are always the same and say something."""
    parts = [part.strip(" '\"`:.,;()") for part in _HOLE.split(message.replace("`", ""))]
    return [part for part in parts if re.search(r"[a-zA-Z]{2}", part)]


def holds(text: str, parts: list[str]) -> bool:
    """Whether parts follow each other in a text."""
    at = 0
    for part in parts:
        at = text.find(part, at)
        if at < 0:
            return False
        at += len(part)
    return True


def _rust() -> list[tuple[str, str]]:
    found = []
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*.rs")):
            name = str(path.relative_to(ROOT))
            if "/tests" in name or any(name.startswith(other) for other in OTHER):
                continue
            text = path.read_text(encoding="utf-8").split("#[cfg(test)]")[0]
            for pattern in (_ENUM, _WHOLE):
                for match in pattern.finditer(text):
                    found.append((_place(path, text, match.start()), _unescaped(match[1])))
    return [(place, message) for place, message in found if fixed(message)]


def _place(path: Path, text: str, at: int) -> str:
    return f"{path.relative_to(ROOT)}:{text.count(chr(10), 0, at) + 1}"


def _unescaped(literal: str) -> str:
    joined = re.sub(r"\\\n\s*", "", literal)
    return joined.replace('\\"', '"').replace("\\n", " ").replace("\\\\", "\\")


def _python() -> list[tuple[str, str]]:
    """First arguments of `raise SomeError(...)`; what is filled in becomes `{}`."""
    found = []
    for path in sorted((ROOT / "python/mxrewrite").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args):
                continue
            argument = node.exc.args[0]
            parts = argument.values if isinstance(argument, ast.JoinedStr) else [argument]
            texts = [str(part.value) if isinstance(part, ast.Constant) else "{}" for part in parts]
            message = "".join(texts)
            if fixed(message):
                found.append((f"{path.relative_to(ROOT)}:{node.lineno}", message))
    return found
