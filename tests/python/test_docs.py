#!/usr/bin/env python3
"""The documentation: snippets run, links lead somewhere, every error is explained.

    python3 tests/python/test_docs.py snippets|links|errors|selfcheck [PAGE ...]

`MX_BINARIES` is the folder with `mxrewrite`, `mxeval` and `libmx_custom_ops.so`; `PYTHONPATH` leads to the package. How
snippets run and how a page says otherwise: docs_snippets.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import docs_errors
import docs_links
import docs_names
import docs_snippets
from docs_markdown import Page, all_pages, is_documentation, parse


def snippets(pages: list[Page]) -> list[str]:
    """Runs all blocks, two pages at a time."""
    pages = [page for page in pages if is_documentation(page)]
    wrong = [f"{page.path}:{line}: a marker without a block" for page in pages for line in page.stray]
    ran: Counter[str] = Counter()
    skipped: list[str] = []
    slow: list[tuple[float, str]] = []
    with tempfile.TemporaryDirectory() as folder:
        tools, prepared = Path(folder, "tools"), Path(folder, "prepared")
        _tools(tools)
        os.environ["PATH"] = f"{tools}:{os.environ['PATH']}"
        prepared.mkdir()
        docs_snippets.prepare(prepared)
        wrong += docs_names.check(pages)
        # The longest first, so that none of them is alone at the end.
        order = sorted(pages, key=lambda page: -sum(len(block.text) for block in page.blocks if block.language == "sh"))
        with ThreadPoolExecutor(2) as pool:
            for outcome in pool.map(lambda page: _page(page, prepared), order):
                wrong += outcome["wrong"]
                skipped += outcome["skipped"]
                ran.update(outcome["ran"])
                slow += outcome["slow"]
    for line in sorted(skipped):
        print(f"skipped: {line}")
    for seconds, block in sorted(slow, reverse=True)[:5]:
        print(f"{seconds:6.1f} s  {block}")
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(ran.items()))
    print(f"snippets: {kinds}; {len(skipped)} skipped")
    return wrong


def _page(page: Page, prepared: Path) -> dict:
    script = Path(docs_snippets.__file__)
    done = subprocess.run([sys.executable, str(script), page.path, str(prepared)], capture_output=True, text=True)
    if done.returncode != 0:
        return {"wrong": [f"{page.path}: {done.stdout}{done.stderr}"], "skipped": [], "ran": {}, "slow": []}
    return json.loads(done.stdout.splitlines()[-1])


def _tools(folder: Path) -> None:
    """The two commands and this Python, as they are called in the documentation."""
    folder.mkdir()
    for name in ("mxrewrite", "mxeval"):
        (folder / name).symlink_to(Path(os.environ["MX_BINARIES"]) / name)
    for name in ("python", "python3"):
        # A link to a virtual environment's Python would not find the environment.
        (folder / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        (folder / name).chmod(0o755)


WRONG = """
# A page
[gone](gone.md) [no heading](README.md#nowhere) [elsewhere](https://example.org/) [itself](#a-page)

```
no language
```

```perl
unknown
```

<!-- snippet: skip (no reason of the list) -->
```sh
mxrewrite --no-such-option
```

<!-- snippet: perhaps -->
```python
1
```

```rust
unmarked
```

<!-- snippet: from tests/python/docs_links.py -->
```rust
this line is not in that file
```

<!-- snippet: skip (needs a GPU) -->
```python
def broken(
```

<!-- snippet: exit 1 -->
"""


def selfcheck(_: list[Page]) -> list[str]:
    """A page that is wrong in every way is found to be."""
    page = parse("README.md", WRONG)
    assert len(page.blocks) == 7 and len(page.stray) == 1, page
    links = [docs_links.broken(page, target, {"README.md": page}) for _, target in page.links()]
    assert [bool(reason) for reason in links] == [True, True, True, False], links
    marked = [docs_snippets.check_markers(block) for block in page.blocks]
    assert [bool(reason) for reason in marked] == [True] * 5 + [False] * 2, marked
    outcome = docs_snippets.Runner(page, docs_snippets.Folders(Path(), Path())).run()
    assert len(outcome.wrong) == 7 and not outcome.ran.get("python"), outcome
    assert not docs_errors.holds("cannot open 'x': y", docs_errors.fixed("cannot {action} '{}': needs {what}"))
    assert docs_errors.holds("cannot ACTION 'x': needs A", docs_errors.fixed("cannot {action} '{}': needs {what}"))
    print("selfcheck: what is wrong is found")
    return []


PARTS = {"snippets": snippets, "links": docs_links.check, "errors": docs_errors.check, "selfcheck": selfcheck}


def main() -> int:
    part, wanted = sys.argv[1], sys.argv[2:]
    pages = all_pages()
    if wanted:
        pages = [page for page in pages if page.path in wanted]
    wrong = PARTS[part](pages)
    for line in wrong:
        print(f"FAILED {line}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
