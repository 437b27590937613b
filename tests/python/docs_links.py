"""Links of every Markdown file lead somewhere; the book's contents name every page of `docs/`."""

from __future__ import annotations

import re
from urllib.parse import unquote, urlsplit

from docs_markdown import ROOT, Page

# Public pages of projects, specifications and papers. Another one is a line here.
HOSTS = {
    "arxiv.org", "cmake.org", "creativecommons.org", "crates.io", "docs.nvidia.com", "docs.rs", "github.com", "huggingface.co",
    "keepachangelog.com", "onnx.ai", "onnxruntime.ai", "ort.pyke.io", "pypi.org", "rust-lang.github.io", "rustup.rs", "semver.org",
    "www.apache.org", "www.opencompute.org", "microsoft.github.io", "numpy.org",
}  # fmt: skip


def check(pages: list[Page]) -> list[str]:
    """What is wrong."""
    by_path = {page.path: page for page in pages}
    wrong = []
    count = 0
    for page in pages:
        for line, target in page.links():
            count += 1
            if reason := broken(page, target, by_path):
                wrong.append(f"{page.path}:{line}: link {target}: {reason}")
    wrong += _contents(by_path)
    print(f"links: {count} in {len(pages)} files")
    return wrong


def broken(page: Page, target: str, by_path: dict[str, Page]) -> str | None:
    """Why a link leads nowhere."""
    url = urlsplit(target)
    if url.scheme in ("http", "https"):
        return None if url.hostname in HOSTS else f"{url.hostname} is not among the hosts in tests/python/docs_links.py"
    if url.scheme or target.startswith("/"):
        return "neither relative nor http(s)"
    path = (ROOT / page.path).parent / unquote(url.path) if url.path else ROOT / page.path
    path = path.resolve()
    if not path.is_relative_to(ROOT) or not path.exists():
        return "no such file"
    if url.fragment:
        linked = by_path.get(str(path.relative_to(ROOT)))
        if linked is None:
            return None if re.fullmatch(r"L\d+(-L\d+)?", url.fragment) else "an anchor in a file that is no Markdown"
        if unquote(url.fragment) not in linked.anchors():
            return f"no heading of {linked.path} has this anchor"
    return None


def _contents(by_path: dict[str, Page]) -> list[str]:
    """docs/SUMMARY.md names every page of the book once."""
    named = [target for _, target in by_path["docs/SUMMARY.md"].links()]
    wrong = [f"docs/SUMMARY.md names {name} twice" for name in sorted(set(named)) if named.count(name) > 1]
    for path in by_path:
        name = path.removeprefix("docs/")
        if path.startswith("docs/") and name != "SUMMARY.md" and name not in named:
            wrong.append(f"docs/SUMMARY.md does not name {name}")
    return wrong
