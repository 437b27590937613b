"""Markdown as the tests of the documentation read it: fenced blocks with their markers, headings, links, code spans."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_FENCE = re.compile(r"^(?P<indent>\s*)(?P<fence>`{3,}|~{3,})\s*(?P<language>[^\s`]*)\s*$")
_MARKER = re.compile(r"^\s*<!-- snippet: (?P<text>.+?) -->\s*$")
_HEADING = re.compile(r"^(#{1,6})\s+(.+?)\s*#*$")
_SPAN = re.compile(r"(`+)(.+?)\1")
_LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)")
_REFERENCE = re.compile(r"^\s*\[[^\]]+\]:\s+<?(\S+?)>?\s*$")
_ATTRIBUTE = re.compile(r"(?:href|src)=\"([^\"]+)\"")


@dataclass
class Block:
    """A fenced block."""

    page: str
    """Path from the repository's root."""
    line: int
    """Of the opening fence, from 1."""
    language: str
    text: str
    markers: list[str]
    """Of the comments `<!-- snippet: ... -->` right above it."""

    def __str__(self) -> str:
        return f"{self.page}:{self.line} ({self.language or 'no language'})"

    def values(self, kind: str) -> list[str]:
        """What markers of a kind say: `env A=1` gives `A=1` for `env`."""
        return [text.removeprefix(kind).strip() for text in self.markers if text.split()[0] == kind]

    def has(self, kind: str) -> bool:
        return bool(self.values(kind))


@dataclass
class Page:
    """A Markdown file."""

    path: str
    blocks: list[Block] = field(default_factory=list)
    prose: list[tuple[int, str]] = field(default_factory=list)
    """Lines outside of fenced blocks, with their numbers."""
    stray: list[int] = field(default_factory=list)
    """Lines with a marker that no block follows."""

    def anchors(self) -> set[str]:
        """Anchors of the headings, by GitHub's rules."""
        seen: dict[str, int] = {}
        anchors = set()
        for _, line in self.prose:
            if heading := _HEADING.match(line):
                slug = _slug(heading[2])
                count = seen.get(slug, 0)
                seen[slug] = count + 1
                anchors.add(f"{slug}-{count}" if count else slug)
            anchors.update(re.findall(r"<a (?:id|name)=\"([^\"]+)\"", line))
        return anchors

    def links(self) -> list[tuple[int, str]]:
        """Targets of links and images, with their lines."""
        found = []
        for number, line in self.prose:
            bare = _SPAN.sub("", line) if "](" not in line else _SPAN.sub(_blank_unless_linked, line)
            targets = [match[1] for match in _LINK.finditer(bare)] + _ATTRIBUTE.findall(bare)
            if reference := _REFERENCE.match(bare):
                targets.append(reference[1])
            found += [(number, target) for target in targets]
        return found

    def spans(self) -> list[str]:
        """Inline code."""
        return [match[2].strip() for _, line in self.prose for match in _SPAN.finditer(line)]


def _blank_unless_linked(span: re.Match[str]) -> str:
    """Code spans hide links inside them, but not a link around them."""
    return "code" if "](" in span[2] else span[0]


def _slug(heading: str) -> str:
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    text = text.replace("`", "").replace("*", "").lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def read(path: Path) -> Page:
    """Reads a file."""
    return parse(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8"))


def parse(name: str, text: str) -> Page:
    """A page from its text; an unclosed fence is an error."""
    page = Page(name)
    markers: list[str] = []
    marked = 0
    block: Block | None = None
    fence, indent, body = "", "", []
    for number, line in enumerate(text.splitlines(), 1):
        if block is not None:
            if line.strip() == fence:
                block.text = "\n".join(body) + "\n"
                page.blocks.append(block)
                block = None
            else:
                body.append(line.removeprefix(indent))
        elif opening := _FENCE.match(line):
            block = Block(page.path, number, opening["language"], "", markers)
            fence, indent, body, markers = opening["fence"], opening["indent"], [], []
        elif marker := _MARKER.match(line):
            markers.append(marker["text"])
            marked = number
        else:
            if markers and line.strip():
                page.stray.append(marked)
                markers = []
            page.prose.append((number, line))
    if block is not None:
        raise SystemExit(f"{block}: the fence is never closed")
    if markers:
        page.stray.append(marked)
    return page


def all_pages() -> list[Page]:
    """Every Markdown file of the repository, by path."""
    found = []
    for folder, folders, files in os.walk(ROOT):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in ("target", "node_modules"))
        found += [Path(folder) / name for name in files if name.endswith(".md")]
    return [read(path) for path in sorted(found)]


def is_documentation(page: Page) -> bool:
    """Pages whose blocks have to run."""
    parts = page.path.split("/")
    return page.path in ("README.md", "CONTRIBUTING.md", "python/README.md") or parts[0] in ("docs", "examples")
