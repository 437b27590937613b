"""Options and environment variables that the documentation names exist."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from docs_markdown import ROOT, Page
from docs_snippets import commands

SUBCOMMANDS = {"mxrewrite": ["verify"], "mxeval": ["compare", "sensitivity", "search", "plan", "run-task", "merge"]}
_OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
_VARIABLE = re.compile(r"\bMX_[A-Z0-9_]+\b")
# Options of other programs, in prose.
FOREIGN = {"--ppl-stride": "llama.cpp", "--dependency": "Slurm", "--release": "cargo", "--package-config": "Olive"}
# Where options of scripts and names of variables stand.
SOURCES = ("scripts", "tests", "src", "kernels", "custom_ops", "python", "examples", "fuzz")
SUFFIXES = (".rs", ".py", ".sh", ".toml", ".c", ".cpp", ".h", ".cmake", ".txt")


class Options:
    """Options that the two commands have, by their own help."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], set[str]] = {}
        for command, subcommands in SUBCOMMANDS.items():
            for sub in ["", *subcommands]:
                arguments = [command, *([sub] if sub else []), "--help"]
                text = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout
                self._known[command, sub] = set(_OPTION.findall(text)) | {"--help", "--version"}

    def any_has(self, option: str) -> bool:
        return any(option in known for known in self._known.values())

    def unknown(self, text: str) -> list[str]:
        """Options in a line of shell, or in a usage line, that the command in it does not have."""
        found = []
        command: tuple[str, str] | None = None
        words = re.sub(r"[\[\]|]", " ", text).split()
        for place, word in enumerate(words):
            name = word.rsplit("/", 1)[-1]
            if name in SUBCOMMANDS and words[max(place - 1, 0)] != "-p":
                after = words[place + 1] if place + 1 < len(words) else ""
                command = (name, after if after in SUBCOMMANDS[name] else "")
            elif word in ("&&", ";", ">", ")"):
                command = None
            elif command and (option := _OPTION.match(word)) and option[0] not in self._known[command]:
                found.append(f"{' '.join(command).strip()} has no option {option[0]}")
        return found


def check(pages: list[Page]) -> list[str]:
    """What does not exist: in blocks, run or not, and in the prose's code."""
    options, sources, wrong, count = Options(), _sources(), [], 0
    for page in pages:
        texts = [(str(block), line) for block in page.blocks if block.language in ("sh", "bash") for line in commands(block.text)]
        texts += [(str(block), " ".join(block.text.split())) for block in page.blocks if block.has("usage")]
        texts += [(page.path, span) for span in page.spans()]
        for place, text in texts:
            count += "mxrewrite" in text or "mxeval" in text
            wrong += [f"{place}: {reason}" for reason in options.unknown(text)]
            for variable in _VARIABLE.findall(text):
                if variable not in sources:
                    wrong.append(f"{place}: nothing reads {variable}")
            option = _OPTION.match(text)
            if option and not (options.any_has(option[0]) or option[0] in FOREIGN or _named(option[0], sources)):
                wrong.append(f"{place}: no command or script has {option[0]}")
    print(f"names: options of {count} command lines exist")
    return wrong


def _named(option: str, sources: str) -> bool:
    """Whether a script or example has an option of this name."""
    return re.search(rf"{option}(?![\w-])", sources) is not None


def _sources() -> str:
    """All source text but the documentation's tests."""
    paths = [path for folder in SOURCES for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES]
    return "\n".join(path.read_text(encoding="utf-8") for path in paths if not _own(path))


def _own(path: Path) -> bool:
    return path.name.startswith("docs_") or "target" in path.relative_to(ROOT).parts
